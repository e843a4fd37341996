"""Feed a run with batches: images through timm's transforms, or fractals drawn on the training device.

A batch is a function of (seed, epoch, step), for any number of processes and accumulated parts. This module handles
data and recipes, not models.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import ConcatDataset

from ..data import Fractals, HeldOutFractals, Splits, Subset, open_splits
from ..data.batched import TensorImages
from ..data.loading import eval_loader, part_positions, train_parts
from ..data.sources import Stream
from ..errors import Argument, DataError, RecipeError
from .recipe import Recipe
from .setup import create_eval_transform, create_train_transform

__all__ = ["Feed", "data_fingerprint", "naming_keys", "open_data"]

_STATISTICS_BATCHES = 8


@contextmanager
def naming_keys(section: str = "data") -> Iterator[None]:
    """Rename arguments of `glit_models.data` in errors to the recipe's keys that set them."""
    try:
        yield
    except DataError as error:
        parts = (
            part._replace(name=f"{section}.{part.name}") if isinstance(part, Argument) else part
            for part in error.message.parts
        )
        raise DataError(*parts) from None


def open_data(recipe: Recipe) -> Splits:
    """Open the splits that a recipe names. Raises DataError if they are not available."""
    data = recipe.data
    if data.dataset == "fractals":
        if data.train_on_validation:
            raise RecipeError("data.train_on_validation cannot be set for fractals, whose training images never end")
        fractals = Fractals(data.fractals, recipe.split_seed)
        return Splits(fractals, HeldOutFractals(fractals, 0), HeldOutFractals(fractals, 1), fractals.class_names)
    with naming_keys():
        splits = open_splits(
            data.dataset, data.root, data.hold_out, data.limit, recipe.split_seed,
            train_split=data.train_split, validation_split=data.validation_split, test_split=data.test_split,
            download=data.download, input_key=data.input_key, target_key=data.target_key,
        )  # fmt: skip
    if not data.train_on_validation:
        return splits
    if isinstance(splits.train, Stream) or isinstance(splits.validation, Stream):
        raise RecipeError(f"data.train_on_validation cannot be set for {data.dataset}, which is read as a stream")
    return dataclasses.replace(splits, train=ConcatDataset([splits.train, splits.validation]))


def data_fingerprint(recipe: Recipe) -> str | None:
    """The fingerprint of the data that a recipe names; see `Splits.fingerprint`. Raises as `open_data`."""
    return open_data(recipe).fingerprint()


def _batches_naming_keys(batches: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    with naming_keys():
        yield from batches


def _balanced_labels(recipe: Recipe, splits: Splits) -> np.ndarray:
    """The labels [N] of the training images. Raises RecipeError if classes cannot be drawn equally often."""
    key = Argument("data.balanced", True)
    if recipe.augment.repeats > 1 or recipe.augment.batched:
        other = "augment.batched" if recipe.augment.batched else "augment.repeats"
        raise RecipeError(key, " cannot be used with ", Argument(other), "; leave one of them out")
    labels = splits.train_labels()
    if labels is None or splits.is_multilabel:
        reason = "have several labels" if splits.is_multilabel else "have labels that are unknown before they are read"
        raise RecipeError(key, f" cannot be used for {recipe.data.dataset}, whose images {reason}")
    return np.array(labels)


class Feed:
    """The part of a recipe's data that one process uses.

    Args:
        preprocessing: mean, std, interpolation and crop.
        device: device of the batches.
        num_parts: number of parts that a batch is cut into. parts: the numbers of this process's parts.
        rank, world_size: of this process, for scoring.

    Raises:
        RecipeError: if the data does not support a setting of the recipe.
    """

    def __init__(
        self,
        recipe: Recipe,
        splits: Splits,
        preprocessing: dict[str, Any],
        device: torch.device,
        num_parts: int,
        parts: Sequence[int],
        rank: int,
        world_size: int,
    ) -> None:
        if isinstance(splits.train, Stream) and recipe.augment.repeats > 1:
            raise RecipeError(f"augment.repeats must be 1 for {recipe.data.dataset}, which is read as a stream, "
                              f"got {recipe.augment.repeats}")  # fmt: skip
        if isinstance(splits.train, (Stream, Fractals)) and recipe.augment.batched:
            raise RecipeError(f"augment.batched cannot be set for {recipe.data.dataset}, which has no index of images")
        self.balanced_labels = _balanced_labels(recipe, splits) if recipe.data.balanced else None
        self.recipe = recipe
        self.splits = splits
        self.device = device
        self.num_parts, self.parts = num_parts, parts
        self.eval_batch_size = recipe.eval_batch_size
        self.rank, self.world_size = rank, world_size
        self.train_transform = create_train_transform(recipe.model.img_size, recipe.augment, preprocessing)
        self.eval_transform = create_eval_transform(recipe.model.img_size, preprocessing)
        self.mean, self.std = (
            torch.tensor(preprocessing[key], device=device)[:, None, None] for key in ("mean", "std")
        )
        self.in_memory: TensorImages | None = None
        if recipe.augment.batched:
            with naming_keys("augment"):
                self.in_memory = TensorImages(splits.train, recipe.model.img_size, device)

    def steps(self, epoch: int, first_step: int) -> Iterator[list[tuple[Tensor, Tensor]]]:
        """Yield this process's parts of an epoch's batches from `first_step` on: images [B, C, H, W], labels [B]."""
        if isinstance(self.splits.train, Fractals):
            yield from self._fractal_steps(self.splits.train, epoch, first_step)
            return
        if self.in_memory is not None:
            yield from self._batched_steps(self.in_memory, epoch, first_step)
            return
        recipe = self.recipe
        loader = _batches_naming_keys(
            train_parts(
                self.splits.train, self.train_transform, batch_size=recipe.optim.batch_size, num_parts=self.num_parts,
                parts=self.parts, seed=recipe.seed, epoch=epoch, first_step=first_step, repeats=recipe.augment.repeats,
                balanced_labels=self.balanced_labels, num_workers=recipe.data.num_workers,
            )
        )  # fmt: skip
        step = first_step
        while parts := list(islice(loader, len(self.parts))):
            yield [self._place(images, labels, self._size_at(epoch, step)) for images, labels in parts]
            step += 1

    def _batched_steps(
        self, images: TensorImages, epoch: int, first_step: int
    ) -> Iterator[list[tuple[Tensor, Tensor]]]:
        recipe = self.recipe
        for parts in images.steps(
            recipe.augment, batch_size=recipe.optim.batch_size, num_parts=self.num_parts, parts=self.parts,
            seed=recipe.seed, epoch=epoch, first_step=first_step,
        ):  # fmt: skip
            yield [((part - self.mean) / self.std, labels) for part, labels in parts]

    def for_statistics(self, num_batches: int = _STATISTICS_BATCHES) -> Iterator[Tensor]:
        """Yield some training images [B, C, H, W] of the recipe's image size, the same in every process."""
        train, recipe = self.splits.train, self.recipe
        size, batch_size = recipe.model.img_size, recipe.optim.batch_size
        if isinstance(train, Fractals):
            for number in range(num_batches):
                labels = torch.arange(number * batch_size, (number + 1) * batch_size) % train.config.num_classes
                yield self._draw(train, labels, torch.full_like(labels, number), size)[0]
            return
        loader = train_parts(
            train, self.train_transform, batch_size=batch_size, num_parts=1, parts=(0,), seed=recipe.seed, epoch=0
        )
        for images, labels in islice(loader, num_batches):
            yield self._place(images, labels, size)[0]

    def _place(self, images: Tensor, labels: Tensor, size: int) -> tuple[Tensor, Tensor]:
        images = images.to(self.device, non_blocking=True)
        if images.shape[-1] != size:
            images = F.interpolate(images, size, mode="bilinear", antialias=True)
        return images, labels.to(self.device, non_blocking=True)

    def _size_at(self, epoch: int, step: int) -> int:
        """The image size of a step: the recipe's, or drawn at random from `img_size_shares`."""
        shares = self.recipe.model.img_size_shares
        if shares is None:
            return self.recipe.model.img_size
        chances = np.array(list(shares.values()))
        draw = np.random.default_rng((self.recipe.seed, epoch, step)).choice(len(shares), p=chances / chances.sum())
        return list(shares)[draw]

    def _fractal_steps(self, fractals: Fractals, epoch: int, first_step: int) -> Iterator[list[tuple[Tensor, Tensor]]]:
        size = self.recipe.optim.batch_size
        order = np.random.default_rng((self.recipe.seed, epoch)).permutation(len(fractals))
        classes = fractals.config.num_classes
        for step in range(first_step, len(fractals) // size):
            batch = order[step * size : (step + 1) * size]
            parts = []
            for part in self.parts:
                members = torch.from_numpy(batch[part_positions(size, self.num_parts, part)])
                labels, instances = members % classes, members // classes
                index = epoch * fractals.config.instances + instances
                parts.append(self._draw(fractals, labels, index, self._size_at(epoch, step)))
            yield parts

    def _draw(self, fractals: Fractals, labels: Tensor, index: Tensor, size: int) -> tuple[Tensor, Tensor]:
        images = fractals.batch(labels, index, size, self.device)
        labels = labels.to(self.device, non_blocking=True)  # otherwise the host waits for all work queued on a GPU
        return (images.float() / 255 - self.mean) / self.std, labels

    def scoring(self, dataset: Any, order: Sequence[int] | None = None) -> tuple[Iterable[tuple[Tensor, Tensor]], int]:
        """This process's share of a split as batches, and the number of images of all shares together.

        `order`: positions of the images to take; None takes all in order.
        """
        if isinstance(dataset, HeldOutFractals):
            positions = torch.arange(len(dataset)) if order is None else torch.tensor(order)
            return self._held_out_fractals(dataset, positions), len(positions)
        if order is not None:
            dataset = Subset(dataset, order)
        recipe = self.recipe
        loader = eval_loader(
            dataset, self.eval_transform, self.eval_batch_size, recipe.data.num_workers, self.rank, self.world_size
        )
        return _batches_naming_keys(loader), len(dataset)

    def _held_out_fractals(self, held_out: HeldOutFractals, positions: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        for chunk in positions[self.rank :: self.world_size].split(self.eval_batch_size):
            yield self._draw(held_out.fractals, *held_out.members(chunk), self.recipe.model.img_size)
