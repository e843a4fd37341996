"""What all parts of one search share: the recipe, the data, the processes, and when to stop."""

from __future__ import annotations

import json
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, final

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import SafetensorError
from safetensors.torch import load_file

from glit_models.data import Splits
from glit_models.data.sources import Stream
from glit_models.errors import SearchError, first_line
from glit_models.inference import count_correct
from glit_models.training import Recipe, setup
from glit_models.training.checkpoints import write_atomically
from glit_models.training.distributed import make_accelerator
from glit_models.training.feed import Feed, open_data
from glit_models.training.results import load_model

from .budget import Budget, macs_budget, member_at, params_budget
from .evaluate import Evaluator, Images
from .latency import Prepare, latency_budget
from .recipe import SearchRecipe
from .space import SearchSpace
from .supernet_training import create_supernet

__all__ = ["Interrupted", "RunContext", "read_json", "write_json"]


class Interrupted(Exception):  # noqa: N818 - no error: what was done is saved
    """The search was asked to stop."""


def write_json(path: Path, data: Any) -> None:
    """Write a file of readable JSON, whole or not at all."""
    text = json.dumps(data, indent=2) + "\n"
    write_atomically(path, lambda aside: aside.write_text(text, encoding="utf-8"))


def read_json(path: Path) -> Any:
    """Read one. Raises SearchError if it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SearchError(
            f"{path} is damaged ({error}); delete it, and the same command makes it again from the rest"
        ) from None


def _check_splits(splits: Splits) -> None:
    """Whether a search can go by these data. Raises SearchError if not."""
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
    """The surroundings of a search.

    Args:
        recipe: of the search.
        device: 'cpu', 'cuda', ...; None takes the GPU if there is one.
        max_minutes: save and leave after so long.
        folder: of the search; measured latencies are kept there.
        command: the command line, for the records of what is trained.
        runtimes: what can make a network ready to be timed, by its name in `latency.runtime`; PyTorch always can.

    Raises:
        DataError, RecipeError, SearchError: if the data cannot be had or are too few.
    """

    def __init__(
        self,
        recipe: SearchRecipe,
        folder: Path,
        device: str | torch.device | None,
        max_minutes: float | None,
        command: str | None = None,
        runtimes: Mapping[str, Prepare] | None = None,
    ) -> None:
        self.command = command
        self.recipe, self.folder = recipe, folder
        self.training: Recipe = recipe.supernet_recipe()
        self.accelerator = make_accelerator(device, self.training.precision)
        self.device: torch.device = self.accelerator.device
        self.rank: int = self.accelerator.process_index
        self.world_size: int = self.accelerator.num_processes
        self.max_minutes, self.started = max_minutes, time.monotonic()
        self.stop_signal: str | None = None
        with self.accelerator.main_process_first():
            self.splits = open_data(self.training)
        _check_splits(self.splits)
        self.budgets = self._make_budgets(runtimes or {})

    @property
    def num_classes(self) -> int:
        """Of the data."""
        return len(self.splits.class_names)

    def _make_budgets(self, runtimes: Mapping[str, Prepare]) -> list[Budget]:
        budget, size = self.recipe.budget, self.training.model.img_size
        budgets = [
            macs_budget(budget.macs.low, budget.macs.high, size, self.num_classes),
            params_budget(budget.params.low, budget.params.high, size, self.num_classes),
        ]
        if budget.latency_ms.low is not None or budget.latency_ms.high is not None:
            budgets.append(self._latency_budget(runtimes))
        return budgets

    def _latency_budget(self, runtimes: Mapping[str, Prepare]) -> Budget:
        bounds, latency = self.recipe.budget.latency_ms, self.recipe.latency
        if self.world_size > 1:
            raise SearchError("budget.latency_ms cannot be used on several processes, which would slow each other")
        if latency.runtime != "torch" and latency.runtime not in runtimes:
            raise SearchError(
                f"latency.runtime {latency.runtime} needs `runtimes={{'onnx': glit_models.export.onnx_runner}}`; "
                "the command `glit search` gives it"
            )
        return latency_budget(
            bounds.low, bounds.high, img_size=self.training.model.img_size, num_classes=self.num_classes,
            batch_size=latency.batch_size, threads=latency.threads, device=str(self.device), runtime=latency.runtime,
            prepare=runtimes.get(latency.runtime), cache=self.folder / "latency.json",
        )  # fmt: skip

    # ---- stopping ----

    @contextmanager
    def signals(self) -> Iterator[None]:
        """SIGTERM and SIGINT ask to stop, inside."""
        previous = {number: signal.signal(number, self._on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.stop_signal:
            raise KeyboardInterrupt  # asked twice
        self.stop_signal = signal.Signals(number).name

    @property
    def minutes_left(self) -> float | None:
        """Until `max_minutes`; None without."""
        if self.max_minutes is None:
            return None
        return max(self.max_minutes - (time.monotonic() - self.started) / 60, 0.0)

    def check_stop(self, together: bool) -> None:
        """Leave if asked to. `together`: every process calls this now, and they agree; else the clock is not asked.

        Raises:
            Interrupted: says why.
        """
        late = self.minutes_left == 0 and (together or self.world_size == 1)
        asked = bool(self.stop_signal or late)
        if together:
            asked = any(self.gather([asked]))
        if asked:
            raise Interrupted(self.stop_signal or f"--max-minutes {self.max_minutes or 0:g}")

    # ---- processes ----

    def gather(self, items: list[Any]) -> list[Any]:
        """The lists of all processes, one after the other."""
        if self.world_size == 1:
            return items
        from accelerate.utils import gather_object

        gathered: list[Any] = gather_object(items)
        return gathered

    def wait(self) -> None:
        """For all processes."""
        self.accelerator.wait_for_everyone()

    def say(self, line: str) -> None:
        """Tell the user, once."""
        if self.rank == 0:
            print(line, file=sys.stderr, flush=True)

    def progress(self) -> Progress:
        """A bar with a description and time left; silent where stderr is no terminal."""
        return Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:.0f} %"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=self.rank > 0 or not sys.stderr.isatty(),
        )

    # ---- scoring ----

    def _feed(self, rank: int = 0, world_size: int = 1) -> Feed:
        space = self.recipe.load_space()
        some = self.recipe.retrain_recipe(member_at(space, [0] * space.depth))
        model = setup.create_model(some.model, self.num_classes)  # for what timm knows of its preprocessing
        preprocessing = setup.resolve_preprocessing(model, self.training.data)
        return Feed(self.training, self.splits, preprocessing, self.device, 1, (0,), rank, world_size)

    def evaluator(self, space: SearchSpace, weights: Path, on_batch: Callable[[int, int], None]) -> Evaluator:
        """An evaluator of the supernet whose weights are in a file, on the search set.

        Every process has one, of all pictures: they evaluate different networks.
        """
        recipe = self.recipe.evaluation
        supernet = create_supernet(space, self.recipe.supernet.sharing, self.training, self.num_classes)
        try:
            supernet.load_state_dict(load_file(weights))
        except (OSError, SafetensorError, RuntimeError) as error:
            result = weights.with_name("result.json")
            raise SearchError(
                f"{weights} is missing or damaged ({first_line(error)}); delete {result}, and the same command makes "
                "it again from the last checkpoint"
            ) from None
        feed = self._feed()
        steps = len(self.splits.train) // self.training.optim.batch_size
        num_calibration = max(min(recipe.calibration_batches, steps), 1)
        search_set = self.splits.validation
        order = np.random.default_rng((self.recipe.seed, 1)).permutation(len(search_set)).tolist()

        def calibration() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
            for images in feed.for_statistics(num_calibration):
                yield images, torch.zeros(len(images), dtype=torch.int64)

        return Evaluator(
            supernet.to(self.device),
            Images(calibration, num_calibration),
            Images(lambda: feed.scoring(search_set, order)[0], math.ceil(len(order) / self.training.eval_batch_size)),
            memory_mb=recipe.memory_mb,
            share=recipe.share,
            bf16=self.training.precision == "bf16",
            on_batch=on_batch,
        )

    def test_accuracy(self, folder: Path) -> float | None:
        """Top-1 accuracy in percent of the model in a folder on the test set, over all processes; None without one."""
        if self.splits.test is None:
            return None
        batches, count = self._feed(self.rank, self.world_size).scoring(self.splits.test)
        model = load_model(folder).to(self.device)
        return 100 * sum(self.gather([count_correct(model, batches, self.device)])) / count
