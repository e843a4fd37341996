"""A block of a supernet: the weights of all options of the block, and the active option.

Axes: B batch, N tokens, C channels of a token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor, nn
from torch.func import functional_call

from glit_models.block import Block
from glit_models.parts import BlockParts, BuildOptions, Part, Slice, TokenGrid, build_part

__all__ = ["SHARINGS", "Sharing", "SuperBlock", "Templates"]

Sharing = Literal["independent", "entangled"]
SHARINGS: tuple[Sharing, ...] = ("independent", "entangled")
Templates = dict[tuple[BlockParts, float, torch.device], Block]  # by parts, stochastic depth and device of the weights


@final
@dataclass(frozen=True)
class _Taken:
    """A tensor of a block: where it is in the stores, and the slice that is used; None for all."""

    name: str
    owner: nn.Module
    leaf: str
    taken: Slice | None

    def get(self) -> Tensor:
        tensor: Tensor = getattr(self.owner, self.leaf)
        return tensor if self.taken is None else self.taken.of(tensor)

    def put(self, values: Tensor) -> None:
        tensor: Tensor = getattr(self.owner, self.leaf)
        if self.taken is None:
            tensor.copy_(values)
        else:
            self.taken.put(tensor, values)


@final
class SuperBlock(nn.Module):
    """The stores of one block by the slot of their parts, and the active block.

    Args:
        options: the parts of each option of the block.
        tokens: the tokens of an image.
        sharing: see `Supernet`.
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
    ) -> None:
        super().__init__()
        options = list(options)
        self.tokens, self.drop_path = tokens, drop_path
        dim, eps = max(parts.dim for parts in options), options[0].norm_eps
        self.norm1, self.norm2 = (nn.LayerNorm(dim, eps=eps) for _ in range(2))
        self._stores = _stores(options, sharing)
        for slot, stores in self._stores.items():
            built = {part.key: build_part(part, BuildOptions(tokens)) for part in stores}
            self.add_module(slot, nn.ModuleDict(built))
        self._plans: dict[BlockParts, list[_Taken]] = {}
        self._templates = templates
        self._prepare: Callable[[nn.Module], object] = lambda template: None
        self.active: BlockParts | None = None
        if sharing == "entangled":
            for parts in options:
                self._plan(parts)  # raises if a part is not a slice of its store

    def set_prepare(self, prepare: Callable[[nn.Module], object]) -> None:
        """Set a function that modifies the block's code, now and in future."""
        self._prepare = prepare
        self._templates.clear()

    def _plan(self, parts: BlockParts) -> list[_Taken]:
        """The source of each tensor in the block's state dict."""
        if parts not in self._plans:
            plan = []
            for norm in () if parts.is_identity else ("norm1", "norm2"):
                for leaf, parameter in getattr(self, norm).named_parameters():
                    taken = Slice.first((parts.dim,), parameter.shape)
                    plan.append(_Taken(f"{norm}.{leaf}", getattr(self, norm), leaf, None if taken.is_whole else taken))
            for prefix, part in parts.named():
                plan += self._plan_part(prefix, part)
            self._plans[parts] = plan
        return self._plans[parts]

    def _plan_part(self, prefix: str, part: Part) -> Iterator[_Taken]:
        stores = self._stores[part.slot]
        store = part if part in stores else next(store for store in stores if type(store) is type(part))
        slices = {} if store == part else part.slices(store)
        module = getattr(self, part.slot)[store.key]
        for name in module.state_dict():
            owner, _, leaf = name.rpartition(".")
            taken = slices.get(name)
            whole = taken is None or taken.is_whole
            yield _Taken(prefix + name, module.get_submodule(owner), leaf, None if whole else taken)

    def tensors(self, parts: BlockParts) -> dict[str, Tensor]:
        """The state dict of a block: parameters as slices that gradients flow through, buffers as views."""
        return {taken.name: taken.get() for taken in self._plan(parts)}

    def fill(self, parts: BlockParts, state: Mapping[str, Tensor], prefix: str) -> None:
        """Copy a block's tensors, named with `prefix` in `state`, to where `tensors` reads them."""
        for taken in self._plan(parts):
            taken.put(state[prefix + taken.name])

    def used(self, parts: BlockParts) -> Iterator[tuple[nn.Parameter, Slice | None]]:
        """The parameters that a block uses, each with its slice; None for all."""
        for entry in self._plan(parts):
            parameter = getattr(entry.owner, entry.leaf)
            if isinstance(parameter, nn.Parameter):
                yield parameter, entry.taken

    def template(self, parts: BlockParts) -> Block:
        """The block's module, without weights."""
        key = parts, self.drop_path, self.norm1.weight.device
        if key not in self._templates:
            template = Block(parts, BuildOptions(self.tokens, device=torch.device("meta")), self.drop_path)
            # Buffers that depend on the grid of tokens are the template's, on the device of the weights.
            with torch.inference_mode(False), torch.no_grad():
                functional_call(_SetTokens(template), _prefixed(self.tensors(parts)), (self.tokens,))
            self._prepare(template)
            self._templates[key] = template
        return self._templates[key].train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, C] -> [B, N, C] through the active block."""
        assert self.active is not None
        if self.active.is_identity:
            return x
        return functional_call(self.template(self.active), self.tensors(self.active), (x,))


def _stores(options: Iterable[BlockParts], sharing: Sharing) -> dict[str, list[Part]]:
    """The parts that have weights, by slot: those that mix tokens first, in the order of their names."""
    parts = dict.fromkeys(part for option in options for _, part in option.named())
    last = {option.mlp.slot for option in options if option.mlp is not None}
    stores: dict[str, list[Part]] = {slot: [] for slot in sorted({p.slot for p in parts}, key=lambda s: (s in last, s))}
    for kind in dict.fromkeys(type(part) for part in parts):
        of_kind = [part for part in parts if type(part) is kind]
        stores[kind.slot] += [kind.covering(of_kind)] if sharing == "entangled" else of_kind
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
