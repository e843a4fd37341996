"""One set of weights for all networks of a space; one network is active at a time.

The weights of each part of a block are kept in stores; a network's weights are slices of the stores, and of the tensors
that all networks share. The parts define their slices. Other modules do training and scoring.

Axes: B batch, N tokens, C channels of a token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, cast, final

import timm
import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from timm.models import checkpoint_seq
from torch import Tensor, nn

from glit_models import Spec, SpecTransformer
from glit_models.errors import SearchError
from glit_models.families import FAMILIES
from glit_models.parts import BlockParts, Slice

from ..spaces.space import SearchSpace
from .block import SHARINGS, Sharing, Side, SuperBlock, Templates, take_channels

__all__ = ["SHARINGS", "Sharing", "Supernet"]


@final
class Supernet(nn.Module):
    """The weights of all networks of `space`, and the active network as a model.

    Narrower networks use the first channels of all tensors with the embedding's width (AutoFormer, arXiv 2107.00651,
    section 3.1), shorter ones the first blocks.

    Args:
        space: the space whose members share weights.
        sharing: 'independent': each part at each of its sizes has separate weights, as in SPOS (arXiv 1904.00420);
            'entangled': each is a slice of the largest, the first channels (AutoFormer); 'both_sides': two slices, the
            first and the last channels, and `forward` returns the mean of their logits (BCNet, CVPR
            2021; ViTAS, arXiv 2106.13700). All share a block's norms, the embedding and the head.
        img_size: for this and the following, see `SpecTransformer`.
        num_classes: outputs of the head.
        in_chans: input channels.
        global_pool: 'token' or 'avg'; None for the family's default.
        drop_rate: dropout before the head.
        drop_path_rate: stochastic depth of the last block.
        private_qk: whether attention has separate queries and keys for each number of heads (ViTAS). Not with
            'independent', and only in the family 'autoformer'.

    Attributes:
        sides: the slices that a network has: 'first', or 'first' and 'last'. Only the first are extracted.

    Call `activate` before the first forward pass.

    Raises:
        SearchError: if the space does not support this sharing.
    """

    def __init__(
        self,
        space: SearchSpace,
        sharing: Sharing = "entangled",
        *,
        img_size: int | tuple[int, int] = 224,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        private_qk: bool = False,
    ) -> None:
        super().__init__()
        if sharing not in SHARINGS:
            raise SearchError(f"sharing must be one of {', '.join(SHARINGS)}, got {sharing!r}")
        if sharing == "independent" and len(space.embed_dims) > 1:
            widths = ", ".join(map(str, space.embed_dims))
            raise SearchError(f"sharing 'independent' needs one embed_dim, got {widths}; take 'entangled'")
        if sharing == "independent" and private_qk:
            raise SearchError("sharing 'independent' has no private_qk, as nothing is shared; take 'entangled'")
        self.space, self.sharing = space, sharing
        self.sides: tuple[Side, ...] = ("first", "last") if sharing == "both_sides" else ("first",)
        self._architecture = FAMILIES[space.family].architecture
        self._task: dict[str, Any] = {"img_size": img_size, "num_classes": num_classes, "in_chans": in_chans}
        if global_pool is not None:
            self._task["global_pool"] = global_pool
        self._parts: dict[tuple[int, int, Any], BlockParts] = {}
        self._common: dict[tuple[int, Side], dict[str, Slice]] = {}
        # Embedding, final norm and head, and timm's interface that a trainer needs.
        self.width = max(space.embed_dims)
        self.net: SpecTransformer = timm.create_model(
            self._architecture, spec=self._some_spec(self.width), drop_rate=drop_rate, **self._task
        )
        tokens = self.net.token_grid
        rates = [drop_path_rate * index / max(space.depth - 1, 1) for index in range(space.depth)]
        blocks = []
        templates: Templates = {}
        for index, rate in enumerate(rates):
            try:
                blocks.append(SuperBlock(self._options(index), tokens, sharing, rate, templates, private_qk))
            except NotImplementedError as error:
                way = f"sharing {sharing!r}{' with private_qk' * private_qk}"
                raise SearchError(f"{way} is impossible in blocks[{index}]: {error}") from None
        self.net.blocks = nn.Sequential(*blocks)
        self._initialise()
        self.active: Spec | None = None
        self.paths: tuple[Spec, ...] = ()
        self.num_classes = num_classes
        # The source of timm's data configuration.
        config = timm.get_pretrained_cfg(self._architecture)
        self.pretrained_cfg = dict(config.to_dict() if config else {}, input_size=(in_chans, 224, 224))

    def _some_spec(self, width: int) -> Spec:
        return self.space.make_spec((options.blocks[0] for options in self.space.block_options), width)

    def _options(self, index: int) -> list[BlockParts]:
        """The parts of every option of a block, at every width."""
        return [
            self.parts_of(index, block, width)
            for block in self.space.options(index)
            for width in self.space.embed_dims
        ]  # fmt: skip

    def _initialise(self) -> None:
        """Initialise weights as those of stand-alone networks."""
        for module in self.net.blocks.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def parts_of(self, index: int, block: Any, width: int) -> BlockParts:
        """The parts of a block at its index in a network of this width."""
        key = index, width, block
        if key not in self._parts:
            before = (options.blocks[0] for options in self.space.block_options[:index])
            self._parts[key] = self.space.make_spec((*before, block), width).block_parts(index)
        return self._parts[key]

    @property
    def blocks(self) -> list[SuperBlock]:
        """Its blocks, first to last."""
        return cast("list[SuperBlock]", list(self.net.blocks))

    def no_weight_decay(self) -> set[str]:
        """Names of parameters without weight decay, in the form of timm's optimisers."""
        return {f"net.{name}" for name in self.net.no_weight_decay()}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameters by depth, for layer-wise learning rates."""
        return {
            "stem": r"^net\.(?:cls_token|pos_embed|patch_embed)",
            "blocks": [(r"^net\.blocks\.(\d+)", None), (r"^net\.norm", (99999,))],
        }

    def prepare_blocks(self, prepare: Callable[[nn.Module], object]) -> None:
        """Set a function that modifies every block, now and in future: its operators, its normalisation."""
        for block in self.blocks:
            block.set_prepare(prepare)

    def activate(self, spec: Spec, paths: Sequence[Spec] = ()) -> None:
        """Make `spec` the network that `forward` computes.

        Args:
            paths: all networks that the next step of an optimiser trains, if there are others than `spec`.

        Raises:
            SearchError: if one is not a member of the space.
        """
        spec = self.space.canonical(spec)
        self.paths = tuple(map(self.space.canonical, paths)) or (spec,)
        for index, block in enumerate(self.blocks):
            block.active = self.parts_of(index, spec.blocks[index], spec.embed_dim) if index < spec.depth else None
        self.active = spec

    # ---- the active network ----

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, in_chans, H, W] -> logits [B, num_classes] of the active network, the mean over its sides.

        Raises:
            SearchError: if none is active.
        """
        if self.active is None:
            raise SearchError("no network is active: call activate(spec) first")
        x = self.net._embed(x)
        logits = [self._compute(x, self.active, side) for side in self.sides]
        return logits[0] if len(logits) == 1 else torch.stack(logits).mean(0)

    def _compute(self, x: Tensor, spec: Spec, side: Side) -> Tensor:
        """All channels of the tokens before the first block -> the logits of the active network on one side."""
        x = take_channels(x, spec.embed_dim, side)
        blocks = [partial(block, side=side) for block in self.blocks[: spec.depth]]
        if self.net.grad_checkpointing:
            return self.classify(checkpoint_seq(blocks, x), side)
        for block in blocks:
            x = block(x)
        return self.classify(x, side)

    def embed(self, x: Tensor, width: int) -> Tensor:
        """Images [B, in_chans, H, W] -> the tokens [B, N, C] before the first block of a network of this width."""
        return take_channels(self.net._embed(x), width, "first")

    def classify(self, x: Tensor, side: Side = "first") -> Tensor:
        """Tokens [B, N, C] after a network's last block -> its logits [B, num_classes]."""
        net = self.net
        x = net.head_drop(_norm(net.fc_norm, net.pool(_norm(net.norm, x, side)), side))
        if not isinstance(net.head, nn.Linear):
            return x
        return F.linear(x, take_channels(net.head.weight, x.shape[-1], side), net.head.bias)

    # ---- weights ----

    def _common_slices(self, width: int, side: Side = "first") -> dict[str, Slice]:
        """The slice of each tensor outside blocks that a network of this width uses."""
        if side == "last" and (width, side) not in self._common:
            self._common[width, side] = {name: s.mirrored() for name, s in self._common_slices(width).items()}
        if (width, side) not in self._common:
            model = timm.create_model(
                self._architecture, spec=self._some_spec(width), device=torch.device("meta"), **self._task
            )
            self._common[width, side] = {
                name: Slice.first(tensor.shape, self.net.get_parameter(name).shape)
                for name, tensor in model.named_parameters()
                if not name.startswith("blocks.")
            }
        return self._common[width, side]

    def state_of(self, spec: Spec, side: Side = "first") -> dict[str, Tensor]:
        """The state dict of a model of this spec with inherited weights, which share memory with the supernet's.

        Raises:
            SearchError: if it is not a member of the space.
        """
        spec = self.space.canonical(spec)
        slices = self._common_slices(spec.embed_dim, side)
        state: dict[str, Tensor] = {
            name: taken.of(self.net.get_parameter(name)) if not taken.is_whole else self.net.get_parameter(name)
            for name, taken in slices.items()
        }
        for index, choice in enumerate(spec.blocks):
            tensors = self.blocks[index].tensors(self.parts_of(index, choice, spec.embed_dim), side)
            state |= {f"blocks.{index}.{name}": tensor for name, tensor in tensors.items()}
        return state

    @torch.no_grad()
    def extract(self, spec: Spec) -> SpecTransformer:
        """A stand-alone network with a copy of the weights that it inherits, those of the first side.

        BatchNorm statistics are the shared ones, which fit no single network: recompute them on training images before
        use (`torch.optim.swa_utils.update_bn`).

        Raises:
            SearchError: if it is not a member of the space.
        """
        state = self.state_of(spec)
        model: SpecTransformer = timm.create_model(self._architecture, spec=self.space.canonical(spec), **self._task)
        model.load_state_dict(state)
        return model.to(state["pos_embed"].device).train(self.training)

    @torch.no_grad()
    def fill(self, model: SpecTransformer) -> None:
        """Copy the weights of a network to where it inherits them from: the inverse of `extract`.

        A head with another number of classes is skipped.

        Raises:
            SearchError: if it is not a member of the space.
        """
        spec, state = self.space.canonical(model.spec), model.state_dict()
        own, other = ("fc_norm", "norm") if isinstance(self.net.norm, nn.Identity) else ("norm", "fc_norm")
        for name in ("weight", "bias"):  # another pooling has its norm in another place
            state.setdefault(f"{own}.{name}", state.get(f"{other}.{name}"))
        for name, taken in self._common_slices(spec.embed_dim).items():
            if not name.startswith("head.") or model.num_classes == self.num_classes:
                taken.put(self.net.get_parameter(name), state[name])
        for index, choice in enumerate(spec.blocks):
            self.blocks[index].fill(self.parts_of(index, choice, spec.embed_dim), state, f"blocks.{index}.")

    def partly_used(self) -> dict[nn.Parameter, tuple[Slice, ...]]:
        """The parameters that this step's paths use only in part, each with the distinct parts in use."""
        taken: dict[nn.Parameter, dict[Slice | None, None]] = {}
        for spec in self.paths:
            for side in self.sides:
                for parameter, part in self._used(spec, side):
                    taken.setdefault(parameter, {})[part] = None
        parts = {parameter: tuple(part for part in found if part is not None) for parameter, found in taken.items()}
        return {parameter: found for parameter, found in parts.items() if len(found) == len(taken[parameter])}

    def _used(self, spec: Spec, side: Side) -> Iterator[tuple[nn.Parameter, Slice | None]]:
        """The parameters that a network uses, each with its slices, one at a time; None for all."""
        for name, taken in self._common_slices(spec.embed_dim, side).items():
            yield self.net.get_parameter(name), None if taken.is_whole else taken
        for index, block in enumerate(spec.blocks):
            yield from self.blocks[index].used(self.parts_of(index, block, spec.embed_dim), side)

    def num_params(self) -> int:
        """Number of parameters of all networks together."""
        return sum(parameter.numel() for parameter in self.parameters())


def _norm(module: nn.Module, x: Tensor, side: Side) -> Tensor:
    """Apply a LayerNorm to the first or last channels [..., C]; any other module is applied to `x`."""
    if not isinstance(module, nn.LayerNorm):
        return module(x)
    weight, bias = (take_channels(tensor, x.shape[-1], side) for tensor in (module.weight, module.bias))
    return F.layer_norm(x, weight.shape, weight, bias, module.eps)
