"""What pretraining on fractals is worth where labels are few: Fashion-MNIST from scratch and from `fractal1k`.

Both start from the same recipe, labels, budget and seeds; only the weights that they start from differ. The last
weights are scored, on the 10,000 test pictures: nothing is chosen on them. Each training is a run in a folder of its
own, so the command can be stopped and given again; several at a time share the work.
"""

import argparse
import math
import statistics
import time
from pathlib import Path

from glit_models.errors import TrainingError
from glit_models.training import Recipe, Trainer, load_recipe

from . import report

RECIPE = Path(__file__).with_name("few_labels.yaml")
BATCH_SIZES = {100: 20, 600: 50, 6000: 100}  # by the number of labels
SCRATCH = "scratch"


def main() -> None:
    """Train what has not been trained yet, and print."""
    parser = report.parser(__doc__, rounds=3)
    parser.add_argument(
        "--budgets", default="100x100,600x10,600x40,6000x3", help="labels x epochs, separated by commas"
    )
    parser.add_argument("--weights", default="glit_tiny.fractal1k", help="what is compared with starting from scratch")
    parser.add_argument("--out", default="runs/few_labels", type=Path, help="folder of the runs")
    parser.add_argument("--device", help="cpu, cuda, ...; the GPU if there is one unless given")
    options = parser.parse_args()
    budgets = [tuple(map(int, budget.split("x"))) for budget in options.budgets.split(",")]
    seeds = range(options.rounds)
    for number, epochs in budgets:
        for seed in seeds:
            for start in (SCRATCH, options.weights):
                _train(options, number, epochs, start, seed, wait=False)
    rows: list[dict[str, str | int | float]] = []
    for number, epochs in budgets:
        row: dict[str, str | int | float] = {"labels": number, "epochs": epochs}
        means = []
        for start in (SCRATCH, options.weights):
            scores = [_train(options, number, epochs, start, seed, wait=True) for seed in seeds]
            means.append(statistics.mean(scores))
            row[f"{start}, %"] = f"{means[-1]:.2f} ± {statistics.stdev(scores):.2f}" if len(scores) > 1 else means[-1]
        row["gain"] = f"{means[1] - means[0]:+.2f}"
        rows.append(row)
    report.show("few_labels", options, rows, "mean and spread")


def _recipe(number: int, epochs: int, start: str, seed: int) -> Recipe:
    overrides = [
        f"seed={seed}", f"data.limit={number}", f"optim.epochs={epochs}", f"optim.batch_size={BATCH_SIZES[number]}",
        f"eval_every={epochs}",
    ]  # fmt: skip
    if start != SCRATCH:
        overrides += [f"model.name={start}", "model.pretrained=true"]
    return load_recipe(str(RECIPE), overrides)


def _train(options: argparse.Namespace, number: int, epochs: int, start: str, seed: int, wait: bool) -> float:
    """The test accuracy of one run, in percent. One that another process is at is left to it, and may be waited for."""
    name = "fractal1k" if start != SCRATCH else SCRATCH
    out = options.out / f"{number}x{epochs}-{name}-{seed}"
    while True:
        try:
            result = Trainer(_recipe(number, epochs, start, seed), out, options.device).run()
        except TrainingError as error:
            if "in use by another process" not in str(error):
                raise
            if not wait:
                return math.nan
            time.sleep(5)
            continue
        if result is None:
            raise SystemExit(130)
        return float(result["test_top1"])


if __name__ == "__main__":
    main()
