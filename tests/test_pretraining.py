"""Tests of the comparison of pretrainings: its strings are balanced, and its intervals equal a paired t-test's."""

import math
import sys
from pathlib import Path

import pytest
import timm
import torch
from scipy.stats import ttest_rel

import glit_models  # noqa: F401  (registers the models)

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `benchmarks` is no part of the package

from benchmarks import pretraining
from benchmarks.procedural import dyck, warm_up

FASHION_MNIST = Path(__file__).parent / "fixtures" / "fashion-mnist"


def is_balanced(string: list[int], num_kinds: int) -> bool:
    stack = []
    for symbol in string:
        if symbol < num_kinds:
            stack.append(symbol)
        elif not stack or stack.pop() != symbol - num_kinds:
            return False
    return not stack


def test_every_string_is_balanced_and_no_two_batches_are_alike() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = dyck(50, 16, generator, 3), dyck(50, 16, generator, 3)
    assert all(is_balanced(string, 3) for string in [*first.tolist(), *second.tolist()])
    assert not torch.equal(first, second)
    assert set(first.unique().tolist()) == set(range(6))


def test_a_string_of_odd_length_is_refused() -> None:
    with pytest.raises(ValueError, match="length must be even, got 3"):
        dyck(1, 3, torch.Generator())


def test_a_warm_up_changes_the_blocks_alone_and_in_the_same_way_each_time() -> None:
    states = []
    for steps in (0, 2, 2):
        torch.manual_seed(0)
        model = timm.create_model("glit_tiny", img_size=32, num_classes=3)
        if steps:
            warm_up(model, steps, seed=1)
        states.append(model.state_dict())
    changed = {key for key in states[0] if not torch.equal(states[0][key], states[1][key])}
    assert {key.split(".")[0] for key in changed} == {"blocks"}
    assert all(torch.equal(states[1][key], states[2][key]) for key in states[0])


def test_sizes_ascend_and_keep_their_shares() -> None:
    sizes = [pretraining.ascending_size({32: 1.0, 16: 2.0, 24: 1.0}, step / 100) for step in range(100)]
    assert sizes == [16] * 50 + [24] * 25 + [32] * 25


def test_neighbours_vote_by_their_similarity() -> None:
    bank = torch.eye(4).repeat_interleave(30, 0)
    labels = torch.arange(4).repeat_interleave(30)
    assert pretraining.neighbour_accuracy(bank, labels, torch.eye(4), torch.tensor([0, 1, 2, 0])) == 0.75


def test_with_two_arms_the_interval_is_that_of_a_paired_t_test() -> None:
    first, second = [70.0, 72.0, 75.0], [71.0, 74.0, 75.5]
    values = {"first": dict(enumerate(first)), "second": dict(enumerate(second))}
    noise, freedom = pretraining.residual_noise(values)
    interval = ttest_rel(second, first).confidence_interval()
    assert pretraining.half_width(noise, freedom, 3) == pytest.approx((interval.high - interval.low) / 2)


def test_what_arms_and_seeds_explain_is_no_noise() -> None:
    shifts = {0: 0, 1: 2, 2: 7}
    values = {arm: {seed: base + shifts[seed] for seed in shifts} for arm, base in {"a": 1, "b": 5, "c": 6}.items()}
    del values["b"][1]  # not finished yet
    noise, freedom = pretraining.residual_noise(values)
    assert (noise, freedom) == (pytest.approx(0, abs=1e-12), 3)
    assert math.isnan(pretraining.residual_noise({"a": {0: 1.0}, "b": {0: 3.0}})[0])


def test_intervals_that_hold_together_are_wider() -> None:
    assert pretraining.half_width(1.0, 10, 3, comparisons=5) > pretraining.half_width(1.0, 10, 3)


def test_the_cost_is_that_of_the_baseline_or_less_where_images_are_smaller() -> None:
    costs = {name: pretraining.cost(arm) for name, arm in pretraining.ARMS.items()}
    assert costs["scratch"] == 0
    assert costs["today"] == costs["ofdb"] == 1
    assert costs["today, long warm-up"] == 1.5
    assert 0.4 < costs["today, small first"] == costs["today, sizes mixed"] < 0.6


SMALL = ("data.fractals.num_classes=4", "data.fractals.instances=8", "data.fractals.held_out=2", "optim.epochs=1",
         "optim.batch_size=8")  # fmt: skip


@pytest.mark.slow
def test_a_study_that_was_stopped_goes_on_to_its_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arms = {
        "scratch": pretraining.Arm(pretrain=False),
        "today": pretraining.Arm(SMALL),
        "today, warm-up": pretraining.Arm(SMALL, warm_up=0.5),
        "today, small first": pretraining.Arm((*SMALL, *pretraining.SIZES), small_first=True),
    }
    for name, value in (("ARMS", arms), ("HELD_OUT", 50), ("LABELS", 60), ("BANK", 100), ("LABEL_EPOCHS", 1)):
        monkeypatch.setattr(pretraining, name, value)
    command = ["pretraining", "--threads", "1", "--rounds", "2", "--out", str(tmp_path), "--root", str(FASHION_MNIST)]
    monkeypatch.setattr(sys, "argv", [*command, "--show"])
    with pytest.raises(SystemExit, match="nothing is finished in "):
        pretraining.main()
    monkeypatch.setattr(sys, "argv", command)
    neighbours = pretraining._neighbours
    monkeypatch.setattr(pretraining, "_neighbours", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        pretraining.main()
    monkeypatch.setattr(pretraining, "_neighbours", neighbours)
    pretraining.main()
    printed = capsys.readouterr().out
    assert "| today, small first | " in printed
    assert "k-NN, short warm-up over all kinds of fractals: " in printed
    monkeypatch.setattr(sys, "argv", [*command, "--show"])
    pretraining.main()
    assert capsys.readouterr().out.splitlines()[-8:] == printed.splitlines()[-8:]
