"""Registry entries: all that is known of one set of weights, validated, and the file that holds them.

It reads and checks data; `resolve.py` finds the files and verifies them.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ..errors import WeightsError

__all__ = ["Metric", "WeightEntry", "read_registry"]

_NAME = re.compile(r"[a-z0-9_]+(\.[A-Za-z0-9_-]+)?")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_COMMIT = re.compile(r"[0-9a-f]{40}")


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
        architecture, tag: the two parts of the name; the tag '' without one.
        dataset, license: of the weights.
        params, macs: trainable parameters and multiply-adds for one image of `input_size`.
        input_size: channels, height, width. mean, std, interpolation, crop_pct: the preprocessing.
        num_classes, class_names: of the head.
        recipe: the command that trained them. origin: where they come from, when it was not a command of ours.
        metrics: the scores.
        sha256: of the file; needed once there is one.
        file: path under `glit_models/weights/` if shipped. repo, revision: the Hub repository and the commit there.
        note: what to do when there are no weights.
        default: whether a bare `model` means these weights; at most one entry of an architecture.
        notice: said once, by the logger, when the weights are loaded.
        origin_url: timm's: the page where the weights come from.

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
    default: bool = False
    notice: str | None = None
    origin_url: str | None = None
    architecture: str = dataclasses.field(init=False, repr=False, compare=False)
    tag: str = dataclasses.field(init=False, repr=False, compare=False)

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
        architecture, _, tag = self.name.partition(".")
        object.__setattr__(self, "architecture", architecture)
        object.__setattr__(self, "tag", tag)
        for field in ("dataset", "license", "interpolation"):
            value = getattr(self, field)
            self._check(isinstance(value, str) and value.strip(), field, "a text")
        for field in ("note", "notice", "origin_url"):
            value = getattr(self, field)
            self._check(value is None or (isinstance(value, str) and value.strip()), field, "a text, or absent")
        self._check(isinstance(self.default, bool), "default", "true or false")
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

    def to_dict(self) -> dict[str, Any]:
        """Plain values as they stand in the registry, without the name and without what is not known."""
        values = {key: value for key, value in asdict(self).items() if value is not False and value not in (None, ())}
        return {key: value for key, value in values.items() if key not in ("name", "architecture", "tag")}

    @classmethod
    def from_dict(cls, name: str, data: Any, place: str = "registry") -> WeightEntry:
        """The inverse of `to_dict`. Raises WeightsError; `place` names where the data is from."""
        if not isinstance(data, Mapping):
            raise WeightsError(f"{place}: {name!r} must be an object, got {type(data).__name__}")
        known = {field.name: field for field in fields(cls) if field.init and field.name != "name"}
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
    entries = {name: WeightEntry.from_dict(name, entry, str(path)) for name, entry in data.items()}
    defaults: dict[str, str] = {}
    for entry in entries.values():
        if entry.default and defaults.setdefault(entry.architecture, entry.name) != entry.name:
            raise WeightsError(f"{path}: {defaults[entry.architecture]} and {entry.name} are both the default")
    return entries
