"""The base class of block parts, such as attention or the local convolution.

Axes: B batch, N tokens, T = B * N, C channels.
"""

from __future__ import annotations

import dataclasses
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, Self

import torch
from torch import Tensor, nn

from ..errors import GlitError, SpecError, first_line

__all__ = [
    "BlockParts",
    "BuildOptions",
    "ExportOptions",
    "Part",
    "Slice",
    "TokenGrid",
    "build_part",
    "count_linear_params",
    "is_from_outside",
    "show_heads",
    "try_module",
]

_PACKAGE = __name__.partition(".")[0]


def count_linear_params(inputs: int, outputs: int) -> int:
    """Number of parameters of a linear layer with bias."""
    return inputs * outputs + outputs


def show_heads(num_heads: int) -> str:
    """Format a number of heads for a figure."""
    return f"{num_heads} {'head' if num_heads == 1 else 'heads'}"


class TokenGrid(NamedTuple):
    """The tokens of one image: `num_prefix` prefix tokens, then `height` x `width` patches in row-major order."""

    height: int
    width: int
    num_prefix: int = 1

    @property
    def num_patches(self) -> int:
        """Number of patch tokens."""
        return self.height * self.width

    @property
    def num_tokens(self) -> int:
        """N, the number of all tokens."""
        return self.num_patches + self.num_prefix


class BuildOptions(NamedTuple):
    """Options of a part's module, apart from its sizes.

    Attributes:
        tokens: the tokens of its input; a module that depends on their grid has a method `set_tokens(tokens)`.
        attn_drop: dropout probability of attention weights.
        proj_drop: dropout probability after the last projection.
        device, dtype: of the parameters.
    """

    tokens: TokenGrid
    attn_drop: float = 0.0
    proj_drop: float = 0.0
    device: Any = None
    dtype: Any = None

    @property
    def factory(self) -> dict[str, Any]:
        """Keyword arguments `device` and `dtype` for torch's layers."""
        return {"device": self.device, "dtype": self.dtype}


class ExportOptions(NamedTuple):
    """Options for converting a part's module to its flat form for export.

    Attributes:
        tokens: the tokens of an image; if the module has no `set_tokens`, their number may vary.
        attention: 'operator' for ONNX's `Attention` (opset 23), 'products' for two matrix products and a softmax,
            'fused' for torch's operator.
        dtype: of the activations.
        first_token_alone: compute only the class token, which is the first token of each image.
    """

    tokens: TokenGrid
    attention: Literal["operator", "products", "fused"]
    dtype: torch.dtype = torch.float32
    first_token_alone: bool = False


class Slice(NamedTuple):
    """The slice of a larger tensor that a smaller one takes: a range along each axis of a view of the larger tensor.

    Attributes:
        view: shape of the view.
        box: (start, stop) along each axis of the view.
        shape: of the smaller tensor.
        num_fixed: number of leading axes of the view that do not count channels; `mirrored` keeps their ranges.
    """

    view: tuple[int, ...]
    box: tuple[tuple[int, int], ...]
    shape: tuple[int, ...]
    num_fixed: int = 0

    @classmethod
    def first(cls, shape: Sequence[int], whole: Sequence[int]) -> Slice:
        """The first values along each axis of a tensor of shape `whole`."""
        return cls(tuple(whole), tuple((0, size) for size in shape), tuple(shape))

    @property
    def is_whole(self) -> bool:
        """Whether the slice is the whole tensor."""
        return all(bounds == (0, size) for bounds, size in zip(self.box, self.view, strict=True))

    def mirrored(self) -> Slice:
        """The slice of the same size from the other end of each axis: the last channels instead of the first."""
        box = tuple(
            bounds if axis < self.num_fixed else (size - bounds[1], size - bounds[0])
            for axis, (bounds, size) in enumerate(zip(self.box, self.view, strict=True))
        )
        return self._replace(box=box)

    def of(self, tensor: Tensor) -> Tensor:
        """The smaller tensor; it shares memory with `tensor` if its values are contiguous."""
        return self.inside(tensor).reshape(self.shape)

    def inside(self, tensor: Tensor) -> Tensor:
        """The same values as a view of `tensor`, in the shape of the box."""
        return tensor.view(self.view)[tuple(slice(*bounds) for bounds in self.box)]

    def put(self, tensor: Tensor, values: Tensor) -> None:
        """Write the smaller tensor's values into `tensor`, in place: the inverse of `of`."""
        inside = self.inside(tensor)
        inside.copy_(values.reshape(inside.shape))


@dataclass(frozen=True)
class Part(ABC):
    """A sub-module of a block with its sizes: maps [B, N, C] to [B, N, C]. Abstract.

    A subclass is a frozen dataclass whose fields are its sizes, starting with `channels`. Everything about a kind of
    part is in its class: add a file like the ones in this folder, register the class with `register_part`, and specs,
    costs, models, supernets, figures and exports can use it.

    Attributes:
        kind: name in specs, search spaces and tables (class attribute).
        slot: name of the module in a block, as in state dicts (class attribute).
        genes: for a part that can take a GLiT block's local heads, the names of its sizes in a `BlockSpec`
            (class attribute).
        has_running_statistics: whether the module has BatchNorm, so that a network extracted from a supernet needs its
            statistics recomputed (class attribute).
        color: colour of its box in figures (class attribute).
        channels: C, channels in and out.
    """

    kind: ClassVar[str]
    slot: ClassVar[str]
    genes: ClassVar[tuple[str, ...]] = ()
    has_running_statistics: ClassVar[bool] = False
    color: ClassVar[str] = "#7a7f87"

    channels: int

    @classmethod
    def from_genes(cls, num_heads: int, head_width: int, genes: Mapping[str, Any]) -> Self:
        """Create the part that takes `num_heads` heads of `head_width` channels of a GLiT block.

        Raises:
            SpecError: names the gene, its value and the bound.
        """
        raise NotImplementedError(f"{cls.__name__} cannot take heads of a GLiT block")  # only with `genes`

    @property
    @abstractmethod
    def num_params(self) -> int:
        """Trainable parameters of the module."""

    @abstractmethod
    def num_macs(self, tokens: TokenGrid) -> int:
        """Multiply-adds for one image: matrix products and convolutions; zero padding is included."""

    @abstractmethod
    def build(self, options: BuildOptions) -> nn.Module:
        """Build the module, [B, N, C] -> [B, N, C], with torch's default initialisation."""

    @property
    @abstractmethod
    def label(self) -> str:
        """Two short lines for figures, the more important one first."""

    @property
    def key(self) -> str:
        """The sizes as one word, which names the part's weights in a supernet where parts share none.

        Characters that are not allowed in a module's name are written as their code: 0.5 as `0_2e_5`. A key that is
        empty or could be an attribute of a module (`half`) ends with an underscore.
        """
        sizes = (getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "channels")
        key = "-".join(_as_word(size) for size in sizes if size is not None)
        return f"{key}_" if key.isidentifier() or not key else key

    def slices(self, whole: Self) -> Mapping[str, Slice | tuple[Slice, ...]]:
        """For each tensor in the module's state dict, the slice that it takes of a larger part's (weight entanglement).

        Several slices of one tensor are joined along the first axis.

        Raises:
            NotImplementedError: if this kind of part cannot share weights between sizes.
        """
        raise NotImplementedError(f"{self.kind} cannot be a slice of a larger one; use independent weights")

    @classmethod
    def covering(cls, parts: Sequence[Self]) -> Self:
        """The smallest part that each of `parts` is a slice of: the largest value of each size."""
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(**{name: max(getattr(part, name) for part in parts) for name in names})

    @classmethod
    def covering_private_qk(cls, parts: Sequence[Self]) -> Self:
        """`covering`, but attention has separate queries and keys for each number of heads (ViTAS, arXiv 2106.13700).

        Raises:
            NotImplementedError: if this kind of attention has no such store.
        """
        return cls.covering(parts)

    def flatten(self, module: nn.Module, options: ExportOptions) -> nn.Module:
        """The module to export instead of `module`, with BatchNorm folded: called with (x [T, C], N), returns [T, C].

        With `options.first_token_alone` it returns the class token of each image, [B, C]. The default wraps the module
        in reshapes. Children keep the names that they have in `module`: nodes and weights of the exported graph, and
        the layers that int8 leaves in float, are named after them.
        """
        return _Reshaped(module, options.first_token_alone)

    def mixing(self, module: nn.Module, x: Tensor) -> Tensor:
        """How strongly each token (row) takes in each token (column): [B, N, C] -> [B, heads, N, N].

        Weights are not negative, and rows sum to 1. B may be 1 if they do not depend on the images. `glit explain` uses
        this method.

        Raises:
            SpecError: if this kind of part does not implement it.
        """
        raise SpecError(f"part {self.kind!r} does not say how it mixes tokens; give its class a method `mixing`")


def _as_word(size: Any) -> str:
    """Convert a size to letters, digits and underscores; different sizes give different words."""
    is_whole = isinstance(size, (int, float)) and float(size).is_integer()
    text = str(int(size)) if is_whole else str(size)
    return re.sub("[^A-Za-z0-9]", lambda found: f"_{ord(found[0]):x}_", text)


class _Reshaped(nn.Module):
    """Wraps a module over [B, N, C] to take [T, C]. Exported names leave `.module` out."""

    def __init__(self, module: nn.Module, first_token_alone: bool) -> None:
        super().__init__()
        self.module, self.first_token_alone = module, first_token_alone

    def forward(self, x: Tensor, num_tokens: int) -> Tensor:
        x = self.module(x.unflatten(0, (-1, num_tokens)))
        return x[:, 0] if self.first_token_alone else x.flatten(0, 1)


def build_part(part: Part, options: BuildOptions) -> nn.Module:
    """`part.build(options)`; a module from a part outside the package is tried once.

    Raises:
        SpecError: if such a module fails, changes the shape of its input, or has other than `part.num_params`
            parameters.
    """
    module = part.build(options)
    if not is_from_outside(type(part)):
        return module
    found = sum(parameter.numel() for parameter in module.parameters())
    if found != part.num_params:
        raise SpecError(f"part {part.kind!r}: its module has {found} parameters, num_params says {part.num_params}")
    if torch.device(options.device or "cpu").type != "meta":
        x = torch.zeros(1, options.tokens.num_tokens, part.channels, **options.factory)
        try_module(f"part {part.kind!r}: its module", module, x, tuple(x.shape))
    return module


def is_from_outside(cls: type) -> bool:
    """Whether a class is user-defined, not from this package."""
    return cls.__module__.partition(".")[0] != _PACKAGE


@torch.no_grad()
def try_module(name: str, module: nn.Module, x: Tensor, shape: tuple[int, ...]) -> None:
    """Run a module once in evaluation and once in training mode, on an input for which it must return this shape.

    The state of the module and of the random number generator is restored.

    Raises:
        SpecError: if it fails or returns another shape; begins with `name`.
    """
    modes = {child: child.training for child in module.modules()}
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    try:
        for training in (False, True):
            _try_mode(name, module.train(training), x, shape)
    finally:
        for child, was_training in modes.items():
            child.training = was_training
        for buffer_name, buffer in module.named_buffers():
            buffer.copy_(buffers[buffer_name])


def _try_mode(name: str, module: nn.Module, x: Tensor, shape: tuple[int, ...]) -> None:
    mode = " in training mode" if module.training else ""
    try:
        with torch.random.fork_rng(devices=[]):
            y = module(x)
    except GlitError:
        raise
    except Exception as error:
        raise SpecError(f"{name} fails on {list(x.shape)}{mode}: {first_line(error)}") from error
    if not isinstance(y, Tensor) or y.shape != shape:
        got = list(y.shape) if isinstance(y, Tensor) else type(y).__name__
        raise SpecError(f"{name} must return {list(shape)}, got {got}{mode}")


@dataclass(frozen=True)
class BlockParts:
    """A pre-norm residual block: x + mixers(norm1(x)), then x + mlp(norm2(x)).

    Attributes:
        dim: C, channels of a token.
        mixers: the parts that mix tokens, each on separate channels, in this order; their channels add up to `dim`.
            With no mixers and no `mlp`, the block is an identity block.
        mlp: the part after the second norm.
        norm_eps: epsilon of both LayerNorms.
    """

    dim: int
    mixers: tuple[Part, ...]
    mlp: Part | None
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        for part in (*self.mixers, *([self.mlp] if self.mlp is not None else [])):
            if not isinstance(part, Part):
                raise SpecError(f"a block's parts must be parts, got {type(part).__name__}")
            if part.num_params < 0:
                raise SpecError(f"part {part.kind!r}: num_params must not be negative, got {part.num_params}")
        widths = [part.channels for part in self.mixers]
        if self.is_identity == bool(self.mixers) or (self.mixers and sum(widths) != self.dim):
            raise SpecError(f"the channels of a block's mixers must add up to {self.dim}, got {widths}")
        if len({part.slot for part in self.mixers}) < len(self.mixers):
            raise SpecError(f"a block's mixers must have different slots, got {[p.slot for p in self.mixers]}")

    @property
    def is_identity(self) -> bool:
        """Whether the block is an identity block."""
        return self.mlp is None

    def named(self) -> Iterator[tuple[str, Part]]:
        """Each part with the prefix of its tensors in the block's state dict."""
        for part in self.mixers:
            yield f"mixer.{part.slot}.", part
        if self.mlp is not None:
            yield "mlp.", self.mlp

    @property
    def has_running_statistics(self) -> bool:
        """Whether any part has running statistics."""
        return any(part.has_running_statistics for _, part in self.named())

    @property
    def num_params(self) -> int:
        """Trainable parameters, including the norms."""
        return 0 if self.is_identity else 2 * 2 * self.dim + sum(part.num_params for _, part in self.named())

    def num_macs(self, tokens: TokenGrid) -> int:
        """Multiply-adds for one image of these tokens. Raises SpecError if a part returns a negative number."""
        macs = [(part, part.num_macs(tokens)) for _, part in self.named()]
        for part, number in macs:
            if number < 0:
                raise SpecError(f"part {part.kind!r}: num_macs must not be negative, got {number}")
        return sum(number for _, number in macs)
