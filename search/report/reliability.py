"""Write the parts of a search's report that show its reliability: effects of choices, ranking and control."""

from __future__ import annotations

from glit_models.evaluate import is_tie
from glit_models.page import Page

from ..evidence.control import Control
from ..evidence.ranking import Ranking
from ..methods.surrogate import Surrogate
from . import figures
from .findings import Findings, StageFindings
from .panels import show_accuracy, show_correlation

__all__ = ["write_control", "write_effects", "write_ranking"]

_FEWEST = 20  # minimum number of networks for estimating effects


def write_effects(page: Page, findings: Findings) -> None:
    """Write the contribution of each choice in each block, from a linear model of the candidates."""
    page.heading("What the choices are worth")
    models = [(stage, model) for stage in findings.stages if (model := _fit(stage)) is not None]
    if not models:
        page.text(f"Too few candidates to tell; it takes {_FEWEST}.")
        return
    page.figure("effects", figures.draw_effects(models), _EFFECTS.format(models[0][0].measured))


_EFFECTS = (
    "What each value of each choice adds to the {} of a network, block by block, by a linear model of all candidates "
    "(ridge regression). Blue adds, red takes away; empty is what no candidate had. The search chose these "
    "candidates, so they are not a random sample. Larger choices cost more, and part of an effect may be due to size."
)


def _fit(stage: StageFindings) -> Surrogate | None:
    scored = [candidate for candidate in stage.fully_scored() if candidate.fitness is not None]
    if stage.space is None or len(scored) < _FEWEST:
        return None
    return Surrogate(stage.space, [c.spec for c in scored], [c.fitness or 0.0 for c in scored])


def write_control(page: Page, findings: Findings) -> None:
    """Write the comparison of the winner with random networks that had the same training."""
    page.heading("Does the search beat chance?")
    control = findings.control
    if control is None:
        page.missing("random networks, trained as the winner was (control.json; control.networks of the recipe).")
        return
    number, beaten, images = len(control.networks), control.num_beaten, control.num_images
    ties = sum(is_tie(control.winner, accuracy, images) for _, accuracy in control.networks)
    page.text(
        f"Random networks within the same budget had the same training as the winner. On the {control.split} set the "
        f"winner is better than {beaten} of {number}; {ties} of these {number} comparisons count as a tie. "
        + (_BIASED if control.split == "search" else _BY_CHANCE.format(number=number, searches=number + 1))
    )
    named = [("winner", control.winner), *((f"random {place}", a) for place, (_, a) in enumerate(control.networks, 1))]
    page.table([{"network": name, "accuracy": show_accuracy(accuracy, images)} for name, accuracy in named])
    if control.starts:
        _write_starts(page, control)


_BY_CHANCE = (
    "By chance alone the winner would beat all of {number} in one of {searches} searches: more random networks "
    "(control.networks) make a stronger case."
)
_BIASED = (
    "The winner was chosen from several retrained networks on these same images, which favours it: only a test set "
    "(train.data.test_split) can show that the search beats chance."
)


def _write_starts(page: Page, control: Control) -> None:
    """Write what the weights that the search started from were worth."""
    page.heading("What was the start worth?")
    page.text(
        "These had the same training as the winner, from other weights. If the winner from random weights is as good, "
        "inherited weights gained nothing; if the network that the search started from is as good after this "
        "training alone, the search gained nothing. The search's own training, of the supernet, comes on top."
    )
    images = control.num_images
    rows = [{"network": "winner", "accuracy": show_accuracy(control.winner, images), "the winner is": ""}]
    for name, _, accuracy in control.starts:
        better = "better" if control.winner > accuracy else "worse"
        verdict = "a tie" if is_tie(control.winner, accuracy, images) else better
        gain = f"{verdict} ({control.winner - accuracy:+.2f} points)"
        rows.append({"network": name, "accuracy": show_accuracy(accuracy, images), "the winner is": gain})
    page.table(rows)


def write_ranking(page: Page, findings: Findings) -> None:
    page.heading("Does the supernet order networks rightly?")
    if not findings.ranks:
        page.missing("stand-alone networks of all qualities, to judge the supernet (rank.json).")
    if not findings.ranks and any(n.fitness is not None for stage in findings.stages for n in stage.retrained):
        page.figure("ranking", figures.draw_ranking(None, findings.stages), f"{_RANKING} {_BEST_ONLY}")
    for number, rank in enumerate(findings.ranks):
        if not any(rank.taus.values()):
            page.text(f"No measure tells the networks of {rank.stage} apart.")
            continue
        stages = () if number else findings.stages
        name = f"ranking-{number + 1}" if number else "ranking"
        page.figure(name, figures.draw_ranking(rank, stages), f"{_RANKING} {_describe_ranking(rank)}")
        page.table(_ranking_rows(rank))


_RANKING = (
    "Each point is a network that had a stand-alone training; the further points follow a rising line, the better the "
    "cheap measure below predicts the expensive one at the side."
)
_BEST_ONLY = "These are each stage's best, which are close together and the hardest to order."


def _describe_ranking(rank: Ranking) -> str:
    truth, taus = next(iter(rank.taus.items()))
    name, tau = next(iter(taus.items()))
    text = (
        f"Of two networks, {rank.stage}'s {name} names the better one in about {50 * (1 + tau.value):.0f} of 100 cases"
    )
    if "MACs" in taus:
        text += f"; whoever takes the one with more MACs is right in about {50 * (1 + taus['MACs'].value):.0f}"
    text += ". The search pays where the first number is clearly the larger."
    if truth in rank.ceilings:
        ceiling = rank.ceilings[truth]
        text += (
            f" Two trainings of one network differ, too: even a measure without any error would have a tau of about "
            f"{ceiling.value:.2f} ({ceiling.low:.2f} to {ceiling.high:.2f}) here."
        )
    return text


def _ranking_rows(rank: Ranking) -> list[dict[str, str]]:
    names = dict.fromkeys(name for taus in rank.taus.values() for name in taus)
    rows = [{"order by": name} for name in names] + ([{"order by": "a measure without error"}] if rank.ceilings else [])
    for truth, taus in rank.taus.items():
        for row in rows:
            tau = taus.get(row["order by"], rank.ceilings.get(truth) if row["order by"] not in names else None)
            row[f"tau with {truth} after training"] = "-" if tau is None else show_correlation(tau)
            regret = rank.regrets[truth].get(row["order by"])
            row[f"best of its first five, {truth}"] = "-" if regret is None else f"{0.0 - regret:+.3g}"
    return rows
