"""Measure a supernet's reliability: do networks rank with inherited weights as they do after stand-alone training?

Networks are drawn at random from a finished stage's space, because those that the evolution found are too similar. They
are trained with the search's recipe for retraining. The supernet is scored on one half of the search set and the
trained networks on the other, because scores on the same images have correlated errors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path

import torch

from glit_models import Spec
from glit_models.errors import SearchError
from glit_models.runs.files import write_json
from glit_models.runs.lock import lock_folder
from glit_models.runs.signals import StopRequest

from ..evidence.ranking import Ranked, Ranking, compare
from ..executors import Executor
from ..executors.tasks import Task
from ..recipe import read_recipe_of
from ..spaces.latency import Prepare
from ..spaces.named import load_space
from .context import Interrupted, RunContext
from .stage import Stage

__all__ = ["RANK_FILE", "rank_networks"]

RANK_FILE = "rank.json"  # in the stage's folder
_TRAINED_TWICE = 3  # every third network


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
    """Train random networks of a stage stand-alone and compare; call it again with the same arguments to resume.

    Every third network is trained twice to measure the noise. Writes `rank.json`, and the runs in a folder `rank`, into
    the stage's folder.

    Args:
        folder: folder of a search with a stage that has been evolved.
        num_networks: number of networks to train, at least 3; a later call with more keeps the trained ones.
        stage: 'stage1', 'stage2' or 'joint'; None for the last.
        device: this and the next three as in `SearchRun`.
        max_minutes: time limit, after which it saves and stops.
        runtimes: runtimes besides PyTorch for measuring latency.
        executor: runs the tasks; None for this process.
        stop: stop request to use instead of `max_minutes`; gives the reason afterwards.

    Returns:
        The measurements, or None if stopped early.

    Raises:
        SearchError: if the folder is not a search folder or has no such evolved stage, or on too few networks.
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
            context.say(f"glit: the ranking was stopped by {why}; run the same command to resume")
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
    specs = stage.context.draw_different(stage.space, num_networks, "rank")
    if len(specs) < num_networks:
        raise SearchError(f"networks must be at most {len(specs)}, all that the budgets allow, got {num_networks}")
    return specs


def _training(stage: Stage, spec: Spec, name: str, num_networks: int, more_seed: int = 0) -> Task:
    """A task that trains a stand-alone network and scores it on the half of the search set not used for predictions."""
    recipe = stage.context.recipe.retrain_recipe(spec)
    if more_seed:  # only for the training: the split of the images stays the same
        data = dataclasses.replace(recipe.data, split_seed=recipe.split_seed)
        recipe = dataclasses.replace(recipe, seed=recipe.seed + more_seed, data=data)
    title = f"{stage.name}: training network {name} of {num_networks}"
    return stage.context.training(title, recipe, stage.folder / "rank" / name, score_on="second half")
