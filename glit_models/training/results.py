"""What a finished run leaves to be used: a model folder that timm loads, whatever classifier was trained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from timm.models import save_for_hf

from ..model import SpecTransformer
from ..runs.files import whole_folder
from ..weights.folder import save_folder
from .recipe import Recipe

__all__ = ["save_model"]


def save_model(
    model: Any,
    folder: Path,
    class_names: Sequence[str],
    preprocessing: dict[str, Any],
    recipe: Recipe,
    command: str | None,
) -> None:
    """Write `model` as it is; a GLiT with its golden tensors and what is known of its training.

    Raises:
        WeightsError: if its weights are not finite in the recipe's `save_dtype`.
        WriteError: if the folder cannot be written.
    """
    if isinstance(model, SpecTransformer):
        facts = {"dataset": recipe.data.dataset, "recipe": command}
        save_folder(
            model, folder, class_names=class_names, data_config=preprocessing, dtype=recipe.save_dtype, facts=facts
        )
        return
    model.pretrained_cfg.update(preprocessing)
    with whole_folder(folder) as temporary:
        save_for_hf(model, temporary, model_config={"label_names": list(class_names)}, safe_serialization=True)
