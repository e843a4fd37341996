"""A step's randomness and its report: the loss on its way from the device, and whether to save and to stop."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

__all__ = ["DivergedError", "Report", "StepReports", "seed_part"]

_DIVERGED = 10.0  # a loss beyond so many times that of guessing, log(classes), is taken for divergence


class DivergedError(Exception):
    """A step whose loss is not finite, or far beyond that of guessing."""

    def __init__(self, loss: float, step: int) -> None:
        self.loss, self.step = loss, step


class Report(NamedTuple):
    """What all processes agreed on after a step."""

    step: int
    loss: float
    save: bool
    stop: bool


class StepReports:
    """The reports of steps, which are read once they have arrived from a GPU: training does not wait for them.

    Args:
        accelerator: of the run.
        num_classes: of the data.
    """

    def __init__(self, accelerator: Any, num_classes: int) -> None:
        self.accelerator = accelerator
        self.largest = _DIVERGED * math.log(num_classes)
        # Steps whose reports have not been read yet, and what tells that they have arrived.
        self.waiting: list[tuple[int, Tensor, torch.cuda.Event | None]] = []

    def add(self, step: int, loss: Tensor, *, save: bool, stop: bool) -> None:
        """Agree with the other processes on the mean loss (a scalar), and whether one wants to save or to stop."""
        report = torch.zeros(3, device=loss.device)
        report[0], report[1], report[2] = loss, float(save), float(stop)
        report = self.accelerator.reduce(report, "sum")
        report[0] /= self.accelerator.num_processes
        self.waiting.append((step, *_on_host(report)))

    def read(self, lag: int) -> Iterator[Report]:
        """The reports of all but the last `lag` steps.

        Raises:
            DivergedError: if a loss is not finite, or far beyond that of guessing.
        """
        while len(self.waiting) > lag:
            step, report, arrived = self.waiting.pop(0)
            if arrived is not None:
                arrived.synchronize()
            loss, save, stop = report.tolist()
            if not loss <= self.largest:
                self.waiting.clear()
                raise DivergedError(loss, step - 1)
            yield Report(step, loss, save > 0, stop > 0)


def _on_host(report: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """Start copying a step's report from a GPU, without waiting; the event is over once the copy has arrived.

    Read later, the report itself would be copied after all steps that are queued by then.
    """
    if report.device.type != "cuda":
        return report, None
    copy = torch.empty_like(report, device="cpu", pin_memory=True).copy_(report, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()
    return copy, arrived


def seed_part(seed: int, step: int, part: int, device: torch.device) -> None:
    """Seed what a part draws from: mixup as for the whole batch (numpy), dropout for the part alone (torch)."""
    np.random.seed(np.random.SeedSequence((seed, step)).generate_state(1))  # noqa: NPY002  (timm's Mixup draws from it)
    state = int(np.random.SeedSequence((seed, step, part)).generate_state(1)[0])
    torch.default_generator.manual_seed(state)
    if device.type == "cuda":
        torch.cuda.manual_seed(state)
