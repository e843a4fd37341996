"""Run a whole search in one folder: its stages, the winner, its control, and their scores on the test set.

The same command resumes from any moment, with the same result. `stage` runs a stage.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, final

import torch

from glit_models import Spec, parse_spec
from glit_models.errors import SearchError
from glit_models.recipes import record_recipe, refuse_other_data, refuse_other_recipe
from glit_models.runs.files import whole_folder, write_json
from glit_models.runs.lock import lock_folder
from glit_models.training.feed import data_fingerprint

from ..evidence.control import Control
from ..executors import Executor
from ..executors.tasks import Task, read_json
from ..recipe import SearchRecipe
from ..relative_budget import write_references
from ..spaces.latency import Prepare
from ..supernets.starting import start_network
from .context import Interrupted, RunContext
from .retraining import Retrained
from .stage import Stage

__all__ = ["SearchRun"]

_START = "start.json"


@final
class SearchRun:
    """One search, run by this process, by others started by `accelerate launch`, or by an executor's workers.

    Args:
        recipe: recipe of the search.
        out: folder of the search; a search of the same recipe in it is resumed.
        device: 'cpu', 'cuda', ...; None uses the GPU if there is one.
        max_minutes: time limit, after which the search saves and exits.
        command: the command line of this search, recorded with the model.
        runtimes: runtimes besides PyTorch for measuring latency, by the name in `latency.runtime`: {"onnx":
            `glit_models.export.onnx_runner`} if the recipe uses it.
        executor: executor whose workers run the tasks, see `open_executor`.

    Raises:
        RecipeError: if `out` contains another search (names the keys that differ), or the data does not fit the recipe.
        SearchError: if a budget cannot be met.
        DataError: if the data is not available.
    """

    def __init__(
        self,
        recipe: SearchRecipe,
        out: str | Path,
        device: str | torch.device | None = None,
        max_minutes: float | None = None,
        command: str | None = None,
        runtimes: Mapping[str, Prepare] | None = None,
        executor: Executor | None = None,
    ) -> None:
        self.recipe, self.out = recipe, Path(out)
        refuse_other_recipe(recipe, self.out, lambda: data_fingerprint(recipe.supernet_recipe()))
        self.context = RunContext(recipe, self.out, device, max_minutes, command, runtimes, executor)
        self.fingerprint = self.context.splits.fingerprint()
        refuse_other_data(self.out, self.fingerprint)
        space = self.context.searched_space()
        self.space = space
        self._names = recipe.method_class.stages
        first = space.stage_one(**recipe.fixed) if len(self._names) > 1 else space
        given = [spec for spec in (recipe.given_spec,) if spec and self.context.admits(spec)]
        self.stages = [Stage(self._names[0], first, self.context, given)]
        if not self.stages[0].is_finished:
            _ = self.stages[0].search  # raises on budgets that cannot be met
        if self.stages[0].fitness_class.needs_supernet:
            self.context.check_memory(space)
            self.stages[0].check_start()

    def run(self, supernet_only: bool = False) -> dict[str, Any] | None:
        """Search to the end and return the result, or None if stopped early (by a signal or `max_minutes`).

        Args:
            supernet_only: stop after training the first stage's supernet, and return the path of its weights. The
                search can be resumed later, and others can start from it (`supernet.from`).

        Raises:
            SearchError: if there is no supernet to train.
            RunError: if another process is using the folder.
            WriteError: if the folder cannot be written.
        """
        context, path = self.context, self.out / "result.json"
        if supernet_only and not self.stages[0].fitness_class.needs_supernet:
            raise SearchError(f"fitness {self.recipe.fitness} has no supernet to train")
        result: dict[str, Any] | None = context.decide(lambda: read_json(path) if path.is_file() else None)
        if result is not None:
            context.say(f"glit: {self.out} is finished; its result is in {path}")
            return result
        lock = lock_folder(self.out) if context.rank == 0 else nullcontext()
        with lock, context.executor or nullcontext(), context.stop:
            for name, reference in context.references.items():
                context.say(f"glit: {name} {reference}")
            if context.rank == 0:
                write_references(context.references, self.out)
                record_recipe(self.recipe, self.out, self.fingerprint)
                self._record_start()
            context.wait()
            try:
                return self._train_supernet() if supernet_only else self._run()
            except Interrupted as why:
                context.say(f"glit: the search was stopped by {why}; run the same command to resume")
                return None

    def _record_start(self) -> None:
        """Write which network the supernet starts from, as its weights may be moved later."""
        source, path = self.recipe.supernet.from_, self.out / _START
        if source is not None and self.recipe.control.networks and not path.is_file():
            spec = start_network(source)
            write_json(path, {"spec": None if spec is None else spec.to_dict()})

    def _train_supernet(self) -> dict[str, Any]:
        stage = self.stages[0]
        stage.prepare()
        return {"supernet": str(stage.weights)}

    def _run(self) -> dict[str, Any]:
        retrained = self.stages[0].run()
        if len(self._names) > 1:
            winner = retrained[0].spec
            second = self.space.stage_two(winner)
            # A first stage kept from a search with another budget may have a winner outside this one.
            initial = [winner] if self.context.admits(winner) else []
            self.stages[1:] = [Stage(self._names[1], second, self.context, initial, retrained)]
            retrained = self.stages[1].run()
        return self._finish(retrained[0])

    def _final_task(self, winner: Retrained) -> Task | None:
        """The training that gives the final weights; None if the winner's weights are final."""
        recipe = self.recipe.final_recipe(winner.spec)
        title = "training the winner on training and search images together"
        return None if recipe is None else self.context.training(title, recipe, self.out / "final")

    def _control_tasks(self, winner: Spec) -> list[tuple[Spec, Task]]:
        """Different random networks for comparison with the winner, and their trainings."""
        context, recipe, count = self.context, self.recipe, self.recipe.control.networks
        specs = context.draw_different(self.space, count, "control", besides=[winner]) if count else []
        tasks = []
        for place, spec in enumerate(specs, 1):
            title = f"training random network {place} of {len(specs)}, to compare the winner with"
            folder = self.out / "control" / str(place)
            tasks.append((spec, context.training(title, recipe.retrain_recipe(spec), folder, score_on="test")))
        return tasks

    def _start_tasks(self, winner: Spec) -> list[tuple[str, Spec, Task]]:
        """Networks that show what the start from weights is worth: what each is, its spec and its training."""
        context, recipe = self.context, self.recipe
        starts = []
        if recipe.control.networks and recipe.retrain.start == "inherited":
            starts.append(("the winner, from random weights", winner, "scratch"))
        if recipe.control.networks and recipe.supernet.from_ and (given := read_json(self.out / _START)["spec"]):
            starts.append((f"{recipe.supernet.from_}, fine-tuned", parse_spec(given), "source"))
        return [
            (name, spec, context.training(
                f"training {name}, to compare the winner with", recipe.retrain_recipe(spec),
                self.out / "control" / start, score_on="test", start=start,
            ))
            for name, spec, start in starts
        ]  # fmt: skip

    def _compare(
        self,
        winner: Retrained,
        networks: Sequence[tuple[Spec, dict[str, Any]]],
        starts: Sequence[tuple[str, Spec, dict[str, Any]]],
    ) -> Control | None:
        """Compare the winner with others, given the results of their trainings; None if there are none."""
        context, splits = self.context, self.context.splits
        if not networks:
            return None
        key, split, images = "test_top1", "test", splits.test
        accuracy = winner.accuracy
        if images is None:
            key, split, images = "validation_top1", "search", splits.validation
        else:
            accuracy = self._test(winner.folder)
        scores = tuple((spec, float(result[key])) for spec, result in networks)
        others = tuple((name, spec, float(result[key])) for name, spec, result in starts)
        control = Control(split, len(images), accuracy, scores, others)
        if context.rank == 0:
            write_json(self.out / "control.json", control.to_dict())
        return control

    def _test(self, run: Path) -> Any:
        folder = str((run / "model").relative_to(self.out))
        return self.context.run([Task("test", {"folder": folder}, f"testing {folder}", is_collective=True)])[0]

    def _finish(self, winner: Retrained) -> dict[str, Any]:
        """Write the winner and its weights, and score them on the test set, after all choices are made.

        The networks of the control and the winner are scored on the test set, and so is the result.
        """
        context, model = self.context, self.out / "model"
        final, controls = self._final_task(winner), self._control_tasks(winner.spec)
        starts = self._start_tasks(winner.spec)
        tasks = [*([final] if final else []), *(task for _, task in controls), *(task for *_, task in starts)]
        results = context.run(tasks)
        run = self.out / "final" if final else winner.folder
        if context.rank == 0 and not model.exists():
            with whole_folder(model) as folder:
                shutil.copytree(run / "model", folder, dirs_exist_ok=True)
        context.wait()
        trained = results[len(results) - len(controls) - len(starts) :]
        control = self._compare(
            winner,
            [(spec, result) for (spec, _), result in zip(controls, trained[: len(controls)], strict=True)],
            [(name, spec, result) for (name, spec, _), result in zip(starts, trained[len(controls) :], strict=True)],
        )
        began = time.monotonic()
        test = self._test(self.out)
        times: dict[str, Any] = {stage.name: dict(stage.seconds()) for stage in self.stages}
        times["test"] = round(time.monotonic() - began, 1)
        seconds = times["test"] + sum(sum(times[stage.name].values()) for stage in self.stages)
        for name, trainings in (("final", results[: len(results) - len(trained)]), ("control", trained)):
            if trainings:
                times[name] = 60 * sum(float(result["minutes"]) for result in trainings)
                seconds += times[name]
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
