"""Run one batch of a network in ONNX Runtime, for a search that measures latency.

This module exports and runs; the caller measures the time.
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
    """Export a network in float32 with a fixed batch size, and prepare it for timing.

    Args:
        model: any model that `timm.create_model` made.
        batch_size: batch size. threads: threads of an operator on the CPU.
        device: 'cpu', or 'cuda' for ONNX Runtime's CUDA provider and no other.

    Returns:
        A function that runs one batch of random images to completion.

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
