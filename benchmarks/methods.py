"""Compare search methods on one trained supernet, at an equal number of evaluated networks.

The supernet is that of `python -m benchmarks.judge --space joint --out DIR`. A method compares networks by their
inherited loss on a few hundred search images; what it finds is scored on 2,000 others. The first table has the loss of
the best network within the budget of the frozen table, the second one the loss along the front of loss against
multiply-adds: the mean, over the range of multiply-adds, of the best loss up to there (a linear function of the
hypervolume). Nothing is trained, so this says how well methods search, not how good the networks become.
"""

import json
import random
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from glit_models.search import METHODS, Budget, BudgetSampler, Search, SearchSpace, load_search_recipe, macs_budget
from glit_models.search.run.context import RunContext
from glit_models.search.run.stage import Stage

from glit_models import Spec, parse_spec

from . import report
from .ablation import paired
from .ranked.__main__ import RECIPE, load_spaces

POPULATION = 20
SETTINGS: dict[str, Any] = {
    "population": POPULATION, "num_parents": 6, "num_mutation": 10, "num_crossover": 10,
}  # fmt: skip
OTHERS = 2000  # search images that no method compares by
CALIBRATION = 2  # batches of 100 images for BatchNorm; more would take most of the time
BUDGETS = 5  # number of single-budget searches that a front is compared with

Scorer = Callable[[Sequence[Spec]], dict[Spec, float]]


def main() -> None:
    """Search with each method and seed, and print both tables."""
    parser = report.parser(__doc__, rounds=5)
    parser.add_argument("--judged", required=True, type=Path, help="folder of benchmarks.judge, for the joint space")
    parser.add_argument("--evaluations", type=int, default=100, help="networks that each search may evaluate")
    parser.add_argument("--images", type=int, default=500, help="images that methods compare networks by")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keys = ["method=evolution", "fixed={}", f"evaluation.calibration_batches={CALIBRATION}"]
    recipe = load_search_recipe(str(RECIPE), keys)
    space = load_spaces()["joint"]
    context = RunContext(recipe, options.judged, "cpu", None)
    few, others = (
        _scorer(options.judged / f"methods-{name}.jsonl", context, space, positions)
        for name, positions in (
            (str(options.images), range(options.images)),
            ("others", range(options.images, options.images + OTHERS)),
        )
    )
    bounds = recipe.budget.macs
    budget = macs_budget(bounds.low, bounds.high, 28, 10)
    found: dict[str, list[float]] = {name: [] for name in WINNERS}
    fronts: dict[str, list[float]] = {name: [] for name in FRONTS}
    for seed in range(options.rounds):
        for name, method in WINNERS.items():
            best = min(evaluated := method(space, budget, options.evaluations, seed, few), key=evaluated.__getitem__)
            found[name].append(others([best])[best])
        for name, method in FRONTS.items():
            evaluated = method(space, _range(space), options.evaluations, seed, few)
            fronts[name].append(_along_front(evaluated, _range(space), others))
    for title, scores in (("loss of the best network", found), ("loss along the front", fronts)):
        report.show("methods", options, [_row(name, title, scores) for name in scores], "mean")
        print()


def _scorer(path: Path, context: RunContext, space: SearchSpace, positions: Sequence[int]) -> Scorer:
    """Score networks by their inherited loss on some search images; the scores are kept in a file."""
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    known = {parse_spec(line["spec"]): line["loss"] for line in lines}
    order = [context.search_order()[position] for position in positions]
    evaluator = context.evaluator(space, Stage("joint", space, context).weights, lambda done, total: None, order)

    def score(specs: Sequence[Spec]) -> dict[Spec, float]:
        missing = [spec for spec in specs if spec not in known]
        known.update({spec: score.loss for spec, score in evaluator.evaluate(missing).items()} if missing else {})
        with path.open("a") as file:
            file.writelines(json.dumps({"spec": spec.to_dict(), "loss": known[spec]}) + "\n" for spec in missing)
        return {spec: known[spec] for spec in specs}

    return score


def _run(search: Search, score: Scorer) -> dict[Spec, float]:
    """The losses of all networks that a search evaluates."""
    while specs := search.ask():
        for spec, loss in score(specs).items():
            search.tell(spec, -loss)
    return {candidate.spec: -(candidate.fitness or 0.0) for candidate in search.candidates}


def _method(name: str, **settings: Any) -> Callable[..., dict[Spec, float]]:
    def run(space: SearchSpace, budget: Budget, count: int, seed: int, score: Scorer) -> dict[Spec, float]:
        keys = {**SETTINGS, "generations": count // POPULATION, **settings}
        return _run(METHODS[name](space, [budget], seed=seed, **keys), score)

    return run


def _two_stages(space: SearchSpace, budget: Budget, count: int, seed: int, score: Scorer) -> dict[Spec, float]:
    """GLiT's two stages, with half the evaluations each; stage 2 begins with the winner of stage 1."""
    fixed = load_search_recipe(str(RECIPE)).fixed
    keys = {**SETTINGS, "generations": count // 2 // POPULATION}
    first = _run(METHODS["evolution"](space.stage_one(**fixed), [budget], seed=seed, **keys), score)
    winner = min(first, key=first.__getitem__)
    second = METHODS["evolution"](space.stage_two(winner), [budget], seed=seed, initial=[winner], **keys)
    return {**first, **_run(second, score)}


def _several_budgets(space: SearchSpace, budget: Budget, count: int, seed: int, score: Scorer) -> dict[Spec, float]:
    """One evolution for each part of the range, with an equal share of the evaluations."""
    evaluated: dict[Spec, float] = {}
    low, high = float(budget.low or 0), float(budget.high or 0)
    width, population = (high - low) / BUDGETS, count // BUDGETS // 2
    keys = {"population": population, "generations": 2, "num_parents": population // 2,
            "num_mutation": population // 2, "num_crossover": population // 2}  # fmt: skip
    for part in range(BUDGETS):
        bounds = macs_budget(low + part * width, low + (part + 1) * width, 28, 10)
        evaluated |= _run(METHODS["evolution"](space, [bounds], seed=seed, **keys), score)
    return evaluated


WINNERS = {
    "random": _method("random"),
    "evolution": _method("evolution"),
    "evolution, each gene by itself": _method("evolution", mutated_blocks=None),
    "evolution, 10 proposals a network": _method("evolution", proposals=10),
    "two stages": _two_stages,
}
FRONTS = {
    "random": _method("random"),
    f"{BUDGETS} evolutions with a budget each": _several_budgets,
    "nsga2": _method("nsga2", objectives=["macs"]),
}


def _range(space: SearchSpace) -> Budget:
    """The multiply-adds of most networks: from the 10th to the 90th of 100 random ones."""
    free, rng = macs_budget(None, None, 28, 10), random.Random(0)
    sampler = BudgetSampler(space, [free])
    costs = sorted(free.cost(sampler.sample(rng)[0]) for _ in range(100))
    return macs_budget(costs[10], costs[89], 28, 10)


def _along_front(evaluated: dict[Spec, float], budget: Budget, score: Scorer) -> float:
    """The mean over the range of multiply-adds of the loss, on other images, of the front's network there."""
    low, high = float(budget.low or 0), float(budget.high or 0)
    front: list[Spec] = []
    for spec in sorted(evaluated, key=budget.cost):
        if not front or evaluated[spec] < evaluated[front[-1]]:
            front.append(spec)
    losses, ends = score(front), [*(budget.cost(spec) for spec in front[1:]), high]
    starts: Iterable[float] = [low, *ends[:-1]]  # below the cheapest network its own loss counts
    return sum(losses[s] * (b - a) for s, a, b in zip(front, starts, ends, strict=True)) / (high - low)


def _row(name: str, title: str, scores: dict[str, list[float]]) -> report.Row:
    return {
        "method": name, title: f"{statistics.mean(scores[name]):.4f}",
        "each seed": " ".join(f"{loss:.4f}" for loss in scores[name]),
        "to random": paired(scores[name], scores["random"], 4) if name != "random" else "",
    }  # fmt: skip


if __name__ == "__main__":
    main()
