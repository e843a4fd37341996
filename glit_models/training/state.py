"""The progress of a run, and its checkpoints, from which a stopped or killed run resumes."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from ..runs.state import StateFiles, read_tensors, write_tensors
from ..weights.files import check_fits

__all__ = ["Checkpoints", "Progress"]


@dataclass
class Progress:
    """The progress of a run.

    Attributes:
        step: steps done.
        epochs_done: epochs trained and scored; the last step of an epoch may be done before its score.
        loss_sum: sum over the steps of the current epoch.
        retries_used: restarts after diverged steps.
        best: the best validation accuracy so far, and its epoch.
        minutes: minutes of training, over all starts of the run.
        accumulation: number of parts that a batch is split into for lack of memory; 0: the recipe's number.
        threads: number of threads chosen for a CPU; 0 if none was chosen.
    """

    step: int = 0
    epochs_done: int = 0
    loss_sum: float = 0.0
    retries_used: int = 0
    best: dict[str, Any] = field(default_factory=lambda: {"validation_top1": -1.0, "epoch": -1})
    minutes: float = 0.0
    accumulation: int = 0
    threads: int = 0


class Checkpoints:
    """The checkpoints of one run: the newest, and the one before it.

    Args:
        folder: folder of the run.
        progress: progress of the run; `load` sets its fields.
        model, optimizer: model and optimiser of the run.
        averaged: the model of averaged weights, if any.
    """

    def __init__(
        self, folder: Path, progress: Progress, model: nn.Module, optimizer: Optimizer, averaged: nn.Module | None
    ) -> None:
        self.files = StateFiles(folder / "last.pt", folder / "previous.pt")
        self.progress = progress
        self.model, self.optimizer, self.averaged = model, optimizer, averaged
        self.start_clock()

    def start_clock(self) -> None:
        """Start counting minutes of training, on top of those in the progress."""
        self.started = self.saved = time.monotonic()
        self.minutes_before = self.progress.minutes

    @property
    def minutes_since_saved(self) -> float:
        """Minutes since the newest checkpoint was written, or the clock started."""
        return (time.monotonic() - self.saved) / 60

    def load(self) -> bool:
        """Restore the newest readable checkpoint; returns whether there is one.

        Raises:
            RunError: if checkpoints exist, but none is readable.
        """
        return bool(self.files.load(self._restore))

    def _restore(self, path: Path) -> bool:
        """Read a checkpoint completely, then set the state; wrong types or shapes count as damage."""
        state = {"accumulation": 0, "threads": 0, **read_tensors(path)}  # earlier releases did not write these two
        kinds: dict[str, type] = {
            each.name: type(getattr(self.progress, each.name)) for each in dataclasses.fields(Progress)
        }
        for name, kind in {**kinds, "model": dict, "optimizer": dict, "ema": dict}.items():
            if not isinstance(state[name], (kind, int) if kind is float else kind):
                raise TypeError(f"{name} is of type {type(state[name]).__name__}")
        check_fits(state["model"], self.model)
        if self.averaged is not None:
            check_fits(state["ema"], self.averaged)
            self.averaged.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.model.load_state_dict(state["model"])
        for name in kinds:
            setattr(self.progress, name, state[name])
        return True

    def save(self, *, write: bool) -> None:
        """Update the minutes, and write a checkpoint if `write`, which is set in one process of the run.

        Raises:
            WriteError: if it cannot be written. A readable checkpoint is kept.
        """
        self.progress.minutes = self.minutes_before + (time.monotonic() - self.started) / 60
        self.saved = time.monotonic()
        if not write:
            return
        state = {
            **dataclasses.asdict(self.progress),
            "model": self.model.state_dict(),
            "ema": self.averaged.state_dict() if self.averaged is not None else {},
            "optimizer": self.optimizer.state_dict(),
        }
        self.files.save(lambda path: write_tensors(state, path))
