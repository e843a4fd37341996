"""Measure the gain from pretraining on fractals with few labels: Fashion-MNIST from scratch and from `fractal1k`.

Both have the same recipe, labels, budget and seeds, and differ only in their initial weights. The last weights are
scored on the 10,000 test images; no choice uses them. Each training is a run in a separate folder, so the command can
be stopped and resumed; several processes at a time share the work.
"""

import argparse
import json
import math
import statistics
import time
from itertools import product
from pathlib import Path

from glit_models.errors import RunError
from glit_models.training import Recipe, Trainer, load_recipe
from glit_models.weights.loading import timm_name

from . import report

RECIPE = Path(__file__).with_name("few_labels.yaml")
BATCH_SIZES = {100: 20, 600: 50, 6000: 100}  # by the number of labels
SCRATCH = "scratch"


def main() -> None:
    """Run the remaining trainings, and print."""
    parser = report.parser(__doc__, rounds=3)
    parser.add_argument(
        "--budgets", default="100x100,600x10,600x40,6000x3", help="labels x epochs, separated by commas"
    )
    parser.add_argument(
        "--weights", nargs="+", default=["glit_tiny.fractal1k"], metavar="WEIGHTS",
        help="weights to compare with training from scratch: MODEL.TAG, or the path of a model folder",
    )  # fmt: skip
    parser.add_argument("--out", default="runs/few_labels", type=Path, help="folder of the runs")
    parser.add_argument("--root", help="folder of the Fashion-MNIST files (default: found or downloaded)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the recipe")
    parser.add_argument("--device", help="cpu, cuda, ... (default: the GPU if there is one)")
    options = parser.parse_args()
    budgets = [
        (labels, epochs) for labels, epochs in (map(int, pair.split("x")) for pair in options.budgets.split(","))
    ]
    seeds = range(options.rounds)
    for (number, epochs), seed, start in product(budgets, seeds, (SCRATCH, *options.weights)):
        _train(options, number, epochs, start, seed)
    rows = [_row(options, number, epochs, seeds) for number, epochs in budgets]
    report.show("few_labels", options, rows, "mean and spread")


def _row(options: argparse.Namespace, number: int, epochs: int, seeds: range) -> report.Row:
    """The scores of one budget, when all of its runs are finished."""
    row: dict[str, str | int | float] = {"labels": number, "epochs": epochs}
    base = math.nan
    for start in (SCRATCH, *options.weights):
        scores = [_wait(options, number, epochs, start, seed) for seed in seeds]
        mean = statistics.mean(scores)
        row[f"{start}, %"] = f"{mean:.2f} ± {statistics.stdev(scores):.2f}" if len(scores) > 1 else mean
        if start == SCRATCH:
            base = mean
        else:
            row["gain" if len(options.weights) == 1 else f"{start}, gain"] = f"{mean - base:+.2f}"
    return row


def _recipe(options: argparse.Namespace, number: int, epochs: int, start: str, seed: int) -> Recipe:
    overrides = [
        f"seed={seed}", f"data.limit={number}", f"optim.epochs={epochs}", f"optim.batch_size={BATCH_SIZES[number]}",
        f"eval_every={epochs}",
    ]  # fmt: skip
    if options.root is not None:
        overrides.append(f"data.root={options.root}")
    if start != SCRATCH:
        overrides += [f"model.name={timm_name(start)}", "model.pretrained=true"]
    return load_recipe(str(RECIPE), overrides + options.set)


def _folder(options: argparse.Namespace, number: int, epochs: int, start: str, seed: int) -> Path:
    name = Path(start).name.removeprefix("glit_tiny.")
    return options.out / f"{number}x{epochs}-{name}-{seed}"


def _train(options: argparse.Namespace, number: int, epochs: int, start: str, seed: int) -> bool:
    """Train one run to its end, unless another process is running it; returns whether this process did."""
    recipe, out = _recipe(options, number, epochs, start, seed), _folder(options, number, epochs, start, seed)
    try:
        if Trainer(recipe, out, options.device).run() is None:
            raise SystemExit(130)
    except RunError as error:
        if "in use by another process" not in str(error):
            raise
        return False
    return True


def _wait(options: argparse.Namespace, number: int, epochs: int, start: str, seed: int) -> float:
    """The test accuracy of one run, in percent; trains it if the other process has stopped."""
    result = _folder(options, number, epochs, start, seed) / "result.json"
    while not result.is_file():
        if not _train(options, number, epochs, start, seed):
            time.sleep(1)
    return float(json.loads(result.read_text())["test_top1"])


if __name__ == "__main__":
    main()
