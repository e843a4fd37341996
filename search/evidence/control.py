"""The control of a search: random networks within its budget, trained like its winner.

If the winner is no better than these, the search gained nothing. `pipeline` trains them; this module holds the result.
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
    """Comparison of a search's winner with random networks.

    Attributes:
        split: the images that all are scored on: 'test', or 'search' if the data has no test set.
        num_images: number of these images.
        winner: top-1 accuracy of the winner in percent, after the same training as the random networks.
        networks: pairs (random network, its top-1 accuracy in percent).
    """

    split: str
    num_images: int
    winner: float
    networks: tuple[tuple[Spec, float], ...]

    @property
    def num_beaten(self) -> int:
        """Number of random networks that are worse than the winner."""
        return sum(accuracy < self.winner for _, accuracy in self.networks)

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        networks = [{"spec": spec.to_dict(), "accuracy": accuracy} for spec, accuracy in self.networks]
        return {"split": self.split, "images": self.num_images, "winner": self.winner, "networks": networks}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Control:
        """The inverse of `to_dict`. Raises KeyError, TypeError or ValueError on anything else."""
        networks = [(parse_spec(network["spec"]), _percent(network["accuracy"])) for network in data["networks"]]
        if data["split"] not in ("test", "search") or not networks or int(data["images"]) < 1:
            raise ValueError("it must name a split, its number of images, and at least one network")
        return cls(data["split"], int(data["images"]), _percent(data["winner"]), tuple(networks))


def _percent(value: Any) -> float:
    if not 0 <= float(value) <= 100:
        raise ValueError(f"an accuracy must be from 0 to 100, got {value!r}")
    return float(value)
