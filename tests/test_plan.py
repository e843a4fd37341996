"""Tests of `glit search plan`: costs by brute force, minutes computed by hand, warnings, and no files written."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from glit_models.search import SearchPlan, SearchSpace, plan_search
from glit_models.search.run.plan import _rarest_value
from glit_models.search.run.trial import NetworkSpeed, SupernetSpeed
from search_folders import RECIPE, SHORT, short_recipe

from glit_models import cli, count_macs, count_params
from tests.spaces import AUTOFORMER, PRODUCT

SETTINGS = [word for text in SHORT for word in ("--set", text)]


@pytest.fixture
def speeds(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of a network takes 1 s, of a supernet 2 s, ..."""
    monkeypatch.setattr("glit_models.search.run.plan.time_network", lambda *_: NetworkSpeed(1.0, 0.01))
    monkeypatch.setattr("glit_models.search.run.plan.time_supernet", lambda *_: SupernetSpeed(2.0, 0.5, 0.1, 0.05))


def _plan(*overrides: str) -> SearchPlan:
    return plan_search(short_recipe(*overrides), "cpu")


def test_the_command_times_real_steps_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("glit_models.search.run.trial._STEPS", 3)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["search", "plan", RECIPE, "--json", "--device", "cpu", *SETTINGS]) == 0
    plan: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert list(tmp_path.iterdir()) == []
    assert [stage["name"] for stage in plan["stages"]] == ["stage1", "stage2"]
    for stage in plan["stages"]:
        assert all(value > 0 for value in stage["minutes"].values())
    minutes = [*plan["minutes"].values(), *(value for stage in plan["stages"] for value in stage["minutes"].values())]
    assert plan["total_minutes"] == pytest.approx(sum(minutes))


def test_costs_and_shares_are_those_of_all_networks(speeds: None) -> None:
    plan = _plan("budget.macs={high: 220000}")
    space = short_recipe().load_space().stage_one(**short_recipe().fixed)
    macs = sorted(count_macs(spec, 32, 10) for spec in space)
    stage = plan.stages[0]
    assert stage.num_networks == space.size == len(macs)
    assert stage.costs["macs"][::2] == (macs[0], macs[-1])
    assert macs[0] < stage.costs["macs"][1] < macs[-1]
    params = [count_params(spec, 10, 32) for spec in space]
    assert stage.costs["params"][::2] == (min(params), max(params))
    # Of random networks each choice is as likely as any other; here each option of a block comes from as many.
    assert stage.share == pytest.approx(sum(cost <= 220000 for cost in macs) / len(macs), abs=0.04)
    assert plan.stages[1].is_example
    assert plan.budgets == ("macs of at most 220,000",)


def test_minutes_follow_from_the_speeds(speeds: None) -> None:
    # 60 images of training in batches of 30, 100 of search, 60 of test; 2 epochs of the supernet and 1 of a network.
    plan = _plan("control.networks=3", "retrain.top=2")
    training = 2 * 1.0 + 100 * 0.01
    for stage in plan.stages:
        assert stage.minutes["supernet"] == pytest.approx(2 * 2 * 2.0 / 60)
        assert stage.minutes["scoring"] == pytest.approx((12 * 0.5 + 12 * 100 * 0.1 + 100 * 0.05) / 60)
        assert stage.minutes["retraining"] == pytest.approx(2 * training / 60)
    tested = plan.minutes["control"] - 3 * training / 60
    assert tested > 0
    assert plan.minutes["final"] == pytest.approx((160 // 30) * 1.0 / 60 + tested / 3)
    screened = _plan("evaluation={screen_images: 30, confirm: 2}").stages[0]
    # Batches of 40: 12 networks on one, 6 on two, 2 on all.
    assert screened.minutes["scoring"] == pytest.approx(
        (12 * 0.5 + (12 * 40 + 6 * 80 + 2 * 100) * 0.1 + 100 * 0.05) / 60
    )
    rungs = _plan("retrain.rungs={4: 1}", "train.optim.epochs=2").stages[0]
    assert rungs.minutes["retraining"] == pytest.approx((4 * training + (2 * 2 + 2 * 100 * 0.01)) / 60)
    alone = _plan("fitness=standalone").stages[0]
    assert "supernet" not in alone.minutes
    assert alone.minutes["scoring"] == pytest.approx(12 * training / 60)
    assert _plan("fitness=synflow").stages[0].minutes["scoring"] is None


def test_a_relative_budget_is_shown_with_its_bounds(speeds: None) -> None:
    plan = _plan("budget.macs={like: glit_tiny, within: 99.9 %}")
    assert plan.budgets[0].startswith("macs like glit_tiny (")
    assert plan.budgets[0].endswith(
        f"to {1.999 * float(plan.budgets[0].split('(')[1].split(')')[0].replace(',', '')):,.12g}"
    )


def test_what_the_images_can_tell_apart_is_said(speeds: None) -> None:
    plan = _plan()
    error, difference = plan.differences[80]
    assert error == pytest.approx(100 * math.sqrt(0.8 * 0.2 / 100))
    assert difference == pytest.approx(1.96 * math.sqrt(2) * error, rel=1e-3)
    assert "at 90 % accuracy, 100 search images give a standard error of 3.00 points" in str(plan)


@pytest.mark.parametrize(
    ("overrides", "warning"),
    [
        (["budget.macs.high=1000"], "stage1: no member of the space has macs of at most 1,000"),
        (["budget.macs={low: 236760, high: 236761}"], None),
        (["control.networks=0"], "no control: nothing will say whether the search beats random networks"),
        (["control.networks=3"], "by chance alone a winner beats all of them in one of 4 searches"),
        (["control.networks=19"], None),
        ([], "cannot tell networks apart that differ by less than 11.1 points at 80 %"),
        ([], "is trained in about 1 steps; with fewer than 100"),
        (["supernet.train.optim.epochs=2000"], None),
        (
            ["evolution.generations=3"],
            "stage1: about 16 networks are within the budget, no more than the search evaluates",
        ),
        (["evaluation.memory_mb=0.3"], "stage1: the search set takes more than a third of evaluation.memory_mb"),
        ([], "one seed"),
    ],
)
def test_warnings_are_lines(overrides: list[str], warning: str | None, speeds: None) -> None:
    warnings = _plan(*overrides).warnings
    assert all("\n" not in line for line in warnings)
    if warning is None:
        keys = {"budget": "no member", "control": "control", "supernet": "steps"}
        assert not any(keys[overrides[0].partition(".")[0]] in line for line in warnings)
    else:
        assert sum(warning in line for line in warnings) >= 1, warnings


def test_few_networks_within_the_budget_are_warned_of(speeds: None) -> None:
    recipe = ["method=evolution", "budget.macs.high=150000"]
    plan = _plan(*recipe)
    assert 0 <= plan.stages[0].share < 0.01
    assert any("of random networks are within the budget" in line for line in plan.warnings)
    assert not any("of random networks" in line for line in _plan(*recipe, "supernet.sampling=budget").warnings)


@pytest.mark.parametrize(("space", "share"), [(PRODUCT, 1 / 3), (AUTOFORMER, 0.25)])
def test_the_rarest_value_is_the_one_with_the_fewest_combinations(space: SearchSpace, share: float) -> None:
    name, found = _rarest_value(space)
    assert " in block " in name
    assert found == pytest.approx(share)


def test_data_that_are_missing_are_one_line_with_status_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["search", "plan", RECIPE, "--set", "train.data.root=/nowhere"]) == 2
    error = capsys.readouterr().err
    assert "/nowhere" in error
    assert error.count("\n") == 1
    assert cli.main(["search", "plan"]) == 2
    assert "glit search plan needs a recipe" in capsys.readouterr().err
