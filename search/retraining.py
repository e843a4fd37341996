"""The end of a stage: the best networks are trained by themselves, and compared.

How a network is trained, and how good the candidates are, is the stage's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

from glit_models import Spec
from glit_models.training import Recipe

from .candidates import Candidate, Candidates
from .recipe import SearchRecipe

__all__ = ["Retrained", "retrain"]

Train = Callable[[Recipe, Path], float]  # a training and its folder -> accuracy on the search set in percent
Say = Callable[[str], None]


@final
@dataclass(frozen=True)
class Retrained:
    """A network that was trained by itself.

    Attributes:
        spec: the network.
        fitness: in the search; by default its accuracy in percent with weights that it inherits from the supernet.
        accuracy: on the search set, in percent.
        folder: of its run.
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
    say: Say,
) -> list[Retrained]:
    """Train the best candidates by themselves; returns them with the best one first.

    The networks that the stage began with are among them, so that it never returns a worse one than it was given.

    Args:
        recipe: of the search.
        folder: of the stage; a training's folder follows from the scores alone, so that it is found again.
        candidates: of the stage, those with a fitness; among them all of `initial`.
        initial: networks that the stage began with.
        known: what was trained in full before; it is not trained again.
    """
    given = [candidate for candidate in candidates if candidate.spec in initial]
    if recipe.retrain.rungs:
        best = _pass_rungs(recipe, folder, [c for c in candidates.ranked() if c not in given], train, say)
    else:
        best = candidates.ranked()[: recipe.retrain.top]
    best += [candidate for candidate in given if candidate not in best]
    retrained = []
    for place, candidate in enumerate(best, 1):
        spec, fitness = candidate.spec, candidate.fitness
        assert fitness is not None
        other = next((other for other in known if other.spec == spec), None)
        if other is not None:
            retrained.append(Retrained(spec, fitness, other.accuracy, other.folder))
            continue
        say(f"retraining network {place} of {len(best)}")
        run = folder / "retrain" / str(place)
        retrained.append(Retrained(spec, fitness, train(recipe.retrain_recipe(spec), run), run))
    return sorted(retrained, key=lambda network: -network.accuracy)


def _pass_rungs(
    recipe: SearchRecipe, folder: Path, best: Sequence[Candidate], train: Train, say: Say
) -> list[Candidate]:
    """The networks that are the best ones after short trainings: successive halving.

    Each rung trains from scratch with a whole schedule of its length. A network in the middle of a long schedule, at a
    high learning rate, shows less of how it will end.
    """
    for rung, (count, epochs) in enumerate(sorted(recipe.retrain.rungs.items(), reverse=True), 1):
        best, scores = best[:count], {}
        for place, candidate in enumerate(best, 1):
            say(f"rung {rung}, epochs {epochs}: training network {place} of {len(best)}")
            run = folder / "retrain" / f"rung{rung}" / str(place)
            scores[candidate.spec] = train(recipe.retrain_recipe(candidate.spec, epochs), run)
        best = sorted(best, key=lambda candidate: -scores[candidate.spec])
    return list(best[: recipe.retrain.top])
