"""A search's recipe: a YAML file and these dataclasses, checked as a whole before anything is trained.

What is trained, and how, are training recipes inside it; see `glit_models.training.recipe`.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, final

import yaml

from glit_models.errors import RecipeError, SearchError
from glit_models.spec import GLiTSpec
from glit_models.training.recipe import Recipe, build_recipe, read_recipe

from .ask_tell import EvolutionConfig
from .named_spaces import load_space
from .space import LowLevel, SearchSpace
from .supernet import Sharing

__all__ = ["Bounds", "SearchRecipe", "load_search_recipe", "shipped_search_recipes"]

_SHIPPED = Path(__file__).with_name("recipes")
Overrides = dict[str, Any]


@final
@dataclass(frozen=True)
class Bounds:
    """Of a cost, both included; without either it is only recorded."""

    low: float | None = None
    high: float | None = None


@final
@dataclass(frozen=True)
class BudgetSection:
    """What a network may cost, at `train.model.img_size` and with the data's classes."""

    macs: Bounds = field(default_factory=Bounds)
    params: Bounds = field(default_factory=Bounds)
    latency_ms: Bounds = field(default_factory=Bounds)  # measured on the device that searches, and only if bounded


@final
@dataclass(frozen=True)
class LatencySection:
    """How latency is measured."""

    runtime: Literal["torch", "onnx"] = "torch"  # 'onnx': of the exported file; seconds more for each network
    batch_size: int = 1
    threads: int = 1


@final
@dataclass(frozen=True)
class SupernetSection:
    """How weights are shared and trained."""

    sharing: Sharing = "entangled"
    sampling: Literal["uniform", "budget"] = "uniform"  # which path a step takes: any, or one within the budget
    train: Overrides = field(default_factory=dict)  # keys of `train` that differ for the supernet


@final
@dataclass(frozen=True)
class EvaluationSection:
    """How networks are scored under inherited weights."""

    calibration_batches: int = 8  # training batches on which BatchNorm statistics are recomputed
    memory_mb: float = 2000.0  # for what networks share
    share: bool = True  # false: every network by itself, which is slower and gives the same
    early_stop_risk: float = 0.0  # of the whole search: that a network is given up which would have been a parent


@final
@dataclass(frozen=True)
class RetrainSection:
    """Which networks are trained by themselves at the end of a stage, and how."""

    top: int = 5
    train: Overrides = field(default_factory=dict)  # keys of `train` that differ for them


@final
@dataclass(frozen=True)
class SearchRecipe:
    """A whole search.

    Attributes:
        space: a shipped space's name, the path of a YAML file, or what such a file holds; see `load_space`.
        method: 'hierarchical' searches the distribution of heads first and the other values then (GLiT, section 3.3);
            'spos' all at once; 'random' draws from all. The last two have one stage with as many epochs of the supernet
            and as many generations as both stages of the first together.
        fixed: what the first stage of 'hierarchical' holds fixed.
        budget: what a network may cost. latency: how that cost is measured.
        train: a training recipe: the data, and what the supernet and the retrained networks have in common.
        supernet, evolution, evaluation, retrain: the parts of a stage.
        seed: of everything random.

    Raises:
        RecipeError, SearchError: on a value that cannot be; names the key, the value and the bound.
    """

    space: str | dict[str, Any] = "glit"
    method: Literal["hierarchical", "spos", "random"] = "hierarchical"
    fixed: LowLevel = field(default_factory=LowLevel)
    budget: BudgetSection = field(default_factory=BudgetSection)
    latency: LatencySection = field(default_factory=LatencySection)
    train: Overrides = field(default_factory=dict)
    supernet: SupernetSection = field(default_factory=SupernetSection)
    evolution: EvolutionConfig = field(default_factory=EvolutionConfig)
    evaluation: EvaluationSection = field(default_factory=EvaluationSection)
    retrain: RetrainSection = field(default_factory=RetrainSection)
    seed: int = 0

    def __post_init__(self) -> None:
        evaluation, retrain = self.evaluation, self.retrain
        for key, value, valid, bound in (
            ("seed", self.seed, self.seed >= 0, "at least 0"),
            ("latency.batch_size", self.latency.batch_size, self.latency.batch_size >= 1, "at least 1"),
            ("latency.threads", self.latency.threads, self.latency.threads >= 1, "at least 1"),
            ("evaluation.calibration_batches", evaluation.calibration_batches, evaluation.calibration_batches >= 1,
             "at least 1"),
            ("evaluation.memory_mb", evaluation.memory_mb, evaluation.memory_mb > 0, "positive"),
            ("evaluation.early_stop_risk", evaluation.early_stop_risk, 0 <= evaluation.early_stop_risk < 1,
             "from 0 to below 1"),
            ("retrain.top", retrain.top, 1 <= retrain.top <= self.evolution.population,
             f"from 1 to evolution.population={self.evolution.population}"),
        ):  # fmt: skip
            if not valid:
                raise RecipeError(f"{key} must be {bound}, got {value!r}")
        self.load_space()
        for recipe in (self.supernet_recipe(), self.retrain_recipe(None)):
            _check_training(recipe)

    def load_space(self) -> SearchSpace:
        """The space that all stages lie in."""
        return load_space(self.space)

    @property
    def num_stages(self) -> int:
        """How many stages the method has."""
        return 2 if self.method == "hierarchical" else 1

    def supernet_recipe(self) -> Recipe:
        """The training recipe of one stage's supernet."""
        recipe = self._training_recipe("supernet.train", self.supernet.train)
        epochs = recipe.optim.epochs * (2 // self.num_stages)
        return dataclasses.replace(recipe, optim=dataclasses.replace(recipe.optim, epochs=epochs))

    def retrain_recipe(self, spec: GLiTSpec | None) -> Recipe:
        """The training recipe of a network by itself."""
        recipe = self._training_recipe("retrain.train", self.retrain.train)
        if spec is None:
            return recipe
        return dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, spec=spec.to_dict()))

    def evolution_config(self) -> EvolutionConfig:
        """The evolution of one stage."""
        generations = self.evolution.generations * (2 // self.num_stages)
        return dataclasses.replace(self.evolution, generations=generations)

    def _training_recipe(self, place: str, overrides: Mapping[str, Any]) -> Recipe:
        for key in ("data", "precision"):
            if key in overrides:
                raise RecipeError(f"{place}.{key} cannot be set: it is one for all; set train.{key}")
        for where, keys in (("train", self.train), (place, overrides)):
            if "seed" in keys:
                raise RecipeError(f"{where}.seed cannot be set: the search's seed is that of all its parts")
        recipe: Recipe = build_recipe(Recipe, {**_merge(self.train, overrides, place), "seed": self.seed}, f"{place}.")
        return recipe

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as they stand in YAML."""
        return dataclasses.asdict(self)

    def to_yaml(self) -> str:
        """The whole recipe with every default of the search written out."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False)


def _check_training(recipe: Recipe) -> None:
    for key, value, allowed in (
        ("train.model.spec", recipe.model.spec, None),
        ("train.model.pretrained", recipe.model.pretrained, False),
        ("train.model.img_size_shares", recipe.model.img_size_shares, None),
        ("train.model.freeze", recipe.model.freeze, ()),
        ("train.model.compile", recipe.model.compile, False),
    ):
        if value != allowed:
            raise RecipeError(f"{key} cannot be set in a search, got {value!r}")
    if recipe.model.name != "glit_tiny":
        raise RecipeError(f"train.model.name must be glit_tiny, whose spec the search chooses, got {recipe.model.name}")


def _merge(base: Mapping[str, Any], over: Mapping[str, Any], place: str) -> dict[str, Any]:
    """`base` with the keys of `over` put in or replaced, section by section."""
    merged = copy.deepcopy(dict(base))
    for key, value in over.items():
        old = merged.get(key)
        if isinstance(old, Mapping) and not isinstance(value, Mapping):
            raise RecipeError(f"{place}.{key} must be a section of keys, got {value!r}")
        merged[key] = _merge(old, value, f"{place}.{key}") if isinstance(old, Mapping) else copy.deepcopy(value)
    return merged


def load_search_recipe(name: str, overrides: Sequence[str] = ()) -> SearchRecipe:
    """Read a shipped recipe by name or any by path, with `section.key=value` overrides (values in YAML).

    Raises:
        RecipeError, SearchError: if it is missing, no YAML, or has an unknown key or a wrong value.
    """
    return build_search_recipe(read_recipe(name, overrides, _SHIPPED))


def build_search_recipe(data: Mapping[str, Any]) -> SearchRecipe:
    """The recipe of these plain values. Raises as `load_search_recipe`."""
    recipe: SearchRecipe = build_recipe(SearchRecipe, data)
    return recipe


def shipped_search_recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(path.stem for path in _SHIPPED.glob("*.yaml"))


def differing_keys(ours: SearchRecipe, theirs: Mapping[str, Any]) -> list[str]:
    """What two recipes differ in, as `key: theirs -> ours`; a key that `theirs` leaves out has its default."""
    with suppress(RecipeError, SearchError):  # of an earlier release, with keys that are none any more
        theirs = build_search_recipe(theirs).to_dict()
    return list(_differences("", theirs, ours.to_dict()))


def _differences(prefix: str, a: Any, b: Any) -> Iterator[str]:
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        for key in dict.fromkeys((*a, *b)):
            yield from _differences(f"{prefix}.{key}" if prefix else str(key), a.get(key), b.get(key))
    elif a != b:
        yield f"{prefix}: {a} -> {b}"
