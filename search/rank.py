"""How far a supernet can be trusted: do networks rank under inherited weights as they do when trained by themselves?

It draws networks at random from a finished stage's space, not from what the evolution found, which lies closely
together. It trains them with the search's own recipe for retraining. The supernet is scored on one half of the search
set and the trained networks on the other, because scores on the same images have part of their errors in common.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path

import torch

from glit_models import Spec
from glit_models.errors import SearchError
from glit_models.runs.files import write_json
from glit_models.runs.lock import lock_folder
from glit_models.runs.signals import StopRequest

from .budget_sampler import BudgetSampler
from .executors import Executor
from .latency import Prepare
from .named_spaces import load_space
from .ranking import Ranked, Ranking, compare
from .recipe import read_recipe_of
from .run_context import Interrupted, RunContext
from .stage import Stage
from .tasks import Task

__all__ = ["RANK_FILE", "rank_networks"]

RANK_FILE = "rank.json"  # in the stage's folder
_TRAINED_TWICE = 3  # every third network is


def rank_networks(
    folder: str | Path,
    num_networks: int = 10,
    stage: str | None = None,
    device: str | torch.device | None = None,
    max_minutes: float | None = None,
    runtimes: Mapping[str, Prepare] | None = None,
    stop: StopRequest | None = None,
    executor: Executor | None = None,
) -> Ranking | None:
    """Train random networks of a stage by themselves and compare; the same call goes on where it stopped.

    Every third network is trained twice, which shows how much of the differences is noise. Writes `rank.json` and the
    runs, in a folder `rank`, into the stage's folder.

    Args:
        folder: of a search whose stage has been evolved.
        num_networks: how many to train, from 3; more, later, keep those that were trained.
        stage: 'stage1', 'stage2' or 'joint'; None takes the last.
        device: as the next three, see `SearchRun`.
        max_minutes: after which it saves and stops.
        runtimes: what times networks besides PyTorch.
        executor: does the work; None for this process.
        stop: asks to stop, in place of one with `max_minutes`; tells afterwards why it did.

    Returns:
        What was measured, or None if stopped before.

    Raises:
        SearchError: if the folder holds no search, or no such stage that has been evolved; or on too few networks.
    """
    folder = Path(folder)
    if num_networks < 3:
        raise SearchError(f"networks must be at least 3 to be ranked, got {num_networks}")
    recipe = read_recipe_of(folder)
    name = _pick_stage(folder, stage)
    context = RunContext(recipe, folder, device, max_minutes, runtimes=runtimes, executor=executor)
    context.stop = stop or context.stop
    space = load_space(folder / name / "space.yaml")
    lock = lock_folder(folder) if context.rank == 0 else nullcontext()
    with lock, context.executor or nullcontext(), context.stop:
        try:
            return _rank(Stage(name, space, context), num_networks)
        except Interrupted as why:
            context.say(f"glit: the ranking was stopped by {why}; the same command goes on from here")
            return None


def _pick_stage(folder: Path, stage: str | None) -> str:
    ready = [name for name in ("stage1", "stage2", "joint") if (folder / name / "references.json").is_file()]
    if not ready:
        raise SearchError(f"{folder} has no stage whose networks are evaluated; finish `glit search` first")
    if stage is None:
        return ready[-1]
    if stage not in ready:
        raise SearchError(f"stage must be one of {', '.join(ready)}, got {stage!r}")
    return stage


def _rank(stage: Stage, num_networks: int) -> Ranking:
    context = stage.context
    specs = _draw(stage, num_networks)
    arguments = {"stage": stage.name, "specs": [spec.to_dict() for spec in specs]}
    title = f"{stage.name}: {num_networks} random networks by what is cheap to know of them"
    predictions = context.run([Task("predict", arguments, title, is_collective=True)])[0]
    # (network, training) -> its task; every third network has a second training
    tasks = {}
    for place, spec in enumerate(specs):
        tasks[place, 0] = _training(stage, spec, f"{place + 1}", num_networks)
        if place % _TRAINED_TWICE == 0:
            tasks[place, 1] = _training(stage, spec, f"{place + 1}-again", num_networks, more_seed=1)
    results = dict(zip(tasks, context.run(list(tasks.values())), strict=True))
    scores = {key: {"loss": -result["loss"], "top-1": result["top1"]} for key, result in results.items()}
    networks = []
    for place, (spec, measures) in enumerate(zip(specs, predictions, strict=True)):
        costs = {budget.name: budget.cost(spec) for budget in context.budgets}
        networks.append(Ranked(spec, costs, measures, scores[place, 0], scores.get((place, 1))))
    ranking = compare(stage.name, networks)
    if context.rank == 0:
        write_json(stage.folder / RANK_FILE, ranking.to_dict())
    return ranking


def _draw(stage: Stage, num_networks: int) -> list[Spec]:
    context, recipe = stage.context, stage.context.recipe
    sampler = BudgetSampler(stage.space, context.budgets, recipe.evolution.uniform_over)
    rng = random.Random(f"{recipe.seed} rank")
    specs: dict[Spec, None] = {}
    for _ in range(100 * num_networks):
        if len(specs) == num_networks:
            return list(specs)
        specs[sampler.sample(rng)[0]] = None
    raise SearchError(f"networks must be at most {len(specs)}, all that the budgets allow, got {num_networks}")


def _training(stage: Stage, spec: Spec, name: str, num_networks: int, more_seed: int = 0) -> Task:
    """To train a network by itself, and score it on the half of the search set that predictions do not use."""
    recipe = stage.context.recipe.retrain_recipe(spec)
    if more_seed:  # of the training alone: the images stay where they are
        data = dataclasses.replace(recipe.data, split_seed=recipe.split_seed)
        recipe = dataclasses.replace(recipe, seed=recipe.seed + more_seed, data=data)
    title = f"{stage.name}: training network {name} of {num_networks} by itself"
    return stage.context.training(title, recipe, stage.folder / "rank" / name, score_on="second half")
