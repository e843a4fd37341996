"""Read and check the files in a search's folder. Missing results are None or empty.

This module only reads; `figures` draws and `report` writes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, final

from glit_models import Spec, parse_spec
from glit_models.errors import SearchError, first_line
from glit_models.reading import parse_json, parse_yaml, read_text

from ..evidence.control import Control, percent
from ..evidence.ranking import Ranking
from ..fitness import FITNESSES, Fitness, InheritedAccuracy
from ..methods.evolution import METHODS
from ..relative_budget import read_references
from ..spaces.named import load_space
from ..spaces.space import SearchSpace

__all__ = ["COSTS", "Findings", "Network", "StageFindings", "read_candidates", "read_findings"]

COSTS = ("macs", "params", "latency_ms")
_MAX_BYTES = 1 << 28  # for the candidates of a long search; other files are small
_STAGE_FILES = (
    "space.yaml",
    "supernet/metrics.jsonl",
    "candidates.jsonl",
    "references.json",
    "retrained.json",
    "winner.json",
)

T = TypeVar("T")


@final
@dataclass(frozen=True)
class Network:
    """A network and the facts about it.

    Attributes:
        spec: the network.
        costs: multiply-adds, parameters and optionally milliseconds, by the names in `COSTS`.
        name: name of a reference.
        fitness: the value that the search compared: an accuracy in percent, a loss, ...
        accuracy: on the search set after stand-alone training, in percent.
        generation: generation in which it was evaluated.
        origin: how it was found.
        num_images: number of images that it was scored on; 0 if that was not recorded.
    """

    spec: Spec
    costs: Mapping[str, float]
    name: str = ""
    fitness: float | None = None
    accuracy: float | None = None
    generation: int = 0
    origin: str = ""
    num_images: int = 0


@final
@dataclass(frozen=True)
class StageFindings:
    """One supernet and one search over it.

    Attributes:
        name: name of its folder.
        space: the search space.
        losses: (step, training loss) of the supernet.
        candidates: evaluated networks, in order.
        references: known networks, for comparison.
        retrained: networks after stand-alone training, best first.
        winner: the best of these.
        missing: files that do not exist yet.
        measure: the search's fitness, which `Network.fitness` contains.
    """

    name: str
    space: SearchSpace | None
    losses: tuple[tuple[float, float], ...]
    candidates: tuple[Network, ...]
    references: tuple[Network, ...]
    retrained: tuple[Network, ...]
    winner: Spec | None
    missing: tuple[str, ...]
    measure: type[Fitness] = InheritedAccuracy

    @property
    def title(self) -> str:
        """The title of the stage, which says what it searches."""
        return {
            "stage1": "Stage 1: which heads are global, which local",
            "stage2": "Stage 2: the sizes within the blocks",
        }.get(self.name, "One stage: heads and sizes at once")

    @property
    def measured(self) -> str:
        """The name of the candidates' fitness, without its unit."""
        return self.measure.label.partition(",")[0]

    def show(self, fitness: float | None) -> str:
        """Format a candidate's fitness."""
        return "-" if fitness is None else self.measure.show(fitness)

    def fully_scored(self) -> list[Network]:
        """The candidates that were scored on the whole search set, not on a part of it."""
        most = max((candidate.num_images for candidate in self.candidates), default=0)
        return [candidate for candidate in self.candidates if candidate.num_images == most]


@final
@dataclass(frozen=True)
class Findings:
    """A search: its settings, its stages and its results.

    Attributes:
        method: a name of `METHODS`.
        seed: seed of everything random.
        sharing: how sub-modules share weights.
        start: the initial weights of the supernet; None for random ones.
        inherits: whether stand-alone training started from the supernet's weights.
        measure: the fitness of the candidates.
        budget: (low, high) by cost, for costs with a bound.
        stages: stages in order; those that have not begun are empty.
        winner: the network that was found.
        result: numbers by name.
        times: seconds by (stage, part).
        control: comparison of the winner with random networks.
        ranks: how well cheap measures order networks compared with training, for each ranked stage.
    """

    method: str
    seed: int
    sharing: str
    start: str | None
    inherits: bool
    measure: type[Fitness]
    budget: Mapping[str, tuple[float | None, float | None]]
    stages: tuple[StageFindings, ...]
    winner: Spec | None
    result: Mapping[str, float]
    times: Mapping[tuple[str, str], float]
    control: Control | None
    ranks: tuple[Ranking, ...]


def read_findings(folder: Path) -> Findings:
    """Read all results of a search, finished or in progress.

    Raises:
        SearchError: if the folder is not a search folder, or a file cannot be read or is damaged; names it.
    """
    recipe = _read(folder / "recipe.yaml", _recipe)
    if recipe is None:
        raise SearchError(f"{folder} is no search: it has no recipe.yaml")
    for name, reference in read_references(folder).items():
        recipe["budget"][name] = (reference.low, reference.high)
    names = _stage_names(folder, recipe["method"])
    return Findings(
        **recipe,
        stages=tuple(_read_stage(folder, name, recipe["measure"]) for name in names),
        winner=_read(folder / "winner.json", _spec),
        result=_read(folder / "result.json", _result) or {},
        times=_read(folder / "times.json", _times) or {},
        control=_read(folder / "control.json", lambda text: Control.from_dict(_mapping(parse_json(text)))),
        ranks=_ranks(folder, names),
    )


def _read_stage(folder: Path, name: str, measure: type[Fitness]) -> StageFindings:
    path = folder / name
    return StageFindings(
        name,
        _read(path / "space.yaml", lambda text: load_space(_mapping(parse_yaml(text)))),
        tuple(_read(path / "supernet/metrics.jsonl", _losses) or ()),
        tuple(read_candidates(path)),
        tuple(_read(path / "references.json", lambda text: _networks(text, "accuracy")) or ()),
        tuple(_read(path / "retrained.json", lambda text: _networks(text, "inherited")) or ()),
        _read(path / "winner.json", _spec),
        tuple(f"{name}/{file}" for file in _STAGE_FILES if not (path / file).is_file()),
        measure,
    )


def read_candidates(stage: Path) -> list[Network]:
    """Read the networks that a stage's search evaluated, in order. Raises SearchError if the file is damaged."""
    path = stage / "candidates.jsonl"
    return _read(path, lambda text: [_network(line, "accuracy") for line in _lines(text)]) or []


def _stage_names(folder: Path, method: str) -> tuple[str, ...]:
    """The stages of a method; for a custom method, which is not imported, only those that have begun."""
    known = METHODS.get(method)
    return known.stages if known else tuple(sorted(path.parent.name for path in folder.glob("*/space.yaml")))


def _read(path: Path, parse: Callable[[str], T]) -> T | None:
    """The content of a file, or None if it does not exist."""
    try:
        return parse(read_text(path, _MAX_BYTES))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise SearchError(f"{path} cannot be read: {error.strerror}") from None
    except KeyError as error:
        reason = f"it lacks {error}"
    except (ValueError, TypeError, AttributeError, OverflowError) as error:
        reason = first_line(error)
    raise SearchError(f"{path} is damaged: {reason}")


_PRIVATE = ", with queries and keys for each number of heads"


def _recipe(text: str) -> dict[str, Any]:
    data = _mapping(parse_yaml(text))
    fitness = data.get("fitness", "inherited")  # version 0.1 had no other and wrote none
    for table, name in ((METHODS, data["method"]), (FITNESSES, fitness)):
        if ":" not in str(name):  # an extension; reading a folder does not import it
            table[name]  # raises on an unknown name
    budget = {}
    for name, bounds in (data.get("budget") or {}).items():
        low, high = (_number(name, bounds[key], or_none=True) for key in ("low", "high"))
        if (low, high) != (None, None):
            budget[name] = (low, high)
    supernet = _mapping(data["supernet"])
    return {
        "method": data["method"],
        "seed": data["seed"],
        "sharing": f"{supernet['sharing']}{_PRIVATE if supernet.get('private_qk') else ''}",
        "start": None if supernet.get("from") is None else str(supernet["from"]),
        "inherits": _mapping(data.get("retrain") or {}).get("start") == "inherited",
        "budget": budget,
        "measure": FITNESSES.get(fitness) or Fitness,
    }


def _lines(text: str) -> list[dict[str, Any]]:
    """One mapping per line; an incomplete last line, still being written or cut by a kill, is skipped."""
    lines = []
    for number, line in enumerate(text.split("\n")[:-1], 1):
        try:
            lines.append(_mapping(parse_json(line)))
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from None
    return lines


def _losses(text: str) -> list[tuple[float, float]]:
    return [(_number("step", line["step"]), float(line["loss"])) for line in _lines(text) if "loss" in line]


def _network(data: Mapping[str, Any], fitness: str) -> Network:
    """Args: `fitness`: the name of the fitness in this file in version 0.1."""
    accuracy = None if fitness == "accuracy" else data.get("accuracy")
    return Network(
        parse_spec(_mapping(data["spec"])),
        {name: _number(name, data[name]) for name in COSTS if name in data or name != "latency_ms"},
        str(data.get("name", "")),
        _number("fitness", data.get("fitness", data.get(fitness)), or_none=True),
        None if accuracy is None else percent(accuracy),
        int(_number("generation", data.get("generation", 0))),
        str(data.get("origin", "")),
        int(_number("images", data.get("images", 0))),
    )


def _networks(text: str, fitness: str) -> list[Network]:
    data = parse_json(text)
    if not isinstance(data, list):
        raise ValueError(f"it must hold a list, not {type(data).__name__}")
    return [_network(_mapping(network), fitness) for network in data]


def _result(text: str) -> dict[str, float]:
    """The numbers for the report; those of the test set are null if there is none."""
    numbers = ("macs", "params", "search_accuracy", "test_accuracy", "num_evaluated", "minutes", "search_images",
               "test_images")  # fmt: skip
    data = _mapping(parse_json(text))
    return {
        key: percent(data[key]) if key.endswith("accuracy") else _number(key, data[key])
        for key in numbers
        if data.get(key) is not None
    }


def _times(text: str) -> dict[tuple[str, str], float]:
    times = {}
    for stage, parts in _mapping(parse_json(text)).items():
        for part, seconds in (parts if isinstance(parts, dict) else {"": parts}).items():
            times[stage, part] = _number("seconds", seconds)
    return times


def _ranks(folder: Path, stages: Sequence[str]) -> tuple[Ranking, ...]:
    """The ranking of each stage; version 0.1 wrote one file for all."""
    paths = [*(folder / stage / "rank.json" for stage in stages), folder / "rank.json"]
    read = (_read(path, lambda text: Ranking.from_dict(_mapping(parse_json(text)))) for path in paths)
    return tuple(ranking for ranking in read if ranking is not None)


def _spec(text: str) -> Spec:
    return parse_spec(parse_json(text))


def _mapping(data: Any) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise ValueError(f"a mapping is missing where {type(data).__name__} stands")
    return data


def _number(name: str, value: Any, or_none: bool = False) -> Any:
    """A finite number, or None if it may be missing."""
    if value is None and or_none:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value!r}")
    return value
