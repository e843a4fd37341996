"""Compute cheap measures of networks, which may predict their quality after stand-alone training."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from glit_models import Spec

from ..fitness import FITNESSES, SynFlow
from ..methods.surrogate import Surrogate
from ..report.findings import read_candidates
from .stage import Stage

__all__ = ["predict"]

_MOST_FOR_SURROGATE = 200  # the last networks that the search evaluated, scored again on the images of `predict`


def predict(stage: Stage, specs: Sequence[Spec], positions: Sequence[int]) -> list[dict[str, float]]:
    """Compute the cheap measures of each network, by name; accuracy and loss are on these images."""
    measures: dict[str, Sequence[float]] = {}
    known = {network.spec: network.fitness for network in read_candidates(stage.folder) if network.fitness is not None}
    others = [spec for spec in known if spec not in set(specs)][-_MOST_FOR_SURROGATE:]
    setting = stage.setting()

    def check_stop(done: int, total: int) -> None:
        stage.context.check_stop(together=False)

    if stage.fitness_class.needs_supernet:
        evaluator = stage.context.evaluator(stage.space, stage.weights, check_stop, positions)
        setting = dataclasses.replace(setting, open_evaluator=lambda: evaluator)
        scores = evaluator.evaluate([*specs, *others])
        measures["inherited loss"] = [-scores[spec].loss for spec in specs]
        measures["inherited top-1"] = [scores[spec].accuracy for spec in specs]
        known = {spec: -scores[spec].loss for spec in others}  # the search's values were measured on all images
    if stage.fitness_class not in FITNESSES.values():
        values = stage.fitness_class(setting).evaluate(specs)
        measures[stage.fitness_class.label] = [values[spec] for spec in specs]
    if len(others) > 1:
        measures["surrogate"] = Surrogate(stage.space, others, [known[spec] for spec in others]).predict(specs)
    flows = SynFlow(setting).evaluate(specs)
    measures["SynFlow"] = [flows[spec] for spec in specs]
    for budget in stage.context.budgets:
        if budget.additive:
            measures[{"macs": "MACs", "params": "parameters"}[budget.name]] = [budget.cost(spec) for spec in specs]
    return [{name: float(values[index]) for name, values in measures.items()} for index in range(len(specs))]
