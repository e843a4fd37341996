"""The sections of a search recipe, except that of the search method (`methods/config.py`)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal, final

from glit_models.errors import RecipeError

from .supernets.path_sampling import Sampling
from .supernets.supernet import Sharing

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
    """Inclusive bounds of a cost, which is otherwise only recorded. Either `low` and `high`, or `like` and `within`."""

    low: float | None = None
    high: float | None = None
    like: str | None = None  # a model of timm or this package, at the recipe's image size and number of classes
    within: float | str | None = None  # maximum difference from the cost of `like`, such as 5 %

    def check(self, key: str) -> None:
        """Raise RecipeError on invalid bounds. `key`: the key of this section."""
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
        """`within` as a number; NaN if it is not one."""
        try:
            return float(str(self.within).strip().removesuffix("%"))
        except ValueError:
            return math.nan


@final
@dataclass(frozen=True)
class BudgetSection:
    """Bounds on a network's costs, at `train.model.img_size` and with the data's classes."""

    macs: Bounds = field(default_factory=Bounds)
    params: Bounds = field(default_factory=Bounds)
    latency_ms: Bounds = field(default_factory=Bounds)  # measured on the device of the search, only if bounded


@final
@dataclass(frozen=True)
class LatencySection:
    """Settings of latency measurements."""

    runtime: Literal["torch", "onnx"] = "torch"  # 'onnx' measures the exported file; some seconds more per network
    batch_size: int = 1
    threads: int = 1


@final
@dataclass(frozen=True)
class SupernetSection:
    """Settings of weight sharing and of the supernet's training."""

    sharing: Sharing = "entangled"
    private_qk: bool = False  # whether attention has separate queries and keys for each number of heads; see `Supernet`
    sampling: Sampling = "uniform"  # the paths of a step: any, some within the budget, or see `path_sampling`
    paths: int = 1  # per step: each path gets one part of the batch
    # In-place distillation: weight, in the loss of all other networks, of the largest network's outputs on the same
    # images, relative to the labels. The largest network's forward pass is extra work.
    distill: float = 0.0
    widen: float = 0.0  # share of the training in which smaller sizes are added, after the largest; see `path_sampling`
    train: TrainingKeys = field(default_factory=dict)  # keys that override `train` for the supernet
    # Initial weights: of one network, as MODEL.TAG, a weight folder or a repository; or of another supernet, as the
    # folder of a search. For single-stage methods.
    from_: str | None = None


@final
@dataclass(frozen=True)
class EvaluationSection:
    """Settings of scoring networks with inherited weights."""

    calibration_batches: int = 8  # training batches on which BatchNorm statistics are recomputed
    memory_mb: float = 2000.0  # for outputs shared by networks
    share: bool = True  # false: score networks separately, which is slower and gives the same scores
    # The evolution compares networks by their loss on this number of images, rounded up to whole batches of
    # `train.eval_batch_size`. Then the better half is compared on twice as many, and so on, and the fitness on all
    # images decides among the last `confirm`. Null: networks are always compared by the fitness on all images.
    screen_images: int | None = None
    confirm: int = 50


@final
@dataclass(frozen=True)
class StandaloneSection:
    """Settings of the fitness 'standalone'."""

    epochs: int = 1  # with `train` and `retrain.train`, for each network


@final
@dataclass(frozen=True)
class RetrainSection:
    """Settings of the stand-alone training at the end of a stage."""

    top: int = 5  # number of networks that are trained in full
    train: TrainingKeys = field(default_factory=dict)  # keys that override `train` for these networks
    # 'inherited': start from the supernet's weights, also for the control and the ranking. For single-stage methods.
    start: Literal["scratch", "inherited"] = "scratch"
    # Successive halving: {8: 1, 3: 3} trains the best 8 for one epoch each, the best 3 of them for three epochs, and
    # the best `top` of these in full, each time from scratch. Empty: train the search's best networks in full at once.
    rungs: dict[int, int] = field(default_factory=dict)

    def check_rungs(self, population: int, epochs: int) -> None:
        """Raise RecipeError on rungs that are not possible in a stage. `epochs`: epochs of a full training."""
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
    """Settings of the winner's last training, which gives its test accuracy."""

    # Train on training and search images together, for the same number of epochs. False: keep the weights from the
    # comparison. No effect on fractals, whose training images are unlimited.
    all_data: bool = True


@final
@dataclass(frozen=True)
class ControlSection:
    """Settings of the control, which the winner is compared with."""

    # Random networks within the budget, trained like the winner; 0 for none. With any, a search that starts from
    # weights also trains its winner from random weights, and fine-tunes the network that it started from.
    networks: int = 3
