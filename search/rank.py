"""How far a supernet can be trusted: do networks rank under inherited weights as they do when trained by themselves?

It draws networks at random from a finished stage's space, not from what the evolution found, which lies closely
together. It trains them with the search's own recipe for retraining. The supernet is scored on one half of the search
set and the trained networks on the other, because scores on the same images have part of their errors in common.
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch

from glit_models import Spec, parse_spec
from glit_models.errors import SearchError
from glit_models.runs.files import write_json
from glit_models.runs.lock import lock_folder
from glit_models.runs.signals import StopRequest
from glit_models.training import Trainer

from .budget_sampler import BudgetSampler
from .fitness import FITNESSES, SynFlow
from .latency import Prepare
from .named_spaces import load_space
from .pipeline import read_recipe_of
from .ranking import Ranked, Ranking, compare
from .run_context import Interrupted, RunContext
from .stage import Stage
from .surrogate import Surrogate

__all__ = ["RANK_FILE", "rank_networks"]

RANK_FILE = "rank.json"  # in the stage's folder
_TRAINED_TWICE = 3  # every third network is
_MOST_FOR_SURROGATE = 200  # networks that the search evaluated last, scored again on other images than the trained ones


def rank_networks(
    folder: str | Path,
    num_networks: int = 10,
    stage: str | None = None,
    device: str | torch.device | None = None,
    max_minutes: float | None = None,
    runtimes: Mapping[str, Prepare] | None = None,
    stop: StopRequest | None = None,
) -> Ranking | None:
    """Train random networks of a stage by themselves and compare; the same call goes on where it stopped.

    Every third network is trained twice, which shows how much of the differences is noise. Writes `rank.json` and the
    runs, in a folder `rank`, into the stage's folder.

    Args:
        folder: of a search whose stage has been evolved.
        num_networks: how many to train, from 3; more, later, keep those that were trained.
        stage: 'stage1', 'stage2' or 'joint'; None takes the last.
        device, max_minutes, runtimes: as of `SearchRun`.
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
    context = RunContext(recipe, folder, device, max_minutes, runtimes=runtimes)
    context.stop = stop or context.stop
    space = load_space(folder / name / "space.yaml")
    with lock_folder(folder) if context.rank == 0 else nullcontext(), context.stop:
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
    context.say(f"{stage.name}: {num_networks} random networks by what is cheap to know of them")
    order = context.search_order()
    half = len(order) // 2
    predictions = _predict(stage, specs, order[:half])
    networks = []
    for place, (spec, measures) in enumerate(zip(specs, predictions, strict=True), 1):
        context.say(f"{stage.name}: training network {place} of {num_networks} by itself")
        trained = _train(stage, spec, str(place), order[half:])
        again = None if (place - 1) % _TRAINED_TWICE else _train(stage, spec, f"{place}-again", order[half:], 1)
        costs = {budget.name: budget.cost(spec) for budget in context.budgets}
        networks.append(Ranked(spec, costs, measures, trained, again))
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


def _predict(stage: Stage, specs: Sequence[Spec], positions: Sequence[int]) -> list[dict[str, float]]:
    """What is cheap to know of each network, by the measure's name; of accuracy and loss on these images."""
    measures: dict[str, Sequence[float]] = {}
    known = {}
    for line in (stage.folder / "candidates.jsonl").read_text().splitlines():
        fitness = json.loads(line).get("fitness", json.loads(line).get("accuracy"))  # as 0.1 called it
        if fitness is not None:
            known[parse_spec(json.loads(line)["spec"])] = float(fitness)
    others = [spec for spec in known if spec not in set(specs)][-_MOST_FOR_SURROGATE:]
    setting = stage.setting()
    if stage.fitness_class.needs_supernet:
        evaluator = stage.context.evaluator(stage.space, stage.weights, lambda done, total: None, positions)
        setting = dataclasses.replace(setting, open_evaluator=lambda: evaluator)
        scores = evaluator.evaluate([*specs, *others])
        measures["inherited loss"] = [-scores[spec].loss for spec in specs]
        measures["inherited top-1"] = [scores[spec].accuracy for spec in specs]
        known = {spec: -scores[spec].loss for spec in others}  # what the search knew was of all images
    if stage.fitness_class not in FITNESSES.values():
        values = stage.fitness_class(setting).evaluate(specs)
        measures[stage.fitness_class.label] = [values[spec] for spec in specs]
    if len(others) > 1:
        measures["surrogate"] = Surrogate(stage.space, others, [known[spec] for spec in others]).predict(specs)
    flows = SynFlow(setting).evaluate(specs)
    measures["SynFlow"] = [flows[spec] for spec in specs]
    for budget in stage.context.budgets:
        if budget.additive:
            measures[{"macs": "MACs", "params": "parameters"}[budget.name]] = [budget.cost(spec) for spec in specs]
    return [{name: float(values[index]) for name, values in measures.items()} for index in range(len(specs))]


def _train(stage: Stage, spec: Spec, name: str, positions: Sequence[int], more_seed: int = 0) -> dict[str, float]:
    """How good a network is after training, on these images of the search set."""
    context = stage.context
    recipe = context.recipe.retrain_recipe(spec)
    if more_seed:  # of the training alone: the images stay where they are
        data = dataclasses.replace(recipe.data, split_seed=recipe.split_seed)
        recipe = dataclasses.replace(recipe, seed=recipe.seed + more_seed, data=data)
    out = stage.folder / "rank" / name
    context.train(Trainer(recipe, out, context.device, context.stop.minutes_left, score_test=False))
    score = context.score_model(out / "model", positions)
    return {"loss": -score.loss, "top-1": score.accuracy}
