"""A table of stand-alone trained networks: a small benchmark for supernets and search methods.

Looking up a network takes no time; training it took minutes. `benchmarks/ranked/table.json` is such a table.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from glit_models import Spec, parse_spec
from glit_models.errors import SearchError, first_line

from ..spaces.space import SearchSpace
from .ranking import Ranked, Ranking, compare

__all__ = ["NetworkTable", "TrainedNetwork"]

_SCORES = ("search_top1", "search_loss", "test_top1", "test_loss")


@final
@dataclass(frozen=True)
class TrainedNetwork:
    """A network of the table.

    Attributes:
        name: name in the table.
        space: name of the space that it was drawn from.
        spec: the network.
        costs: 'macs' of an image and 'params'.
        trainings: the scores of each training, by seed: top-1 accuracy in percent and mean cross-entropy, on the images
            held out for searches ('search_top1', 'search_loss') and on the test set ('test_top1', 'test_loss').
    """

    name: str
    space: str
    spec: Spec
    costs: Mapping[str, float]
    trainings: Mapping[int, Mapping[str, float]]


@final
class NetworkTable:
    """Trained networks by their specs.

    Args:
        networks: networks of the table; all specs must be different.
    """

    def __init__(self, networks: Sequence[TrainedNetwork]) -> None:
        self.networks = tuple(networks)
        self._by_spec = {network.spec: network for network in networks}

    @classmethod
    def read(cls, path: str | Path) -> NetworkTable:
        """Read a table from a JSON file: a list with one row per training.

        Raises:
            SearchError: if it cannot be read or is not such a table; names it.
        """
        rows: dict[str, list[Mapping[str, Any]]] = {}
        try:
            for row in json.loads(Path(path).read_text(encoding="utf-8")):
                rows.setdefault(row["name"], []).append(row)
            return cls([_network(name, of_name) for name, of_name in rows.items()])
        except OSError as error:
            raise SearchError(f"{path} cannot be read: {error.strerror}") from None
        except KeyError as error:
            raise SearchError(f"{path} is no table of trained networks: a row lacks {error}") from None
        except (ValueError, TypeError, RecursionError) as error:
            raise SearchError(f"{path} is no table of trained networks: {first_line(error)}") from None

    def __getitem__(self, spec: Spec) -> TrainedNetwork:
        """The network with this spec. Raises SearchError if the table does not have it."""
        if spec not in self._by_spec:
            raise SearchError(f"the table has {len(self.networks)} networks, but not {spec.to_json(None)}")
        return self._by_spec[spec]

    def of(self, name: str, space: SearchSpace) -> list[TrainedNetwork]:
        """The networks that were drawn from the space of this name.

        Raises:
            SearchError: if there is none, or if one is not a member of `space`; names it.
        """
        networks = [network for network in self.networks if network.space == name]
        if not networks:
            raise SearchError(f"the table has no networks of space {name!r}")
        for network in networks:
            if network.spec not in space:
                raise SearchError(f"{network.name} of the table is not a member of the given space")
        return networks

    def judge(self, name: str, predictions: Mapping[Spec, Mapping[str, float]]) -> Ranking:
        """Compare how measures and training order networks, on the test set.

        Args:
            name: name of the subject of the comparison.
            predictions: for each network the value of each measure, by name; larger is better.

        Raises:
            SearchError: if the table lacks a network, or on fewer than three networks.
        """
        ranked = []
        for spec, measures in predictions.items():
            network = self[spec]
            first, *more = (
                {"loss": -scores["test_loss"], "top-1": scores["test_top1"]}
                for _, scores in sorted(network.trainings.items())
            )
            ranked.append(Ranked(spec, network.costs, measures, first, more[0] if more else None))
        return compare(name, ranked)


def _network(name: str, rows: Sequence[Mapping[str, Any]]) -> TrainedNetwork:
    trainings = {int(row["seed"]): {score: float(row[score]) for score in _SCORES} for row in rows}
    first = rows[0]
    costs = {cost: float(first[cost]) for cost in ("macs", "params")}
    return TrainedNetwork(str(name), str(first["space"]), parse_spec(first["spec"]), costs, trainings)
