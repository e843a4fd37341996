"""Read recipes from YAML into frozen dataclasses with checked values, and compare recipes.

The keys of a recipe are defined by its dataclass: `training.recipe.Recipe`, `search.recipe.SearchRecipe`.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import keyword
import math
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import yaml

from .errors import GlitError, RecipeError, first_line
from .reading import is_file, parse_json, parse_yaml, read_text
from .runs.console import say
from .runs.files import write_json, write_text

__all__ = [
    "DATA_FILE",
    "RECIPE_FILE",
    "Overrides",
    "as_values",
    "build_recipe",
    "parse_overrides",
    "read_recipe",
    "read_stored_recipe",
    "record_recipe",
    "refuse_other_data",
    "refuse_other_recipe",
    "to_yaml",
]

RECIPE_FILE = "recipe.yaml"  # in a run's folder
DATA_FILE = "data.json"  # beside it: the fingerprint of the data, see `Splits.fingerprint`
_PLACES = ("data.root", "data.dataset", "train.data.root", "train.data.dataset")  # keys that may say where the data are
Overrides = Mapping[str, Any] | Sequence[str]  # `section.key` to a value, or strings `section.key=value`


class _Recipe(Protocol):
    def meaning(self) -> dict[str, Any]: ...

    def to_yaml(self) -> str: ...


R = TypeVar("R", bound=_Recipe)


# ---- reading ----


def read_recipe(name: str, overrides: Overrides, shipped: Path) -> dict[str, Any]:
    """Read the plain values of a recipe and apply overrides.

    Args:
        name: name of a recipe in the folder `shipped`, or path of a YAML file.
        overrides: values by `section.key`, or strings `section.key=value` as `parse_overrides` takes them.

    Raises:
        RecipeError: if there is no such recipe, it is not YAML, or an override names a key inside a value.
    """
    path = Path(name)
    if not is_file(path):
        path = shipped / f"{name}.yaml"
        if "/" in name or not is_file(path):
            names = ", ".join(sorted(path.stem for path in shipped.glob("*.yaml")))
            raise RecipeError(f"no recipe {name!r:.200}: not a file, and the shipped ones are {names}")
    data = _read_yaml(path)
    for dotted, value in (overrides if isinstance(overrides, Mapping) else parse_overrides(overrides)).items():
        _set(data, dotted, value)
    return data


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        data = parse_yaml(read_text(path)) or {}
    except (OSError, ValueError) as error:
        raise RecipeError(f"{path}: {first_line(error)}") from None
    if not isinstance(data, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of keys, not {type(data).__name__}")
    return data


def _set(data: dict[str, Any], dotted: str, value: Any) -> None:
    *sections, key = dotted.split(".")
    for section in sections:
        data = data.setdefault(section, {})
        if not isinstance(data, dict):
            raise RecipeError(f"{dotted} cannot be set: {section!r} is not a section")
    data[key] = value


def parse_overrides(texts: Sequence[str]) -> dict[str, Any]:
    """Parse strings `section.key=value` into values by `section.key`.

    Numbers, `true`, `false`, `null`, quoted text, lists `[...]` and mappings `{...}` are read as YAML. Everything else
    is taken literally: in YAML, `runs/run #1` would end at the space, and `a: b` would be a mapping.

    Raises:
        RecipeError: if a string has no '=', or a list, mapping or quoted text is not closed.
    """
    values = {}
    for text in texts:
        dotted, separator, value = text.partition("=")
        if not separator:
            raise RecipeError(f"an override must be KEY=VALUE, got {text!r}")
        values[dotted] = _parse_value(dotted, value.strip())
    return values


def _parse_value(dotted: str, text: str) -> Any:
    is_yaml = text.startswith(("[", "{", "'", '"'))
    try:
        value = parse_yaml(text)
    except ValueError:
        if is_yaml:
            raise RecipeError(f"{dotted}: {text!r:.200} is not a YAML value") from None
        return text
    is_plain = value is None or isinstance(value, (bool, int, float))
    return value if is_yaml or (is_plain and "#" not in text) else text


# ---- building ----


def build_recipe(cls: type, data: Mapping[str, Any], prefix: str = "") -> Any:
    """Build a recipe dataclass from plain values.

    Raises:
        RecipeError: if a key is unknown (names the nearest valid one) or a value has the wrong type.
    """
    hints = _hints(cls)
    values = {}
    for key, value in data.items():
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, n=1, cutoff=0.0)[0]
            raise RecipeError(f"unknown key {prefix}{key}; did you mean {prefix}{near}?")
        if dataclasses.is_dataclass(hints[key]):
            if not isinstance(value, Mapping):
                raise RecipeError(f"{prefix}{key} must be a section of keys, got {value!r}")
            values[key] = build_recipe(typing.cast(type, hints[key]), value, f"{prefix}{key}.")
        else:
            values[key] = _coerce(f"{prefix}{key}", hints[key], value)
    return cls(**{f"{key}_" if keyword.iskeyword(key) else key: value for key, value in values.items()})


def _hints(cls: type) -> dict[str, Any]:
    """The type of each key. A key that is a Python keyword, such as `from`, has an underscore in its dataclass."""
    return {name.rstrip("_"): hint for name, hint in typing.get_type_hints(cls).items()}


def as_values(recipe: Any) -> dict[str, Any]:
    """The plain values of a recipe, with the keys of YAML files."""
    return dataclasses.asdict(recipe, dict_factory=lambda items: {name.rstrip("_"): value for name, value in items})


def _coerce(key: str, hint: Any, value: Any) -> Any:
    if typing.get_origin(hint) is Literal:
        if value not in typing.get_args(hint):
            raise RecipeError(f"{key} must be {' or '.join(map(str, typing.get_args(hint)))}, got {value!r}")
        return value
    options = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
    for option in options:
        origin = typing.get_origin(option) or option
        if origin is tuple and isinstance(value, (list, tuple)):
            return _coerce_items(key, typing.get_args(option), value)
        if origin is dict and isinstance(value, Mapping) and typing.get_args(option)[0] is int:
            hints = typing.get_args(option)
            return {_coerce(key, hints[0], size): _coerce(f"{key}.{size}", hints[1], v) for size, v in value.items()}
        if origin is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
            try:
                number = float(value)  # YAML reads 1e-3 as text
            except (ValueError, OverflowError):
                continue
            if not math.isfinite(number):
                raise RecipeError(f"{key} must be a finite number, got {value!r}")
            return number
        if isinstance(value, origin) and not (isinstance(value, bool) and origin is not bool):
            return value
    names = " or ".join(
        "null" if option is type(None) else getattr(option, "__name__", str(option)) for option in options
    )
    raise RecipeError(f"{key} must be of type {names}, got {value!r:.200}")


def _coerce_items(key: str, hints: Sequence[Any], values: Sequence[Any]) -> tuple[Any, ...]:
    if Ellipsis not in hints and len(values) != len(hints):
        raise RecipeError(f"{key} must be {len(hints)} values, got {len(values)}")
    return tuple(_coerce(key, hints[0], value) for value in values)


def to_yaml(recipe: Any) -> str:
    """Write a recipe as YAML, with all defaults."""
    return yaml.safe_dump(_as_lists(as_values(recipe)), sort_keys=False)


def _as_lists(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _as_lists(item) for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value


# ---- the recipe of an unfinished run ----


def read_stored_recipe(cls: type[R], folder: Path) -> R | None:
    """Read the recipe of the run in `folder`, which another release may have written; None if there is none.

    Missing keys get their defaults. An unknown key is ignored with a note if its value turns something off (null,
    false, 0 or empty), and rejected otherwise, because the run could not continue as it began.

    Raises:
        RecipeError: if the file is damaged, or uses a feature that this release does not have.
    """
    path = folder / RECIPE_FILE
    if not path.is_file():
        return None
    try:
        data = _read_yaml(path)
    except RecipeError as error:
        raise RecipeError(f"{error}; put the recipe back, or choose another folder") from None
    known, unknown = _split(cls, data)
    for key, value in unknown.items():
        if value:
            raise RecipeError(
                f"{path} sets {key} to {value!r}, which this release does not know; resume it with the release that "
                "wrote it, or choose another folder"
            )
        say(f"glit: {path} has the key {key}, which this release does not know; it is off, and ignored")
    try:
        recipe: R = build_recipe(cls, known)
    except GlitError as error:
        raise RecipeError(f"{path}: {error}; put the recipe back, or choose another folder") from None
    return recipe


def _split(cls: type, data: Mapping[str, Any], prefix: str = "") -> tuple[dict[str, Any], dict[str, Any]]:
    """The values of keys that a recipe has, and those of unknown keys by their full names."""
    hints = _hints(cls)
    known: dict[str, Any] = {}
    unknown: dict[str, Any] = {}
    for key, value in data.items():
        if key not in hints:
            unknown[f"{prefix}{key}"] = value
        elif dataclasses.is_dataclass(hints[key]) and isinstance(value, Mapping):
            known[key], more = _split(typing.cast(type, hints[key]), value, f"{prefix}{key}.")
            unknown |= more
        else:
            known[key] = value
    return known, unknown


def record_recipe(recipe: _Recipe, folder: Path, fingerprint: str | None) -> None:
    """Write the recipe of a run into its folder, with the fingerprint of its data if there is one."""
    write_text(folder / RECIPE_FILE, recipe.to_yaml())
    if fingerprint is not None:
        write_json(folder / DATA_FILE, {"fingerprint": fingerprint})


def refuse_other_recipe(recipe: _Recipe, folder: Path, fingerprint: Callable[[], str | None] = lambda: None) -> None:
    """Check that the run in `folder`, if there is one, has an equivalent recipe.

    Args:
        fingerprint: computes that of the data. Only called if the recipes differ in nothing but the place of the data;
            if it is the run's, the data were moved or copied, and the recipes are equivalent.

    Raises:
        RecipeError: if the recipes differ; names the keys. Also raises as `read_stored_recipe`.
    """
    stored = read_stored_recipe(type(recipe), folder)
    if stored is None:
        return
    changed = dict(_differences("", stored.meaning(), recipe.meaning()))
    if not changed:
        return
    shown, other = "; ".join(f"{key}: {change}" for key, change in list(changed.items())[:3]), "a run of another recipe"
    if all(key in _PLACES for key in changed) and (recorded := _recorded_fingerprint(folder)):
        if recorded == fingerprint():
            _say_once(f"glit: the data were moved ({'; '.join(changed.values())}) and are the same, so the run goes on")
            return
        other = "a run on other data"
    raise RecipeError(f"{folder} holds {other} ({shown}); choose another folder")


def refuse_other_data(folder: Path, fingerprint: str | None) -> None:
    """Check that the data of the run in `folder`, if there is one, have not changed, wherever they are now.

    Args:
        fingerprint: that of the data as they are; None if they have none.

    Raises:
        RecipeError: if they have changed.
    """
    recorded = _recorded_fingerprint(folder)
    if recorded and fingerprint and recorded != fingerprint:
        raise RecipeError(
            f"{folder} holds a run on other data: images, labels or class names have changed since it began; put them "
            "back, or choose another folder"
        )


def _recorded_fingerprint(folder: Path) -> str | None:
    try:
        fingerprint = parse_json(read_text(folder / DATA_FILE)).get("fingerprint")
    except (OSError, ValueError, AttributeError):  # written by an earlier release, or damaged
        return None
    return fingerprint if isinstance(fingerprint, str) else None


_say_once = functools.cache(say)  # the search and each of its trainings are checked


def _differences(prefix: str, stored: Any, given: Any) -> Iterator[tuple[str, str]]:
    """Yield the keys whose values differ, each with the change as text."""
    if isinstance(stored, Mapping) and isinstance(given, Mapping):
        for key in dict.fromkeys((*stored, *given)):
            yield from _differences(f"{prefix}.{key}" if prefix else str(key), stored.get(key), given.get(key))
    elif stored != given:
        yield prefix, f"{stored} -> {given}"
