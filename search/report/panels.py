"""Draw the panels of a search's figures: functions that fill matplotlib's axes, and number formats.

`figures` combines panels and writes the files.
"""

from __future__ import annotations

import itertools
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from glit_models import Spec
from glit_models.evaluate import accuracy_interval
from glit_models.runs.console import show_seconds

from ..evidence.correlation import Correlation
from ..evidence.ranking import Ranked, Ranking
from ..methods.candidates import pareto_front
from ..methods.surrogate import Surrogate
from .findings import Network, StageFindings

__all__ = [
    "fill_costs",
    "fill_effects",
    "fill_generations",
    "fill_losses",
    "fill_rank",
    "fill_retrained",
    "fill_times",
    "pairs_of",
    "show_accuracy",
    "show_correlation",
    "show_count",
]

_GLOBAL, _LOCAL, _OTHER = "#2f6db5", "#e8833a", "#7a7f87"
_REFERENCE, _WINNER, _PALE, _BUDGET = "#c8283c", "#ffd23f", "#b8bcc2", "#8fce8f"
_PARTS = {"supernet": "#2a9d8f", "evolution": "#8e5aa8", "retrain": "#d1a126"}
_MOST_POINTS = 300  # maximum points of a curve; more are averaged
_LONGEST_NAME = 30


def show_count(value: float) -> str:
    """Format a count with four digits: 1.473 G, 38.24 M, 950 k."""
    factor, unit = _unit(value)
    return f"{value / factor:.4g} {unit}".rstrip()


def show_accuracy(accuracy: float | None, num_images: int = 0) -> str:
    """Format an accuracy in percent, with its interval if the number of images is known."""
    if accuracy is None or not num_images:
        return "-" if accuracy is None else f"{accuracy:.2f} %"
    low, high = accuracy_interval(accuracy, num_images)
    return f"{accuracy:.2f} % ({low:.1f} to {high:.1f})"


def show_correlation(correlation: Correlation) -> str:
    """Format a correlation with its interval."""
    return f"{correlation.value:.2f} ({correlation.low:.2f} to {correlation.high:.2f})".replace("-", "\N{MINUS SIGN}")


def fill_generations(axes: Any, stage: StageFindings) -> None:
    colour = _PARTS["evolution"]
    full = {id(candidate) for candidate in stage.fully_scored()}
    generations = itertools.groupby(
        sorted(stage.candidates, key=lambda candidate: candidate.generation), key=lambda candidate: candidate.generation
    )
    rows, best = [], float("-inf")
    for generation, members in generations:
        scored = [(c.fitness, id(c) in full) for c in members if c.fitness is not None]
        if scored:
            own = max((accuracy for accuracy, is_full in scored if is_full), default=float("nan"))
            best = max(best, own) if own == own else best
            accuracies = sorted(accuracy for accuracy, _ in scored)
            quarter = len(accuracies) // 4
            middle = statistics.median(accuracies)
            rows.append((generation, best, own, middle, accuracies[quarter], accuracies[-1 - quarter]))
    if not rows:
        return
    x, best_so_far, own_best, medians, low, high = zip(*rows, strict=True)
    axes.plot(x, best_so_far, color=colour, linewidth=2.2, label="best so far", drawstyle="steps-post")
    axes.plot(x, own_best, "o", color=colour, markersize=4, label="best of the generation")
    axes.plot(x, medians, "--", color=_OTHER, label="median of the generation", marker="." if len(x) == 1 else None)
    axes.fill_between(x, low, high, color=_OTHER, alpha=0.18, linewidth=0, label="middle half of the generation")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(xlabel="generation", ylabel=stage.measure.label)


def fill_costs(
    axes: Any, stage: StageFindings, cost: str, bounds: tuple[float | None, float | None], winner: Spec | None
) -> None:
    factor, label = _cost_axis(cost, [*stage.candidates, *stage.references])
    full = {id(candidate) for candidate in stage.fully_scored()}
    scored = [c for c in stage.candidates if c.fitness is not None and cost in c.costs]
    partly = [c for c in scored if id(c) not in full]
    scored = [c for c in scored if id(c) in full]

    def at(networks: Sequence[Network]) -> tuple[list[float], list[float | None]]:
        return [n.costs[cost] / factor for n in networks], [n.fitness for n in networks]

    if partly:
        axes.scatter(*at(partly), s=9, facecolors="none", edgecolors=_PALE, linewidths=0.7, label="stopped early")
    if scored:
        _scatter_by_generation(axes, scored, *at(scored))
    front = pareto_front(scored, lambda network: network.fitness or 0, lambda network: network.costs[cost])
    axes.plot(*at(front), color="black", linewidth=1.2, drawstyle="steps-post", label="Pareto front")
    for candidate in (c for c in scored if c.spec == winner):
        axes.plot(*at([candidate]), "*", color=_WINNER, markersize=15, markeredgecolor="black", label="winner")
    _mark_references(axes, [n for n in stage.references if cost in n.costs], at)
    _mark_budget(axes, bounds, factor)
    axes.set(xlabel=label, ylabel=stage.measure.label)


def fill_effects(axes: Any, model: Surrogate, stage: StageFindings) -> None:
    """Rows: the values of each gene that varies; columns: the whole network and its blocks."""
    effects = model.effects()
    values: dict[tuple[Any, str], list[Any]] = {}
    for place, gene, value in effects:
        values.setdefault((place, gene), []).append(value)
    varied = {key for key, found in values.items() if len(found) > 1}
    rows = sorted({(gene, value) for place, gene, value in effects if (place, gene) in varied})
    columns = sorted({place for place, _ in varied}, key=lambda place: (isinstance(place, int), place))
    table = [[effects.get((place, *row), float("nan")) for place in columns] for row in rows]
    most = max((abs(value) for line in table for value in line if value == value), default=1) or 1
    image = axes.imshow(table, cmap="RdBu", vmin=-most, vmax=most, aspect="auto")
    axes.figure.colorbar(image, ax=axes, pad=0.02).set_label(stage.measure.label, size=8)
    axes.set_yticks(range(len(rows)), [f"{gene} {value}" for gene, value in rows], fontsize=7)
    axes.set_xticks(range(len(columns)), [place + 1 if isinstance(place, int) else place for place in columns])
    axes.grid(False)
    axes.set(xlabel="block", title=stage.title)


def _scatter_by_generation(axes: Any, candidates: Sequence[Network], x: Sequence[float], y: Sequence[Any]) -> None:
    generations = [candidate.generation for candidate in candidates]
    shades = {"c": generations, "cmap": _colours(), "vmin": 0, "vmax": max(*generations, 1)}
    points = axes.scatter(x, y, s=13, linewidths=0, label="candidate", **shades)
    bar = axes.figure.colorbar(points, ax=axes, pad=0.02, aspect=30)
    bar.set_label("generation", size=8)
    bar.outline.set_visible(False)
    bar.locator.set_params(integer=True)
    bar.update_ticks()


def _mark_budget(axes: Any, bounds: tuple[float | None, float | None], factor: float) -> None:
    """A band from one bound to the other; without a bound, it extends to the limit of the axes."""
    if bounds == (None, None):
        return
    left, right = axes.get_xlim()
    low, high = ((None if bound is None else bound / factor) for bound in bounds)
    left, right = (
        min(left, low if low is not None else left, high if high is not None else left),
        max(right, low if low is not None else right, high if high is not None else right),
    )
    low, high = left if low is None else low, right if high is None else high
    axes.axvspan(low, high, color=_BUDGET, alpha=0.25, linewidth=0, label="budget")
    axes.set_xlim(left, right)


def _mark_references(axes: Any, references: Sequence[Network], at: Callable[[Sequence[Network]], Any]) -> None:
    """Mark references, grouped by name without the number; those without a fitness are drawn as a line."""
    groups: dict[str, list[Network]] = {}
    for network in references:
        groups.setdefault(re.sub(r"[\s#_-]*\d+$", "", network.name) or network.name, []).append(network)
    for (name, networks), marker in zip(groups.items(), itertools.cycle("DsPXv^"), strict=False):
        scored = [network for network in networks if network.fitness is not None]
        if scored:
            style = {"markersize": 6, "color": _REFERENCE, "markeredgecolor": "white", "zorder": 4}
            axes.plot(*at(scored), marker, label=_short(name), **style)
    unscored = {name: without for name, group in groups.items() if (without := [n for n in group if n.fitness is None])}
    styles = itertools.cycle(["--", ":", "-."])
    for (name, networks), line in zip(unscored.items(), styles, strict=False):
        labels = itertools.chain([f"{_short(name)} (cost only)"], itertools.repeat(""))
        for place, label in zip(at(networks)[0], labels, strict=False):
            axes.axvline(place, color=_REFERENCE, linestyle=line, linewidth=1.2, label=label)


def fill_losses(axes: Any, stage: StageFindings) -> None:
    step = -(-len(stage.losses) // _MOST_POINTS)
    parts = [stage.losses[start : start + step] for start in range(0, len(stage.losses), step)]
    steps = [part[-1][0] for part in parts]
    losses = [statistics.fmean(loss for _, loss in part) for part in parts]
    axes.plot(steps, losses, color=_PARTS["supernet"], linewidth=1.2, marker="." if len(steps) == 1 else None)
    axes.set(xlabel="training step", ylabel="training loss")


def fill_rank(axes: Any, rank: Ranking, measure: str) -> None:
    """Quality after training against a cheap measure; bars show the standard deviation between seeds."""
    truth, taus = next(iter(rank.taus.items()))
    trained = [network.trained[truth] for network in rank.networks]
    factor, label = _cost_axis("macs", rank.networks) if measure == "MACs" else (1, measure)
    places = [network.predictions[measure] / factor for network in rank.networks]
    style = {"color": _OTHER, "fmt": "s"} if measure == "MACs" else {"color": _GLOBAL, "fmt": "o"}
    axes.errorbar(places, trained, yerr=rank.noise(truth), alpha=0.75, elinewidth=0.8, **style)
    axes.set_title(f"{rank.stage}: by {measure}\ntau = {show_correlation(taus[measure])}")
    axes.set(
        xlabel=label, ylabel={"loss": "negative loss after training", "top-1": "accuracy after training, %"}[truth]
    )
    axes.locator_params(axis="x", nbins=5)


def fill_retrained(axes: Any, stages: Sequence[StageFindings]) -> None:
    """Stand-alone accuracy against the search's fitness, for each stage's retrained networks."""
    shades = ["#d9b44a", "#7d5a0a"] if len(stages) > 1 else ["#7d5a0a"]
    for stage, shade in zip(stages, shades, strict=True):
        if pairs := pairs_of(stage.retrained):
            best = max(pairs, key=lambda pair: pair[1])
            axes.plot(*zip(*pairs, strict=True), "o", color=shade, label=stage.title.partition(":")[0])
            axes.plot(*best, "*", color=shade, markersize=15, markeredgecolor="black")
    axes.set_title("Each stage's best candidates\n(star: the stage's winner)")
    axes.set(xlabel=stages[0].measure.label, ylabel="stand-alone accuracy, %")
    axes.locator_params(axis="x", nbins=5)
    if len(handles := axes.get_legend_handles_labels()[0]) > 1:  # outside: inside it looks like two more networks
        axes.figure.legend(handles=handles, loc="outside lower right", ncols=2, fontsize=8)


def fill_times(axes: Any, times: Mapping[tuple[str, str], float]) -> None:
    names = [" · ".join(filter(None, key)) for key in times]
    factor, unit = (3600, "hours") if max(times.values()) >= 7200 else (60, "minutes")
    bars = axes.barh(
        names, [seconds / factor for seconds in times.values()], color=[_PARTS.get(part, _OTHER) for _, part in times]
    )
    axes.bar_label(bars, [show_seconds(seconds) for seconds in times.values()], padding=4, fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.grid(False, axis="y")
    axes.set_xlabel(unit)


def pairs_of(networks: Sequence[Network]) -> list[tuple[float, float]]:
    """(fitness, accuracy in percent after stand-alone training) of networks that have both."""
    return [(n.fitness, n.accuracy) for n in networks if n.fitness is not None and n.accuracy is not None]


def _cost_axis(cost: str, networks: Iterable[Network | Ranked]) -> tuple[float, str]:
    """The divisor of a cost, and the label of its axis."""
    if cost == "latency_ms":
        return 1, "latency, ms"
    factor, unit = _unit(max((network.costs[cost] for network in networks), default=1))
    name = {"macs": "multiply-adds (MACs) of an image", "params": "parameters"}[cost]
    return factor, f"{name}, {unit}" if unit else name


def _unit(value: float) -> tuple[float, str]:
    return next(((factor, unit) for factor, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")) if value >= factor), (1, ""))


def _colours() -> Any:
    """A colour map from light to dark, without the lightest colours."""
    import matplotlib
    from matplotlib.colors import ListedColormap

    return ListedColormap(matplotlib.colormaps["YlGnBu"]([0.22 + 0.78 * step / 63 for step in range(64)]))


def _short(name: str) -> str:
    """A name for the legend, without leading underscores, which would hide it."""
    name = name.lstrip("_")
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}…"
