"""What each part of the search is worth on Fashion-MNIST: the paper's ablation, with networks of 88 % and above.

Networks are trained as those of the frozen table are (`benchmarks/ranked`): on 20,000 images for 10 epochs, and
scored on the 10,000 test images, on which nothing is chosen. All of them cost between 9.65 and 10.05 million
multiply-adds, and every search costs the same in total: 40 epochs of supernets, 400 evaluated networks, 4 retrained
ones. Random search spends that on training ten random networks. What each search finds is then trained with several
seeds, and compared with the others seed by seed.

There is one search of each kind. The intervals hold for the networks that these searches found, not for searches that
start from other seeds. Winners and scores are kept in `benchmarks/ranked/ablation.json`: what is there is not searched
for or trained again. The command can be stopped and resumed, and several processes share the work.
"""

import argparse
import json
import random
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from glit_models.search import BudgetSampler, SearchRun, load_search_recipe, macs_budget
from scipy.stats import t as student_t

from glit_models import BlockSpec, GLiTSpec, count_macs
from glit_models.errors import RunError
from glit_models.runs.signals import StopRequest

from . import report
from .ranked.__main__ import FOLDER, RECIPE, train_network

TABLE = FOLDER / "ablation.json"
SIZES = "embed_dim: 48, depth: 6, patch_size: 4"
SEARCH = (
    "budget.macs={low: 9.65e+6, high: 1.005e+7}", "fitness=inherited_loss", "supernet.train.optim.epochs=20",
    "evolution={population: 20, generations: 10, num_parents: 6, num_mutation: 10, num_crossover: 10}",
    "evaluation={calibration_batches: 4, screen_images: 1000, confirm: 20}",
    "retrain.top=2", "final.all_data=false", "control.networks=0",
)  # fmt: skip
NUM_RANDOM = 10  # trainings that cost as much as a search: 4 for 40 epochs of supernets, 4 retrained, 2 for evaluations
SEARCHES: dict[str, tuple[str, ...]] = {
    "two levels": ("method=hierarchical",),
    "one level": ("method=spos",),
    "one level, without locality": ("method=spos", f"space={{space: global_only, {SIZES}}}"),
    "one level, Conv2d": ("method=spos", f"space={{space: glit_conv2d, {SIZES}}}"),
    "one level, local attention": ("method=spos", f"space={{space: glit_window, {SIZES}}}"),
}
ATTENTION = GLiTSpec((BlockSpec(3, 0, mlp_ratio=4, qkv_ratio=1),) * 6, 48, 3, 4)
DIFFERENCES = (
    ("the high level only", "attention only"),
    ("two levels", "the high level only"),
    ("two levels", "one level"),
    ("two levels", "random search"),
    ("one level", "random search"),
    ("one level", "one level, without locality"),
    ("one level", "one level, Conv2d"),
    ("one level", "one level, local attention"),
)


def main() -> None:
    """Run what the table lacks, and print the finished rows."""
    parser = report.parser(__doc__, rounds=5)
    parser.add_argument("--out", default="runs/ablation", type=Path, help="folder of the runs")
    parser.add_argument("--device", help="cpu, cuda, ... (default: the GPU if there is one)")
    parser.add_argument("--max-minutes", type=float, help="save and exit after this time")
    parser.add_argument("--show", action="store_true", help="run nothing; print what is done")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if not options.show:
        options.stop = StopRequest(options.max_minutes)
        for name, spec in _networks(options):
            for seed in range(options.rounds):
                _train(options, name, spec, seed)
    show(options)


def _networks(options: argparse.Namespace) -> Iterator[tuple[str, GLiTSpec]]:
    """The name and the network of each row, as they are found."""
    yield "attention only", ATTENTION
    for name, keys in SEARCHES.items():
        if (found := _search(options, name, keys)) is None:
            continue
        if "stage 1" in found:
            yield "the high level only", GLiTSpec.from_dict(found["stage 1"])
        yield name, GLiTSpec.from_dict(found["winner"])
    best = []
    for place, spec in enumerate(_draw()):
        scores = _train(options, f"random network {place}", spec, 0)
        best.append((scores["search_loss"] if scores else float("inf"), spec))
    if all(loss < float("inf") for loss, _ in best):
        yield "random search", min(best, key=lambda pair: pair[0])[1]


def _draw() -> list[GLiTSpec]:
    """Random networks of the space and the budget."""
    recipe = load_search_recipe(str(RECIPE), SEARCH)
    bounds = recipe.budget.macs
    sampler = BudgetSampler(recipe.load_space(), [macs_budget(bounds.low, bounds.high, 28, 10)])
    rng = random.Random("ablation")
    return [cast(GLiTSpec, sampler.sample(rng)[0]) for _ in range(NUM_RANDOM)]


def _search(options: argparse.Namespace, name: str, keys: tuple[str, ...]) -> dict[str, Any] | None:
    """The winner of a search, and that of its first stage if it has two; None if another process is at it."""
    key, out = ("search", name, 0), options.out / f"{name} search"
    if (found := report.read_rows(TABLE).get(key)) is not None:
        return found
    recipe = load_search_recipe(str(RECIPE), [*SEARCH, *keys])
    try:
        if SearchRun(recipe, out, options.device, options.stop.minutes_left).run() is None:
            sys.exit("stopped; run the same command to resume")
    except RunError as error:
        print(error, file=sys.stderr)
        return None
    found = {"winner": json.loads((out / "winner.json").read_text())}
    if recipe.method == "hierarchical":
        found["stage 1"] = json.loads((out / "stage1" / "winner.json").read_text())
    report.keep_row(TABLE, out, key, found)
    return found


def _train(options: argparse.Namespace, name: str, spec: GLiTSpec, seed: int) -> dict[str, float] | None:
    """The scores of a training; None if another process is at it."""
    key, run = ("training", name, seed), options.out / f"{name} {seed}"
    if (found := report.read_rows(TABLE).get(key)) is not None:
        return found
    try:
        scores = train_network(spec, seed, run, options.device, options.stop)
    except RunError as error:
        print(error, file=sys.stderr)
        return None
    if scores is None:
        sys.exit("stopped; run the same command to resume")
    report.keep_row(TABLE, run, key, {"macs": count_macs(spec, 28, 10), **scores})
    return scores


def show(options: argparse.Namespace) -> None:
    """Print the rows that are finished, and the differences between them."""
    trained = report.read_rows(TABLE)
    found = {}
    for name in dict.fromkeys(name for pair in DIFFERENCES for name in reversed(pair)):
        keys = [("training", name, seed) for seed in range(options.rounds)]
        if all(key in trained for key in keys):
            found[name] = [trained[key] for key in keys]
    if not found:
        sys.exit(f"no row has {options.rounds} finished seeds yet")
    rows: list[report.Row] = []
    for name, scores in found.items():
        tests = [score["test_top1"] for score in scores]
        rows.append({
            "found by": name, "MACs, M": f"{scores[0]['macs'] / 1e6:.2f}",
            "test top-1 of each seed, %": " ".join(f"{test:.2f}" for test in tests),
            "mean": f"{statistics.mean(tests):.2f}",
        })  # fmt: skip
    report.show("ablation", options, rows, "mean")
    pairs = [(a, b) for a, b in DIFFERENCES if a in found and b in found]
    if pairs and options.rounds > 1:
        print()
        differences: list[report.Row] = [
            {"difference": f"{a} - {b}", "points (95 %)": paired(*([s["test_top1"] for s in found[x]] for x in (a, b)))}
            for a, b in pairs
        ]
        report.show("ablation", options, differences, "mean")


def paired(a: list[float], b: list[float], digits: int = 2) -> str:
    """The mean of a - b, pair by pair, with the 95 % interval of a paired t-test."""
    differences = [x - y for x, y in zip(a, b, strict=True)]
    mean, error = statistics.mean(differences), statistics.stdev(differences) / len(differences) ** 0.5
    half = student_t.ppf(0.975, len(differences) - 1) * error
    return f"{mean:+.{digits}f} ({mean - half:+.{digits}f} to {mean + half:+.{digits}f})"


if __name__ == "__main__":
    main()
