"""Restrict optimiser steps of a supernet to the weights on the step's paths, and their moments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from glit_models.parts import Slice

from .supernet import Supernet

__all__ = ["PathAdamW", "keep_to_paths"]

_AVERAGES = ("exp_avg", "exp_avg_sq", "bias_correction1", "bias_correction2")
_MOST_MASKED = 1 << 27  # elements of all masks that are kept, the newest; 0.5 GB in float32
_NEVER = 1e-20  # bias correction before the first step; above 0 to avoid a division by zero


def keep_to_paths(optimizer: Optimizer, supernet: Supernet) -> None:
    """Let steps of `optimizer` change only the weights of `supernet.paths`, and their moments.

    Optimisers skip parameters without a gradient. If only part of a parameter is used, the rest has a zero gradient,
    and would be changed by momentum and weight decay.
    """
    if isinstance(optimizer, AdamW):
        optimizer.register_step_pre_hook(PathAdamW(supernet))
    else:
        _put_back(optimizer, supernet)


def _put_back(optimizer: Optimizer, supernet: Supernet) -> None:
    """Let `optimizer` change whole parameters, then restore the unused parts."""
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


@final
class PathAdamW:
    """AdamW steps (arXiv 1711.05101) for parameters that paths use in part. Clears their gradients.

    Moments start at zero, and AdamW divides them by 1 - beta^n after n steps (Adam, arXiv 1412.6980, section 3). Here n
    is the number of steps with the element on a path; the optimiser's count is that of the whole parameter, which would
    make the steps of rarely used elements too large. 1 - beta^n is the moving average of n ones, and is stored as such:
    `bias_correction1` and `bias_correction2`, next to `exp_avg` and `exp_avg_sq` in the optimiser's state.

    A parameter is handled here from the first step that uses only a part of it. Until then, all its elements share n.

    Args:
        supernet: the supernet with these parameters.

    Attributes:
        at_once: whether to update all elements of all parameters together, which is fast on a GPU; or one parameter
            after the other, only in the used parts, which is fast on a CPU. None chooses by device.
    """

    def __init__(self, supernet: Supernet) -> None:
        self.supernet = supernet
        self.at_once: bool | None = None
        self._masks: dict[tuple[Slice, torch.device], Tensor] = {}
        self._num_masked = 0

    @torch.no_grad()
    def __call__(self, optimizer: Optimizer, *_: Any) -> None:
        """Called before each step of the optimiser."""
        used = self.supernet.partly_used()
        rows, parts, groups = [], [], []
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                is_ours = parameter in used or "bias_correction1" in optimizer.state.get(parameter, ())
                if parameter.grad is None or not is_ours:
                    continue
                averages = _averages(parameter, optimizer.state[parameter], group["betas"])
                rows.append([parameter, parameter.grad, *averages])
                parts.append(used.get(parameter, ()))
                groups.append(group)
                parameter.grad = None
        if not rows:
            return
        at_once = rows[0][0].device.type != "cpu" if self.at_once is None else self.at_once
        if at_once:
            _step(rows, self._all_masks(rows, parts), groups)
            return
        for row, taken, group in zip(rows, parts, groups, strict=True):
            if len(taken) == 1:
                row = [taken[0].inside(tensor) for tensor in row]
            _step([row], self._all_masks([row], [taken]) if len(taken) > 1 else None, [group])

    def _all_masks(self, rows: Sequence[Sequence[Tensor]], parts: Sequence[tuple[Slice, ...]]) -> list[Tensor]:
        """For each parameter, 1 where paths use it, else 0."""
        masks = [self._mask(row[0], taken[0] if taken else None) for row, taken in zip(rows, parts, strict=True)]
        for place in range(1, max(map(len, parts))):
            more = [taken[min(place, len(taken) - 1)] if taken else None for taken in parts]
            others = [self._mask(row[0], part) for row, part in zip(rows, more, strict=True)]
            masks = list(torch._foreach_maximum(masks, others))
        return masks

    def _mask(self, parameter: Tensor, part: Slice | None) -> Tensor:
        part = part or Slice.first(parameter.shape, parameter.shape)
        key = part, parameter.device
        if key in self._masks:
            return self._masks[key].view_as(parameter)
        mask = torch.zeros_like(parameter)
        part.inside(mask).fill_(1)
        self._num_masked += mask.numel()
        while self._masks and self._num_masked > _MOST_MASKED:
            self._num_masked -= self._masks.pop(next(iter(self._masks))).numel()
        self._masks[key] = mask
        return mask


def _averages(parameter: Tensor, state: dict[str, Any], betas: Sequence[float]) -> list[Tensor]:
    """The averages of a parameter, created from the optimiser's state the first time."""
    if "bias_correction1" not in state:
        steps = float(state.setdefault("step", torch.zeros(())))  # AdamW requires it when it loads a state
        for name in _AVERAGES:
            state.setdefault(name, torch.zeros_like(parameter))
        for name, beta in zip(_AVERAGES[2:], betas, strict=True):
            state[name].fill_(max(1 - beta**steps, _NEVER))
    return [state[name] for name in _AVERAGES]


def _step(rows: Sequence[Sequence[Tensor]], masks: list[Tensor] | None, groups: Sequence[dict[str, Any]]) -> None:
    """One step of AdamW.

    Args:
        rows: for each parameter its values, its gradient, and its averages in the order of `_AVERAGES`.
        masks: for each parameter 1 where it may change, else 0; None if all of it may.
        groups: for each parameter the optimiser's group.
    """
    values, grads, first, second, correction1, correction2 = map(list, zip(*rows, strict=True))
    beta1, beta2 = groups[0]["betas"]
    weights: list[Any] = [1 - beta1, 1 - beta2]
    ones = masks or [value.new_ones(()).expand_as(value) for value in values]
    if masks is not None:
        weights = [torch._foreach_mul(masks, weight) for weight in weights]
    squares = list(torch._foreach_mul(grads, grads))
    for averages, new, weight in zip(
        (first, second, correction1, correction2), (grads, squares, ones, ones), weights * 2, strict=True
    ):
        torch._foreach_lerp_(averages, new, weight)
    scales = torch._foreach_div(second, correction2)
    torch._foreach_sqrt_(scales)
    torch._foreach_add_(scales, groups[0]["eps"])
    torch._foreach_mul_(scales, correction1)
    decays = [-group["lr"] * group["weight_decay"] for group in groups]
    torch._foreach_addcmul_(values, values, ones, decays)
    directions = first if masks is None else torch._foreach_mul(first, masks)
    torch._foreach_addcdiv_(values, directions, scales, [-group["lr"] for group in groups])
