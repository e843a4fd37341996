"""Score a run's model on the validation set after epochs, and keep the best weights as a file."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from ..errors import is_out_of_memory
from ..evaluate import balanced_accuracy, macro_f1
from ..evaluate.multilabel import score_multilabel
from ..runs.files import whole_file
from ..runs.processes import release_memory
from ..weights.files import write_state_dict
from .feed import Feed
from .recipe import Recipe
from .reports import seed_part

__all__ = ["Selection"]


class Selection:
    """Scores a model and keeps its best weights, in float32.

    Create it before the model is prepared for training, so that the preparation does not affect the scored model.

    Args:
        recipe: recipe of the run.
        folder: folder of the run.
        model: the trained model.
        averaged: the model of averaged weights, which is scored instead if given.
        accelerator: accelerator of the run.
        is_multilabel: whether images have several labels; then the mean average precision chooses, not top-1.
    """

    def __init__(
        self, recipe: Recipe, folder: Path, model: nn.Module, averaged: nn.Module | None, accelerator: Any,
        is_multilabel: bool = False,
    ) -> None:  # fmt: skip
        self.recipe, self.model, self.averaged, self.accelerator = recipe, model, averaged, accelerator
        self.path = folder / "best.safetensors"
        self.spread: dict[str, float] = {}
        self.metric = "map" if is_multilabel else "top1"
        self.scored = copy.deepcopy(model) if averaged is None else averaged

    def weights(self, feed: Feed, step: int) -> nn.Module:
        """The model to score after a step: with averaged weights if there are any."""
        if self.averaged is None:
            self.scored.load_state_dict(self.model.state_dict())
        if not self.recipe.model.img_size_shares:
            return self.scored
        # BatchNorm's running statistics mix all image sizes, and are wrong for any single one.
        scored = copy.deepcopy(self.scored)
        seed_part(self.recipe.seed, step, 0, self.accelerator.device)
        update_bn(feed.for_statistics(), scored)
        return scored

    def score(self, model: nn.Module, feed: Feed, dataset: Any) -> float:
        """`metric` in percent, over the shares of all processes; `spread` holds the other scores.

        If memory runs out, scores again with half the batch size.
        """
        while True:
            try:
                return self._score(model, feed, dataset)
            except RuntimeError as error:
                if not is_out_of_memory(error) or feed.eval_batch_size == 1:
                    raise
            release_memory()  # after the error, which holds tensors, is released
            feed.eval_batch_size //= 2

    @torch.inference_mode()
    def _score(self, model: nn.Module, feed: Feed, dataset: Any) -> float:
        batches, count = feed.scoring(dataset)
        device = self.accelerator.device
        if self.metric == "map":
            return self._score_multilabel(model.eval(), feed, batches)
        num_classes = len(feed.splits.class_names)
        confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)
        model.eval()
        for images, labels in batches:
            guesses = model(images.to(device)).argmax(1)
            confusion.index_put_((labels.to(device), guesses), torch.ones_like(guesses), accumulate=True)
        confusion = self.accelerator.reduce(confusion, "sum")
        counts = confusion.cpu().numpy()
        self.spread = {"balanced_accuracy": balanced_accuracy(counts), "macro_f1": macro_f1(counts)}
        return 100 * int(confusion.trace()) / count

    def _score_multilabel(self, model: nn.Module, feed: Feed, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
        from accelerate.utils import gather_object

        device = self.accelerator.device
        pairs = [(model(images.to(device)).float().cpu(), labels.cpu()) for images, labels in batches]
        logits, truth = (torch.cat(side).numpy() for side in zip(*gather_object(pairs), strict=True))
        result = score_multilabel(logits, truth, feed.splits.class_names)
        self.spread = {"macro_f1": result.macro_f1, "micro_f1": result.micro_f1}
        return result.mean_average_precision

    def keep(self, model: nn.Module) -> None:
        """Write the weights as the best so far. Raises WriteError if they cannot be written."""
        with whole_file(self.path) as path:
            write_state_dict(model.state_dict(), path)

    def restore(self, model: nn.Module) -> None:
        """Load the best weights into a model."""
        model.load_state_dict(load_file(self.path))
