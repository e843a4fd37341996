"""Batches that are a function of (seed, epoch, position) alone, so that a run can stop and go on anywhere.

timm's transforms do the work; `timm.data.create_loader` is not used because its samplers and its augmentation draw
from process-wide generators whose state a checkpoint cannot hold for every worker.
"""

from __future__ import annotations

import random
import signal
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from ..errors import DataError

__all__ = ["eval_loader", "train_loader"]


class _Seeded(Dataset[tuple[Any, int]]):
    """Transforms picture `key % len` under generators seeded by (seed, key), where key = epoch * len + index."""

    def __init__(self, dataset: Any, transform: Any, seed: int) -> None:
        self.dataset = dataset
        self.transform = transform
        self.seed = seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: int) -> tuple[Any, int]:
        index = key % len(self.dataset)
        try:
            picture, label = self.dataset[index]
        except (OSError, SyntaxError) as error:
            raise DataError(f"picture {index} of the data set cannot be read: {error}") from None
        state = int(np.random.SeedSequence((self.seed, key)).generate_state(1)[0])
        random.seed(state)
        np.random.seed(state)  # noqa: NPY002  (timm's transforms draw from it)
        torch.default_generator.manual_seed(state)  # torch.manual_seed would also walk every accelerator
        return self.transform(picture), label


class _EpochSampler(Sampler[int]):
    """The keys of one epoch in its own random order, from `start` on."""

    def __init__(self, length: int, seed: int, epoch: int, start: int) -> None:
        self.keys = epoch * length + np.random.default_rng((seed, epoch)).permutation(length)[start:]

    def __len__(self) -> int:
        return len(self.keys)

    def __iter__(self) -> Iterator[int]:
        return iter(self.keys.tolist())


def train_loader(
    dataset: Any, transform: Any, batch_size: int, seed: int, epoch: int, first_batch: int = 0, num_workers: int = 0
) -> DataLoader[Any]:
    """The batches of one epoch from `first_batch` on: images [B, C, H, W] float32 and labels [B] int64.

    The last, incomplete batch is left out. Every batch is the same however many workers load it.
    """
    sampler = _EpochSampler(len(dataset), seed, epoch, first_batch * batch_size)
    return DataLoader(
        _Seeded(dataset, transform, seed),
        batch_size,
        sampler=sampler,
        num_workers=num_workers,
        drop_last=True,
        worker_init_fn=_leave_signals_to_the_parent,
    )


def eval_loader(dataset: Any, transform: Any, batch_size: int, num_workers: int = 0) -> DataLoader[Any]:
    """All pictures in order, under a transform without chance."""
    return DataLoader(
        _Seeded(dataset, transform, 0), batch_size, num_workers=num_workers, worker_init_fn=_leave_signals_to_the_parent
    )


def _leave_signals_to_the_parent(worker: int) -> None:
    """Schedulers and terminals signal the whole group; workers must live until the parent has saved."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
