"""Data loaders whose batches are a function of (seed, epoch, position), so that a run can stop, resume and be shared.

timm's transforms do the work; `timm.data.create_loader` is not used because its samplers and its augmentation draw
from process-wide generators, whose states in the workers a checkpoint cannot hold.

`B` is the number of images of a step over all processes, `b` that of one part of it.
"""

from __future__ import annotations

import atexit
import multiprocessing
import random
import signal
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, default_collate, get_worker_info

from ..errors import Argument, DataError, failure_of_machine, first_line
from .sources import Stream

__all__ = ["Batches", "eval_loader", "part_positions", "train_parts"]

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Batches:
    """The batches of a `DataLoader` (images [b, C, H, W] float32, labels [b] int64), and the errors of its workers.

    Labels are the data set's, collated.

    Iterating raises DataError if an image cannot be read, also in a worker, if a worker has died, or if there are fewer
    images than `stream`, if given, declares.
    """

    def __init__(self, loader: DataLoader[Any], length: int, stream: Stream | None = None) -> None:
        self.loader = loader
        self.length = length
        self.stream = stream

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[tuple[Tensor, Any]]:
        others = set(multiprocessing.active_children())
        with _signals_held():
            batches: Any = iter(self.loader)
        _workers.update(set(multiprocessing.active_children()) - others)
        images = 0
        try:
            while True:
                batch = next(batches, None)
                if batch is None:
                    break
                if isinstance(batch, DataError):  # returned by a worker; raised there, it would include a traceback
                    raise batch
                if isinstance(batch, int):
                    images += batch
                elif batch:
                    yield batch[0], batch[1]
        except RuntimeError as error:
            raise failure_of_machine(error) or error from None
        finally:
            batches = None  # ends its workers even if a traceback keeps this frame alive
        if self.stream is not None and images != len(self.stream):
            raise DataError(f"{self.stream.name} promises {len(self.stream)} images, and {images} could be read")


@contextmanager
def _signals_held() -> Iterator[None]:
    """Hold signals back while workers start. They inherit that, so none ends them before they ignore signals."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_workers: weakref.WeakSet[Any] = weakref.WeakSet()


@atexit.register
def _end_workers() -> None:
    """Kill the workers: Python ends them with SIGTERM, which they ignore, and then waits for them."""
    for process in _workers:
        if process.is_alive():
            process.kill()


# ---- map-style data sets ----


class _Seeded(Dataset[Any]):
    """Transforms image `key % len` under generators seeded by (seed, key)."""

    def __init__(self, dataset: Any, transform: Any, seed: int) -> None:
        self.dataset = dataset
        self.transform = transform
        self.seed = seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: int) -> tuple[Any, int] | DataError:
        index = key % len(self.dataset)
        try:
            image, label = self.dataset[index]
        except DataError as error:
            return error
        except (OSError, SyntaxError) as error:
            return DataError(f"image {index} of the data set cannot be read: {first_line(error)}")
        _seed_generators(self.seed, key)
        return self.transform(image), label


def balanced_order(labels: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw as many images as there are labels [N], every class equally often (but for a remainder).

    Within a class every image is drawn before one is drawn again.

    Returns:
        Indices [N] in random order, and for each the number of times [N] that it was drawn before.
    """
    classes = rng.permutation(np.unique(labels))
    drawn, before = [], []
    for place, label in enumerate(classes):
        members = np.flatnonzero(labels == label)
        count = len(labels) // len(classes) + (place < len(labels) % len(classes))
        rounds = -(-count // len(members))
        drawn.append(np.concatenate([rng.permutation(members) for _ in range(rounds)])[:count])
        before.append(np.repeat(np.arange(rounds), len(members))[:count])
    order = rng.permutation(len(labels))
    return np.concatenate(drawn)[order], np.concatenate(before)[order]


class _PartKeys(Sampler[list[int]]):
    """The keys of this process's parts, step by step: key = (epoch * most + repetition) * len + index.

    `most` is the maximum number of repetitions of an image in an epoch.
    """

    def __init__(
        self, length: int, batch_size: int, num_parts: int, parts: Sequence[int], seed: int, epoch: int,
        first_step: int, repeats: int, balanced_labels: np.ndarray | None,
    ) -> None:  # fmt: skip
        rng = np.random.default_rng((seed, epoch))
        if balanced_labels is None:
            most, indices = repeats, np.repeat(rng.permutation(length), repeats)[:length]
            repetition = np.tile(np.arange(repeats), length)[:length]
        else:
            most = length
            indices, repetition = balanced_order(balanced_labels, rng)
        self.keys = (epoch * most + repetition) * length + indices
        self.batch_size = batch_size
        self.repeats = repeats
        self.positions = [part_positions(batch_size, num_parts, part) for part in parts]
        self.steps = range(first_step, length // batch_size)

    def __len__(self) -> int:
        return len(self.steps) * len(self.positions)

    def __iter__(self) -> Iterator[list[int]]:
        for step in self.steps:
            keys = self.keys[step * self.batch_size : (step + 1) * self.batch_size]
            # All first repetitions, then all second ones: an image's repetitions go to different parts.
            keys = np.concatenate([keys[first :: self.repeats] for first in range(self.repeats)])
            yield from (keys[positions].tolist() for positions in self.positions)


def part_positions(batch_size: int, num_parts: int, part: int) -> np.ndarray:
    """Positions [b], ascending, of one of `num_parts` equal parts in a batch of `batch_size`.

    timm's Mixup pairs position i of its input with position len - 1 - i. So a part of even size is a run of positions
    and its mirror image: each position's partner in the batch is also its partner in the part, and mixing the parts one
    by one (with one draw of lambda and box) equals mixing the batch. A part of odd size is a plain slice.
    """
    size = batch_size // num_parts
    if size % 2:
        return np.arange(part * size, (part + 1) * size)
    run = np.arange(part * size // 2, (part + 1) * size // 2)
    return np.concatenate([run, batch_size - 1 - run[::-1]])


def train_parts(
    dataset: Any, transform: Any, *, batch_size: int, num_parts: int, parts: Sequence[int], seed: int, epoch: int,
    first_step: int = 0, repeats: int = 1, balanced_labels: np.ndarray | None = None, num_workers: int = 0,
) -> Batches:  # fmt: skip
    """Load the parts of an epoch's batches that belong to one process: `len(parts)` per step, in order.

    The batch of a step is cut into equal parts, for processes and for accumulated gradients; see `part_positions`. Its
    images do not depend on the number of parts or on `num_workers`, unless `dataset` is a `Stream`, of which each
    process reads a separate share.

    Args:
        dataset: map-style pairs of (PIL image, label), or a `Stream`.
        transform: image -> tensor [C, H, W]; seeded for each image.
        batch_size: B, a multiple of `num_parts`. An epoch has len(dataset) // B steps; the remaining images are left
            out, different ones in each epoch.
        num_parts: processes times accumulated parts.
        parts: numbers, from 0, of this process's parts.
        first_step: step of the epoch to resume from.
        repeats: repeated augmentation (Hoffer et al., arXiv 1901.09335; DeiT's RASampler): an epoch has each image this
            many times, differently augmented, and this many times fewer images. 1 for a `Stream`.
        balanced_labels: the labels [N] of the data set, to draw every class equally often; see `balanced_order`. Only
            without `repeats`.

    Returns:
        Images [b, C, H, W] float32 and labels [b] int64, with b = B / num_parts.

    Raises:
        DataError: while iterating, on an image that cannot be read.
    """
    if not isinstance(dataset, Stream):
        keys = _PartKeys(len(dataset), batch_size, num_parts, parts, seed, epoch, first_step, repeats, balanced_labels)
        return Batches(_loader(_Seeded(dataset, transform, seed), keys, num_workers), len(keys))
    if repeats > 1:
        raise ValueError(f"repeats must be 1 for a stream, got {repeats}")
    size, world_size = batch_size // num_parts, num_parts // len(parts)
    count = len(dataset) // batch_size * len(parts)
    stream = _StreamParts(
        dataset, transform, size, (seed, epoch), (parts[0] // len(parts), world_size), count, first_step * len(parts)
    )
    # A reader that divides its shards among processes distinguishes them only in its workers.
    num_workers = max(num_workers, 1 if world_size > 1 else 0)
    return Batches(_stream_loader(stream, num_workers, (seed, epoch)), count - first_step * len(parts))


def eval_loader(
    dataset: Any, transform: Any, batch_size: int, num_workers: int = 0, rank: int = 0, world_size: int = 1
) -> Batches:
    """Load images `rank`, `rank + world_size`, ... in order with a deterministic transform; each once over all ranks.

    Raises:
        DataError: while iterating, on an image that cannot be read, or if a `Stream` has fewer images than it declares.
    """
    if isinstance(dataset, Stream):
        stream = _StreamShare(dataset, transform, batch_size, rank, world_size)
        length = -(-len(range(rank, len(dataset), world_size)) // batch_size)
        return Batches(_stream_loader(stream, num_workers, (0, 0)), length, dataset)
    indices = range(rank, len(dataset), world_size)
    batches = [indices[start : start + batch_size] for start in range(0, len(indices), batch_size)]
    return Batches(_loader(_Seeded(dataset, transform, 0), batches, num_workers), len(batches))


# ---- streamed data sets ----


class _StreamParts(IterableDataset[Any]):
    """Yields parts w, w + W, ... of `count` in worker w of W: a loader collects from its workers in this order."""

    def __init__(
        self, stream: Stream, transform: Any, size: int, state: tuple[int, int], place: tuple[int, int], count: int,
        first: int,
    ) -> None:  # fmt: skip
        self.stream, self.transform, self.size, self.state = stream, transform, size, state
        self.place, self.count, self.first = place, count, first

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        worker, num_workers = (info.id, info.num_workers) if info else (0, 1)
        (seed, epoch), (rank, world_size) = self.state, self.place
        images = self.stream.read(seed, epoch, self.size, rank, world_size)
        for number in range(worker, self.count, num_workers):
            try:
                part = list(islice(images, self.size))
            except DataError as error:
                yield error
                return
            if len(part) < self.size:
                yield DataError(
                    f"{self.stream.name} has too few images for worker {worker + 1} of {num_workers} of process "
                    f"{rank + 1} of {world_size}; set ",
                    Argument("num_workers"),
                    " lower, to have a file or more for each",
                )
                return
            if number < self.first:
                yield ()  # trained on before the run was stopped
                continue
            samples = []
            for position, (image, label) in enumerate(part):
                _seed_generators(seed, epoch, rank, number, position)
                samples.append((self.transform(image), label))
            yield default_collate(samples)


class _StreamShare(IterableDataset[Any]):
    """Every `world_size`-th image that a worker reads, in batches; the last item is the number of images it read.

    Every process reads all images: timm's readers would rather give some images twice than too few.
    """

    def __init__(self, stream: Stream, transform: Any, batch_size: int, rank: int, world_size: int) -> None:
        self.stream, self.transform, self.batch_size = stream, transform, batch_size
        self.rank, self.world_size = rank, world_size

    def __iter__(self) -> Iterator[Any]:
        samples = []
        number = -1
        try:
            for number, (image, label) in enumerate(self.stream.read(0, 0)):
                if number % self.world_size == self.rank:
                    samples.append((self.transform(image), label))
                if len(samples) == self.batch_size:
                    yield default_collate(samples)
                    samples = []
        except DataError as error:
            yield error
            return
        if samples:
            yield default_collate(samples)
        yield number + 1


# ---- loaders ----


def _seed_generators(*state: int) -> None:
    """Seed the generators that timm's transforms use."""
    number = int(np.random.SeedSequence(state).generate_state(1)[0])
    random.seed(number)
    np.random.seed(number)  # noqa: NPY002
    torch.default_generator.manual_seed(number)  # torch.manual_seed would also seed every accelerator


def _loader(dataset: Dataset[Any], batches: Iterable[Any], num_workers: int) -> DataLoader[Any]:
    return DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=_collate,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_leave_signals_to_the_parent,
        generator=torch.Generator(),
    )


def _stream_loader(dataset: IterableDataset[Any], num_workers: int, state: tuple[int, int]) -> DataLoader[Any]:
    seed = int(np.random.SeedSequence(state).generate_state(1)[0])  # the workers' seeds are derived from it
    return DataLoader(
        dataset,
        batch_size=None,
        collate_fn=_as_it_is,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_leave_signals_to_the_parent,
        generator=torch.Generator().manual_seed(seed),
    )


def _collate(samples: list[Any]) -> Any:
    return next((sample for sample in samples if isinstance(sample, DataError)), None) or default_collate(samples)


def _as_it_is(batch: Any) -> Any:
    return batch


def _leave_signals_to_the_parent(worker: int) -> None:
    """Ignore signals in workers: schedulers and terminals signal the whole group, and the parent must save first."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
