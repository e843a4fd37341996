"""`SpecTransformer`: builds a vision transformer from a spec, with timm's full model interface.

Families subclass it and define named variants, registration and checkpoint layouts.

Axes: B batch, N tokens, C channels, H/W image or grid height and width.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Final, Self

import torch
from timm.layers import (
    LayerNorm,
    PatchEmbed,
    calculate_drop_path_rates,
    get_device_dtype,
    global_pool_nlc,
    resample_abs_pos_embed,
    resample_patch_embed,
    to_2tuple,
    trunc_normal_,
)
from timm.models import checkpoint, checkpoint_seq
from timm.models._features import feature_take_indices
from timm.models._input import get_pretrained_grid_size, update_model_args, update_model_input_size
from torch import Tensor, nn

from .block import Block, build_block
from .cost import count_params
from .errors import SpecError, WeightsError
from .parts import BuildOptions, TokenGrid
from .runs.memory import free_memory
from .spec import Spec
from .weights.files import check_fits

__all__ = ["SpecTransformer", "checkpoint_filter_fn"]

_POOLS = ("", "avg", "token")


class SpecTransformer(nn.Module):
    """A vision transformer built from a spec. Abstract: a family's subclass sets its spec class and checkpoint layout.

    Attributes:
        spec_class: the family's `Spec` (class attribute).
        norm_eps: epsilon of the final LayerNorm (class attribute).

    Args:
        spec: the architecture: a spec of the family, a dict of its fields, or the path of a JSON file.
        img_size: input height and width in pixels, one number or two; multiples of the patch size.
        patch_size: overrides the spec's patch size.
        in_chans: input channels.
        num_classes: outputs of the head; 0 for none.
        global_pool: 'token' (class token), 'avg' (mean of the patch tokens) or '' (all tokens).
        class_token: whether to prepend a class token to the patch tokens.
        fc_norm: normalise after pooling instead of before; None means only with 'avg'.
        dynamic_img_size: accept any image size that is a multiple of the patch size; resamples the position embedding.
        dynamic_img_pad: with `dynamic_img_size`, pad other images to a multiple of the patch size.
        drop_rate: dropout before the head.
        pos_drop_rate: dropout after the position embedding.
        proj_drop_rate: dropout after each projection.
        attn_drop_rate: dropout of attention weights.
        drop_path_rate: stochastic depth of the last block, rising linearly from 0 at the first.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        SpecError: on an impossible spec, or an image size that is not a multiple of the patch size.
    """

    spec_class: ClassVar[type[Spec]]
    norm_eps: ClassVar[float] = 1e-6

    dynamic_img_size: Final[bool]
    __jit_unused_properties__: ClassVar[list[str]] = ["_model_args", "token_grid"]

    def __init__(
        self,
        spec: Spec | Mapping[str, Any] | str,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] | None = None,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        class_token: bool = True,
        fc_norm: bool | None = None,
        dynamic_img_size: bool = False,
        dynamic_img_pad: bool = False,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        network = self.spec_class.parse(spec)
        if patch_size is not None:
            network = _with(network, patch_size=_square(patch_size))
        _check_pool(global_pool, class_token)
        if not dynamic_img_size:
            _check_img_size(img_size, network.patch_size)
        _check_memory(network, img_size, in_chans, num_classes, device)
        use_fc_norm = global_pool == "avg" if fc_norm is None else fc_norm
        dim = network.embed_dim

        self.spec: Spec = network
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.global_pool = global_pool
        self.num_features = self.head_hidden_size = self.embed_dim = dim
        self.has_class_token = class_token
        self.num_prefix_tokens = int(class_token)
        self.dynamic_img_size = dynamic_img_size
        self.grad_checkpointing = False

        # A dynamic size needs the grid to resample the position embedding, so flattening comes later.
        embed_args: dict[str, Any] = {"strict_img_size": False, "output_fmt": "NHWC"} if dynamic_img_size else {}
        self.patch_embed = PatchEmbed(
            img_size, network.patch_size, in_chans, dim, dynamic_img_pad=dynamic_img_pad, **embed_args, **dd
        )
        num_tokens = self.patch_embed.num_patches + self.num_prefix_tokens
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim, **dd)) if class_token else None
        self.pos_embed = nn.Parameter(torch.empty(1, num_tokens, dim, **dd))
        self.pos_drop = nn.Dropout(pos_drop_rate)
        rates = calculate_drop_path_rates(drop_path_rate, network.depth)
        options = BuildOptions(self.token_grid, attn_drop_rate, proj_drop_rate, device, dtype)
        self.blocks = nn.Sequential(
            *(build_block(network.block_parts(index), options, rate) for index, rate in enumerate(rates))
        )
        self.depends_on_grid = any(
            hasattr(module, "set_tokens")
            for block in self.blocks
            if isinstance(block, Block)
            for _, part_module in block.part_modules()
            for module in part_module.modules()
        )
        self.feature_info = [
            {"module": f"blocks.{i}", "num_chs": dim, "reduction": network.patch_size} for i in range(network.depth)
        ]
        self.norm = nn.Identity() if use_fc_norm else LayerNorm(dim, eps=self.norm_eps, **dd)
        self.fc_norm = LayerNorm(dim, eps=self.norm_eps, **dd) if use_fc_norm else nn.Identity()
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(dim, num_classes, **dd) if num_classes > 0 else nn.Identity()

        self.register_load_state_dict_pre_hook(_convert_on_load)
        self.register_load_state_dict_post_hook(_restore_buffers)
        self.init_weights(needs_reset=False)

    @staticmethod
    def is_foreign(state_dict: Mapping[str, Any]) -> bool:
        """Whether a state dict is in the layout of the family's authors."""
        return False

    @staticmethod
    def convert_foreign(state_dict: Mapping[str, Any], spec: Any) -> dict[str, Tensor]:
        """Convert a state dict from the authors' layout to that of a model with this spec. Raises WeightsError."""
        return dict(state_dict)

    @property
    def token_grid(self) -> TokenGrid:
        """The tokens of an image of the model's size."""
        height, width = self.patch_embed.grid_size
        return TokenGrid(height, width, self.num_prefix_tokens)

    @property
    def _model_args(self) -> dict[str, Any]:
        """The arguments that timm writes into a Hub `config.json`; the spec is data, not an object or a path."""
        return {**self.__dict__.get("_saved_model_args", {}), "spec": self.spec.to_dict()}

    @_model_args.setter
    def _model_args(self, args: dict[str, Any]) -> None:
        self.__dict__["_saved_model_args"] = args

    @torch.jit.ignore
    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        """Initialise as timm's ViT does: truncated normal of 0.02 for linear layers and position embedding.

        Args:
            mode: only '' is supported.
            needs_reset: also call `reset_parameters` of the other layers and restore the buffers that are not in state
                dicts; needed after `to_empty`.
        """
        if mode:
            raise ValueError(f"init_weights mode must be '', got {mode!r}")
        trunc_normal_(self.pos_embed, std=0.02)
        if self.cls_token is not None:
            nn.init.normal_(self.cls_token, std=1e-6)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif needs_reset and callable(reset := getattr(module, "reset_parameters", None)):
                reset()
        if needs_reset:
            self.init_non_persistent_buffers()

    @torch.jit.ignore
    def init_non_persistent_buffers(self) -> None:
        """Compute the buffers that are not in the state dict, such as the positions of patches; as in timm's models."""
        self._set_tokens(self.token_grid)

    @torch.jit.ignore
    def fuse(self) -> Self:
        """Fold every BatchNorm into its convolution, in place, for inference only. Outputs agree to 1e-5 in float32.

        `timm.utils.reparameterize_model(model)` returns a folded copy and leaves the model unchanged.

        Returns:
            The model itself, in evaluation mode.
        """
        for block in self.blocks:
            if isinstance(block, Block):
                block.fuse()
        return self.eval()

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of parameters without weight decay, besides biases and norms, which the optimiser finds."""
        return {"pos_embed", "cls_token"}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Regular expressions that group parameters by depth, for layer-wise learning rates."""
        return {
            "stem": r"^cls_token|pos_embed|patch_embed",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block's activations in the backward pass instead of keeping them.

        In training mode, each step updates BatchNorm's running statistics twice, with the same batch: their momentum of
        0.1 acts as 0.19. The gradients stay the same.
        """
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The head."""
        return self.head

    @torch.jit.ignore
    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head with one of `num_classes` outputs (0: none); pooling None keeps the current one."""
        if global_pool is not None:
            _check_pool(global_pool, self.has_class_token)
            self.global_pool = global_pool
            update_model_args(self, fc_norm=not isinstance(self.fc_norm, nn.Identity))
        self.num_classes = num_classes
        dd = get_device_dtype(self)
        self.head = nn.Linear(self.embed_dim, num_classes, **dd) if num_classes > 0 else nn.Identity()
        self.head.train(self.training)

    @torch.jit.ignore
    def set_input_size(
        self, img_size: int | tuple[int, int] | None = None, patch_size: int | tuple[int, int] | None = None
    ) -> None:
        """Change image and patch size in place, resampling position embedding and patch projection."""
        patch = self.spec.patch_size if patch_size is None else _square(patch_size)
        img_size = to_2tuple(self.patch_embed.img_size if img_size is None else img_size)
        if not self.dynamic_img_size:
            _check_img_size(img_size, patch)
        old_grid = self.patch_embed.grid_size
        self.patch_embed.set_input_size(img_size=img_size, patch_size=None if patch_size is None else patch)
        self.spec = _with(self.spec, patch_size=patch)
        for info in self.feature_info:
            info["reduction"] = patch
        if self.patch_embed.grid_size != old_grid:
            resampled = resample_abs_pos_embed(
                self.pos_embed,
                new_size=self.patch_embed.grid_size,
                old_size=old_grid,
                num_prefix_tokens=self.num_prefix_tokens,
            )
            self.pos_embed = nn.Parameter(resampled, requires_grad=self.pos_embed.requires_grad)
            self._set_tokens(self.token_grid)
        update_model_input_size(self, img_size, patch_size=None if patch_size is None else patch)

    @torch.jit.ignore
    def _set_tokens(self, tokens: TokenGrid) -> None:
        """Set the grid of tokens of all blocks."""
        for block in self.blocks:
            if isinstance(block, Block):
                block.set_tokens(tokens)

    def _embed(self, x: Tensor) -> Tensor:
        """[B, in_chans, H, W] -> [B, N, C]: patches, class token in front, position embedding."""
        x = self.patch_embed(x)
        pos_embed = self.pos_embed
        if self.dynamic_img_size:
            B, H, W, C = x.shape
            if self.depends_on_grid and not torch.jit.is_scripting():
                self._set_tokens(TokenGrid(H, W, self.num_prefix_tokens))
            pos_embed = resample_abs_pos_embed(
                pos_embed,
                new_size=[H, W],
                old_size=self.patch_embed.grid_size,
                num_prefix_tokens=self.num_prefix_tokens,
            )
            x = x.view(B, -1, C)
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        return self.pos_drop(x + pos_embed)

    def forward_features(self, x: Tensor) -> Tensor:
        """[B, in_chans, H, W] -> [B, N, C], after the final norm."""
        x = self._embed(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint_seq(self.blocks, x)
        else:
            x = self.blocks(x)
        return self.norm(x)

    def pool(self, x: Tensor, pool_type: str | None = None) -> Tensor:
        """[B, N, C] -> [B, C], or unchanged with pooling ''."""
        pool_type = self.global_pool if pool_type is None else pool_type
        return global_pool_nlc(x, pool_type=pool_type, num_prefix_tokens=self.num_prefix_tokens)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """[B, N, C] -> logits [B, num_classes], or the head's input with `pre_logits`."""
        x = self.head_drop(self.fc_norm(self.pool(x)))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_chans, H, W] -> logits [B, num_classes]."""
        return self.forward_head(self.forward_features(x))

    @torch.jit.ignore
    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
    ) -> Any:
        """Return the outputs of chosen blocks, as timm's `forward_intermediates` does.

        Args:
            x: images [B, in_chans, H, W].
            indices: the last n blocks if an int, all if None, these blocks if a list.
            return_prefix_tokens: pair each output with its class token [B, 1, C].
            norm: apply the final norm to each output.
            stop_early: do not run the blocks after the last requested one.
            output_fmt: 'NCHW' for [B, C, H, W] or 'NLC' for [B, N, C] (patch tokens only).
            intermediates_only: return only the list, without the final features.
            output_dict: return a dict with `image_intermediates` and `image_features`.

        Returns:
            (features [B, N, C], list of intermediates), unless the last two arguments change it.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt must be 'NCHW' or 'NLC', got {output_fmt!r}")
        take_indices, max_index = feature_take_indices(len(self.blocks), indices)
        B, _, height, width = x.shape
        x = self._embed(x)
        taken: list[Tensor] = []
        for index, block in enumerate(self.blocks[: max_index + 1] if stop_early else self.blocks):
            x = checkpoint(block, x) if self.grad_checkpointing else block(x)
            if index in take_indices:
                taken.append(self.norm(x) if norm else x)

        prefix = [y[:, : self.num_prefix_tokens] for y in taken] if self.num_prefix_tokens else None
        outputs: list[Any] = [y[:, self.num_prefix_tokens :] for y in taken]
        if output_fmt == "NCHW":
            H, W = self.patch_embed.dynamic_feat_size((height, width))
            outputs = [y.reshape(B, H, W, -1).permute(0, 3, 1, 2).contiguous() for y in outputs]
        if output_dict:
            result: dict[str, Any] = {"image_intermediates": outputs}
            if return_prefix_tokens and prefix is not None:
                result["image_intermediates_prefix"] = prefix
            if not intermediates_only:
                result["image_features"] = self.norm(x)
            return result
        if return_prefix_tokens and prefix is not None:
            outputs = list(zip(outputs, prefix, strict=True))
        return outputs if intermediates_only else (self.norm(x), outputs)

    @torch.jit.ignore
    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the blocks after the last one in `indices`, and optionally the final norm and head."""
        take_indices, max_index = feature_take_indices(len(self.blocks), indices)
        self.blocks = self.blocks[: max_index + 1]
        self.spec = _with(self.spec, blocks=self.spec.blocks[: max_index + 1])
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.fc_norm = nn.Identity()
            self.reset_classifier(0, "")
        return take_indices


def _square(patch_size: int | tuple[int, int]) -> int:
    height, width = to_2tuple(patch_size)
    if height != width:
        raise SpecError(f"patch_size must be square, got {height} x {width}")
    return int(height)


def _check_memory(spec: Spec, img_size: int | tuple[int, int], in_chans: int, num_classes: int, device: Any) -> None:
    """Raise SpecError if the parameters do not fit into this machine's memory, before allocating them."""
    if torch.device(device or torch.get_default_device()).type != "cpu":
        return
    needed, there = 4 * count_params(spec, num_classes, img_size, in_chans), free_memory()
    if needed > there:
        raise SpecError(
            f"the parameters take {needed / 1e9:,.0f} GB, and this machine has {there / 1e9:,.0f} GB left; "
            "take a smaller network, image or number of classes"
        )


def _check_pool(global_pool: str, class_token: bool) -> None:
    if global_pool not in _POOLS:
        raise ValueError(f"global_pool must be one of {', '.join(map(repr, _POOLS))}, got {global_pool!r}")
    if global_pool == "token" and not class_token:
        raise ValueError("global_pool='token' needs the class token; use 'avg' with class_token=False")


def _check_img_size(img_size: int | tuple[int, int], patch_size: int) -> None:
    height, width = to_2tuple(img_size)
    if height < patch_size or width < patch_size or height % patch_size or width % patch_size:
        raise SpecError(
            f"img_size must be a multiple of patch_size={patch_size}, got {height} x {width}; "
            "or pass dynamic_img_size=True"
        )


def _with(spec: Any, **changes: Any) -> Any:
    """`dataclasses.replace` for specs: a family's spec is a frozen dataclass, but `Spec` itself is not."""
    return dataclasses.replace(spec, **changes)


def _convert_on_load(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Let a plain `load_state_dict` (and timm's `load_checkpoint`) accept the layout of the family's authors."""
    assert isinstance(module, SpecTransformer)
    if not prefix and module.is_foreign(state_dict):
        converted = module.convert_foreign(state_dict, module.spec)
        state_dict.clear()
        state_dict.update(converted)


def _restore_buffers(module: nn.Module, _incompatible_keys: Any) -> None:
    """Restore the buffers that are not in a state dict, which a model created on the meta device lacks."""
    assert isinstance(module, SpecTransformer)
    module.init_non_persistent_buffers()


def checkpoint_filter_fn(state_dict: dict[str, Any], model: SpecTransformer, strict: bool = True) -> dict[str, Tensor]:
    """Adapt a checkpoint to `model`: authors' layout, other image or patch size, norm before or after pooling.

    With `strict=False`, keys may be missing or unknown.

    Raises:
        WeightsError: if its shapes or names differ from the model's; names the first. timm adapts the head and the
            input channels.
    """
    state_dict = state_dict.get("model", state_dict)
    if model.is_foreign(state_dict):
        state_dict = model.convert_foreign(state_dict, model.spec)
    state_dict = dict(state_dict)
    if isinstance(model.norm, nn.Identity) and "fc_norm.weight" not in state_dict:
        for name in ("weight", "bias"):
            if f"norm.{name}" in state_dict:
                state_dict[f"fc_norm.{name}"] = state_dict.pop(f"norm.{name}")
    weight = state_dict.get("patch_embed.proj.weight")
    pos_embed = state_dict.get("pos_embed")
    if pos_embed is not None and pos_embed.shape[1] != model.pos_embed.shape[1]:
        if ("cls_token" in state_dict) != model.has_class_token:
            fault = "'cls_token' is missing" if model.has_class_token else "it has no 'cls_token'"
            raise WeightsError(f"weights do not fit the model: {fault}")
        state_dict["pos_embed"] = resample_abs_pos_embed(
            pos_embed,
            new_size=model.patch_embed.grid_size,
            old_size=get_pretrained_grid_size(model, weight, pos_embed.shape[1] - model.num_prefix_tokens),
            num_prefix_tokens=model.num_prefix_tokens,
        )
    if weight is not None and weight.shape[-2:] != model.patch_embed.proj.weight.shape[-2:]:
        state_dict["patch_embed.proj.weight"] = resample_patch_embed(weight, list(model.patch_embed.patch_size))
    check_fits(state_dict, model, ignore=("head.", "patch_embed.proj.weight"), strict=strict)
    return state_dict
