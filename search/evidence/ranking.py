"""Compare how cheap measures and training order networks: the correlations, their noise, and their file format.

This module compares and reads; `rank` trains and scores networks.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np

from glit_models import Spec, parse_spec
from glit_models.errors import SearchError

from .correlation import Correlation, kendall

__all__ = ["TRUTHS", "Ranked", "Ranking", "compare", "noise_ceiling"]

TRUTHS = ("loss", "top-1")  # scores of a trained network; the loss is negated
_RESAMPLES = 2000
_TOP = 5


@final
@dataclass(frozen=True)
class Ranked:
    """A network after stand-alone training.

    Attributes:
        spec: the network.
        costs: multiply-adds, parameters and optionally milliseconds, by the budgets' names.
        predictions: the value of each cheap measure, by name; larger is better.
        trained: scores after training, by the names in `TRUTHS`; larger is better.
        again: scores after another training with another seed, if there was one.
    """

    spec: Spec
    costs: Mapping[str, float]
    predictions: Mapping[str, float]
    trained: Mapping[str, float]
    again: Mapping[str, float] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as stored in JSON."""
        return {**{field.name: getattr(self, field.name) for field in dataclasses.fields(self)},
                "spec": self.spec.to_dict()}  # fmt: skip


@final
@dataclass(frozen=True)
class Ranking:
    """The measurements on networks of a stage.

    Attributes:
        stage: name of the stage.
        networks: the trained networks.
        taus: Kendall's tau of each measure with each of `TRUTHS`: {truth: {measure: tau}}.
        ceilings: the tau of a measure without any error, by truth, if networks were trained twice.
        regrets: difference between the best network and the best of a measure's top five: {truth: {measure: regret}}.
    """

    stage: str
    networks: tuple[Ranked, ...]
    taus: Mapping[str, Mapping[str, Correlation]]
    ceilings: Mapping[str, Correlation]
    regrets: Mapping[str, Mapping[str, float]]

    def noise(self, truth: str) -> float | None:
        """The standard deviation between two trainings of a network; None if none was trained twice."""
        pairs = [(n.trained[truth], n.again[truth]) for n in self.networks if n.again is not None]
        return math.sqrt(sum((a - b) ** 2 for a, b in pairs) / len(pairs) / 2) if pairs else None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as stored in `rank.json`."""
        plain = dataclasses.asdict
        return {
            "stage": self.stage,
            "networks": [network.to_dict() for network in self.networks],
            "taus": {truth: {name: plain(tau) for name, tau in taus.items()} for truth, taus in self.taus.items()},
            "ceilings": {truth: plain(tau) for truth, tau in self.ceilings.items()},
            "regrets": {truth: dict(regrets) for truth, regrets in self.regrets.items()},
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Ranking:
        """The inverse of `to_dict`; also reads files of version 0.1.

        Raises KeyError, TypeError or ValueError on anything else.
        """
        if "kendall" in data:
            return _written_by_0_1(data)
        networks = tuple(Ranked(**{**network, "spec": parse_spec(network["spec"])}) for network in data["networks"])
        taus = {
            truth: {name: _tau(tau) for name, tau in data["taus"][truth].items()}
            for truth in TRUTHS
            if truth in data["taus"]
        }
        for index, network in enumerate(networks):
            values = [network.predictions[name] for of in taus.values() for name in of]
            values += [network.costs["macs"], *(network.trained[truth] for truth in TRUTHS)]
            values += [network.again[truth] for truth in TRUTHS] if network.again else []
            for value in values:
                _finite(f"a number of networks[{index}]", value)
        return cls(
            str(data["stage"]),
            networks,
            taus,
            {truth: _tau(tau) for truth, tau in data["ceilings"].items()},
            {truth: {name: _finite(name, data["regrets"][truth][name]) for name in of} for truth, of in taus.items()},
        )

    def __str__(self) -> str:
        twice = sum(network.again is not None for network in self.networks)
        lines = [f"{len(self.networks)} stand-alone networks of {self.stage}, {twice} of them trained twice."]
        for truth, taus in self.taus.items():
            head = f"Kendall's tau with {truth} after training (95 %)"
            lines.append(f"{head}, and the best of the first {_TOP} against the best of all:")
            lines += [
                f"    {name:<16} {show_tau(tau)}   {0.0 - self.regrets[truth][name]:+.3g}" for name, tau in taus.items()
            ]
            if truth in self.ceilings:
                lines.append(f"    {'without error':<16} {show_tau(self.ceilings[truth])}")
        return "\n".join(lines)


def show_tau(tau: Correlation) -> str:
    """Format a correlation with its interval."""
    return f"{tau.value:5.2f} ({tau.low:.2f} to {tau.high:.2f})"


def compare(stage: str, networks: Sequence[Ranked]) -> Ranking:
    """Compare each measure with the scores after training.

    Measures that are constant over all networks are left out, and so are equal accuracies, and the noise if fewer than
    three networks were trained twice.

    Raises:
        SearchError: on fewer than three networks, or if all of them are equally good.
    """
    taus: dict[str, dict[str, Correlation]] = {}
    regrets: dict[str, dict[str, float]] = {}
    ceilings = {}
    for truth in TRUTHS:
        trained = [network.trained[truth] for network in networks]
        if len(set(trained)) == 1 and truth != TRUTHS[0]:  # a few images may give equal accuracies
            continue
        measures = {
            name: [network.predictions[name] for network in networks] for name in networks[0].predictions
        }  # fmt: skip
        telling = {name: values for name, values in measures.items() if len(set(values)) > 1}
        taus[truth] = {name: kendall(values, trained) for name, values in telling.items()}
        regrets[truth] = {name: _regret(values, trained) for name, values in telling.items()}
        pairs = [(network.trained[truth], network.again[truth]) for network in networks if network.again is not None]
        if len(pairs) >= 3:
            again = [None if network.again is None else network.again[truth] for network in networks]
            ceilings[truth] = noise_ceiling(trained, again)
    return Ranking(stage, tuple(networks), taus, ceilings, regrets)


def noise_ceiling(first: Sequence[float], again: Sequence[float | None], seed: int = 0) -> Correlation:
    """The tau between the networks' true order and one noisy training of each.

    With normal distributions, a share r of the variance between networks gives a correlation of sqrt(r), which
    corresponds to a tau of 2 / pi * asin(sqrt(r)) (M. G. Kendall, Rank Correlation Methods, chapter 9). The noise is
    estimated from the networks that were trained twice, the interval by a bootstrap over networks.

    Args:
        first: score of each network after training.
        again: score after training with another seed; None if there was none.
        seed: seed of the resamples.

    Raises:
        SearchError: if fewer than three networks were trained twice.
    """
    one = np.asarray(first, np.float64)
    two = np.asarray([math.nan if value is None else value for value in again], np.float64)
    twice = int(np.isfinite(two).sum())
    if twice < 3:
        raise SearchError(f"the noise needs at least 3 networks that were trained twice, got {twice}")

    def ceiling(chosen: np.ndarray) -> float:
        differences = (one - two)[chosen]
        differences = differences[np.isfinite(differences)]
        total = float(one[chosen].var(ddof=1))
        if len(differences) < 2 or total == 0:
            return math.nan
        reliability = 1 - float(np.mean(differences**2)) / 2 / total
        return 2 / math.pi * math.asin(math.sqrt(min(max(reliability, 0), 1)))

    rng = np.random.default_rng(seed)
    drawn = [ceiling(rng.integers(len(one), size=len(one))) for _ in range(_RESAMPLES)]
    low, high = np.nanquantile(drawn, [0.025, 0.975])
    return Correlation(ceiling(np.arange(len(one))), float(low), float(high), twice)


def _regret(values: Sequence[float], trained: Sequence[float]) -> float:
    first = sorted(range(len(values)), key=lambda index: -values[index])[:_TOP]
    return max(trained) - max(trained[index] for index in first)


def _tau(data: Mapping[str, Any]) -> Correlation:
    return Correlation(*(_finite(name, data[name]) for name in ("value", "low", "high", "samples")))


def _finite(name: str, value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value!r}")
    return value


def _written_by_0_1(data: Mapping[str, Any]) -> Ranking:
    """Version 0.1 only had accuracies, and measured both sides on the same images."""
    networks = []
    for index, network in enumerate(data["networks"]):
        costs = {name: network[name] for name in ("macs", "params", "latency_ms") if name in network}
        inherited, trained, macs = (
            _finite(f"networks[{index}].{name}", network[name]) for name in ("inherited", "standalone", "macs")
        )
        predictions = {"inherited top-1": inherited, "MACs": macs}
        networks.append(Ranked(parse_spec(network["spec"]), costs, predictions, {"top-1": trained}))
    taus = {"inherited top-1": _tau(data["kendall"]), "MACs": _tau(data["kendall_macs"])}
    order = [network.trained["top-1"] for network in networks]
    regrets = {name: _regret([network.predictions[name] for network in networks], order) for name in taus}
    return Ranking(str(data["stage"]), tuple(networks), {"top-1": taus}, {}, {"top-1": regrets})
