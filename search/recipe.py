"""Search recipes: dataclasses for all settings of a search, read from YAML and checked before anything is trained.

A search recipe contains training recipes; see `glit_models.training.recipe`.
"""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

from glit_models import Spec, parse_spec
from glit_models.errors import RecipeError, SearchError, WeightsError
from glit_models.families import FAMILIES, family_of_architecture, named_specs
from glit_models.recipes import (
    RECIPE_FILE,
    Overrides,
    as_values,
    build_recipe,
    read_recipe,
    read_stored_recipe,
    to_yaml,
)
from glit_models.training.recipe import Recipe, without_machine_keys

from .fitness import FITNESSES, Fitness
from .methods.ask_tell import Search
from .methods.config import EvolutionConfig
from .methods.evolution import METHODS
from .recipe_sections import (
    Bounds,
    BudgetSection,
    ControlSection,
    EvaluationSection,
    FinalSection,
    LatencySection,
    RetrainSection,
    StandaloneSection,
    SupernetSection,
    TrainingKeys,
)
from .spaces.choices import check_mapping
from .spaces.named import NAMED_SPACES, load_space
from .spaces.space import SearchSpace

__all__ = ["SearchRecipe", "load_search_recipe", "read_recipe_of", "shipped_search_recipes"]

_SHIPPED = Path(__file__).with_name("recipes")


@final
@dataclass(frozen=True)
class SearchRecipe:
    """All settings of a search.

    Attributes:
        space: a built-in space's name, the path of a YAML file, or the content of such a file; see `load_space`.
        method: a name of `METHODS`, or `my_module:MyMethod`. 'hierarchical' first searches the distribution of heads,
            then the other values (GLiT, section 3.3); 'spos' all at once; 'random' draws from all. The last two have
            one stage with as many epochs of the supernet, generations and retrained networks as both stages of the
            first together. 'evolution' is 'spos' with the recipe's own numbers, 'autoformer' is AutoFormer's.
        fitness: how networks are compared: a name of `FITNESSES`, or `my_module:MyFitness`. 'inherited' is accuracy
            with the weights of a supernet; the others need none.
        fixed: values that the first stage of 'hierarchical' keeps fixed; missing ones are the family's defaults.
        given: for `transform`, the network to make cheaper: a named one, the path of a JSON file, or fields.
        budget: bounds on a network's costs. latency: how latency is measured.
        train: a training recipe: the data, and the common settings of the supernet and the retrained networks.
        supernet, evolution, evaluation, retrain: the parts of a stage.
        final: the winner's last training.
        control: random networks for comparison with the winner.
        seed: seed of everything random.

    Raises:
        RecipeError, SearchError: on an invalid value; names the key, the value and the bound.
    """

    space: str | dict[str, Any] = "glit"
    method: str = "hierarchical"
    fitness: str = "inherited"
    fixed: dict[str, Any] = field(default_factory=dict)
    given: str | dict[str, Any] | None = None
    budget: BudgetSection = field(default_factory=BudgetSection)
    latency: LatencySection = field(default_factory=LatencySection)
    train: TrainingKeys = field(default_factory=dict)
    supernet: SupernetSection = field(default_factory=SupernetSection)
    evolution: EvolutionConfig = field(default_factory=EvolutionConfig)
    evaluation: EvaluationSection = field(default_factory=EvaluationSection)
    standalone: StandaloneSection = field(default_factory=StandaloneSection)
    retrain: RetrainSection = field(default_factory=RetrainSection)
    final: FinalSection = field(default_factory=FinalSection)
    control: ControlSection = field(default_factory=ControlSection)
    seed: int = 0

    def __post_init__(self) -> None:
        evaluation, retrain, screen_images = self.evaluation, self.retrain, self.evaluation.screen_images
        most_trained = max((retrain.top, *retrain.rungs)) * self.method_class.stage_work
        for key, value, valid, bound in (
            ("seed", self.seed, 0 <= self.seed < 1 << 63, "from 0 to below 2^63"),
            ("latency.batch_size", self.latency.batch_size, self.latency.batch_size >= 1, "at least 1"),
            ("latency.threads", self.latency.threads, self.latency.threads >= 1, "at least 1"),
            ("supernet.paths", self.supernet.paths, self.supernet.paths >= 1, "at least 1"),
            ("supernet.distill", self.supernet.distill, 0 <= self.supernet.distill <= 1, "from 0 to 1"),
            ("supernet.widen", self.supernet.widen, 0 <= self.supernet.widen <= 1, "from 0 to 1"),
            ("evaluation.calibration_batches", evaluation.calibration_batches, evaluation.calibration_batches >= 1,
             "at least 1"),
            ("evaluation.memory_mb", evaluation.memory_mb, evaluation.memory_mb > 0, "positive"),
            ("control.networks", self.control.networks, self.control.networks >= 0, "at least 0"),
            ("evaluation.screen_images", screen_images, screen_images is None or screen_images >= 1,
             "at least 1, or null"),
            ("evaluation.confirm", evaluation.confirm, screen_images is None or evaluation.confirm >= most_trained,
             f"at least {most_trained}, as many as get a stand-alone training"),
            ("standalone.epochs", self.standalone.epochs, self.standalone.epochs >= 1, "at least 1"),
            ("retrain.top", retrain.top, 1 <= retrain.top <= self.evolution.population,
             f"from 1 to evolution.population={self.evolution.population}"),
        ):  # fmt: skip
            if not valid:
                raise RecipeError(f"{key} must be {bound}, got {value!r}")
        for name in ("macs", "params", "latency_ms"):
            getattr(self.budget, name).check(f"budget.{name}")
        check_mapping("fixed", self.fixed)
        space = self.load_space()
        if isinstance(self.space, str) and self.space not in NAMED_SPACES:  # a file, which may move or change
            object.__setattr__(self, "space", space.to_dict())
        object.__setattr__(self, "fixed", {**(space.spec_class.first_stage or {}), **self.fixed})
        if len(self.method_class.stages) > 1:
            space.stage_one(**self.fixed)
        if self.method_class.seeks_front and (screen_images is not None or retrain.rungs):
            key = "evaluation.screen_images" if screen_images is not None else "retrain.rungs"
            raise RecipeError(
                f"{key} cannot be set for method {self.method}: cheap networks of the front would be lost"
            )
        self._check_sampling()
        self._resolve_given()
        fitness = self.fitness_class  # raises on an unknown name
        self._check_starts(fitness)
        if self.supernet.from_ is not None and os.path.isdir(self.supernet.from_):  # and not a model's name
            supernet = dataclasses.replace(self.supernet, from_=os.path.abspath(self.supernet.from_))
            object.__setattr__(self, "supernet", supernet)
        if screen_images is not None and not fitness.can_screen:
            raise RecipeError(
                f"evaluation.screen_images must be null for fitness {self.fitness}, which says nothing of single "
                f"images, got {screen_images}"
            )
        supernet_recipe, recipe = self.supernet_recipe(), self.retrain_recipe(None)
        for training in (supernet_recipe, recipe):
            _check_training(training, space)
        if supernet_recipe.model.img_size != recipe.model.img_size:
            raise RecipeError(
                f"model.img_size must be the same in supernet.train and retrain.train, got "
                f"{supernet_recipe.model.img_size} and {recipe.model.img_size}; set train.model.img_size"
            )
        retrain.check_rungs(self.evolution.population, recipe.optim.epochs)

    def _check_sampling(self) -> None:
        """Check that the keys for the training of the supernet are compatible."""
        supernet = self.supernet
        if supernet.sampling == "sandwich" and supernet.paths < 3:
            raise RecipeError(
                "supernet.paths must be at least 3 for supernet.sampling=sandwich, for the largest, the smallest and "
                f"random networks; got {supernet.paths}"
            )
        if supernet.private_qk and supernet.sharing == "independent":
            raise RecipeError("supernet.private_qk needs supernet.sharing=entangled or both_sides, not independent")
        if supernet.sampling == "identity":
            if self.budget.macs == Bounds():
                raise RecipeError("supernet.sampling=identity needs bounds in budget.macs, for the mean of its paths")
            space = self.load_space()
            if all(space.identity_of(options) is None for options in dict.fromkeys(space.block_options)):
                raise RecipeError(
                    "supernet.sampling=identity needs a space whose blocks may be identity blocks, such as vitas"
                )
        if supernet.widen and supernet.sampling not in ("uniform", "sandwich"):
            raise RecipeError(f"supernet.widen needs supernet.sampling=uniform or sandwich, not {supernet.sampling}")
        if supernet.distill and supernet.sampling != "sandwich":
            raise RecipeError(
                "supernet.distill needs supernet.sampling=sandwich: only there does every step train the largest "
                f"network, which the others learn from; got {supernet.sampling}"
            )
        if supernet.sampling == "budget" and self.budget.latency_ms != Bounds():
            raise RecipeError(
                "supernet.sampling=budget cannot be used with budget.latency_ms, which would time networks during the "
                "training; take uniform"
            )
        if supernet.distill and self.supernet_recipe().distill.teacher is not None:
            raise RecipeError("supernet.distill cannot be set beside train.distill.teacher: a loss takes one teacher")

    def _resolve_given(self) -> None:
        """Replace the name or path of the given network by its fields, as the name or file may change."""
        if self.method_class.needs_given != (self.given is not None):
            needed = "is missing: set it to a named network, a JSON file or the fields of a spec"
            why = needed if self.given is None else f"cannot be set: method {self.method} starts from no network"
            raise RecipeError(f"given {why}")
        if self.given is not None:
            named = named_specs().get(self.given) if isinstance(self.given, str) else None
            object.__setattr__(self, "given", (named or parse_spec(self.given)).to_dict())

    def _check_starts(self, fitness: type[Fitness]) -> None:
        """Check that the supernet and the retrained networks can start from weights."""
        for key, value, is_set in (
            ("supernet.from", self.supernet.from_, self.supernet.from_ is not None),
            ("retrain.start", self.retrain.start, self.retrain.start == "inherited"),
        ):
            if is_set and len(self.method_class.stages) > 1:
                raise RecipeError(f"{key}={value} needs a method with one stage, such as spos, not {self.method}")
            if is_set and not fitness.needs_supernet:
                raise RecipeError(f"{key}={value} needs a supernet, and fitness {self.fitness} has none")

    @property
    def method_class(self) -> type[Search]:
        """The class of the method. Raises SearchError if the name is unknown."""
        return METHODS.find(self.method)

    @property
    def given_spec(self) -> Spec | None:
        """The network that the search starts from."""
        return None if self.given is None else parse_spec(self.given)

    @property
    def costs_in_view(self) -> tuple[str, ...]:
        """The costs that the method minimises, in addition to the budget."""
        return self.evolution.objectives if self.method_class.seeks_front else ()

    @property
    def fitness_class(self) -> type[Fitness]:
        """The class of the fitness. Raises SearchError if the name is unknown."""
        return FITNESSES.find(self.fitness)

    def load_space(self) -> SearchSpace:
        """The space that contains all stages."""
        return load_space(self.space)

    def supernet_recipe(self) -> Recipe:
        """The training recipe of one stage's supernet."""
        recipe = self._training_recipe("supernet.train", self.supernet.train)
        epochs, paths = recipe.optim.epochs * self.method_class.stage_work, self.supernet.paths
        parts = recipe.optim.grad_accumulation * paths
        optim = dataclasses.replace(recipe.optim, epochs=epochs, grad_accumulation=parts)
        try:
            return dataclasses.replace(recipe, optim=optim)
        except RecipeError as error:
            raise RecipeError(f"supernet.paths={paths} cuts each batch into parts: {error}") from None

    def retrain_recipe(self, spec: Spec | None, epochs: int | None = None) -> Recipe:
        """The training recipe of a stand-alone network, with its number of epochs unless another is given.

        The last epoch's weights are used: choosing the best of many evaluations on the search set would be biased.
        """
        recipe = dataclasses.replace(self._training_recipe("retrain.train", self.retrain.train), keep="last")
        if epochs is not None:
            warmup = min(recipe.optim.warmup_epochs, epochs)
            optim = dataclasses.replace(recipe.optim, epochs=epochs, warmup_epochs=warmup)
            recipe = dataclasses.replace(recipe, optim=optim, eval_every=epochs)
        if spec is None:
            return recipe
        return dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, spec=spec.to_dict()))

    def final_recipe(self, spec: Spec) -> Recipe | None:
        """The training recipe of the winner's last training; None if its weights from the comparison are final."""
        recipe = self.retrain_recipe(spec)
        if not self.final.all_data or recipe.data.dataset == "fractals":
            return None
        return dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, train_on_validation=True))

    def evolution_config(self) -> EvolutionConfig:
        """The settings of the evolution for one stage."""
        generations = self.evolution.generations * self.method_class.stage_work
        return dataclasses.replace(self.evolution, generations=generations)

    def retrain_config(self) -> RetrainSection:
        """The retraining of one stage."""
        work, retrain = self.method_class.stage_work, self.retrain
        rungs = {count * work: epochs for count, epochs in retrain.rungs.items()}
        return dataclasses.replace(retrain, top=retrain.top * work, rungs=rungs)

    def _training_recipe(self, place: str, overrides: Mapping[str, Any]) -> Recipe:
        for key in ("data", "precision"):
            if key in overrides:
                raise RecipeError(f"{place}.{key} cannot be set: it is one for all; set train.{key}")
        for where, keys in (("train", self.train), (place, overrides)):
            if "seed" in keys:
                raise RecipeError(f"{where}.seed cannot be set: the search's seed is that of all its parts")
            if "keep" in keys:
                raise RecipeError(f"{where}.keep cannot be set: the last epoch of every training counts")
        recipe: Recipe = build_recipe(Recipe, {**_merge(self.train, overrides, place), "seed": self.seed}, f"{place}.")
        return recipe

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as stored in YAML."""
        return as_values(self)

    def to_yaml(self) -> str:
        """The whole recipe as YAML, with all defaults of the search."""
        return to_yaml(self)

    def meaning(self) -> dict[str, Any]:
        """The settings that define the search; equal for recipes of the same search.

        `train` is the whole recipe of a retrained network, `supernet.train` the differences for the supernet.
        """
        values = self.to_dict()
        retrain = without_machine_keys(self._training_recipe("retrain.train", self.retrain.train).to_dict())
        supernet = without_machine_keys(self._training_recipe("supernet.train", self.supernet.train).to_dict())
        values["space"] = self.load_space().to_dict()
        for name, bounds in values["budget"].items():
            if bounds["like"] is not None:
                bounds["within"] = getattr(self.budget, name).percent
        values["train"] = retrain
        values["supernet"]["train"] = _difference(retrain, supernet)
        del values["train"]["seed"], values["retrain"]["train"]  # included elsewhere
        del values["control"]  # runs after the search, and does not affect it
        return values


def _check_training(recipe: Recipe, space: SearchSpace) -> None:
    for key, value, allowed in (
        ("train.model.spec", recipe.model.spec, None),
        ("train.model.pretrained", recipe.model.pretrained, False),
        ("train.model.img_size_shares", recipe.model.img_size_shares, None),
        ("train.model.freeze", recipe.model.freeze, ()),
        ("train.model.compile", recipe.model.compile, False),
        ("train.data.train_on_validation", recipe.data.train_on_validation, False),
    ):
        if value != allowed:
            raise RecipeError(f"{key} cannot be set in a search, got {value!r}")
    try:
        fits = family_of_architecture(recipe.model.name).name == space.family
    except WeightsError:
        fits = False
    if not fits:
        names = ", ".join(FAMILIES[space.family].named)
        raise RecipeError(
            f"train.model.name must be of the space's family {space.family}, one of {names}; got {recipe.model.name}"
        )


def _merge(base: Mapping[str, Any], over: Mapping[str, Any], place: str) -> dict[str, Any]:
    """`base` with the keys of `over` added or replaced, recursively."""
    merged = copy.deepcopy(dict(base))
    for key, value in over.items():
        old = merged.get(key)
        if isinstance(old, Mapping) and not isinstance(value, Mapping):
            raise RecipeError(f"{place}.{key} must be a section of keys, got {value!r}")
        merged[key] = _merge(old, value, f"{place}.{key}") if isinstance(old, Mapping) else copy.deepcopy(value)
    return merged


def _difference(base: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of `other` whose values differ from those of `base`, recursively."""
    changed = {}
    for key, value in other.items():
        if isinstance(value, Mapping) and isinstance(base.get(key), Mapping):
            value = _difference(base[key], value)
            if value:
                changed[key] = value
        elif key not in base or base[key] != value:
            changed[key] = value
    return changed


def load_search_recipe(name: str, overrides: Overrides = ()) -> SearchRecipe:
    """Read a search recipe: a shipped one by name, or any by path.

    Args:
        overrides: values by `section.key`, or strings `section.key=value`.

    Raises:
        RecipeError, SearchError: if it is missing, is not YAML, or has an unknown key or a wrong value.
    """
    recipe: SearchRecipe = build_recipe(SearchRecipe, read_recipe(name, overrides, _SHIPPED))
    return recipe


def read_recipe_of(folder: Path) -> SearchRecipe:
    """Read the recipe of the search in a folder. Raises SearchError if there is none, RecipeError if it is damaged."""
    recipe = read_stored_recipe(SearchRecipe, folder)
    if recipe is None:
        raise SearchError(f"{folder} holds no search: there is no {RECIPE_FILE}")
    return recipe


def shipped_search_recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(path.stem for path in _SHIPPED.glob("*.yaml"))
