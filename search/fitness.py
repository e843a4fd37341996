"""Fitness measures for comparing networks: their base class, the built-in ones, and the table of their names.

A recipe names a custom fitness as `fitness: my_module:MyFitness`.
"""

from __future__ import annotations

import hashlib
import math
import reprlib
import statistics
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, final

import torch
from torch import nn

from glit_models import Spec, count_macs
from glit_models.errors import SearchError
from glit_models.extensions import Table

from .spaces.space import SearchSpace
from .supernets.scoring import Evaluator

__all__ = [
    "FITNESSES",
    "Fitness",
    "InheritedAccuracy",
    "InheritedLoss",
    "Macs",
    "Setting",
    "StandaloneAccuracy",
    "SynFlow",
]


@dataclass(frozen=True)
class Setting:
    """The parts of a search that a fitness may use.

    Attributes:
        space: the networks of the stage.
        seed: seed of everything random.
        folder: folder of the stage, for files of a fitness.
        device: device to compute on.
        img_size: image size, in pixels.
        num_classes: number of classes of the data.
        create_model: creates a stand-alone network with random weights.
        train: trains a stand-alone network for a number of epochs in a folder, resuming if it was stopped, and returns
            its accuracy on the search set in percent.
        open_evaluator: loads the trained supernet; only for a fitness with `needs_supernet`.
    """

    space: SearchSpace
    seed: int
    folder: Path
    device: torch.device
    img_size: int
    num_classes: int
    create_model: Callable[[Spec], nn.Module]
    train: Callable[[Spec, Path, int | None], float]
    open_evaluator: Callable[[], Evaluator]


class Fitness(ABC):
    """A fitness measure of networks; larger is better. Abstract.

    Attributes:
        needs_supernet: whether a supernet must be trained first (class attribute).
        is_collective: whether scoring a network is worth a separate task, such as training it, which all processes of
            `accelerate launch` run together (class attribute).
        can_screen: whether `screen` is implemented (class attribute).
        can_divide: whether `score_batches` is implemented: the score is a mean over images (class attribute).
        label: name of the measure, for figures and messages (class attribute).
        setting: the search.

    Args:
        setting: the search.
    """

    needs_supernet: ClassVar[bool] = False
    is_collective: ClassVar[bool] = False
    can_screen: ClassVar[bool] = False
    can_divide: ClassVar[bool] = False
    label: ClassVar[str] = "fitness"

    def __init__(self, setting: Setting) -> None:
        self.setting = setting

    @abstractmethod
    def score(self, specs: Sequence[Spec]) -> Sequence[float]:
        """Return one finite number per network, which must not depend on the other networks."""

    @classmethod
    def show(cls, value: float) -> str:
        """Format a value for a message."""
        return f"{value:.4g}"

    def evaluate(self, specs: Sequence[Spec], num_batches: int | None = None) -> dict[Spec, float]:
        """Score networks and check the result; with `num_batches`, return the means of `screen`.

        Raises:
            SearchError: if there is not one finite number per network.
        """
        name = type(self).__name__
        scores: Sequence[Any] = self.score(specs) if num_batches is None else self.screen(specs, num_batches)
        try:
            values = [float(score) if num_batches is None else statistics.fmean(score) for score in scores]
        except (TypeError, ValueError):
            raise SearchError(f"fitness {name} must return numbers, got {reprlib.repr(scores)}") from None
        if len(values) != len(specs):
            raise SearchError(
                f"fitness {name} must return a number for each of {len(specs)} networks, got {len(values)}"
            )
        for spec, value in zip(specs, values, strict=True):
            if not math.isfinite(value):
                raise SearchError(f"fitness {name} must return finite numbers, got {value} for {spec.to_json(None)}")
        return dict(zip(specs, values, strict=True))

    def screen(self, specs: Sequence[Spec], num_batches: int) -> Sequence[Sequence[float]]:
        """Score networks on each image of the first batches of the search set, [networks, images].

        Larger is better; the recipe's `evaluation.screen_images` compares networks by the mean.
        """
        raise SearchError(f"fitness {type(self).__name__} has can_screen, but lacks screen")

    def score_batches(self, specs: Sequence[Spec], batches: range) -> Sequence[Sequence[float]]:
        """Sums of scores over the images of each of these batches of the search set, [networks, batches].

        The score is the sum over all batches, divided by the number of images.
        """
        raise SearchError(f"fitness {type(self).__name__} has can_divide, but lacks score_batches")

    def retain(self, specs: Iterable[Spec]) -> None:  # noqa: B027 - most have nothing to forget
        """If memory is scarce, forget what the children of these networks do not need."""


class _Accuracy(Fitness):
    @classmethod
    def show(cls, value: float) -> str:
        """Format in percent."""
        return f"{value:.2f} %"


class _Inherited(Fitness):
    needs_supernet = True
    can_screen = True
    can_divide = True

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.evaluator = setting.open_evaluator()

    def retain(self, specs: Iterable[Spec]) -> None:
        """See `Evaluator.retain`."""
        self.evaluator.retain(specs)

    def screen(self, specs: Sequence[Spec], num_batches: int) -> Sequence[Sequence[float]]:
        """The negative cross-entropies with inherited weights."""
        losses: list[list[float]] = (-self.evaluator.losses(specs, num_batches)).tolist()
        return losses


@final
class InheritedAccuracy(_Accuracy, _Inherited):
    """Accuracy on the search set with the weights that a network inherits from the supernet."""

    label = "inherited accuracy, %"

    def score(self, specs: Sequence[Spec]) -> Sequence[float]:
        """See `Evaluator`."""
        scores = self.evaluator.evaluate(specs)
        return [scores[spec].accuracy for spec in specs]

    def score_batches(self, specs: Sequence[Spec], batches: range) -> Sequence[Sequence[float]]:
        """100 for each correct image."""
        sums: list[list[float]] = (100 * self.evaluator.sums(specs, batches)[..., 0]).tolist()
        return sums


@final
class InheritedLoss(_Inherited):
    """Negative cross-entropy on the search set with inherited weights; larger is better.

    It includes the confidence in each image, so it distinguishes networks with equal accuracy.
    """

    label = "negative inherited loss"

    def score(self, specs: Sequence[Spec]) -> Sequence[float]:
        """See `Evaluator`."""
        scores = self.evaluator.evaluate(specs)
        return [-scores[spec].loss for spec in specs]

    def score_batches(self, specs: Sequence[Spec], batches: range) -> Sequence[Sequence[float]]:
        """The negative cross-entropies."""
        sums: list[list[float]] = (-self.evaluator.sums(specs, batches)[..., 1]).tolist()
        return sums


@final
class StandaloneAccuracy(_Accuracy):
    """Accuracy on the search set after a short training from scratch: `standalone.epochs` of the recipe."""

    is_collective = True
    label = "accuracy after a short training, %"

    def score(self, specs: Sequence[Spec]) -> Sequence[float]:
        """Train each network once, in a separate folder."""
        return [self.setting.train(spec, self._folder(spec), None) for spec in specs]

    def _folder(self, spec: Spec) -> Path:
        name = hashlib.sha256(spec.to_json(indent=None).encode()).hexdigest()[:16]
        return self.setting.folder / "standalone" / name


@final
class SynFlow(Fitness):
    """The logarithm of SynFlow (arXiv 2006.05467, as a proxy arXiv 2101.08134), which needs neither data nor training.

    It is the sum over parameters of |parameter * gradient| for the network with the absolute values of its random
    weights, an image of ones as input, and the sum of logits as loss. In double precision.
    """

    label = "SynFlow, log10"

    def score(self, specs: Sequence[Spec]) -> Sequence[float]:
        """Create each network from the same seed."""
        return [self._score_one(spec) for spec in specs]

    def _score_one(self, spec: Spec) -> float:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.setting.seed)
            model: Any = self.setting.create_model(spec)
        model = model.double().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.abs_()
        images = torch.ones(1, model.in_chans, *model.patch_embed.img_size, dtype=torch.float64)
        model(images).sum().backward()
        flow = sum(
            float((parameter.detach() * parameter.grad).abs().sum())
            for parameter in model.parameters()
            if parameter.grad is not None
        )
        return math.log10(flow) if flow > 0 else -math.inf


@final
class Macs(Fitness):
    """Multiply-adds of one image, in millions: the baseline "larger is better" for any other fitness."""

    label = "MACs, M"

    def score(self, specs: Sequence[Spec]) -> Sequence[float]:
        """Count them in closed form, at the image size of the search."""
        img_size, num_classes = self.setting.img_size, self.setting.num_classes
        return [count_macs(spec, img_size, num_classes) / 1e6 for spec in specs]


FITNESSES: Table[type[Fitness]] = Table("fitness", Fitness, SearchError)
"""The values of `fitness` in a search recipe, by name."""
for _name, _fitness in (
    ("inherited", InheritedAccuracy),
    ("inherited_loss", InheritedLoss),
    ("standalone", StandaloneAccuracy),
    ("synflow", SynFlow),
    ("macs", Macs),
):
    FITNESSES.register(_name, _fitness)
