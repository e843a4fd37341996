"""Tests of cheaper searches: short trainings before long ones, and few images before all."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from glit_models.search import SearchRun, load_search_recipe, write_report
from glit_models.search.methods.candidates import Candidate
from glit_models.search.methods.screening import Confirmation, describe_noise, wrong_order
from glit_models.search.recipe import SearchRecipe
from glit_models.search.run.context import RunContext
from glit_models.search.run.retraining import Retrained
from glit_models.search.run.stage import Stage
from glit_models.search.supernets.scoring import Evaluator

from glit_models import GLiTSpec, count_macs
from glit_models.errors import RecipeError
from glit_models.training import Recipe
from tests.spaces import TIED

FIXTURES = Path(__file__).parent / "fixtures"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
SHARED = (f"train.data.root={FIXTURES / 'fashion-mnist'}", "train.data.limit=60", "train.optim.epochs=3")
SCREEN = (
    "method=evolution", "fixed={}", "evaluation.screen_images=30", "evaluation.confirm=3", "evolution.proposals=3",
    "train.optim.epochs=1", "supernet.train.optim.epochs=1", "train.checkpoint_minutes=10", "retrain.top=1",
    "final.all_data=false", "train.eval_batch_size=20",
)  # fmt: skip
KILLED_IN_THE_LAST_ROUND = """
import os, signal, sys
from glit_models import cli
from glit_models.search.supernets.scoring import Evaluator
Evaluator._sums = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)
cli.main(sys.argv[1:])
"""


def _recipe(*overrides: str) -> SearchRecipe:
    return load_search_recipe(str(FIXTURES / "search.yaml"), [*SHARED, *overrides])


# ---- retraining by successive halving ----


Trained = list[tuple[str, int, dict[str, Any]]]  # folder, epochs, network


def _retrain(out: Path, monkeypatch: pytest.MonkeyPatch, stage: Stage | None = None) -> tuple[list[Retrained], Trained]:
    """A stage whose trainings give an accuracy at once: by length, and the better the smaller the network is."""
    trained: Trained = []

    def train(self: RunContext, recipe: Recipe, folder: Path, start: object = None) -> dict[str, float]:
        spec = GLiTSpec.from_dict(recipe.model.spec)
        _, _, name = folder.relative_to(self.folder).as_posix().partition("/")  # below the stage's folder
        trained.append((name, recipe.optim.epochs, recipe.model.spec))
        return {"validation_top1": 30.0 * recipe.optim.epochs - count_macs(spec, 32, 10) / 1e5}

    monkeypatch.setattr(RunContext, "train", train)
    if stage is None:
        out.mkdir(exist_ok=True)
        stage = SearchRun(_recipe("fitness=macs", "retrain.top=1", "retrain.rungs={4: 1, 2: 2}"), out, "cpu").stages[0]
    return stage.run(), trained


def test_rungs_train_many_networks_briefly_and_the_best_of_them_longer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    retrained, trained = _retrain(tmp_path / "once", monkeypatch)
    places = [(folder, epochs) for folder, epochs, _ in trained]
    rungs = [(f"retrain/rung{rung}/{place}", rung) for rung, count in ((1, 4), (2, 2)) for place in range(1, count + 1)]
    assert places == [*rungs, ("retrain/1", 3)]
    specs = [GLiTSpec.from_dict(spec) for *_, spec in trained]
    smallest = sorted(specs[:4], key=lambda spec: count_macs(spec, 32, 10))
    assert smallest != specs[:4]
    assert specs[4:] == [*smallest[:2], smallest[0]]
    assert [r.spec.to_dict() for r in retrained] == [trained[-1][2]]
    assert _retrain(tmp_path / "again", monkeypatch)[1] == trained  # so a killed search finds its trainings


@pytest.mark.parametrize("is_known", [True, False])
def test_the_network_that_a_stage_was_given_skips_the_rungs_and_is_compared_at_the_end(
    is_known: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    first, _ = _retrain(out, monkeypatch)
    run = SearchRun(_recipe("fitness=macs", "retrain.top=1", "retrain.rungs={4: 1, 2: 2}"), out, "cpu")
    given = first[0].spec
    stage = Stage("stage2", run.space.stage_two(given), run.context, [given], first if is_known else [])
    retrained, trained = _retrain(out, monkeypatch, stage)
    assert len(retrained) == 2
    assert [r.folder for r in retrained if r.spec == given] == [
        first[0].folder if is_known else stage.folder / "retrain/2"
    ]
    own = [(folder, epochs) for folder, epochs, spec in trained if spec == given.to_dict()]
    assert own == ([] if is_known else [("retrain/2", 3)])


def test_the_seconds_of_every_rung_count(tmp_path: Path) -> None:
    stage = SearchRun(_recipe("fitness=macs"), tmp_path, "cpu").stages[0]
    for name, minutes in (("rung1/1", 1), ("rung1/2", 2), ("1", 4)):
        folder = stage.folder / "retrain" / name
        folder.mkdir(parents=True)
        (folder / "result.json").write_text(json.dumps({"minutes": minutes}))
    assert stage.seconds() == {"supernet": 0, "evolution": 0, "retrain": 420}


@pytest.mark.parametrize(
    ("rungs", "message"),
    [
        (
            "{4: 1, 1: 2}",
            "retrain.rungs must be of more networks than retrain.top=1, and of at most evolution.population=6",
        ),
        ("{7: 1}", "retrain.rungs must be of more networks than retrain.top=1, and of at most evolution.population=6"),
        ("{4: 2, 2: 1}", "retrain.rungs must have at least 1 epoch, the more the fewer networks there are, and fewer"),
        ("{4: 3}", "fewer than a training in full, which has 3; got {4: 3}"),
        ("{4: 0}", "retrain.rungs must have at least 1 epoch"),
        ("{four: 1}", "retrain.rungs must be of type int, got 'four'"),
        ("[4, 2]", r"retrain.rungs must be of type"),
    ],
)
def test_rungs_that_cannot_be_are_named(rungs: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message.replace("{", r"\{")):
        _recipe("retrain.top=1", f"retrain.rungs={rungs}")


# ---- few images first ----


def _candidates(count: int) -> list[Candidate]:
    specs = list(itertools.islice(TIED, count))
    return [Candidate(spec, 0, "random", {}, float(place % 7)) for place, spec in enumerate(specs)]


def test_each_round_has_half_the_networks_and_twice_the_images_and_the_last_one_all() -> None:
    rounds = [
        Confirmation(_candidates(1) * count, batches, every, confirm).rounds
        for count, batches, every, confirm in ((1000, 1, 20, 50), (200, 1, 8, 50), (30, 1, 8, 50), (200, 8, 8, 50))
    ]
    assert rounds == [
        [(500, 2), (250, 4), (125, 8), (62, 16), (50, None)], [(100, 2), (50, None)], [(50, None)], [(50, None)]
    ]  # fmt: skip


def test_the_best_of_each_round_go_on_and_the_given_network_always_does() -> None:
    candidates = _candidates(40)
    given = candidates[0].spec  # of the worst
    confirmation = Confirmation(candidates, 1, 8, 5, [given])
    asked = []
    while (ask := confirmation.ask()) is not None:
        specs, batches = ask
        asked.append((len(specs), batches))
        assert given in specs
        before = confirmation.scores[-1] if confirmation.scores else {i: c.fitness for i, c in enumerate(candidates)}
        place = {candidate.spec: index for index, candidate in enumerate(candidates)}
        kept = [before[place[spec]] for spec in specs if spec != given]
        left = [score for index, score in before.items() if candidates[index].spec not in specs]
        assert min(kept) >= max(left)
        assert not any(candidate.fitness is not None for candidate in confirmation.confirmed())
        confirmation.tell({spec: float(place[spec]) for spec in reversed(specs)})
    assert asked == [(21, 2), (11, 4), (6, None)]
    confirmed = {c.spec: c.fitness for c in confirmation.confirmed() if c.fitness is not None}
    assert confirmed == {candidates[index].spec: score for index, score in confirmation.scores[-1].items()}
    again = Confirmation(candidates, 1, 8, 5, [given], confirmation.scores[:2])
    assert again.ask() == (specs, None)


def test_the_noise_of_few_images_is_said_as_it_is() -> None:
    rng = np.random.default_rng(0)
    true, hard = rng.normal(0, 0.05, (60, 1)), rng.normal(0, 1, (1, 400))
    losses = true + hard + rng.normal(0, 0.7, (60, 400))  # what is hard for all is no noise of a difference
    error, share = wrong_order(losses)
    assert error == pytest.approx(0.7 * np.sqrt(2 / 400), rel=0.05)
    pairs = list(itertools.combinations(range(60), 2))
    means = losses.mean(axis=1)
    wrong = sum((means[a] < means[b]) != (true[a, 0] < true[b, 0]) for a, b in pairs) / len(pairs)
    assert share == pytest.approx(wrong, abs=0.04)
    assert "compared by their loss on 400 images; a difference has a standard error of 0.0" in describe_noise(losses)


@pytest.fixture(scope="module")
def screened(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A search that compares networks on few images, and what it said."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("screened") / "run"
    said: list[str] = []
    run = SearchRun(_recipe(*SCREEN), out, device="cpu", command="glit search")
    run.context.say = said.append  # type: ignore[method-assign]
    assert run.run() is not None
    return out, "\n".join(said)


def test_only_networks_that_were_confirmed_on_all_images_have_an_accuracy(screened: tuple[Path, str]) -> None:
    out, said = screened
    lines = [json.loads(line) for line in (out / "joint" / "candidates.jsonl").read_text().splitlines()]
    assert len(lines) == 18
    confirmed = {json.dumps(line["spec"]): line["fitness"] for line in lines if line["fitness"] is not None}
    assert len(confirmed) == 3
    stage = SearchRun(_recipe(*SCREEN), out, "cpu").stages[0]
    scores = stage.fitness().evaluate([GLiTSpec.from_json(spec) for spec in confirmed])
    assert list(scores.values()) == list(confirmed.values())
    best = max(confirmed.values())
    assert json.loads((out / "joint" / "retrained.json").read_text())[0]["fitness"] == best
    assert json.loads((out / "joint" / "front.json").read_text())["macs"][-1]["fitness"] == best
    assert "networks are compared by their loss on 40 images; a difference has a standard error of" in said
    assert said.index("standard error") < said.index("generation 1/3")
    assert "comparing 9 networks on 80 images" in said
    assert "comparing 3 networks on all images" in said
    assert "inherited accuracy" in write_report(out).read_text()


def test_a_screened_search_stopped_anywhere_goes_on_to_the_same_end(
    screened: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, _ = screened
    shutil.copytree(out / "joint" / "supernet", tmp_path / "joint" / "supernet")
    calls = []

    def interrupt(self: Evaluator, specs: Any, num_batches: int, losses: Any = Evaluator.losses) -> Any:
        calls.append(specs)
        if len(calls) == 4:  # the noise and two generations before
            raise InterruptedError
        return losses(self, specs, num_batches)

    with monkeypatch.context() as patch:
        patch.setattr(Evaluator, "losses", interrupt)
        with pytest.raises(InterruptedError):
            SearchRun(_recipe(*SCREEN), tmp_path, device="cpu").run()
    settings = [word for text in (*SHARED, *SCREEN) for word in ("--set", text)]
    command = [sys.executable, "-c", KILLED_IN_THE_LAST_ROUND, "search", str(FIXTURES / "search.yaml"), *settings]
    killed = subprocess.run([*command, "--out", str(tmp_path)], env=ENVIRONMENT, capture_output=True, timeout=200)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    state = json.loads((tmp_path / "joint" / "evolution.json").read_text())
    assert [len(scores) for scores in state["rounds"]] == [9]
    assert SearchRun(_recipe(*SCREEN), tmp_path, device="cpu").run() is not None
    for name in ("joint/candidates.jsonl", "joint/retrained.json", "winner.json"):
        assert (tmp_path / name).read_text() == (out / name).read_text()


def test_several_processes_screen_the_same(
    screened: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, _ = screened
    stage = SearchRun(_recipe(*SCREEN), out, "cpu").stages[0]
    specs = list(itertools.islice(stage.space, 7))
    alone = stage._score(specs, 2)
    shares: list[Any] = []
    monkeypatch.setattr(stage.context, "world_size", 3)
    monkeypatch.setattr(stage.context, "gather", lambda items: shares.extend(items) or sorted(shares))
    for rank in (2, 0):
        monkeypatch.setattr(stage.context, "rank", rank)
        with pytest.raises(ValueError, match="zip"):  # the others have not scored their shares yet
            stage._score(specs, 2)
    monkeypatch.setattr(stage.context, "rank", 1)
    assert stage._score(specs, 2) == alone
    assert [len(scores) for _, scores in sorted(shares)] == [3, 2, 2]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("evaluation.screen_images=0", "evaluation.screen_images must be at least 1, or null, got 0"),
        ("evaluation.confirm=1", "evaluation.confirm must be at least 2, as many as get a stand-alone training, got 1"),
        ("fitness=macs", "evaluation.screen_images must be null for fitness macs, which says nothing of single images"),
    ],
)
def test_what_cannot_be_screened_is_named(override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        _recipe("evaluation.screen_images=40", override)
