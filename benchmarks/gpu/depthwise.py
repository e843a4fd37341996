"""Stage depthwise: measure every form of the convolution, in GLiT-Tiny's layers and for single kernel sizes."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator
from typing import Any

from glit_models import GLIT_TINY, GLiTSpec

from .. import depthwise_uses
from ..depthwise_forms import FORMS
from .choice import finalists
from .context import Context, Result

CUDA_ONLY = {"depthwise": ("times on the GPU's clock, with launches queued ahead", "Inductor's code for the GPU")}

KERNELS = (17, 31, 45)
_CHAINS = ("training in chain", "inference in chain")
_CASE_LIMIT = 0.4  # of the time of the stage, for the layers of GLiT-Tiny in chain


def run_depthwise(context: Context) -> Result:
    """Measure the decisive cases first: layers in chain, compiled and eager. Then convolutions by kernel size."""
    rows: list[dict[str, Any]] = []
    for row in _rows(context):
        rows.append(row)
        context.save(_result(rows, context))
    return _result(rows, context)


def _result(rows: list[dict[str, Any]], context: Context) -> Result:
    """The rows, and the fastest of the forms that the stage `correct` has checked completely."""
    right = context.earlier.get("correct", {}).get("right_forms", [])
    decisive = [row for row in rows if row["layers"] == "GLiT-Tiny" and row["form"] in right]
    return {"finalists": finalists(decisive), "rows": rows}


def _rows(context: Context) -> Iterator[dict[str, Any]]:
    plans: list[tuple[str, GLiTSpec, tuple[str, ...]]] = [("GLiT-Tiny", context.spec(), _CHAINS)]
    if not context.rehearse:
        plans.append(("GLiT-Tiny", context.spec(), ("inference", "training")))
    for kernel in () if context.rehearse else KERNELS:
        plans.append((f"K = {kernel}, C = 768", one_layer(kernel), ("inference", "training")))
    for layers, spec, uses in plans:
        for way in ("compiled", "eager", "max-autotune"):
            for use in uses:
                options = options_for(context, use, way)
                if context.seconds_left > 0 and options.forms:
                    for row in depthwise_uses.measured(options, spec):
                        yield {"layers": layers, **row}


def one_layer(kernel: int) -> GLiTSpec:
    """A network of one block that is a convolution over 768 channels with this number of taps."""
    block = next(block for block in GLIT_TINY.blocks if block.kernel_size == 45)
    return dataclasses.replace(GLIT_TINY, blocks=(dataclasses.replace(block, kernel_size=kernel),))


def options_for(context: Context, use: str, way: str) -> argparse.Namespace:
    """The options of `python -m benchmarks.depthwise` for one use and way, without forms that gave wrong results."""
    wrong = context.earlier.get("correct", {}).get("wrong_forms", [])
    forms = [name for name in FORMS if name not in wrong and (way != "max-autotune" or FORMS[name].max_autotune)]
    if context.rehearse and way != "eager":
        forms = forms[:1] if use == "inference in chain" and way == "compiled" else []
    bandwidth = context.earlier.get("environment", {}).get("memory_tb_s", 3.0)
    return argparse.Namespace(
        device=context.device, dtype="float32" if context.rehearse else "bfloat16",
        batch_size=1 if context.rehearse else 256, forms=forms, uses=[use], ways=[way], compile=context.compile,
        bandwidth=bandwidth, seconds=max(_CASE_LIMIT * context.seconds_left, 1), rounds=1 if context.rehearse else 15,
    )  # fmt: skip
