"""Measure the speed of drawing fractals, on the CPU and on a GPU if there is one, and compare their pixels."""

import statistics
import time
from functools import partial
from itertools import product

import torch

from glit_models.data import FractalConfig, Fractals

from . import report

CONFIGS = {
    f"{color}, {render}": partial(FractalConfig, color=color, render=render)
    for color, render in product(("gray", "color"), ("point", "patch"))
}
DIFFERENT = "values unlike the CPU's"


def main() -> None:
    """Measure and print."""
    parser = report.parser(__doc__, rounds=5)
    parser.add_argument("--sizes", default="64,112,224", help="pixels per side, separated by commas")
    parser.add_argument("--classes", type=int, default=1000, help="number of classes to search for and to draw")
    parser.add_argument("--batch-size", type=int, default=256, help="batch size")
    parser.add_argument("--compared", type=int, default=256, help="images of each size to compare between the devices")
    report.add_clock(parser)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    sizes = [int(size) for size in options.sizes.split(",")]

    variants, searches = {}, []
    for name, config in CONFIGS.items():
        start = time.perf_counter()
        variants[name] = Fractals(config(num_classes=options.classes))
        searches.append(time.perf_counter() - start)
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    cases = {
        f"{device} {name} {size}": partial(_draw, variants[name], options.batch_size, size, device)
        for device, name, size in product(devices, variants, sizes)
    }
    seconds = report.interleaved(cases, options.rounds, options.clock)
    rows = []
    for device, name in product(devices, variants):
        row: dict[str, str | int | float] = {"device": report.device_name(device), "variant": name}
        for size in sizes:
            row[f"{size} px, images/s"] = options.batch_size / seconds[f"{device} {name} {size}"]
        if len(devices) > 1:
            row[DIFFERENT] = "" if device == "cpu" else _count_different(variants[name], options.compared, sizes)
        rows.append(row)
    report.show("fractals", options, rows)
    if not options.json:
        print(f"\nSearch for {options.classes} classes: {statistics.median(searches):.2g} s, on the CPU.")


def _draw(fractals: Fractals, count: int, size: int, device: str) -> torch.Tensor:
    """The first instances of the first classes, and the second ones if these are too few."""
    number = torch.arange(count)
    num_classes = fractals.config.num_classes
    images = fractals.batch(number % num_classes, number // num_classes, size, device)
    if device == "cuda":
        torch.cuda.synchronize()
    return images


def _count_different(fractals: Fractals, count: int, sizes: list[int]) -> str:
    """The number of bytes of the images that differ between the devices, and the number of all bytes."""
    different = total = 0
    for size in sizes:
        unlike = _draw(fractals, count, size, "cuda").cpu() != _draw(fractals, count, size, "cpu")
        different, total = different + int(unlike.sum()), total + unlike.numel()
    return f"{different} of {total}"


if __name__ == "__main__":
    main()
