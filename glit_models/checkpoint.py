"""Reading state dicts safely, and the key table between the authors' layout and ours.

It knows tensors and names, not models: whoever loads a state dict compares it with the model through `check_fits`.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from .errors import WeightsError, first_line

__all__ = ["check_fits", "convert_official_state_dict", "is_official", "read_state_dict", "sha256_of", "to_official"]

# Below `blocks.{i}.0.` in the authors' code (the `.0.` is left from their search) and below `blocks.{i}.` in ours.
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
_OFFICIAL_BLOCK = re.compile(r"blocks\.(\d+)\.0\.(.+)\.(\w+)")
_OUR_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)\.(\w+)")


def is_official(state_dict: Mapping[str, Any]) -> bool:
    """Whether the keys are in the layout of the authors' code."""
    return any(_OFFICIAL_BLOCK.fullmatch(key) for key in state_dict)


def convert_official_state_dict(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """The authors' state dict (or their checkpoint's dict, whose key `model` holds it) with our names and shapes.

    Pointwise Conv1d weights (out, in, 1) become Linear's (out, in); depthwise ones (C, 1, K) become (C, 1, 1, K).

    Raises:
        WeightsError: on a key that the authors' code does not have; names it.
    """
    state_dict = state_dict.get("model", state_dict)
    table = dict(_OFFICIAL_TO_OURS)
    converted = {}
    for key, tensor in state_dict.items():
        match = _OFFICIAL_BLOCK.fullmatch(key)
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
    """The inverse of `convert_official_state_dict`: our state dict as the authors' code names and shapes it."""
    table = {ours: official for official, ours in _OFFICIAL_TO_OURS}
    converted = {}
    for key, tensor in state_dict.items():
        match = _OUR_BLOCK.fullmatch(key)
        if match is None:
            converted[key] = tensor
            continue
        if match[2].endswith(("expand", "project")) and match[3] == "weight":
            tensor = tensor.unsqueeze(-1)
        elif match[2].endswith("dwconv") and match[3] == "weight":
            tensor = tensor.squeeze(2)
        converted[f"blocks.{match[1]}.0.{table[match[2]]}.{match[3]}"] = tensor
    return converted


def sha256_of(path: str | os.PathLike[str]) -> str:
    """The sha256 of a file, as hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_state_dict(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a safetensors file or of a torch pickle (unwrapped from `model`, EMA weights preferred).

    Nothing is unpickled but tensors and plain values, and the `argparse.Namespace` of training scripts.

    Raises:
        WeightsError: if the file is missing, truncated, no checkpoint, or holds code; names the path.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"{path}: no such file")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch warns of pickle protocols that it may not know
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise WeightsError(f"{path}: not a whole safetensors file, probably cut short ({error})") from None
    except pickle.UnpicklingError:
        raise WeightsError(f"{path}: refused, this pickle holds more than tensors and could run code") from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise WeightsError(f"{path}: not a readable checkpoint ({first_line(error)})") from None
    return _unwrap(path, checkpoint)


def _unwrap(path: Path, checkpoint: Any) -> dict[str, Tensor]:
    for key in ("state_dict_ema", "model_ema", "state_dict", "model"):
        if isinstance(checkpoint, dict) and isinstance(checkpoint.get(key), dict):
            checkpoint = checkpoint[key]
            break
    if not isinstance(checkpoint, dict) or not all(isinstance(value, Tensor) for value in checkpoint.values()):
        raise WeightsError(f"{path}: no state dict found in this file")
    return {key.removeprefix("module."): value for key, value in checkpoint.items()}


def check_fits(
    state_dict: Mapping[str, Tensor], model: torch.nn.Module, ignore: Collection[str] = (), where: str = "weights"
) -> None:
    """Compare a state dict with what `model` expects, but for keys that start with a prefix in `ignore`.

    Raises:
        WeightsError: names the first missing key, unknown key or shape that differs, and the two shapes.
    """
    prefixes = tuple(ignore)
    expected = {key: value for key, value in model.state_dict().items() if not key.startswith(prefixes)}
    given = {key: value for key, value in state_dict.items() if not key.startswith(prefixes)}
    for key, value in expected.items():
        if key not in given:
            raise WeightsError(f"{where} do not fit the model: {key!r} is missing")
        if given[key].shape != value.shape:
            raise WeightsError(
                f"{where} do not fit the model: {key!r} is {tuple(given[key].shape)}, "
                f"the model needs {tuple(value.shape)}"
            )
    for key in given:
        if key not in expected:
            raise WeightsError(f"{where} do not fit the model: it has no {key!r}")
