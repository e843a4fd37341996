"""Construction time and throughput of GLiT-Tiny beside timm's DeiT-Tiny, in one interleaved run, in float32 on CPU."""

from collections.abc import Callable
from functools import partial

import timm
import torch
from timm.utils import reparameterize_model
from torch import nn

import glit_models  # noqa: F401 - registers the models

from . import report


def main() -> None:
    """Measure and print."""
    parser = report.parser(__doc__, rounds=15)
    parser.add_argument("--models", default="glit_tiny,deit_tiny_patch16_224", help="names, separated by commas")
    parser.add_argument("--batch-sizes", default="1,16", help="numbers, separated by commas")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    names = options.models.split(",")
    batch_sizes = [int(size) for size in options.batch_sizes.split(",")]

    built = report.interleaved({name: partial(timm.create_model, name) for name in names}, min(options.rounds, 5))
    models: dict[str, nn.Module] = {}
    for name in names:
        models[name] = timm.create_model(name).eval()
        if name.startswith("glit"):
            models[f"{name}, reparameterized"] = reparameterize_model(models[name])

    rows = []
    seconds = {size: report.interleaved(_cases(models, size), options.rounds) for size in batch_sizes}
    for name in models:
        row: dict[str, str | int | float] = {"model": name}
        row["construction, s"] = built.get(name, "")
        for size in batch_sizes:
            row[f"batch {size}, ms"] = seconds[size][name] * 1e3
            row[f"batch {size}, images/s"] = size / seconds[size][name]
        rows.append(row)
    report.show("models", options, rows)


def _cases(models: dict[str, nn.Module], batch_size: int) -> dict[str, Callable[[], object]]:
    images = torch.randn(batch_size, 3, 224, 224)

    def forward(model: nn.Module) -> object:
        with torch.inference_mode():
            return model(images)

    return {name: partial(forward, model) for name, model in models.items()}


if __name__ == "__main__":
    main()
