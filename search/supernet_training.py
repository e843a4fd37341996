"""A supernet as the trainer's trainee: each step trains one path, the same in every process."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, final

from torch import nn
from torch.optim import Optimizer

from glit_models.training import Recipe, Trainee

from .budget_sampler import BudgetSampler
from .space import SearchSpace
from .supernet import Sharing, Supernet, keep_outside_path

__all__ = ["SupernetTrainee", "create_supernet"]


def create_supernet(space: SearchSpace, sharing: Sharing, recipe: Recipe, num_classes: int) -> Supernet:
    """The supernet of a training recipe's image size and rates."""
    model = recipe.model
    return Supernet(
        space, sharing, img_size=model.img_size, num_classes=num_classes, drop_rate=model.drop_rate,
        drop_path_rate=model.drop_path_rate,
    )  # fmt: skip


@final
class SupernetTrainee(Trainee):
    """Trains the supernet of `space`, a path a step (SPOS, arXiv 1904.00420, section 3.2).

    Args:
        space: whose members share weights.
        sharing: see `Supernet`.
        recipe: of the training.
        sampler: draws the paths within budgets; None draws any, uniformly over choices.
    """

    def __init__(
        self, space: SearchSpace, sharing: Sharing, recipe: Recipe, sampler: BudgetSampler | None = None
    ) -> None:
        self.space, self.sharing, self.recipe, self.sampler = space, sharing, recipe, sampler

    def create_model(self, num_classes: int) -> Supernet:
        """The supernet, initialised."""
        supernet = create_supernet(self.space, self.sharing, self.recipe, num_classes)
        if self.recipe.model.grad_checkpointing:
            supernet.net.set_grad_checkpointing()
        return supernet

    def begin(self, model: Any, optimizer: Optimizer, prepare: Callable[[nn.Module], object]) -> None:
        """Keep steps to the path, and give every block the trainer's operators."""
        model.prepare_blocks(prepare)
        if self.sharing == "entangled":
            keep_outside_path(optimizer, model)

    def begin_step(self, model: Any, step: int) -> None:
        """Draw the step's path from (seed, step)."""
        rng = random.Random(f"{self.recipe.seed} {step}")
        model.activate(self.sampler.sample(rng)[0] if self.sampler else self.space.sample(rng))
