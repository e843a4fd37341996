"""Find the weights of registry entries: locate their files, verify them, and configure timm to load them.

This module builds no model; `publish.py` makes new entries.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import timm
from timm.models import get_arch_pretrained_cfgs
from torch import Tensor

from ..errors import WeightsError, first_line
from ..families import Family, named_specs
from . import download
from .files import ENTRY_FILE, WEIGHTS_FILE, installed_folder, read_state_dict, sha256_checked_before
from .registry import WeightEntry, read_registry

__all__ = [
    "Located",
    "default_cfgs",
    "find",
    "find_unverified",
    "get_entry",
    "is_registered",
    "is_unverified",
    "locate",
    "outside_cfg",
    "outside_cfgs",
    "registry",
    "warn_of",
    "where",
]

SHIPPED = Path(__file__).parent

_logger = logging.getLogger(__name__)
_SOURCES = ("file", "url", "state_dict", "hf_hub_id")
# The files that timm looks for in a folder, in its order.
_FOLDER_FILES = ("model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth")


@functools.cache
def registry() -> dict[str, WeightEntry]:
    """The registry's entries, by name. Raises WeightsError if the package is damaged."""
    return read_registry(SHIPPED / "registry.json")


def get_entry(name: str) -> WeightEntry:
    """The entry `model.tag`; a bare `model` means its default tag.

    Raises:
        WeightsError: if there is none; lists the existing ones.
    """
    architecture, _, tag = name.partition(".")
    entries = [entry for entry in registry().values() if entry.architecture == architecture]
    defaults = _defaults()
    for entry in entries:
        if entry.tag == tag or (not tag and entry.name in defaults):
            return entry
    known = ", ".join(entry.name for entry in entries if entry.tag)
    if entries:
        raise WeightsError(f"{name}: no such weights; {architecture} has {known or 'none'}")
    if architecture in named_specs():
        raise WeightsError(f"{name}: not in the registry of this package; give the folder of its weights")
    raise WeightsError(f"{name}: no such model; known: {', '.join(registry())}")


def is_registered(architecture: str) -> bool:
    """Whether the registry has entries of an architecture; it has none of families from outside the package."""
    return any(entry.architecture == architecture for entry in registry().values())


def outside_cfgs() -> dict[str, Any]:
    """timm's configurations, by `model.tag`, of all models of families from outside the package."""
    names = [name for name in named_specs() if not is_registered(name)]
    return {name: cfg for architecture in names for name, cfg in get_arch_pretrained_cfgs(architecture).items()}


def outside_cfg(name: str) -> Any:
    """timm's configuration of a model of a family from outside the package; None if it has none.

    Raises:
        WeightsError: if the model has no such tag.
    """
    try:
        return timm.get_pretrained_cfg(name)
    except RuntimeError as error:
        raise WeightsError(f"{name}: no such weights ({first_line(error)})") from None


def where(entry: WeightEntry) -> str:
    """Where the weights are: 'shipped', 'installed', 'hub' or 'none'. Checks file names only, not contents."""
    if entry.file is not None:
        return "shipped"
    if (installed_folder(entry.name) / WEIGHTS_FILE).is_file():
        return "installed"
    return "none" if entry.repo is None else "hub"


def find(entry: WeightEntry) -> Path:
    """The verified weights file of an entry: shipped, else installed, else from the Hub.

    Raises:
        WeightsError: if there are no weights, they cannot be fetched, or their sha256 is not the entry's.
    """
    place = where(entry)
    path, expected = find_unverified(entry)
    way_out = {
        "shipped": "reinstall glit-models",
        "installed": f"remove {path.parent} and install it again",
        "hub": f"delete {path.resolve()} and try again",
    }[place]
    return _verified(entry.name, path, expected, way_out)


def find_unverified(entry: WeightEntry) -> tuple[Path, str | None]:
    """The weights file of an entry (shipped, else installed, else from the Hub) and its expected sha256.

    Raises:
        WeightsError: if there are no weights, or they cannot be fetched.
    """
    place = where(entry)
    if place == "shipped":
        return SHIPPED / str(entry.file), entry.sha256
    if place == "installed":
        folder = installed_folder(entry.name)
        return folder / WEIGHTS_FILE, entry.sha256 or _installed_fact(folder, "sha256")
    if place == "hub":
        return download.fetch(str(entry.repo), WEIGHTS_FILE, entry.revision), entry.sha256
    others = [
        other.name
        for other in registry().values()
        if other.architecture == entry.architecture and where(other) != "none"
    ]
    ready = f"; {entry.architecture} has weights as {', '.join(others)}" if others else ""
    raise WeightsError(f"{entry.name}: no weights on this machine; {entry.note or 'use pretrained=False'}{ready}")


def _installed_fact(folder: Path, key: str) -> str | None:
    try:
        fact = json.loads((folder / ENTRY_FILE).read_text(encoding="utf-8")).get(key)
    except (OSError, ValueError, AttributeError, RecursionError):
        fact = None
    return fact if isinstance(fact, str) else None


def is_unverified(entry: WeightEntry) -> bool:
    """Whether the weights were installed from a file whose hash was not compared with the published one."""
    return where(entry) == "installed" and _installed_fact(installed_folder(entry.name), "checkpoint_sha256") is None


def _verified(name: str, path: Path, expected: str | None, way_out: str) -> Path:
    if not path.is_file():
        raise WeightsError(f"{name}: the file {path} is missing; {way_out}")
    if expected is None:
        raise WeightsError(f"{name}: the sha256 of {path} is recorded nowhere; {way_out}")
    try:
        actual = sha256_checked_before(path)
    except OSError as error:
        raise WeightsError(f"{name}: the file {path} cannot be read ({error.strerror}); {way_out}") from None
    if actual != expected:
        raise WeightsError(
            f"{name}: refused {path}, its sha256 is {actual[:12]}... and not {expected[:12]}...; {way_out}"
        )
    return path


def default_cfgs(family: Family) -> dict[str, dict[str, Any]]:
    """timm's pretrained configurations of a family, keyed `model.tag`; each architecture's default is marked."""
    defaults = _defaults()
    # timm takes a tag that ends in '*' as the default even without weights, but only if it comes last.
    entries = sorted(registry().values(), key=lambda entry: entry.name in defaults)
    return {
        f"{entry.architecture}.{entry.tag}{'*' if entry.name in defaults else ''}": _timm_cfg(entry, family)
        for entry in entries
        if entry.architecture in family.named
    }


def _defaults() -> set[str]:
    """The entries that bare model names mean: for each architecture the marked one, else the first."""
    defaults: dict[str, str] = {}
    for entry in registry().values():
        if entry.default or entry.architecture not in defaults:
            defaults[entry.architecture] = entry.name
    return set(defaults.values())


def _timm_cfg(entry: WeightEntry, family: Family) -> dict[str, Any]:
    cfg: dict[str, Any] = {
        "input_size": entry.input_size,
        "fixed_input_size": True,
        "num_classes": entry.num_classes,
        "pool_size": None,
        "interpolation": entry.interpolation,
        "crop_pct": entry.crop_pct,
        "mean": entry.mean,
        "std": entry.std,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "license": entry.license,
    }
    paper = family.paper_of(entry.architecture)
    more = {"label_names": entry.class_names, "origin_url": entry.origin_url, "paper_ids": paper.identifier}
    cfg |= {key: value for key, value in more.items() if value is not None}
    return cfg | _timm_source(entry)


def _timm_source(entry: WeightEntry) -> dict[str, Any]:
    """The fields of timm's configuration that give the source of the weights."""
    place = where(entry)
    if place == "shipped":
        return {"file": str(SHIPPED / str(entry.file))}
    if place == "installed":
        return {"file": str(installed_folder(entry.name) / WEIGHTS_FILE)}
    if place == "hub":
        return {"hf_hub_id": f"{entry.repo}@{entry.revision}", "hf_hub_filename": WEIGHTS_FILE}
    return {}


class Located(NamedTuple):
    """The source of a model's weights, for timm.

    Attributes:
        overlay: for timm's pretrained configuration.
        state_dict: the content of a local file. The overlay holds a placeholder instead, because timm would copy, and
            keep, all tensors of a state dict in its configuration.
        source: timm's field, which replaces the placeholder in the model's configuration after loading.
        is_described: whether timm's configuration describes these weights, so that its class names are theirs.
    """

    overlay: dict[str, Any]
    state_dict: dict[str, Tensor] | None = None
    source: str | None = None
    is_described: bool = False


def locate(variant: str, pretrained_cfg: Any, overlay: Mapping[str, Any] | None) -> Located:
    """Find the weights that timm is to load.

    A source that the caller names (file, URL, state dict, repository, folder) is kept; a local file is read here, once.
    Otherwise the registry's file is found and verified. A model of a family from outside the package, of which the
    registry knows nothing, has the source of its `default_cfgs`.

    Args:
        variant: name of the architecture.
        pretrained_cfg: the value given to timm: a tag, a configuration (dict or `PretrainedCfg`), or None.
        overlay: values that replace those of the configuration.

    Raises:
        WeightsError: if the weights are missing, unreachable, damaged, or not registered.
    """
    overlay = dict(overlay or {})
    cfg = _as_mapping(pretrained_cfg)
    tag = pretrained_cfg if isinstance(pretrained_cfg, str) else cfg.get("tag")
    name = f"{variant}.{tag}" if tag else variant
    if not cfg and not is_registered(variant):
        cfg = _as_mapping(outside_cfg(name))
    named = {key: cfg.get(key) for key in (*_SOURCES, "source")}
    entry = registry().get(name)
    if entry is not None and all(value == _timm_source(entry).get(key) for key, value in named.items() if value):
        named = {}  # timm's copy of the registry's configuration: find and verify the file again
    if any(overlay.get(key) is not None for key in _SOURCES):
        overlay = dict.fromkeys((*_SOURCES, "source", "hf_hub_filename")) | overlay  # else timm prefers another source
        named = overlay
    if any(named.get(key) is not None for key in _SOURCES):
        is_described = named is not overlay
        file = named.get("file")
        if file and not named.get("state_dict"):
            state_dict = _read_source(Path(file), folder=named.get("source") == "local-dir")
            head = state_dict.get("head.weight")
            if head is not None and overlay.get("file"):
                # timm would drop a head whose size differs from the default configuration's; use this file's size
                overlay.setdefault("num_classes", head.shape[0])
            stand_in = {"state_dict": {"file": str(file)}, "source": None}
            return Located(overlay | stand_in, state_dict, named.get("source"), is_described)
        return Located(overlay, is_described=is_described)
    if cfg and entry is None:
        raise WeightsError(f"{variant}: this pretrained_cfg names no weights; give it a file, url or hf_hub_id")
    entry = get_entry(name)
    file = find(entry)
    warn_of(entry)
    return Located(overlay | {"file": str(file), "source": None}, is_described=True)


def warn_of(entry: WeightEntry) -> None:
    """Log an entry's notice once, when its weights are loaded."""
    if entry.notice is not None:
        _warn_once(f"{entry.name}: {entry.notice}")


@functools.cache
def _warn_once(text: str) -> None:
    _logger.warning("%s", text)


def _as_mapping(pretrained_cfg: Any) -> dict[str, Any]:
    if isinstance(pretrained_cfg, Mapping):
        return dict(pretrained_cfg)
    if pretrained_cfg is None or isinstance(pretrained_cfg, str):
        return {}
    return {field.name: getattr(pretrained_cfg, field.name) for field in fields(pretrained_cfg)}


def _read_source(path: Path, folder: bool) -> dict[str, Tensor]:
    if folder:
        if not path.is_dir():
            raise WeightsError(f"{path}: no such folder")
        found = [path / name for name in _FOLDER_FILES if (path / name).is_file()]
        if not found:
            raise WeightsError(f"{path}: no weights in this folder; it needs a {_FOLDER_FILES[0]}")
        path = found[0]
    return read_state_dict(path)
