"""Load a model with its weights from `model.tag`, a folder, or a Hub repository.

Weights with a recorded hash are verified. `resolve.py` and `folder.py` find the files.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import timm

from ..errors import GlitError, WeightsError, first_line
from ..families import named_specs
from ..reading import parse_json, read_text
from . import download, resolve
from .files import CONFIG_FILE, WEIGHTS_FILE, sha256_of
from .folder import NOTHING, WeightFolder, is_repository, load_folder, open_folder
from .registry import WeightEntry

__all__ = ["LoadedModel", "create_model", "is_other_model", "load_model", "timm_name"]


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model in float32 on the CPU and in evaluation mode, and where its weights come from.

    Attributes:
        name: as the user gave it.
        folder: the weight folder; None for a model that is not from this package.
    """

    model: Any
    name: str
    folder: WeightFolder | None = None

    @property
    def entry(self) -> WeightEntry | None:
        """The registry entry of the weights, or None."""
        return None if self.folder is None else self.folder.entry

    @property
    def config(self) -> dict[str, Any] | None:
        """The content of the folder's `config.json`."""
        return None if self.folder is None else self.folder.config()

    @cached_property
    def sha256(self) -> str | None:
        """The sha256 of the weights file. Reads the file unless it was verified."""
        return None if self.folder is None else self.folder.sha256 or sha256_of(self.folder.weights)


def load_model(source: str | Path, *, any_timm: bool = False) -> LoadedModel:
    """Load a model with its weights, in evaluation mode.

    Args:
        source: `model.tag` or `model`, a folder with `config.json` and `model.safetensors`, or a Hub repository
            `namespace/name`.
        any_timm: also accept timm models that are not from this package.

    Raises:
        WeightsError: if there is no such model, or its weights are missing, damaged or do not fit the configuration.
        SpecError: if the configuration describes an impossible network.
    """
    source = str(source)
    if any_timm and not _is_ours(source):
        return LoadedModel(_load_with_timm(source), source)
    folder = open_folder(source, golden=False)
    if folder.entry is not None:
        resolve.find(folder.entry)  # verifies
        resolve.warn_of(folder.entry)
    return LoadedModel(load_folder(folder.path), folder.name, folder)


def _is_ours(source: str) -> bool:
    """Whether `source` is a weight folder or the name of registered weights, which `open_folder` reads."""
    path = Path(source)
    if path.exists():
        return (path / WEIGHTS_FILE).is_file() and _architecture(path / CONFIG_FILE) in named_specs()
    if source.partition(".")[0] in named_specs():
        return resolve.is_registered(source.partition(".")[0])
    if is_repository(source):
        repo, revision = download.split_revision(source)
        return _architecture(download.fetch(repo, CONFIG_FILE, revision)) in named_specs()
    return False


def is_other_model(source: str | Path) -> bool:
    """Whether `source` is the name or the folder of a timm model that is not from this package.

    Names of models of families from outside the package count as well, because the registry does not know them.
    """
    folder = Path(source)
    if folder.is_dir():
        name = _architecture(folder / CONFIG_FILE)
        return name not in named_specs() and timm.is_model(name)
    name = str(source).partition(".")[0]
    return not resolve.is_registered(name) and timm.is_model(name)


def _is_timms(name: str) -> bool:
    return ":" not in name and name.partition(".")[0] not in named_specs()


def _architecture(config: Path) -> str:
    try:
        return str(parse_json(read_text(config)).get("architecture"))
    except (OSError, ValueError, AttributeError):
        return ""


def _load_with_timm(source: str) -> Any:
    name = timm_name(source)
    if name.startswith("hf-hub:"):
        name = f"local-dir:{download.fetch_model(name.removeprefix('hf-hub:'), weights=True)}"
    try:
        model = create_model(name, pretrained=True).eval()
        if name.startswith("local-dir:"):
            config = parse_json(read_text(Path(name.removeprefix("local-dir:")) / CONFIG_FILE))
            model.problem_type = config.get("problem_type")
        return model
    except GlitError:
        raise
    except Exception as error:  # the model may come from any library
        raise WeightsError(f"{name} cannot be loaded: {first_line(error)}") from None


def create_model(name: str, *, pretrained: bool = False, **keywords: Any) -> Any:
    """`timm.create_model`, but with files of the Hub downloaded by `download.fetch` instead of timm.

    Args:
        name: MODEL, MODEL.TAG, 'local-dir:DIR' or 'hf-hub:NAMESPACE/NAME[@REVISION]'.

    Raises:
        WeightsError: if a file does not exist or cannot be fetched. Errors of timm are passed on.
    """
    for prefix in ("hf-hub:", "hf_hub:"):
        if name.startswith(prefix):
            folder = download.fetch_model(name.removeprefix(prefix), weights=pretrained)
            return timm.create_model(f"local-dir:{folder}", pretrained=pretrained, **keywords)
    cfg = timm.get_pretrained_cfg(name) if pretrained and _is_timms(name) else None
    if cfg is not None and cfg.hf_hub_id and not cfg.custom_load:
        names = (cfg.hf_hub_filename,) if cfg.hf_hub_filename else download.WEIGHTS
        repo, revision = download.split_revision(cfg.hf_hub_id)
        overlay = {"file": str(download.fetch_first(repo, names, revision))}
        keywords["pretrained_cfg_overlay"] = {**overlay, **keywords.get("pretrained_cfg_overlay", {})}
    return timm.create_model(name, pretrained=pretrained, **keywords)


def timm_name(source: str) -> str:
    """The name under which `timm.create_model` finds the model that `load_model` finds as `source`.

    Raises:
        WeightsError: if there is no such model.
    """
    if source and Path(source).is_dir():
        if not (Path(source) / CONFIG_FILE).is_file():
            raise WeightsError(f"{source}: no model folder, {CONFIG_FILE} is missing")
        return f"local-dir:{source}"
    if not source:
        raise WeightsError("the name of the model is empty; `glit list` shows what there is")
    if not source.startswith(("local-dir:", "hf-hub:")):
        if Path(source).exists():
            raise WeightsError(f"{source}: not a model folder; give the folder that holds {CONFIG_FILE}")
        if is_repository(source):
            return f"hf-hub:{source}"
        if os.sep in source:
            raise WeightsError(f"{source}: {NOTHING}")
        if not timm.is_model(source.split(".")[0]):
            raise WeightsError(f"no model {source!r}; `glit list` shows what there is")
    return source
