"""Tests of correlations: textbook values, coverage and repeatability of the interval, and errors."""

import builtins
import math
import random
import sys

import numpy as np
import pytest
from glit_models.search import Correlation, kendall

from glit_models.errors import SearchError


def tau_b(a: list[float], b: list[float]) -> float:
    """By the definition: each two pairs looked at."""
    signs = [(np.sign(a[i] - a[j]), np.sign(b[i] - b[j])) for i in range(len(a)) for j in range(i)]
    untied = math.prod(sum(bool(sign[side]) for sign in signs) for side in (0, 1))
    return float(sum(x * y for x, y in signs) / math.sqrt(untied))


@pytest.mark.parametrize("seed", range(5))
def test_values_are_those_of_the_definitions_with_ties_too(seed: int) -> None:
    rng = random.Random(seed)
    a, b = ([float(rng.randint(0, 6)) for _ in range(15)] for _ in range(2))
    assert kendall(a, b, num_resamples=20).value == pytest.approx(tau_b(a, b))


def test_the_same_order_gives_one_and_the_opposite_minus_one_whatever_the_numbers() -> None:
    order = [1.0, 20.0, 21.0, 22.5, 1e6]
    one = pytest.approx(1)
    assert kendall(order, [math.log(x) for x in order]) == Correlation(one, one, one, 5)
    assert kendall(order, [-x for x in order]).high == pytest.approx(-1)


def test_the_interval_holds_the_value_narrows_with_more_pairs_and_repeats() -> None:
    rng = np.random.default_rng(0)
    a = rng.normal(size=200)
    b = a + rng.normal(size=200)
    few, many = (kendall(a[:n], b[:n], num_resamples=300) for n in (20, 200))
    assert few.samples == 20
    assert few.low < few.value < few.high
    assert many.high - many.low < few.high - few.low
    assert kendall(a[:20], b[:20], num_resamples=300) == few
    assert kendall(a[:20], b[:20], num_resamples=300, seed=1) != few
    assert kendall(a[:20], b[:20], num_resamples=300, level=0.5).low > few.low


def test_the_interval_covers_the_true_value_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    truth = 2 / math.pi * math.asin(0.6)  # tau of a normal distribution whose correlation is 0.6
    draws = (rng.multivariate_normal([0, 0], [[1, 0.6], [0.6, 1]], size=40).T for _ in range(60))
    intervals = [kendall(a, b, num_resamples=150) for a, b in draws]
    assert 50 <= sum(interval.low <= truth <= interval.high for interval in intervals) <= 60


def test_resamples_with_one_number_only_are_left_out() -> None:
    correlation = kendall([1, 2, 3], [1, 1, 2], num_resamples=500)
    assert all(map(math.isfinite, (correlation.low, correlation.high)))


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ([1, 2, 3], [1, 2], "a correlation takes pairs, got 3 numbers and 2"),
        ([], [], "a correlation needs at least 3 pairs, got 0"),
        ([1, 2], [1, 2], "a correlation needs at least 3 pairs, got 2"),
        ([1, 2, math.nan], [1, 2, 3], "a correlation takes finite numbers, got nan"),
        ([1, 2, 3], [5.5] * 3, "a correlation needs two different numbers on each side, got 3 times 5.5"),
    ],
)
def test_pairs_without_a_correlation_are_named_in_one_line(a: list, b: list, message: str) -> None:
    with pytest.raises(SearchError) as error:
        kendall(a, b)
    assert str(error.value) == message


def test_settings_that_give_no_interval_are_named() -> None:
    with pytest.raises(SearchError, match=r"^num_resamples must be at least 1 and level from 0 to 1, got 0 and 0.95$"):
        kendall([1, 2, 3], [1, 2, 3], num_resamples=0)


def test_without_scipy_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "scipy"]:
        monkeypatch.delitem(sys.modules, name)
    imported = builtins.__import__

    def without_scipy(name: str, *args: object, **keywords: object) -> object:
        if name.partition(".")[0] == "scipy":
            raise ImportError(name)
        return imported(name, *args, **keywords)

    monkeypatch.setattr(builtins, "__import__", without_scipy)
    with pytest.raises(SearchError, match=r'pip install "\.\[search\]" in the checkout$'):
        kendall([1, 2, 3], [1, 2, 3])
