"""Rank correlations with confidence intervals, to measure how well one order of networks predicts another."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import numpy as np

from glit_models.errors import SearchError, pip_install

__all__ = ["Correlation", "kendall"]

_FEWEST = 3  # pairs; two always give a correlation of 1 or -1


@final
@dataclass(frozen=True)
class Correlation:
    """A rank correlation, from -1 (opposite orders) over 0 (unrelated) to 1 (the same order).

    Attributes:
        value: the correlation over all pairs.
        low: lower end of the percentile bootstrap's interval over pairs.
        high: its upper end.
        samples: number of pairs.
    """

    value: float
    low: float
    high: float
    samples: int


def kendall(
    a: Sequence[float], b: Sequence[float], *, num_resamples: int = 2000, level: float = 0.95, seed: int = 0
) -> Correlation:
    """Kendall's tau-b of pairs, with a bootstrap confidence interval.

    Args:
        a: one number per pair.
        b: the other number of each pair.
        num_resamples: number of bootstrap resamples; those in which one side is constant are left out.
        level: confidence level of the interval.
        seed: seed of the resamples.

    Raises:
        SearchError: on fewer than three pairs, on sides that are constant, not finite or of different lengths, or if
            scipy is missing.

    Source: M. G. Kendall, The treatment of ties in ranking problems, Biometrika 33 (1945).
    """
    if num_resamples < 1 or not 0 < level < 1:
        raise SearchError(f"num_resamples must be at least 1 and level from 0 to 1, got {num_resamples} and {level}")
    try:
        from scipy.stats import kendalltau
    except ImportError:
        raise SearchError(f"rank correlations are computed by scipy: {pip_install('search')}") from None
    pairs = _pairs(a, b)
    rng = np.random.default_rng(seed)
    drawn = (pairs[:, rng.integers(pairs.shape[1], size=pairs.shape[1])] for _ in range(num_resamples))
    values = [float(kendalltau(*resample).statistic) for resample in drawn if not _is_constant(resample)]
    if not values:
        raise SearchError(f"a correlation of {pairs.shape[1]} pairs needs more resamples, got {num_resamples}")
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return Correlation(float(kendalltau(*pairs).statistic), float(low), float(high), pairs.shape[1])


def _pairs(a: Sequence[float], b: Sequence[float]) -> np.ndarray:
    """Validate both sides; returns [2, P]."""
    if len(a) != len(b):
        raise SearchError(f"a correlation takes pairs, got {len(a)} numbers and {len(b)}")
    if len(a) < _FEWEST:
        raise SearchError(f"a correlation needs at least {_FEWEST} pairs, got {len(a)}")
    for side in (a, b):
        if wrong := [value for value in side if not math.isfinite(value)]:
            raise SearchError(f"a correlation takes finite numbers, got {wrong[0]}")
    pairs = np.array([a, b], dtype=np.float64)
    if _is_constant(pairs):
        side = a if _is_constant(pairs[:1]) else b
        raise SearchError(f"a correlation needs two different numbers on each side, got {len(a)} times {side[0]}")
    return pairs


def _is_constant(sides: np.ndarray) -> bool:
    """Whether one of the sides [S, P] is constant."""
    return bool((sides == sides[:, :1]).all(1).any())
