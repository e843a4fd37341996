"""Registry entries: the validated facts about each set of weights, and the file that stores them.

`resolve.py` finds the weight files and verifies them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import WeightsError
from ..preprocessing import is_count, is_number, preprocessing_problem

__all__ = ["Metric", "WeightEntry", "read_registry"]

_NAME = r"[a-z0-9_]+(\.[A-Za-z0-9_-]+)?"
_SHA256 = "[0-9a-f]{64}"
_COMMIT = "[0-9a-f]{40}"
_FROM_NAME = ("name", "architecture", "tag")  # the fields that are derived from the name of an entry


class Metric(NamedTuple):
    """One score: the metric, its value, and the command that prints it or the publication that reports it."""

    name: str
    value: float
    source: str


class WeightEntry(NamedTuple):
    """One entry of the registry: the weights `model.tag`, the facts about them, and where they are stored.

    Create entries with `from_dict`, which validates them.

    Attributes:
        name: `model.tag`; a bare `model` for an architecture without weights.
        dataset, license: of the weights.
        params, macs: trainable parameters and multiply-adds for one image of `input_size`.
        input_size: channels, height, width. mean, std, interpolation, crop_pct: the preprocessing.
        num_classes, class_names: of the head. multilabel: whether an image may be of several classes, or none.
        recipe: the command that trained them. origin: their source, if it was not a command of this package.
        metrics: the scores.
        sha256: of the file; required once there is one.
        file: path under `glit_models/weights/` if shipped. repo, revision: the Hub repository and its commit.
        note: what to do if there are no weights.
        default: whether a bare `model` means these weights; at most one entry of an architecture.
        notice: logged once, when the weights are loaded.
        origin_url: timm's field: the page where the weights come from.
        architecture, tag: the two parts of the name; the tag '' without one.
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
    multilabel: bool = False
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
    architecture: str = ""
    tag: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain values as stored in the registry, without the name and unknown fields."""
        values = {**self._asdict(), "metrics": tuple(metric._asdict() for metric in self.metrics)}
        for key in _FROM_NAME:
            del values[key]
        return {key: value for key, value in values.items() if value is not False and value not in (None, ())}

    @classmethod
    def from_dict(cls, name: str, data: Any, place: str = "registry") -> WeightEntry:
        """The inverse of `to_dict`.

        Args:
            name: `model.tag` or `model`.
            data: the other fields.
            place: where the data is from, for error messages.

        Raises:
            WeightsError: names the entry, the field, the value and the bound.
        """
        if not isinstance(data, Mapping):
            raise WeightsError(f"{place}: {name!r} must be an object, got {type(data).__name__}")
        known = [field for field in cls._fields if field not in _FROM_NAME]
        for key in data:
            if key not in known:
                raise WeightsError(f"{place}: {name!r} has an unknown field {key!r}; known: {', '.join(known)}")
        for key in known:
            if key not in cls._field_defaults and data.get(key) is None:
                raise WeightsError(f"{place}: {name!r} lacks the field {key!r}")
        values: dict[str, Any] = {k: tuple(value) if isinstance(value, list) else value for k, value in data.items()}
        architecture, _, tag = name.partition(".")
        entry = cls(name, **values, architecture=architecture, tag=tag)
        try:
            entry = entry._replace(metrics=tuple(Metric(**metric) for metric in values.get("metrics", ())))
        except TypeError:
            raise _refusal(entry, "metrics", "a list of objects with name, value and source") from None
        _check(entry)
        return entry


def _check(entry: WeightEntry) -> None:
    def check(holds: object, field: str, bound: str) -> None:
        if not holds:
            raise _refusal(entry, field, bound)

    check(_matches(_NAME, entry.name), "name", "MODEL.TAG in letters, digits, '_' and '-'")
    for field in ("dataset", "license", "interpolation"):
        value = getattr(entry, field)
        check(isinstance(value, str) and value.strip(), field, "a text")
    for field in ("note", "notice", "origin_url", "recipe", "origin", "file", "repo"):
        value = getattr(entry, field)
        check(value is None or (isinstance(value, str) and value.strip()), field, "a text, or absent")
    for field in ("default", "multilabel"):
        check(isinstance(getattr(entry, field), bool), field, "true or false")
    for field in ("params", "macs", "num_classes"):
        check(is_count(getattr(entry, field)), field, "a positive integer")
    size = entry.input_size
    check(isinstance(size, tuple) and len(size) == 3 and all(map(is_count, size)), "input_size", "(C, H, W)")
    problem = preprocessing_problem(entry._asdict())
    check(problem is None, *(problem or ("", "")))
    names = entry.class_names
    check(names is None or (_are(str, names) and len(names) == entry.num_classes), "class_names",
          f"{entry.num_classes} names")  # fmt: skip
    metrics = (_are(str, metric[::2]) and is_number(metric.value) for metric in entry.metrics)
    check(all(metrics), "metrics", "a list of objects with name, value and source")
    located = entry.file is not None or entry.repo is not None
    check(not (entry.file and entry.repo), "file", "absent when there is a repo")
    check(_matches(_SHA256, entry.sha256) or (entry.sha256 is None and not located), "sha256", "64 hex digits")
    if entry.repo is not None:
        check(entry.repo.count("/") == 1, "repo", "NAMESPACE/NAME")
        check(_matches(_COMMIT, entry.revision), "revision", "a commit of 40 hex digits, so that it is pinned")


def _are(kind: type, values: Any) -> bool:
    return isinstance(values, (list, tuple)) and all(isinstance(value, kind) for value in values)


def _refusal(entry: WeightEntry, field: str, bound: str) -> WeightsError:
    return WeightsError(f"weights {entry.name!r}: {field} must be {bound}, got {getattr(entry, field)!r:.200}")


def _matches(pattern: str, value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(pattern, value) is not None


def read_registry(path: Path) -> dict[str, WeightEntry]:
    """The entries of a registry file by name. Raises WeightsError if the file is not a valid registry."""
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
