"""Promises of recipes and of the trainer."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from glit_models import hub
from glit_models.errors import GlitError, RecipeError, TrainingError
from glit_models.training import Trainer, load_recipe, shipped_recipes
from glit_models.training.checkpoints import load_state, save_state
from glit_models.training.recipe import Recipe

FIXTURES = Path(__file__).parent / "fixtures"
TINY = str(FIXTURES / "tiny.yaml")
ROOT = f"data.root={FIXTURES / 'fashion-mnist'}"


def _tiny(*overrides: str) -> Recipe:
    return load_recipe(TINY, [ROOT, *overrides])


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted."""
    out = tmp_path_factory.mktemp("finished")
    torch.set_num_threads(1)
    assert Trainer(_tiny(), out, device="cpu").run() is not None
    return out


def _same_end(run: Path, reference: Path) -> None:
    ours, theirs = load_state(run), load_state(reference)
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
        ("optim.epochs=0", "optim.epochs must be at least 1, got 0"),
        ("precision=fp8", "precision must be fp32 or bf16, got 'fp8'"),
        ("optim.batch_size=7", "optim.batch_size must be even with mixup or cutmix, got 7"),
        ("optim=3", "optim must be a section of keys, got 3"),
        ("epochs", "--set takes key=value, got 'epochs'"),
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


def test_a_run_learns_and_leaves_its_result_and_metrics(finished: Path):
    result = json.loads((finished / "result.json").read_text())
    assert result["validation_top1"] > 20  # chance is 10
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
    while Trainer(_tiny(), tmp_path, device="cpu", max_minutes=0.002).run() is None:
        stops += 1
    assert stops > 1
    assert "the same command goes on from here" in capsys.readouterr().err
    _same_end(tmp_path, finished)


def test_a_run_killed_at_any_moment_goes_on_to_the_same_weights(finished: Path, tmp_path: Path):
    command = [sys.executable, "-m", "glit_models", "train", TINY, "--set", ROOT, "--out", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    for seconds in (0.15, 0.4, 0.9):  # after the first checkpoint is there
        process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
        waited = time.monotonic()
        while not (tmp_path / "last.pt").exists() and process.poll() is None and time.monotonic() - waited < 60:
            time.sleep(0.01)
        time.sleep(seconds)
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run(command, env=environment, check=True, stderr=subprocess.DEVNULL)
    _same_end(tmp_path, finished)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines if "epoch" in line] == [1, 2, 3, 4, 5, 6]


def test_a_damaged_checkpoint_is_named_and_the_one_before_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    save_state(tmp_path, {"step": 1})
    save_state(tmp_path, {"step": 2})
    (tmp_path / "last.pt").write_bytes((tmp_path / "last.pt").read_bytes()[:100])
    state = load_state(tmp_path)
    assert state == {"step": 1}
    assert "last.pt is damaged" in capsys.readouterr().err


def test_no_readable_checkpoint_is_an_error_not_a_new_start(tmp_path: Path):
    (tmp_path / "last.pt").write_bytes(b"nothing")
    with pytest.raises(TrainingError, match="no readable checkpoint is left"):
        load_state(tmp_path)


def test_another_recipes_folder_is_refused_and_the_difference_named(finished: Path):
    with pytest.raises(RecipeError, match=r"another recipe \(epochs: 6 -> epochs: 7\)"):
        Trainer(_tiny("optim.epochs=7"), finished, device="cpu")


def test_a_diverging_run_stops_with_its_place(tmp_path: Path):
    trainer = Trainer(_tiny("optim.lr=1e30", "optim.clip_grad=null", "optim.warmup_epochs=0"), tmp_path, device="cpu")
    with pytest.raises(
        TrainingError, match=r"the loss is \S+ at step \d+ \(epoch 0, batch \d+\).*try a lower optim.lr"
    ):
        trainer.run()


def test_a_batch_larger_than_the_data_is_refused(tmp_path: Path):
    with pytest.raises(RecipeError, match="optim.batch_size=302 is more than the 300 pictures to train on"):
        Trainer(_tiny("optim.batch_size=302"), tmp_path, device="cpu")


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match="file/run cannot be made"):
        Trainer(_tiny(), tmp_path / "file" / "run", device="cpu")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.name=glit_huge", "model.name 'glit_huge' is no model; `glit list` shows what there is"),
        ("model.name=resnet18", "model.name 'resnet18' cannot be built"),
        ("model.img_size=33", "img_size must be a multiple of patch_size=8, got 33 x 33"),
        ("model.spec=nowhere.json", "spec file nowhere.json cannot be read"),
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
    shipped = hub.registry()["glit_tiny.fashion_mnist"]
    assert config["label_names"] == ["dark", "light"]
    assert tuple(config["pretrained_cfg"]["mean"]) == shipped.mean


def test_a_mistake_leaves_no_folder_that_would_refuse_the_corrected_command(tmp_path: Path):
    out = tmp_path / "run"
    for wrong in ("data.root=nowhere", "model.name=glit_huge"):
        with pytest.raises(GlitError):
            Trainer(_tiny(wrong), out, device="cpu")
    assert not out.exists()


def test_a_signal_to_the_whole_group_saves_and_leaves(tmp_path: Path):
    command = [sys.executable, "-m", "glit_models", "train", TINY, "--set", ROOT, "--set", "data.num_workers=1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(
        [*command, "--out", str(tmp_path)], env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    waited = time.monotonic()
    while not (tmp_path / "last.pt").exists() and process.poll() is None and time.monotonic() - waited < 60:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "stopped by SIGTERM" in err
    assert "Traceback" not in err
