"""Promises of what makes a search cheaper: short trainings before long ones, and few images before all."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from glit_models.search import SearchRun, load_search_recipe
from glit_models.search.recipe import SearchRecipe
from glit_models.search.stage import Retrained, Stage

from glit_models import GLiTSpec, count_macs
from glit_models.errors import RecipeError
from glit_models.training import Recipe

FIXTURES = Path(__file__).parent / "fixtures"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
SHARED = (f"train.data.root={FIXTURES / 'fashion-mnist'}", "train.data.limit=60", "train.optim.epochs=3")
DIE = """
import os, signal, sys
from glit_models import cli
from {module} import {owner}
original, left = {owner}.{name}, {after}
def deadly(*args, **keywords):
    global left
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args, **keywords)
{owner}.{name} = deadly
cli.main(sys.argv[1:])
"""


def _recipe(*overrides: str) -> SearchRecipe:
    return load_search_recipe(str(FIXTURES / "search.yaml"), [*SHARED, *overrides])


def _search(out: Path, *overrides: str) -> dict[str, Any]:
    torch.set_num_threads(1)
    result = SearchRun(_recipe(*overrides), out, device="cpu", command="glit search").run()
    assert result is not None
    return result


def _kill(out: Path, overrides: tuple[str, ...], module: str, owner: str, name: str, after: int) -> None:
    """Search until a method is called for this time, and kill the process there."""
    program = DIE.format(module=module, owner=owner, name=name, after=after)
    settings = [word for text in (*SHARED, *overrides) for word in ("--set", text)]
    command = [sys.executable, "-c", program, "search", str(FIXTURES / "search.yaml"), *settings, "--out", str(out)]
    killed = subprocess.run(command, env=ENVIRONMENT, capture_output=True, timeout=200)
    assert killed.returncode == -signal.SIGKILL, killed.stderr


def _read(path: Path) -> Any:
    return json.loads(path.read_text())


# ---- retraining by successive halving ----


Trained = list[tuple[str, int, dict[str, Any]]]  # folder, epochs, network


def _retrain(out: Path, monkeypatch: pytest.MonkeyPatch, stage: Stage | None = None) -> tuple[list[Retrained], Trained]:
    """A stage whose trainings give an accuracy at once: by length, and the better the smaller the network is."""
    trained: Trained = []

    def train(self: Stage, recipe: Recipe, folder: Path) -> float:
        spec = GLiTSpec.from_dict(recipe.model.spec)
        trained.append((folder.relative_to(self.folder).as_posix(), recipe.optim.epochs, recipe.model.spec))
        return 30.0 * recipe.optim.epochs - count_macs(spec, 32, 10) / 1e5

    monkeypatch.setattr(Stage, "_train", train)
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
