"""The training loop. Its result depends only on the recipe, not on interruptions or the number of processes.

Batches come from (seed, epoch, step), and every step uses generators seeded by (seed, step), so a killed run that is
started again ends with the same result. accelerate places the model, distributes it and sets the precision. This module
works with recipes, data and timm's model interface; it does not publish weights.
"""

from __future__ import annotations

import itertools
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.optim import Optimizer

from ..data import Splits
from ..errors import Argument, RecipeError, TrainingError, is_out_of_memory
from ..reading import parse_json, read_text
from ..recipes import record_recipe, refuse_other_data, refuse_other_recipe
from ..runs.console import MinuteLines, progress_bar, say, show_seconds
from ..runs.files import whole_file, write_json
from ..runs.lock import lock_folder
from ..runs.processes import make_accelerator, multiplies_bf16, release_memory, synchronise_batchnorm
from ..runs.signals import StopRequest
from ..weights.files import write_state_dict
from ..weights.loading import create_model, load_model
from . import setup
from .feed import Feed, data_fingerprint, open_data
from .machine import (
    Pace,
    accumulation_for_memory,
    choose_threads,
    even_accumulation,
    scoring_batch,
    smallest_parts,
)
from .objective import Objective, class_weights, refuse_for_multilabel
from .recipe import Recipe
from .records import Records, progress_columns
from .reports import DivergedError, StepReports, seed_part
from .results import METRICS, record_scores, save_model
from .selection import Selection
from .state import Checkpoints, Progress
from .tracking import check_trackers

__all__ = ["Trainee", "Trainer"]

_LOG_EVERY = 50  # steps between lines of metrics.jsonl
_WARM_UP_STEPS = 3  # before steps are timed


class Trainee(ABC):
    """Base class for training something other than the recipe's model, such as the supernet of a search. Abstract.

    Its last weights are saved as `model.safetensors`; they are not scored.
    """

    @abstractmethod
    def create_model(self, num_classes: int) -> nn.Module:
        """Create the model, on the CPU, with `num_classes` outputs."""

    @abstractmethod
    def begin(
        self, model: Any, optimizer: Optimizer, objective: Objective, prepare: Callable[[nn.Module], object]
    ) -> None:
        """Called once before the first step. `prepare` prepares a module as the trainer prepares a model."""

    @abstractmethod
    def begin_part(self, model: Any, step: int, part: int) -> None:
        """Called before the forward pass of every part of a step's batch.

        The parts of a step are numbered over all processes; each process takes the same number, one after the other.
        """


class Trainer:
    """One run in one folder, in this process or shared with others that `accelerate launch` or `torchrun` started.

    Args:
        recipe: recipe of the run.
        out: folder of the run; a run of the same recipe in it is resumed.
        device: 'cpu', 'cuda', ...; None uses the GPU if there is one.
        max_minutes: time limit, after which the run saves and exits.
        command: the command line of this run, recorded with the model.
        trainee: what to train instead of `recipe.model`.
        score_test: whether to score the test set at the end.
        track: names of accelerate's trackers that get the run's numbers: 'wandb', 'mlflow', ...
        fits_threads: whether torch uses fewer threads while other programs keep cores busy; see `choose_threads`.
        start: makes the initial state dict of `recipe.model`, instead of its pretrained weights.

    Raises:
        RecipeError: if `out` contains a run of another recipe (names the key) or on other data, or the data does not
            fit the recipe.
        DataError, RunError, WriteError: if the data or the folder cannot be used.
    """

    def __init__(
        self,
        recipe: Recipe,
        out: str | Path,
        device: str | torch.device | None = None,
        max_minutes: float | None = None,
        command: str | None = None,
        trainee: Trainee | None = None,
        score_test: bool = True,
        start: Callable[[], Mapping[str, Tensor]] | None = None,
        track: Sequence[str] = (),
        fits_threads: bool = False,
    ) -> None:
        check_trackers(track)
        self.recipe = recipe
        self.trainee = trainee
        self.score_test = score_test
        self.initial_state = start
        self.out = Path(out)
        self.stop = StopRequest(max_minutes)
        self.command = command
        self.accelerator = make_accelerator(device, recipe.precision, some_unused=trainee is not None)
        self.device: torch.device = self.accelerator.device
        self.rank: int = self.accelerator.process_index
        if self.device.type == "cpu" and recipe.precision == "bf16" and not multiplies_bf16():
            self._say("glit: this processor cannot multiply bfloat16 itself; precision=fp32 may be ten times faster")
        recipe.check_parts(self.accelerator.num_processes)
        self.fits_threads = fits_threads
        self.progress = Progress()
        refuse_other_recipe(recipe, self.out, partial(data_fingerprint, recipe))
        self.splits = self._open_splits()
        self.fingerprint = self.splits.fingerprint()
        refuse_other_data(self.out, self.fingerprint)
        self.num_classes = len(self.splits.class_names)
        if self.splits.is_multilabel:
            refuse_for_multilabel(recipe)
        self.steps_per_epoch = len(self.splits.train) // recipe.optim.batch_size
        if not self.steps_per_epoch:
            size, count = recipe.optim.batch_size, len(self.splits.train)
            raise RecipeError(Argument("optim.batch_size", size), f" is more than the {count} images to train on")
        self.total_steps = self.steps_per_epoch * recipe.optim.epochs
        self._build()
        self.records = Records(self.out, track)
        self.lines = MinuteLines()
        scored = 0 if trainee is not None or recipe.data.train_on_validation else len(self.splits.validation)
        self.pace = Pace(recipe, self.steps_per_epoch, scored)

    # ---- before the first step ----

    def _open_splits(self) -> Splits:
        with self.accelerator.main_process_first():  # one process downloads, the others use its copy
            return open_data(self.recipe)

    def _build(self) -> None:
        recipe = self.recipe
        torch.manual_seed(recipe.seed)
        if self.trainee is not None:
            self.model = self.trainee.create_model(self.num_classes)
        else:
            with self.accelerator.main_process_first():
                self.model = setup.create_model(recipe.model, self.num_classes, bool(recipe.model.img_size_shares))
            if self.initial_state is not None:
                self.model.load_state_dict(self.initial_state())
        self.model.to(self.device)
        self.preprocessing = setup.resolve_preprocessing(self.model, recipe.data)
        decay = recipe.optim.ema_decay
        self.ema = ModelEmaV3(self.model, decay=decay, use_warmup=True) if decay else None
        averaged = None if self.ema is None else self.ema.module
        if self.trainee is None:
            self.selection = Selection(
                recipe, self.out, self.model, averaged, self.accelerator, self.splits.is_multilabel
            )
        self._prepare(self.model)
        parts = recipe.optim.grad_accumulation * self.accelerator.num_processes
        scored = min(recipe.eval_batch_size, len(self.splits.validation))
        if self._may_cut:  # memory must hold the smallest part only
            parts, scored = smallest_parts(recipe), 1
        setup.check_memory(self.model, recipe, recipe.optim.batch_size // parts, scored, self.device)
        self.frozen = setup.freeze(self.model, recipe.model.freeze)
        self.optimizer = setup.create_optimizer(self.model, recipe.optim)
        self.schedule = setup.create_schedule(self.optimizer, recipe.optim, self.steps_per_epoch)
        weights = class_weights(recipe.class_weights, self.splits, self.device)
        self.objective = Objective(
            recipe.augment, recipe.distill, self.num_classes, self.preprocessing,
            lambda name: _create_teacher(name).to(self.device),
            weights, self.splits.is_multilabel,
        )  # fmt: skip
        self.reports = StepReports(self.accelerator, self.num_classes, 1.0 if weights is None else float(weights.max()))
        if self.trainee is not None:
            self.trainee.begin(self.model, self.optimizer, self.objective, self._prepare)
        if recipe.model.compile:
            self.model.compile()
        self.wrapped = self.accelerator.prepare_model(self.model)
        self.feed = Feed(
            recipe, self.splits, self.preprocessing, self.device, 1, (0,), self.rank, self.accelerator.num_processes
        )
        self._cut_batches(recipe.optim.grad_accumulation)
        self.checkpoints = Checkpoints(self.out, self.progress, self.model, self.optimizer, averaged)

    def _cut_batches(self, accumulation: int) -> None:
        """Split this process's share of a batch into this number of parts, trained on one after another."""
        self.parts = range(self.rank * accumulation, (self.rank + 1) * accumulation)
        self.feed.num_parts = accumulation * self.accelerator.num_processes
        self.feed.parts = self.parts

    @property
    def step(self) -> int:
        """Number of finished steps."""
        return self.progress.step

    def _prepare(self, module: nn.Module) -> None:
        """Prepare a module for fast training on this device, and synchronise its BatchNorm over all processes."""
        setup.prepare_for_device(module, self.device.type)
        if self.accelerator.num_processes > 1:
            synchronise_batchnorm(module, self.device.type)

    # ---- the run ----

    def run(self) -> dict[str, Any] | None:
        """Train to the end and return the result, or None if stopped early (by a signal or `max_minutes`)."""
        result = self.out / "result.json"
        if result.is_file():
            self._say(f"glit: {self.out} is finished; its result is in {result}")
            return _read_result(result)
        with lock_folder(self.out) if self.rank == 0 else nullcontext():
            if self.rank == 0:
                record_recipe(self.recipe, self.out, self.fingerprint)
            self.accelerator.wait_for_everyone()  # the folder exists
            return self._run()

    def _run(self) -> dict[str, Any] | None:
        resumed = self.checkpoints.load()
        self._choose_threads()
        if not resumed:
            self._fit_memory()
        if self.progress.accumulation:
            self._cut_batches(self.progress.accumulation)
        if self._may_cut:
            self.feed.eval_batch_size = scoring_batch(self.recipe, self.model, self.device)
        if resumed:
            self._say(f"glit: resuming from step {self.step} of {self.total_steps}")
        self.checkpoints.start_clock()
        self.accelerator.wait_for_everyone()  # all have read
        if not resumed:
            self._save()  # so that there is always a checkpoint to restore
        self._begin_records()
        with self.stop:
            try:
                finished = self._train()
                self._draw(finished or self.records.has_undrawn_epoch)
            finally:
                self.records.close()
        return self._finish() if finished else None

    def _choose_threads(self) -> None:
        if self.recipe.threads is not None:
            torch.set_num_threads(self.recipe.threads)
        elif self.fits_threads and self.device.type == "cpu":
            line = choose_threads(self.progress.threads)
            if line is not None:
                self._say(f"glit: {line}")
            self.progress.threads = torch.get_num_threads()

    @property
    def _may_cut(self) -> bool:
        """Whether batches may be split into more parts; not with several processes or a `trainee`."""
        return self.trainee is None and self.accelerator.num_processes == 1

    def _fit_memory(self) -> None:
        """Split batches that are too large for the free memory. On a CPU, running out of it may kill the process."""
        if self._may_cut:
            parts = accumulation_for_memory(self.recipe, self.model, self.device)
            if parts > self.recipe.optim.grad_accumulation:
                self._record_parts(parts)

    def _record_parts(self, parts: int) -> None:
        self.progress.accumulation = parts
        size = self.recipe.optim.batch_size
        self._say(f"glit: memory is short, so each batch of {size} images is trained on in {parts} parts one by one")

    def _go_back_for_memory(self) -> None:
        """Return to the last checkpoint after a step ran out of memory, and split batches into smaller parts."""
        parts = even_accumulation(self.recipe, 2 * len(self.parts))
        if parts is None:
            self._draw(self.records.has_undrawn_epoch)
            size = self.recipe.optim.batch_size // len(self.parts)
            raise TrainingError(
                f"memory is too short for {size} image{'' if size == 1 else 's'} at a time; a smaller ",
                Argument("model.img_size"), " or model takes less",
            )  # fmt: skip
        self.optimizer.zero_grad()
        self.reports.waiting.clear()
        release_memory()
        found = self.checkpoints.load()
        assert found  # one is written before the first step
        self._record_parts(parts)
        self._cut_batches(parts)
        self._save()
        self._begin_records()

    def time_steps(self, count: int, max_seconds: float) -> float:
        """Measure the seconds of a training step including its data: the mean of a few, after slower warm-up steps.

        This changes the weights and writes nothing; create another trainer for the run.

        Args:
            count: number of timed steps.
            max_seconds: start no further step after this time.
        """
        self.model.train()
        steps = (parts for epoch in itertools.count() for parts in self.feed.steps(epoch, 0))
        for parts in itertools.islice(steps, _WARM_UP_STEPS):
            self._train_step(parts)
        began, timed = self._clock(), 0
        while timed < count and self._clock() - began < max_seconds:
            self._train_step(next(steps))
            timed += 1
        return (self._clock() - began) / timed

    def _clock(self) -> float:
        """The time in seconds, after the device has finished its work."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize()
        return time.monotonic()

    def _say(self, line: str) -> None:
        if self.rank == 0:
            say(line)

    def _begin_records(self) -> None:
        if self.rank == 0:
            self.records.begin(self.step, self.progress.epochs_done, self.recipe.to_dict())

    def _draw(self, is_wanted: bool) -> None:
        if self.rank == 0 and is_wanted:
            self.records.draw()

    def _save(self) -> None:
        self.checkpoints.save(write=self.rank == 0)

    def _train(self) -> bool:
        """Train the remaining epochs; returns whether all are done."""
        with progress_bar(*progress_columns(), shown=self.rank == 0) as self.bar:
            self.bar.add_task("", total=self.total_steps, completed=self.step, epoch=0, status="")
            while self.progress.epochs_done < self.recipe.optim.epochs and not self._is_out_of_patience():
                is_short = False
                try:
                    if not self._train_epoch():
                        return False
                except DivergedError as error:
                    self._go_back(error)
                except RuntimeError as error:
                    if not (self._may_cut and is_out_of_memory(error)):
                        raise
                    is_short = True
                if is_short:  # after the error, which holds tensors, is released
                    self._go_back_for_memory()
        return True

    def _is_out_of_patience(self) -> bool:
        done, best, patience = self.progress.epochs_done, self.progress.best["epoch"], self.recipe.patience
        if patience is None or done - max(best, 0) < patience:
            return False
        self._say(f"glit: no better validation score since epoch {best}; stopped after {done}")
        return True

    def _train_epoch(self) -> bool:
        """Train the rest of the current epoch and score it; returns whether it is done."""
        epoch = self.progress.epochs_done
        first = self.step - epoch * self.steps_per_epoch
        began = time.monotonic()
        self.model.train()
        for module in self.frozen:
            module.eval()
        lag = 0 if self.device.type == "cpu" else 1  # reading a step's loss at once would stall the GPU
        for done, parts in enumerate(self.feed.steps(epoch, first), 1):
            self._train_step(parts)
            rate = done * self.recipe.optim.batch_size / (time.monotonic() - began)
            save, stop = self._read_reports(lag, rate)
            if (estimate := self.pace.after(self.step)) is not None:
                self._say(f"glit: {estimate} for all {self.recipe.optim.epochs} epochs")
            if save or stop:
                self._read_reports(0)  # the checkpoint includes the last step, so check its loss
                self._save()
            if stop:
                self._say(
                    f"glit: stopped by {self.stop.reason} at step {self.step} of {self.total_steps}; "
                    "run the same command to resume"
                )
                return False
        self._read_reports(0)
        trained = self.step - first - epoch * self.steps_per_epoch
        self._end_epoch(trained * self.recipe.optim.batch_size / (time.monotonic() - began))
        self._save()
        return True

    def _train_step(self, parts: list[tuple[Tensor, Tensor]]) -> None:
        """One optimiser step on this process's parts: images [B, C, H, W] and labels [B]."""
        self.schedule.step_update(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] *= 0.5**self.progress.retries_used
        mean = torch.zeros((), device=self.device)
        for number, (images, labels) in zip(self.parts, parts, strict=True):
            seed_part(self.recipe.seed, self.step, number, self.device)
            images, targets = self.objective.mix(images, labels)
            if self.trainee is not None:
                self.trainee.begin_part(self.model, self.step, number)
            last = number == self.parts[-1]
            with nullcontext() if last else self.accelerator.no_sync(self.wrapped):
                loss = self.objective.loss(self.wrapped(images), images, targets) / len(self.parts)
                self.accelerator.backward(loss)
            mean += loss.detach()
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.recipe.optim.clip_grad or math.inf)
        mean = torch.where(norm.isfinite(), mean, math.nan)  # this step makes the weights invalid
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.progress.step += 1
        if self.ema is not None:
            self.ema.update(self.model, step=self.step)
        self._add_report(mean)

    def _add_report(self, loss: Tensor) -> None:
        """Share a step's loss with the other processes, and whether to save or stop after it."""
        due = self.rank == 0 and self.checkpoints.minutes_since_saved >= self.recipe.checkpoint_minutes
        self.reports.add(self.step, loss, save=due, stop=self.stop.is_late or self.stop.signal is not None)

    def _read_reports(self, lag: int, rate: float = 0.0) -> tuple[bool, bool]:
        """Read the reports of all but the last `lag` steps; returns whether one asks to save, and to stop.

        Raises:
            DivergedError: if a step has diverged.
        """
        save = stop = False
        for report in self.reports.read(lag):
            self.progress.loss_sum += report.loss
            save, stop = save or report.save, stop or report.stop
            self._show(report.step, report.loss, rate)
        return save, stop

    def _show(self, step: int, loss: float, rate: float) -> None:
        if self.rank:
            return
        lr = self.optimizer.param_groups[-1]["lr"]
        status = f"loss {loss:.3f}  lr {lr:.1e}  {rate:.0f} images/s"
        epoch, epochs = self.progress.epochs_done + 1, self.recipe.optim.epochs
        left = (self.total_steps - step) * self.recipe.optim.batch_size / max(rate, 1e-9)
        self.lines.say(f"epoch {epoch}/{epochs}, step {step}/{self.total_steps}: {status}, {show_seconds(left)} left")
        self.bar.update(self.bar.task_ids[0], completed=step, epoch=epoch, status=status)
        if step % _LOG_EVERY == 0:
            self.records.write({"step": step, "loss": loss, "lr": lr, "images_per_second": round(rate, 1)})

    def _go_back(self, error: DivergedError) -> None:
        """After a diverged step, resume from the last checkpoint at half the rate, if the recipe has retries left."""
        place = (
            f"the loss is {error.loss:g} at step {error.step} (epoch {error.step // self.steps_per_epoch}, batch "
            f"{error.step % self.steps_per_epoch})"
        )
        used = self.progress.retries_used
        found = self.checkpoints.load()
        assert found  # one is written before the first step
        self.progress.retries_used = used + 1
        if used == self.recipe.retries:
            self._draw(self.records.has_undrawn_epoch)
            tries = f" after {used} tries with lower rates" if used else ""
            raise TrainingError(
                f"{place}{tries}; the last good checkpoint, of step {self.step}, is in {self.out}: "
                "try a lower optim.lr, or set retries"
            )
        self._say(f"glit: {place}; going back to step {self.step}, with {0.5 ** (used + 1):g} of the rate")
        self._save()  # so that the retry counts even if the run is killed
        self._begin_records()

    # ---- scores ----

    def _end_epoch(self, rate: float) -> None:
        """Score the epoch on the validation set, keep the weights if they are the best so far, and print the score."""
        epoch, epochs = self.progress.epochs_done + 1, self.recipe.optim.epochs
        loss = self.progress.loss_sum / self.steps_per_epoch
        entry: dict[str, Any] = {"step": self.step, "epoch": epoch, "train_loss": loss}
        line, key = "", "" if self.trainee is not None else f"validation_{self.selection.metric}"
        if self.trainee is None and (epoch % self.recipe.eval_every == 0 or epoch == epochs):
            scored = self.selection.weights(self.feed, self.step)
            best: dict[str, Any] = {"epoch": epoch}
            if not self.recipe.data.train_on_validation:
                value = self.selection.score(scored, self.feed, self.splits.validation)
                entry[key] = best[key] = value
                best |= self._spread("validation")
                line = f", validation {METRICS[self.selection.metric]} {value:.2f} %"
            if self.recipe.keep == "last" or self._rank(best) > self._rank(self.progress.best):
                self.progress.best = best
                if self.rank == 0:
                    self.selection.keep(scored)
        self.progress.epochs_done = epoch
        self.progress.loss_sum = 0.0
        if self.rank == 0:
            self.records.write(entry)
            self.records.draw_if_due()
        self._say(f"epoch {epoch}/{epochs}: loss {loss:.3f}{line}, {rate:.0f} images/s")

    def _rank(self, best: dict[str, Any]) -> tuple[float, float]:
        """The values that epochs are compared by. mAP does not depend on the threshold; F1 breaks ties."""
        return best.get(f"validation_{self.selection.metric}", -1.0), best.get("validation_micro_f1", 0.0)

    def _finish(self) -> dict[str, Any]:
        """Save the best weights as a model folder, and score the saved folder once on the test set."""
        if self.trainee is not None:
            return self._finish_trainee()
        self.accelerator.wait_for_everyone()  # the best weights are written
        recipe, folder = self.recipe, self.out / "model"
        if self.rank == 0:
            model = setup.create_model(recipe.model, self.num_classes)
            self.selection.restore(model)
            save_model(model, folder, self.splits, self.preprocessing, recipe, self.command)
        self.accelerator.wait_for_everyone()
        result = {**self.progress.best, "epochs": self.progress.epochs_done, "minutes": round(self.progress.minutes, 1)}
        if self.progress.accumulation:
            result["micro_batch"] = recipe.optim.batch_size // self.progress.accumulation
        if self.score_test and self.splits.test is not None:
            model = load_model(folder, any_timm=True).model.to(self.device)
            result[f"test_{self.selection.metric}"] = self.selection.score(model, self.feed, self.splits.test)
            result |= self._spread("test")
        if self.rank == 0:
            record_scores(folder, result, self.splits, recipe, self.command)
        self._write_result(result)
        return result

    def _spread(self, split: str) -> dict[str, float]:
        """The class-balanced scores of the last scoring."""
        return {f"{split}_{name}": round(value, 2) for name, value in self.selection.spread.items()}

    def _finish_trainee(self) -> dict[str, Any]:
        """Save the last weights."""
        if self.rank == 0:
            model = self.model if self.ema is None else self.ema.module
            state = model.state_dict()
            if self.recipe.save_dtype == "float16":
                state = {name: value.half() if value.is_floating_point() else value for name, value in state.items()}
            with whole_file(self.out / "model.safetensors") as path:
                write_state_dict(state, path)
        result = {"epochs": self.recipe.optim.epochs, "steps": self.step, "minutes": round(self.progress.minutes, 1)}
        self._write_result(result)
        return result

    def _write_result(self, result: dict[str, Any]) -> None:
        if self.rank == 0:
            write_json(self.out / "result.json", result)


def _read_result(path: Path) -> dict[str, Any]:
    try:
        result = parse_json(read_text(path))
        if isinstance(result, dict):
            return result
        reason: object = "not an object"
    except (OSError, ValueError) as error:
        reason = error
    raise TrainingError(f"{path} is damaged ({reason}); remove it, and the same command scores the run again")


def _create_teacher(name: str) -> nn.Module:
    try:
        return create_model(name, pretrained=True)
    except Exception as error:
        raise RecipeError(f"distill.teacher {name!r} cannot be loaded: {error}") from None
