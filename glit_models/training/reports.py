"""Share each step's loss and requests to save or stop among processes, and seed the parts of a step."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

__all__ = ["DivergedError", "Report", "StepReports", "seed_part"]

_DIVERGED = 10.0  # a loss above this many times that of guessing, log(classes) x class weight, counts as diverged


class DivergedError(Exception):
    """Raised for a step whose loss is not finite, or far above that of guessing."""

    def __init__(self, loss: float, step: int) -> None:
        self.loss, self.step = loss, step


class Report(NamedTuple):
    """The result of a step over all processes."""

    step: int
    loss: float
    save: bool
    stop: bool


class StepReports:
    """The reports of steps. They are read after they arrive from a GPU, so that training does not wait for them.

    Args:
        accelerator: accelerator of the run.
        num_classes: number of classes of the data.
        most_weight: the largest class weight.
    """

    def __init__(self, accelerator: Any, num_classes: int, most_weight: float = 1.0) -> None:
        self.accelerator = accelerator
        self.largest = _DIVERGED * math.log(max(num_classes, 2)) * max(most_weight, 1.0)
        # Steps whose reports have not been read yet, and the events that mark their arrival.
        self.waiting: list[tuple[int, Tensor, torch.cuda.Event | None]] = []

    def add(self, step: int, loss: Tensor, *, save: bool, stop: bool) -> None:
        """Reduce the mean loss (a scalar) over all processes, and whether one of them wants to save or to stop."""
        report = torch.zeros(3, device=loss.device)
        report[0], report[1], report[2] = loss, float(save), float(stop)
        report = self.accelerator.reduce(report, "sum")
        report[0] /= self.accelerator.num_processes
        self.waiting.append((step, *_on_host(report)))

    def read(self, lag: int) -> Iterator[Report]:
        """Yield the reports of all but the last `lag` steps.

        Raises:
            DivergedError: if a loss is not finite, or far above that of guessing.
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
    """Start copying a step's report from a GPU without waiting; the event completes when the copy has arrived.

    A copy made later would have to wait for all steps queued until then.
    """
    if report.device.type != "cuda":
        return report, None
    copy = torch.empty_like(report, device="cpu", pin_memory=True).copy_(report, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()
    return copy, arrived


def seed_part(seed: int, step: int, part: int, device: torch.device) -> None:
    """Seed the generators of a part: mixup as for the whole batch (numpy), dropout for this part only (torch)."""
    np.random.seed(np.random.SeedSequence((seed, step)).generate_state(1))  # noqa: NPY002  (timm's Mixup draws from it)
    state = int(np.random.SeedSequence((seed, step, part)).generate_state(1)[0])
    torch.default_generator.manual_seed(state)
    if device.type == "cuda":
        torch.cuda.manual_seed(state)
