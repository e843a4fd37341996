"""Verify weights: compare their hash, parameter count and golden logits with what their entry says.

`resolve.py` finds weights, and `publish.py` makes them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from timm.layers import to_2tuple

from ..activations import check_memory
from ..cost import count_params
from ..errors import GlitError, WeightsError, first_line
from .files import GOLDEN_FILE, WEIGHTS_FILE, read_state_dict, sha256_of
from .folder import WeightFolder, load_folder, open_folder, spec_of

__all__ = ["GOLDEN_TOLERANCE", "Check", "verify"]

GOLDEN_TOLERANCE = 1e-4
_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


@dataclass(frozen=True)
class Check:
    """One comparison: the expected and actual values, as text, and whether they agree (None: nothing to compare)."""

    name: str
    expected: str
    found: str
    agrees: bool | None


def verify(source: str) -> list[Check]:
    """Check the weights that `source` names: `model.tag`, a weight folder, or a Hub repository.

    Raises:
        WeightsError: if there are none to check. Damaged weights do not raise; their check fails.
    """
    folder = open_folder(source)
    if not folder.weights.is_file():
        raise WeightsError(f"{folder.path}: no {WEIGHTS_FILE} in this folder")
    folder.config()
    return [_check_hash(folder), _check_params(folder), _check_golden(folder)]


def _check_hash(folder: WeightFolder) -> Check:
    expected = folder.sha256 or _recorded_sha256(folder)
    found = sha256_of(folder.weights)
    return Check("sha256", expected or "not recorded", found, found == expected if expected else None)


def _recorded_sha256(folder: WeightFolder) -> str | None:
    from safetensors import SafetensorError, safe_open

    path = folder.path / GOLDEN_FILE
    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get("weights_sha256")
    except (OSError, SafetensorError):
        return None


def _check_params(folder: WeightFolder) -> Check:
    try:
        config = folder.config()
        cfg, args = config["pretrained_cfg"], config["model_args"]
        channels, *sides = cfg["input_size"]
        size = to_2tuple(args.get("img_size") or sides)
        expected = count_params(spec_of(config), config["num_classes"], size, channels, args.get("class_token", True))
        if folder.entry is not None:
            expected = folder.entry.params
        state = read_state_dict(folder.weights)
    except (GlitError, KeyError, TypeError, ValueError) as error:
        return Check("parameters", "", str(error), False)
    found = sum(tensor.numel() for key, tensor in state.items() if not key.endswith(_BUFFERS))
    return Check("parameters", f"{expected:,}", f"{found:,}", found == expected)


def _check_golden(folder: WeightFolder) -> Check:
    path = folder.path / GOLDEN_FILE
    expected = f"within {GOLDEN_TOLERANCE:g}"
    if not path.is_file():
        return Check("golden logits", f"no {GOLDEN_FILE}", "", None)
    try:
        golden = read_state_dict(path)
        model = load_folder(folder.path)
        check_memory(model, golden["input"].shape, torch.device("cpu"), "take a machine with more")
        with torch.inference_mode():
            logits = model(golden["input"].float())
        difference = (logits - golden["logits"]).abs().max().item()
    except (GlitError, KeyError, RuntimeError) as error:
        return Check("golden logits", expected, first_line(error), False)
    return Check("golden logits", expected, f"{difference:.1e}", difference <= GOLDEN_TOLERANCE)
