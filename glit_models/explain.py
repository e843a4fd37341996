"""Explain predictions as maps over the image: how blocks mix tokens, attention rollout, and Grad-CAM.

`Part.mixing` gives the mixing of each part: attention weights, or a banded matrix of a convolution's kernel.

Axes: B batch, N tokens, H heads, h/w height and width of the grid of patches.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .block import Block
from .errors import Argument, GlitError, SpecError, first_line
from .model import SpecTransformer

__all__ = ["BlockMixing", "GradCam", "attention_map", "gradcam", "mean_distances", "rollout", "token_mixing"]


@dataclass(frozen=True, eq=False)
class BlockMixing:
    """The mixing of tokens in one block.

    Attributes:
        heads: for each part that mixes tokens, by kind, the weight of each token (column) in each token (row),
            [B, H, N, N]; rows sum to 1. Empty for an identity block.
        matrix: [B, N, N], the mean over heads, then over parts weighted by their channels.
    """

    heads: Mapping[str, Tensor]
    matrix: Tensor


@torch.no_grad()
def token_mixing(model: nn.Module, images: Tensor) -> list[BlockMixing]:
    """Compute how each block of a model mixes the tokens of images.

    Args:
        model: a model of this package; it is set to evaluation mode.
        images: preprocessed, [B, in_chans, height, width], on the model's device.

    Raises:
        GlitError: if the model is not from this package.
        SpecError: if a part does not implement `mixing`.
    """
    network = check_ours(model).eval()
    heads: list[dict[str, Tensor]] = [{} for _ in network.blocks]
    hooks = []
    try:
        for index, block in enumerate(network.blocks):
            mixer: Any = block.mixer if isinstance(block, Block) else {}
            for part in block.parts.mixers if isinstance(block, Block) else ():

                def keep(
                    module: nn.Module, inputs: Any, part: Any = part, found: dict[str, Tensor] = heads[index]
                ) -> None:
                    found[part.kind] = part.mixing(module, inputs[0]).float()

                hooks.append(mixer[part.slot].register_forward_pre_hook(keep))
        num_tokens = network.forward_features(images).shape[1]
    finally:
        for hook in hooks:
            hook.remove()
    return [
        BlockMixing(found, _one_matrix(block, found, len(images), num_tokens))
        for block, found in zip(network.blocks, heads, strict=True)
    ]


def check_ours(model: nn.Module) -> SpecTransformer:
    """Return the model. Raises GlitError if it is not from this package."""
    if not isinstance(model, SpecTransformer):
        way_out = Argument("method", "gradcam")
        raise GlitError(
            f"{type(model).__name__} is not a model of this package; of timm's others only ", way_out, " works"
        )
    return model


def _one_matrix(block: Any, heads: Mapping[str, Tensor], num_images: int, num_tokens: int) -> Tensor:
    """[B, N, N]."""
    if not heads:
        return torch.eye(num_tokens).expand(num_images, -1, -1)
    parts = (heads[part.kind].mean(1) * (part.channels / block.parts.dim) for part in block.parts.mixers)
    return sum(parts, torch.zeros((), device=next(iter(heads.values())).device)).expand(num_images, -1, -1)


def rollout(blocks: Sequence[BlockMixing]) -> Tensor:
    """The weight of each input token in each token after the last block: [B, N, N]; rows sum to 1.

    Each block's matrix is averaged with the identity of its residual branch.

    Source: Abnar and Zuidema, Quantifying attention flow in transformers (arXiv 2005.00928), extended to convolutions.
    """
    product = torch.eye(blocks[0].matrix.shape[-1])
    for block in blocks:
        matrix = block.matrix.cpu()
        product = (matrix + torch.eye(product.shape[-1])) / 2 @ product
    return product


def attention_map(model: nn.Module, matrix: Tensor, images: Tensor) -> Tensor:
    """The weight of each patch in the pooled features: the class token's row, or the mean of the patches' rows.

    Args:
        model: a model of this package.
        matrix: of `BlockMixing`, of one of its heads, or of `rollout`, [B, N, N].
        images: as in `token_mixing`.

    Returns:
        [B, h, w], not negative.
    """
    network = check_ours(model)
    prefix = network.num_prefix_tokens
    rows = (_pooled(network, matrix.shape[-1]).to(matrix.device) @ matrix)[..., prefix:]
    return rows.unflatten(-1, _grid(network, images))


def _pooled(model: SpecTransformer, num_tokens: int) -> Tensor:
    """The weight of each token in the pooled features, [N]."""
    weights = torch.zeros(num_tokens)
    weights[0 if model.global_pool == "token" else slice(model.num_prefix_tokens, None)] = 1
    return weights / weights.sum()


def _grid(model: Any, images: Tensor) -> tuple[int, int]:
    """Height and width of the images' grid of patches."""
    height, width = model.patch_embed.dynamic_feat_size(tuple(images.shape[-2:]))
    return height, width


def mean_distances(model: nn.Module, block: BlockMixing, images: Tensor) -> dict[str, Tensor]:
    """The mean distance, in patches, of the patches that each head mixes, weighted by mixing, [H], by kind of part.

    This is the mean over patches and images; the class token has no position and is left out.
    """
    prefix, (height, width) = check_ours(model).num_prefix_tokens, _grid(model, images)
    place = torch.arange(height * width)
    places = torch.stack([place // width, place % width], dim=1).float()
    distance = torch.cdist(places, places)
    result = {}
    for kind, heads in block.heads.items():
        weights = heads[..., prefix:, prefix:].cpu()
        mean = (weights * distance).sum(-1) / weights.sum(-1).clamp(min=1e-12)
        result[kind] = mean.mean((0, 2))
    return result


# ---- Grad-CAM ----


@dataclass(frozen=True, eq=False)
class GradCam:
    """Grad-CAM maps.

    Attributes:
        maps: values from 0 to 1, [B, height, width] of the images.
        classes: the explained classes, [B], which are the most probable ones.
        block: the block whose features are used; None for a network without blocks of tokens.
        note: a line of text if the maps are not of the last block or do not cover some patches; else empty.
    """

    maps: Tensor
    classes: Tensor
    block: int | None
    note: str = ""


def gradcam(model: nn.Module, images: Tensor, block: int | None = None) -> GradCam:
    """Compute Grad-CAM with the `grad-cam` package: at the first norm of a block, or a timm network's last feature map.

    With a class token, the gradient of a patch is zero if no path leads from the block's mixing to that token. A
    convolution of kernel K over the tokens has such paths only from the first K // 2 patches.

    Args:
        model: any timm classifier; it is set to evaluation mode.
        images: as in `token_mixing`.
        block: number of the block, from 0; default: the last block from which all patches reach the prediction.

    Raises:
        GlitError: if grad-cam is missing, the model has no such block, or it has no layer that is known to work.
    """
    grad_cam = import_gradcam()
    model = model.eval()
    note = ""
    if isinstance(model, SpecTransformer):
        block, note = _choose_block(model, images[:1], block)
    layer, block, reshape = _layer(model, images, block)
    _check_maps(model, layer, reshape, images[:1])
    images = images.detach().requires_grad_()  # otherwise a frozen network has no gradients
    with torch.enable_grad(), grad_cam(model, [layer], reshape) as cam:
        maps = torch.from_numpy(cam(images, None))
        classes = cam.outputs.detach().argmax(-1).cpu()
    model.zero_grad(set_to_none=True)
    return GradCam(maps, classes, block, note)


def import_gradcam() -> Any:
    """Import the class `GradCAM` of the package grad-cam. Raises GlitError if it is missing."""
    try:
        return importlib.import_module("pytorch_grad_cam").GradCAM
    except ImportError as error:
        raise GlitError(f"Grad-CAM needs the package grad-cam: pip install grad-cam ({first_line(error)})") from None


def _choose_block(model: SpecTransformer, images: Tensor, block: int | None) -> tuple[int, str]:
    """Choose the block for Grad-CAM; returns it with a note on the choice."""
    check_block(model, block)
    possible = [index for index, module in enumerate(model.blocks) if isinstance(module, Block)]
    if block is not None and block not in possible:
        raise GlitError(Argument("block", block), " is an identity block: it has no features")
    last = possible[-1]
    try:
        reached, total = reached_patches(model, images)
    except SpecError as error:
        return last if block is None else block, f"{error}; Grad-CAM may only explain a part of the image"
    if block is None:
        most = max(reached[index] for index in possible)
        block = max(index for index in possible if reached[index] == most)
    seen = f"at block {{}} only {{}} of {total} patches reach the prediction: Grad-CAM there says nothing of the others"
    if reached[block] < total:
        return block, seen.format(block, reached[block])
    if block < last and reached[last] < total:
        return (
            block,
            f"{seen.format(last, reached[last])}; it is taken at block {block}, the last that all reach it from",
        )
    return block, ""


def check_block(model: nn.Module, block: int | None) -> None:
    """Raise GlitError if a model has no block of this number."""
    blocks = getattr(model, "blocks", ())
    if block is not None and not 0 <= block < len(blocks):
        bound = f"from 0 to {len(blocks) - 1}" if len(blocks) else "left out: this model has no blocks"
        raise GlitError(Argument("block"), f" must be {bound}, got {block}")


def reached_patches(model: nn.Module, images: Tensor) -> tuple[list[int], int]:
    """For each block, the number of patches that reach the prediction through it and later blocks; and the total."""
    mixings = token_mixing(model, images)
    network, num_tokens = check_ours(model), mixings[0].matrix.shape[-1]
    needed = _pooled(network, num_tokens) > 0
    counts = []
    for mixing in reversed(mixings):
        taken = (needed.float() @ (mixing.matrix[0].cpu() > 0).float()) > 0
        counts.append(int(taken[network.num_prefix_tokens :].sum()))
        needed = needed | taken
    return counts[::-1], num_tokens - network.num_prefix_tokens


Reshape = Callable[[Tensor], Tensor]


def _check_maps(model: nn.Module, layer: nn.Module, reshape: Reshape | None, images: Tensor) -> None:
    """Raise GlitError if the layer's features are no maps [B, C, h, w], which Grad-CAM needs."""
    features: list[Any] = []
    with torch.no_grad(), layer.register_forward_hook(lambda module, inputs, output: features.append(output)):
        model(images)
    try:
        is_map = (reshape or (lambda x: x))(features[0]).ndim == 4
    except (AttributeError, IndexError, RuntimeError):  # no tensor; never called; other tokens than patches
        is_map = False
    if not is_map:
        raise GlitError(f"Grad-CAM does not work for {type(model).__name__}: its last features are no map of an image")


def _layer(model: Any, images: Tensor, block: int | None) -> tuple[nn.Module, int | None, Reshape | None]:
    """The layer whose output Grad-CAM uses, its block, and a function that reshapes the output to [B, C, h, w]."""
    blocks = getattr(model, "blocks", None)
    has_grid = hasattr(getattr(model, "patch_embed", None), "dynamic_feat_size")
    if blocks and has_grid and hasattr(model, "num_prefix_tokens") and hasattr(blocks[-1], "norm1"):
        check_block(model, block)
        index = len(blocks) - 1 if block is None else block
        prefix, grid = model.num_prefix_tokens, _grid(model, images)
        return blocks[index].norm1, index, lambda x: x[:, prefix:].transpose(1, 2).unflatten(2, grid)
    if block is not None:
        raise GlitError(
            Argument("block"), f" is for vision transformers; {type(model).__name__} has no blocks of tokens"
        )
    features = getattr(model, "feature_info", None)
    if not features:
        raise GlitError(
            f"Grad-CAM knows no layer of {type(model).__name__}: it has neither blocks of tokens nor feature maps"
        )
    layer = model.get_submodule(features[-1]["module"])
    channels_last = getattr(model, "output_fmt", "NCHW") == "NHWC"
    return layer, None, (lambda x: x.permute(0, 3, 1, 2)) if channels_last else None
