"""The context shared by all parts of a search: recipe, data, execution of tasks, and stop requests."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, final

import numpy as np
import torch
from rich.progress import BarColumn, Progress, TimeRemainingColumn
from safetensors import SafetensorError
from safetensors.torch import load_file

from glit_models import Spec
from glit_models.data import Splits
from glit_models.data.sources import Stream
from glit_models.errors import GlitError, SearchError, first_line
from glit_models.recipes import refuse_other_recipe
from glit_models.runs.console import progress_bar, say
from glit_models.runs.processes import make_accelerator
from glit_models.runs.signals import StopRequest
from glit_models.training import Recipe, Trainee, Trainer, setup
from glit_models.training.feed import Feed, data_fingerprint, open_data

from ..executors import Executor
from ..executors.dispatch import dispatch
from ..executors.tasks import KINDS, Task, read_json
from ..recipe import SearchRecipe
from ..recipe_sections import Bounds
from ..relative_budget import resolve_budgets
from ..spaces.budget import Budget, macs_budget, params_budget
from ..spaces.budget_sampler import BudgetSampler
from ..spaces.latency import Prepare, latency_budget
from ..spaces.space import SearchSpace
from ..supernets.scoring import Evaluator, Images, check_memory
from ..supernets.supernet import Supernet
from ..supernets.training import create_supernet

__all__ = ["Interrupted", "RunContext"]

T = TypeVar("T")


class Interrupted(Exception):  # noqa: N818 - no error: what was done is saved
    """The search was asked to stop."""


def _check_splits(splits: Splits) -> None:
    """Raise SearchError if a search cannot use these data."""
    if splits.is_multilabel:
        raise SearchError("a search goes by one class an image; these data have several labels an image")
    if isinstance(splits.validation, Stream):
        raise SearchError(
            "train.data.dataset is read as a stream, of which the search set cannot be drawn; take one with an index"
        )
    num_classes = len(splits.class_names)
    for name, number in (("train on", len(splits.train)), ("choose on", len(splits.validation))):
        if number < num_classes:
            raise SearchError(
                f"the data have {num_classes} classes, but only {number} images to {name}; see train.data.hold_out"
            )


@final
class RunContext:
    """The context of a search.

    Args:
        recipe: recipe of the search.
        device: 'cpu', 'cuda', ...; None uses the GPU if there is one. With an executor, the device of each worker.
        max_minutes: time limit, after which the search saves and exits.
        folder: folder of the search; measured latencies are stored there.
        command: the command line, for the records of trained models.
        runtimes: runtimes for measuring latency, by the name in `latency.runtime`, in addition to PyTorch.
        executor: runs the tasks on its workers; None for this process, with those that `accelerate launch` started.

    Raises:
        DataError, RecipeError, SearchError: if the data is not available or too small.
    """

    def __init__(
        self,
        recipe: SearchRecipe,
        folder: Path,
        device: str | torch.device | None,
        max_minutes: float | None,
        command: str | None = None,
        runtimes: Mapping[str, Prepare] | None = None,
        executor: Executor | None = None,
    ) -> None:
        self.command, self.executor = command, executor
        self.stage: Any = None  # the current `Stage` of this process
        self.recipe, self.folder = recipe, folder
        self.supernet_recipe: Recipe = recipe.supernet_recipe()
        self._wanted_device = None if device is None else str(device)
        self.accelerator = make_accelerator("cpu" if executor else device, self.supernet_recipe.precision)
        self.device: torch.device = self.accelerator.device
        self.rank: int = self.accelerator.process_index
        self.world_size: int = self.accelerator.num_processes
        if executor and self.world_size > 1:
            raise SearchError("an engine cannot be used under `accelerate launch`; start the search as one process")
        self.stop = StopRequest(max_minutes)
        with self.accelerator.main_process_first():
            self.splits = open_data(self.supernet_recipe)
        _check_splits(self.splits)
        self.budgets, self.references = resolve_budgets(
            self._make_budgets(runtimes or {}), recipe.budget, folder, self.supernet_recipe.model.img_size,
            self.num_classes,
        )  # fmt: skip

    @property
    def num_classes(self) -> int:
        """Number of classes of the data."""
        return len(self.splits.class_names)

    def _make_budgets(self, runtimes: Mapping[str, Prepare]) -> list[Budget]:
        budget, size = self.recipe.budget, self.supernet_recipe.model.img_size
        budgets = [
            macs_budget(budget.macs.low, budget.macs.high, size, self.num_classes),
            params_budget(budget.params.low, budget.params.high, size, self.num_classes),
        ]
        if budget.latency_ms != Bounds() or "latency_ms" in self.recipe.costs_in_view:
            budgets.append(self._latency_budget(runtimes))
        return budgets

    def _latency_budget(self, runtimes: Mapping[str, Prepare]) -> Budget:
        bounds, latency = self.recipe.budget.latency_ms, self.recipe.latency
        if self.world_size > 1 or self.executor:
            raise SearchError("budget.latency_ms cannot be used on several processes, which would slow each other")
        if latency.runtime != "torch" and latency.runtime not in runtimes:
            raise SearchError(
                f"latency.runtime {latency.runtime} needs `runtimes={{'onnx': glit_models.export.onnx_runner}}`; "
                "the command `glit search` gives it"
            )
        return latency_budget(
            bounds.low, bounds.high, img_size=self.supernet_recipe.model.img_size, num_classes=self.num_classes,
            batch_size=latency.batch_size, threads=latency.threads, device=str(self.device), runtime=latency.runtime,
            prepare=runtimes.get(latency.runtime), cache=self.folder / "latency.json",
        )  # fmt: skip

    def admits(self, spec: Spec) -> bool:
        """Whether a network is within the budgets."""
        return all(budget.admits(budget.cost(spec)) for budget in self.budgets)

    def sampler(self, space: SearchSpace) -> BudgetSampler:
        """A sampler of a space's networks within the budgets."""
        evolution = self.recipe.evolution
        return BudgetSampler(space, self.budgets, evolution.uniform_over, evolution.max_draws)

    def draw_different(self, space: SearchSpace, count: int, name: str, besides: Iterable[Spec] = ()) -> list[Spec]:
        """Draw `count` different networks within the budgets, or fewer if not so many are found.

        Args:
            name: what the networks are for; part of the seed.
            besides: networks to leave out.
        """
        sampler, rng = self.sampler(space), random.Random(f"{self.recipe.seed} {name}")
        left_out = set(besides)
        specs: dict[Spec, None] = {}
        for _ in range(100 * count):
            if len(specs) == count:
                break
            if (spec := sampler.sample(rng)[0]) not in left_out:
                specs[spec] = None
        return list(specs)

    def searched_space(self) -> SearchSpace:
        """The recipe's space, or what a given network can be transformed to. Raises SearchError if it is empty."""
        space, given = self.recipe.load_space(), self.recipe.given_spec
        return space if given is None else self.recipe.method_class.narrow(space, given, self.budgets[0].cost)

    # ---- stopping ----

    def check_stop(self, together: bool) -> None:
        """Stop if requested. `together`: every process calls this now, and they agree; else the time is not checked.

        Raises:
            Interrupted: with the reason.
        """
        late = self.stop.is_late and (together or self.world_size == 1)
        asked = late or self.stop.signal is not None
        if together:
            asked = any(self.gather([asked]))
        if asked:
            raise Interrupted(self.stop.reason)

    # ---- processes ----

    def gather(self, items: list[Any]) -> list[Any]:
        """The lists of all processes, concatenated."""
        if self.world_size == 1:
            return items
        from accelerate.utils import gather_object

        gathered: list[Any] = gather_object(items)
        return gathered

    def decide(self, read: Callable[[], T]) -> T:
        """Let the first process read files, and share the result: with a slow file system, processes might disagree."""
        if self.world_size == 1:
            return read()
        answer: tuple[Any, GlitError | None] | None = None
        if self.rank == 0:
            try:
                answer = read(), None
            except GlitError as error:
                answer = None, error
        value, failure = self.gather([answer])[0]
        if failure is not None:
            raise failure
        told: T = value
        return told

    def wait(self) -> None:
        """Wait for all processes."""
        self.accelerator.wait_for_everyone()

    def say(self, line: str) -> None:
        """Print a message, only in the first process."""
        if self.rank == 0:
            say(line)

    def progress(self) -> Progress:
        """A progress bar with a description and time left; silent if stderr is not a terminal."""
        columns = ("{task.description}", BarColumn(), "{task.percentage:.0f} %", TimeRemainingColumn())
        return progress_bar(*columns, shown=self.rank == 0)

    # ---- tasks ----

    @property
    def num_workers(self) -> int:
        """Number of tasks that run at once."""
        return self.executor.num_workers if self.executor else self.world_size

    def run(self, tasks: Sequence[Task]) -> list[Any]:
        """Run tasks, all of one kind; returns their results in the same order.

        Raises:
            Interrupted: if a stop was requested.
        """
        if self.executor:
            origin = {"device": self._wanted_device, "command": self.command}
            check_stop = partial(self.check_stop, together=False)
            return dispatch(self.executor, self.folder, tasks, origin, check_stop, self.say)
        if any(task.is_collective for task in tasks):
            return [self._perform(task) for task in tasks]
        mine = [(place, self._perform(tasks[place])) for place in range(self.rank, len(tasks), self.world_size)]
        return [result for _, result in sorted(self.gather(mine), key=lambda pair: pair[0])]

    def _perform(self, task: Task) -> Any:
        if task.is_collective:
            self.say(task.title)
        return KINDS[task.kind](self, **task.arguments)

    def training(
        self, title: str, recipe: Recipe, out: Path, score_on: str | None = None, start: str | None = None
    ) -> Task:
        """A task that trains a stand-alone network in a folder; its result is that of the training, see `work`."""
        values = {"recipe": recipe.to_dict(), "folder": str(out.relative_to(self.folder)), "score_on": score_on}
        if start is not None:
            values["start"] = start
        return Task("train", values, title, is_collective=True)

    def train(
        self,
        recipe: Recipe,
        out: Path,
        trainee: Trainee | None = None,
        start: Callable[[], Mapping[str, torch.Tensor]] | None = None,
    ) -> dict[str, Any]:
        """Train in a folder, resuming if possible, and return the result. Raises Interrupted if stopped."""

        def read_result() -> dict[str, Any] | None:
            refuse_other_recipe(recipe, out, partial(data_fingerprint, recipe))
            path = out / "result.json"
            return read_json(path) if path.is_file() else None

        done = self.decide(read_result)
        if done is not None:
            return done
        trainer = Trainer(
            recipe, out, self.device, self.stop.minutes_left, self.command, trainee=trainee, score_test=False,
            start=start,
        )  # fmt: skip
        result = trainer.run()
        if result is None:
            self.stop.signal = trainer.stop.signal or self.stop.signal
            raise Interrupted(self.stop.reason)
        self.check_stop(together=True)
        return result

    # ---- scoring ----

    def create_model(self, spec: Spec) -> Any:
        """Create a stand-alone network with random weights."""
        return setup.create_model(self.recipe.retrain_recipe(spec).model, self.num_classes)

    def feed(self, rank: int = 0, world_size: int = 1) -> Feed:
        """The data for scoring, for a single process or for one of several."""
        some = next(iter(self.recipe.load_space()))
        model = self.create_model(some)  # for its preprocessing in timm
        preprocessing = setup.resolve_preprocessing(model, self.supernet_recipe.data)
        return Feed(self.supernet_recipe, self.splits, preprocessing, self.device, 1, (0,), rank, world_size)

    def search_order(self) -> list[int]:
        """The positions of the search set's images in the random order in which they are scored."""
        order = np.random.default_rng((self.recipe.seed, 1)).permutation(len(self.splits.validation))
        positions: list[int] = order.tolist()
        return positions

    @property
    def num_batches(self) -> int:
        """Number of batches of the search set."""
        return math.ceil(len(self.splits.validation) / self.supernet_recipe.eval_batch_size)

    def _image_bytes(self, space: SearchSpace) -> int:
        """Bytes of the tokens of an image."""
        tokens: int = self.create_model(next(iter(space))).pos_embed.shape[1]
        return 4 * tokens * max(space.embed_dims)

    def keeps_images(self, space: SearchSpace) -> bool:
        """Whether one process can keep all images of the search set, in a third of the memory of an `Evaluator`."""
        return len(self.splits.validation) * self._image_bytes(space) <= self.recipe.evaluation.memory_mb * 1e6 / 3

    def check_memory(self, space: SearchSpace) -> None:
        """Raise SearchError if `evaluation.memory_mb` is too small to score networks of this space."""
        training = self.supernet_recipe
        batch_size = max(training.optim.batch_size, min(training.eval_batch_size, len(self.splits.validation)))
        check_memory(self.recipe.evaluation.memory_mb, space.depth, batch_size, self._image_bytes(space))

    def create_supernet(self, space: SearchSpace) -> Supernet:
        """Create a supernet with random weights, on the CPU."""
        settings = self.recipe.supernet
        return create_supernet(
            space, settings.sharing, self.supernet_recipe, self.num_classes, settings.private_qk
        )  # fmt: skip

    def load_supernet(self, space: SearchSpace, weights: Path) -> Supernet:
        """Load the supernet from a weights file, on the CPU. Raises SearchError if it cannot be read."""
        supernet = self.create_supernet(space)
        try:
            supernet.load_state_dict(load_file(weights))
        except (OSError, SafetensorError, RuntimeError) as error:
            result = weights.with_name("result.json")
            raise SearchError(
                f"{weights} is missing or damaged ({first_line(error)}); delete {result}, and the same command makes "
                "it again from the last checkpoint"
            ) from None
        return supernet

    def evaluator(
        self,
        space: SearchSpace,
        weights: Path,
        on_batch: Callable[[int, int], None],
        positions: Sequence[int] | None = None,
    ) -> Evaluator:
        """Create an evaluator of the supernet in a weights file, on these images of the search set or on all.

        Every process creates one.
        """
        recipe = self.recipe.evaluation
        supernet = self.load_supernet(space, weights)
        feed = self.feed()
        steps = len(self.splits.train) // self.supernet_recipe.optim.batch_size
        num_calibration = max(min(recipe.calibration_batches, steps), 1)
        search_set = self.splits.validation
        order = self.search_order() if positions is None else positions

        size = self.supernet_recipe.eval_batch_size

        def calibration(wanted: range) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
            for images in feed.for_statistics(wanted.stop):
                yield images, torch.zeros(len(images), dtype=torch.int64)

        def scoring(wanted: range) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
            return feed.scoring(search_set, order[wanted.start * size : wanted.stop * size])[0]

        return Evaluator(
            supernet.to(self.device),
            Images(calibration, num_calibration),
            Images(scoring, math.ceil(len(order) / size)),
            memory_mb=recipe.memory_mb,
            share=recipe.share,
            bf16=self.supernet_recipe.precision == "bf16",
            on_batch=on_batch,
        )
