"""Count the memory of a network's images and activations on the meta device, before anything is allocated."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .errors import Argument, GlitError
from .runs.memory import free_memory

__all__ = ["check_memory", "count_bytes", "run_without_data"]

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
    with _Fused(), torch.set_grad_enabled(training):
        made: Tensor = hollow(torch.empty(shape, device="meta", dtype=next(hollow.parameters()).dtype))
    return made


def count_bytes(model: nn.Module, shape: tuple[int, ...], *, training: bool = False) -> int:
    """The peak memory in bytes of images of this shape [B, C, H, W] and their activations.

    Args:
        training: whether to include the backward pass and the gradients.

    Raises:
        Exception: any, if the model cannot run without data.
    """
    with _Live() as live:
        logits = run_without_data(model, shape, training=training)
        if training:
            logits.sum().backward()
    return live.peak


def check_memory(
    model: nn.Module, shape: tuple[int, ...], device: torch.device, *way_out: str | Argument, training: bool = False
) -> None:
    """Raise GlitError if images of this shape [B, C, H, W] need more memory than this machine has free.

    Checks only the CPU, where the system may kill the process; on a GPU, torch raises an error. Counting is skipped if
    all of the network's widths together would fit with patches of 4 x 4 pixels.

    Args:
        way_out: end of the message.
        training: see `count_bytes`.
    """
    if device.type != "cpu":
        return
    there = free_memory()
    needed = 4 * shape[0] * shape[1] * shape[2] * shape[3]
    if needed <= there:
        widths = [each.shape[0] for each in model.parameters() if each.ndim > 1]
        tokens = shape[0] * shape[2] * shape[3] / 16
        most = 16 * tokens * (sum(widths) if training else max(widths, default=0))
        if most <= there and shape[2] * shape[3] <= _LARGE:
            return
        try:
            needed = count_bytes(model, shape, training=training)
        except Exception:  # some models compute with values, which meta tensors lack
            return
    if needed > there:
        size = f"{shape[0]:,} image{'s' if shape[0] > 1 else ''} of {shape[2]} x {shape[3]} pixels"
        raise GlitError(
            f"{size} need {needed / 1e9:,.1f} GB of memory, and this machine has {there / 1e9:,.1f} GB left; ", *way_out
        )
