"""Screening: score many networks on few images, then fewer on more, and estimate how often their order is wrong.

An evolution that compares networks on few images ends with rounds on more images. A fitness scores the networks.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import final

import numpy as np
from numpy.typing import NDArray

from glit_models import Spec

from .candidates import Candidate, Candidates

__all__ = ["Confirmation", "describe_noise", "rounds", "wrong_order"]


@final
class Confirmation:
    """The rounds after an evolution on few images: each has half the networks and twice the images.

    The last round uses all images, and only its networks get a fitness, because scores on different images or of
    different measures are not comparable.

    candidates: candidates scored on few images.
    num_batches: number of batches of these few images.
    all_batches: number of batches of the whole search set.
    confirm: number of networks in the last round.
    given: networks that are kept in all rounds.
    scores: scores of the finished rounds, by the candidates' numbers.
    """

    def __init__(
        self,
        candidates: Sequence[Candidate],
        num_batches: int,
        all_batches: int,
        confirm: int,
        given: Sequence[Spec] = (),
        scores: Sequence[dict[int, float]] = (),
    ) -> None:
        self._candidates, self._given = candidates, given
        self.scores = list(scores)
        self.rounds = rounds(len(candidates), num_batches, all_batches, confirm)

    def ask(self) -> tuple[list[Spec], int | None] | None:
        """The networks and number of batches of the next round (None for all, by the fitness); None when finished."""
        if len(self.scores) == len(self.rounds):
            return None
        last = {i: c.fitness or 0.0 for i, c in enumerate(self._candidates)} if not self.scores else self.scores[-1]
        count, batches = self.rounds[len(self.scores)]
        best = sorted(last, key=lambda index: -last[index])
        kept = [i for place, i in enumerate(best) if place < count or self._candidates[i].spec in self._given]
        return [self._candidates[index].spec for index in kept], batches

    def tell(self, scores: Mapping[Spec, float]) -> None:
        """Set the scores of the current round."""
        self.scores.append({i: scores[c.spec] for i, c in enumerate(self._candidates) if c.spec in scores})

    def confirmed(self) -> Candidates:
        """The candidates, with a fitness for those of the last round only."""
        final = self.scores[-1] if len(self.scores) == len(self.rounds) else {}
        return Candidates(dataclasses.replace(c, fitness=final.get(i)) for i, c in enumerate(self._candidates))


def rounds(num_candidates: int, num_batches: int, all_batches: int, confirm: int) -> list[tuple[int, int | None]]:
    """Networks and batches of each round after an evolution on few images; None for all batches, by the fitness."""
    found: list[tuple[int, int | None]] = []
    count, batches = num_candidates // 2, 2 * num_batches
    while count > confirm and batches < all_batches:
        found.append((count, batches))
        count, batches = count // 2, 2 * batches
    return [*found, (confirm, None)]


def wrong_order(losses: NDArray[np.float64]) -> tuple[float, float]:
    """The standard error of the difference of two networks' mean losses, and the share of misordered pairs.

    Losses on the same images share much of their noise, which cancels in their difference. With normal distributions,
    the sign is wrong for arctan(e / t) / pi of the differences with true deviation t and error e.

    Args:
        losses: losses of each network on each image, [K, S].
    """
    differences = np.array([a - b for a, b in itertools.combinations(losses, 2)])
    variance = float(np.mean(differences.var(axis=1, ddof=1) / differences.shape[1]))
    true = max(float(np.mean(differences.mean(axis=1) ** 2)) - variance, 0.0)
    return math.sqrt(variance), math.atan2(math.sqrt(variance), math.sqrt(true)) / math.pi


def describe_noise(losses: NDArray[np.float64]) -> str:
    """Describe in one line how reliable the order of networks by their losses [K, S] on these images is."""
    error, share = wrong_order(losses)
    return (
        f"networks are compared by their loss on {losses.shape[1]} images; a difference has a standard error of "
        f"{error:.3g}, and {100 * share:.0f} of 100 pairs of random networks are put in the wrong order"
    )
