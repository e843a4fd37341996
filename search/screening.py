"""Few images first: which networks are scored on how many images, and how often their order is wrong.

An evolution whose networks are compared on few images ends with rounds on more. What scores networks is a fitness.
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
    """The rounds after an evolution by few images: each has half the networks and twice the images.

    The last round has all images, and its networks alone get a fitness: scores on different images, or of different
    measures, are not compared.

    Args:
        candidates: what was scored on few images.
        num_batches: of these few images.
        all_batches: of the whole search set.
        confirm: how many networks the last round has.
        given: networks that no round leaves out.
        scores: of the rounds that are done, by the candidates' numbers.
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
        """The networks of the next round and on how many batches; None for all, by the fitness. None when over."""
        if len(self.scores) == len(self.rounds):
            return None
        last = {i: c.fitness or 0.0 for i, c in enumerate(self._candidates)} if not self.scores else self.scores[-1]
        count, batches = self.rounds[len(self.scores)]
        best = sorted(last, key=lambda index: -last[index])
        kept = [i for place, i in enumerate(best) if place < count or self._candidates[i].spec in self._given]
        return [self._candidates[index].spec for index in kept], batches

    def tell(self, scores: Mapping[Spec, float]) -> None:
        """How good the networks of the round are."""
        self.scores.append({i: scores[c.spec] for i, c in enumerate(self._candidates) if c.spec in scores})

    def confirmed(self) -> Candidates:
        """The candidates with the fitness of those of the last round; the others have none."""
        final = self.scores[-1] if len(self.scores) == len(self.rounds) else {}
        return Candidates(dataclasses.replace(c, fitness=final.get(i)) for i, c in enumerate(self._candidates))


def rounds(num_candidates: int, num_batches: int, all_batches: int, confirm: int) -> list[tuple[int, int | None]]:
    """Networks and batches of each round after an evolution by few images; None for all batches, by the fitness."""
    found: list[tuple[int, int | None]] = []
    count, batches = num_candidates // 2, 2 * num_batches
    while count > confirm and batches < all_batches:
        found.append((count, batches))
        count, batches = count // 2, 2 * batches
    return [*found, (confirm, None)]


def wrong_order(losses: NDArray[np.float64]) -> tuple[float, float]:
    """The standard error of the difference of two networks' mean losses, and how many of all pairs are misordered.

    Losses on the same images have much of their noise in common, which their difference does not have. With normal
    distributions, of differences with a true deviation t and an error e, arctan(e / t) / pi have the wrong sign.

    Args:
        losses: of each network on each image, [K, S].
    """
    differences = np.array([a - b for a, b in itertools.combinations(losses, 2)])
    variance = float(np.mean(differences.var(axis=1, ddof=1) / differences.shape[1]))
    true = max(float(np.mean(differences.mean(axis=1) ** 2)) - variance, 0.0)
    return math.sqrt(variance), math.atan2(math.sqrt(variance), math.sqrt(true)) / math.pi


def describe_noise(losses: NDArray[np.float64]) -> str:
    """What to expect of the order of networks by their losses [K, S] on these images, in one line."""
    error, share = wrong_order(losses)
    return (
        f"networks are compared by their loss on {losses.shape[1]} images; a difference has a standard error of "
        f"{error:.3g}, and {100 * share:.0f} of 100 pairs of random networks are put in the wrong order"
    )
