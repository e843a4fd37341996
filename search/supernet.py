"""One set of weights for every network of a space, of which one is active at a time.

Each sub-module of a block (attention, convolution, feed-forward network) has its weights in a store; a network's own
weights are slices of the stores that its options name. It knows spaces and the model; not how it is trained, nor how
good a network is.

Axes: B batch, N tokens, C channels of a token, H heads, D head width of query, key and value, K taps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, cast, final

import timm
import torch
from timm.layers import Attention, Mlp, trunc_normal_
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import Optimizer

from glit_models.errors import SearchError
from glit_models.layers import Block, LocalConv
from glit_models.model import GLiT
from glit_models.spec import BlockSpec, GLiTSpec

from .space import SearchSpace

__all__ = ["SHARINGS", "Sharing", "Supernet", "keep_outside_path"]

Sharing = Literal["independent", "entangled"]
SHARINGS: tuple[Sharing, ...] = ("independent", "entangled")


@final
@dataclasses.dataclass(frozen=True)
class _Part:
    """One sub-module of a block as an option of it, by the sizes that its weights depend on."""

    kind: Literal["attn", "conv", "mlp"]
    heads: int = 0  # attn: G; conv: L
    width: int = 0  # attn: head width D; conv: E * C_l, hidden channels; mlp: hidden channels
    taps: int = 0  # conv: K

    @property
    def key(self) -> str:
        return "-".join(str(size) for size in (self.heads, self.width, self.taps) if size)


def _parts_of(block: BlockSpec, dim: int, num_heads: int) -> list[_Part]:
    head_width = dim // num_heads
    parts = [_Part("mlp", width=int(dim * block.mlp_ratio))]
    if block.qkv_ratio is not None:
        parts.append(_Part("attn", block.num_global_heads, int(block.qkv_ratio * head_width)))
    if block.kernel_size is not None and block.expand_ratio is not None:
        hidden = block.num_local_heads * head_width * block.expand_ratio
        parts.append(_Part("conv", block.num_local_heads, hidden, block.kernel_size))
    return parts


@final
@dataclasses.dataclass(frozen=True)
class _Slice:
    """Which part of a store's tensor a sub-module takes: under a view of it, a range along each axis.

    Attributes:
        view: shape of the view. box: (start, stop) along each of its axes. shape: of the sub-module's own tensor.
    """

    view: tuple[int, ...]
    box: tuple[tuple[int, int], ...]
    shape: tuple[int, ...]

    def of(self, tensor: Tensor) -> Tensor:
        """The part, in the sub-module's shape; shares memory with `tensor` where the part is one run of it."""
        return tensor.view(self.view)[tuple(slice(*bounds) for bounds in self.box)].reshape(self.shape)

    def outside(self, tensor: Tensor) -> Iterator[Tensor]:
        """All the rest, as views that do not overlap."""
        view = tensor.view(self.view)
        inside: tuple[slice, ...] = ()
        for size, (start, stop) in zip(self.view, self.box, strict=True):
            for rest in (slice(0, start), slice(stop, size)):
                if rest.start < rest.stop:
                    yield view[(*inside, rest)]
            inside = (*inside, slice(start, stop))


def _slices(part: _Part, store: _Part, dim: int, num_heads: int) -> dict[str, _Slice]:
    """What a sub-module takes of each of the store's tensors.

    Channels keep their places: a global sub-module reads and writes the first channels of a token, a local one the
    last. Hidden channels and head widths are the first ones of the store's; kernels are centred (AutoFormer,
    arXiv 2107.00651, section 3.1, for the widths).
    """
    head_width, width, whole_width = dim // num_heads, part.width, store.width
    every, hidden = (0, dim), (0, width)
    if part.kind == "mlp":
        return {
            "fc1.weight": _Slice((whole_width, dim), (hidden, every), (width, dim)),
            "fc1.bias": _Slice((whole_width,), (hidden,), (width,)),
            "fc2.weight": _Slice((dim, whole_width), (every, hidden), (dim, width)),
            "fc2.bias": _Slice((dim,), (every,), (dim,)),
        }
    channels, whole = part.heads * head_width, store.heads * head_width
    if part.kind == "attn":
        G, three, heads, first = part.heads, (0, 3), (0, part.heads), (0, channels)
        inner = (store.heads, whole_width)
        return {
            "qkv.weight": _Slice((3, *inner, whole), (three, heads, hidden, first), (3 * G * width, channels)),
            "qkv.bias": _Slice((3, *inner), (three, heads, hidden), (3 * G * width,)),
            "proj.weight": _Slice((whole, *inner), (first, heads, hidden), (channels, G * width)),
            "proj.bias": _Slice((whole,), (first,), (channels,)),
        }
    last, two = (whole - channels, whole), (0, 2)
    taps = ((store.taps - part.taps) // 2, (store.taps + part.taps) // 2)
    a_vector = _Slice((whole_width,), (hidden,), (width,))
    return {
        "expand.weight": _Slice((2, whole_width, whole), (two, hidden, last), (2 * width, channels)),
        "expand.bias": _Slice((2, whole_width), (two, hidden), (2 * width,)),
        "dwconv.weight": _Slice((whole_width, store.taps), (hidden, taps), (width, 1, 1, part.taps)),
        "dwconv.bias": a_vector,
        "bn.weight": a_vector,
        "bn.bias": a_vector,
        "bn.running_mean": a_vector,
        "bn.running_var": a_vector,
        "bn.num_batches_tracked": _Slice((), (), ()),
        "project.weight": _Slice((whole, whole_width), (last, hidden), (channels, width)),
        "project.bias": _Slice((whole,), (last,), (channels,)),
    }


_PREFIXES = {"attn": "mixer.attn.", "conv": "mixer.conv.", "mlp": "mlp."}


@final
class _SuperBlock(nn.Module):
    """The stores of one block, and the block that is active."""

    def __init__(
        self, options: Sequence[BlockSpec], dim: int, num_heads: int, sharing: Sharing, drop_path: float
    ) -> None:
        super().__init__()
        self.dim, self.num_heads, self.drop_path = dim, num_heads, drop_path
        self.norm1, self.norm2 = (nn.LayerNorm(dim, eps=1e-6) for _ in range(2))
        self._store_parts: dict[str, list[_Part]] = {"attn": [], "conv": [], "mlp": []}
        parts = dict.fromkeys(part for option in options for part in _parts_of(option, dim, num_heads))
        for kind, stores in self._store_parts.items():
            of_kind = [part for part in parts if part.kind == kind]
            if sharing == "entangled" and of_kind:
                sizes = (max(getattr(part, name) for part in of_kind) for name in ("heads", "width", "taps"))
                of_kind = [_Part(of_kind[0].kind, *sizes)]
            stores += of_kind
        self.attn = nn.ModuleDict({part.key: self._make(part) for part in self._store_parts["attn"]})
        self.conv = nn.ModuleDict({part.key: self._make(part) for part in self._store_parts["conv"]})
        self.mlp = nn.ModuleDict({part.key: self._make(part) for part in self._store_parts["mlp"]})
        self._templates: dict[BlockSpec, Block] = {}
        self.prepare: Callable[[Block], object] = lambda template: None
        self.active: BlockSpec | None = None

    def _make(self, part: _Part) -> nn.Module:
        channels = part.heads * (self.dim // self.num_heads)
        if part.kind == "mlp":
            return Mlp(self.dim, part.width)
        if part.kind == "attn":
            return Attention(channels, num_heads=part.heads, attn_head_dim=part.width, qkv_bias=True)
        return _conv_of(channels, part)

    def _store(self, part: _Part) -> _Part:
        stores = self._store_parts[part.kind]
        return part if part in stores else stores[0]

    def tensors(self, block: BlockSpec) -> dict[str, Tensor]:
        """The state dict of `block`: parameters as slices that gradients flow through, buffers as views."""
        tensors = {f"{norm}.{name}": tensor for norm in ("norm1", "norm2")
                   for name, tensor in getattr(self, norm).named_parameters()}  # fmt: skip
        for part in _parts_of(block, self.dim, self.num_heads):
            store = self._store(part)
            state = _named_tensors(getattr(self, part.kind)[store.key])
            for name, taken in _slices(part, store, self.dim, self.num_heads).items():
                tensors[_PREFIXES[part.kind] + name] = taken.of(state[name])
        return tensors

    def partly_used(self, block: BlockSpec) -> Iterator[tuple[nn.Parameter, _Slice]]:
        """The parameters that `block` takes a part of, each with what that is."""
        for part in _parts_of(block, self.dim, self.num_heads):
            store = self._store(part)
            if store != part:
                slices = _slices(part, store, self.dim, self.num_heads)
                for name, parameter in getattr(self, part.kind)[store.key].named_parameters():
                    yield parameter, slices[name]

    def template(self, block: BlockSpec) -> Block:
        """The block's code, without weights of its own."""
        if block not in self._templates:
            self._templates[block] = Block(
                self.dim, self.num_heads, block, drop_path=self.drop_path, device=torch.device("meta")
            )
            self.prepare(self._templates[block])
        return self._templates[block].train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, C] -> [B, N, C] through the active block."""
        assert self.active is not None
        return functional_call(self.template(self.active), self.tensors(self.active), (x,))


def _conv_of(channels: int, part: _Part) -> LocalConv:
    """Of any hidden width: the largest need not be a multiple of the most channels."""
    conv = LocalConv(channels, part.taps, 1)
    hidden = part.width
    conv.expand = nn.Linear(channels, 2 * hidden)
    conv.dwconv = nn.Conv2d(hidden, hidden, (1, part.taps), padding=(0, part.taps // 2), groups=hidden)
    conv.bn = nn.BatchNorm2d(hidden)
    conv.project = nn.Linear(hidden, channels)
    return conv


def _named_tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


@final
class Supernet(nn.Module):
    """The weights of every network of `space`, and the one of them that is active as a model.

    Args:
        space: whose members share weights.
        sharing: 'independent', where each option of a sub-module (an attention's heads and width, a convolution's
            heads, hidden width and kernel, a feed-forward network's width) has weights of its own, as in SPOS
            (arXiv 1904.00420); or 'entangled', where each is a slice of the largest (AutoFormer, arXiv 2107.00651).
            A block's norms, the embedding and the head are common to all in both.
        img_size, num_classes, in_chans, drop_rate, drop_path_rate: as of `GLiT`.

    Call `activate` before the first forward pass.
    """

    def __init__(
        self,
        space: SearchSpace,
        sharing: Sharing = "entangled",
        *,
        img_size: int | tuple[int, int] = 224,
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if sharing not in SHARINGS:
            raise SearchError(f"sharing must be {' or '.join(SHARINGS)}, got {sharing!r}")
        self.space, self.sharing = space, sharing
        self._task: dict[str, Any] = {"img_size": img_size, "num_classes": num_classes, "in_chans": in_chans}
        first = GLiTSpec(
            tuple(space.options(index)[0] for index in range(space.depth)),
            space.embed_dim, space.num_heads, space.patch_size,
        )  # fmt: skip
        # Embedding, final norm and head, and everything of timm's contract that a trainer asks for.
        self.net = GLiT(first, drop_rate=drop_rate, **self._task)
        rates = [drop_path_rate * index / max(space.depth - 1, 1) for index in range(space.depth)]
        self.net.blocks = nn.Sequential(
            *(
                _SuperBlock(space.options(index), space.embed_dim, space.num_heads, sharing, rate)
                for index, rate in enumerate(rates)
            )
        )
        self._initialise()
        self.active: GLiTSpec | None = None
        self.num_classes = num_classes
        # What timm's data configuration is resolved from.
        self.pretrained_cfg = dict(timm.get_pretrained_cfg("glit_tiny").to_dict(), input_size=(in_chans, 224, 224))

    def _initialise(self) -> None:
        """As a GLiT is initialised."""
        for module in self.net.blocks.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    @property
    def blocks(self) -> list[_SuperBlock]:
        """Its blocks, first to last."""
        return cast("list[_SuperBlock]", list(self.net.blocks))

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that take no weight decay, as timm's optimisers ask for them."""
        return {f"net.{name}" for name in self.net.no_weight_decay()}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameters by depth, for layer-wise learning rates."""
        return {
            "stem": r"^net\.(cls_token|pos_embed|patch_embed)",
            "blocks": [(r"^net\.blocks\.(\d+)", None), (r"^net\.norm", (99999,))],
        }

    def prepare_blocks(self, prepare: Callable[[Block], object]) -> None:
        """Change the code of every block, present and to come: which operators it takes, how it normalises."""
        for block in self.blocks:
            block.prepare = prepare
            block._templates.clear()

    def activate(self, spec: GLiTSpec) -> None:
        """Make `spec` the network that `forward` computes.

        Raises:
            SearchError: if it is no member of the space.
        """
        spec = self.space.canonical(spec)
        for block, choice in zip(self.blocks, spec.blocks, strict=True):
            block.active = choice
        self.active = spec

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, in_chans, H, W] -> logits [B, num_classes] of the active network.

        Raises:
            SearchError: if none is active.
        """
        if self.active is None:
            raise SearchError("no network is active: call activate(spec) first")
        return self.net(x)

    def state_of(self, spec: GLiTSpec) -> dict[str, Tensor]:
        """The state dict of a `GLiT` of this spec with the weights that it inherits; they are shared, not copied.

        Raises:
            SearchError: if it is no member of the space.
        """
        spec = self.space.canonical(spec)
        state = {name: tensor for name, tensor in _named_tensors(self.net).items() if not name.startswith("blocks.")}
        for index, (block, choice) in enumerate(zip(self.blocks, spec.blocks, strict=True)):
            state |= {f"blocks.{index}.{name}": tensor for name, tensor in block.tensors(choice).items()}
        return state

    @torch.no_grad()
    def extract(self, spec: GLiTSpec) -> GLiT:
        """The network by itself, with a copy of the weights that it inherits.

        BatchNorm's statistics are the shared ones, which are of no single network: recompute them on training images
        before it is used (`torch.optim.swa_utils.update_bn`).

        Raises:
            SearchError: if it is no member of the space.
        """
        state = self.state_of(spec)
        model = timm.create_model("glit_tiny", spec=self.space.canonical(spec), **self._task)
        model.load_state_dict(state)
        return model.to(state["pos_embed"].device).train(self.training)

    def num_params(self) -> int:
        """How many parameters all networks have together."""
        return sum(parameter.numel() for parameter in self.parameters())


def keep_outside_path(optimizer: Optimizer, supernet: Supernet) -> None:
    """Let steps of `optimizer` change nothing but the active network's weights and their moments.

    Parameters without a gradient are left alone by every optimiser. Of one that is used in part, the rest has a
    gradient of zero, and would be moved by momentum and by weight decay: it is put back after the step.
    """
    kept: list[tuple[Tensor, Tensor]] = []  # a part and its values before the step

    @torch.no_grad()
    def before(*_: Any) -> None:
        for block in supernet.blocks:
            assert block.active is not None
            for parameter, taken in block.partly_used(block.active):
                state = optimizer.state.get(parameter, {}).values()
                moments = (value for value in state if isinstance(value, Tensor) and value.shape == parameter.shape)
                for tensor in (parameter.detach(), *moments):
                    kept.extend((rest, rest.clone()) for rest in taken.outside(tensor))

    @torch.no_grad()
    def after(*_: Any) -> None:
        for rest, values in kept:
            rest.copy_(values)
        kept.clear()

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)
