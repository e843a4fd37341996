"""Measure the overhead of the Trainer per training step, compared with a plain PyTorch loop.

The plain loop has the same model, data and optimiser, and only the necessary parts: torch's DataLoader, autocast if the
Trainer uses it, backward pass, gradient clipping, optimiser. It has no schedule, seeding, divergence check, records or
checkpoints, and reads its loss only at the end, so that nothing waits for a GPU. A round is an epoch of each on every
case, in turns; loading the images is part of a step, starting the loader and the first steps are not. With `--clock
cpu` the loader's workers are not counted.
"""

import argparse
import statistics
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice, product, repeat
from tempfile import TemporaryDirectory
from typing import TypeVar

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset

from glit_models.data import open_splits
from glit_models.training import Recipe, Trainer, load_recipe, setup

from . import report

FIXED = "none"  # instead of a number of workers: repeat one batch, to measure only the step
T = TypeVar("T")


def main() -> None:
    """Measure and print."""
    parser = report.parser(__doc__.splitlines()[0] if __doc__ else None, rounds=5)
    parser.add_argument("--device", type=report.device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--models", default="deit_tiny_patch16_224,glit_tiny", help="names, separated by commas")
    parser.add_argument("--workers", default="0,1", help=f"numbers of workers, or {FIXED!r}; separated by commas")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--img-size", type=int, default=224, help="pixels per side")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=4, help="measured steps per round")
    parser.add_argument("--warmup", type=int, default=1, help="warm-up steps before these")
    report.add_clock(parser)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    cases = list(product(options.models.split(","), options.workers.split(",")))
    measured: dict[tuple[str, str], list[tuple[float, ...]]] = {case: [] for case in cases}
    for number, (model, workers) in product(range(options.rounds), cases):
        recipe = _recipe(options, model, workers)
        if number % 2:  # alternate the order
            plain = _time_plain(recipe, options, workers)
            trainer = _time_trainer(recipe, options, workers)
        else:
            trainer = _time_trainer(recipe, options, workers)
            plain = _time_plain(recipe, options, workers)
        measured[model, workers].append((plain, *trainer))
    rows = [_row(options, *case, rounds) for case, rounds in measured.items()]
    report.show("training", options, rows)


def _row(options: argparse.Namespace, model: str, workers: str, rounds: list[tuple[float, ...]]) -> report.Row:
    plain, trainer, checkpoint, curves = (statistics.median(column) for column in zip(*rounds, strict=True))
    more = sorted(100 * (ours / theirs - 1) for theirs, ours, *_ in rounds)
    return {
        "model": model,
        "device": report.device_name(options.device),
        "workers": workers,
        "plain, ms a step": plain * 1e3,
        "Trainer, ms a step": trainer * 1e3,
        "plain, images/s": options.batch_size / plain,
        "Trainer, images/s": options.batch_size / trainer,
        "overhead, %": f"{statistics.median(more):.1f} ({more[0]:.1f} to {more[-1]:.1f})",
        "checkpoint, ms": checkpoint * 1e3,
        "curves, ms": curves * 1e3,
    }


def _recipe(options: argparse.Namespace, model: str, workers: str) -> Recipe:
    """The recipe fashion_mnist for one epoch of the requested steps, without a second copy of the weights."""
    keys = {
        "model.name": model,
        "model.pretrained": "false",
        "model.img_size": options.img_size,
        "model.drop_path_rate": 0,
        "data.hold_out": 10,
        "data.limit": options.batch_size * (options.warmup + options.steps),
        "data.num_workers": 0 if workers == FIXED else workers,
        "optim.batch_size": options.batch_size,
        "optim.epochs": 1,
        "optim.ema_decay": "null",
        "precision": options.precision,
        "checkpoint_minutes": 60,  # measured separately
    }
    return load_recipe("fashion_mnist", [f"{key}={value}" for key, value in keys.items()])


class _Stopwatch:
    """Measures the steps between warm-up and end, from requesting a batch to requesting the next one."""

    def __init__(self, options: argparse.Namespace, fixed: bool) -> None:
        self.marks = (options.warmup, options.warmup + options.steps)
        self.fixed = fixed
        self.device = torch.device(options.device)
        self.now = report.CLOCKS[options.clock]
        self.times: list[float] = []

    def over(self, batches: Iterator[T]) -> Iterator[T]:
        if self.fixed:
            batches = repeat(next(batches))
        for done, batch in enumerate(islice(batches, self.marks[1]), 1):
            yield batch
            if done in self.marks:
                self._wait()
                self.times.append(self.now())

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    @property
    def seconds_per_step(self) -> float:
        start, end = self.times
        return (end - start) / (self.marks[1] - self.marks[0])


def _time_trainer(recipe: Recipe, options: argparse.Namespace, workers: str) -> tuple[float, float, float]:
    """Seconds per step, per checkpoint and per drawing of the curves, in a whole run in a separate folder."""
    watch = _Stopwatch(options, workers == FIXED)
    with TemporaryDirectory() as folder:
        trainer = Trainer(recipe, folder, options.device)
        trainer.splits = replace(trainer.splits, test=None)  # otherwise it would be scored after the last step
        steps = trainer.feed.steps
        trainer.feed.steps = lambda epoch, first_step: watch.over(steps(epoch, first_step))  # type: ignore[method-assign]
        if trainer.run() is None:
            sys.exit("stopped")
        times = [watch.now()]
        for write in (trainer._save, trainer.records.draw):
            write()
            times.append(watch.now())
    return watch.seconds_per_step, times[1] - times[0], times[2] - times[1]


class _Transformed(Dataset[tuple[Tensor, int]]):
    def __init__(self, dataset: Dataset, transform: nn.Module) -> None:
        self.dataset, self.transform = dataset, transform

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.dataset[index]
        return self.transform(image), label


def _time_plain(recipe: Recipe, options: argparse.Namespace, workers: str) -> float:
    """Seconds per step in a plain loop."""
    device = torch.device(options.device)
    splits = open_splits(recipe.data.dataset, hold_out=recipe.data.hold_out, limit=recipe.data.limit)
    model = timm.create_model(recipe.model.name, num_classes=len(splits.class_names), img_size=recipe.model.img_size)
    model.to(device)
    setup.prepare_for_device(model, device.type)
    optimizer = setup.create_optimizer(model, recipe.optim)
    preprocessing = setup.resolve_preprocessing(model, recipe.data)
    transform = setup.create_train_transform(recipe.model.img_size, recipe.augment, preprocessing)
    loader = DataLoader(
        _Transformed(splits.train, transform),
        batch_size=recipe.optim.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=recipe.data.num_workers,
        pin_memory=torch.cuda.is_available(),
    )
    watch = _Stopwatch(options, workers == FIXED)
    model.train()
    total = torch.zeros((), device=device)
    for batch in watch.over(iter(loader)):
        images, labels = (tensor.to(device, non_blocking=True) for tensor in batch)
        total += train_step(model, optimizer, images, labels, recipe)
    assert total.isfinite()
    return watch.seconds_per_step


def train_step(model: nn.Module, optimizer: Optimizer, images: Tensor, labels: Tensor, recipe: Recipe) -> Tensor:
    """One plain training step on images [B, C, H, W] and labels [B]; returns the loss."""
    with torch.autocast(images.device.type, torch.bfloat16, enabled=recipe.precision == "bf16"):
        logits = model(images)
    loss = F.cross_entropy(logits.float(), labels, label_smoothing=recipe.augment.label_smoothing)
    loss.backward()
    if recipe.optim.clip_grad:
        nn.utils.clip_grad_norm_(model.parameters(), recipe.optim.clip_grad)
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


if __name__ == "__main__":
    main()
