"""This process among others: accelerate's view of it, and BatchNorm over the batch of all of them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import torch
import torch.distributed.nn.functional as dist
from torch import Tensor, nn
from torch.distributed import get_world_size

from ..errors import RunError, pip_install

__all__ = ["make_accelerator", "multiplies_bf16", "synchronise_batchnorm"]


def multiplies_bf16() -> bool:
    """Whether this CPU multiplies matrices of bfloat16 faster than those of float32."""
    capabilities: Mapping[str, Any] = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(capabilities.get("amx_bf16"))


def make_accelerator(device: str | torch.device | None, precision: str, some_unused: bool = False) -> Any:
    """accelerate's `Accelerator` for a run; a process that is alone in its run can make one for each of several.

    `some_unused`: steps leave some parameters of the model out.

    Raises:
        RunError: if what training needs is not installed.
    """
    if any(find_spec(name) is None for name in ("accelerate", "matplotlib")):
        raise RunError(f"training needs more than the core package: {pip_install('train')}")
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.state import AcceleratorState

    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        AcceleratorState._reset_state(reset_partial_state=True)
    wanted = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if wanted.type == "cuda" and wanted.index is not None:
        torch.cuda.set_device(wanted)
    mixed = {"fp32": "no", "bf16": "bf16"}[precision]
    # BatchNorm is synchronised, so the buffers of all processes are the same.
    handlers = [DistributedDataParallelKwargs(broadcast_buffers=False, find_unused_parameters=some_unused)]
    return Accelerator(mixed_precision=mixed, cpu=wanted.type == "cpu", kwargs_handlers=handlers)


class _GatheredBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d whose training statistics are of [B, C, H, W] over all processes, each with the same B.

    For CPUs: torch's SyncBatchNorm takes GPU tensors only.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        count = x.numel() // x.shape[1] * get_world_size()
        # Two passes, as the variance of large values would drown in the difference of squares.
        mean = dist.all_reduce(x.float().sum((0, 2, 3))) / count
        centred = x.float() - mean[:, None, None]
        variance = dist.all_reduce(centred.square().sum((0, 2, 3))) / count
        if self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            momentum = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
            self.running_mean.lerp_(mean.detach(), momentum)
            self.running_var.lerp_(variance.detach() * (count / (count - 1)), momentum)
        # F.batch_norm would not pass gradients on to the statistics that it is given.
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)


def synchronise_batchnorm(model: nn.Module, device_type: str) -> None:
    """Let every BatchNorm inside `model` see the batch of all processes, in place; their states keep their names."""
    if device_type != "cpu":
        nn.SyncBatchNorm.convert_sync_batchnorm(model)  # replaces them where they stand
        return
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = _GatheredBatchNorm2d
