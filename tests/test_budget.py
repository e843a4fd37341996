"""Tests of budgets: exact bounds, uniform draws within narrow budgets, and errors on impossible ones."""

import random
from collections.abc import Callable

import pytest
from glit_models.search import (
    Budget,
    BudgetSampler,
    SearchSpace,
    extremes,
    glit,
    glit_released,
    macs_budget,
    params_budget,
)
from glit_models.search.spaces import budget_sampler
from spaces import AUTOFORMER, PRODUCT, SMALL_SPACES, TIED, chi_square, random_space

from glit_models import GLIT_TINY, GLiTSpec, count_macs, count_params
from glit_models.errors import SearchError


def latency(spec: GLiTSpec) -> float:
    """A cost that is no sum over blocks."""
    return 1.5 * max(count_macs(GLiTSpec((block,), spec.embed_dim, spec.num_heads, 16)) for block in spec.blocks) ** 0.5


def milliseconds(spec: GLiTSpec) -> float:
    """A cost that is a sum over blocks of numbers which are no integers."""
    return 0.1 + sum(
        1e-3 * (index + 1) * (b.mlp_ratio + (b.expand_ratio or 0.3)) for index, b in enumerate(spec.blocks)
    )


@pytest.mark.parametrize("space", [*SMALL_SPACES.values(), *(random_space(random.Random(seed)) for seed in range(3))])
@pytest.mark.parametrize("cost", [count_params, milliseconds])
def test_the_cheapest_and_the_dearest_member_are_exact(space: SearchSpace, cost: Callable[[GLiTSpec], float]) -> None:
    if space.size < 20_000:
        costs = [cost(spec) for spec in space]
        cheapest, dearest = extremes(space, cost)
        assert (cost(cheapest), cost(dearest)) == (pytest.approx(min(costs)), pytest.approx(max(costs)))
        assert cheapest in space
        assert dearest in space


def test_a_cost_that_is_called_additive_and_is_not_is_found_out() -> None:
    with pytest.raises(SearchError, match=r"^latency is not additive over blocks"):
        BudgetSampler(glit(depth=3), [Budget("latency", latency, high=1e9, additive=True)])


COSTS = {"macs": lambda spec: count_macs(spec, 64), "params": count_params, "ms": milliseconds, "latency": latency}


def budget(name: str) -> Budget:
    costs = sorted(map(COSTS[name], TIED))
    return Budget(name, COSTS[name], costs[len(costs) // 3], costs[2 * len(costs) // 3], additive=name != "latency")


@pytest.mark.parametrize("num_cells", [1 << 18, 50])  # coarse ones, too, leave the draws exact
@pytest.mark.parametrize(
    "names", [(), ("macs",), ("ms",), ("latency",), ("macs", "params"), ("ms", "macs"), ("params", "latency")], ids=str
)
@pytest.mark.parametrize("uniform_over", ["members", "choices"])
def test_draws_within_budgets_are_uniform(
    names: tuple[str, ...], uniform_over: str, num_cells: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budget_sampler, "_NUM_CELLS", num_cells)
    budgets = [budget(name) for name in names]
    within = [spec for spec in TIED if all(b.admits(b.cost(spec)) for b in budgets)]
    sampler = BudgetSampler(TIED, budgets, uniform_over)
    rng = random.Random(0)
    assert abs(chi_square(lambda: sampler.sample(rng)[0], dict.fromkeys(within, 1), 10 * len(within))) < 3


def test_draws_within_a_budget_follow_the_choices_where_options_merge() -> None:
    costs = sorted(map(count_params, PRODUCT))
    high = costs[len(costs) // 2]
    weights = {}
    for spec in PRODUCT:
        if count_params(spec) <= high:
            first, second = (PRODUCT.counts(i)[PRODUCT.options(i).index(spec.blocks[i])] for i in range(2))
            weights[spec] = first * second
    sampler, rng = BudgetSampler(PRODUCT, [params_budget(high=high)]), random.Random(0)
    assert len(set(weights.values())) > 1
    assert abs(chi_square(lambda: sampler.sample(rng)[0], weights, 30 * len(weights))) < 3


@pytest.mark.parametrize("num_cells", [1 << 18, 200])
@pytest.mark.parametrize("uniform_over", ["members", "choices"])
def test_draws_are_uniform_over_networks_of_several_widths_and_depths(
    uniform_over: str, num_cells: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budget_sampler, "_NUM_CELLS", num_cells)
    costs = sorted(map(count_params, AUTOFORMER))
    budget = params_budget(costs[len(costs) // 4], costs[3 * len(costs) // 4])
    within = [spec for spec in AUTOFORMER if budget.admits(count_params(spec))]
    weights = {spec: 1.0 if uniform_over == "members" else 4.0 ** (3 - spec.depth) for spec in within}
    assert len({(spec.embed_dim, spec.depth) for spec in within}) > 2
    sampler, rng = BudgetSampler(AUTOFORMER, [budget], uniform_over), random.Random(0)
    assert abs(chi_square(lambda: sampler.sample(rng)[0], weights, 3000)) < 3


def test_costs_come_with_the_draw_in_the_order_of_the_budgets() -> None:
    budgets = [Budget("latency", latency), macs_budget(high=2e9), Budget("params", count_params)]
    spec, costs = BudgetSampler(glit(), budgets).sample(random.Random(0))
    assert list(costs.items()) == [
        ("latency", latency(spec)), ("macs", count_macs(spec)), ("params", count_params(spec))
    ]  # fmt: skip


def test_a_budget_that_only_few_networks_meet_is_met_at_once() -> None:
    exact = count_macs(GLIT_TINY)
    for space in (glit(), glit_released()):
        sampler = BudgetSampler(space, [macs_budget(exact, exact)], max_draws=1)
        rng = random.Random(0)
        drawn = {sampler.sample(rng)[0] for _ in range(5)}
        assert len(drawn) == 5
        assert {count_macs(spec) for spec in drawn} == {exact}
        assert all(spec in space for spec in drawn)


@pytest.mark.parametrize(
    ("budgets", "message"),
    [
        ([macs_budget(1, 2)],
         "no member of the space has macs from 1 to 2 (546,374,400 to 2,202,309,120 is reachable)"),
        ([macs_budget(3e9)],
         "no member of the space has macs of at least 3,000,000,000 "
         "(546,374,400 to 2,202,309,120 is reachable)"),
        # Between two costs that can be reached there is a gap, and nothing is in it.
        ([macs_budget(1_472_873_281, 1_472_873_282)],
         "no member of the space has macs from 1,472,873,281 to 1,472,873,282 "
         "(546,374,400 to 2,202,309,120 is reachable)"),
        ([macs_budget(high=6e8), params_budget(1e7)],
         "no member of the space has macs of at most 600,000,000 (546,374,400 to 2,202,309,120 is reachable) and "
         "params of at least 10,000,000 (2,726,824 to 11,484,328 is reachable)"),
    ],
)  # fmt: skip
def test_an_impossible_budget_says_what_can_be_reached(budgets: list[Budget], message: str) -> None:
    with pytest.raises(SearchError) as error:
        BudgetSampler(glit(), budgets)
    assert str(error.value) == message


def test_a_measured_budget_that_nothing_meets_ends_after_its_draws_and_says_what_was_seen() -> None:
    calls = []
    sampler = BudgetSampler(
        glit(), [Budget("ms", lambda spec: calls.append(spec) or latency(spec), high=1)], max_draws=30
    )
    with pytest.raises(SearchError, match=r"^30 draws found no member of the space that has ms of at most 1 \(.* seen"):
        sampler.sample(random.Random(0))
    assert len(calls) == 30


def test_a_measured_cost_is_asked_only_of_networks_that_meet_the_others() -> None:
    asked = []
    sampler = BudgetSampler(
        TIED, [Budget("ms", lambda spec: asked.append(spec) or latency(spec)), macs_budget(high=1.8e7)]
    )
    for spec in TIED:
        sampler.within(spec)
    assert 0 < len(asked) == sum(count_macs(spec) <= 1.8e7 for spec in TIED) < TIED.size


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: macs_budget(2, 1), "budget macs.low must be at most high=1, got 2"),
        (lambda: macs_budget(high=float("nan")), "budget macs.high must be a finite number or null, got nan"),
        (lambda: macs_budget(low="1 G"), "budget macs.low must be a finite number or null, got '1 G'"),
        (lambda: BudgetSampler(PRODUCT, [macs_budget(), macs_budget()]), "budgets must have names of their own, "
                                                                         "got macs, macs"),
    ],
)  # fmt: skip
def test_a_budget_that_makes_no_sense_is_named(make: Callable[[], object], message: str) -> None:
    with pytest.raises(SearchError) as error:
        make()
    assert str(error.value) == message
