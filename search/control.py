"""The control of a search: random networks within its budget, trained as its winner was.

A winner that is no better than these was not worth the search. `pipeline` trains them; this is what came out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

from glit_models import Spec, parse_spec

__all__ = ["Control"]


@final
@dataclass(frozen=True)
class Control:
    """How the winner of a search compares with random networks.

    Attributes:
        split: the images that all are scored on: 'test', or 'search' if the data have no test set.
        num_images: how many these are.
        winner: top-1 accuracy of the winner in percent, after the training that the random networks had.
        networks: (random network, its top-1 accuracy in percent).
    """

    split: str
    num_images: int
    winner: float
    networks: tuple[tuple[Spec, float], ...]

    @property
    def num_beaten(self) -> int:
        """How many of the random networks are worse than the winner."""
        return sum(accuracy < self.winner for _, accuracy in self.networks)

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        networks = [{"spec": spec.to_dict(), "accuracy": accuracy} for spec, accuracy in self.networks]
        return {"split": self.split, "images": self.num_images, "winner": self.winner, "networks": networks}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Control:
        """What `to_dict` returned. Raises KeyError, TypeError or ValueError on anything else."""
        networks = [(parse_spec(network["spec"]), _percent(network["accuracy"])) for network in data["networks"]]
        if data["split"] not in ("test", "search") or not networks or int(data["images"]) < 1:
            raise ValueError("it must name a split, its number of images, and at least one network")
        return cls(data["split"], int(data["images"]), _percent(data["winner"]), tuple(networks))


def _percent(value: Any) -> float:
    if not 0 <= float(value) <= 100:
        raise ValueError(f"an accuracy must be from 0 to 100, got {value!r}")
    return float(value)
