"""Tests of recipes and of the trainer."""

import errno
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

import glit_models
from glit_models.errors import GlitError, RecipeError, RunError, TrainingError, WriteError
from glit_models.runs.lock import lock_folder
from glit_models.runs.state import StateFiles, read_tensors, write_tensors
from glit_models.training import Trainer, load_recipe, shipped_recipes
from glit_models.training.recipe import Recipe
from glit_models.training.records import Records
from glit_models.weights import resolve

FIXTURES = Path(__file__).parent / "fixtures"
TINY = str(FIXTURES / "tiny.yaml")
ROOT = f"data.root={FIXTURES / 'fashion-mnist'}"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def _tiny(*overrides: str) -> Recipe:
    return load_recipe(TINY, [ROOT, *overrides])


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted."""
    out = tmp_path_factory.mktemp("finished")
    torch.set_num_threads(1)
    assert Trainer(_tiny(), out, device="cpu").run() is not None
    return out


def _state_files(folder: Path) -> StateFiles:
    return StateFiles(folder / "last.pt", folder / "previous.pt")


def _load(run: Path) -> dict[str, Any] | None:
    return _state_files(run).load(read_tensors)


def _same_end(run: Path, reference: Path) -> None:
    ours, theirs = _load(run), _load(reference)
    assert ours is not None
    assert theirs is not None
    assert ours["step"] == theirs["step"]
    for part in ("model", "ema"):
        assert all(torch.equal(ours[part][key], theirs[part][key]) for key in theirs[part])
    best, expected = load_file(run / "best.safetensors"), load_file(reference / "best.safetensors")
    assert all(torch.equal(best[key], expected[key]) for key in expected)


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_shipped_recipe_is_valid_and_opens_with_its_command(name: str):
    assert isinstance(load_recipe(name), Recipe)
    path = Path(sys.modules[Recipe.__module__].__file__ or "").with_name("recipes") / f"{name}.yaml"
    assert f"glit train {name} --out" in path.read_text()[:400]


def test_a_recipe_round_trips_through_yaml(tmp_path: Path):
    path = tmp_path / "recipe.yaml"
    path.write_text(_tiny().to_yaml())
    assert load_recipe(str(path)) == _tiny()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lrr=1", "unknown key optim.lrr; did you mean optim.lr?"),
        ("sed=1", "unknown key sed; did you mean seed?"),
        ("optim.epochs=many", "optim.epochs must be of type int, got 'many'"),
        ("optim.epochs=0", "optim.epochs must be from 1 to 1000000, got 0"),
        ("precision=fp8", "precision must be fp32 or bf16, got 'fp8'"),
        (
            "optim.batch_size=7",
            "optim.batch_size must be a multiple of 2 (processes x accumulated parts x 2 for mixup and cutmix), got 7",
        ),
        ("optim=3", "optim must be a section of keys, got 3"),
        ("epochs", "an override must be KEY=VALUE, got 'epochs'"),
        (
            "data.train_on_validation=true",
            "data.train_on_validation needs keep=last: no images are left to choose an epoch by",
        ),
        ("keep=newest", "keep must be best or last, got 'newest'"),
        ("data.split_seed=-1", "data.split_seed must be at least 0, or null, got -1"),
        ("augment={batched: true, re_prob: 0.1}", "augment.re_prob cannot be set with augment.batched"),
        ("augment={batched: true, repeats: 3}", "augment.repeats cannot be set with augment.batched"),
        ("data.mean=[1, x]", "data.mean must be of type float, got 'x'"),
    ],
)
def test_a_wrong_recipe_is_one_line_that_names_the_key(override: str, message: str):
    with pytest.raises(RecipeError) as error:
        _tiny(override)
    assert str(error.value) == message


def test_an_unknown_recipe_lists_the_shipped_ones():
    with pytest.raises(RecipeError, match=r"no recipe 'cifar'.*fashion_mnist"):
        load_recipe("cifar")


def test_rates_may_be_written_as_yaml_reads_them_wrongly():
    assert _tiny("optim.lr=1e-4").optim.lr == 1e-4


def _arguments(out: Path, *overrides: str) -> list[str]:
    """`glit train` of the tiny recipe."""
    settings = [word for text in (ROOT, *overrides) for word in ("--set", text)]
    return ["train", TINY, *settings, "--out", str(out)]


def _start(out: Path, *overrides: str, processes: int = 1) -> list["subprocess.Popen[str]"]:
    """The run on so many processes, under the variables that `torchrun` and `accelerate launch` set."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(processes):
        shared = {
            "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes,
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
        } if processes > 1 else {}  # fmt: skip
        started.append(
            subprocess.Popen(
                [sys.executable, "-m", "glit_models", *_arguments(out, *overrides)],
                env={**ENVIRONMENT, **{key: str(value) for key, value in shared.items()}},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
        )
    return started


def _end(started: list["subprocess.Popen[str]"], status: int = 0) -> tuple[str, str]:
    """What all processes printed, once they have ended with this status."""
    printed = [process.communicate(timeout=120) for process in started]
    assert [process.returncode for process in started] == [status] * len(started), printed
    return "".join(out for out, _ in printed), "".join(err for _, err in printed)


def _wait_for_checkpoint(out: Path, process: "subprocess.Popen[str]") -> None:
    began = time.monotonic()
    while not (out / "last.pt").exists() and process.poll() is None and time.monotonic() - began < 120:
        time.sleep(0.01)


def _epoch_losses(out: Path) -> list[float]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line["train_loss"] for line in lines if "train_loss" in line]


def test_a_run_learns_and_leaves_its_result_and_metrics(finished: Path):
    result = json.loads((finished / "result.json").read_text())
    assert result["validation_top1"] > 15  # chance is 10
    assert 0 <= result["test_top1"] <= 100
    epochs = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    losses = [line["train_loss"] for line in epochs if "train_loss" in line]
    assert len(losses) == 6
    assert losses[-1] < losses[0]


def test_a_finished_run_is_not_scored_on_the_test_set_again(finished: Path, capsys: pytest.CaptureFixture[str]):
    before = (finished / "result.json").stat().st_mtime_ns
    result = Trainer(_tiny(), finished, device="cpu").run()
    assert result == json.loads((finished / "result.json").read_text())
    assert (finished / "result.json").stat().st_mtime_ns == before
    assert "is finished" in capsys.readouterr().err


def test_a_run_stopped_for_time_goes_on_to_the_same_weights(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    stops = 0
    while Trainer(_tiny(), tmp_path, device="cpu", max_minutes=0.005).run() is None:
        stops += 1
    assert stops > 1
    assert "run the same command to resume" in capsys.readouterr().err
    _same_end(tmp_path, finished)


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_killed_at_any_moment_goes_on_to_the_same_weights(processes: int, finished: Path, tmp_path: Path):
    out, reference, overrides = tmp_path / "run", finished, ()
    if processes > 1:
        reference, overrides = tmp_path / "reference", ("optim.batch_size=60",)
        _end(_start(reference, *overrides, processes=processes))
    chance = random.Random(0)
    for _ in range(2 if processes == 1 else 3):
        started = _start(out, *overrides, processes=processes)
        _wait_for_checkpoint(out, started[0])
        time.sleep(chance.uniform(0, 1))
        for process in started:
            process.kill()
            process.communicate()
    if processes == 1:
        assert Trainer(_tiny(), out, device="cpu").run() is not None
    else:
        _end(_start(out, *overrides, processes=processes))
    _same_end(out, reference)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines if "epoch" in line] == [1, 2, 3, 4, 5, 6]


def test_a_kill_in_the_middle_of_writing_a_checkpoint_loses_nothing(finished: Path, tmp_path: Path):
    program = (
        "import os, signal, sys, torch\n"
        "from glit_models import cli\n"
        "write, calls = torch.save, []\n"
        "def cut_short(state, target):\n"
        "    write(state, target)\n"
        "    calls.append(target)\n"
        "    if len(calls) == 8:\n"
        "        target.file.truncate(target.file.tell() // 2)\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "torch.save = cut_short\n"
        "cli.main(sys.argv[1:])\n"
    )
    command = [sys.executable, "-c", program, *_arguments(tmp_path)]
    killed = subprocess.run(command, env=ENVIRONMENT, capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    assert list(tmp_path.glob("*.tmp"))
    assert Trainer(_tiny(), tmp_path, device="cpu").run() is not None
    _same_end(tmp_path, finished)
    assert not list(tmp_path.glob("*.tmp"))


def test_two_processes_give_the_losses_of_one(tmp_path: Path):
    # Stochastic depth draws for each process; everything else, BatchNorm and mixing too, is of the whole batch.
    overrides = ("model.drop_path_rate=0", "optim.batch_size=60", "augment.cutmix=0.5", "optim.epochs=2")
    assert Trainer(_tiny(*overrides), tmp_path / "one", device="cpu").run() is not None
    out, err = _end(_start(tmp_path / "two", *overrides, processes=2))
    assert out.count("the model is in") == 1
    assert err.count("epoch 2/2") == 1
    losses = _epoch_losses(tmp_path / "one")
    assert len(losses) == 2
    assert _epoch_losses(tmp_path / "two") == pytest.approx(losses, rel=1e-6)


def test_a_damaged_checkpoint_is_named_and_the_one_before_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    files = _state_files(tmp_path)
    files.save(lambda path: write_tensors({"step": 1}, path))
    files.save(lambda path: write_tensors({"step": 2}, path))
    (tmp_path / "last.pt").write_bytes((tmp_path / "last.pt").read_bytes()[:100])
    assert files.load(read_tensors) == {"step": 1}
    assert "last.pt is damaged" in capsys.readouterr().err


def test_no_readable_checkpoint_is_an_error_not_a_new_start(tmp_path: Path):
    (tmp_path / "last.pt").write_bytes(b"nothing")
    with pytest.raises(RunError, match="last.pt: no readable state is left"):
        _load(tmp_path)


def test_another_recipes_folder_is_refused_and_the_difference_named(finished: Path):
    with pytest.raises(RecipeError, match=r"another recipe \(optim.epochs: 6 -> 7\)"):
        Trainer(_tiny("optim.epochs=7"), finished, device="cpu")


def _poison(trainer: Trainer, step: int, times: int) -> None:
    """Let the loss of a step be no number, so often."""
    original, left = trainer.objective.loss, [times]

    def loss(logits: Tensor, images: Tensor, targets: Tensor) -> Tensor:
        value = original(logits, images, targets)
        if trainer.step == step and left[0]:
            left[0] -= 1
            return value * float("nan")
        return value

    trainer.objective.loss = loss  # type: ignore[method-assign]


def test_a_diverged_run_stops_with_its_place_and_the_last_good_checkpoint(tmp_path: Path):
    trainer = Trainer(_tiny("checkpoint_minutes=100"), tmp_path, device="cpu")
    _poison(trainer, step=25, times=1)
    with pytest.raises(
        TrainingError,
        match=r"the loss is nan at step 25 \(epoch 2, batch 5\); the last good checkpoint, of step 20, is in",
    ):
        trainer.run()
    state = _load(tmp_path)
    assert state is not None
    assert all(bool(value.isfinite().all()) for value in state["model"].values() if value.is_floating_point())


def test_a_huge_loss_counts_as_divergence(tmp_path: Path):
    trainer = Trainer(_tiny("optim.lr=1e3", "optim.clip_grad=null", "optim.warmup_epochs=0"), tmp_path, device="cpu")
    with pytest.raises(TrainingError, match=r"the loss is \S+ at step \d+ .*try a lower optim.lr, or set retries"):
        trainer.run()


def test_retries_go_back_to_the_last_checkpoint_with_half_the_rate(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    trainer = Trainer(_tiny("retries=2", "optim.epochs=2"), tmp_path, device="cpu")
    _poison(trainer, step=12, times=2)
    assert trainer.run() is not None
    err = capsys.readouterr().err
    assert "at step 12 (epoch 1, batch 2); going back to step 12, with 0.5 of the rate" in err
    assert "with 0.25 of the rate" in err
    state = _load(tmp_path)
    assert state is not None
    assert state["retries_used"] == 2

    again = Trainer(_tiny("retries=2", "seed=1"), tmp_path / "again", device="cpu")
    _poison(again, step=12, times=3)
    with pytest.raises(TrainingError, match="after 2 tries with lower rates"):
        again.run()


def test_a_folder_in_use_by_another_process_is_refused(tmp_path: Path):
    with lock_folder(tmp_path), pytest.raises(RunError, match="is in use by another process"):
        Trainer(_tiny(), tmp_path, device="cpu").run()
    assert not (tmp_path / "recipe.yaml").exists()


def test_a_full_disk_is_one_line_and_the_checkpoint_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    trainer = Trainer(_tiny(), tmp_path, device="cpu")

    def save_twice_then_fail(state: Any, target: Any, written: list[Any] = []) -> None:  # noqa: B006
        if len(written) == 2:
            target.write(b"part")
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(target)
        write(state, target)

    write = torch.save
    monkeypatch.setattr(torch, "save", save_twice_then_fail)
    with pytest.raises(WriteError, match=r"last.pt cannot be written: No space left on device") as error:
        trainer.run()
    assert "\n" not in str(error.value)
    assert _load(tmp_path) is not None
    assert not list(tmp_path.glob("*.tmp"))


def test_a_run_draws_its_curves_and_writes_events_where_tensorboard_is(finished: Path):
    with Image.open(finished / "curves.png") as curves:
        assert curves.size[0] > 600
    pytest.importorskip("tensorboard")
    assert list((finished / "tensorboard").glob("events*"))


def test_a_figure_that_cannot_be_drawn_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    records = Records(tmp_path)
    records.write({"step": 1, "epoch": 1, "train_loss": 2.0})
    with monkeypatch.context() as patch:
        patch.setattr("glit_models.training.records.new_figure", lambda **options: 1 / 0)
        records.draw()
        records.draw()
    assert capsys.readouterr().err == (
        f"glit: curves.png is not drawn (division by zero); the numbers are in {tmp_path}/metrics.jsonl\n"
    )
    records.draw()
    assert (tmp_path / "curves.png").is_file()


def test_a_backend_of_a_notebook_is_not_imported(tmp_path: Path):
    package = f"p = sys.modules['glit_models'] = types.ModuleType('p'); p.__path__ = {glit_models.__path__!r}"
    draw = "from glit_models.runs.figures import new_figure; new_figure().savefig('figure.png')"
    code = f"import sys, types; {package}; {draw}"  # without torch, which takes seconds to import
    environment = os.environ | {"MPLBACKEND": "module://of_a_notebook"}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True, timeout=60)
    assert (tmp_path / "figure.png").is_file()


def test_curves_are_drawn_at_most_every_half_minute_and_whenever_a_run_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    drawn: list[int] = []  # epochs done at each drawing
    draw = Records.draw

    def count(records: Records) -> None:
        drawn.append(len(records.entries(lambda entry: "epoch" in entry)))
        draw(records)

    monkeypatch.setattr(Records, "draw", count)
    recipe = _tiny("checkpoint_minutes=100", "optim.epochs=4")
    trainer = Trainer(recipe, tmp_path, device="cpu")
    _poison(trainer, step=35, times=1)
    trainer.records.drawn -= 31  # seconds
    with pytest.raises(TrainingError, match="the loss is nan at step 35"):
        trainer.run()
    assert drawn == [1, 3]
    assert Trainer(recipe, tmp_path, device="cpu").run() is not None
    assert drawn == [1, 3, 4]


def test_a_run_out_of_patience_ends_with_its_best_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    scores = iter([20.0, 30.0, 25.0, 30.0, 99.0])
    monkeypatch.setattr("glit_models.training.selection.Selection.score", lambda *args: next(scores))
    result = Trainer(_tiny("patience=2", "optim.epochs=9"), tmp_path, device="cpu", score_test=False).run()
    assert result is not None
    assert (result["epoch"], result["validation_top1"], result["epochs"]) == (2, 30.0, 4)
    assert "glit: no better validation score since epoch 2; stopped after 4" in capsys.readouterr().err
    with pytest.raises(RecipeError, match="patience needs keep=best"):
        _tiny("patience=2", "keep=last")


def test_a_batch_larger_than_the_data_is_refused(tmp_path: Path):
    with pytest.raises(RecipeError, match="optim.batch_size=302 is more than the 300 images to train on"):
        Trainer(_tiny("optim.batch_size=302"), tmp_path, device="cpu")


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError, match="file/run cannot be made or written to"):
        Trainer(_tiny(), tmp_path / "file" / "run", device="cpu").run()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.name=glit_huge", "model.name 'glit_huge' is no model; `glit list` shows what there is"),
        ("model.name=resnet18", "model.name 'resnet18' cannot be built"),
        ("model.img_size=33", "img_size must be a multiple of patch_size=8, got 33 x 33"),
        ("model.spec=nowhere.json", "spec file nowhere.json cannot be read"),
        ("model.global_pool=max", "cannot be built: global_pool must be one of '', 'avg', 'token', got 'max'"),
    ],
)
def test_a_model_that_cannot_be_built_is_one_line(override: str, message: str, tmp_path: Path):
    with pytest.raises(GlitError, match=message) as error:
        Trainer(_tiny(override), tmp_path, device="cpu")
    assert "\n" not in str(error.value)


def test_fine_tuning_starts_from_weights_and_keeps_their_preprocessing(tmp_path: Path):
    for split in ("train", "val"):
        for label, colour in (("dark", 40), ("light", 210)):
            (tmp_path / split / label).mkdir(parents=True)
            for index in range(4):
                Image.new("RGB", (70, 64), (colour, colour + index, colour)).save(
                    tmp_path / split / label / f"{index}.png"
                )
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {{name: glit_tiny.fashion_mnist, pretrained: true, img_size: 64}}\n"
        f"data: {{dataset: folder, root: {tmp_path}, num_workers: 0}}\n"
        "optim: {batch_size: 4, epochs: 3, lr: 1e-3, ema_decay: null}\n"
    )
    result = Trainer(load_recipe(str(recipe)), tmp_path / "run", device="cpu").run()
    assert result is not None
    assert result["validation_top1"] == 100
    assert "test_top1" not in result
    config = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    shipped = resolve.registry()["glit_tiny.fashion_mnist"]
    assert config["label_names"] == ["dark", "light"]
    assert tuple(config["pretrained_cfg"]["mean"]) == shipped.mean


def test_a_mistake_leaves_no_folder_that_would_refuse_the_corrected_command(tmp_path: Path):
    out = tmp_path / "run"
    for wrong in ("data.root=nowhere", "model.name=glit_huge"):
        with pytest.raises(GlitError):
            Trainer(_tiny(wrong), out, device="cpu")
    assert not out.exists()


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.extended)])
def test_a_signal_to_the_whole_group_saves_and_leaves(processes: int, tmp_path: Path):
    started = _start(tmp_path, "data.num_workers=1", "optim.epochs=500", "optim.batch_size=60", processes=processes)
    _wait_for_checkpoint(tmp_path, started[0])
    time.sleep(1)
    for process in started:
        os.killpg(process.pid, signal.SIGTERM)
    _, err = _end(started, 128 + signal.SIGTERM)
    assert "Traceback" not in err
    assert err.count("stopped by SIGTERM") == 1
    state = _load(tmp_path)
    assert state is not None
    assert f"at step {state['step']} of" in err


@pytest.mark.parametrize("kind", ["fractals", "smoke"])
def test_fractals_need_no_data(kind: str, tmp_path: Path):
    overrides = ["data.fractals.instances=8", "optim.epochs=2", "optim.batch_size=20", "optim.warmup_epochs=0"]
    if kind == "fractals":
        overrides += ["data.dataset=fractals", "data.hold_out=0", "data.fractals.num_classes=12"]
    recipe = load_recipe(TINY if kind == "fractals" else "smoke", overrides)
    assert Trainer(recipe, tmp_path, device="cpu").run() is not None
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["num_classes"] == recipe.data.fractals.num_classes


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.fractals.num_clases=3", "unknown key data.fractals.num_clases; did you mean data.fractals.num_classes?"),
        ("data.hold_out=5", "data.hold_out cannot be set for fractals, which hold out images of their own"),
        ("augment.repeats=3", "augment.repeats cannot be set for fractals; data.fractals.instances repeats them"),
        ("model.img_size_shares={64: 0}", "model.img_size_shares must be sizes with positive shares, or null"),
        ("model.img_size_shares={a: 1}", "model.img_size_shares must be of type int, got 'a'"),
    ],
)
def test_what_fractals_cannot_have_is_one_line(override: str, message: str):
    with pytest.raises(RecipeError) as error:
        load_recipe("smoke", [override])
    assert message in str(error.value)
