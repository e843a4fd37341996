"""The work of each kind of task of a search.

Every function takes the search's context and plain values, and returns plain values. Trainings resume from their
checkpoints and write their results into their folders; `KEPT` names the kinds whose results are stored nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from glit_models import parse_spec
from glit_models.predict import count_correct
from glit_models.recipes import build_recipe
from glit_models.training import Recipe
from glit_models.weights.loading import load_model

from ..executors.tasks import KINDS
from ..supernets.scoring import Score, compare_logits
from .context import RunContext
from .prediction import predict
from .stage import find_stage

__all__ = ["KEPT"]

KEPT = ("score", "score_batches", "screen", "predict")
Spec = dict[str, Any]  # as stored in JSON


def _kind(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        KINDS[name] = function
        return function

    return register


@_kind("supernet")
def _train_supernet(context: RunContext, stage: str) -> None:
    find_stage(context, stage).train_supernet()


@_kind("train")
def _train(
    context: RunContext, recipe: dict[str, Any], folder: str, score_on: str | None, start: str | None = None
) -> dict[str, Any]:
    """Train a network; then score it on the 'test' set, or on the 'second half' of the search set.

    Args:
        start: 'scratch' (random weights), 'inherited' (the trained supernet's), or 'source' (those that the supernet
            started from); default: the recipe's.
    """
    if context.stage is not None:
        context.stage.release()
    out = context.folder / folder
    training: Recipe = build_recipe(Recipe, recipe)
    result = context.train(training, out, start=_initial(context, training, start or context.recipe.retrain.start))
    if score_on == "test":
        return {**result, "test_top1": _test_accuracy(context, out / "model")}
    if score_on == "second half":
        order = context.search_order()
        score = _score_model(context, out / "model", order[len(order) // 2 :])
        return {**result, "loss": score.loss, "top1": score.accuracy}
    return result


def _initial(context: RunContext, training: Recipe, start: str) -> Callable[[], dict[str, torch.Tensor]] | None:
    """Return the function that gives a network its initial weights; None for random ones."""
    spec = training.model.spec
    if start == "scratch" or spec is None:
        return None
    stage = find_stage(context, context.recipe.method_class.stages[0])  # the only one
    supernet = (
        stage.create_supernet if start == "source" else partial(context.load_supernet, stage.space, stage.weights)
    )
    return lambda: supernet().state_of(parse_spec(spec))


@torch.inference_mode()
def _score_model(context: RunContext, folder: Path, positions: Sequence[int]) -> Score:
    """Score the model in a folder on these images of the search set."""
    batches, count = context.feed().scoring(context.splits.validation, positions)
    model = load_model(folder, any_timm=True).model.to(context.device).eval()
    sums = torch.zeros(2, dtype=torch.float64, device=context.device)
    for images, labels in batches:
        sums += compare_logits(model(images.to(context.device)), labels.to(context.device))
    right, loss = sums.tolist()
    return Score(100 * right / count, loss / count)


def _test_accuracy(context: RunContext, folder: Path) -> float | None:
    """Top-1 accuracy in percent of the model in a folder on the test set, over all processes; None without one."""
    if context.splits.test is None:
        return None
    batches, count = context.feed(context.rank, context.world_size).scoring(context.splits.test)
    model = load_model(folder, any_timm=True).model.to(context.device)
    return 100 * sum(context.gather([count_correct(model, batches, context.device)])) / count


@_kind("test")
def _test(context: RunContext, folder: str) -> float | None:
    return _test_accuracy(context, context.folder / folder)


@_kind("score")
def _score(
    context: RunContext, stage: str, specs: Sequence[Spec], batches: int | None, retain: Sequence[Spec], weights: str
) -> list[float]:
    """The fitness of networks; with `batches`, their means of `Fitness.screen`."""
    fitness, networks = find_stage(context, stage).fitness(), [parse_spec(spec) for spec in specs]
    fitness.retain([parse_spec(spec) for spec in retain])
    scores = fitness.evaluate(networks, batches)
    return [scores[network] for network in networks]


@_kind("score_batches")
def _score_batches(
    context: RunContext, stage: str, specs: Sequence[Spec], batches: Sequence[int], retain: Sequence[Spec], weights: str
) -> list[list[float]]:
    """The contribution of a range of batches to the fitness of networks, excluding the last number."""
    fitness = find_stage(context, stage).fitness()
    fitness.retain([parse_spec(spec) for spec in retain])
    sums = fitness.score_batches([parse_spec(spec) for spec in specs], range(*batches))
    return [list(map(float, row)) for row in sums]


@_kind("screen")
def _screen(
    context: RunContext, stage: str, specs: Sequence[Spec], batches: int, retain: Sequence[Spec], weights: str
) -> list[list[float]]:
    values = find_stage(context, stage).fitness().screen([parse_spec(spec) for spec in specs], batches)
    return [list(map(float, row)) for row in values]


@_kind("predict")
def _predict(context: RunContext, stage: str, specs: Sequence[Spec]) -> list[dict[str, float]]:
    """For `glit search rank`: compute cheap measures of networks on the first half of the search set."""
    order = context.search_order()
    return predict(find_stage(context, stage), [parse_spec(spec) for spec in specs], order[: len(order) // 2])
