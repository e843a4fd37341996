"""Compare GLiT-Tiny with timm's DeiT-Tiny and the authors' plain form: inference and training, eager and compiled.

All cases of a batch size are interleaved. Training is the forward and the backward pass of a step under autocast;
inference uses weights of the type. `--forms` adds GLiT with other forms of the depthwise convolution. The floors are
the times that a GPU with the given rates needs for the multiply-adds, and for moving activations if everything except
matrix products, attention and convolutions is fused into its neighbours.
"""

import argparse
import copy
import itertools
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from glit_models import GLIT_TINY, GLiTSpec, count_macs
from glit_models.errors import first_line
from glit_models.runs.figures import new_figure

from . import report
from .depthwise_forms import FORMS, use_form
from .plain import plain_glit

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
USES = ("inference", "training")
SIZE = 224
PLAIN, GLIT, DEIT = "GLiT-Tiny, plain form", "GLiT-Tiny", "DeiT-Tiny"
Case = tuple[str, str]  # network and how it is run


def main() -> None:
    """Measure and print; draw if requested."""
    options = _parse()
    if options.count:
        report.show("performance", options, _counts(options), "counted, not a median")
        return
    torch.set_num_threads(options.threads)
    torch._dynamo.config.recompile_limit = 1000  # all networks are compiled through the same few functions
    rows: list[report.Row] = []
    for use, precision in itertools.product(options.uses, options.precisions):
        seconds: dict[int, dict[Case, float]] = {}
        for batch in options.batch_sizes:
            with ExitStack() as stack:
                cases = _cases(stack, use, precision, batch, options)
                seconds[batch] = report.interleaved(cases, options.rounds, options.clock)
        rows += _rows(use, precision, seconds)
        if options.device != "cpu":
            rows.append(_floor(use, options))
    report.show("performance", options, rows)
    if options.plot:
        _draw(rows, options)


def _parse() -> argparse.Namespace:
    parser = report.parser(__doc__, rounds=11)
    report.add_clock(parser)
    parser.add_argument("--device", type=report.device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--uses", nargs="+", choices=USES, default=USES)
    parser.add_argument("--precisions", nargs="+", choices=DTYPES, help="default: bf16 on a GPU, both on a CPU")
    parser.add_argument("--batch-sizes", nargs="+", type=int, help="default: 256 on a GPU, 1 and 16 on a CPU")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="use torch.compile (default: on GPU)")
    parser.add_argument("--compile-mode", help="mode of torch.compile (default on a GPU: max-autotune-no-cudagraphs)")
    parser.add_argument("--forms", nargs="*", choices=FORMS, default=[], metavar="FORM", help=", ".join(FORMS))
    parser.add_argument("--bandwidth", type=float, default=3.0, help="TB/s of the GPU's memory, for the floor")
    parser.add_argument("--tflops", type=float, default=800, help="TFLOP/s of the GPU (multiply-add: 2), for the floor")
    parser.add_argument("--count", action="store_true", help="only print multiply-adds and a GPU's floor")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw images per second")
    options = parser.parse_args()
    on_cpu = options.device == "cpu" and not options.count
    options.precisions = options.precisions or (list(DTYPES) if on_cpu else ["bf16"])
    options.batch_sizes = options.batch_sizes or ([1, 16] if on_cpu else [256])
    options.compile_mode = options.compile_mode or ("default" if on_cpu else "max-autotune-no-cudagraphs")
    options.compile = not on_cpu if options.compile is None else options.compile
    return options


# ---- cases ----


def networks(stack: ExitStack, use: str, forms: Sequence[str]) -> dict[str, nn.Module]:
    """The networks to compare, each with random weights; those in other forms keep them until `stack` closes."""
    torch.manual_seed(0)
    glit = timm.create_model("glit_tiny").eval()
    made = {PLAIN: plain_glit(glit), GLIT: glit, DEIT: timm.create_model("deit_tiny_patch16_224")}
    if use == "inference":
        made[f"{GLIT}, fused"] = copy.deepcopy(glit).fuse()
    for form in forms:
        network = copy.deepcopy(made.get(f"{GLIT}, fused", glit))
        made[f"{GLIT}, {form}"] = stack.enter_context(use_form(network, FORMS[form]))
    return made


def _cases(
    stack: ExitStack, use: str, precision: str, batch: int, options: argparse.Namespace
) -> dict[Case, Callable[[], object]]:
    torch.compiler.reset()  # otherwise the second batch size would be compiled for all sizes
    cases: dict[Case, Callable[[], object]] = {}
    for name, network in networks(stack, use, options.forms).items():
        for way in ("eager", "compiled") if options.compile else ("eager",):
            compiled = partial(torch.compile, mode=options.compile_mode) if way == "compiled" else None
            case = make_case(network, use, DTYPES[precision], batch, options.device, SIZE, compiled)
            try:
                case()  # compiles
            except Exception as error:  # compilers and devices can raise anything; only this case is left out
                print(f"{name}, {way}, {use}, {precision}: left out: {first_line(error)}")
                continue
            cases[name, way] = case
    return cases


def make_case(
    network: nn.Module,
    use: str,
    dtype: torch.dtype,
    batch: int,
    device: str,
    size: int = SIZE,
    compiled: Callable[[nn.Module], Any] | None = None,
) -> Callable[[], None]:
    """One pass over random images [B, 3, size, size] on a device, including synchronisation; `compiled` wraps it."""
    network = network.to(device).train(use == "training")
    images = torch.randn(batch, 3, size, size, device=device)
    if use == "inference":
        network, images = network.to(dtype), images.to(dtype)
    run = network if compiled is None else compiled(network)
    return partial(_train if use == "training" else _infer, run, images, dtype)


def _infer(network: nn.Module, images: Tensor, dtype: torch.dtype) -> None:
    with torch.inference_mode():
        network(images)
    _wait(images.device)


def _train(network: nn.Module, images: Tensor, dtype: torch.dtype) -> None:
    with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
        loss = F.cross_entropy(network(images), torch.zeros(len(images), dtype=torch.int64, device=images.device))
    loss.backward()
    network.zero_grad()
    _wait(images.device)


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()


# ---- output ----


def _rows(use: str, precision: str, seconds: dict[int, dict[Case, float]]) -> list[report.Row]:
    rows: list[report.Row] = []
    for name, way in next(iter(seconds.values())):
        row: dict[str, str | int | float] = {"use": use, "type": precision, "network": name, "how": way}
        for batch, times in seconds.items():
            own = times.get((name, way))
            if own is None:
                continue
            row[f"batch {batch}, ms"] = own * 1e3
            row[f"batch {batch}, images/s"] = batch / own
            row[f"batch {batch}, of the plain form's"] = _ratio(times.get((PLAIN, "eager")), own)
            row[f"batch {batch}, of DeiT-Tiny's"] = _ratio(times.get((DEIT, way)), own)
        rows.append(row)
    return rows


def _ratio(theirs: float | None, ours: float) -> str:
    return "" if theirs is None else f"{theirs / ours:.2f}x"


def _floor(use: str, options: argparse.Namespace) -> report.Row:
    """The minimum time that a GPU needs, in the columns of `_rows`."""
    row: dict[str, str | int | float] = {"use": use, "type": "bf16", "network": GLIT, "how": "floor"}
    for batch in options.batch_sizes:
        arithmetic, memory = _floor_seconds(use, batch, options)
        row[f"batch {batch}, ms"] = 1e3 * max(arithmetic, memory)
        row[f"batch {batch}, images/s"] = batch / max(arithmetic, memory)
        row[f"batch {batch}, of the plain form's"] = f"arithmetic {1e3 * arithmetic:.2f} ms"
        row[f"batch {batch}, of DeiT-Tiny's"] = f"memory {1e3 * memory:.2f} ms"
    return row


def _floor_seconds(use: str, batch: int, options: argparse.Namespace) -> tuple[float, float]:
    return floor_seconds(use, batch, options.tflops, options.bandwidth)


def floor_seconds(use: str, batch: int, tflops: float, bandwidth: float) -> tuple[float, float]:
    """The minimum seconds of GLiT-Tiny for its arithmetic, and for moving activations in bfloat16."""
    factor = 3 if use == "training" else 1  # a gradient for the input and one for the weight
    arithmetic = factor * 2 * count_macs(GLIT_TINY) * batch / (tflops * 1e12)
    return arithmetic, factor * 2 * activations(GLIT_TINY) * batch / (bandwidth * 1e12)


def _counts(options: argparse.Namespace) -> list[report.Row]:
    """Multiply-adds of an image, and the floors of GLiT-Tiny."""
    rows: list[report.Row] = []
    for name, model in ((GLIT, "glit_tiny"), (DEIT, "deit_tiny_patch16_224")):
        network = timm.create_model(model).eval()
        with FlopCounterMode(display=False) as counter, torch.inference_mode():
            network(torch.zeros(1, 3, SIZE, SIZE))
        linear = [layer for layer in network.blocks.modules() if isinstance(layer, nn.Linear)]
        tokens = network.pos_embed.shape[1]
        rows.append({
            "what": f"{name}, multiply-adds, G",
            "all": counter.get_total_flops() / 2e9,
            "in linear layers": sum(tokens * layer.weight.numel() for layer in linear) / 1e9,
        })  # fmt: skip
    for use in USES:
        batch = options.batch_sizes[0]
        arithmetic, memory = _floor_seconds(use, batch, options)
        shown = f"arithmetic {1e3 * arithmetic:.2f} ms, memory {1e3 * memory:.2f} ms"
        rows.append({"what": f"{GLIT}, {use} on a GPU, batch {batch}", "all": shown, "in linear layers": ""})
    return rows


def activations(spec: GLiTSpec) -> int:
    """Minimum number of values that the forward pass of an image reads and writes.

    Each matrix product, attention and convolution reads its operand and writes its result; norms, activation functions
    and residuals are part of these. A GLU's two halves are read by the convolution.
    """
    dim, width = spec.embed_dim, spec.embed_dim // spec.num_heads
    a_token = 0
    for block in spec.blocks:
        if block.qkv_ratio is not None:
            outer, inner = block.num_global_heads * width, int(block.qkv_ratio * width) * block.num_global_heads
            a_token += (outer + 3 * inner) + (3 * inner + inner) + (inner + 2 * outer)
        if block.expand_ratio is not None:
            outer = block.num_local_heads * width
            hidden = outer * block.expand_ratio
            a_token += (outer + 2 * hidden) + (2 * hidden + hidden) + (hidden + 2 * outer)
        hidden = int(dim * block.mlp_ratio)
        a_token += (dim + hidden) + (hidden + 2 * dim)
    return a_token * ((SIZE // spec.patch_size) ** 2 + 1)


def _draw(rows: list[report.Row], options: argparse.Namespace) -> None:
    """Draw a panel for each use, type and batch size."""
    kinds = sorted({(str(row["use"]), str(row["type"])) for row in rows})
    panels = [(*kind, batch) for kind in kinds for batch in options.batch_sizes]
    columns = len(options.batch_sizes)
    lines = len(panels) // columns
    bars = max(sum((row["use"], row["type"]) == kind for row in rows) for kind in kinds)
    figure = new_figure(figsize=(5 * columns + 1, (0.8 + 0.26 * bars) * lines))
    for axes, (use, precision, batch) in zip(figure.subplots(lines, columns, squeeze=False).flat, panels, strict=True):
        shown = [row for row in rows if (row["use"], row["type"]) == (use, precision) and f"batch {batch}, ms" in row]
        names = [f"{row['network']}, {row['how']}" for row in shown]
        values = [float(row[f"batch {batch}, images/s"]) for row in shown]
        colors = ["C7" if DEIT in name else "C3" if PLAIN in name else "C0" for name in names]
        axes.bar_label(axes.barh(names, values, color=colors), fmt="%.0f", padding=3)
        axes.invert_yaxis()
        axes.margins(x=0.14)
        axes.set_title(f"{use}, {precision}, batch {batch}: images a second", fontsize="medium")
    figure.savefig(options.plot, dpi=100)


if __name__ == "__main__":
    main()
