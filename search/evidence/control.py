"""The control of a search: other networks that are trained like its winner.

If the winner is no better than random networks within the budget, the search gained nothing. If it is no better from
inherited weights than from random ones, or than the network that the search started from, the start gained nothing.
`pipeline` trains them; this module holds the result.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

from glit_models import Spec, parse_spec

__all__ = ["Control", "percent"]


@final
@dataclass(frozen=True)
class Control:
    """Comparison of a search's winner with random networks.

    Attributes:
        split: the images that all are scored on: 'test', or 'search' if the data has no test set.
        num_images: number of these images.
        winner: top-1 accuracy of the winner in percent, after the same training as the random networks.
        networks: pairs (random network, its top-1 accuracy in percent).
        starts: triples (what it is, network, its top-1 accuracy in percent) of other starts; for a search that starts
            from weights.
    """

    split: str
    num_images: int
    winner: float
    networks: tuple[tuple[Spec, float], ...]
    starts: tuple[tuple[str, Spec, float], ...] = ()

    @property
    def num_beaten(self) -> int:
        """Number of random networks that are worse than the winner."""
        return sum(accuracy < self.winner for _, accuracy in self.networks)

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        networks = [{"spec": spec.to_dict(), "accuracy": accuracy} for spec, accuracy in self.networks]
        starts = [{"name": name, "spec": spec.to_dict(), "accuracy": accuracy} for name, spec, accuracy in self.starts]
        data = {"split": self.split, "images": self.num_images, "winner": self.winner, "networks": networks}
        return {**data, "starts": starts} if starts else data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Control:
        """The inverse of `to_dict`. Raises KeyError, TypeError or ValueError on anything else."""
        networks = [(parse_spec(network["spec"]), percent(network["accuracy"])) for network in data["networks"]]
        if data["split"] not in ("test", "search") or not networks or int(data["images"]) < 1:
            raise ValueError("it must name a split, its number of images, and at least one network")
        starts = [
            (str(start["name"]), parse_spec(start["spec"]), percent(start["accuracy"]))
            for start in data.get("starts", ())
        ]
        return cls(data["split"], int(data["images"]), percent(data["winner"]), tuple(networks), tuple(starts))


def percent(value: Any) -> float:
    """An accuracy in percent. Raises ValueError or TypeError on anything else."""
    if not 0 <= float(value) <= 100:
        raise ValueError(f"an accuracy must be from 0 to 100, got {value!r}")
    return float(value)
