"""A recipe is a YAML file and these dataclasses: every choice of a training run, checked before it starts."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from ..errors import RecipeError

__all__ = ["Recipe", "load_recipe", "shipped_recipes"]

_SHIPPED = Path(__file__).with_name("recipes")


@dataclass(frozen=True)
class ModelSection:
    """What is trained: keywords of `timm.create_model`."""

    name: str = "glit_tiny"
    spec: dict[str, Any] | str | None = None  # a GLiTSpec's fields, or the path of its JSON file
    pretrained: bool = False
    img_size: int = 224
    drop_rate: float = 0.0
    drop_path_rate: float = 0.0


@dataclass(frozen=True)
class DataSection:
    """What it is trained on; see `glit_models.data.open_splits`."""

    dataset: str = "folder"
    root: str | None = None
    hold_out: int = 0
    limit: int | None = None
    num_workers: int = 1
    mean: tuple[float, ...] | None = None  # these four: the model's own preprocessing unless given
    std: tuple[float, ...] | None = None
    interpolation: str | None = None
    crop_pct: float | None = None


@dataclass(frozen=True)
class AugmentSection:
    """How training pictures are changed; keywords of `timm.data.create_transform` and `timm.data.Mixup`."""

    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (0.75, 1.3333)
    hflip: float = 0.5
    color_jitter: float = 0.0
    auto_augment: str | None = None
    re_prob: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    label_smoothing: float = 0.1


@dataclass(frozen=True)
class OptimSection:
    """Optimiser and schedule; lengths in epochs, rates for a step."""

    opt: str = "adamw"
    lr: float = 1e-3
    min_lr: float = 1e-5
    weight_decay: float = 0.05
    batch_size: int = 128
    epochs: int = 10
    warmup_epochs: float = 1.0
    clip_grad: float | None = 1.0
    ema_decay: float | None = 0.999


@dataclass(frozen=True)
class Recipe:
    """A whole run.

    Raises:
        RecipeError: on a value that cannot be; names the key, the value and the bound.
    """

    model: ModelSection = field(default_factory=ModelSection)
    data: DataSection = field(default_factory=DataSection)
    augment: AugmentSection = field(default_factory=AugmentSection)
    optim: OptimSection = field(default_factory=OptimSection)
    seed: int = 0
    precision: Literal["fp32", "bf16"] = "fp32"  # bf16: autocast, parameters stay float32
    checkpoint_minutes: float = 2.0
    eval_batch_size: int = 250
    save_dtype: Literal["float32", "float16"] = "float32"  # of the model folder's weights

    def __post_init__(self) -> None:
        for key, value, valid, bound in (
            ("optim.epochs", self.optim.epochs, self.optim.epochs >= 1, "at least 1"),
            ("optim.batch_size", self.optim.batch_size, self.optim.batch_size >= 1, "at least 1"),
            ("optim.lr", self.optim.lr, self.optim.lr > 0, "positive"),
            ("optim.warmup_epochs", self.optim.warmup_epochs, 0 <= self.optim.warmup_epochs <= self.optim.epochs,
             f"from 0 to optim.epochs={self.optim.epochs}"),
            ("optim.ema_decay", self.optim.ema_decay, self.optim.ema_decay is None or 0 < self.optim.ema_decay < 1,
             "between 0 and 1, or null"),
            ("data.hold_out", self.data.hold_out, self.data.hold_out >= 0, "at least 0"),
            ("augment.label_smoothing", self.augment.label_smoothing, 0 <= self.augment.label_smoothing < 1,
             "from 0 to below 1"),
            ("model.img_size", self.model.img_size, self.model.img_size >= 1, "at least 1"),
            ("eval_batch_size", self.eval_batch_size, self.eval_batch_size >= 1, "at least 1"),
        ):  # fmt: skip
            if not valid:
                raise RecipeError(f"{key} must be {bound}, got {value!r}")
        if (self.augment.mixup or self.augment.cutmix) and self.optim.batch_size % 2:
            raise RecipeError(f"optim.batch_size must be even with mixup or cutmix, got {self.optim.batch_size}")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as they stand in YAML."""
        return dataclasses.asdict(self)

    def to_yaml(self) -> str:
        """The whole recipe with every default written out."""
        plain = {
            key: {name: list(v) if isinstance(v, tuple) else v for name, v in value.items()}
            if isinstance(value, dict) else value
            for key, value in self.to_dict().items()
        }  # fmt: skip
        return yaml.safe_dump(plain, sort_keys=False)


def shipped_recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(path.stem for path in _SHIPPED.glob("*.yaml"))


def load_recipe(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a shipped recipe by name or any by path, with `section.key=value` overrides (values in YAML).

    Raises:
        RecipeError: if it is missing, no YAML, or has an unknown key or a wrong type; names the nearest valid key.
    """
    path = Path(name)
    if not path.is_file():
        path = _SHIPPED / f"{name}.yaml"
        if "/" in name or not path.is_file():
            raise RecipeError(
                f"no recipe {name!r}: not a file, and the shipped ones are {', '.join(shipped_recipes())}"
            )
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of keys, not {type(data).__name__}")
    for override in overrides:
        _override(data, override)
    return _build(Recipe, data, "")


def _override(data: dict[str, Any], text: str) -> None:
    dotted, separator, value = text.partition("=")
    if not separator:
        raise RecipeError(f"--set takes key=value, got {text!r}")
    *sections, key = dotted.split(".")
    for section in sections:
        data = data.setdefault(section, {})
        if not isinstance(data, dict):
            raise RecipeError(f"--set {dotted}: {section!r} is not a section")
    try:
        data[key] = yaml.safe_load(value)
    except yaml.YAMLError:
        raise RecipeError(f"--set {dotted}: {value!r} is not a YAML value") from None


def _build(cls: type, data: Mapping[str, Any], prefix: str) -> Any:
    """An instance of a recipe dataclass from plain values, every key known and every value of its type."""
    hints = typing.get_type_hints(cls)
    values = {}
    for key, value in data.items():
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, n=1, cutoff=0.0)[0]
            raise RecipeError(f"unknown key {prefix}{key}; did you mean {prefix}{near}?")
        if dataclasses.is_dataclass(hints[key]):
            if not isinstance(value, Mapping):
                raise RecipeError(f"{prefix}{key} must be a section of keys, got {value!r}")
            values[key] = _build(typing.cast(type, hints[key]), value, f"{prefix}{key}.")
        else:
            values[key] = _coerce(f"{prefix}{key}", hints[key], value)
    return cls(**values)


def _coerce(key: str, hint: Any, value: Any) -> Any:
    if typing.get_origin(hint) is Literal:
        if value not in typing.get_args(hint):
            raise RecipeError(f"{key} must be {' or '.join(typing.get_args(hint))}, got {value!r}")
        return value
    options = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
    for option in options:
        origin = typing.get_origin(option) or option
        if origin is tuple and isinstance(value, (list, tuple)):
            length = len(typing.get_args(option))
            if Ellipsis not in typing.get_args(option) and len(value) != length:
                raise RecipeError(f"{key} must be {length} values, got {len(value)}")
            return tuple(_coerce(key, typing.get_args(option)[0], item) for item in value)
        if origin is float and isinstance(value, str):  # YAML reads 1e-3 as text
            try:
                return float(value)
            except ValueError:
                continue
        if origin is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        if isinstance(value, origin) and not (isinstance(value, bool) and origin is not bool):
            return value
    names = " or ".join(
        "null" if option is type(None) else getattr(option, "__name__", str(option)) for option in options
    )
    raise RecipeError(f"{key} must be of type {names}, got {value!r}")
