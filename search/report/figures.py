"""Draw the figures of a search as PNG bytes; the same findings give the same bytes. Only drawing needs matplotlib.

Each figure consists of `panels`; `report` writes the captions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from glit_models import Spec
from glit_models.runs.figures import new_figure, png_bytes

from ..evidence.ranking import Ranking
from ..methods.surrogate import Surrogate
from .findings import StageFindings
from .panels import (
    fill_costs,
    fill_effects,
    fill_generations,
    fill_losses,
    fill_rank,
    fill_retrained,
    fill_times,
    pairs_of,
)

__all__ = ["draw_costs", "draw_effects", "draw_generations", "draw_losses", "draw_ranking", "draw_times"]

_STYLE = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "font.size": 9,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "text.parse_math": False,  # names are user-defined
}


def draw_generations(stages: Sequence[StageFindings]) -> bytes:
    """Fitness over the generations, one panel per stage."""
    return _drawn(lambda figure: _fill_panels(figure, stages, fill_generations), _size(stages, 3.4))


def draw_costs(
    stages: Sequence[StageFindings], cost: str, bounds: tuple[float | None, float | None], winners: Mapping[str, Spec]
) -> bytes:
    """Fitness against a cost, one panel per stage; `winners` are the winners of the stages."""

    def fill(axes: Any, stage: StageFindings) -> None:
        fill_costs(axes, stage, cost, bounds, winners.get(stage.name))

    return _drawn(lambda figure: _fill_panels(figure, stages, fill), _size(stages, 4.6))


def draw_effects(models: Sequence[tuple[StageFindings, Surrogate]]) -> bytes:
    """The contribution of each value of each gene in each block, one panel per stage."""
    heights = [1 + 0.24 * len({feature[1:] for feature in model.effects()}) for _, model in models]

    def fill(figure: Any) -> None:
        panels = figure.subplots(len(models), 1, squeeze=False, height_ratios=heights)[:, 0]
        for axes, (stage, model) in zip(panels, models, strict=True):
            fill_effects(axes, model, stage)

    return _drawn(fill, (7.5, sum(heights)))


def draw_losses(stages: Sequence[StageFindings]) -> bytes:
    """The supernets' training loss, one panel per stage."""
    return _drawn(lambda figure: _fill_panels(figure, stages, fill_losses), _size(stages, 2.8))


def draw_ranking(rank: Ranking | None, stages: Sequence[StageFindings]) -> bytes:
    """Quality after stand-alone training against its predictors; includes the retrained networks of each stage."""
    panels: list[Callable[[Any], None]] = []
    if rank:
        measures = next(iter(rank.taus.values()))
        shown = dict.fromkeys([*list(measures)[:1], *(name for name in measures if name == "MACs")])
        panels += [partial(fill_rank, rank=rank, measure=name) for name in shown]
    if any(pairs_of(stage.retrained) for stage in stages):
        panels.append(lambda axes: fill_retrained(axes, stages))

    def fill(figure: Any) -> None:
        for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            panel(axes)

    return _drawn(fill, (max(3.3 * len(panels), 4.5), 3.6))


def draw_times(times: Mapping[tuple[str, str], float]) -> bytes:
    """The duration of each part."""
    return _drawn(lambda figure: fill_times(figure.add_subplot(), times), (7.5, 0.9 + 0.34 * len(times)))


def _drawn(fill: Callable[[Any], None], size: tuple[float, float]) -> bytes:
    """The PNG of a figure drawn by `fill`, independent of the user's matplotlib settings."""

    def draw() -> Any:
        figure = new_figure("search", figsize=size)
        fill(figure)
        return figure

    return png_bytes(draw, _STYLE, "search")


def _size(stages: Sequence[StageFindings], height: float) -> tuple[float, float]:
    return (4.9 * len(stages) if len(stages) > 1 else 6.5, height)


def _fill_panels(figure: Any, stages: Sequence[StageFindings], fill: Callable[[Any, StageFindings], None]) -> None:
    """Draw one panel per stage, and a common legend below them."""
    panels = figure.subplots(1, len(stages), squeeze=False)[0]
    labelled = {}
    for axes, stage in zip(panels, stages, strict=True):
        fill(axes, stage)
        axes.set_title(stage.title)
        labelled.update({label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)})
    if labelled:
        columns = 3 if len(stages) > 1 else 2
        figure.legend(labelled.values(), labelled.keys(), loc="outside lower center", ncols=columns, fontsize=8)
