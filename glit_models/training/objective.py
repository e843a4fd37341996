"""What a step minimises: cross-entropy with mixed or smoothed labels, and a teacher's word beside it.

Axes: `B` batch, `K` classes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import Mixup
from torch import Tensor, nn

from ..errors import RecipeError
from .recipe import AugmentSection, DistillSection

__all__ = ["Objective"]


class Objective:
    """The loss of a recipe.

    Args:
        augment: label smoothing, mixup and cutmix.
        distill: the teacher's part; `teacher` is made by `make_teacher` from its name.
        num_classes: K.
        preprocessing: `mean` and `std` that the student's images are normalised with.
    """

    def __init__(
        self,
        augment: AugmentSection,
        distill: DistillSection,
        num_classes: int,
        preprocessing: dict[str, Any],
        make_teacher: Callable[[str], nn.Module],
    ) -> None:
        self.smoothing = augment.label_smoothing
        self.mixup: Mixup | None = None
        if augment.mixup or augment.cutmix:
            self.mixup = Mixup(
                augment.mixup, augment.cutmix, switch_prob=augment.mixup_switch_prob,
                label_smoothing=augment.label_smoothing, num_classes=num_classes,
            )  # fmt: skip
        self.distill = distill
        self.teacher = None
        if distill.teacher is not None:
            self.teacher = _Teacher(make_teacher(distill.teacher), distill.teacher, num_classes, preprocessing)

    def mix(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Images [B, C, H, W] and labels [B] -> mixed images and targets: [B, K] where mixing is on, else the labels.

        Draws from numpy's process-wide generator, as timm's Mixup does.
        """
        return self.mixup(images, labels) if self.mixup is not None else (images, labels)

    def loss(self, logits: Tensor, images: Tensor, targets: Tensor) -> Tensor:
        """Logits [B, K], the images [B, C, H, W] they are of and their targets -> the mean loss."""
        logits = logits.float()
        # Mixed targets have been smoothed already.
        loss = F.cross_entropy(logits, targets, label_smoothing=self.smoothing if targets.ndim == 1 else 0.0)
        if self.teacher is None:
            return loss
        taught = self.teacher(images)
        if self.distill.kind == "hard":
            distilled = F.cross_entropy(logits, taught.argmax(1))
        else:
            tau = self.distill.temperature
            student, teacher = F.log_softmax(logits / tau, 1), F.log_softmax(taught / tau, 1)
            distilled = tau**2 * F.kl_div(student, teacher, log_target=True, reduction="batchmean")
        return (1 - self.distill.alpha) * loss + self.distill.alpha * distilled


class _Teacher:
    """A trained classifier asked about the student's images, in its own size and normalisation."""

    def __init__(self, model: Any, name: str, num_classes: int, preprocessing: dict[str, Any]) -> None:
        if model.num_classes != num_classes:
            raise RecipeError(f"distill.teacher {name!r} has {model.num_classes} classes, the data {num_classes}")
        self.model = model.eval().requires_grad_(False)
        self.size = tuple(model.pretrained_cfg["input_size"][1:])
        device = next(model.parameters()).device
        ours, theirs = preprocessing, model.pretrained_cfg
        own_std, std = (torch.tensor(cfg["std"], device=device) for cfg in (ours, theirs))
        own_mean, mean = (torch.tensor(cfg["mean"], device=device) for cfg in (ours, theirs))
        self.scale = (own_std / std)[:, None, None]
        self.shift = ((own_mean - mean) / std)[:, None, None]

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        images = images * self.scale + self.shift
        if images.shape[-2:] != self.size:
            images = F.interpolate(images, self.size, mode="bicubic", antialias=True)
        return self.model(images).float()
