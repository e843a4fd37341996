"""Train a supernet with the trainer: each step trains one path or several, the same in every process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from glit_models import Spec
from glit_models.training import Objective, Recipe, Trainee

from ..spaces.space import SearchSpace
from .path_optimizer import keep_to_paths
from .path_sampling import DrawPaths
from .starting import fill_supernet
from .supernet import Sharing, Supernet

__all__ = ["SupernetTrainee", "create_supernet"]


def create_supernet(
    space: SearchSpace, sharing: Sharing, recipe: Recipe, num_classes: int, private_qk: bool = False
) -> Supernet:
    """Create a supernet with the image size and rates of a training recipe."""
    model = recipe.model
    return Supernet(
        space, sharing, img_size=model.img_size, num_classes=num_classes, global_pool=model.global_pool,
        drop_rate=model.drop_rate, drop_path_rate=model.drop_path_rate, private_qk=private_qk,
    )  # fmt: skip


@final
class SupernetTrainee(Trainee):
    """Trains the supernet of `space` with one path per step (SPOS, arXiv 1904.00420, section 3.2) or several.

    With several, part i of a step's batch goes through path i modulo their number, and the optimiser uses the mean of
    the gradients.

    Args:
        space: the space whose members share weights.
        sharing: see `Supernet`.
        recipe: recipe of the training.
        draw_paths: draws the paths of each step; their number must divide the number of parts of each process's share
            of a batch.
        start: initial weights, see `fill_supernet`; default: random ones.
        teacher: network whose outputs all others learn from, in addition to the labels; None for labels only.
        distill: weight of these outputs in the loss.
        private_qk: see `Supernet`.
    """

    def __init__(
        self,
        space: SearchSpace,
        sharing: Sharing,
        recipe: Recipe,
        draw_paths: DrawPaths,
        start: str | None = None,
        teacher: Spec | None = None,
        distill: float = 0.0,
        private_qk: bool = False,
    ) -> None:
        self.space, self.sharing, self.recipe, self.draw_paths = space, sharing, recipe, draw_paths
        self.start, self.teacher, self.distill = start, teacher, distill
        self.private_qk = private_qk

    def create_model(self, num_classes: int) -> Supernet:
        """Create the supernet with its initial weights."""
        supernet = create_supernet(self.space, self.sharing, self.recipe, num_classes, self.private_qk)
        if self.start is not None:
            fill_supernet(supernet, self.start)
        if self.recipe.model.grad_checkpointing:
            supernet.net.set_grad_checkpointing()
        return supernet

    def begin(
        self, model: Any, optimizer: Optimizer, objective: Objective, prepare: Callable[[nn.Module], object]
    ) -> None:
        """Restrict steps to their paths, and prepare every block with the trainer's operators."""
        model.prepare_blocks(prepare)
        if self.teacher is not None:
            objective.set_teacher(_InPlaceTeacher(model, self.teacher), self.distill)
        if self.sharing != "independent":
            keep_to_paths(optimizer, model)

    def begin_part(self, model: Any, step: int, part: int) -> None:
        """Activate the path of this part."""
        paths = self.draw_paths(step)
        model.activate(paths[part % len(paths)], paths)


@final
class _InPlaceTeacher:
    """A network of the supernet that teaches the others with its current weights."""

    def __init__(self, supernet: Supernet, spec: Spec) -> None:
        self.supernet, self.spec = supernet, supernet.space.canonical(spec)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor | None:
        """Images [B, in_chans, H, W] -> logits [B, K]; None while this network itself is trained."""
        pupil, paths = self.supernet.active, self.supernet.paths
        assert pupil is not None
        if pupil == self.spec:
            return None
        self.supernet.activate(self.spec)
        logits = self.supernet(images).float()
        self.supernet.activate(pupil, paths)
        return logits
