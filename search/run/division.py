"""Divide the scoring of many networks among workers, so that the scores equal those of one process.

Networks with a common prefix share work, and BatchNorm is calibrated once per network. So networks are divided, unless
the images exceed a worker's memory: then each would read all of them in every generation, so images are divided.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

import numpy as np

from glit_models import Spec

from ..executors.tasks import Task
from ..fitness import Fitness
from ..spaces.space import SearchSpace
from ..supernets.scoring import add_in_order
from .context import RunContext

__all__ = ["Division", "digest", "score_divided"]


@final
@dataclass(frozen=True)
class Division:
    """The common arguments of all tasks that score networks of a stage.

    Attributes:
        stage: name of the stage.
        space: the space of its networks.
        fitness: the fitness that scores them.
        weights: identifies the supernet, so that results of another one are not reused; None if it does not matter.
    """

    stage: str
    space: SearchSpace
    fitness: type[Fitness]
    weights: str | None

    def task(
        self, kind: str, specs: Sequence[Spec], batches: int | Sequence[int] | None, retain: Sequence[Spec] = ()
    ) -> Task:
        """A task that scores networks; see `work` for the kinds."""
        arguments = {
            "stage": self.stage, "specs": [spec.to_dict() for spec in specs], "batches": batches,
            "retain": [spec.to_dict() for spec in retain], "weights": self.weights,
        }  # fmt: skip
        title = f"{self.stage}: scoring {len(specs)} network{'s' if len(specs) > 1 else ''}"
        return Task(kind, arguments, title, self.fitness.is_collective)


def score_divided(
    context: RunContext, division: Division, specs: Sequence[Spec], batches: int | None, retain: Sequence[Spec]
) -> dict[Spec, float]:
    """Score networks on all workers.

    Args:
        batches: number of batches for `Fitness.screen`; None for all, by the fitness.
        retain: networks whose children are scored; see `Fitness.retain`.
    """
    places = [options.index for options in division.space.block_options]
    ordered = sorted(  # networks with a common prefix together
        specs, key=lambda spec: (spec.embed_dim, [place[b] for place, b in zip(places, spec.blocks, strict=False)])
    )
    workers = context.num_workers
    by_images = workers > 1 and batches is None and division.fitness.can_divide
    if by_images and not context.keeps_images(division.space):
        shares = np.array_split(np.arange(context.num_batches), min(workers, context.num_batches))
        bounds = [(int(share[0]), int(share[-1]) + 1) for share in shares]
        parts = context.run([division.task("score_batches", ordered, pair, retain) for pair in bounds])
        sums = [add_in_order(itertools.chain(*rows)) for rows in zip(*parts, strict=True)]
        scores = [total / len(context.splits.validation) for total in sums]
    else:
        count = len(ordered) if division.fitness.is_collective else min(workers, len(ordered))
        shares = np.array_split(np.arange(len(ordered)), count)
        networks = [[ordered[index] for index in share] for share in shares]
        scores = list(itertools.chain(*context.run([division.task("score", s, batches, retain) for s in networks])))
    return dict(zip(ordered, scores, strict=True))


def digest(path: Path) -> str:
    """Hash of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
