"""Stage throughput: measure whole networks, compare with the roofline, and choose the depthwise convolution's form."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import timm
import torch
from torch import nn

from glit_models.errors import first_line

from .. import performance, report
from ..depthwise_forms import FORMS, use_form
from ..performance import DEIT, GLIT, PLAIN
from .choice import CURRENT, choose
from .context import Context, Result

CUDA_ONLY = {"throughput": ("Inductor's code for the GPU", "CUDA graphs at batch 1", "peak memory")}

SMALL = "GLiT-Small"
_BATCHES = {"inference": (256, 1, 32), "training": (256,)}
_WAYS = {"compiled": {}, "eager": None, "CUDA graphs": {"mode": "reduce-overhead"}}
Case = tuple[str, str, str, int]  # use, network, way, batch


def run_throughput(context: Context) -> Result:
    """Measure the cases in order of importance, and save each row."""
    rows: list[dict[str, Any]] = []
    for case in cases(context):
        if context.seconds_left < 3:
            rows.append({**_names(case), "error": "no time left"})
            continue
        rows.append({**_names(case), **_measured(case, context)})
        context.save(_result(rows, context))
    return _result(rows, context)


def _names(case: Case) -> dict[str, Any]:
    return dict(zip(("use", "network", "how", "batch"), case, strict=True))


def cases(context: Context) -> Iterator[Case]:
    """First GLiT-Tiny's forms, compiled, which decide; then DeiT-Tiny for comparison, then everything else."""
    finalists = context.earlier.get("depthwise", {}).get("finalists", [])
    forms = [GLIT, *(f"{GLIT}, {form}" for form in finalists if form in FORMS)]
    if context.rehearse:
        forms = forms[:2]
    big = 2 if context.rehearse else 256
    for use in ("training", "inference"):
        yield from ((use, name, "compiled", big) for name in (*forms, DEIT))
    if context.rehearse:
        yield "inference", PLAIN, "eager", big
        return
    for name in (GLIT, DEIT):
        yield from (("inference", name, "CUDA graphs", 1), ("inference", name, "eager", big))
        yield "training", name, "eager", big
    for name in (GLIT, DEIT):
        yield from (("inference", name, way, batch) for batch in (1, 32) for way in ("eager", "compiled"))
    for use in ("inference", "training"):
        yield from ((use, name, "eager", big) for name in (PLAIN, SMALL))
    for use in ("inference", "training"):
        yield use, SMALL, "compiled", big


def _measured(case: Case, context: Context) -> dict[str, Any]:
    """Milliseconds and images per second of one case, or why there are none."""
    try:
        with ExitStack() as stack:
            run = prepare(stack, case, context)
            seconds = report.interleaved({"": run}, 1 if context.rehearse else 20)[""]
            found = {"ms": 1e3 * seconds, "images/s": case[3] / seconds}
            if context.device.startswith("cuda"):
                found["peak memory, MiB"] = torch.cuda.max_memory_allocated() / 2**20
        return found
    except Exception as error:  # compilers and devices can raise anything; it is the result of this case
        return {"error": f"{type(error).__name__}: {first_line(error)}"[:300]}
    finally:
        torch.compiler.reset()
        if context.device.startswith("cuda"):
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def prepare(stack: ExitStack, case: Case, context: Context) -> Callable[[], None]:
    """One pass of a case, compiled and warm."""
    use, name, way, batch = case
    keywords = _WAYS[way]
    compiled = None if keywords is None else lambda network: context.compile(network, dynamic=False, **keywords)
    dtype = torch.float32 if context.rehearse else torch.bfloat16
    size = 64 if context.rehearse else performance.SIZE
    made = network(stack, name, use, size, context)
    run = performance.make_case(made, use, dtype, batch, context.device, size, compiled)
    for _ in range(1 if context.rehearse else 3):  # compiles; CUDA graphs are recorded in the second pass
        run()
    return run


def network(stack: ExitStack, name: str, use: str, size: int, context: Context) -> nn.Module:
    """A network by its name in the table; GLiTs are fused for inference."""
    torch.manual_seed(0)
    if name == DEIT:
        return timm.create_model("deit_tiny_patch16_224", img_size=size, **({"depth": 2} if context.rehearse else {}))
    if name == SMALL:
        small = timm.create_model("glit_small", img_size=size)
        return small.eval().fuse() if use == "inference" else small
    glit = timm.create_model("glit_tiny", spec=context.spec(), img_size=size).eval()
    if name == PLAIN:
        return performance.plain_glit(glit)
    glit = glit.fuse() if use == "inference" else glit
    form = name.removeprefix(f"{GLIT}, ")
    return stack.enter_context(use_form(glit, FORMS[form])) if form in FORMS else glit


def _result(rows: list[dict[str, Any]], context: Context) -> Result:
    """The rows with the roofline, and the form chosen for each use."""
    ceilings = context.earlier.get("environment", {})
    tflops, bandwidth = ceilings.get("bf16_tflops", 800.0), ceilings.get("memory_tb_s", 3.0)
    rows = [_beside(row, rows, tflops, bandwidth) for row in rows]
    return {
        "chosen": {use: choose(rates) if (rates := form_rates(rows, use)) else CURRENT for use in performance.USES},
        "roofline": {"bf16_tflops": tflops, "memory_tb_s": bandwidth, "measured": bool(ceilings)},
        "rows": rows,
    }


def _beside(row: dict[str, Any], rows: list[dict[str, Any]], tflops: float, bandwidth: float) -> dict[str, Any]:
    if "ms" not in row:
        return row
    keys = ("use", "how", "batch")
    deit = [other for other in rows if other["network"] == DEIT and all(other[key] == row[key] for key in keys)]
    more: dict[str, Any] = {}
    if deit and "ms" in deit[0]:
        more["of DeiT-Tiny's"] = deit[0]["ms"] / row["ms"]
    if row["network"].startswith(GLIT):
        floor = max(performance.floor_seconds(row["use"], row["batch"], tflops, bandwidth))
        more["of the roofline"] = 1e3 * floor / row["ms"]
    return row | more


def form_rates(rows: list[dict[str, Any]], use: str) -> dict[str, float]:
    """Images per second of GLiT-Tiny, compiled, at the largest batch, by the form of its convolution."""
    rates = {}
    for row in rows:
        if row["use"] == use and row["how"] == "compiled" and row["batch"] > 1 and "images/s" in row:
            form = row["network"].removeprefix(f"{GLIT}, ")
            if row["network"] == GLIT or form in FORMS:
                largest = max(other["batch"] for other in rows if other["use"] == use)
                if row["batch"] == largest:
                    rates[CURRENT if row["network"] == GLIT else form] = row["images/s"]
    return rates
