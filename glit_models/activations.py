"""How much memory a network's images and activations take, counted on tensors without data before any are made."""

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

_LARGE = 512 * 512  # pixels: above it attention, which grows with the square of them, may take the most


class _Live(TorchDispatchMode):
    """Counts the bytes of all storages that are made within it, and the most that there are at one time."""

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
    """Lets fused attention take what it takes with data; without, it would make the matrix of all pairs of tokens."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        query, _, value = args[:3]
        return query * value.mean(-2, keepdim=True)


def run_without_data(model: nn.Module, shape: tuple[int, ...], *, training: bool = False) -> Tensor:
    """What a model makes of images [B, C, H, W], on tensors that have shapes alone; takes no memory and little time.

    Raises:
        Exception: any, of a model that does not take such images, or cannot be run without data.
    """
    copies: dict[int, Any] = {id(each): torch.empty_like(each, device="meta") for each in model.buffers()}
    for each in model.parameters():
        copies[id(each)] = nn.Parameter(torch.empty_like(each, device="meta"), each.requires_grad)
    hollow = copy.deepcopy(model, copies).train(training)
    with _Fused(), torch.set_grad_enabled(training):
        made: Tensor = hollow(torch.empty(shape, device="meta", dtype=next(hollow.parameters()).dtype))
    return made


def count_bytes(model: nn.Module, shape: tuple[int, ...], *, training: bool = False) -> int:
    """The most that images of this shape [B, C, H, W] and what is computed of them take at one time.

    Args:
        training: with what the backward pass needs, and the gradients.

    Raises:
        Exception: any, of a model that cannot be run on tensors without data.
    """
    with _Live() as live:
        logits = run_without_data(model, shape, training=training)
        if training:
            logits.sum().backward()
    return live.peak


def check_memory(
    model: nn.Module, shape: tuple[int, ...], device: torch.device, *way_out: str | Argument, training: bool = False
) -> None:
    """Raise GlitError if images of this shape [B, C, H, W] need more memory than this machine has left.

    Only on the CPU, where the system may end the process: a GPU's library raises an error. Nothing is counted where
    even all of the network's widths at once, for patches of 4 x 4 pixels, would fit.

    Args:
        way_out: ends the message.
        training: as `count_bytes`.
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
        except Exception:  # some models compute with numbers, which these tensors lack
            return
    if needed > there:
        size = f"{shape[0]:,} image{'s' if shape[0] > 1 else ''} of {shape[2]} x {shape[3]} pixels"
        raise GlitError(
            f"{size} need {needed / 1e9:,.1f} GB of memory, and this machine has {there / 1e9:,.1f} GB left; ", *way_out
        )
