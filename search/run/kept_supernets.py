"""Keep trained supernets of an earlier search in the folder of another one, for a stage with the same space.

A folder is `supernets/NAME`, with the stage's `space.yaml` and the training's results.
"""

from __future__ import annotations

import os
import shutil
from functools import partial
from pathlib import Path

from glit_models.recipes import DATA_FILE, RECIPE_FILE, refuse_other_recipe
from glit_models.runs.files import whole_folder, write_json
from glit_models.training import Recipe
from glit_models.training.feed import data_fingerprint

from ..executors.tasks import read_json
from ..spaces.named import load_space
from ..spaces.space import SearchSpace

__all__ = ["adopt_supernet", "has_supernet", "keep_supernet", "keeps_supernets", "link_file"]

_KEPT = "supernets"
_FILES = ("model.safetensors", RECIPE_FILE, DATA_FILE, "metrics.jsonl", "result.json")
_LINKED_BYTES = 1_000_000


def has_supernet(stage: Path) -> bool:
    """Whether the folder of a stage has a trained supernet."""
    return all((stage / "supernet" / name).is_file() for name in ("result.json", "model.safetensors"))


def keeps_supernets(folder: Path) -> bool:
    """Whether the folder of a search keeps supernets of an earlier one."""
    return (folder / _KEPT).is_dir()


def keep_supernet(stage: Path, folder: Path) -> None:
    """Keep the trained supernet of a stage in the folder of another search, where its training counts as no time."""
    kept = folder / _KEPT / stage.name
    (kept / "supernet").mkdir(parents=True)
    shutil.copyfile(stage / "space.yaml", kept / "space.yaml")
    for name in _FILES:
        if (stage / "supernet" / name).is_file():
            link_file(stage / "supernet" / name, kept / "supernet" / name)
    result = read_json(kept / "supernet" / "result.json")
    source = {"trained_in": str(stage.absolute()), "trained_minutes": result["minutes"]}
    write_json(kept / "supernet" / "result.json", {**source, **result, "minutes": 0.0})


def adopt_supernet(folder: Path, space: SearchSpace, recipe: Recipe, stage: Path) -> bool:
    """Give a stage the kept supernet of its space; returns whether there is one.

    Raises:
        RecipeError: if it was trained with another recipe.
    """
    for path in sorted((folder / _KEPT).glob("*/space.yaml")):
        if load_space(path) == space:
            kept = path.with_name("supernet")
            refuse_other_recipe(recipe, kept, partial(data_fingerprint, recipe))
            with whole_folder(stage / "supernet", replace=True) as temporary:
                for file in kept.iterdir():
                    link_file(file, temporary / file.name)
            return True
    return False


def link_file(source: str | Path, target: str | Path) -> None:
    """Copy a file that is never changed in place; a large one is hard-linked, if the file system supports it."""
    if os.path.getsize(source) >= _LINKED_BYTES:
        try:
            os.link(source, target)
            return
        except OSError:  # another disk
            pass
    shutil.copyfile(source, target)
