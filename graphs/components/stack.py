"""What modules have in common that run a stack of layers."""

from __future__ import annotations

from torch import nn


class AlikeLayers(nn.Module):
    """Runs `layers` one after the other and nothing between them, each with the same other arguments.

    So two of them are traced and the others are copies (see `graphs.repeat`).
    """

    layers: nn.ModuleList

    def repeated(self) -> nn.ModuleList | None:
        """The layers."""
        return self.layers
