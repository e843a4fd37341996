"""Which networks each step of a supernet's training takes: a function of (seed, step), so that it resumes anywhere."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from glit_models import Spec

from .budget_sampler import BudgetSampler

__all__ = ["DrawPaths", "path_sampling"]

DrawPaths = Callable[[int], Sequence[Spec]]  # step -> its paths


def path_sampling(sampler: BudgetSampler, num_paths: int, seed: int) -> DrawPaths:
    """The paths of each step.

    Args:
        sampler: draws the paths within its budgets.
        num_paths: of a step.
        seed: of all draws.
    """

    def draw(step: int) -> list[Spec]:
        rng = random.Random(f"{seed} {step}")
        return [sampler.sample(rng)[0] for _ in range(num_paths)]

    return draw
