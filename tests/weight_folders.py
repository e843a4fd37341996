"""Small weight folders for tests: GLiT-Tiny at a quarter of its width, 64 pixels, 10 classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import timm
import torch

from glit_models import GLIT_TINY, GLiT
from glit_models.weights import resolve
from glit_models.weights.folder import save_folder
from glit_models.weights.registry import WeightEntry

SPEC = GLIT_TINY.scaled(embed_dim=48, num_heads=3)
CLASSES = tuple(f"class {index}" for index in range(10))
FACTS = {
    "dataset": "fashion-mnist",
    "license": "apache-2.0",
    "recipe": "glit train --data fashion-mnist",
    "metrics": [{"name": "top-1", "value": 90.5, "source": "glit eval"}],
}


def small_model(**kwargs: Any) -> GLiT:
    """A small model whose weights are all other than they were initialised."""
    torch.manual_seed(0)
    model = timm.create_model("glit_tiny", **{"spec": SPEC, "img_size": 64, "num_classes": 10, **kwargs})
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            offset = 1.0 if name.endswith(("norm1.weight", "norm2.weight", "norm.weight", "bn.weight", "var")) else 0.0
            tensor.copy_(offset + 0.1 * torch.rand_like(tensor))
    return model.eval()


def small_folder(path: Path, dtype: Literal["float32", "float16"] = "float16", **kwargs: Any) -> dict[str, Any]:
    """Save a small model; returns its registry entry."""
    return save_folder(
        small_model(), path, class_names=CLASSES, dtype=dtype, name="glit_tiny.small", facts=FACTS, **kwargs
    )


def register(monkeypatch: pytest.MonkeyPatch, saved: dict[str, Any], **location: Any) -> WeightEntry:
    """Make `glit_tiny.in1k`, whose name timm knows, stand for a saved small folder at another location."""
    saved = {key: value for key, value in saved.items() if key != "name"}
    entry = WeightEntry.from_dict("glit_tiny.in1k", saved | location)
    entries = {**resolve.registry(), entry.name: entry}
    monkeypatch.setattr(resolve, "registry", lambda: entries)
    return entry


def create_registered(**kwargs: Any) -> GLiT:
    """What a user calls, with the arguments that make `glit_tiny.in1k` small."""
    overlay = {"num_classes": 10, "input_size": (3, 64, 64)}
    return timm.create_model(
        "glit_tiny.in1k", pretrained=True, spec=SPEC, pretrained_cfg_overlay=overlay, **kwargs
    ).eval()
