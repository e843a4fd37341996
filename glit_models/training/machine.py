"""Fit a run to its machine: the memory for parts of a batch, the number of threads, and the time it will take.

This never changes what a recipe asks for: each step has `optim.batch_size` images.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import final

import torch
from torch import nn

from ..activations import bound_bytes, check_memory, count_bytes
from ..errors import GlitError
from ..runs.memory import free_memory
from .recipe import Recipe

__all__ = [
    "Pace",
    "accumulation_for_memory",
    "choose_threads",
    "even_accumulation",
    "scoring_batch",
    "smallest_parts",
]

_FREE_SHARE = 0.8  # usable share of the free memory
_HALF_SHARE = 0.6  # of the memory of activations, under autocast; 0.52 to 0.56 for GLiT, DeiT, ResNet-18 and ConvNeXt
_FIRST_STEPS, _FIRST_SECONDS = 20, 10.0  # whichever ends first; the estimate is based on them
_SCORING = 1 / 3  # of the time of a training step with as many images
_SAMPLE = 0.3  # seconds for measuring the processors' load


# ---- memory ----


def even_accumulation(recipe: Recipe, at_least: int) -> int | None:
    """The smallest number of equal parts, at least `at_least`, that a batch divides into; None if there is none."""
    size, smallest = recipe.optim.batch_size, _smallest_part(recipe)
    return next((parts for parts in range(at_least, size + 1) if size % (parts * smallest) == 0), None)


def smallest_parts(recipe: Recipe) -> int:
    """The largest number of equal parts that a batch of one process divides into."""
    return recipe.optim.batch_size // _smallest_part(recipe)


def _smallest_part(recipe: Recipe) -> int:
    """The number of images of the smallest part; images are mixed in pairs."""
    return 2 if recipe.augment.mixup or recipe.augment.cutmix else 1


def scoring_batch(recipe: Recipe, model: nn.Module, device: torch.device) -> int:
    """The number of images to score at a time: `eval_batch_size`, halved until it fits into a CPU's free memory."""
    size, images = recipe.model.img_size, recipe.eval_batch_size
    while images > 1:
        try:
            check_memory(model, (images, _channels(model), size, size), device)
            break
        except GlitError:
            images //= 2
    return images


def accumulation_for_memory(recipe: Recipe, model: nn.Module, device: torch.device) -> int:
    """The number of parts that a batch has to be split into so that the free memory suffices for each.

    It is at least the recipe's `optim.grad_accumulation`, and equal to it if the model cannot be counted. If no part is
    small enough, returns the number of the smallest parts.
    """
    least = recipe.optim.grad_accumulation
    moments = 2 * sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory()
    room = (_FREE_SHARE * free - moments) / (1 if recipe.precision == "fp32" else _HALF_SHARE)
    size = max(recipe.model.img_size_shares or (recipe.model.img_size,))
    image = _channels(model), size, size
    if bound_bytes(model, (recipe.optim.batch_size // least, *image), training=True) <= room:
        return least
    one, two = (count_bytes(model, (images, *image), training=True) for images in (1, 2))
    if one is None or two is None:
        return least
    smallest = least
    for parts in range(least, recipe.optim.batch_size + 1):
        if even_accumulation(recipe, parts) == parts:
            smallest = parts
            if one + (recipe.optim.batch_size // parts - 1) * (two - one) <= room:
                break
    return smallest


def _channels(model: nn.Module) -> int:
    channels: int = getattr(model, "in_chans", 3)
    return channels


# ---- threads ----


def choose_threads(before: int = 0) -> str | None:
    """Reduce torch's threads if other programs keep cores busy, because threads that wait for a core are slow.

    Args:
        before: number of threads of the run so far, which it keeps because another number rounds differently; 0 if it
            has not started.

    Returns:
        A line to print if the number was changed. OMP_NUM_THREADS, if set, is never overridden.
    """
    now = torch.get_num_threads()
    if "OMP_NUM_THREADS" in os.environ or before == now:
        return None
    if before:
        torch.set_num_threads(before)
        return f"{_count(before)} as before, so that the results are the same (OMP_NUM_THREADS={now} takes {now})"
    busy = _busy_cores()
    chosen = max(1, min(now, round((os.cpu_count() or 1) - busy)))
    if chosen == now:
        return None
    torch.set_num_threads(chosen)
    return f"{_count(chosen)}, as other programs keep {busy:.1f} cores busy (OMP_NUM_THREADS={now} takes {now})"


def _count(threads: int) -> str:
    return f"{threads} thread{'' if threads == 1 else 's'}"


def _busy_cores() -> float:
    """The number of cores that other programs use: the load average, bounded by the current use."""
    try:
        load = os.getloadavg()[0]
        if load < 0.5:
            return 0.0
        idle, began = _idle_seconds(), time.monotonic()
        time.sleep(_SAMPLE)
        now = (os.cpu_count() or 1) - (_idle_seconds() - idle) / (time.monotonic() - began)
    except (OSError, AttributeError, ValueError, IndexError):  # not Linux
        return 0.0
    return max(0.0, min(load, now))


def _idle_seconds() -> float:
    """Idle seconds of all cores together since the machine started."""
    _, _, _, _, idle, waiting, *_ = Path("/proc/stat").read_text().split("\n", 1)[0].split()
    return (int(idle) + int(waiting)) / os.sysconf("SC_CLK_TCK")


# ---- time ----


@final
class Pace:
    """Estimates the remaining time of a run from its first steps.

    Args:
        recipe: recipe of the run. steps_per_epoch: number of steps. num_scored: number of images scored after an epoch.
    """

    def __init__(self, recipe: Recipe, steps_per_epoch: int, num_scored: int) -> None:
        self.recipe, self.steps_per_epoch = recipe, steps_per_epoch
        self.scoring = _SCORING * num_scored / recipe.optim.batch_size  # in steps
        self.first: tuple[int, float] | None = None
        self.is_told = False

    def after(self, step: int) -> str | None:
        """Call after each step. Returns the estimate, such as 'about 12 minutes', once, after the first steps."""
        now = time.monotonic()
        if self.first is None:  # the first step is slower and not counted
            self.first = (step, now)
        done, seconds = step - self.first[0], now - self.first[1]
        if self.is_told or not done or (done < _FIRST_STEPS and seconds < _FIRST_SECONDS):
            return None
        self.is_told = True
        epochs = self.recipe.optim.epochs
        left = self.steps_per_epoch * epochs - step
        if done < self.steps_per_epoch:  # otherwise the measured time includes scoring
            left += round(self.scoring * (epochs - step // self.steps_per_epoch) / self.recipe.eval_every)
        return _about(seconds / done * left)


def _about(seconds: float) -> str:
    for size, name in ((3600, "hours"), (60, "minutes")):
        if seconds >= 1.5 * size:
            return f"about {seconds / size:.{1 if seconds < 9.5 * size and size == 3600 else 0}f} {name}"
    return f"about {max(round(seconds), 1)} seconds"
