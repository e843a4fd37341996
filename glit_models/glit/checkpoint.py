"""Convert between the checkpoint layout of GLiT's authors and ours."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..errors import WeightsError

__all__ = ["convert_official_state_dict", "is_official", "to_official"]

# Names below `blocks.{i}.0.` in the authors' code (`.0.` is left over from their search) and `blocks.{i}.` in ours.
_OFFICIAL_TO_OURS = (
    ("attn.qkv", "mixer.attn.qkv"),
    ("attn.proj", "mixer.attn.proj"),
    ("attn.net.1", "mixer.conv.expand"),
    ("attn.net.3.conv", "mixer.conv.dwconv"),
    ("attn.net.4", "mixer.conv.bn"),
    ("attn.net.6", "mixer.conv.project"),
    ("norm1", "norm1"),
    ("norm2", "norm2"),
    ("mlp.fc1", "mlp.fc1"),
    ("mlp.fc2", "mlp.fc2"),
)
_OFFICIAL_BLOCK = r"blocks\.(\d+)\.0\.(.+)\.(\w+)"
_OUR_BLOCK = r"blocks\.(\d+)\.(.+)\.(\w+)"


def is_official(state_dict: Mapping[str, Any]) -> bool:
    """Whether the keys are in the layout of the authors' code."""
    return any(re.fullmatch(_OFFICIAL_BLOCK, key) for key in state_dict)


def convert_official_state_dict(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """Convert the authors' state dict (or their checkpoint's dict, with key `model`) to our names and shapes.

    Pointwise Conv1d weights (out, in, 1) become Linear's (out, in); depthwise ones (C, 1, K) become (C, 1, 1, K).

    Raises:
        WeightsError: on a key that the authors' code does not have; names it.
    """
    state_dict = state_dict.get("model", state_dict)
    table = dict(_OFFICIAL_TO_OURS)
    converted = {}
    for key, tensor in state_dict.items():
        match = re.fullmatch(_OFFICIAL_BLOCK, key)
        if match is None and not key.startswith("blocks."):
            converted[key] = tensor
            continue
        if match is None or match[2] not in table:
            raise WeightsError(f"{key!r} is not a key of the authors' GLiT checkpoint")
        ours = table[match[2]]
        if ours.endswith(("expand", "project")) and match[3] == "weight":
            tensor = tensor.squeeze(-1)
        elif ours.endswith("dwconv") and match[3] == "weight":
            tensor = tensor.unsqueeze(2)
        converted[f"blocks.{match[1]}.{ours}.{match[3]}"] = tensor
    return converted


def to_official(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `convert_official_state_dict`: our state dict with the authors' names and shapes."""
    table = {ours: official for official, ours in _OFFICIAL_TO_OURS}
    converted = {}
    for key, tensor in state_dict.items():
        match = re.fullmatch(_OUR_BLOCK, key)
        if match is None:
            converted[key] = tensor
            continue
        if match[2].endswith(("expand", "project")) and match[3] == "weight":
            tensor = tensor.unsqueeze(-1)
        elif match[2].endswith("dwconv") and match[3] == "weight":
            tensor = tensor.squeeze(2)
        converted[f"blocks.{match[1]}.0.{table[match[2]]}.{match[3]}"] = tensor
    return converted
