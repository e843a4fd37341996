"""Measure the gain from pretraining on fractals with few labels: Fashion-MNIST from scratch and from `fractal1k`.

Both have the same recipe, labels, budget and seeds, and differ only in their initial weights. The last weights are
scored on the 10,000 test images; no choice uses them. Each training is a run in a separate folder, so the command can
be stopped and resumed; several processes at a time share the work.
"""

import argparse
import json
import statistics
import time
from collections.abc import Iterable, Sequence
from itertools import product
from pathlib import Path

import torch

from glit_models.errors import RunError
from glit_models.runs.lock import lock_folder
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
    torch.set_num_threads(options.threads)
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
    for start, seed in product((SCRATCH, *options.weights), seeds):
        _wait(options, number, epochs, start, seed)
    return finished_row(options.out, number, epochs, options.weights, seeds)


def finished_row(out: Path, number: int, epochs: int, weights: Sequence[str], seeds: Iterable[int]) -> report.Row:
    """The scores of the finished runs of one budget, and the gains over the runs from scratch with the same seeds."""
    row: dict[str, str | int | float] = {"labels": number, "epochs": epochs}
    scores: dict[str, dict[int, float]] = {}
    for start in (SCRATCH, *weights):
        paths = {seed: _folder(out, number, epochs, start, seed) / "result.json" for seed in seeds}
        own = {seed: json.loads(path.read_text())["test_top1"] for seed, path in paths.items() if path.is_file()}
        scores[start] = own
        if own:
            mean = statistics.mean(own.values())
            row[f"{start}, %"] = f"{mean:.2f} ± {statistics.stdev(own.values()):.2f}" if len(own) > 1 else mean
        gains = [own[seed] - scores[SCRATCH][seed] for seed in own if seed in scores[SCRATCH]]
        if gains and start != SCRATCH:
            row["gain" if len(weights) == 1 else f"{start}, gain"] = f"{statistics.mean(gains):+.2f}"
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


def _folder(out: Path, number: int, epochs: int, start: str, seed: int) -> Path:
    name = Path(start).name.removeprefix("glit_tiny.")
    return out / f"{number}x{epochs}-{name}-{seed}"


def _train(options: argparse.Namespace, number: int, epochs: int, start: str, seed: int) -> bool:
    """Train one run to its end, unless another process is running it; returns whether it is finished."""
    recipe, out = _recipe(options, number, epochs, start, seed), _folder(options.out, number, epochs, start, seed)
    if (out / "result.json").is_file():
        return True
    try:
        lock_folder(out).close()  # creating a trainer first would take seconds
        if Trainer(recipe, out, options.device).run() is None:
            raise SystemExit(130)
    except RunError as error:
        if "in use by another process" not in str(error):
            raise
        return False
    return True


def _wait(options: argparse.Namespace, number: int, epochs: int, start: str, seed: int) -> None:
    """Wait until a run is finished; trains it if the other process has stopped."""
    while not _train(options, number, epochs, start, seed):
        time.sleep(1)


if __name__ == "__main__":
    main()
