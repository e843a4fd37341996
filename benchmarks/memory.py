"""Measure gradient checkpointing: peak memory and time of a training step with and without it."""

import argparse
import statistics
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context
from pathlib import Path

import torch

from glit_models.training import load_recipe, setup

from . import report
from .training import train_step

MIB = 2**20


def main() -> None:
    """Measure and print."""
    parser = report.parser(__doc__, rounds=3)
    parser.add_argument("--device", type=report.device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model", default="glit_tiny")
    parser.add_argument("--precisions", default="fp32,bf16", help="fp32 and bf16, separated by commas")
    parser.add_argument("--img-size", type=int, default=224, help="pixels per side")
    parser.add_argument("--batch-size", type=int, default=32)
    report.add_clock(parser)
    options = parser.parse_args()

    rows: list[report.Row] = []
    for precision, checkpointing in product(options.precisions.split(","), (False, True)):
        # Each in a separate process, because memory from the system stays with its process.
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
            peak, seconds = process.submit(_measure, options, precision, checkpointing).result()
        rows.append(
            {
                "model": options.model,
                "device": report.device_name(options.device),
                "precision": precision,
                "gradient checkpointing": "yes" if checkpointing else "no",
                "peak memory, MiB": peak / MIB,
                "ms a step": seconds * 1e3,
            }
        )
    report.show("memory", options, rows)
    if not options.json:
        print(f"\nMemory is {_WHAT[options.device.partition(':')[0]]}.")


_WHAT = {
    "cuda": "`torch.cuda.max_memory_allocated`",
    "cpu": "the process's largest resident set, less what it had before the model was built (Linux)",
}


def _measure(options: argparse.Namespace, precision: str, checkpointing: bool) -> tuple[int, float]:
    """Peak bytes, and median seconds of the steps after the first."""
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    keys = {
        "model.name": options.model,
        "model.pretrained": "false",
        "model.img_size": options.img_size,
        "model.grad_checkpointing": checkpointing,
        "precision": precision,
    }
    recipe = load_recipe("fashion_mnist", [f"{key}={value}" for key, value in keys.items()])
    images = torch.randn(options.batch_size, 3, options.img_size, options.img_size, device=device)
    labels = torch.arange(options.batch_size, device=device) % 10
    before = _resident("VmRSS") if device.type == "cpu" else 0
    model = setup.create_model(recipe.model, 10).to(device).train()
    setup.prepare_for_device(model, device.type)
    optimizer = setup.create_optimizer(model, recipe.optim)
    now, times = report.CLOCKS[options.clock], []
    for _ in range(1 + options.rounds):
        start = now()
        float(train_step(model, optimizer, images, labels, recipe))
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(now() - start)
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else _resident("VmHWM") - before
    return peak, statistics.median(times[1:])


def _resident(name: str) -> int:
    """Resident bytes; not from getrusage, whose maximum a process inherits from its parent."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


if __name__ == "__main__":
    main()
