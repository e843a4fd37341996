"""The sections of a search's recipe, except the one of the search method (`evolution_config`)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal, final

from glit_models.errors import RecipeError

from .path_sampling import Sampling
from .supernet import Sharing

__all__ = [
    "Bounds",
    "BudgetSection",
    "ControlSection",
    "EvaluationSection",
    "FinalSection",
    "LatencySection",
    "RetrainSection",
    "StandaloneSection",
    "SupernetSection",
    "TrainingKeys",
]

TrainingKeys = dict[str, Any]  # of a training recipe, section by section


@final
@dataclass(frozen=True)
class Bounds:
    """Of a cost, both included; without either it is only recorded. Either `low` and `high`, or `like` and `within`."""

    low: float | None = None
    high: float | None = None
    like: str | None = None  # a model of timm or of this package, at the recipe's image size and number of classes
    within: float | str | None = None  # how far a cost may differ from that of `like`: 5 %

    def check(self, key: str) -> None:
        """Raises RecipeError on what cannot be. `key`: of this section."""
        if (self.like is None) != (self.within is None):
            raise RecipeError(f"{key}.like and {key}.within need each other, got {self.like!r} and {self.within!r}")
        if self.like is not None and (self.low, self.high) != (None, None):
            raise RecipeError(
                f"{key} takes low and high, or like and within, not both; to replace all: "
                f'--set "{key}={{like: {self.like}, within: {self.within}}}"'
            )
        if self.within is not None and not 0 < self.percent < 100:
            raise RecipeError(f"{key}.within must be a percentage above 0 and below 100, got {self.within!r}")

    @property
    def percent(self) -> float:
        """`within` as a number; not a number if it is none."""
        try:
            return float(str(self.within).strip().removesuffix("%"))
        except ValueError:
            return math.nan


@final
@dataclass(frozen=True)
class BudgetSection:
    """What a network may cost, at `train.model.img_size` and with the data's classes."""

    macs: Bounds = field(default_factory=Bounds)
    params: Bounds = field(default_factory=Bounds)
    latency_ms: Bounds = field(default_factory=Bounds)  # measured on the device that searches, and only if bounded


@final
@dataclass(frozen=True)
class LatencySection:
    """How latency is measured."""

    runtime: Literal["torch", "onnx"] = "torch"  # 'onnx': of the exported file; seconds more for each network
    batch_size: int = 1
    threads: int = 1


@final
@dataclass(frozen=True)
class SupernetSection:
    """How weights are shared and trained."""

    sharing: Sharing = "entangled"
    sampling: Sampling = "uniform"  # which paths a step takes: any, some within the budget, or see `path_sampling`
    paths: int = 1  # of a step: so many parts of its batch go through another network each
    # What all but the largest network learn from that network's outputs on the same images, rather than from labels:
    # its share of their loss (in-place distillation). The largest network's forward pass is extra work.
    distill: float = 0.0
    widen: float = 0.0  # share of the training in which smaller sizes come in, after the largest; see `path_sampling`
    train: TrainingKeys = field(default_factory=dict)  # keys of `train` that differ for the supernet
    # Weights to start from: of one network, as MODEL.TAG, a weight folder or a repository; or of another supernet, as
    # the folder of a search. For methods that search everything at once.
    from_: str | None = None


@final
@dataclass(frozen=True)
class EvaluationSection:
    """How networks are scored under inherited weights."""

    calibration_batches: int = 8  # training batches on which BatchNorm statistics are recomputed
    memory_mb: float = 2000.0  # for what networks share
    share: bool = True  # false: every network by itself, which is slower and gives the same
    # The evolution compares networks by their loss on so many images, rounded up to whole batches of
    # `train.eval_batch_size`. Then the better half is compared on twice as many, and so on, and the fitness on all
    # images decides among the last `confirm`. Null: the fitness on all images compares all networks.
    screen_images: int | None = None
    confirm: int = 50


@final
@dataclass(frozen=True)
class StandaloneSection:
    """How networks are scored by the fitness 'standalone'."""

    epochs: int = 1  # of `train` and `retrain.train`, for each network


@final
@dataclass(frozen=True)
class RetrainSection:
    """Which networks are trained by themselves at the end of a stage, and how."""

    top: int = 5  # networks that are trained in full
    train: TrainingKeys = field(default_factory=dict)  # keys of `train` that differ for them
    # 'inherited': from the supernet's weights, those of the control and the ranking, too. For methods with one stage.
    start: Literal["scratch", "inherited"] = "scratch"
    # Successive halving: {8: 1, 3: 3} trains the best 8 for one epoch each, the better 3 of them for three epochs, and
    # the best `top` of these in full, each time anew. Empty: the search's own best are trained in full at once.
    rungs: dict[int, int] = field(default_factory=dict)

    def check_rungs(self, population: int, epochs: int) -> None:
        """Raises RecipeError on rungs that a stage cannot go through. `epochs`: of a training in full."""
        counts, lengths = zip((self.top, epochs), *sorted(self.rungs.items()), strict=True)
        if any(low >= high for low, high in pairwise(counts)) or counts[-1] > population:
            raise RecipeError(
                f"retrain.rungs must be of more networks than retrain.top={self.top}, and of at most "
                f"evolution.population={population}, got {self.rungs}"
            )
        if any(high <= low for high, low in pairwise(lengths)) or lengths[-1] < 1:
            raise RecipeError(
                "retrain.rungs must have at least 1 epoch, the more the fewer networks there are, and fewer than a "
                f"training in full, which has {epochs}; got {self.rungs}"
            )


@final
@dataclass(frozen=True)
class FinalSection:
    """How the winner is trained for the last time; its test accuracy is that of this training."""

    # On training and search images together, for as many epochs. False: the weights that were compared are the result.
    # Of no effect on fractals, of which training images never end.
    all_data: bool = True


@final
@dataclass(frozen=True)
class ControlSection:
    """What the winner is compared with."""

    networks: int = 3  # random networks within the budget that are trained as the winner was; 0 for none
