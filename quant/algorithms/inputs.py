"""What calibration knows of the inputs of a layer, as the weight algorithms read it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from graphs.errors import UserError


@dataclass(frozen=True)
class Inputs:
    """Statistics of a layer's inputs x [K] over calibration tokens; each may be missing, and follows from a richer one.

    hessian_KK: mean of x x^T. square_K: mean of x^2. absmean_K: mean of |x|. absmax_K: largest |x|. rows_RK: a sample
    of inputs, whose means count row r `row_weights_R[r]` times (all alike when None). All float.
    """

    hessian_KK: Tensor | None = None
    square_K: Tensor | None = None
    absmean_K: Tensor | None = None
    absmax_K: Tensor | None = None
    rows_RK: Tensor | None = None
    row_weights_R: Tensor | None = None

    def weighted_rows(self) -> Tensor:
        """rows_RK float32, each times the square root of its share of the sample: their squares' sum is the mean."""
        if self.rows_RK is None:
            raise UserError("these statistics hold no sample of inputs: calibrate again with rows")
        rows = self.rows_RK.float()
        return rows * self.shares()[:, None].sqrt()

    def shares(self) -> Tensor:
        """What each row counts for in a mean, float32 [R], summing to 1."""
        assert self.rows_RK is not None
        if self.row_weights_R is None:
            return torch.full((len(self.rows_RK),), 1.0 / len(self.rows_RK))
        return self.row_weights_R.float() / self.row_weights_R.float().sum()

    def hessian(self) -> Tensor:
        """Mean of x x^T, float32 [K, K]."""
        if self.hessian_KK is not None:
            return self.hessian_KK.float()
        rows = self.weighted_rows()
        return rows.T @ rows

    def square(self) -> Tensor:
        """Mean of x^2, float32 [K]."""
        if self.square_K is not None:
            return self.square_K.float()
        if self.hessian_KK is not None:
            return self.hessian_KK.diagonal().float()
        return self.weighted_rows().square().sum(0)

    def absmean(self) -> Tensor:
        """Mean of |x|, float32 [K]; where only squares are known, their root."""
        if self.absmean_K is not None:
            return self.absmean_K.float()
        if self.rows_RK is not None:
            return self.shares() @ self.rows_RK.float().abs()
        return self.square().sqrt()

    def absmax(self) -> Tensor:
        """Largest |x|, float32 [K]."""
        if self.absmax_K is not None:
            return self.absmax_K.float()
        if self.rows_RK is None:
            raise UserError("these statistics hold no largest magnitudes: calibrate again")
        return self.rows_RK.float().abs().amax(0)

    def output_error(self, delta_OK: Tensor) -> float:
        """Mean over tokens of |delta x|^2, from the cheapest statistic that knows how inputs correlate.

        With neither rows nor Hessian the inputs are taken as uncorrelated.
        """
        rows, hessian = self.rows_RK, self.hessian_KK
        if rows is not None and (hessian is None or len(rows) <= rows.shape[1]):
            return float((self.weighted_rows() @ delta_OK.T).square().sum())
        if hessian is not None:
            return float(((delta_OK @ hessian.float()) * delta_OK).sum())
        return float((delta_OK.square() @ self.square()).sum())

    def divided_by(self, factors_K: Tensor) -> Inputs:
        """The statistics of x / factors, as after a rescaling."""
        inverse = factors_K.float().reciprocal()

        def scaled(values: Tensor | None, by: Tensor) -> Tensor | None:
            return None if values is None else values.float() * by

        return Inputs(
            scaled(self.hessian_KK, inverse[:, None] * inverse),
            scaled(self.square_K, inverse.square()),
            scaled(self.absmean_K, inverse),
            scaled(self.absmax_K, inverse),
            scaled(self.rows_RK, inverse),
            self.row_weights_R,
        )


def importance(inputs: Inputs) -> Tensor:
    """What an error in each input's weight costs: mean x^2 in units of its mean, float32 [K], at least 1%.

    The floor keeps inputs that calibration never saw from being given up.
    """
    square = inputs.square()
    return (square / square.mean().clamp_min(torch.finfo(torch.float32).tiny)).clamp_min(0.01)
