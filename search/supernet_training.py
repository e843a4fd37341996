"""A supernet as the trainer's trainee: each step trains one path or several, the same in every process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final

from torch import nn
from torch.optim import Optimizer

from glit_models.training import Recipe, Trainee

from .path_optimizer import keep_to_paths
from .path_sampling import DrawPaths
from .space import SearchSpace
from .starting import fill_supernet
from .supernet import Sharing, Supernet

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
    """Trains the supernet of `space`, one path a step (SPOS, arXiv 1904.00420, section 3.2) or several.

    With several, part i of a step's batch goes through path i modulo their number, and the optimiser takes the mean of
    the gradients.

    Args:
        space: whose members share weights.
        sharing: see `Supernet`.
        recipe: of the training.
        draw_paths: the paths of each step; their number divides that of the parts into which each process cuts its
            share of a batch.
        start: weights to start from, see `fill_supernet`; random ones unless given.
    """

    def __init__(
        self, space: SearchSpace, sharing: Sharing, recipe: Recipe, draw_paths: DrawPaths, start: str | None = None
    ) -> None:
        self.space, self.sharing, self.recipe, self.draw_paths = space, sharing, recipe, draw_paths
        self.start = start

    def create_model(self, num_classes: int) -> Supernet:
        """The supernet with the weights that it starts from."""
        supernet = create_supernet(self.space, self.sharing, self.recipe, num_classes)
        if self.start is not None:
            fill_supernet(supernet, self.start)
        if self.recipe.model.grad_checkpointing:
            supernet.net.set_grad_checkpointing()
        return supernet

    def begin(self, model: Any, optimizer: Optimizer, prepare: Callable[[nn.Module], object]) -> None:
        """Keep steps to their paths, and give every block the trainer's operators."""
        model.prepare_blocks(prepare)
        if self.sharing == "entangled":
            keep_to_paths(optimizer, model)

    def begin_part(self, model: Any, step: int, part: int) -> None:
        """Make this part's path the active one."""
        paths = self.draw_paths(step)
        model.activate(paths[part % len(paths)], paths)
