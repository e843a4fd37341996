"""Does a search that starts from trained weights beat fine-tuning them? On a few labels of Fashion-MNIST at 64 pixels.

Both start from `glit_tiny.fractal1k`. Fine-tuning trains GLiT-Tiny. The search trains a supernet of the released space
that starts from these weights, evolves networks of GLiT-Tiny's multiply-adds (within 2 %), and trains the best one
from the weights that it inherits. The supernet has as many epochs as the last training, so GLiT-Tiny is also
fine-tuned for both together: the search must beat this row to be worth its time. The test set scores the last weights;
nothing is chosen on it. The scores are kept in `benchmarks/start.json`: what is there is not trained again. The command
can be stopped and resumed, and several processes share the work.
"""

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from glit_models.search import SearchRun
from glit_models.search.recipe import SearchRecipe

from glit_models.errors import RunError
from glit_models.recipes import build_recipe
from glit_models.runs.signals import StopRequest
from glit_models.training import Trainer, load_recipe

from . import report
from .ablation import paired
from .few_labels import BATCH_SIZES, RECIPE

TABLE = Path(__file__).with_suffix(".json")
WEIGHTS = "glit_tiny.fractal1k"
EPOCHS = {600: 20, 3000: 4}  # by the number of labels: as many images either way
TRAINING = ("model", "data", "augment", "optim", "precision", "eval_every")  # what a search takes of the recipe
SEARCH = {
    "space": "glit_released", "method": "evolution", "fitness": "inherited_loss",
    "budget": {"macs": {"like": "glit_tiny", "within": "2 %"}},
    "supernet": {"from": WEIGHTS},
    "evolution": {"population": 20, "generations": 5, "num_parents": 6, "num_mutation": 10, "num_crossover": 10},
    "evaluation": {"calibration_batches": 4},
    "retrain": {"top": 1, "start": "inherited"},
    "final": {"all_data": False},
    "control": {"networks": 0},
}  # fmt: skip
ARMS = ("fine-tuned", "fine-tuned, twice as long", "searched")


def main() -> None:
    """Train what has not been trained yet, and print."""
    parser = report.parser(__doc__, rounds=3)
    parser.add_argument("--labels", type=int, nargs="+", default=list(EPOCHS), choices=list(EPOCHS))
    parser.add_argument("--out", default="runs/start", type=Path, help="folder of the runs")
    parser.add_argument("--device", help="cpu, cuda, ... (default: the GPU if there is one)")
    parser.add_argument("--max-minutes", type=float, help="save and exit after this time")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a key of the training")
    parser.add_argument("--show", action="store_true", help="run nothing; print what is done")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if not options.show:
        options.stop = StopRequest(options.max_minutes)
        for labels in options.labels:
            for seed in range(options.rounds):
                for arm in ARMS:
                    _train(options, labels, arm, seed)
    show(options)


def show(options: argparse.Namespace) -> None:
    """Print the finished rows."""
    found = report.read_rows(TABLE)
    rows: list[report.Row] = []
    for labels in options.labels:
        keys = {arm: [(labels, arm, seed) for seed in range(options.rounds)] for arm in ARMS}
        if all(key in found for of_arm in keys.values() for key in of_arm):
            scores = {arm: [found[key]["test_top1"] for key in keys[arm]] for arm in ARMS}
            rows += [_row(labels, arm, scores) for arm in ARMS]
    if not rows:
        sys.exit(f"no row has {options.rounds} finished seeds yet")
    report.show("start", options, rows, "mean")


def _row(labels: int, arm: str, scores: dict[str, list[float]]) -> report.Row:
    return {
        "labels": labels, "GLiT-Tiny's weights": arm, "test top-1, %": " ".join(f"{s:.2f}" for s in scores[arm]),
        "mean": f"{statistics.mean(scores[arm]):.2f}",
        "to fine-tuned, twice as long": paired(scores[arm], scores[ARMS[1]]) if arm != ARMS[1] else "",
    }  # fmt: skip


def _train(options: argparse.Namespace, labels: int, arm: str, seed: int) -> None:
    """Train one arm and add its accuracy to the table, unless it is there or another process is at it."""
    key, run = (labels, arm, seed), options.out / f"{labels} {arm} {seed}"
    if key in report.read_rows(TABLE):
        return
    try:
        result = _run(options, labels, arm, seed, run)
    except RunError as error:
        print(error, file=sys.stderr)
        return
    if result is None:
        sys.exit("stopped; run the same command to resume")
    test = result["test_accuracy" if arm == "searched" else "test_top1"]
    report.keep_row(TABLE, run, key, {"test_top1": round(float(test), 2)})


def _run(options: argparse.Namespace, labels: int, arm: str, seed: int, run: Path) -> dict[str, Any] | None:
    """The result of one arm; None if it was stopped."""
    epochs = EPOCHS[labels] * (2 if arm == ARMS[1] else 1)
    keys = [f"data.limit={labels}", f"optim.epochs={epochs}", f"optim.batch_size={BATCH_SIZES.get(labels, 50)}",
            f"eval_every={epochs}", *options.set]  # fmt: skip
    if arm == "searched":
        training = {key: value for key, value in load_recipe(str(RECIPE), keys).to_dict().items() if key in TRAINING}
        recipe = build_recipe(SearchRecipe, {**SEARCH, "train": training, "seed": seed})
        return SearchRun(recipe, run, options.device, options.stop.minutes_left).run()
    keys += [f"seed={seed}", f"model.name={WEIGHTS}", "model.pretrained=true", "keep=last"]
    return Trainer(load_recipe(str(RECIPE), keys), run, options.device, options.stop.minutes_left).run()


if __name__ == "__main__":
    main()
