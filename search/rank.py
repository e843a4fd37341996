"""How far a supernet can be trusted: do networks rank under inherited weights as they do when trained by themselves?

It draws networks at random from a finished stage's space, not from what the evolution found, which lies closely
together. It trains them with the search's own recipe for retraining.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch

from glit_models import Spec
from glit_models.errors import SearchError
from glit_models.runs.files import write_json
from glit_models.runs.lock import lock_folder
from glit_models.training import Trainer

from .budget_sampler import BudgetSampler
from .correlation import Correlation, kendall, spearman
from .latency import Prepare
from .named_spaces import load_space
from .pipeline import read_recipe_of
from .run_context import Interrupted, RunContext
from .stage import Stage

__all__ = ["Ranking", "rank_networks"]

_TRUSTED = 0.5


@final
@dataclass(frozen=True)
class Ranking:
    """What was measured on networks of a stage.

    Attributes:
        stage: its name.
        specs: the networks. costs: what each budget counts of them, by its name.
        inherited, standalone: their accuracies on the search set, in percent, under the supernet's weights and trained
            by themselves.
        kendall, spearman: between the two.
        kendall_macs: of "more multiply-adds are better", the baseline to beat.
    """

    stage: str
    specs: tuple[Spec, ...]
    costs: tuple[dict[str, float], ...]
    inherited: tuple[float, ...]
    standalone: tuple[float, ...]
    kendall: Correlation
    spearman: Correlation
    kendall_macs: Correlation

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as they stand in `rank.json`."""
        columns = zip(self.specs, self.costs, self.inherited, self.standalone, strict=True)
        networks = [{"spec": s.to_dict(), **c, "inherited": i, "standalone": a} for s, c, i, a in columns]
        names = ("kendall", "spearman", "kendall_macs")
        return {
            "stage": self.stage,
            "networks": networks,
            **{name: dataclasses.asdict(getattr(self, name)) for name in names},
        }

    def __str__(self) -> str:
        lines = [f"{len(self.specs)} networks of {self.stage}, trained by themselves:"]
        for name, correlation in (
            ("Kendall's tau", self.kendall),
            ("Spearman's rho", self.spearman),
            ("tau of 'more MACs are better'", self.kendall_macs),
        ):
            lines.append(f"    {name}: {correlation.value:.2f} (95 %: {correlation.low:.2f} to {correlation.high:.2f})")
        trusted = self.kendall.value >= _TRUSTED
        lines.append(
            f"A supernet is worth trusting from a tau of about {_TRUSTED}: this one is{'' if trusted else ' not'}."
        )
        return "\n".join(lines)


def rank_networks(
    folder: str | Path,
    num_networks: int = 10,
    stage: str | None = None,
    device: str | torch.device | None = None,
    max_minutes: float | None = None,
    runtimes: Mapping[str, Prepare] | None = None,
) -> Ranking | None:
    """Train random networks of a stage by themselves and compare; the same call goes on where it stopped.

    Writes `rank.json` into the folder, and the runs into the stage's folder `rank`.

    Args:
        folder: of a search whose stage has been evolved.
        num_networks: how many to train, from 3; more, later, keep those that were trained.
        stage: 'stage1', 'stage2' or 'joint'; None takes the last.
        device, max_minutes, runtimes: as of `SearchRun`.

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
    context, recipe = stage.context, stage.context.recipe
    sampler = BudgetSampler(stage.space, context.budgets, recipe.evolution.uniform_over)
    rng = random.Random(f"{recipe.seed} rank")
    specs: dict[Spec, None] = {}
    for _ in range(100 * num_networks):
        if len(specs) == num_networks:
            break
        specs[sampler.sample(rng)[0]] = None
    else:
        raise SearchError(f"networks must be at most {len(specs)}, all that the budgets allow, got {num_networks}")
    context.say(f"{stage.name}: {num_networks} random networks under inherited weights")
    scores = stage.fitness().evaluate(list(specs))
    standalone = []
    for place, spec in enumerate(specs, 1):
        context.say(f"{stage.name}: training network {place} of {num_networks} by itself")
        standalone.append(_train(stage, stage.folder / "rank" / str(place), spec))
    ranking = _compare(stage, list(specs), [scores[spec].accuracy for spec in specs], standalone)
    if context.rank == 0:
        write_json(context.folder / "rank.json", ranking.to_dict())
    return ranking


def _train(stage: Stage, out: Path, spec: Spec) -> float:
    context = stage.context
    trainer = Trainer(
        context.recipe.retrain_recipe(spec), out, context.device, context.stop.minutes_left, score_test=False
    )
    return float(context.train(trainer)["validation_top1"])


def _compare(stage: Stage, specs: Sequence[Spec], inherited: Sequence[float], standalone: Sequence[float]) -> Ranking:
    costs = [{budget.name: budget.cost(spec) for budget in stage.context.budgets} for spec in specs]
    return Ranking(
        stage.name, tuple(specs), tuple(costs), tuple(inherited), tuple(standalone), kendall(inherited, standalone),
        spearman(inherited, standalone), kendall([cost["macs"] for cost in costs], standalone),
    )  # fmt: skip
