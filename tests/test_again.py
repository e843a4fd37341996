"""Tests of searches on the trained supernets of another search: reuse, equal results, rejected arguments."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from glit_models.search import SearchRun, extremes, load_search_recipe, load_space, search_again, write_report
from glit_models.search.run.context import Interrupted
from glit_models.search.run.kept_supernets import adopt_supernet
from safetensors.torch import load_file
from search_folders import short_recipe

from glit_models import GLiTSpec, cli, count_macs
from glit_models.errors import RecipeError, SearchError

SMALLER = "budget.macs.high=220000"
CHEAP = ("control.networks=0", "final.all_data=false")


@pytest.fixture(scope="module")
def search(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole search of a few seconds."""
    out = tmp_path_factory.mktemp("search") / "short"
    assert SearchRun(short_recipe(*CHEAP), out, "cpu").run() is not None
    return out


def _macs(folder: Path, stage: str) -> list[float]:
    return [json.loads(line)["macs"] for line in (folder / stage / "candidates.jsonl").read_text().splitlines()]


def _weights(folder: Path, stage: str) -> bytes:
    return (folder / stage / "supernet" / "model.safetensors").read_bytes()


def _stop_at_retraining(patch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise Interrupted("the test")

    patch.setattr("glit_models.search.run.stage.retrain", stop)


def test_another_budget_is_searched_on_the_trained_supernet_and_the_first_search_may_go(
    search: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(search, tmp_path / "first")
    out = tmp_path / "second"
    run = search_again(tmp_path / "first", out, [SMALLER], device="cpu")
    shutil.rmtree(tmp_path / "first")
    _stop_at_retraining(monkeypatch)
    monkeypatch.setattr("glit_models.search.run.stage.Stage.train_supernet", None)  # nothing is trained
    assert run.run() is None
    assert "stage1: the supernet is that of an earlier search" in capsys.readouterr().err
    assert _weights(out, "stage1") == _weights(search, "stage1")
    assert max(_macs(out, "stage1")) <= 220000 < max(_macs(search, "stage1"))
    result = json.loads((out / "stage1" / "supernet" / "result.json").read_text())
    assert (result["minutes"], result["trained_in"]) == (0, str(tmp_path / "first" / "stage1"))
    assert write_report(out).is_file()
    # What goes on needs the second folder alone.
    again = SearchRun(load_search_recipe(str(out / "recipe.yaml")), out, "cpu")
    before = (out / "stage1" / "candidates.jsonl").read_bytes()
    assert again.run() is None
    assert (out / "stage1" / "candidates.jsonl").read_bytes() == before


def test_a_stage_takes_the_supernet_of_its_space_alone(search: Path, tmp_path: Path) -> None:
    out = tmp_path / "second"
    run = search_again(search, out, [SMALLER], device="cpu")
    recipe = run.context.supernet_recipe
    second = load_space(search / "stage2" / "space.yaml")
    assert not adopt_supernet(
        out, second.stage_two(next(iter(second))).restrict(mlp_ratios=(1,)), recipe, tmp_path / "a"
    )
    assert not (tmp_path / "a").exists()
    assert adopt_supernet(out, second, recipe, out / "stage2")
    assert _weights(out, "stage2") == _weights(search, "stage2")
    with pytest.raises(RecipeError, match="holds a run of another recipe"):
        adopt_supernet(out, second, short_recipe("supernet.train.optim.epochs=1").supernet_recipe(), tmp_path / "a")


def test_the_first_stage_can_be_kept_though_its_winner_is_beyond_the_new_budget(
    search: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "second"
    winner = GLiTSpec.parse(str(search / "stage1" / "winner.json"))
    cheapest = extremes(load_space(search / "stage2" / "space.yaml"), lambda spec: count_macs(spec, 32, 10))[0]
    high = (count_macs(cheapest, 32, 10) + count_macs(winner, 32, 10)) / 2
    _stop_at_retraining(monkeypatch)
    monkeypatch.setattr("glit_models.search.run.stage.Stage.train_supernet", None)
    command = ["search", "again", str(search), "--out", str(out), "--keep-winner", "--device", "cpu"]
    assert cli.main([*command, "--set", f"budget.macs.high={high}"]) == 3
    assert "stage2: the supernet is that of an earlier search" in capsys.readouterr().err
    assert (out / "stage1" / "retrained.json").read_bytes() == (search / "stage1" / "retrained.json").read_bytes()
    assert load_space(out / "stage2" / "space.yaml") == load_space(search / "stage2" / "space.yaml")
    assert max(_macs(out, "stage2")) <= high < count_macs(winner, 32, 10)


def test_a_large_file_is_linked_rather_than_copied(
    search: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("glit_models.search.run.kept_supernets._LINKED_BYTES", 1)
    search_again(search, tmp_path / "second", device="cpu")
    kept = tmp_path / "second" / "supernets" / "stage1" / "supernet" / "model.safetensors"
    assert os.path.samefile(kept, search / "stage1" / "supernet" / "model.safetensors")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["space=glit"], "space cannot change on supernets that are trained; what can is budget, latency, fitness"),
        (["seed=1"], "seed cannot change"),
        (["train.data.hold_out=50"], "train.data.hold_out cannot change"),
        (["supernet.train.optim.epochs=9"], "supernet.train.optim.epochs cannot change"),
        (["method=spos"], "method cannot change"),
        (["fitness=macs"], "fitness macs uses no supernet; take one that does"),
        (["retrain.train.data={}"], "retrain.train.data cannot be set"),
        (["evolution.populaton=3"], "unknown key evolution.populaton"),
        (["budget.macs.high=1000"], "no member of the space has macs of at most 1,000"),
        (["fitness=inherited_loss", "keep"], "fitness cannot change where the first stage"),
        (["retrain.train.optim.epochs=2", "keep"], "retrain.train cannot change where the first stage"),
        (["budget.macs.high=1000", "keep"], "no member of the space has macs of at most 1,000"),
    ],
)
def test_what_cannot_change_is_named_with_status_2_and_nothing_is_written(
    overrides: list[str], message: str, search: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [word for text in overrides if text != "keep" for word in ("--set", text)]
    words += ["--keep-winner"] if "keep" in overrides else []
    out = tmp_path / "second"
    assert cli.main(["search", "again", str(search), "--out", str(out), *words, "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_supernets_and_one_that_is_taken_are_refused(search: Path, tmp_path: Path) -> None:
    first, taken, second = (tmp_path / name for name in ("first", "taken", "second"))
    shutil.copytree(search, first, ignore=shutil.ignore_patterns("supernet"))
    with pytest.raises(SearchError, match="first has no trained supernet of stage1; finish its training first"):
        search_again(first, second, device="cpu")
    taken.mkdir()
    (taken / "file").write_text("mine")
    with pytest.raises(SearchError, match="taken is there already"):
        search_again(search, taken, device="cpu")
    search_again(search, second, [SMALLER], device="cpu")
    with pytest.raises(SearchError, match=r"second was begun from another search or with another keep_winner, see"):
        search_again(search, second, [SMALLER], keep_winner=True, device="cpu")
    with pytest.raises(RecipeError, match=r"another recipe \(budget.macs.high"):
        search_again(search, second, ["budget.macs.high=230000"], device="cpu")
    (first / "recipe.yaml").write_text(short_recipe(*CHEAP, "supernet.sampling=budget").to_yaml())
    with pytest.raises(SearchError, match=r"trained within the budget \(supernet.sampling=budget\)"):
        search_again(first, tmp_path / "third", [SMALLER], device="cpu")


@pytest.mark.slow
def test_a_search_again_that_was_stopped_ends_as_one_that_was_not(
    search: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(out: Path) -> dict[str, Any] | None:
        return search_again(search, out, ["budget.macs.high=203000"], device="cpu").run()

    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    result = run(whole)
    assert "stage2: no supernet of the earlier search is of this space" in capsys.readouterr().err  # another winner
    with pytest.MonkeyPatch.context() as patch:
        _stop_at_retraining(patch)
        assert run(stopped) is None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("glit_models.search.run.pipeline.SearchRun._finish", _raise_interrupted)
        assert run(stopped) is None
    again = run(stopped)
    assert result is not None
    assert again is not None
    assert {**again, "minutes": 0} == {**result, "minutes": 0}
    assert result["macs"] <= 203000
    ours, theirs = (load_file(folder / "model" / "model.safetensors") for folder in (whole, stopped))
    assert all(bool((ours[name] == theirs[name]).all()) for name in theirs)
    # The same budget as before gives the same search.
    same = search_again(search, tmp_path / "same", device="cpu").run()
    assert same is not None
    assert {**same, "minutes": 0} == {**json.loads((search / "result.json").read_text()), "minutes": 0}


def _raise_interrupted(*_: object) -> None:
    raise Interrupted("the test")
