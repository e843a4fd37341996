"""Resolve budgets relative to a model: `like: deit_tiny, within: 5 %` becomes two bounds when a search begins.

The bounds are stored in the search's folder, so that a resumed search keeps them.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from glit_models.errors import GlitError, RecipeError, SearchError, first_line
from glit_models.families import named_specs
from glit_models.reading import parse_json, read_text
from glit_models.runs.files import write_json
from glit_models.training import setup
from glit_models.training.recipe import ModelSection

from .recipe_sections import BudgetSection
from .spaces.budget import Budget, show_cost

__all__ = ["Reference", "read_references", "resolve_budgets", "write_references"]

_FILE = "budget.json"
_USUAL = "_patch16_224"  # suffix of timm's vision transformers of the usual size


@final
@dataclass(frozen=True)
class Reference:
    """The bounds of a relative budget.

    Attributes:
        model: the full name of the model.
        cost: cost of the model, at the recipe's image size and with the data's classes.
        percent: maximum difference from that cost.
        low, high: the bounds.
    """

    model: str
    cost: float
    percent: float
    low: float
    high: float

    def __str__(self) -> str:
        low, high = show_cost(self.low), show_cost(self.high)
        return f"like {self.model} ({show_cost(self.cost)}), within {self.percent:g} %: from {low} to {high}"


def resolve_budgets(
    budgets: Sequence[Budget], section: BudgetSection, folder: Path, img_size: int, num_classes: int
) -> tuple[list[Budget], dict[str, Reference]]:
    """The budgets with the bounds of relative ones resolved, and the references of these bounds, by the budgets' names.

    Args:
        folder: folder of the search; stored bounds are reused.

    Raises:
        RecipeError: if a model is unknown or its cost cannot be computed.
        SearchError: if the stored bounds are damaged.
    """
    relative = [budget for budget in budgets if getattr(section, budget.name).like is not None]
    known = read_references(folder) if relative else {}
    references = {}
    for budget in relative:
        bounds, key = getattr(section, budget.name), f"budget.{budget.name}.like"
        if budget.name in known:
            references[budget.name] = known[budget.name]
            continue
        name = _model_name(bounds.like, key)
        cost, share = _cost(budget, name, img_size, num_classes, key), bounds.percent / 100
        references[budget.name] = Reference(name, cost, bounds.percent, cost * (1 - share), cost * (1 + share))
    resolved = [
        dataclasses.replace(budget, low=reference.low, high=reference.high)
        if (reference := references.get(budget.name)) else budget for budget in budgets
    ]  # fmt: skip
    return resolved, references


def _model_name(name: str, key: str) -> str:
    """timm's full name of a model; for vision transformers of the usual size, the suffix is optional."""
    for full in (name, f"{name}{_USUAL}"):
        if timm.is_model(full):
            return full.partition(".")[0]
    known = [model.removesuffix(_USUAL) for model in timm.list_models()]
    near = next(iter(difflib.get_close_matches(name, known, n=1, cutoff=0.0)), "")
    raise RecipeError(f"{key}: {name!r:.100} is no model of timm or of this package; did you mean {near!r}?")


def _cost(budget: Budget, name: str, img_size: int, num_classes: int, key: str) -> float:
    """A model's cost: for this package's networks as for any candidate, for timm's as counted by PyTorch."""
    if name in named_specs():
        return budget.cost(named_specs()[name])
    if budget.name not in ("macs", "params"):
        raise RecipeError(f"{key} must be a network of this package, which `glit list` shows, got {name!r}")
    images = torch.zeros(1, 3, img_size, img_size, device="meta")
    try:
        with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
            model = setup.create_model(ModelSection(name=name, img_size=img_size), num_classes).eval()
            model(images)
    except (GlitError, RuntimeError, ValueError, TypeError, AssertionError, NotImplementedError) as error:
        raise RecipeError(f"{key}: {name} takes no images of {img_size} pixels: {first_line(error)}") from None
    if budget.name == "macs":
        return counter.get_total_flops() / 2
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def write_references(references: Mapping[str, Reference], folder: Path) -> None:
    """Store the bounds in the folder of a search. Raises WriteError."""
    if references:
        write_json(folder / _FILE, {name: dataclasses.asdict(reference) for name, reference in references.items()})


def read_references(folder: Path) -> dict[str, Reference]:
    """Read the bounds of a search, by the budgets' names. Raises SearchError if the file is damaged."""
    path = folder / _FILE
    try:
        data: Any = parse_json(read_text(path))
        references = {name: Reference(**fields) for name, fields in data.items()}
        for reference in references.values():
            if not all(isinstance(value, (int, float)) for value in dataclasses.astuple(reference)[1:]):
                raise TypeError("a bound is no number")
        return references
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise SearchError(f"{path} is damaged ({first_line(error)}); delete it, and it is made again") from None
