"""Measure the overhead of a search: microseconds per proposal, draw and change, and milliseconds per saved state."""

import argparse
import json
import random
import time
from collections.abc import Callable
from functools import partial

from glit_models.search import METHODS, NAMED_SPACES, Budget, BudgetSampler, Search, macs_budget

from glit_models import GLiTSpec, count_macs

from . import report

BUDGET = (1.3e9, 1.4e9)  # the paper's, in multiply-adds
EACH = ("a proposal", "an answer")  # averages over a search; its other parts happen once
CALLS = 200  # draws or changes per measurement


def main() -> None:
    """Measure and print."""
    parser = report.parser(__doc__, rounds=5)
    parser.add_argument("--space", default="glit", choices=NAMED_SPACES, help="search space, with 12 blocks")
    options = parser.parse_args()
    report.show("evolution", options, [*_search_rows(options), *_draw_rows(options)])


def _search_rows(options: argparse.Namespace) -> list[report.Row]:
    """Whole searches of SPOS's size, with a dummy accuracy that takes no time."""
    rows: list[report.Row] = []
    methods = {search.method: search for search in METHODS.values()}  # those that differ only in their stages are one
    for method, search in methods.items():
        for text, budgets in (("no budget", []), ("1.3 to 1.4 G", [macs_budget(*BUDGET)])):
            runs = [_run(search, options.space, budgets) for _ in range(options.rounds)]
            for part, unit in (
                ("a proposal", 1e6),
                ("an answer", 1e6),
                ("set-up", 1e3),
                ("state to JSON and back", 1e3),
            ):
                value = sorted(run[part] for run in runs)[len(runs) // 2] * unit
                rows.append(_row(f"{method}: {part}", text, value, "us" if unit == 1e6 else "ms"))
    return rows


def _run(method: type[Search], space_name: str, budgets: list[Budget]) -> dict[str, float]:
    """Seconds for the parts of one search."""
    space = NAMED_SPACES[space_name]()
    start = time.perf_counter()
    search = method(space, budgets, seed=0)
    seconds = {"set-up": time.perf_counter() - start, "a proposal": 0.0, "an answer": 0.0}
    rng = random.Random(0)
    while True:
        start = time.perf_counter()
        specs = search.ask()
        seconds["a proposal"] += time.perf_counter() - start
        if not specs:
            break
        answers = [(spec, rng.random()) for spec in specs]
        start = time.perf_counter()
        for spec, accuracy in answers:
            search.tell(spec, accuracy)
        seconds["an answer"] += time.perf_counter() - start
    for part in EACH:
        seconds[part] /= len(search.candidates)
    start = time.perf_counter()
    method.from_state(json.loads(json.dumps(search.state_dict())), space, budgets)
    seconds["state to JSON and back"] = time.perf_counter() - start - seconds["set-up"]
    return seconds


def _draw_rows(options: argparse.Namespace) -> list[report.Row]:
    """Single draws, changes and costs."""
    space, rng = NAMED_SPACES[options.space](), random.Random(0)
    sampler = BudgetSampler(space, [macs_budget(*BUDGET)])
    a, b = space.sample(rng), space.sample(rng)
    cases: dict[str, Callable[[], object]] = {
        "random network": lambda: space.sample(rng),
        "random network, by the budget's table": lambda: sampler.sample(rng),
        "random network, by trying": lambda: _try(partial(space.sample, rng)),
        "mutation": lambda: space.mutate(a, 0.1, rng),
        "crossover": lambda: space.crossover(a, b, rng),
        "multiply-adds of a network": lambda: count_macs(a),
    }
    within = {"random network, by the budget's table", "random network, by trying"}
    seconds = report.interleaved({name: partial(_repeat, case) for name, case in cases.items()}, options.rounds)
    return [
        _row(name, "1.3 to 1.4 G" if name in within else "no budget", value / CALLS * 1e6, "us")
        for name, value in seconds.items()
    ]


def _row(what: str, budget: str, value: float, unit: str) -> report.Row:
    return {"what": what, "budget": budget, "median": value, "unit": unit}


def _try(draw: Callable[[], GLiTSpec]) -> GLiTSpec:
    while not BUDGET[0] <= count_macs(spec := draw()) <= BUDGET[1]:
        pass
    return spec


def _repeat(function: Callable[[], object]) -> None:
    for _ in range(CALLS):
        function()


if __name__ == "__main__":
    main()
