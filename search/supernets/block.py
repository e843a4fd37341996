"""A block of a supernet: the weights of all options of the block, and the active option.

Axes: B batch, N tokens, C channels of a token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal, TypeVar, final

import torch
from torch import Tensor, nn
from torch.func import functional_call

from glit_models.block import Block
from glit_models.parts import BlockParts, BuildOptions, Part, Slice, TokenGrid, build_part

__all__ = ["SHARINGS", "Sharing", "Side", "SuperBlock", "Templates", "take_channels"]

_Key = TypeVar("_Key")
_Value = TypeVar("_Value")
Sharing = Literal["independent", "entangled", "both_sides"]
SHARINGS: tuple[Sharing, ...] = ("independent", "entangled", "both_sides")
Side = Literal["first", "last"]  # which channels of shared tensors a network uses
Templates = dict[tuple[BlockParts, float, torch.device], Block]  # by parts, stochastic depth and device of the weights
# Kept at most, the newest; a template takes about 100 kB. ViTAS's space has 4,000 for each of 16 blocks.
_MOST_TEMPLATES, _MOST_PLANS = 4096, 1024


@final
@dataclass(frozen=True)
class _Taken:
    """A tensor of a block: where it is in the stores, and the slices that are used, joined; none for all."""

    name: str
    owner: nn.Module
    leaf: str
    pieces: tuple[Slice, ...]

    def get(self) -> Tensor:
        tensor: Tensor = getattr(self.owner, self.leaf)
        taken = [piece.of(tensor) for piece in self.pieces]
        return torch.cat(taken) if len(taken) > 1 else taken[0] if taken else tensor

    def put(self, values: Tensor) -> None:
        tensor: Tensor = getattr(self.owner, self.leaf)
        if not self.pieces:
            tensor.copy_(values)
            return
        for piece, part in zip(self.pieces, values.split([piece.shape[0] for piece in self.pieces]), strict=True):
            piece.put(tensor, part)

    def mirrored(self) -> _Taken:
        return replace(self, pieces=tuple(piece.mirrored() for piece in self.pieces))


@final
class SuperBlock(nn.Module):
    """The stores of one block by the slot of their parts, and the active block.

    Args:
        options: the parts of each option of the block.
        tokens: the tokens of an image.
        sharing, private_qk: see `Supernet`.
        drop_path: stochastic-depth probability.
        templates: the modules of blocks without weights; blocks of a supernet share them.

    Raises:
        NotImplementedError: if a part does not support this sharing.
    """

    def __init__(
        self,
        options: Iterable[BlockParts],
        tokens: TokenGrid,
        sharing: Sharing,
        drop_path: float,
        templates: Templates,
        private_qk: bool = False,
    ) -> None:
        super().__init__()
        options = list(options)
        self.tokens, self.drop_path = tokens, drop_path
        dim, eps = max(parts.dim for parts in options), options[0].norm_eps
        self.norm1, self.norm2 = (nn.LayerNorm(dim, eps=eps) for _ in range(2))
        if sharing == "both_sides" and any(len(parts.mixers) > 1 for parts in options):
            raise NotImplementedError("options of several mixers would change places; take 'entangled'")
        self._covers = {} if sharing == "independent" else _covers(options, private_qk)
        for slot, stores in _stores(options, self._covers).items():
            built = {part.key: build_part(part, BuildOptions(tokens)) for part in stores}
            self.add_module(slot, nn.ModuleDict(built))
        self._plans: dict[tuple[BlockParts, Side], list[_Taken]] = {}
        self._templates = templates
        self._prepare: Callable[[nn.Module], object] = lambda template: None
        self.active: BlockParts | None = None
        for part in dict.fromkeys(part for parts in options for _, part in parts.named()):
            list(self._plan_part("", part))  # raises if a part is not a slice of its store

    def set_prepare(self, prepare: Callable[[nn.Module], object]) -> None:
        """Set a function that modifies the block's code, now and in future."""
        self._prepare = prepare
        self._templates.clear()

    def _plan(self, parts: BlockParts, side: Side = "first") -> list[_Taken]:
        """The source of each tensor in the block's state dict."""
        if (parts, side) not in self._plans:
            if side == "last":
                plan = [taken.mirrored() for taken in self._plan(parts)]
            else:
                plan = [] if parts.is_identity else list(self._plan_norms(parts.dim))
                for prefix, part in parts.named():
                    plan += self._plan_part(prefix, part)
            _keep(self._plans, (parts, side), plan, _MOST_PLANS)
        return self._plans[parts, side]

    def _plan_norms(self, dim: int) -> Iterator[_Taken]:
        for norm in ("norm1", "norm2"):
            for leaf, parameter in getattr(self, norm).named_parameters():
                taken = Slice.first((dim,), parameter.shape)
                yield _Taken(f"{norm}.{leaf}", getattr(self, norm), leaf, () if taken.is_whole else (taken,))

    def _plan_part(self, prefix: str, part: Part) -> Iterator[_Taken]:
        store = self._covers.get(type(part), part)
        slices = {} if store == part else part.slices(store)
        module = getattr(self, part.slot)[store.key]
        for name in module.state_dict():
            owner, _, leaf = name.rpartition(".")
            taken = slices.get(name, ())
            pieces = (taken,) if isinstance(taken, Slice) else taken
            whole = len(pieces) == 1 and pieces[0].is_whole
            yield _Taken(prefix + name, module.get_submodule(owner), leaf, () if whole else pieces)

    def tensors(self, parts: BlockParts, side: Side = "first") -> dict[str, Tensor]:
        """The state dict of a block: parameters as slices that gradients flow through, buffers as views.

        Buffers must not be joined from several slices.
        """
        return {taken.name: taken.get() for taken in self._plan(parts, side)}

    def fill(self, parts: BlockParts, state: Mapping[str, Tensor], prefix: str) -> None:
        """Copy a block's tensors, named with `prefix` in `state`, to where `tensors` reads them."""
        for taken in self._plan(parts):
            taken.put(state[prefix + taken.name])

    def used(self, parts: BlockParts, side: Side = "first") -> Iterator[tuple[nn.Parameter, Slice | None]]:
        """The parameters that a block uses, each with its slices, one at a time; None for all."""
        for entry in self._plan(parts, side):
            parameter = getattr(entry.owner, entry.leaf)
            if isinstance(parameter, nn.Parameter):
                for piece in entry.pieces or (None,):
                    yield parameter, piece

    def template(self, parts: BlockParts) -> Block:
        """The block's module, without weights."""
        key = parts, self.drop_path, self.norm1.weight.device
        if key not in self._templates:
            template = Block(parts, BuildOptions(self.tokens, device=torch.device("meta")), self.drop_path)
            # Buffers that depend on the grid of tokens are the template's, on the device of the weights.
            with torch.inference_mode(False), torch.no_grad():
                functional_call(_SetTokens(template), _prefixed(self.tensors(parts)), (self.tokens,))
            self._prepare(template)
            _keep(self._templates, key, template, _MOST_TEMPLATES)
        return self._templates[key].train(self.training)

    def forward(self, x: Tensor, side: Side = "first") -> Tensor:
        """[B, N, C] -> [B, N, C] through the active block, with the weights of one side."""
        assert self.active is not None
        if self.active.is_identity:
            return x
        return functional_call(self.template(self.active), self.tensors(self.active, side), (x,))


def _keep(cache: dict[_Key, _Value], key: _Key, value: _Value, most: int) -> None:
    """Put a value into a cache of at most this number, which forgets the oldest."""
    while len(cache) >= most:
        del cache[next(iter(cache))]
    cache[key] = value


def take_channels(x: Tensor, size: int, side: Side) -> Tensor:
    """The first or last channels of [..., C]: [..., size]."""
    return x[..., :size] if side == "first" else x[..., x.shape[-1] - size :]


def _covers(options: Iterable[BlockParts], private_qk: bool) -> dict[type[Part], Part]:
    """For each kind of part, the one that all others of its kind are slices of."""
    by_kind: dict[type[Part], dict[Part, None]] = {}
    for part in (part for option in options for _, part in option.named()):
        by_kind.setdefault(type(part), {})[part] = None
    return {
        kind: (kind.covering_private_qk if private_qk else kind.covering)(list(parts))
        for kind, parts in by_kind.items()
    }  # fmt: skip


def _stores(options: Iterable[BlockParts], covers: Mapping[type[Part], Part]) -> dict[str, list[Part]]:
    """The parts that have weights, by slot: those that mix tokens first, in the order of their names."""
    parts = dict.fromkeys(part for option in options for _, part in option.named())
    last = {option.mlp.slot for option in options if option.mlp is not None}
    stores: dict[str, list[Part]] = {slot: [] for slot in sorted({p.slot for p in parts}, key=lambda s: (s in last, s))}
    for kind in dict.fromkeys(type(part) for part in parts):
        of_kind = [part for part in parts if type(part) is kind]
        stores[kind.slot] += [covers[kind]] if kind in covers else of_kind
    return stores


def _prefixed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"block.{name}": tensor for name, tensor in tensors.items()}


@final
class _SetTokens(nn.Module):
    """Sets the grid of tokens of a block whose tensors are real."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.block = block

    def forward(self, tokens: TokenGrid) -> None:
        self.block.set_tokens(tokens)
