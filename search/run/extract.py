"""Extract networks of a supernet as model folders, with their inherited weights, before any retraining."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch

from glit_models import Spec, parse_spec
from glit_models.errors import Argument, SearchError
from glit_models.runs.files import whole_folder
from glit_models.training import setup
from glit_models.training.results import data_name
from glit_models.weights.folder import save_folder
from glit_models.weights.publish import read_entry

from ..methods.candidates import pareto_front
from ..recipe import read_recipe_of
from ..report.findings import Network, StageFindings, read_findings
from ..spaces.latency import Prepare
from ..supernets.scoring import Evaluator
from .context import RunContext
from .kept_supernets import has_supernet

__all__ = ["Extracted", "extract_networks"]


@final
@dataclass(frozen=True)
class Extracted:
    """A network that was written as a model folder.

    Attributes:
        folder: folder of the model.
        spec: the network.
        costs: costs by name, if the search recorded them.
        accuracy: top-1 on the search set with inherited weights, in percent.
    """

    folder: Path
    spec: Spec
    costs: Mapping[str, float]
    accuracy: float


def extract_networks(
    folder: str | Path,
    out: str | Path,
    *,
    stage: str | None = None,
    place: int | None = None,
    front: str | None = None,
    spec: Any = None,
    device: str | torch.device | None = None,
    command: str | None = None,
    runtimes: Mapping[str, Prepare] | None = None,
) -> list[Extracted]:
    """Write networks of a search's supernet as model folders, with their inherited weights.

    BatchNorm statistics are recomputed on training images for each network, as for its score. Give exactly one of
    `place`, `front` and `spec`.

    Args:
        folder: folder of a search that has trained a supernet.
        out: the model folder; for a front, a folder with one model folder per network: 1, 2, ..., cheapest first.
        stage: stage whose supernet is used; None for the last trained one.
        place: place of the network among those that the stage evaluated, 1 for the best.
        front: a cost, 'macs', 'params' or 'latency_ms': write the Pareto front of fitness and this cost.
        spec: a network of the stage's space: a spec, a dict of its fields or the path of a JSON file.
        device: 'cpu', 'cuda', ...; None uses the GPU if there is one.
        command: the command line, for the models' records.
        runtimes: as in `SearchRun`.

    Raises:
        SearchError: if there is no such supernet or network, or `out` is not empty.
        SpecError: if `spec` cannot be read.
        DataError: if the data of the search is not available.
    """
    folder, out = Path(folder), Path(out)
    recipe = read_recipe_of(folder)
    if sum(choice is not None for choice in (place, front, spec)) != 1:
        raise SearchError(
            "give one of ", Argument("place", ...), ", ", Argument("front", ...), " and ", Argument("spec", ...)
        )
    findings = _pick_stage(folder, stage)
    if spec is not None:
        networks = [Network(parse_spec(spec), {})]
    else:
        networks = [_at(findings, place)] if place is not None else _front(findings, str(front))
    assert findings.space is not None
    for network in networks:
        findings.space.canonical(network.spec)  # raises if it is not a member
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise SearchError(f"{out} is there already; choose another ", Argument("out", ...))
    context = RunContext(recipe, folder, device, None, command, runtimes)
    weights = folder / findings.name / "supernet" / "model.safetensors"
    evaluator = context.evaluator(findings.space, weights, lambda done, total: None)
    writer = _Writer(context, findings, evaluator)
    if front is None:
        return [writer.write(networks[0], out, out)]
    with whole_folder(out) as temporary:
        return [
            writer.write(network, temporary / str(number), out / str(number))
            for number, network in enumerate(networks, 1)
        ]


def _pick_stage(folder: Path, name: str | None) -> StageFindings:
    """Choose a stage whose supernet is trained."""
    stages = {s.name: s for s in read_findings(folder).stages if s.space is not None and has_supernet(folder / s.name)}
    if not stages:
        raise SearchError(f"{folder} has no trained supernet to take networks from")
    if name is not None and name not in stages:
        raise SearchError(Argument("stage"), f" must have a trained supernet, as {', '.join(stages)} has; got {name!r}")
    return stages[name or list(stages)[-1]]


def _ranked(stage: StageFindings) -> list[Network]:
    """The evaluated networks, best first, the earlier of equals first."""
    scored = [network for network in stage.fully_scored() if network.fitness is not None]
    if not scored:
        raise SearchError(f"{stage.name} has no evaluated networks yet; give ", Argument("spec", ...))
    return sorted(scored, key=lambda network: -(network.fitness or 0.0))


def _at(stage: StageFindings, place: int) -> Network:
    ranked = _ranked(stage)
    if not 1 <= place <= len(ranked):
        raise SearchError(
            Argument("place"),
            f" must be from 1 to {len(ranked)}, the networks that {stage.name} evaluated, got {place}",
        )
    return ranked[place - 1]


def _front(stage: StageFindings, cost: str) -> list[Network]:
    ranked = _ranked(stage)
    if cost not in ranked[0].costs:
        raise SearchError(Argument("front"), f" must be {' or '.join(ranked[0].costs)}, got {cost!r}")
    return pareto_front(ranked, lambda network: network.fitness or 0.0, lambda network: network.costs[cost])


@final
class _Writer:
    """Writes networks of one supernet as model folders."""

    def __init__(self, context: RunContext, stage: StageFindings, evaluator: Evaluator) -> None:
        self.context, self.stage, self.evaluator = context, stage, evaluator
        self._recipe = context.supernet_recipe

    def write(self, network: Network, folder: Path, final: Path) -> Extracted:
        """Write a network. `final`: the final path of the folder."""
        context, evaluator = self.context, self.evaluator
        accuracy = evaluator.evaluate([network.spec], ["first"])[network.spec].accuracy  # the side that is written
        model = evaluator.extract(network.spec)
        source = context.command or "glit_models.search.extract_networks"
        facts = {
            "dataset": data_name(self._recipe),
            "origin": self._describe(network),
            "recipe": read_entry(context.folder / "model").get("recipe"),
            "metrics": [{
                "name": f"top-1 on {len(context.splits.validation):,} images of the search set, by which networks were "
                "compared, with inherited weights, %",
                "value": round(accuracy, 2),
                "source": source,
            }],
        }  # fmt: skip
        save_folder(
            model.cpu(), folder, class_names=context.splits.class_names,
            data_config=setup.resolve_preprocessing(model, self._recipe.data), facts=facts,
        )  # fmt: skip
        return Extracted(final, network.spec, network.costs, accuracy)

    def _describe(self, network: Network) -> str:
        """Describe the origin of the weights in a sentence."""
        stage, context, optim, splits = self.stage, self.context, self._recipe.optim, self.context.splits
        assert stage.space is not None
        name = context.folder.resolve().name
        fitness = "" if network.fitness is None else f" ({stage.measured} {stage.show(network.fitness)})"
        by = f", by `{context.command}`" if context.command else ""
        return (
            f"Weights inherited from a supernet, with no stand-alone training: a slice of the supernet of {stage.name} "
            f"of the search {name}{fitness}, which shares its weights among {stage.space.size:.4g} networks "
            f"(epochs {optim.epochs}, {len(splits.train):,} images of {len(splits.class_names)} classes). BatchNorm "
            f"statistics were recomputed for this network on training images{by}. After stand-alone training "
            "its accuracy differs"
        )
