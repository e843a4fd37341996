"""Profile exported GLiT-Tiny in ONNX Runtime by kind of node: where the time beside the matrix products goes.

First the whole file, with and without convolutions over blocks of channels, and its matrix products alone in one
interleaved run; then the time of each kind of node, the shortest over the rounds, so that other processes disturb
little. 224 pixels, random weights. ONNX Runtime changes the graph before it runs it: it fuses nodes, and inserts
`ReorderInput` and `ReorderOutput` around convolutions over blocks of channels.
"""

import argparse
import json
import tempfile
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from glit_models.export import ModelSource, export_onnx
from glit_models.export.products import products_runner
from glit_models.export.source import open_source

from . import report
from .export import random_glit


def main() -> None:
    """Export, profile and print."""
    parser = report.parser(__doc__.splitlines()[0] if __doc__ else None, rounds=9)
    parser.add_argument("--batch-sizes", default="1,16", help="numbers, separated by commas")
    report.add_clock(parser)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        source = open_source(random_glit())
        path = export_onnx(source, Path(folder) / "model.onnx", verify=1).path
        report.show("nodes", options, _limits(source, path, options))
        if not options.json:
            print()
        options.clock = "wall"  # of ONNX Runtime's profiler
        report.show("nodes", options, _rows(path, options), "minimum")


def _limits(source: ModelSource, path: Path, options: argparse.Namespace) -> list[report.Row]:
    rows: list[report.Row] = []
    sessions = {
        "whole file": _session(path, options),
        "convolutions not in blocks": _session(path, options, in_blocks=False),
    }
    for size in map(int, options.batch_sizes.split(",")):
        given = {"images": np.random.default_rng(0).normal(size=(size, 3, 224, 224)).astype(np.float32)}
        cases: dict[str, Callable[[], object]] = {
            name: partial(session.run, None, given) for name, session in sessions.items()
        }
        cases["its matrix products alone"] = products_runner(source, size, options.threads)
        seconds = report.interleaved(cases, options.rounds, options.clock)
        for name, value in seconds.items():
            relative = value / seconds["whole file"]
            rows.append(
                {"batch": size, "what": name, "ms": 1e3 * value, "of the whole file": f"{100 * relative:.0f} %"}
            )
    return rows


def _session(path: Path, options: argparse.Namespace, *, in_blocks: bool = True, profile: bool = False) -> Any:
    """A session; its convolutions take blocks of channels, unless the last level of optimisation is left out."""
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = options.threads
    settings.enable_profiling = profile
    settings.profile_file_prefix = str(path.with_suffix(""))
    if not in_blocks:
        settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    return onnxruntime.InferenceSession(str(path), settings, ["CPUExecutionProvider"])


def _rows(path: Path, options: argparse.Namespace) -> list[report.Row]:
    sizes = [int(size) for size in options.batch_sizes.split(",")]
    found = {size: _milliseconds(path, size, options) for size in sizes}
    at_last = found[sizes[-1]]
    kinds = sorted((kind for kind in at_last if at_last[kind][1] > 0.1), key=lambda kind: -at_last[kind][1])
    rows: list[report.Row] = []
    for kind in kinds:
        row: dict[str, str | int | float] = {"node": kind, "number": at_last[kind][0]}
        for size in sizes:
            row[f"batch {size}, ms"] = found[size].get(kind, (0, 0.0))[1]
        rows.append(row)
    return rows


def _milliseconds(path: Path, size: int, options: argparse.Namespace) -> dict[str, tuple[int, float]]:
    """The number of nodes of each kind, and the sum of their shortest times."""
    session = _session(path, options, profile=True)
    images = np.random.default_rng(0).normal(size=(size, 3, 224, 224)).astype(np.float32)
    for _ in range(options.rounds + 1):
        session.run(None, {"images": images})
    shortest: dict[tuple[str, str], float] = defaultdict(lambda: float("inf"))
    for event in json.loads(Path(session.end_profiling()).read_text()):
        if event["cat"] == "Node" and event["name"].endswith("_kernel_time"):
            key = event["args"]["op_name"], event["name"]
            shortest[key] = min(shortest[key], event["dur"] / 1e3)
    kinds: dict[str, tuple[int, float]] = defaultdict(lambda: (0, 0.0))
    for (kind, name), milliseconds in shortest.items():
        label = f"{kind}, {'patches' if 'patch_embed' in name else 'depthwise'}" if kind == "Conv" else kind
        number, total = kinds[label]
        kinds[label] = number + 1, total + milliseconds
    return kinds


if __name__ == "__main__":
    main()
