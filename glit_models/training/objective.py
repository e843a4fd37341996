"""The training loss: cross-entropy with mixed or smoothed labels, and distillation from a teacher.

With several labels per image it is the binary cross-entropy of each class.

Axes: `B` batch, `K` classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import Mixup
from torch import Tensor, nn

from ..data import Splits
from ..errors import Argument, RecipeError, first_line
from ..reading import parse_yaml, read_text
from .recipe import AugmentSection, DistillSection, Recipe

__all__ = ["Objective", "class_weights", "refuse_for_multilabel"]


class Objective:
    """The loss of a recipe.

    Args:
        augment: label smoothing, mixup and cutmix.
        distill: settings of the distillation; `make_teacher` creates the teacher from its name.
        num_classes: K.
        preprocessing: `mean` and `std` that normalise the student's images.
        weights: class weights [K] whose mean over the training images is 1; None for no weights.
        is_multilabel: whether labels are [B, K], with 1 for each class of an image.
    """

    def __init__(
        self,
        augment: AugmentSection,
        distill: DistillSection,
        num_classes: int,
        preprocessing: dict[str, Any],
        make_teacher: Callable[[str], nn.Module],
        weights: Tensor | None = None,
        is_multilabel: bool = False,
    ) -> None:
        self.weights = weights
        self.is_multilabel = is_multilabel
        self.smoothing = augment.label_smoothing
        self.mixup: Mixup | None = None
        if augment.mixup or augment.cutmix:
            self.mixup = Mixup(
                augment.mixup, augment.cutmix, switch_prob=augment.mixup_switch_prob,
                label_smoothing=augment.label_smoothing, num_classes=num_classes,
            )  # fmt: skip
        self.distill = distill
        self.teacher: Callable[[Tensor], Tensor | None] | None = None
        if distill.teacher is not None:
            self.teacher = _Teacher(make_teacher(distill.teacher), distill.teacher, num_classes, preprocessing)

    def set_teacher(self, teacher: Callable[[Tensor], Tensor | None], share: float) -> None:
        """Set the teacher and the weight of its soft labels in the loss.

        Args:
            teacher: maps the student's images [B, C, H, W] to logits [B, K], or to None for images that it skips.
        """
        self.teacher, self.distill = teacher, DistillSection(kind="soft", alpha=share, temperature=1.0)

    def mix(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Mix images [B, C, H, W] and labels [B]. Returns images and targets: [B, K] if mixing is on, else the labels.

        Draws from numpy's process-wide generator, as timm's Mixup does.
        """
        return self.mixup(images, labels) if self.mixup is not None else (images, labels)

    def loss(self, logits: Tensor, images: Tensor, targets: Tensor) -> Tensor:
        """The mean loss of logits [B, K], given their images [B, C, H, W] and targets."""
        logits = logits.float()
        if self.is_multilabel:
            return F.binary_cross_entropy_with_logits(logits, targets + self.smoothing * (0.5 - targets))
        if self.weights is not None:
            loss = self._weighted_loss(logits, targets, self.weights)
        else:  # mixed targets are already smoothed
            loss = F.cross_entropy(logits, targets, label_smoothing=self.smoothing if targets.ndim == 1 else 0.0)
        if self.teacher is None:
            return loss
        taught = self.teacher(images)
        if taught is None:
            return loss
        if self.distill.kind == "hard":
            distilled = F.cross_entropy(logits, taught.argmax(1))
        else:
            tau = self.distill.temperature
            student, teacher = F.log_softmax(logits / tau, 1), F.log_softmax(taught / tau, 1)
            distilled = tau**2 * F.kl_div(student, teacher, log_target=True, reduction="batchmean")
        return (1 - self.distill.alpha) * loss + self.distill.alpha * distilled

    def _weighted_loss(self, logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        """The mean over images of the cross-entropy with smoothed labels, times the weight of the image's class.

        It is not the mean over weights, so that a batch's loss is the mean of its parts' losses. In PyTorch's
        cross-entropy the smoothed part has the weights of all classes, so every image would pull towards rare classes.
        """
        share = self.smoothing
        if targets.ndim == 1:
            losses = F.cross_entropy(logits, targets, label_smoothing=share, reduction="none")
            return (weights[targets] * losses).mean()
        mixed = (targets - share / logits.shape[1]) / (1 - share)  # without the smoothing
        log_probs = logits.log_softmax(1)
        own, all_classes = (mixed * weights * log_probs).sum(1), (mixed @ weights) * log_probs.mean(1)
        return -((1 - share) * own + share * all_classes).mean()


def refuse_for_multilabel(recipe: Recipe) -> None:
    """Raises RecipeError on settings that multilabel training does not support."""
    for key, value in (
        ("augment.mixup", recipe.augment.mixup), ("augment.cutmix", recipe.augment.cutmix),
        ("augment.batched", recipe.augment.batched), ("distill.teacher", recipe.distill.teacher),
        ("class_weights", recipe.class_weights),
    ):  # fmt: skip
        if value:
            raise RecipeError(Argument(key), " cannot be used for images with several labels; leave it out")


def class_weights(given: str | None, splits: Splits, device: torch.device) -> Tensor | None:
    """Class weights [K] for the loss; their mean over the training images is 1.

    Args:
        given: 'balanced', inverse to the class counts; the path of a YAML or JSON file of `CLASS: WEIGHT`; None.

    Raises:
        RecipeError: if the file has other classes or values that are not positive, or the class counts are unknown.
    """
    if given is None:
        return None
    key, counts = Argument("class_weights", given), splits.count_train()
    if counts is None:
        raise RecipeError(key, " cannot be used: how many images a class has is not known of these data")
    balanced = [1 / max(count, 1) for count in counts]
    weights = balanced if given == "balanced" else _read_weights(given, splits.class_names)
    mean = sum(weight * count for weight, count in zip(weights, counts, strict=True)) / sum(counts)
    return torch.tensor([weight / mean for weight in weights], device=device)


def _read_weights(path: str, class_names: Sequence[str]) -> list[float]:
    try:
        values = parse_yaml(read_text(path))
    except (OSError, ValueError) as error:
        key = Argument("class_weights", path)
        raise RecipeError(key, f" is neither 'balanced' nor a file to be read: {first_line(error)}") from None
    given = {str(name): value for name, value in values.items()} if isinstance(values, Mapping) else {}
    for name in class_names:
        value = given.get(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e30:
            raise RecipeError(f"{path}: the weight of class {name} must be a positive number, got {value!r:.200}")
    for name in given:
        if name not in class_names:
            raise RecipeError(f"{path}: {name} is none of the classes {', '.join(class_names[:5])}")
    return [float(given[name]) for name in class_names]


class _Teacher:
    """A trained classifier, applied to the student's images at its own size and normalisation."""

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
