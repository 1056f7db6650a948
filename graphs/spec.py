"""What a model offers a deployer: tensors, methods, architectures.

A `Method` is one entry point (`vision_encoder`, `text_decoder`, ...); an `Architecture` is a frozen configuration that
builds the modules behind its methods and knows how a public checkpoint names their weights.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from graphs.errors import UserError

if TYPE_CHECKING:
    from graphs.preprocess.picture import Processor
    from graphs.preprocess.prompt import PromptTemplate
    from graphs.weights import Source


@dataclass(frozen=True)
class Dim:
    """A dimension that changes from call to call, between `min` and `max` inclusive."""

    name: str
    min: int
    max: int


Values = Literal["normal", "pixels", "ids", "positions"]


@dataclass(frozen=True)
class TensorSpec:
    """Name, shape and dtype of one input, output or state; `values` says what a seeded example is drawn from.

    `normal`: standard normal. `pixels`: integers 0..255 of a smooth picture with some noise. `ids`: integers below
    `high`. `positions`: consecutive integers from the number of tokens already seen.
    """

    name: str
    shape: tuple[int | Dim, ...]
    dtype: torch.dtype = torch.float32
    values: Values = "normal"
    high: int = 0

    @property
    def dims(self) -> tuple[Dim, ...]:
        return tuple(size for size in self.shape if isinstance(size, Dim))

    def size(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape with every `Dim` replaced by `sizes[dim.name]`."""
        return tuple(sizes[s.name] if isinstance(s, Dim) else s for s in self.shape)

    def example(self, sizes: Mapping[str, int], seed: int, start: int = 0) -> Tensor:
        """A tensor of this spec, drawn from `seed`; `start` is where `positions` begin."""
        size = self.size(sizes)
        generator = torch.Generator().manual_seed(seed)
        draw = {
            "normal": lambda: torch.randn(size, generator=generator),
            "pixels": lambda: picture(size, generator),
            "ids": lambda: torch.randint(0, self.high, size, generator=generator),
            "positions": lambda: torch.arange(start, start + size[-1]).expand(size).contiguous(),
        }[self.values]
        return draw().to(self.dtype)


def picture(size: Sequence[int], generator: torch.Generator) -> Tensor:
    """Values 0..255 that change smoothly over the last two dimensions, with a fifth of noise.

    Of noise alone all patches look alike, and what chooses among tokens would be decided by rounding.
    """
    planes = math.prod(size[:-2])
    coarse = torch.rand(planes, 1, 6, 6, generator=generator)
    smooth = functional.interpolate(coarse, tuple(size[-2:]), mode="bilinear", align_corners=True)
    noise = torch.rand(planes, 1, *size[-2:], generator=generator)
    return (255 * (0.8 * smooth + 0.2 * noise)).round().reshape(*size)


#: the length of dynamic dimensions in an example; of pictures these at least, and no more than are so many numbers,
#: three of 448 x 448
EXAMPLE_LENGTH, EXAMPLE_PICTURES, EXAMPLE_PIXELS = 12, 3, 3 * 3 * 448 * 448


@dataclass(frozen=True)
class Method:
    """One entry point of a model.

    `module` maps `inputs` (positional) to `outputs`; `state` lists the buffers it owns and updates in place, by their
    names in the module, each starting as zeros.
    """

    name: str
    module: nn.Module = field(repr=False)
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    state: tuple[TensorSpec, ...] = ()

    @property
    def dims(self) -> dict[str, Dim]:
        """The dynamic dimensions of all inputs, by name."""
        return {dim.name: dim for spec in self.inputs for dim in spec.dims}

    @property
    def example_length(self) -> int:
        """Of dynamic dimensions in an example: less where pictures would be more than `EXAMPLE_PIXELS`."""
        pictures = [spec.shape for spec in self.inputs if spec.values == "pixels" and spec.dims]
        each = max((math.prod(size for size in shape if isinstance(size, int)) for shape in pictures), default=1)
        return min(EXAMPLE_LENGTH, max(EXAMPLE_PICTURES, EXAMPLE_PIXELS // each))

    def examples(self, seed: int = 0, lengths: Sequence[int] = ()) -> Iterator[tuple[Tensor, ...]]:
        """Seeded inputs for one call, or for a sequence of calls that share the state, one for each of `lengths`.

        Every dynamic dimension takes that length, clipped to its bounds. The default is one call of `example_length`,
        and three single steps behind it where there is state.
        """
        start = 0
        for call, length in enumerate(lengths or (self.example_length, *((1, 1, 1) if self.state else ()))):
            sizes = {name: max(dim.min, min(dim.max, length)) for name, dim in self.dims.items()}
            yield tuple(
                spec.example(sizes, seed * 1009 + call * 101 + index, start) for index, spec in enumerate(self.inputs)
            )
            start += length


@dataclass(frozen=True)
class Variant:
    """A published size: its configuration, the hub id of its checkpoint and the published parameter count."""

    name: str
    architecture: Architecture
    checkpoint: str | None = None
    parameters: int | None = None


@dataclass(frozen=True)
class Architecture:
    """Configuration of one system; subclasses are frozen dataclasses that live one a file in `graphs.architectures`.

    A subclass registers itself by being the value of its module's `ARCHITECTURE`.
    """

    name: ClassVar[str]
    kind: ClassVar[str]  # the kind of deployable graph, as in the catalogue: "vlm_decoder", "dual_encoder", ...

    @classmethod
    def variants(cls) -> tuple[Variant, ...]:
        """The published sizes, and one named `tiny` for tests."""
        raise TypeError(f"{cls.__name__} must list its variants")

    @classmethod
    def from_config(cls, config: Mapping[str, Any], preprocessor: Mapping[str, Any] | None = None) -> Self:
        """The architecture that a checkpoint's config.json (and preprocessor_config.json) describes.

        Raises UserError naming the key at fault.
        """
        raise TypeError(f"{cls.__name__} must read config.json")

    def build(self) -> nn.Module:
        """A root module with one child a method; builds on any device, fake tensors included, in float32."""
        raise TypeError(f"{type(self).__name__} must build its modules")

    def methods(self, root: nn.Module) -> tuple[Method, ...]:
        """The entry points over the children of `root`."""
        raise TypeError(f"{type(self).__name__} must list its methods")

    def source(self, parameter: str) -> Source:
        """Where a public checkpoint keeps a parameter of the root module, given by its name there."""
        raise TypeError(f"{type(self).__name__} must map its checkpoint")

    #: (regular expression at the start of a tensor's name, replacement): how names of the public layouts of a system
    #: become those that `source` speaks of; the first that matches counts
    aliases: ClassVar[tuple[tuple[str, str], ...]] = ()

    #: regular expressions of checkpoint tensors that the deployed graph does not use
    unused: ClassVar[tuple[str, ...]] = ()

    def given(self, tensors: Container[str]) -> Self:
        """This architecture with what only the names of a checkpoint's tensors tell, as `source` speaks of them."""
        return self

    def unused_parameters(self) -> int:
        """How many parameters a public checkpoint carries beyond those of the graph."""
        return 0

    def with_context(self, max_context: int) -> Self:
        """This architecture with its KV cache bounded to `max_context` tokens. Raises UserError where it has none."""
        raise UserError(f"{self.name} keeps no context that could be bounded")

    def facts(self) -> dict[str, Any]:
        """What clients and planners must know and no tensor tells: context, visual tokens, layers, vocabulary."""
        return {}

    @property
    def image_processor(self) -> Processor | None:
        """How a picture becomes this model's pixels, alone or with other arrays; None where it takes no pictures."""
        return None

    @property
    def template(self) -> PromptTemplate | None:
        """How a question becomes a prompt; None where the model takes no prompts."""
        return None
