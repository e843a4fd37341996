"""Tests of trackers: they get the run's numbers, and a failing one only prevents its own start."""

from pathlib import Path
from typing import Any, ClassVar

import accelerate.tracking
import pytest

from glit_models import cli
from glit_models.training.records import Records


class Tracker:
    """Keeps what it gets."""

    requires_logging_directory: ClassVar[bool] = True
    made: ClassVar[list["Tracker"]] = []

    def __init__(self, project: str, folder: str) -> None:
        self.calls: list[tuple[Any, ...]] = [("made", project, folder)]
        self.made.append(self)

    def start(self) -> None:
        self.calls.append(("start",))

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.calls.append(("config", values))

    def log(self, values: dict[str, float], step: int) -> None:
        if "broken" in values:
            raise ConnectionError("the server is gone\nand more")
        self.calls.append(("log", values, step))

    def finish(self) -> None:
        self.calls.append(("finish",))


@pytest.fixture(autouse=True)
def _with_tracker(monkeypatch: pytest.MonkeyPatch) -> None:
    Tracker.made.clear()
    monkeypatch.setitem(accelerate.tracking.LOGGER_TYPE_TO_CLASS, "wandb", Tracker)
    monkeypatch.setattr("glit_models.training.tracking._RUN_NAME", {})


def test_a_tracker_gets_the_recipe_and_every_number_and_is_ended(tmp_path: Path) -> None:
    records = Records(tmp_path / "run", ["tensorboard", "wandb"])
    (tmp_path / "run").mkdir()
    records.begin(0, 0, {"model": {"name": "glit_tiny", "freeze": ()}, "seed": 3})
    records.write({"step": 50, "loss": 1.5})
    records.write({"step": 60, "epoch": 1, "validation_top1": 40.0})
    records.close()
    assert Tracker.made[0].calls == [
        ("made", "glit-models", str(tmp_path / "run")),
        ("start",),
        ("config", {"model.name": "glit_tiny", "model.freeze": "()", "seed": 3}),
        ("log", {"loss": 1.5}, 50),
        ("log", {"epoch": 1, "validation_top1": 40.0}, 60),
        ("finish",),
    ]


def test_a_run_that_goes_back_begins_its_trackers_again(tmp_path: Path) -> None:
    records = Records(tmp_path, ["wandb"])
    records.begin(0, 0, {})
    records.begin(0, 0, {})
    assert [tracker.calls[-1][0] for tracker in Tracker.made] == ["finish", "config"]
    records.close()


def test_a_tracker_that_fails_is_left_out_and_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = Records(tmp_path, ["wandb"])
    records.begin(0, 0, {})
    for step in (1, 2):
        records.write({"step": step, "broken": 1.0})
    records.close()
    assert (
        capsys.readouterr().err
        == "glit: wandb takes no more numbers (the server is gone); the run continues without it\n"
    )
    assert len(records.entries(lambda entry: True)) == 2
    with records.path.open("a") as file:
        file.write('{"step}\n[1]\n{"step": "1"}\n' + "[" * 100_000 + "\n")  # damaged lines
    assert len(records.entries(lambda entry: True)) == 2


def test_trackers_that_are_unknown_or_cannot_start_end_a_run_before_it_begins(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", lambda: ["wandb"])
    arguments = ["train", "fractal_pretrain", "--out", str(tmp_path / "run"), "--device", "cpu", "--track"]
    for names, message in (("wandb,nothing", "must be of aim, "), ("mlflow", "mlflow is not installed; pip install")):
        assert cli.main([*arguments, names]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert "--track" in error
        assert not (tmp_path / "run").exists()
