"""Measure how well a supernet orders the networks of the frozen table: train it, score them, and compare.

The supernet is trained on the table's 20,000 training images, sees six times as many images as each network of the
table, and scores them on the table's 10,000 search images. Their scores on the test set are the ground truth. `--set`
changes the supernet's training: `--set supernet.paths=2`. The command can be stopped and resumed.

`--compare DIR ...` compares finished runs, and the size of the networks, with the first of them instead, on the
networks that all of them have.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from glit_models.search import load_search_recipe
from glit_models.search.evidence.ranking import Ranking
from glit_models.search.evidence.table import NetworkTable
from glit_models.search.run.context import Interrupted, RunContext
from glit_models.search.run.stage import Stage
from scipy.stats import kendalltau

from glit_models import Spec
from glit_models.runs.files import write_json

from . import report
from .ranked.__main__ import RECIPE, TABLE, load_spaces

TIMES = 6  # images seen, relative to a network of the table
RESAMPLES = 2000  # of the bootstrap


def main() -> None:
    """Train, score and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--space", default="joint", choices=("joint", "stage2"), help="space of the networks")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--out", type=Path, help="folder of the run")
    what.add_argument("--compare", nargs="+", type=Path, metavar="DIR", help="folders of finished runs")
    parser.add_argument("--table", default=TABLE, type=Path, help="another table")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ...")
    parser.add_argument("--max-minutes", type=float, help="time limit, after which it saves and exits")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a recipe key")
    options = parser.parse_args()
    if options.compare:
        compare(options.compare)
        return
    plain = load_search_recipe(str(RECIPE))
    epochs = f"supernet.train.optim.epochs={TIMES * plain.retrain_recipe(None).optim.epochs}"
    recipe = load_search_recipe(str(RECIPE), [epochs, "method=evolution", "fixed={}", *options.set])
    space = load_spaces()[options.space]
    networks = NetworkTable.read(options.table).of(options.space, space)
    options.out.mkdir(parents=True, exist_ok=True)
    context = RunContext(recipe, options.out, options.device, options.max_minutes)
    stage = Stage(options.space, space, context)
    with context.stop:
        try:
            stage.train_supernet()
            evaluator = context.evaluator(space, stage.weights, lambda done, total: context.check_stop(together=False))
            scores = evaluator.evaluate([network.spec for network in networks])
        except Interrupted as why:
            raise SystemExit(f"stopped by {why}; run the same command to resume") from None
    predictions = {
        network.spec: {
            "inherited loss": -scores[network.spec].loss,
            "inherited top-1": scores[network.spec].accuracy,
            "MACs": network.costs["macs"],
            "parameters": network.costs["params"],
        }
        for network in networks
    }
    ranking = NetworkTable.read(options.table).judge(options.space, predictions)
    write_json(options.out / "judged.json", ranking.to_dict())
    print(ranking)


def compare(folders: Sequence[Path]) -> None:
    """Print the tau of each run's inherited loss, and of size, with the loss after training; and the difference to the
    first run's.

    The intervals are those of a bootstrap over networks; for the difference, both runs have the same networks.
    """
    runs = [Ranking.from_dict(json.loads((folder / "judged.json").read_text())) for folder in folders]
    orders = {folder.name: _predictions(run, "inherited loss") for folder, run in zip(folders, runs, strict=True)}
    orders |= {size: _predictions(runs[0], size) for size in ("MACs", "parameters")}
    trained = {network.spec: network.trained["loss"] for network in runs[0].networks}
    specs = [spec for spec in trained if all(spec in order for order in orders.values())]
    sides = np.array([[order[spec] for spec in specs] for order in (trained, *orders.values())])  # [1 + O, networks]
    rng = np.random.default_rng(0)
    drawn = np.array([_taus(sides[:, rng.integers(len(specs), size=len(specs))]) for _ in range(RESAMPLES)])
    taus = _taus(sides)
    rows: list[report.Row] = [
        {
            "run, or size": name,
            "tau with loss (95 %)": _interval(taus[place], drawn[:, place]),
            f"to {folders[0].name}": _interval(taus[place] - taus[0], drawn[:, place] - drawn[:, 0]) if place else "",
        }
        for place, name in enumerate(orders)
    ]
    print(f"{len(specs)} networks\n")
    report.print_rows(rows)


def _predictions(run: Ranking, measure: str) -> dict[Spec, float]:
    return {network.spec: network.predictions[measure] for network in run.networks}


def _taus(sides: np.ndarray) -> list[float]:
    """Kendall's tau of each row but the first with the first."""
    return [float(kendalltau(sides[0], side).statistic) for side in sides[1:]]


def _interval(value: float, drawn: np.ndarray) -> str:
    low, high = np.nanquantile(drawn, [0.025, 0.975])
    return f"{value:.2f} ({low:.2f} to {high:.2f})"


if __name__ == "__main__":
    main()
