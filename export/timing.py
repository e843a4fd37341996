"""A network as a function that runs one batch in ONNX Runtime: what a search within a budget of milliseconds times.

It exports and runs; the caller decides how often, and uses the times.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from glit_models import SpecTransformer

from . import graph, sessions
from .extras import require
from .metadata import INPUT
from .onnx import OnnxOptions, checked_graph
from .source import open_source

__all__ = ["onnx_runner"]


def onnx_runner(model: SpecTransformer, batch_size: int, threads: int = 1, device: str = "cpu") -> Callable[[], object]:
    """Export a network in float32, with a fixed batch, and make it ready to be timed.

    Args:
        model: any model that `timm.create_model` made.
        batch_size: images of a batch. threads: of an operator on the CPU.
        device: 'cpu', or 'cuda' for ONNX Runtime's CUDA provider and no other.

    Returns:
        What runs one batch of random images to its end.

    Raises:
        ExportError: if onnx, onnxscript or onnxruntime is missing, or cannot run the network on that device.
    """
    for package in ("onnx", "onnxscript", "onnxruntime"):
        require(package)
    providers = [device.partition(":")[0]]
    proto, _ = checked_graph(open_source(model), OnnxOptions(batch=batch_size, providers=providers))
    session = sessions.open_session(graph.to_bytes(proto), providers, strict=True, threads=threads).session
    shape = (batch_size, model.in_chans, *model.patch_embed.img_size)
    images = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    return lambda: session.run(None, {INPUT: images})
