"""Convert AutoFormer checkpoints: map the authors' keys to ours, and cut a supernet to one network."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import WeightsError
from ..parts import MlpPart, RelativeAttentionPart, Slice
from .spec import AutoFormerSpec

__all__ = ["convert_autoformer_state_dict", "is_autoformer", "to_autoformer"]

# Names below `blocks.{i}.` in the authors' code, and in ours.
_THEIRS_TO_OURS = {
    "attn_layer_norm.weight": "norm1.weight",
    "attn_layer_norm.bias": "norm1.bias",
    "attn.qkv.weight": "mixer.attn.qkv.weight",
    "attn.qkv.bias": "mixer.attn.qkv.bias",
    "attn.proj.weight": "mixer.attn.proj.weight",
    "attn.proj.bias": "mixer.attn.proj.bias",
    "attn.rel_pos_embed_k.embeddings_table_v": "mixer.attn.position_k.vertical",
    "attn.rel_pos_embed_k.embeddings_table_h": "mixer.attn.position_k.horizontal",
    "attn.rel_pos_embed_v.embeddings_table_v": "mixer.attn.position_v.vertical",
    "attn.rel_pos_embed_v.embeddings_table_h": "mixer.attn.position_v.horizontal",
    "ffn_layer_norm.weight": "norm2.weight",
    "ffn_layer_norm.bias": "norm2.bias",
    "fc1.weight": "mlp.fc1.weight",
    "fc1.bias": "mlp.fc1.bias",
    "fc2.weight": "mlp.fc2.weight",
    "fc2.bias": "mlp.fc2.bias",
}
_OURS_TO_THEIRS = {ours: theirs for theirs, ours in _THEIRS_TO_OURS.items()}
_BLOCK = r"blocks\.(\d+)\.(.+)"
_QKV_WEIGHT = "mixer.attn.qkv.weight"
_SUPERNET = "patch_embed_super."  # the supernet's name of `patch_embed.`


def is_autoformer(state_dict: Mapping[str, Any]) -> bool:
    """Whether the keys are in the layout of the authors' code, for a supernet or a single network."""
    return any(key.startswith(_SUPERNET) or ".attn_layer_norm." in key for key in state_dict)


def convert_autoformer_state_dict(state_dict: Mapping[str, Any], spec: AutoFormerSpec) -> dict[str, Tensor]:
    """Convert a state dict of the authors' code to the network `spec`, with our names.

    A supernet's state dict (such as the released files, with the key `patch_embed_super.proj.weight`) is cut: the
    network takes the first channels, heads, hidden units and blocks. A supernet interleaves the rows of queries, keys
    and values in the weight of `qkv`, but not in its bias. The state dict of a single network is neither cut nor
    reordered.

    Args:
        state_dict: the authors' state dict, or their checkpoint's dict, which holds it under the key `model`.
        spec: the network.

    Raises:
        WeightsError: on a key that the authors' code does not have, or a tensor smaller than the network needs.
    """
    state_dict = state_dict.get("model", state_dict)
    is_supernet = any(key.startswith(_SUPERNET) for key in state_dict)
    converted = {}
    for key, tensor in state_dict.items():
        if (match := re.fullmatch(_BLOCK, key)) is None:
            converted[key.replace(_SUPERNET, "patch_embed.")] = tensor
            continue
        if match[2] not in _THEIRS_TO_OURS:
            raise WeightsError(f"{key!r} is not a key of the authors' AutoFormer checkpoint")
        ours = _THEIRS_TO_OURS[match[2]]
        if is_supernet and ours == _QKV_WEIGHT:
            tensor = torch.cat([tensor[of::3] for of in range(3)])
        converted[f"blocks.{match[1]}.{ours}"] = tensor
    return _cut(converted, spec) if is_supernet else converted


def to_autoformer(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `convert_autoformer_state_dict`: our state dict as one of a supernet of exactly this size."""
    converted = {}
    for key, tensor in state_dict.items():
        if (match := re.fullmatch(_BLOCK, key)) is None:
            converted[key.replace("patch_embed.", _SUPERNET)] = tensor
            continue
        if match[2] == _QKV_WEIGHT:
            tensor = torch.stack(tensor.chunk(3), dim=1).flatten(0, 1)
        converted[f"blocks.{match[1]}.{_OURS_TO_THEIRS[match[2]]}"] = tensor
    return converted


def _cut(supernet: Mapping[str, Tensor], spec: AutoFormerSpec) -> dict[str, Tensor]:
    """Cut a supernet's tensors, with our names, to the network. Tensors that the supernet lacks are left out."""
    network = {}
    for key, piece in _slices(supernet, spec):
        if key not in supernet:
            continue
        fits = all(stop <= size for (_, stop), size in zip(piece.box, piece.view, strict=True))
        if not fits or supernet[key].numel() != math.prod(piece.view):
            raise WeightsError(
                f"the supernet's {key!r} is {tuple(supernet[key].shape)}, of which no {piece.shape} can be cut"
            )
        network[key] = piece.of(supernet[key].contiguous()).clone()
    return network


def _slices(supernet: Mapping[str, Tensor], spec: AutoFormerSpec) -> Iterator[tuple[str, Slice]]:
    """The slices of the supernet's tensors that the network takes, by tensor name."""
    dim, width = spec.embed_dim, supernet["pos_embed"].shape[-1]
    for key, axis in (
        ("cls_token", 2), ("pos_embed", 2), ("patch_embed.proj.weight", 0), ("patch_embed.proj.bias", 0),
        ("norm.weight", 0), ("norm.bias", 0), ("head.weight", 1),
    ):  # fmt: skip
        if key in supernet:
            whole = tuple(supernet[key].shape)
            yield key, Slice.first((*whole[:axis], dim, *whole[axis + 1 :]), whole)
    if "head.bias" in supernet:
        whole = tuple(supernet["head.bias"].shape)
        yield "head.bias", Slice.first(whole, whole)
    for index in range(spec.depth):
        parts, prefix = spec.block_parts(index), f"blocks.{index}."
        if parts.is_identity:
            continue
        for key in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"):
            yield prefix + key, Slice.first((dim,), (width,))
        for name, part in parts.named():
            weight = supernet.get(f"{prefix}{name}{'fc1' if isinstance(part, MlpPart) else 'proj'}.weight")
            if weight is None:
                continue
            if isinstance(part, MlpPart):
                slices: Mapping[str, Slice | tuple[Slice, ...]] = part.slices(MlpPart(width, weight.shape[0]))
            else:
                assert isinstance(part, RelativeAttentionPart)
                largest = RelativeAttentionPart(
                    width, weight.shape[1] // part.head_dim, part.head_dim, part.max_distance, part.scale_width
                )
                slices = part.slices(largest)
            for key, piece in slices.items():
                assert isinstance(piece, Slice)  # only a store with private queries and keys gives several
                yield f"{prefix}{name}{key}", piece
