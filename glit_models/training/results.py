"""Save the result of a run: a model folder that timm loads, for any classifier, with the facts about its training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from timm.models import save_for_hf

from ..data import Splits
from ..data.label_table import is_label_table
from ..data.sources import is_folder
from ..model import SpecTransformer
from ..runs.files import whole_folder, write_text
from ..weights.files import ENTRY_FILE, MULTILABEL
from ..weights.folder import save_folder, to_json
from .recipe import Recipe

__all__ = ["METRICS", "data_name", "record_scores", "save_model"]

METRICS = {
    "top1": "top-1", "map": "mAP", "balanced_accuracy": "balanced accuracy", "macro_f1": "macro-F1",
    "micro_f1": "micro-F1",
}  # fmt: skip
_MOST_COUNTED = 10  # maximum number of classes whose images are listed one by one


def save_model(
    model: Any, folder: Path, splits: Splits, preprocessing: dict[str, Any], recipe: Recipe, command: str | None
) -> None:
    """Write `model`; for a GLiT, also its golden tensors and the facts about its training.

    Raises:
        WeightsError: if its weights are not finite in the recipe's `save_dtype`.
        WriteError: if the folder cannot be written.
    """
    if splits.is_multilabel:
        model.problem_type = MULTILABEL
    if isinstance(model, SpecTransformer):
        facts = {"dataset": data_name(recipe), "origin": _describe_training(recipe, splits), "recipe": command}
        names, dtype = splits.class_names, recipe.save_dtype
        save_folder(model, folder, class_names=names, data_config=preprocessing, dtype=dtype, facts=facts)
        return
    size = recipe.model.img_size
    model.pretrained_cfg.update(preprocessing, input_size=(3, size, size))
    for key in ("test_input_size", "test_crop_pct"):  # true only of the initial weights
        model.pretrained_cfg.pop(key, None)
    with whole_folder(folder) as temporary:
        config = {"label_names": list(splits.class_names)} | (
            {"problem_type": MULTILABEL} if splits.is_multilabel else {}
        )
        save_for_hf(model, temporary, model_config=config, safe_serialization=True)


def record_scores(folder: Path, result: dict[str, Any], splits: Splits, recipe: Recipe, command: str | None) -> None:
    """Add a run's scores to the facts about the weights in `folder`, if it has such facts."""
    path = folder / ENTRY_FILE
    if not path.is_file():  # not a model of this package
        return
    chose = ", which also chose the epoch" if recipe.keep == "best" else ""
    splits_scored: tuple[tuple[str, Any, str], ...] = (
        ("validation", splits.validation, f"validation images{chose}"),
        ("test", splits.test, "test images, which were scored once"),
    )
    source = command or "the training itself"
    metrics = [
        {"name": f"{name} on {len(images):,} {what}, %", "value": round(result[f"{split}_{key}"], 2), "source": source}
        for split, images, what in splits_scored
        for key, name in METRICS.items()
        if f"{split}_{key}" in result
    ]
    write_text(path, to_json(json.loads(path.read_text(encoding="utf-8")) | {"metrics": metrics}))


def data_name(recipe: Recipe) -> str:
    """The name of a recipe's data: the data set, or the folder of images."""
    data = recipe.data
    if is_label_table(data.dataset):
        return Path(data.dataset).stem
    if data.root is None or not is_folder(data.dataset):
        return data.dataset
    return Path(data.root).resolve().name.removesuffix(".tar")


def _describe_training(recipe: Recipe, splits: Splits) -> str:
    """Describe the training of the weights in a sentence."""
    model, optim = recipe.model, recipe.optim
    start = f"Fine-tuned from {model.name}" if model.pretrained else f"{model.name} trained from scratch"
    kept = f"of the best epoch on {len(splits.validation):,} validation images" if recipe.keep == "best" else "the last"
    several = ", of which an image may have several or none (binary cross-entropy)" if splits.is_multilabel else ""
    return (
        f"{start} at {model.img_size} x {model.img_size} pixels: {len(splits.train):,} images of "
        f"{len(splits.class_names)} classes{_counts(splits)}{several}, epochs {optim.epochs}, batch "
        f"{optim.batch_size}; the weights are {kept}"
    )


def _counts(splits: Splits) -> str:
    """The number of training images of each class, if it is known without reading them."""
    counts = splits.count_train()
    if counts is None:
        return ""
    if len(counts) > _MOST_COUNTED:
        return f" of {min(counts)} to {max(counts)} images"
    return f" ({', '.join(f'{name} {count}' for name, count in zip(splits.class_names, counts, strict=True))})"
