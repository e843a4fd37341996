"""Measure the savings and the cost of screening networks on few images: evolutions with one trained supernet.

Each variant repeats the evolution of a stage with the same seeds. Its work is counted in images times blocks. The best
network of each is scored on the images of the evolution, and on other images of the search set.
"""

import argparse
import dataclasses
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from glit_models.search import load_search_recipe, load_space
from glit_models.search.run.context import RunContext
from glit_models.search.run.stage import Stage
from glit_models.search.supernets.scoring import Evaluator

from glit_models.data import Subset

from . import report


def main() -> None:
    """Measure and print."""
    parser = report.parser(__doc__, rounds=3)
    parser.add_argument("--search", type=Path, required=True, help="folder of a search with a trained supernet")
    parser.add_argument("--stage", default="stage1", help="stage whose evolution is repeated")
    parser.add_argument(
        "--images", type=int, default=1000, help="images for the evolution; the others are for the final score"
    )
    parser.add_argument("--screen", type=int, default=250, help="images of the first comparison")
    parser.add_argument("--confirm", type=int, default=20, help="networks that are scored on all images")
    parser.add_argument("--proposals", type=int, default=4, help="proposals per network of a generation")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the recipe")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    few = [f"evaluation.screen_images={options.screen}", f"evaluation.confirm={options.confirm}"]
    plenty = [f"evolution.proposals={options.proposals}"]
    ways: dict[str, list[str]] = {
        "all images": [],
        "few images first": few,
        "all images, surrogate": plenty,
        "few images first, surrogate": few + plenty,
    }
    found: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    for seed in range(options.rounds):
        for way, keys in ways.items():
            found[way].append(_evolve(options, [*options.set, *keys], seed))
            print(f"{way}, seed {seed}: {found[way][-1]}", file=sys.stderr)
    base = sum(run["blocks"] for run in found["all images"])
    report.show("screening", options, [_row(way, runs, base) for way, runs in found.items()], "mean")


def _row(way: str, runs: list[dict[str, float]], base: float) -> report.Row:
    def all_of(key: str) -> str:
        values = [run[key] for run in runs]
        return " ".join(f"{value:.1f}" for value in values) + f" ({statistics.mean(values):.2f})"

    return {
        "compared on": way,
        "networks": int(statistics.mean(run["networks"] for run in runs)),
        "less work in blocks": f"{base / sum(run['blocks'] for run in runs):.2f}x",
        "best of each seed, % of the same images": all_of("best"),
        "% of other images": all_of("others"),
        "loss on other images": f"{statistics.mean(run['loss'] for run in runs):.4f}",
    }


def _evolve(options: argparse.Namespace, keys: list[str], seed: int) -> dict[str, float]:
    """Run one evolution; returns its number of networks, its work, and the score of its best network."""
    recipe = load_search_recipe(str(options.search / "recipe.yaml"), keys)
    with tempfile.TemporaryDirectory() as temporary:
        context = RunContext(recipe, Path(temporary), "cpu", None)
        order, search_set, open_evaluator = context.search_order(), context.splits.validation, context.evaluator
        evaluators: list[Evaluator] = []

        def evaluator(*arguments: Any) -> Evaluator:
            evaluators.append(open_evaluator(*arguments))
            return evaluators[-1]

        context.evaluator = evaluator  # type: ignore[method-assign]
        context.splits = dataclasses.replace(context.splits, validation=Subset(search_set, order[: options.images]))
        stage = Stage(options.stage, load_space(options.search / options.stage / "space.yaml"), context)
        config = dataclasses.asdict(recipe.evolution_config())
        stage.search = type(stage.search)(stage.space, context.budgets, seed=seed, **config)
        stage.folder.mkdir()
        (stage.folder / "supernet").symlink_to((options.search / options.stage / "supernet").resolve())
        stage._references = dict  # type: ignore[method-assign]
        stage._evolve()
        best = stage.candidates.ranked()[0]
        context.splits = dataclasses.replace(context.splits, validation=search_set)
        rest = order[options.images :]
        score = open_evaluator(stage.space, stage.weights, lambda done, total: None, rest).evaluate([best.spec])
        assert best.fitness is not None
        return {
            "networks": len(stage.search.candidates),
            "blocks": sum(each.block_images for each in evaluators),
            "best": best.fitness,
            "others": score[best.spec].accuracy,
            "loss": score[best.spec].loss,
        }


if __name__ == "__main__":
    main()
