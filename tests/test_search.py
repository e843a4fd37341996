"""Tests of whole searches: results, resuming from any moment, and errors."""

import gzip
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from glit_models.search import (
    Ranking,
    SearchRun,
    load_search_recipe,
    load_space,
    rank_networks,
    shipped_search_recipes,
    write_report,
)
from glit_models.search.evidence.control import Control
from glit_models.search.recipe import SearchRecipe
from safetensors.torch import load_file

from glit_models import GLiT, GLiTSpec, cli, count_macs
from glit_models.errors import RecipeError, RunError, SearchError
from glit_models.runs.lock import lock_folder
from glit_models.training import load_recipe
from glit_models.training.feed import open_data

FIXTURES = Path(__file__).parent / "fixtures"
RECIPE = str(FIXTURES / "search.yaml")
ROOT = f"train.data.root={FIXTURES / 'fashion-mnist'}"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


LIMIT = "train.data.limit=150"  # five steps an epoch


def _recipe(*overrides: str) -> SearchRecipe:
    return load_search_recipe(RECIPE, [ROOT, LIMIT, *overrides])


def _search(out: Path, *overrides: str) -> dict[str, Any]:
    torch.set_num_threads(1)
    command = "glit search tests/fixtures/search.yaml"
    result = SearchRun(_recipe(*overrides), out, device="cpu", command=command).run()
    assert result is not None
    return result


def _command(out: Path, *overrides: str) -> list[str]:
    settings = [word for text in (ROOT, LIMIT, *overrides) for word in ("--set", text)]
    return ["search", RECIPE, *settings, "--out", str(out)]


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A search that nothing interrupted."""
    out = tmp_path_factory.mktemp("search") / "run"
    _search(out)
    return out


def _same_end(run: Path, reference: Path) -> None:
    assert (run / "winner.json").read_text() == (reference / "winner.json").read_text()
    for stage in ("stage1", "stage2"):
        ours, theirs = ((folder / stage / "candidates.jsonl").read_bytes() for folder in (run, reference))
        assert ours == theirs
    ours, theirs = (load_file(folder / "model" / "model.safetensors") for folder in (run, reference))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def _specs(stage: Path) -> list[dict[str, Any]]:
    return [json.loads(line)["spec"] for line in (stage / "candidates.jsonl").read_text().splitlines()]


# ---- what it leaves ----


def test_a_search_leaves_its_winner_trained_and_all_that_it_evaluated(finished: Path):
    result = json.loads((finished / "result.json").read_text())
    winner = GLiTSpec.parse(str(finished / "winner.json"))
    assert winner in _recipe().load_space()
    assert result["macs"] <= 400000
    lines = [
        json.loads(line)
        for stage in ("stage1", "stage2")
        for line in (finished / stage / "candidates.jsonl").read_text().splitlines()
    ]
    assert len(lines) == result["num_evaluated"]
    for line in lines:
        assert {"spec", "macs", "params", "fitness", "generation", "origin"} <= set(line)
        assert GLiTSpec.from_dict(line["spec"]) in _recipe().load_space()
        assert line["macs"] <= 400000
    assert len({json.dumps(line["spec"]) for line in lines[:10]}) == 10
    retrained = json.loads((finished / "stage2" / "retrained.json").read_text())
    assert retrained[0]["accuracy"] == result["search_accuracy"] == max(entry["accuracy"] for entry in retrained)
    assert retrained[0]["spec"] == winner.to_dict()
    assert json.loads((finished / "times.json").read_text())["stage1"]["supernet"] >= 0
    front = json.loads((finished / "stage2" / "front.json").read_text())["macs"]
    costs, accuracies = [entry["macs"] for entry in front], [entry["fitness"] for entry in front]
    assert (costs, accuracies) == (sorted(costs), sorted(accuracies))
    assert accuracies[-1] == max(line["fitness"] for line in lines if line["spec"] in _specs(finished / "stage2"))


def test_the_second_stage_keeps_the_first_ones_distribution_of_heads_and_starts_from_its_winner(finished: Path):
    first = GLiTSpec.parse(str(finished / "stage1" / "winner.json"))
    second = load_space(finished / "stage2" / "space.yaml")
    assert second == _recipe().load_space().stage_two(first)
    lines = (finished / "stage2" / "candidates.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["origin"] == "initial"
    assert json.loads(lines[0])["spec"] == first.to_dict()


def test_the_second_stage_never_returns_a_worse_network_than_the_first_one_gave(finished: Path):
    first, second = (json.loads((finished / stage / "retrained.json").read_text()) for stage in ("stage1", "stage2"))
    given = next(entry for entry in second if entry["spec"] == first[0]["spec"])
    assert given["accuracy"] == first[0]["accuracy"]
    assert given["folder"] == first[0]["folder"]  # it is not trained again
    assert second[0]["accuracy"] >= first[0]["accuracy"]


def test_the_control_is_a_random_network_within_the_budget_with_the_winners_training(finished: Path):
    control = Control.from_dict(json.loads((finished / "control.json").read_text()))
    ((spec, accuracy),) = control.networks
    assert spec in _recipe().load_space()
    assert count_macs(spec, 32, 10) <= 400000
    recipe, winners = (
        load_recipe(str(path))
        for path in (finished / "control/1/recipe.yaml", finished / "stage2/retrain/1/recipe.yaml")
    )
    assert recipe.meaning() == {**winners.meaning(), "model": recipe.meaning()["model"]}
    result = json.loads((finished / "result.json").read_text())
    assert (control.split, control.num_images) == ("test", result["test_images"])
    assert result["random_networks_beaten"] == int(accuracy < control.winner)


def test_the_final_model_is_trained_on_training_and_search_images_and_the_last_epoch_counts(finished: Path):
    final = load_recipe(str(finished / "final" / "recipe.yaml"))
    compared = load_recipe(str(next(finished.glob("stage2/retrain/*/recipe.yaml"))))
    assert (final.keep, compared.keep) == ("last", "last")
    assert final.data.train_on_validation
    assert not compared.data.train_on_validation
    assert len(open_data(final).train) == len(open_data(compared).train) + 100
    result = json.loads((finished / "final" / "result.json").read_text())
    assert "validation_top1" not in result
    assert result["epoch"] == final.optim.epochs
    weights = [(finished / place / "model.safetensors").read_bytes() for place in ("final/model", "model")]
    assert weights[0] == weights[1]
    assert json.loads((finished / "result.json").read_text())["trained_on_search_set"]


def test_the_test_set_is_scored_once_by_the_final_model(finished: Path):
    result = json.loads((finished / "result.json").read_text())
    assert 0 <= result["test_accuracy"] <= 100
    runs = [json.loads(path.read_text()) for path in finished.glob("stage*/*/**/result.json")]
    assert len(runs) >= 5
    assert not any("test_top1" in run for run in runs)


def test_the_sets_to_train_on_to_choose_on_and_to_test_on_share_no_image():
    recipe = _recipe()
    supernet, retrained = recipe.supernet_recipe(), recipe.retrain_recipe(None)
    assert (supernet.data, supernet.seed) == (retrained.data, retrained.seed)
    splits, again = open_data(supernet), open_data(retrained)
    train, search = set(splits.train.indices), set(splits.validation.indices)
    assert train.isdisjoint(search)
    assert len(search) == 100
    assert (set(again.train.indices), set(again.validation.indices)) == (train, search)
    assert splits.test is not None
    assert splits.test is not splits.train.dataset
    for key in ("supernet", "retrain"):
        with pytest.raises(RecipeError, match=rf"{key}.train.data cannot be set: it is one for all; set train.data"):
            _recipe(f"{key}.train.data.hold_out=5")
        with pytest.raises(RecipeError, match=rf"{key}.train.seed cannot be set"):
            _recipe(f"{key}.train.seed=5")
        with pytest.raises(RecipeError, match=rf"{key}.train.keep cannot be set"):
            _recipe(f"{key}.train.keep=best")


def test_the_winner_is_a_model_like_any_other(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    model = timm.create_model(f"local-dir:{finished / 'model'}", pretrained=True)
    assert model.spec == GLiTSpec.parse(str(finished / "winner.json"))
    spec = str(finished / "winner.json")
    assert timm.create_model("glit_tiny", spec=spec, img_size=32, num_classes=10).spec == model.spec
    assert cli.main(["info", spec]) == 0
    assert cli.main(["verify", str(finished / "model")]) == 0
    names = ["--name", "glit_tiny.found", "--license", "apache-2.0", "--dataset", "Fashion-MNIST"]
    assert cli.main(["publish", str(finished / "model"), "--to-folder", str(tmp_path / "published"), *names]) == 0
    assert "glit search tests/fixtures/search.yaml" in (tmp_path / "published" / "README.md").read_text()
    settings = [f"model.spec={spec}", "optim.epochs=1", f"data.root={FIXTURES / 'fashion-mnist'}"]
    command = ["train", str(FIXTURES / "tiny.yaml"), "--out", str(tmp_path / "run"), "--device", "cpu"]
    assert cli.main([*command, *(word for text in settings for word in ("--set", text))]) == 0
    trained = timm.create_model(f"local-dir:{tmp_path / 'run' / 'model'}", pretrained=True)
    assert trained.spec == model.spec


@pytest.mark.parametrize("method", ["spos", pytest.param("random", marks=pytest.mark.extended)])
def test_methods_of_one_level_have_one_stage_with_the_work_of_two(method: str, tmp_path: Path):
    result = _search(tmp_path, f"method={method}", "retrain.top=1", "supernet.train.optim.epochs=1")
    assert result["num_evaluated"] == 36
    assert not (tmp_path / "stage1").exists()
    assert len(json.loads((tmp_path / "joint/retrained.json").read_text())) == 2
    metrics = [json.loads(line) for line in (tmp_path / "joint/supernet/metrics.jsonl").read_text().splitlines()]
    assert [entry["epoch"] for entry in metrics if "epoch" in entry] == [1, 2]
    origins = {json.loads(line)["origin"] for line in (tmp_path / "joint/candidates.jsonl").read_text().splitlines()}
    assert origins == ({"random"} if method == "random" else {"random", "mutation", "crossover"})


@pytest.mark.slow
def test_independent_weights_and_paths_within_the_budget_are_a_key_away(tmp_path: Path):
    _search(tmp_path, "supernet.sharing=independent", "supernet.sampling=budget", "retrain.top=1")
    weights = load_file(tmp_path / "stage2" / "supernet" / "model.safetensors")
    assert any(".conv.2-" in name or ".conv.3-" in name or ".conv.1-" in name for name in weights)


@pytest.mark.slow
def test_networks_are_ranked_by_training_them(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    ranking = rank_networks(out, 3, device="cpu")
    assert ranking is not None
    assert ranking.stage == "stage2"
    assert Ranking.from_dict(json.loads((out / "stage2" / "rank.json").read_text())) == ranking
    assert [network.again is not None for network in ranking.networks] == [True, False, False]
    measures = {"inherited loss", "inherited top-1", "surrogate", "SynFlow", "MACs", "parameters"}
    assert set(ranking.networks[0].predictions) == measures
    assert set(ranking.taus["loss"]) <= measures
    for network in ranking.networks:
        if network.again is not None:
            assert network.again["loss"] != network.trained["loss"]
    runs = [load_recipe(str(out / f"stage2/rank/{name}/recipe.yaml")) for name in ("1", "1-again")]
    splits = [open_data(run) for run in runs]
    assert [run.seed for run in runs] == [0, 1]
    assert splits[0].validation.indices == splits[1].validation.indices
    assert "tau with loss" in write_report(out).read_text()
    capsys.readouterr()
    assert rank_networks(out, 3, device="cpu") == ranking
    assert "epoch" not in capsys.readouterr().err  # nothing is trained again
    with pytest.raises(SearchError, match="stage must be one of stage1, stage2, got 'joint'"):
        rank_networks(out, 4, "joint")
    with pytest.raises(SearchError, match="networks must be at least 3"):
        rank_networks(out, 2)
    with pytest.raises(SearchError, match=r"holds no search: there is no recipe.yaml"):
        rank_networks(tmp_path / "none")


# ---- going on ----


def test_a_finished_search_does_nothing_again(finished: Path, capsys: pytest.CaptureFixture[str]):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}
    assert _search(finished) == json.loads((finished / "result.json").read_text())
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()} == before
    assert "is finished" in capsys.readouterr().err


def test_a_search_that_release_0_1_began_goes_on_with_what_it_has(tmp_path: Path):
    """0.1 was killed in the first stage after two of three generations."""
    out = tmp_path / "run"
    shutil.copytree(FIXTURES / "written_by_0_1" / "search_run", out)
    recipe = (out / "recipe.yaml").read_text()
    (out / "recipe.yaml").write_text(recipe.replace("ROOT", str(FIXTURES / "fashion-mnist")))
    weights = (out / "stage1" / "supernet" / "model.safetensors").read_bytes()
    result = _search(out, "train.data.limit=null", "evolution.mutation_prob=0.3")
    assert (out / "stage1" / "supernet" / "model.safetensors").read_bytes() == weights
    theirs = [json.loads(line) for line in (out / "candidates_of_stage1.jsonl").read_text().splitlines()]
    ours = [json.loads(line) for line in (out / "stage1" / "candidates.jsonl").read_text().splitlines()]
    for ours_of, theirs_of in zip(ours[:12], theirs[:12], strict=True):
        ours_of["accuracy"] = ours_of.pop("fitness")
        assert {**theirs_of, **ours_of} == theirs_of
    assert len(ours) == len(theirs)
    assert load_space(out / "stage2" / "space.yaml") == _recipe().load_space().stage_two(
        GLiTSpec.parse(str(out / "stage1" / "winner.json"))
    )
    assert result["num_evaluated"] > len(ours)


PROGRAM = """
import os, signal, sys
from glit_models import cli
from glit_models.search.supernets.scoring import Evaluator
from glit_models.search.run.stage import Stage
from glit_models.training import Trainer
owner, name, left = {"supernet": (Trainer, "_train_step", 7), "evaluation": (Evaluator, "_classify", 14),
    "evolution": (Stage, "_write_candidates", 2), "retraining": (Trainer, "_train_step", 13),
    "second": (Evaluator, "_calibrate", 5), "end": (Trainer, "_finish", 5)}[sys.argv[1]]
original = getattr(owner, name)
def deadly(*args, **keywords):
    global left
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args, **keywords)
setattr(owner, name, deadly)
cli.main(sys.argv[2:])
"""


REACHED = {  # what there is after each kill, and what there is not yet
    "supernet": ("stage1/supernet/metrics.jsonl", "stage1/supernet/result.json"),
    "evaluation": ("stage1/supernet/result.json", "stage1/evolution.json"),
    "evolution": ("stage1/evolution.json", "stage1/retrain"),
    "retraining": ("stage1/retrain/2", "stage1/retrain/2/result.json"),
    "second": ("stage2/evolution.json", "stage2/retrain"),
    "end": ("stage2/retrain/1", "stage2/retrain/1/result.json"),
}
MORE = [
    *(pytest.param([where], marks=pytest.mark.slow) for where in ("evolution", "end")),
    *(pytest.param([where], marks=pytest.mark.extended) for where in ("supernet", "second")),
]


@pytest.mark.parametrize("places", [["evaluation", "retraining"], *MORE], ids=" and ".join)
def test_a_search_killed_in_any_part_goes_on_to_the_same_end(places: list[str], finished: Path, tmp_path: Path):
    for where in places:
        command = [sys.executable, "-c", PROGRAM, where, *_command(tmp_path)]
        killed = subprocess.run(command, env=ENVIRONMENT, capture_output=True, timeout=200)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        begun, missing = REACHED[where]
        assert (tmp_path / begun).exists()
        assert not (tmp_path / missing).exists()
    assert not (tmp_path / "result.json").exists()
    _search(tmp_path)
    _same_end(tmp_path, finished)


@pytest.mark.slow
def test_a_search_killed_at_random_moments_goes_on_to_the_same_end(finished: Path, tmp_path: Path):
    chance = random.Random(0)
    for _ in range(4):
        process = subprocess.Popen(
            [sys.executable, "-m", "glit_models", *_command(tmp_path)], env=ENVIRONMENT, stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )  # fmt: skip
        began = time.monotonic()
        while not (tmp_path / "recipe.yaml").exists() and time.monotonic() - began < 60:
            time.sleep(0.05)
        time.sleep(chance.uniform(0, 6))
        process.kill()
        process.wait()
    _search(tmp_path)
    _same_end(tmp_path, finished)


def test_sigterm_and_the_clock_leave_with_a_line_and_the_search_goes_on(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    stops = 0
    while SearchRun(_recipe(), tmp_path, device="cpu", max_minutes=0.03).run() is None:
        stops += 1
    assert stops > 1
    _same_end(tmp_path, finished)
    assert "stopped by the limit of 0.03 minutes; run the same command to resume" in capsys.readouterr().err


def _start(out: Path, processes: int) -> None:
    """The search on so many processes, under the variables that `accelerate launch` sets, to its end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(processes):
        shared = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes,
                  "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}  # fmt: skip
        environment = {**ENVIRONMENT, **{key: str(value) for key, value in shared.items()}}
        command = [sys.executable, "-m", "glit_models", *_command(out)]
        started.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE))
    printed = [process.communicate(timeout=200) for process in started]
    assert [process.returncode for process in started] == [0] * processes, printed


def test_two_processes_share_the_candidates_and_find_the_same(finished: Path, tmp_path: Path):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    shutil.rmtree(out / "model")
    for name in ("result.json", "winner.json", "times.json"):
        (out / name).unlink()
    for stage in ("stage1", "stage2"):  # the trained weights stay, as training is the same up to rounding only
        for name in ("evolution.json", "evolution.previous.json", "candidates.jsonl", "references.json",
                     "retrained.json", "winner.json"):  # fmt: skip
            (out / stage / name).unlink()
    _start(out, 2)
    _same_end(out, finished)
    ours, theirs = (json.loads((folder / "result.json").read_text()) for folder in (out, finished))
    assert ours["test_accuracy"] == theirs["test_accuracy"]


@pytest.mark.slow
def test_a_whole_search_runs_on_two_processes(tmp_path: Path):
    _start(tmp_path, 2)
    assert json.loads((tmp_path / "result.json").read_text())["num_evaluated"] > 12


def _until_evolved(finished: Path, out: Path) -> None:
    """A copy of the search as it was in the middle of its second stage."""
    shutil.copytree(finished, out)
    for path in (out / "result.json", out / "stage2" / "retrained.json"):
        path.unlink()


def test_a_damaged_state_is_named_and_the_one_before_taken(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "run"
    _until_evolved(finished, out)
    state = out / "stage2" / "evolution.json"
    state.write_text(state.read_text()[:500])
    (out / "stage2" / "candidates.jsonl").write_text("{")
    _search(out)
    assert "stage2/evolution.json is damaged" in capsys.readouterr().err
    _same_end(out, finished)


def test_no_readable_state_is_an_error_not_a_new_start(finished: Path, tmp_path: Path):
    out = tmp_path / "run"
    _until_evolved(finished, out)
    for name in ("evolution.json", "evolution.previous.json"):
        (out / "stage2" / name).write_text("{}")
    with pytest.raises(RunError, match=r"evolution.previous.json: no readable state is left; delete it"):
        _search(out)


def test_damaged_weights_of_a_supernet_are_named_and_made_again(finished: Path, tmp_path: Path):
    out = tmp_path / "run"
    _until_evolved(finished, out)
    (out / "stage2" / "evolution.json").unlink()
    supernet = out / "stage2" / "supernet"
    (supernet / "model.safetensors").write_bytes((supernet / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(SearchError, match=r"model.safetensors is missing or damaged .* delete .*supernet/result.json"):
        _search(out)
    (supernet / "result.json").unlink()
    _search(out)
    _same_end(out, finished)


@pytest.mark.extended  # .ci/run runs `make search-demo`, all of this recipe
def test_the_smoke_recipe_searches_fractals_in_both_stages_and_is_reported(tmp_path: Path):
    shorter = ["supernet.train.optim.epochs=2", "train.optim.epochs=1", "evolution.generations=2", "retrain.top=1"]
    result = SearchRun(load_search_recipe("smoke", shorter), tmp_path, device="cpu").run()
    assert result is not None
    assert result["num_evaluated"] == 40
    assert 0 <= result["test_accuracy"] <= 100
    assert cli.main(["search", "report", str(tmp_path)]) == 0
    assert (tmp_path / "report" / "index.html").stat().st_size > 50_000


# ---- what it refuses ----


@pytest.mark.parametrize("name", shipped_search_recipes())
def test_every_shipped_search_recipe_is_valid_and_opens_with_its_command(name: str):
    recipe = load_search_recipe(name)
    path = Path(sys.modules[SearchRecipe.__module__].__file__ or "").with_name("recipes") / f"{name}.yaml"
    assert f"glit search {name} --out" in path.read_text()[:400]
    space = recipe.load_space()
    assert (space.stage_one(**recipe.fixed) if len(recipe.method_class.stages) > 1 else space).size > 1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["evolution.populaton=3"], "unknown key evolution.populaton; did you mean evolution.population?"),
        (["methd=spos"], "unknown key methd; did you mean method?"),
        (
            ["method=greedy"],
            "unknown search method 'greedy'; known: autoformer, evolution, hierarchical, nsga2",
        ),
        (["fitness=inherit"], r"unknown fitness 'inherit'; .*; did you mean 'inherited'\?"),
        (["train.optim.lrr=1"], "unknown key supernet.train.optim.lrr; did you mean supernet.train.optim.lr?"),
        (["train.seed=3"], "train.seed cannot be set: the search's seed is that of all its parts"),
        (["train.model.pretrained=true"], "train.model.pretrained cannot be set in a search"),
        (["retrain.top=99"], "retrain.top must be from 1 to evolution.population=6, got 99"),
        (["space=glitt"], "no search space 'glitt'"),
        (["fixed.kernel_size=7"], "which is none of its options"),
        (
            ["budget.macs.low=1e12", "budget.macs.high=null"],
            r"no member of the space has macs of at least .* reachable",
        ),
        (["budget.macs.high=1000"], r"no member of the space has macs of at most 1,000 \(.* to .* is reachable\)"),
        (["train.data.hold_out=100000"], "too few to hold out 100000"),
        (["train.data.hold_out=5"], "10 classes, but only 5 images to choose on"),
        (["train.data.limit=7"], "10 classes, but only 7 images to train on"),
        (["train.data.root=/nowhere"], "/nowhere"),
        (["evaluation.memory_mb=0.001", "supernet.train.optim.epochs=1000"], "evaluation.memory_mb must be at least"),
    ],
)
def test_what_cannot_be_is_one_line_with_status_2(
    overrides: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "run"
    assert cli.main([*_command(out, *overrides), "--device", "cpu"]) == 2
    err = capsys.readouterr().err
    assert re.search(message, err), err
    assert len(err.strip().splitlines()) == 1
    assert not out.exists()


def test_another_searchs_folder_is_refused_and_the_keys_named(finished: Path):
    with pytest.raises(
        RecipeError, match=r"holds a run of another recipe \(evolution.generations: 3 -> 4\); choose another folder$"
    ):
        SearchRun(_recipe("evolution.generations=4"), finished, device="cpu")


def test_a_search_goes_on_where_its_data_were_moved_to(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = shutil.copytree(finished, tmp_path / "run")
    for name in ("result.json", "stage2/retrained.json", "stage2/retrain/1/result.json"):
        (out / name).unlink()
    data = shutil.copytree(FIXTURES / "fashion-mnist", tmp_path / "moved")
    labels = data / "train-labels-idx1-ubyte.gz"
    original = labels.read_bytes()
    labels.write_bytes(gzip.compress(gzip.decompress(original)[:-1] + b"\11"))
    with pytest.raises(RecipeError, match=r"holds a run on other data \(train.data.root: "):
        SearchRun(_recipe(f"train.data.root={data}"), out, device="cpu")
    labels.write_bytes(original)
    assert _search(out, f"train.data.root={data}")["seed"] == 0
    line = f"the data were moved ({FIXTURES}/fashion-mnist -> {data}) and are the same, so the run goes on"
    assert capsys.readouterr().err.count(line) == 1
    _same_end(out, finished)


def test_a_folder_whose_recipe_lacks_a_key_of_today_has_its_default(finished: Path, tmp_path: Path):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    recipe = yaml.safe_load((out / "recipe.yaml").read_text())
    del recipe["latency"], recipe["evaluation"]["memory_mb"]
    (out / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert _search(out)["seed"] == 0
    with pytest.raises(RecipeError, match=r"\(latency.threads: 1 -> 2\)"):
        SearchRun(_recipe("latency.threads=2"), out, device="cpu")


def test_a_budget_of_milliseconds_is_of_the_runtime_that_the_recipe_names(finished: Path, tmp_path: Path):
    asked = []

    def prepare(model: GLiT, batch_size: int, threads: int, device: str) -> Callable[[], object]:
        asked.append(model.spec)
        return lambda: None

    recipe = _recipe("latency.runtime=onnx", "budget.latency_ms.high=1000")
    with pytest.raises(SearchError, match=r"latency.runtime onnx needs `runtimes=.*glit_models.export.onnx_runner"):
        SearchRun(recipe, tmp_path, device="cpu")
    run = SearchRun(recipe, tmp_path, device="cpu", runtimes={"onnx": prepare})
    latency = {budget.name: budget for budget in run.context.budgets}["latency_ms"]
    spec = GLiTSpec.from_dict(json.loads((finished / "winner.json").read_text()))
    assert latency.cost(spec) < 1
    assert asked == [spec]


def test_a_runtime_that_is_not_installed_is_said_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    out = tmp_path / "run"
    assert cli.main(_command(out, "latency.runtime=onnx", "budget.latency_ms.high=1000")) == 2
    err = capsys.readouterr().err
    assert re.search(r'^glit: onnxscript cannot be imported .*"\.\[export\]" in the checkout$', err)
    assert not out.exists()


def test_a_space_whose_file_has_changed_is_refused(finished: Path, tmp_path: Path):
    out = tmp_path / "run"
    _until_evolved(finished, out)
    path = out / "stage2" / "space.yaml"
    path.write_text(path.read_text().replace("embed_dim: 24", "embed_dim: 48"))
    with pytest.raises(SearchError, match=r"stage2/space.yaml is another space than the recipe's is now"):
        _search(out)


def test_a_search_in_use_by_another_process_is_refused(tmp_path: Path):
    with lock_folder(tmp_path), pytest.raises(RunError, match="is in use by another process"):
        SearchRun(_recipe(), tmp_path, device="cpu").run()


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "file").write_text("")
    assert cli.main([*_command(tmp_path / "file" / "run"), "--device", "cpu"]) == 2
    assert "cannot be made or written to" in capsys.readouterr().err


def test_the_command_says_how_it_is_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for arguments, message in (
        (["smoke"], "takes a recipe and --out DIR"),
        (["report"], "glit search report needs DIR, the folder of a search"),
        (["rank", str(tmp_path), "--set", "seed=1"], "glit search rank takes no --set; it is for `glit search`"),
        (
            ["plan", "smoke", "--out", "x"],
            "glit search plan takes no --out; it is for `glit search`, `glit search again`, ",
        ),
        (["smoke", "--out", str(tmp_path), "--networks", "3"], "takes no --networks; it is for `glit search rank`"),
        (["smoke", "--out", str(tmp_path), "--networks", "0"], "takes no --networks; it is for `glit search rank`"),
        (["rank", str(tmp_path), "--networks", "0"], "glit: --networks must be at least 3, because fewer cannot"),
        (["rank", str(tmp_path), "--networks", "2"], "be ranked, got 2"),
        (["report", str(tmp_path), "--workers", "0"], "glit search report takes no --workers; it is for `glit search`"),
        (["plan", "smoke", "--address", "a:1"], "glit search plan takes no --address; it is for `glit search`, "),
        (
            ["extract", str(tmp_path), "--out", "x", "--engine-options", "num_gpus=1"],
            "glit search extract takes no --engine-options; it is for `glit search`, `glit search rank`, ",
        ),
        (["report", str(tmp_path)], "recipe.yaml"),
        (["nothing", "--out", str(tmp_path)], "no recipe 'nothing': not a file, and the shipped ones are"),
    ):
        assert cli.main(["search", *arguments]) == 2
        assert message in capsys.readouterr().err
