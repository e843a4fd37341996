"""Write the report of a search: a stand-alone HTML page, and its figures as files next to it.

It describes in words what the figures show. The same folder gives the same bytes; for a search in progress, the report
contains the results so far.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from glit_models import Spec
from glit_models.evaluate import is_tie
from glit_models.figure import network_png
from glit_models.page import Page
from glit_models.runs.console import show_seconds

from ..methods.evolution import METHODS
from . import figures
from .findings import COSTS, Findings, Network, StageFindings, read_findings
from .panels import show_accuracy, show_count
from .reliability import write_control, write_effects, write_ranking

__all__ = ["write_report"]

_INTRODUCTION = (
    "This search looked for the network of a space that classifies images best within a budget of computation. "
    "Candidates are compared by a cheap measure, such as their accuracy under the weights of a supernet, which holds "
    "the weights of all of them and is trained once. The best get a stand-alone training, and the best of these wins."
)
_WORDS = {
    "inherited": "measured with the supernet's weights, on the search set: cheap, and only good for comparing",
    "stand-alone accuracy": "of a network after stand-alone training, on the search set",
    "88.0 % (87.3 to 88.6)": "an accuracy and its 95 % interval, as if the images had been drawn at random; another "
    "training of the same network would differ, too",
    "a tie": "two networks whose difference is within its 95 % interval around 0",
    "search set": "images that were held out of the training set for the search",
    "test set": "images that no decision has seen; only the winner and its control are scored on them",
    "MACs": "multiply-adds that one image takes, a measure of computation",
    "Kendall's tau": "how far two orders agree: 1 the same, 0 unrelated, -1 opposite; in brackets the 95 % interval of "
    "a bootstrap over networks",
    "best of its first five": "how far the best of the five networks that a measure puts first is behind the best of "
    "all",
}


def write_report(folder: Path) -> Path:
    """Write `report/index.html` into a search's folder, with its figures next to it; return its path.

    Raises:
        SearchError: if the folder is not a search folder, a file in it is damaged (names it), or writing fails.
    """
    findings = read_findings(folder)
    page = Page(folder / "report")
    _write_result(page, findings)
    _write_winner(page, findings)
    _write_evolution(page, findings)
    write_effects(page, findings)
    write_ranking(page, findings)
    write_control(page, findings)
    _write_retrained(page, findings)
    _write_effort(page, findings)
    return page.save(f"Search: {findings.method}, seed {findings.seed}")


def _write_result(page: Page, findings: Findings) -> None:
    page.text(_INTRODUCTION)
    known = METHODS.get(findings.method)
    page.text(known.description if known and known.description else f"Method: {findings.method}.")
    page.text(f"Candidates are compared by: {findings.measure.label}.")
    page.words(_WORDS)
    page.heading("The result in numbers")
    rows = {"budget": "; ".join(_show_bounds(*item) for item in findings.budget.items()) or "none"}
    rows["sharing of weights"] = findings.sharing
    if findings.start is not None:
        rows["supernet started from"] = findings.start
    if findings.inherits:
        rows["stand-alone trainings started from"] = "the supernet's weights, the control's too"
    result = findings.result
    forms = {
        "macs": ("winner's MACs", show_count),
        "params": ("winner's parameters", show_count),
        "search_accuracy": (
            "winner, stand-alone, on the search set",
            lambda accuracy: show_accuracy(accuracy, int(result.get("search_images", 0))),
        ),
        "test_accuracy": (
            "winner, stand-alone, on the test set",
            lambda accuracy: show_accuracy(accuracy, int(result.get("test_images", 0))),
        ),
        "num_evaluated": ("candidates evaluated", "{:,.0f}".format),
        "minutes": ("time", lambda minutes: show_seconds(60 * minutes)),
    }
    rows |= {name: show(result[key]) for key, (name, show) in forms.items() if key in result}
    page.table([{"": name, "value": value} for name, value in rows.items()])
    if not result:
        page.missing("the final result (result.json); the search is under way.")
    page.table([_describe_stage(stage) for stage in findings.stages])


def _describe_stage(stage: StageFindings) -> dict[str, str]:
    origins = Counter(candidate.origin for candidate in stage.candidates if candidate.origin)
    best_trained = stage.retrained[0] if stage.retrained else None
    best = max((c.fitness for c in stage.fully_scored() if c.fitness is not None), default=None)
    return {
        "stage": stage.title,
        "networks in the space": "-" if stage.space is None else f"{stage.space.size:.3g}",
        "evaluated": f"{len(stage.candidates):,}",
        "of these": ", ".join(f"{number} {origin}" for origin, number in origins.most_common()) or "-",
        f"best {stage.measured}": stage.show(best),
        "best stand-alone": "-"
        if best_trained is None
        else show_accuracy(best_trained.accuracy, best_trained.num_images),
    }


def _write_winner(page: Page, findings: Findings) -> None:
    page.heading("The network, block by block")
    spec, what = _best_network(findings)
    if findings.winner is None:
        page.missing(f"the winner (winner.json).{f' Drawn is {what}.' if spec else ''}")
    if spec is not None:
        page.figure(
            "network",
            network_png(spec),
            f"Each column is a block of {what}, drawn from the first to the last. Above are the parts that mix tokens, "
            "each as high as its share of the channels; below is the feed-forward network, as high as it is wide.",
        )


def _best_network(findings: Findings) -> tuple[Spec | None, str]:
    """The winner, or the best network so far."""
    if findings.winner is not None:
        return findings.winner, "the winner"
    for stage in reversed(findings.stages):
        if stage.winner is not None:
            return stage.winner, f"the winner of {stage.name}"
        if scored := [c for c in stage.fully_scored() if c.fitness is not None]:
            return max(scored, key=lambda c: c.fitness or 0).spec, f"the best candidate of {stage.name} so far"
    return None, ""


def _write_evolution(page: Page, findings: Findings) -> None:
    page.heading("How the search went")
    begun = [stage for stage in findings.stages if any(c.fitness is not None for c in stage.candidates)]
    for stage in findings.stages:
        if stage not in begun:
            page.missing(f"{stage.name}'s candidates ({stage.name}/candidates.jsonl).")
    if not begun:
        return
    page.figure(
        "generations",
        figures.draw_generations(begun),
        _describe_generations(begun),
    )
    costs = ["macs", *(cost for cost in COSTS[1:] if cost in findings.budget)]
    winners = {stage.name: stage.winner for stage in begun if stage.winner is not None}
    for cost in costs:
        stages = [stage for stage in begun if any(cost in candidate.costs for candidate in stage.candidates)]
        if stages:
            bounds = findings.budget.get(cost, (None, None))
            page.figure(f"accuracy-{cost}", figures.draw_costs(stages, cost, bounds, winners), _COSTS_CAPTION)
    for stage in begun:
        if stage.references:
            page.text(f"{stage.title}, networks for comparison:")
            page.table(
                [{"network": n.name, **_costs(n), stage.measured: stage.show(n.fitness)} for n in stage.references]
            )


_BRED = (
    "Each generation is bred from the best networks before it. Where its median rises, the search has learnt which "
    "choices are good; where the best stays level, more generations would hardly help. "
)
_DRAWN = "Each generation is drawn at random, so its median stays level; the best rises with luck alone."


def _describe_generations(stages: Sequence[StageFindings]) -> str:
    if all(candidate.origin in ("initial", "random") for stage in stages for candidate in stage.candidates):
        return _DRAWN
    several = "Each stage has a separate supernet: compare accuracies within a panel only."
    return f"{_BRED}{several if len(stages) > 1 else ''}"


_COSTS_CAPTION = (
    "Each point is a candidate, the darker the later; up is better, left is cheaper. The line joins those that none "
    "beats at the same cost or less, the green band is the budget, and networks for comparison are red (a line, where "
    "only the cost is known). A star wins its stage: it is the best after stand-alone training and need not be on "
    "top here. Of those that were stopped early the accuracy is estimated on a part of the search set."
)


def _write_retrained(page: Page, findings: Findings) -> None:
    page.heading("Stand-alone networks")
    known = METHODS.get(findings.method)
    if known is not None and known.seeks_front:
        page.text("These are spread along the front of all candidates: a family, from accurate networks to cheap ones.")
    for stage in findings.stages:
        if not stage.retrained:
            page.missing(f"{stage.name}'s retrained networks ({stage.name}/retrained.json).")
            continue
        page.text(f"{stage.title}. Best first; of each block the channels of the parts that mix tokens.")
        page.table([_describe_retrained(stage, place, network) for place, network in enumerate(stage.retrained, 1)])


def _describe_retrained(stage: StageFindings, place: int, network: Network) -> dict[str, str]:
    return {
        "": str(place),
        **_costs(network),
        stage.measured: stage.show(network.fitness),
        "stand-alone": show_accuracy(network.accuracy, network.num_images),
        **({"beside the best": "" if place == 1 else _beside_the_best(stage, network)} if network.num_images else {}),
        "channels that each part of the blocks mixes": " ".join(
            "+".join(str(part.channels) for part in network.spec.block_parts(index).mixers) or "-"
            for index in range(network.spec.depth)
        ),
    }


def _beside_the_best(stage: StageFindings, network: Network) -> str:
    best, other = stage.retrained[0].accuracy, network.accuracy
    tie = best is None or other is None or is_tie(best, other, network.num_images)
    return "a tie" if tie else "worse"


def _write_effort(page: Page, findings: Findings) -> None:
    page.heading("What it took")
    if stages := [stage for stage in findings.stages if stage.losses]:
        page.figure(
            "supernet",
            figures.draw_losses(stages),
            "The supernet's loss while it trains. Each step trains another path through it, so the curve is rough; it "
            "should have come to rest before candidates are compared.",
        )
    else:
        page.missing("the supernet's curve (supernet/metrics.jsonl).")
    if findings.times:
        page.figure(
            "times",
            figures.draw_times(findings.times),
            "Time by part: training the supernet, evaluating candidates, stand-alone training of the best, training "
            "the winner and its control, and scoring on the test set; "
            f"{show_seconds(sum(findings.times.values()))} in all.",
        )
    else:
        page.missing("the times (times.json).")
    files = [file for stage in findings.stages for file in stage.missing]
    if files:
        page.missing(f"{', '.join(files)}.")


def _show_bounds(name: str, bounds: tuple[float | None, float | None]) -> str:
    def show(bound: float | None) -> str:
        return "" if bound is None else f"{bound:g}" if name == "latency_ms" else show_count(bound)

    low, high = map(show, bounds)
    name = {"macs": "MACs", "params": "parameters", "latency_ms": "latency in ms"}.get(name, name)
    return f"{name} {f'from {low} to {high}' if low and high else f'at least {low}' if low else f'at most {high}'}"


def _costs(network: Network) -> dict[str, str]:
    costs = network.costs
    shown = {"MACs": show_count(costs["macs"]), "parameters": show_count(costs["params"])}
    return {**shown, "latency, ms": f"{costs['latency_ms']:.3g}"} if "latency_ms" in costs else shown
