"""What a run takes of its machine: memory for the parts of a batch, threads, time.

None of it changes what a recipe asks for: a step is always of `optim.batch_size` images.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any, final

import torch
from torch import nn

from ..runs.memory import free_memory
from .recipe import Recipe

__all__ = ["Pace", "accumulation_for_memory", "choose_threads", "even_accumulation"]

_FREE_SHARE = 0.8  # of the memory that is free, to be used
_MEMORY_FACTOR = 1.5  # of what the forward pass keeps: what the backward pass and the operators take beside it
_FIRST_STEPS, _FIRST_SECONDS = 20, 10.0  # whichever is over first, to estimate the others by
_SCORING = 1 / 3  # of the time of a training step on as many images
_SAMPLE = 0.3  # seconds in which the processors' load is measured


# ---- memory ----


def even_accumulation(recipe: Recipe, at_least: int) -> int | None:
    """The least number of equal parts, from `at_least` on, that a batch of one process can be cut into; None: none."""
    even = 2 if recipe.augment.mixup or recipe.augment.cutmix else 1
    size = recipe.optim.batch_size
    return next((parts for parts in range(at_least, size + 1) if size % (parts * even) == 0), None)


def accumulation_for_memory(recipe: Recipe, model: nn.Module, device: torch.device) -> int:
    """Into how many parts a batch has to be cut so that the memory that is free now is enough for each.

    At least the recipe's `optim.grad_accumulation`. The forward pass of one image tells what an image takes. If no part
    is small enough, the number of the smallest parts.
    """
    least = recipe.optim.grad_accumulation
    parameters = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory()
    room = _FREE_SHARE * free - 3 * parameters  # gradients and the optimizer's two moments
    size = max(recipe.model.img_size_shares or (recipe.model.img_size,))
    image = _MEMORY_FACTOR * _kept_bytes(model, size, device)
    smallest = least
    for parts in range(least, recipe.optim.batch_size + 1):
        if even_accumulation(recipe, parts) == parts:
            smallest = parts
            if recipe.optim.batch_size // parts * image <= room:
                break
    return smallest


def _kept_bytes(model: nn.Module, size: int, device: torch.device) -> int:
    """What the forward pass of an image keeps for the backward pass, without what is the model's own."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def keep(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    was_training = model.training
    model.eval()  # so that running statistics stay as they are
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model.forward(torch.zeros(1, 3, size, size, device=device))
    del output
    model.train(was_training)
    return sum(kept.values())


# ---- threads ----


def choose_threads(before: int = 0) -> str | None:
    """Let torch have fewer threads where other programs keep cores busy: threads that wait for a core are slow.

    Args:
        before: how many the run has had so far, to go on with as many: with other ones its numbers would be rounded
            otherwise. 0: none.

    Returns:
        A line that says so, if torch's number was changed. OMP_NUM_THREADS, where it is set, stands.
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
    """How many cores other programs use: what the load average says, if they still do."""
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
    """Of all cores together, since the machine was started."""
    _, _, _, _, idle, waiting, *_ = Path("/proc/stat").read_text().split("\n", 1)[0].split()
    return (int(idle) + int(waiting)) / os.sysconf("SC_CLK_TCK")


# ---- time ----


@final
class Pace:
    """How long the rest of a run takes, told by its first steps.

    Args:
        recipe: of the run. steps_per_epoch: of it. num_scored: images that are scored after an epoch.
    """

    def __init__(self, recipe: Recipe, steps_per_epoch: int, num_scored: int) -> None:
        self.recipe, self.steps_per_epoch = recipe, steps_per_epoch
        self.scoring = _SCORING * num_scored / recipe.optim.batch_size  # in steps
        self.first: tuple[int, float] | None = None
        self.is_told = False

    def after(self, step: int) -> str | None:
        """To be called after each step. Once, when some steps were done: 'about 12 minutes'."""
        now = time.monotonic()
        if self.first is None:  # the first step is slower: it is not counted
            self.first = (step, now)
        done, seconds = step - self.first[0], now - self.first[1]
        if self.is_told or not done or (done < _FIRST_STEPS and seconds < _FIRST_SECONDS):
            return None
        self.is_told = True
        epochs = self.recipe.optim.epochs
        left = self.steps_per_epoch * epochs - step
        if done < self.steps_per_epoch:  # else scores are in what was measured
            left += round(self.scoring * (epochs - step // self.steps_per_epoch) / self.recipe.eval_every)
        return _about(seconds / done * left)


def _about(seconds: float) -> str:
    for size, name in ((3600, "hours"), (60, "minutes")):
        if seconds >= 1.5 * size:
            return f"about {seconds / size:.{1 if seconds < 9.5 * size and size == 3600 else 0}f} {name}"
    return f"about {max(round(seconds), 1)} seconds"
