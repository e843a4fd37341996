"""Count the memory of a network's images and activations on the meta device, before anything is allocated."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .errors import Argument, GlitError
from .runs.memory import free_memory

__all__ = ["bound_bytes", "check_memory", "count_bytes", "run_without_data"]

_LARGE = 512 * 512  # pixels; above, attention may take the most, since it grows with their square


class _Live(TorchDispatchMode):
    """Counts the bytes of all storages that are created within it, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.known:
                    self.known.add(storage._cdata)
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())
        return made

    def _forget(self, key: int, num_bytes: int) -> None:
        self.known.discard(key)
        self.now -= num_bytes


class _Fused(TorchFunctionMode):
    """Keeps fused attention from creating the matrix of all pairs of tokens, as it would on the meta device."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        query, _, value = args[:3]
        return query * value.mean(-2, keepdim=True)


def run_without_data(model: nn.Module, shape: tuple[int, ...], *, training: bool = False) -> Tensor:
    """Run a model on images [B, C, H, W] on the meta device, which takes no memory and little time.

    Raises:
        Exception: any, if the model does not take such images or cannot run without data.
    """
    copies: dict[int, Any] = {id(each): torch.empty_like(each, device="meta") for each in model.buffers()}
    for each in model.parameters():
        copies[id(each)] = nn.Parameter(torch.empty_like(each, device="meta"), each.requires_grad)
    hollow = copy.deepcopy(model, copies).train(training)
    with torch.set_grad_enabled(training):
        made: Tensor = hollow(torch.empty(shape, device="meta", dtype=next(hollow.parameters()).dtype))
    return made


def count_bytes(model: nn.Module, shape: tuple[int, ...], *, training: bool = False) -> int | None:
    """The peak memory in bytes of images of this shape [B, C, H, W] and their activations, in the model's type.

    None if the model cannot run without data: some compute with values, which meta tensors lack.

    Args:
        training: whether to include the backward pass and the gradients.
    """
    for attention in (_Fused(), nullcontext()):  # checkpointed blocks run again in the backward pass, without the mode
        with suppress(Exception), _Live() as live, attention:
            logits = run_without_data(model, shape, training=training)
            if training:
                logits.sum().backward()
            return live.peak
    return None


def bound_bytes(model: nn.Module, shape: tuple[int, ...], *, training: bool = False) -> float:
    """An upper bound of `count_bytes`, at once: all widths on patches of 4 x 4; infinite for large images."""
    if shape[2] * shape[3] > _LARGE:
        return float("inf")
    widths = [each.shape[0] for each in model.parameters() if each.ndim > 1]
    return shape[0] * shape[2] * shape[3] * (sum(widths) if training else max(widths, default=0))


def check_memory(
    model: nn.Module, shape: tuple[int, ...], device: torch.device, *way_out: str | Argument, training: bool = False
) -> None:
    """Raise GlitError if images of this shape [B, C, H, W] need more memory than this machine has free.

    Checks only the CPU, where the system may kill the process; on a GPU, torch raises an error.

    Args:
        way_out: end of the message.
        training: see `count_bytes`.
    """
    if device.type != "cpu":
        return
    there = free_memory()
    needed = 4 * shape[0] * shape[1] * shape[2] * shape[3]
    if needed <= there:
        if bound_bytes(model, shape, training=training) <= there:
            return
        needed = count_bytes(model, shape, training=training) or 0
    if needed > there:
        size = f"{shape[0]:,} image{'s' if shape[0] > 1 else ''} of {shape[2]} x {shape[3]} pixels"
        raise GlitError(
            f"{size} need {needed / 1e9:,.1f} GB of memory, and this machine has {there / 1e9:,.1f} GB left; ", *way_out
        )
