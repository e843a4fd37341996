"""Work with several processes: create accelerate's `Accelerator`, and synchronise BatchNorm over all of them."""

from __future__ import annotations

import gc
import os
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import torch
import torch.distributed.nn.functional as dist
from torch import Tensor, nn
from torch.distributed import get_world_size

from ..errors import RunError, pip_install

__all__ = ["make_accelerator", "multiplies_bf16", "release_memory", "synchronise_batchnorm"]


def release_memory() -> None:
    """Release unused memory, on a GPU too."""
    gc.collect()
    torch.cuda.empty_cache()  # has no effect if no GPU was used


def multiplies_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices faster than float32 ones."""
    capabilities: Mapping[str, Any] = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return any(capabilities.get(name) for name in ("amx_bf16", "avx512_bf16"))


def make_accelerator(device: str | torch.device | None, precision: str, some_unused: bool = False) -> Any:
    """Create accelerate's `Accelerator` for a run; a run with a single process can create several.

    `some_unused`: some parameters of the model are not used in every step.

    Raises:
        RunError: if a package that training needs is not installed.
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
    """BatchNorm2d with training statistics of [B, C, H, W] over all processes; each must have the same B.

    For CPUs: torch's SyncBatchNorm only takes GPU tensors.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        count = x.numel() // x.shape[1] * get_world_size()
        # Two passes, because the difference of squares loses the variance of large values.
        mean = dist.all_reduce(x.float().sum((0, 2, 3))) / count
        centred = x.float() - mean[:, None, None]
        variance = dist.all_reduce(centred.square().sum((0, 2, 3))) / count
        if self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            momentum = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
            self.running_mean.lerp_(mean.detach(), momentum)
            self.running_var.lerp_(variance.detach() * (count / (count - 1)), momentum)
        # F.batch_norm would not propagate gradients to the statistics passed to it.
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)


def synchronise_batchnorm(model: nn.Module, device_type: str) -> None:
    """Make every BatchNorm in `model` use the batch of all processes, in place; state dict keys do not change."""
    if device_type != "cpu":
        nn.SyncBatchNorm.convert_sync_batchnorm(model)  # replaces them in place
        return
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = _GatheredBatchNorm2d
