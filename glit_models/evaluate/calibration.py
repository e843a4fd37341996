"""Calibration of a classifier: expected calibration error and temperature scaling.

Axes: N images, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Bin", "Calibration", "calibrate", "calibration_bins", "calibration_error", "fit_temperature"]

_BINS = 15
_RANGE = (0.02, 50.0)  # of temperatures
_STEPS = 60  # of the search for a temperature; each shrinks the range to 0.62
_FEWEST = 50  # minimum number of images for a reliable temperature


@dataclass(frozen=True)
class Bin:
    """Images whose confidence is in one interval: their number, mean confidence and accuracy, 0 to 1."""

    images: int
    confidence: float
    accuracy: float


@dataclass(frozen=True)
class Calibration:
    """The bins and the error in percent over all images, and the effect of a temperature if there are enough images.

    The temperature is fitted on half of the images; `error_before` and `error_after` are measured on the other half.
    """

    bins: tuple[Bin, ...]
    error: float
    temperature: float | None = None
    error_before: float | None = None
    error_after: float | None = None
    bins_after: tuple[Bin, ...] = ()


def calibrate(logits: Tensor, truth: Tensor, seed: int = 0) -> Calibration:
    """Compare the confidence in the most probable class with the accuracy.

    Args:
        logits: [N, K]. truth: classes [N]. seed: seed of the split into halves for fitting and measuring a temperature.
    """
    bins = calibration_bins(logits, truth)
    error = calibration_error(bins)
    if len(logits) < _FEWEST:
        return Calibration(bins, error)
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(logits)))
    fitted, judged = order[: len(order) // 2], order[len(order) // 2 :]
    temperature = fit_temperature(logits[fitted], truth[fitted])
    before = calibration_bins(logits[judged], truth[judged])
    after = calibration_bins(logits[judged] / temperature, truth[judged])
    return Calibration(bins, error, temperature, calibration_error(before), calibration_error(after), after)


def calibration_bins(logits: Tensor, truth: Tensor) -> tuple[Bin, ...]:
    """Group the images by confidence into 15 intervals of equal width; empty intervals are left out."""
    confidence, guesses = logits.softmax(1).max(1)
    correct = (guesses == truth).double()
    places = (confidence * _BINS).long().clamp(max=_BINS - 1)
    members = [places == place for place in range(_BINS)]
    return tuple(
        Bin(int(member.sum()), float(confidence[member].double().mean()), float(correct[member].mean()))
        for member in members
        if bool(member.any())
    )


def calibration_error(bins: tuple[Bin, ...]) -> float:
    """The expected calibration error in percent: the mean over images of |accuracy - confidence| of their bins.

    Source: Guo et al., arXiv 1706.04599, section 2.
    """
    total = sum(part.images for part in bins)
    return 100 * sum(part.images * abs(part.accuracy - part.confidence) for part in bins) / total


def fit_temperature(logits: Tensor, truth: Tensor) -> float:
    """The temperature, from 0.02 to 50, that minimises the negative log-likelihood of logits [N, K] divided by it.

    The loss has a single minimum, as it is convex in 1 / temperature; a golden-section search finds it.
    """

    def loss(log_temperature: float) -> float:
        return float(F.cross_entropy(logits / float(np.exp(log_temperature)), truth))

    low, high = np.log(_RANGE)
    ratio = (5**0.5 - 1) / 2
    for _ in range(_STEPS):
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        low, high = (low, right) if loss(left) <= loss(right) else (left, high)
    return float(np.exp((low + high) / 2))
