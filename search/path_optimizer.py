"""Steps of an optimiser that change nothing of a supernet but the weights on the step's paths, and their moments."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from glit_models.parts import Slice

from .supernet import Supernet

__all__ = ["keep_outside_paths"]


def keep_outside_paths(optimizer: Optimizer, supernet: Supernet) -> None:
    """Let steps of `optimizer` change nothing but the weights of `supernet.paths`, and their moments.

    Parameters without a gradient are left alone by every optimiser. Of one that is used in part, the rest has a
    gradient of zero, and would be moved by momentum and by weight decay: it is put back after the step.
    """
    kept: list[tuple[Tensor, Tensor, tuple[Slice, ...]]] = []  # a tensor, its values before the step, its used parts

    @torch.no_grad()
    def before(*_: Any) -> None:
        for parameter, parts in supernet.partly_used().items():
            state = optimizer.state.get(parameter, {}).values()
            moments = (value for value in state if isinstance(value, Tensor) and value.shape == parameter.shape)
            kept.extend((tensor, tensor.clone(), parts) for tensor in (parameter.detach(), *moments))

    @torch.no_grad()
    def after(*_: Any) -> None:
        for tensor, values, parts in kept:
            for part in parts:
                part.inside(values).copy_(part.inside(tensor))
            tensor.copy_(values)
        kept.clear()

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)
