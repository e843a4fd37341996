"""How well a supernet orders the networks of the frozen table: train it, score them, and compare with their training.

The supernet is trained on the table's 20,000 training images, sees six times as many images as one of its networks did,
and scores them on the table's 10,000 search images. What they reached on the test set is the truth. `--set` changes how
the supernet is trained: `--set supernet.paths=2`. The command can be stopped and given again.
"""

import argparse
from pathlib import Path

from glit_models.search import load_search_recipe
from glit_models.search.run_context import Interrupted, RunContext
from glit_models.search.stage import Stage
from glit_models.search.table import NetworkTable

from glit_models.runs.files import write_json

from .ranked.__main__ import RECIPE, TABLE, load_spaces

TIMES = 6  # as many images as a network of the table has seen


def main() -> None:
    """Train, score, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--space", default="joint", choices=("joint", "stage2"), help="whose networks are ordered")
    parser.add_argument("--out", required=True, type=Path, help="folder of the run")
    parser.add_argument("--table", default=TABLE, type=Path, help="another table")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ...")
    parser.add_argument("--max-minutes", type=float, help="save and leave after so long")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of the search's recipe")
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
