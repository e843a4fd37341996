"""Measure how well a supernet orders the networks of the frozen table: train it, score them, and compare.

The supernet is trained on the table's 20,000 training images, sees six times as many images as each network of the
table, and scores them on the table's 10,000 search images. Their scores on the test set are the ground truth. `--set`
changes the supernet's training: `--set supernet.paths=2`. The command can be stopped and resumed.
"""

import argparse
from pathlib import Path

from glit_models.search import load_search_recipe
from glit_models.search.evidence.table import NetworkTable
from glit_models.search.run.context import Interrupted, RunContext
from glit_models.search.run.stage import Stage

from glit_models.runs.files import write_json

from .ranked.__main__ import RECIPE, TABLE, load_spaces

TIMES = 6  # images seen, relative to a network of the table


def main() -> None:
    """Train, score and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--space", default="joint", choices=("joint", "stage2"), help="space of the networks")
    parser.add_argument("--out", required=True, type=Path, help="folder of the run")
    parser.add_argument("--table", default=TABLE, type=Path, help="another table")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ...")
    parser.add_argument("--max-minutes", type=float, help="time limit, after which it saves and exits")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a recipe key")
    options = parser.parse_args()
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


if __name__ == "__main__":
    main()
