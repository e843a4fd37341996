"""A whole search in one folder: its stages, the winner, its control, and the one look at the test set.

The same command goes on from any moment to the same result. What a stage does is `stage`'s.
"""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, final

import torch

from glit_models.errors import SearchError
from glit_models.recipes import RECIPE_FILE, read_stored_recipe, refuse_other_recipe
from glit_models.runs.files import whole_folder, write_json, write_text
from glit_models.runs.lock import lock_folder
from glit_models.training import Trainer

from .budget_sampler import BudgetSampler
from .control import Control
from .latency import Prepare
from .recipe import SearchRecipe
from .retraining import Retrained
from .run_context import Interrupted, RunContext, read_json
from .stage import Stage

__all__ = ["SearchRun", "read_recipe_of"]


@final
class SearchRun:
    """One search, in this process or shared with others that `accelerate launch` started.

    Args:
        recipe: what to do.
        out: folder of the search; one that holds a search of the same recipe is continued.
        device: 'cpu', 'cuda', ...; None takes the GPU if there is one.
        max_minutes: save and leave after so long.
        command: the command line of this search, for the model's record.
        runtimes: what times networks besides PyTorch, by its name in `latency.runtime`: {"onnx":
            `glit_models.export.onnx_runner`} if the recipe asks for it.

    Raises:
        RecipeError: if `out` holds another search (names the keys that differ), or the data do not fit the recipe.
        SearchError: if a budget cannot be met.
        DataError: if the data cannot be had.
    """

    def __init__(
        self,
        recipe: SearchRecipe,
        out: str | Path,
        device: str | torch.device | None = None,
        max_minutes: float | None = None,
        command: str | None = None,
        runtimes: Mapping[str, Prepare] | None = None,
    ) -> None:
        self.recipe, self.out = recipe, Path(out)
        refuse_other_recipe(recipe, self.out)
        self.context = RunContext(recipe, self.out, device, max_minutes, command, runtimes)
        space = recipe.load_space()
        self.space = space
        self._names = recipe.method_class.stages
        first = space.stage_one(**recipe.fixed) if len(self._names) > 1 else space
        self.stages = [Stage(self._names[0], first, self.context)]
        if self.stages[0].fitness_class.needs_supernet:
            self.context.check_memory(space)

    def run(self) -> dict[str, Any] | None:
        """Search to the end and return the result, or None if stopped before it (by signal or `max_minutes`).

        Raises:
            RunError: if another process is at work in the folder.
            WriteError: if the folder cannot be written to.
        """
        path = self.out / "result.json"
        if path.is_file():
            self.context.say(f"glit: {self.out} is finished; its result is in {path}")
            result: dict[str, Any] = read_json(path)
            return result
        with lock_folder(self.out) if self.context.rank == 0 else nullcontext(), self.context.stop:
            if self.context.rank == 0:
                write_text(self.out / RECIPE_FILE, self.recipe.to_yaml())
            self.context.wait()
            try:
                return self._run()
            except Interrupted as why:
                self.context.say(f"glit: the search was stopped by {why}; the same command goes on from here")
                return None

    def _run(self) -> dict[str, Any]:
        retrained = self.stages[0].run()
        if len(self._names) > 1:
            winner = retrained[0].spec
            second = self.space.stage_two(winner)
            self.stages.append(Stage(self._names[1], second, self.context, [winner], retrained))
            retrained = self.stages[1].run()
        return self._finish(retrained[0])

    def _train_final(self, winner: Retrained) -> tuple[Path, float]:
        """The run whose weights are the result, and the seconds that it took beyond the stages."""
        recipe = self.recipe.final_recipe(winner.spec)
        if recipe is None:
            return winner.folder, 0.0
        context, folder = self.context, self.out / "final"
        context.say("training the winner on training and search images together")
        trainer = Trainer(
            recipe, folder, context.device, context.stop.minutes_left, context.command, score_test=False
        )  # fmt: skip
        return folder, 60 * float(context.train(trainer)["minutes"])

    def _train_control(self, winner: Retrained) -> tuple[Control | None, float]:
        """The winner beside random networks, None if the recipe asks for none, and the seconds of their trainings."""
        context, recipe = self.context, self.recipe
        rng = random.Random(f"{recipe.seed} control")
        sampler = BudgetSampler(self.space, context.budgets, recipe.evolution.uniform_over)
        networks, seconds = [], 0.0
        for place in range(1, recipe.control.networks + 1):
            spec, _ = sampler.sample(rng)
            context.say(f"training random network {place} of {recipe.control.networks}, to compare the winner with")
            folder = self.out / "control" / str(place)
            result = context.train(Trainer(
                recipe.retrain_recipe(spec), folder, context.device, context.stop.minutes_left, context.command,
                score_test=False,
            ))  # fmt: skip
            seconds += 60 * float(result["minutes"])
            test = context.test_accuracy(folder / "model")
            networks.append((spec, float(result["validation_top1"]) if test is None else test))
        if not networks:
            return None, 0.0
        test = context.test_accuracy(winner.folder / "model")
        splits = context.splits
        split, images = ("search", splits.validation) if splits.test is None else ("test", splits.test)
        control = Control(split, len(images), winner.accuracy if test is None else test, tuple(networks))
        if context.rank == 0:
            write_json(self.out / "control.json", control.to_dict())
        return control, seconds

    def _finish(self, winner: Retrained) -> dict[str, Any]:
        """Leave the winner and its weights, and score them on the test set, after the last decision.

        The test set is looked at twice: for the networks of the control, and for the result.
        """
        context = self.context
        run, final_seconds = self._train_final(winner)
        model = self.out / "model"
        if context.rank == 0 and not model.exists():
            with whole_folder(model) as folder:
                shutil.copytree(run / "model", folder, dirs_exist_ok=True)
        context.wait()
        control, control_seconds = self._train_control(winner)
        began = time.monotonic()
        test = context.test_accuracy(model)
        times: dict[str, Any] = {stage.name: dict(stage.seconds()) for stage in self.stages}
        times["test"] = round(time.monotonic() - began, 1)
        if final_seconds:
            times["final"] = final_seconds
        if control_seconds:
            times["control"] = control_seconds
        seconds = (
            times["test"]
            + final_seconds
            + control_seconds
            + sum(sum(times[stage.name].values()) for stage in self.stages)
        )
        costs = {budget.name: budget.cost(winner.spec) for budget in context.budgets}
        result = {
            "method": self.recipe.method,
            "sharing": self.recipe.supernet.sharing,
            "seed": self.recipe.seed,
            **costs,
            "search_accuracy": winner.accuracy,
            "trained_on_search_set": run != winner.folder,
            "test_accuracy": test,
            "search_images": len(context.splits.validation),
            "test_images": None if context.splits.test is None else len(context.splits.test),
            "random_networks": 0 if control is None else len(control.networks),
            "random_networks_beaten": 0 if control is None else control.num_beaten,
            "num_evaluated": sum(_count_lines(stage.folder / "candidates.jsonl") for stage in self.stages),
            "minutes": round(seconds / 60, 1),
        }
        if context.rank == 0:
            write_json(self.out / "winner.json", winner.spec.to_dict())
            write_json(self.out / "times.json", times)
            write_json(self.out / "result.json", result)
        context.wait()
        return result


def _count_lines(path: Path) -> int:
    return len(path.read_text().splitlines())


def read_recipe_of(folder: Path) -> SearchRecipe:
    """The recipe of the search in a folder. Raises SearchError if there is none, RecipeError if it is damaged."""
    recipe = read_stored_recipe(SearchRecipe, folder)
    if recipe is None:
        raise SearchError(f"{folder} holds no search: there is no {RECIPE_FILE}")
    return recipe
