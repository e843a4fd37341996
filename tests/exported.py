"""Small networks that are exported once for all tests. No assertions."""

from __future__ import annotations

import functools
import random
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from glit_models.export import OnnxArtifact, OnnxClassifier, export_onnx
from specs import MIXED, SMALL, random_spec
from weight_folders import small_model

from glit_models import GLiT, SpecTransformer

CLASSES = tuple(f"class {index}" for index in range(5))
CONFIG = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bicubic", "crop_pct": 0.9}


def small_glit(**kwargs: Any) -> GLiT:
    """A network of three blocks (global, local, mixed), 32 pixels, five named classes, all weights other than new."""
    names = {"label_names": list(CLASSES)} if kwargs.get("num_classes", 5) == 5 else {}
    overlay = {"interpolation": "bicubic", "crop_pct": 0.9, **names}
    kwargs = {"spec": SMALL, "img_size": 32, "num_classes": 5, "pretrained_cfg_overlay": overlay, **kwargs}
    return small_model(**kwargs)


def randomised(model: SpecTransformer) -> SpecTransformer:
    """A model none of whose weights is as it was initialised, in evaluation mode, with a preprocessing."""
    model.pretrained_cfg = CONFIG
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith(("running_var", "norm.weight", "norm1.weight", "norm2.weight", "bn.weight")):
                tensor.copy_(1 + 0.1 * torch.rand(tensor.shape, generator=generator))
            elif tensor.is_floating_point():
                tensor.copy_(0.2 * torch.randn(tensor.shape, generator=generator))
    return model.eval()


def searched_glit() -> GLiT:
    """A network of the search space that nobody drew."""
    return small_glit(spec=random_spec(random.Random(3)))


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory()


def exported(model: str = "small", **options: Any) -> OnnxArtifact:
    """`small_glit` or a variation of it as a file, each only once, not to be changed."""
    return _exported(model, **options)


@functools.cache
def _exported(model: str, **options: Any) -> OnnxArtifact:
    variations = {
        "small": small_glit,
        "searched": searched_glit,
        "one block": lambda: small_glit(spec=MIXED),
        "one channel": lambda: small_glit(in_chans=1, global_pool="avg"),
    }
    name = "-".join(map(str, [model, *options.items()])).replace(" ", "").replace("/", "")
    path = Path(_folder().name) / f"{name}.onnx"
    return export_onnx(variations[model](), path, **{"verify": 8, **options})


def difference(artifact: OnnxArtifact, model: GLiT, batch: int, size: tuple[int, int] | None = None) -> float:
    """The largest difference of a logit between a file and eager PyTorch, on random images."""
    _, height, width = artifact.info.input_size
    height, width = size or (height, width)
    images = torch.randn(batch, model.in_chans, height, width, generator=torch.Generator().manual_seed(batch))
    classifier = OnnxClassifier(artifact.path, ["cpu"], threads=1)
    (logits,) = classifier.session.run(None, {"images": images.numpy()})  # as one batch
    with torch.inference_mode():
        expected = model(images).numpy()
    return float(np.abs(logits - expected).max())
