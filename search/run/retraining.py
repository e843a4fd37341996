"""Train the best networks of a stage stand-alone, and compare them.

The stage defines how a network is trained and how good the candidates are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

from glit_models import Spec
from glit_models.training import Recipe

from ..methods.candidates import Candidate, Candidates
from ..recipe import SearchRecipe

__all__ = ["Retrained", "retrain"]

# Trainings (title, training, folder), which may run in parallel -> their accuracies on the search set in percent.
Train = Callable[[Sequence[tuple[str, Recipe, Path]]], Sequence[float]]


@final
@dataclass(frozen=True)
class Retrained:
    """A network after stand-alone training.

    Attributes:
        spec: the network.
        fitness: fitness in the search; by default its accuracy in percent with inherited weights.
        accuracy: accuracy on the search set, in percent.
        folder: folder of its run.
    """

    spec: Spec
    fitness: float
    accuracy: float
    folder: Path


def retrain(
    recipe: SearchRecipe,
    folder: Path,
    candidates: Candidates,
    initial: Sequence[Spec],
    known: Sequence[Retrained],
    train: Train,
    pick: Callable[[Sequence[Candidate], int], list[Candidate]],
) -> list[Retrained]:
    """Train the best candidates stand-alone; returns them, best first.

    The initial networks of the stage are among them, so that the result is never worse than those.

    Args:
        recipe: recipe of the search.
        folder: folder of the stage; the folder of a training depends only on the scores, so that it is found again.
        candidates: candidates of the stage with a fitness; they include all of `initial`.
        initial: initial networks of the stage.
        known: networks that were already trained in full; they are not trained again.
        train: trains networks.
        pick: see `Search.finalists`; if there are rungs, these are used instead.
    """
    given = [candidate for candidate in candidates if candidate.spec in initial]
    config = recipe.retrain_config()
    if config.rungs:
        best = _pass_rungs(recipe, folder, [c for c in candidates.ranked() if c not in given], train)
    else:
        best = pick(candidates.ranked(), config.top)
    best += [candidate for candidate in given if candidate not in best]
    trained = {network.spec: (network.accuracy, network.folder) for network in known}
    places = {candidate.spec: place for place, candidate in enumerate(best, 1) if candidate.spec not in trained}
    runs = [folder / "retrain" / str(place) for place in places.values()]
    accuracies = train([
        (f"retraining network {place} of {len(best)}", recipe.retrain_recipe(spec), run)
        for (spec, place), run in zip(places.items(), runs, strict=True)
    ])  # fmt: skip
    trained |= zip(places, zip(accuracies, runs, strict=True), strict=True)
    retrained = []
    for candidate in best:
        assert candidate.fitness is not None
        retrained.append(Retrained(candidate.spec, candidate.fitness, *trained[candidate.spec]))
    return sorted(retrained, key=lambda network: -network.accuracy)


def _pass_rungs(recipe: SearchRecipe, folder: Path, best: Sequence[Candidate], train: Train) -> list[Candidate]:
    """The best networks after short trainings, by successive halving.

    Each rung trains from scratch, with a whole schedule of its length. A network in the middle of a long schedule, at a
    high learning rate, says less about its final accuracy.
    """
    config = recipe.retrain_config()
    for rung, (count, epochs) in enumerate(sorted(config.rungs.items(), reverse=True), 1):
        best = best[:count]
        scores = train([
            (f"rung {rung}, epochs {epochs}: training network {place} of {len(best)}",
             recipe.retrain_recipe(candidate.spec, epochs), folder / "retrain" / f"rung{rung}" / str(place))
            for place, candidate in enumerate(best, 1)
        ])  # fmt: skip
        order = sorted(range(len(best)), key=lambda place: -scores[place])
        best = [best[place] for place in order]
    return list(best[: config.top])
