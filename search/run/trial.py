"""Measure the speed of a search on this machine, with a few real steps of each kind of its work; keeps no results."""

from __future__ import annotations

import random
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import final

import torch

from glit_models import Spec
from glit_models.training import Trainer
from glit_models.weights.files import write_state_dict

from .context import RunContext
from .stage import Stage

__all__ = ["NetworkSpeed", "SupernetSpeed", "time_network", "time_supernet"]

_STEPS = 20
_SECONDS = 30.0  # no further step starts after this time
_SCORED_BATCHES = 4


@final
@dataclass(frozen=True)
class NetworkSpeed:
    """Speed of a stand-alone network, in seconds: a training step, and scoring one image; including data loading."""

    step: float
    image: float


@final
@dataclass(frozen=True)
class SupernetSpeed:
    """Speed of a supernet.

    Attributes:
        step: seconds of a training step, including its data.
        calibration: seconds for recomputing the BatchNorm statistics of a network.
        image: seconds for scoring a network on an image in memory.
        reading: seconds for reading and embedding an image.
    """

    step: float
    calibration: float
    image: float
    reading: float


def time_network(context: RunContext, spec: Spec) -> NetworkSpeed:
    """Train a stand-alone network for some steps, and score it on some images."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(context.recipe.retrain_recipe(spec), Path(folder) / "run", context.device, score_test=False)
        step = trainer.time_steps(_STEPS, _SECONDS)
    model = trainer.model.eval()
    order = context.search_order()[: _SCORED_BATCHES * context.supernet_recipe.eval_batch_size]
    began = time.monotonic()
    with torch.inference_mode():
        batches, count = trainer.feed.scoring(context.splits.validation, order)
        for images, _ in batches:
            model(images.to(context.device)).argmax(1).cpu()
    return NetworkSpeed(step, (time.monotonic() - began) / count)


def time_supernet(stage: Stage) -> SupernetSpeed:
    """Train a stage's supernet for some steps, and score two of its networks on some images."""
    context = stage.context
    recipe = context.supernet_recipe
    ticks: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            recipe, Path(folder) / "run", context.device, trainee=stage.create_trainee(), score_test=False
        )
        step = trainer.time_steps(_STEPS, _SECONDS)
        del trainer
        weights = Path(folder) / "model.safetensors"
        write_state_dict(context.create_supernet(stage.space).state_dict(), weights)
        positions = context.search_order()[: _SCORED_BATCHES * recipe.eval_batch_size]
        evaluator = context.evaluator(stage.space, weights, lambda *_: ticks.append(time.monotonic()), positions)
    rng, times = random.Random(0), []
    for _ in range(2):  # the first one reads the images
        ticks.clear()
        began = time.monotonic()
        evaluator.evaluate([stage.space.sample(rng)])
        ended = time.monotonic()
        # One tick per batch; those of the calibration, if any, come first.
        batches = -(-len(positions) // recipe.eval_batch_size)
        calibrated = ticks[-batches - 1] if len(ticks) > batches else began
        times.append((calibrated - began, ended - calibrated))
    (_, first), (calibration, second) = times
    count = len(positions)
    return SupernetSpeed(step, calibration, second / count, max(first - second, 0.0) / count)
