"""The weight registry: which weights exist, where they lie, and that they are what they claim to be.

It reads `weights/registry.json` and finds verified files; it builds no model. `publishing.py` makes new entries.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

from . import download, store
from .checkpoint import read_state_dict
from .errors import WeightsError

__all__ = ["Metric", "WeightEntry", "default_cfgs", "find", "get_entry", "locate", "registry", "where"]

SHIPPED = Path(__file__).parent / "weights"
AUTHORS_URL = "https://github.com/bychen515/GLiT"
PAPER = "arXiv:2107.02960"

_NAME = re.compile(r"[a-z0-9_]+(\.[A-Za-z0-9_-]+)?")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SOURCES = ("file", "url", "state_dict", "hf_hub_id")
# What timm looks for in a folder, in its order.
_FOLDER_FILES = ("model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth")


@dataclass(frozen=True)
class Metric:
    """One score: what was measured, its value, and the command that prints it or the publication that states it."""

    name: str
    value: float
    source: str


@dataclass(frozen=True)
class WeightEntry:
    """One line of the registry: the weights `model.tag`, all that is known of them, and where they are.

    Attributes:
        name: `model.tag`; a bare `model` for an architecture without weights.
        dataset, license: of the weights.
        params, macs: trainable parameters and multiply-adds for one image of `input_size`.
        input_size: channels, height, width. mean, std, interpolation, crop_pct: the preprocessing.
        num_classes, class_names: of the head.
        recipe: the command that trained them. origin: where they come from, when it was not a command of ours.
        metrics: the scores.
        sha256: of the file; needed once there is one.
        file: path under `glit_models/weights/` if shipped. repo, revision: the Hub repository and the commit there.
        note: what to do when there are no weights.

    Raises:
        WeightsError: names the entry, the field, the value and the bound.
    """

    name: str
    dataset: str
    license: str
    params: int
    macs: int
    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    crop_pct: float
    num_classes: int
    class_names: tuple[str, ...] | None = None
    recipe: str | None = None
    origin: str | None = None
    metrics: tuple[Metric, ...] = ()
    sha256: str | None = None
    file: str | None = None
    repo: str | None = None
    revision: str | None = None
    note: str | None = None

    def __post_init__(self) -> None:
        for field in ("input_size", "mean", "std", "class_names", "metrics"):
            value = getattr(self, field)
            if isinstance(value, list):
                object.__setattr__(self, field, tuple(value))
        try:
            metrics = tuple(m if isinstance(m, Metric) else Metric(**m) for m in self.metrics)
        except TypeError:
            self._refuse("metrics", "a list of objects with name, value and source")
        object.__setattr__(self, "metrics", metrics)
        self._check(_matches(_NAME, self.name), "name", "MODEL.TAG in letters, digits, '_' and '-'")
        for field in ("dataset", "license", "interpolation"):
            value = getattr(self, field)
            self._check(isinstance(value, str) and value.strip(), field, "a text")
        for field in ("params", "macs", "num_classes"):
            self._check(_is_count(getattr(self, field)), field, "a positive integer")
        size = self.input_size
        self._check(isinstance(size, tuple) and len(size) == 3 and all(map(_is_count, size)), "input_size", "(C, H, W)")
        for field in ("mean", "std"):
            self._check(len(getattr(self, field)) in (1, size[0]), field, f"one value or {size[0]}")
        self._check(0 < self.crop_pct <= 1, "crop_pct", "above 0 and at most 1")
        names = self.class_names
        self._check(names is None or len(names) == self.num_classes, "class_names", f"{self.num_classes} names")
        self._check_location()

    def _check_location(self) -> None:
        located = self.file is not None or self.repo is not None
        self._check(not (self.file and self.repo), "file", "absent when there is a repo")
        self._check(_matches(_SHA256, self.sha256) or (self.sha256 is None and not located), "sha256", "64 hex digits")
        if self.repo is not None:
            self._check(self.repo.count("/") == 1, "repo", "NAMESPACE/NAME")
            self._check(_matches(_COMMIT, self.revision), "revision", "a commit of 40 hex digits, so that it is pinned")

    def _check(self, holds: object, field: str, bound: str) -> None:
        if not holds:
            self._refuse(field, bound)

    def _refuse(self, field: str, bound: str) -> None:
        raise WeightsError(f"weights {self.name!r}: {field} must be {bound}, got {getattr(self, field)!r}")

    @property
    def architecture(self) -> str:
        """The part of the name before the tag."""
        return self.name.partition(".")[0]

    @property
    def tag(self) -> str:
        """The part of the name after the model; '' without one."""
        return self.name.partition(".")[2]

    def to_dict(self) -> dict[str, Any]:
        """Plain values as they stand in the registry, without the name and without what is not known."""
        values = {key: value for key, value in asdict(self).items() if value not in (None, ())}
        values.pop("name")
        return values

    @classmethod
    def from_dict(cls, name: str, data: Any, place: str = "registry") -> WeightEntry:
        """The inverse of `to_dict`. Raises WeightsError; `place` names where the data is from."""
        if not isinstance(data, Mapping):
            raise WeightsError(f"{place}: {name!r} must be an object, got {type(data).__name__}")
        known = {field.name: field for field in fields(cls) if field.name != "name"}
        for key in data:
            if key not in known:
                raise WeightsError(f"{place}: {name!r} has an unknown field {key!r}; known: {', '.join(known)}")
        for key, field in known.items():
            if field.default is MISSING and data.get(key) is None:
                raise WeightsError(f"{place}: {name!r} lacks the field {key!r}")
        return cls(name, **data)


def _matches(pattern: re.Pattern[str], value: Any) -> bool:
    return isinstance(value, str) and pattern.fullmatch(value) is not None


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def read_registry(path: Path) -> dict[str, WeightEntry]:
    """The entries of a registry file by name. Raises WeightsError on anything that is no valid registry."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path}: not a readable weight registry ({error}); reinstall glit-models") from None
    if not isinstance(data, dict):
        raise WeightsError(f"{path}: a weight registry must be an object of named entries")
    return {name: WeightEntry.from_dict(name, entry, str(path)) for name, entry in data.items()}


@functools.cache
def registry() -> dict[str, WeightEntry]:
    """The entries that this package knows, by name. Raises WeightsError if the package is damaged."""
    return read_registry(SHIPPED / "registry.json")


def get_entry(name: str) -> WeightEntry:
    """The entry `model.tag`; a bare `model` means its default tag.

    Raises:
        WeightsError: if there is none; lists those that exist.
    """
    architecture, _, tag = name.partition(".")
    entries = [entry for entry in registry().values() if entry.architecture == architecture]
    for entry in entries:
        if entry.tag == tag or (not tag and entry.tag.startswith("in1k")):
            return entry
    known = ", ".join(entry.name for entry in entries if entry.tag)
    if entries:
        raise WeightsError(f"{name}: no such weights; {architecture} has {known or 'none'}")
    raise WeightsError(f"{name}: no such model; known: {', '.join(registry())}")


def where(entry: WeightEntry) -> str:
    """Where the weights are: 'shipped', 'installed', 'hub' or 'none'. Looks at names, not into files."""
    if entry.file is not None:
        return "shipped"
    if (store.installed_folder(entry.name) / store.WEIGHTS_FILE).is_file():
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
    """The weights file of an entry, shipped, else installed, else from the Hub, and the sha256 it should have.

    Raises:
        WeightsError: if there are no weights, or they cannot be fetched.
    """
    place = where(entry)
    if place == "shipped":
        return SHIPPED / str(entry.file), entry.sha256
    if place == "installed":
        folder = store.installed_folder(entry.name)
        return folder / store.WEIGHTS_FILE, entry.sha256 or _installed_sha256(folder)
    if place == "hub":
        return download.fetch(str(entry.repo), store.WEIGHTS_FILE, entry.revision), entry.sha256
    others = [
        other.name
        for other in registry().values()
        if other.architecture == entry.architecture and where(other) != "none"
    ]
    ready = f"; {entry.architecture} has weights as {', '.join(others)}" if others else ""
    raise WeightsError(f"{entry.name}: no weights on this machine; {entry.note or 'use pretrained=False'}{ready}")


def _installed_sha256(folder: Path) -> str | None:
    try:
        sha256 = json.loads((folder / store.ENTRY_FILE).read_text(encoding="utf-8")).get("sha256")
    except (OSError, ValueError, AttributeError):
        sha256 = None
    return sha256 if isinstance(sha256, str) else None


def _verified(name: str, path: Path, expected: str | None, way_out: str) -> Path:
    if not path.is_file():
        raise WeightsError(f"{name}: the file {path} is missing; {way_out}")
    if expected is None:
        raise WeightsError(f"{name}: the sha256 of {path} is recorded nowhere; {way_out}")
    try:
        actual = store.sha256_checked_before(path)
    except OSError as error:
        raise WeightsError(f"{name}: the file {path} cannot be read ({error.strerror}); {way_out}") from None
    if actual != expected:
        raise WeightsError(
            f"{name}: refused {path}, its sha256 is {actual[:12]}... and not {expected[:12]}...; {way_out}"
        )
    return path


def default_cfgs() -> dict[str, dict[str, Any]]:
    """timm's pretrained configurations, keyed `model.tag`; `in1k` and bare models are marked as the default."""
    cfgs = {}
    for entry in registry().values():
        # timm takes a tag that ends in '*' as the default, whether it has weights or not.
        is_default = not entry.tag or entry.tag.startswith("in1k")
        cfgs[f"{entry.architecture}.{entry.tag}{'*' if is_default else ''}"] = _timm_cfg(entry)
    return cfgs


def _timm_cfg(entry: WeightEntry) -> dict[str, Any]:
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
        "paper_ids": PAPER,
    }
    if entry.class_names:
        cfg["label_names"] = entry.class_names
    if entry.tag.startswith("in1k"):
        cfg["origin_url"] = AUTHORS_URL
    place = where(entry)
    if place == "shipped":
        cfg["file"] = str(SHIPPED / str(entry.file))
    elif place == "installed":
        cfg["file"] = str(store.installed_folder(entry.name) / store.WEIGHTS_FILE)
    elif place == "hub":
        cfg |= {"hf_hub_id": f"{entry.repo}@{entry.revision}", "hf_hub_filename": store.WEIGHTS_FILE}
    return cfg


def locate(variant: str, pretrained_cfg: Any, overlay: Mapping[str, Any] | None) -> dict[str, Any]:
    """The overlay for timm's pretrained configuration that makes it read a checked file.

    A source that the caller names (file, URL, state dict, repository, folder) stays; a local one is checked to be a
    readable checkpoint. Otherwise the registry's file is found and verified.

    Args:
        variant: name of the architecture.
        pretrained_cfg: what timm was given: a tag, a configuration (dict or `PretrainedCfg`), or None.
        overlay: values that replace those of the configuration.

    Raises:
        WeightsError: if the weights are missing, unreachable, damaged, or not registered.
    """
    overlay = dict(overlay or {})
    cfg = _as_mapping(pretrained_cfg)
    tag = pretrained_cfg if isinstance(pretrained_cfg, str) else cfg.get("tag")
    named = {key: cfg.get(key) for key in (*_SOURCES, "source")}
    entry = registry().get(f"{variant}.{tag}")
    if entry is not None and all(value == _timm_cfg(entry).get(key) for key, value in named.items() if value):
        named = {}  # timm's copy of the registry's own configuration: find the file afresh, and verify it
    named |= {key: overlay[key] for key in (*_SOURCES, "source") if key in overlay}
    if any(named.get(key) is not None for key in _SOURCES):
        if named.get("file") and not named.get("state_dict"):
            _check_file(Path(named["file"]), folder=named.get("source") == "local-dir")
        return overlay
    if cfg and entry is None:
        raise WeightsError(f"{variant}: this pretrained_cfg names no weights; give it a file, url or hf_hub_id")
    entry = get_entry(f"{variant}.{tag}" if tag else variant)
    return overlay | {"file": str(find(entry)), "source": None}


def _as_mapping(pretrained_cfg: Any) -> dict[str, Any]:
    if isinstance(pretrained_cfg, Mapping):
        return dict(pretrained_cfg)
    if pretrained_cfg is None or isinstance(pretrained_cfg, str):
        return {}
    return {field.name: getattr(pretrained_cfg, field.name) for field in fields(pretrained_cfg)}


def _check_file(path: Path, folder: bool) -> None:
    if folder:
        if not path.is_dir():
            raise WeightsError(f"{path}: no such folder")
        found = [path / name for name in _FOLDER_FILES if (path / name).is_file()]
        if not found:
            raise WeightsError(f"{path}: no weights in this folder; it needs a {_FOLDER_FILES[0]}")
        path = found[0]
    read_state_dict(path)
