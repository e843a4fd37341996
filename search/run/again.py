"""Run another search on the trained supernets of a search, for example with another budget, in minutes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from glit_models import parse_spec
from glit_models.errors import Argument, SearchError
from glit_models.recipes import RECIPE_FILE, Overrides, parse_overrides
from glit_models.runs.console import say
from glit_models.runs.files import whole_folder, write_json, write_text

from ..executors import Executor
from ..executors.tasks import read_json
from ..recipe import SearchRecipe, load_search_recipe, read_recipe_of
from ..relative_budget import read_references, write_references
from ..spaces.budget_sampler import BudgetSampler
from ..spaces.latency import Prepare
from .kept_supernets import has_supernet, keep_supernet, link_file
from .pipeline import SearchRun

__all__ = ["again_recipe", "search_again"]

_FILE = "again.json"
_CAN_CHANGE = ("budget", "latency", "fitness", "evolution", "evaluation", "retrain", "final", "control")
_NOT_COPIED = shutil.ignore_patterns("*.pt", "best.safetensors", "lock", "tensorboard", ".*.tmp")


def again_recipe(folder: str | Path, overrides: Overrides, keep_winner: bool = False) -> SearchRecipe:
    """The recipe of the search in a folder with changed values that its trained supernets allow.

    Args:
        overrides: values by `section.key`, or strings `section.key=value`.
        keep_winner: as in `search_again`.

    Raises:
        SearchError: if a value cannot change; names the key.
        RecipeError: as in `load_search_recipe`.
    """
    folder = Path(folder)
    base = read_recipe_of(folder)
    values: Mapping[str, Any] = overrides if isinstance(overrides, Mapping) else parse_overrides(overrides)
    for key in values:
        if key.partition(".")[0] not in _CAN_CHANGE:
            raise SearchError(
                f"{key} cannot change on supernets that are trained; what can is {', '.join(_CAN_CHANGE)}"
            )
    recipe = load_search_recipe(str(folder / RECIPE_FILE), values)
    if not recipe.fitness_class.needs_supernet:
        raise SearchError(f"fitness {recipe.fitness} uses no supernet; take one that does, such as inherited_loss")
    trained_within = base.supernet.sampling == "budget"
    if trained_within and (base.budget, base.evolution.uniform_over) != (recipe.budget, recipe.evolution.uniform_over):
        raise SearchError(
            "budget and evolution.uniform_over cannot change on supernets that were trained within the budget "
            "(supernet.sampling=budget)"
        )
    if keep_winner:
        if len(base.method_class.stages) < 2:
            raise SearchError(f"method {base.method} has one stage: there is no winner to keep")
        for key, old, new in (
            ("fitness", base.fitness, recipe.fitness),
            ("retrain.train", base.retrain_recipe(None), recipe.retrain_recipe(None)),
        ):
            if old != new:
                raise SearchError(f"{key} cannot change where the first stage, which it is part of, is kept")
    return recipe


def search_again(
    folder: str | Path,
    out: str | Path,
    overrides: Overrides = (),
    *,
    keep_winner: bool = False,
    device: str | torch.device | None = None,
    max_minutes: float | None = None,
    command: str | None = None,
    runtimes: Mapping[str, Prepare] | None = None,
    executor: Executor | None = None,
) -> SearchRun:
    """Prepare a search like the one in a folder, on its trained supernets, with other values; `run()` runs it.

    `out` becomes a normal search folder, which does not need `folder` any more. The second of two stages reuses the
    supernet of the earlier search if the first stage's winner has the same leading genes; else it trains a new one.

    Args:
        folder: folder of a search that has trained the supernet of its first stage.
        out: folder of the new search; if this function made it from the same folder, the search is resumed.
        overrides: values by `section.key`, or strings `section.key=value`: of budget, latency, fitness, evolution,
            evaluation, retrain, final, control.
        keep_winner: keep the result of the first stage, so that the second searches the same space. Its winner takes
            part if it is within the new budget.
        device, max_minutes, command, runtimes, executor: as in `SearchRun`.

    Raises:
        SearchError, RecipeError: if a value cannot change, a budget cannot be met or a supernet is missing. Nothing is
            then written.
    """
    folder, out = Path(folder), Path(out)
    recipe = again_recipe(folder, overrides, keep_winner)
    settings: dict[str, Any] = {"device": device, "max_minutes": max_minutes, "command": command}
    settings |= {"runtimes": runtimes, "executor": executor}
    origin = {"folder": str(folder.resolve()), "keep_winner": keep_winner}
    if (out / _FILE).is_file():
        if read_json(out / _FILE) != origin:
            raise SearchError(
                f"{out} was begun from another search or with another ", Argument("keep_winner"),
                f", see {out / _FILE}; choose another ", Argument("out", ...),
            )  # fmt: skip
        return SearchRun(recipe, out, **settings)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise SearchError(f"{out} is there already; choose another ", Argument("out", ...))
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise SearchError("`glit search again` must start as one process; resume it with any number")
    with whole_folder(out) as temporary:
        trained = _fill(temporary, folder, recipe, keep_winner)
        write_json(temporary / _FILE, origin)
        run = SearchRun(recipe, temporary, device, runtimes=runtimes)  # raises on invalid values
        if keep_winner:
            winner = parse_spec(temporary / recipe.method_class.stages[0] / "winner.json")
            BudgetSampler(run.space.stage_two(winner), run.context.budgets)
    say(f"glit: {out} has the supernets of {', '.join(trained)} of {folder}")
    return SearchRun(recipe, out, **settings)


def _fill(out: Path, folder: Path, recipe: SearchRecipe, keep_winner: bool) -> list[str]:
    """Write the initial state of the search; returns the stages whose supernets are available."""
    first, *_ = names = recipe.method_class.stages
    trained = [name for name in names if has_supernet(folder / name)]
    if first not in trained:
        raise SearchError(f"{folder} has no trained supernet of {first}; finish its training first")
    if keep_winner and not (folder / first / "retrained.json").is_file():
        raise SearchError(f"{folder} has no winner of {first} yet, which could be kept")
    for name in trained:
        keep_supernet(folder / name, out)
    if keep_winner:
        shutil.copytree(folder / first, out / first, copy_function=link_file, ignore=_NOT_COPIED)
    if (folder / "latency.json").is_file():
        shutil.copyfile(folder / "latency.json", out / "latency.json")
    before = read_recipe_of(folder).budget
    references = read_references(folder).items()
    write_references({n: r for n, r in references if getattr(before, n) == getattr(recipe.budget, n)}, out)
    write_text(out / RECIPE_FILE, recipe.to_yaml())
    return trained
