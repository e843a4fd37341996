"""Tests of `glit finetune`, and of the recipes for folders of images."""

import dataclasses
import json
import os
import shlex
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from weight_folders import CLASSES, SPEC

from glit_models.cli import main
from glit_models.data import sources
from glit_models.evaluate import accuracy_interval
from glit_models.training import Trainer, finetuning, load_recipe
from glit_models.training.finetuning import choose_batch_size, choose_epochs, plan
from glit_models.training.objective import Objective, class_weights
from glit_models.training.recipe import AugmentSection, DistillSection
from glit_models.weights import resolve
from glit_models.weights.folder import save_folder

COLOURS = {"blue": (40, 40, 200), "green": (40, 200, 40), "red": (200, 40, 40)}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A weight folder to start from: two blocks, 64 pixels."""
    folder = tmp_path_factory.mktemp("weights") / "small"
    torch.manual_seed(0)
    spec = dataclasses.replace(SPEC, blocks=SPEC.blocks[2:4])
    save_folder(timm.create_model("glit_tiny", spec=spec, img_size=64, num_classes=10), folder, class_names=CLASSES)
    return str(folder)


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)


def fill(folder: Path, count: int = 20, colours: tuple[str, ...] = tuple(COLOURS)) -> Path:
    """Noisy images, by their main colour."""
    rng = np.random.default_rng(0)
    for name in colours:
        (folder / name).mkdir(parents=True)
        for number in range(count):
            pixels = np.clip(COLOURS[name] + rng.normal(0, 40, (70, 90, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.jpg")
    return folder


def finetune(*args: str) -> int:
    return main(["finetune", *args, "--device", "cpu"])


def test_a_folder_of_classes_becomes_a_model_that_tells_them_apart(small: str, capsys: pytest.CaptureFixture[str]):
    fill(Path("colours"))
    assert finetune("colours", "--model", small, "--epochs", "8") == 0
    out = capsys.readouterr().out
    for line in (
        "images: 60 of 3 classes in colours (blue 20, green 20, red 20)",
        f"model: local-dir:{small}, as asked",
        "validation: 12 of them, each class its share, as there is no validation split (--set data.hold_out=VALUE)",
        "image size: 64 pixels, the model's own (--img-size)",
        "batch: 8 of 48 images (--batch-size)",
        "epochs: 8, as asked",
        "run: runs/colours; the same command resumes it",
        "12 images say only so much: the rate on others like them may be",
        "these images also chose the epoch",
    ):
        assert line in out
    assert json.loads(Path("runs/colours/result.json").read_text())["validation_top1"] > 60  # of guessing: 33
    config = json.loads(Path("runs/colours/model/config.json").read_text())
    assert config["label_names"] == ["blue", "green", "red"]
    entry = json.loads(Path("runs/colours/model/entry.json").read_text())
    assert entry["recipe"].startswith("glit finetune colours --model")


def test_the_commands_to_try_next_work_as_they_are_printed(small: str, capsys: pytest.CaptureFixture[str]):
    fill(Path("my colours/train"), 8)
    fill(Path("my colours/val"), 2)
    fill(Path("my colours/test"), 3)
    assert finetune("my colours", "--model", small, "--epochs", "1", "--out", "run") == 0
    out = capsys.readouterr().out
    assert "validation: the 6 images of its split" in out
    assert "test: the images of its split, scored once at the end" in out
    assert "of 9 images), epoch 1 was the best" in out
    commands = out.partition("next:\n")[2].splitlines()
    assert [shlex.split(command)[:2] for command in commands] == [["glit", c] for c in ("predict", "eval", "publish")]
    for command in (commands[0], commands[2]):
        assert main(shlex.split(command.replace("LICENSE", "mit"))[1:]) == 0
    card = Path("run/published/README.md").read_text()
    for line in (
        "Data: my colours.",
        f"Origin: Fine-tuned from local-dir:{small} at 64 x 64 pixels: 24 images of 3 classes "
        "(blue 8, green 8, red 8), epochs 1, batch 8; the weights are of the best epoch on 6 validation images.",
        "| top-1 on 6 validation images, which also chose the epoch, % |",
        "| top-1 on 9 test images, which were scored once, % |",
        f"| `glit finetune 'my colours' --model {small} --epochs 1` |",
    ):
        assert line in card


@pytest.mark.parametrize("model", ["test_resnet", "ghostnet_050", "test_vit"])
def test_any_classifier_of_timm_can_be_fine_tuned(
    model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("glit_models.runs.console._EVERY", 0.0)  # rather than a line a minute
    fill(Path("colours"), 6)
    options = ("--img-size", "64", "--epochs", "1", "--batch-size", "4", "--set", "model.pretrained=false")
    assert finetune("colours", "--model", model, *options, "--out", "run") == 0
    err = capsys.readouterr().err
    assert "reading the images: 0 %\n" in err
    assert "epoch 1/1, step 2/3: loss " in err
    assert main(["predict", "colours/red/0.jpg", "--model", "run/model", "--json"]) == 0
    assert {row["class"] for row in json.loads(capsys.readouterr().out)[0]["classes"]} == set(COLOURS)
    config = json.loads(Path("run/model/config.json").read_text())["pretrained_cfg"]
    assert (config["input_size"], config.get("test_input_size")) == ([3, 64, 64], None)


def test_the_same_command_goes_on_and_notices_other_images(small: str, capsys: pytest.CaptureFixture[str]):
    fill(Path("colours"))
    command = ("colours", "--model", small, "--epochs", "2")
    assert finetune(*command, "--max-minutes", "0.0001") == 3
    assert "run the same command to resume" in capsys.readouterr().err
    assert finetune(*command) == 0
    assert "resuming from step 1 of 12" in capsys.readouterr().err
    Image.new("RGB", (64, 64)).save("colours/red/more.jpg")
    assert finetune(*command) == 2
    assert (
        "runs/colours holds a run of another recipe (data.limit: 48 -> 49); choose another folder"
        in capsys.readouterr().err
    )


def test_a_run_goes_on_where_its_images_were_moved_to(small: str, capsys: pytest.CaptureFixture[str]):
    fill(Path("colours"))
    command = ("--model", small, "--epochs", "2", "--out", "run")
    assert finetune("colours", *command, "--max-minutes", "0.0001") == 3
    other = fill(Path("other"))
    (other / "red/3.jpg").rename(other / "red/03.jpg")
    assert finetune("other", *command) == 2
    here = Path().resolve()
    assert (
        f"run holds a run on other data (data.root: {here}/colours -> {here}/other); choose another folder\n"
        in capsys.readouterr().err
    )
    Path("colours").rename("moved")
    assert finetune("moved", *command) == 0
    err = capsys.readouterr().err
    line = f"glit: the data were moved ({here}/colours -> {here}/moved) and are the same, so the run goes on\n"
    assert err.count(line) == 1
    assert "resuming from step 1 of 12" in err
    assert f"root: {here}/moved\n" in Path("run/recipe.yaml").read_text()
    Path("run/data.json").unlink()  # as written by 0.1
    Path("moved").rename("colours")
    assert finetune("colours", *command) == 2
    assert "run holds a run of another recipe (data.root: " in capsys.readouterr().err


def test_the_last_epoch_is_not_called_the_best_nor_chosen():
    splits: Any = SimpleNamespace(test=None, validation=range(40), is_multilabel=False)
    result = {"epoch": 3, "validation_top1": 50.0}
    best, last = (finetuning.describe_score(result, splits, keep) for keep in ("best", "last"))
    assert (best[0], last[0]) == tuple(
        f"validation top-1: 50.00 % (20 of 40 images), epoch 3 was the {keep}" for keep in ("best", "last")
    )
    assert "these images also chose the epoch" in best[-1]
    assert len(last) == len(best) - 1


def test_a_run_whose_images_changed_is_not_resumed(small: str, capsys: pytest.CaptureFixture[str]):
    fill(Path("colours"))
    command = ("colours", "--model", small, "--epochs", "2", "--out", "run")
    assert finetune(*command, "--max-minutes", "0.0001") == 3
    Path("colours/red/3.jpg").rename("colours/blue/red3.jpg")
    assert finetune(*command) == 2
    assert (
        "run holds a run on other data: images, labels or class names have changed since it began; put them back, or "
        "choose another folder\n" in capsys.readouterr().err
    )
    Path("colours/blue/red3.jpg").rename("colours/red/3.jpg")
    assert finetune(*command) == 0


def test_a_killed_process_that_loads_images_is_one_line_and_the_run_resumes(
    small: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    fill(Path("colours"), 6)
    command = ("colours", "--model", small, "--epochs", "1", "--out", "run", "--set", "data.num_workers=1")
    this, read = os.getpid(), sources.open_image

    def die(*args: Any) -> Any:
        if os.getpid() != this:
            os.kill(os.getpid(), signal.SIGKILL)
        return read(*args)

    with monkeypatch.context() as patch:
        patch.setattr(sources, "open_image", die)
        assert finetune(*command) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("glit: a process that loads data died; is memory short? try a lower data.num_workers (")
    assert not Path("run/model").exists()
    assert finetune(*command) == 0
    assert "resuming from step 0 of" in capsys.readouterr().err


def test_names_of_folders_are_taken_as_they_are(small: str):
    model = shutil.copytree(small, "runs/run #1: 'a'/model")
    fill(Path("colours # 2"))
    recipe = plan("colours # 2", str(model), CPU, {"optim.epochs": 3}).recipe
    assert recipe.model.name == f"local-dir:{model}"
    assert (recipe.data.root, recipe.optim.epochs) == ("colours # 2", 3)
    assert recipe == plan("colours # 2", None, CPU, [f"model.name=local-dir:{model}", "optim.epochs=3"]).recipe


@pytest.mark.parametrize("folders", [(), ("train",), ("train", "val")])
def test_trained_and_scored_images_are_never_the_same(small: str, folders: tuple[str, ...]):
    for folder in folders or (".",):
        fill(Path("data") / folder, 7)
    splits = plan("data", small, CPU).splits
    names = [{split.filename(i) for i in range(len(split))} for split in (splits.train, splits.validation)]
    assert not names[0] & names[1]
    assert len(names[0] | names[1]) == 21 * max(1, len(folders))
    assert {Path(name).parent.name for name in names[1]} == set(COLOURS)


@pytest.mark.parametrize("num_images", [2, 7, 40, 240, 4_000, 40_000, 1_000_000])
def test_a_short_run_has_enough_steps_and_a_long_one_not_too_many_epochs(num_images: int):
    batch = choose_batch_size(num_images)
    epochs = choose_epochs(num_images, batch)
    assert 1 <= batch <= min(num_images, 128)
    assert 10 <= epochs <= 100
    assert epochs * (num_images // batch) >= 1000 or epochs == 100
    assert epochs == 10 or (epochs - 1) * (num_images // batch) < 1000


def test_a_slow_machine_gets_smaller_images_and_is_told(small: str, monkeypatch: pytest.MonkeyPatch):
    fill(Path("colours"), 4)
    monkeypatch.setattr(finetuning, "_check_classifier", lambda recipe, num_classes: None)
    decided = plan("colours", "glit_tiny", CPU)
    assert decided.recipe.model.img_size == 112
    assert any(
        "half the model's 224, for a quarter of the time on this CPU; model.img_size=224" in str(x)
        for x in decided.lines
    )
    asked = plan("colours", "glit_tiny", CPU, ["model.img_size=224"])
    assert asked.recipe.model.img_size == 224
    assert "image size: 224, as asked" in map(str, asked.lines)


def test_what_is_asked_for_stands(small: str):
    fill(Path("colours"))
    asked = ["optim.batch_size=4", "optim.lr=1e-4", "data.hold_out=6", "augment.mixup=0.2", "seed=3"]
    found = plan("colours", small, CPU, asked)
    assert f"model: local-dir:{small}, as asked (model)" in map(str, found.lines)
    recipe = found.recipe
    assert (recipe.optim.batch_size, recipe.optim.lr, recipe.data.hold_out, recipe.data.limit) == (4, 1e-4, 6, 54)
    assert (recipe.augment.mixup, recipe.seed) == (0.2, 3)


def test_splits_of_other_names_are_used_as_they_are_named(small: str):
    for split, count in (("learn", 6), ("dev", 2), ("val", 1)):
        fill(Path("colours") / split, count)
    plan_ = plan("colours", small, CPU, ["data.train_split=learn", "data.validation_split=dev"])
    assert (len(plan_.splits.train), len(plan_.splits.validation)) == (18, 6)
    assert "images: 18 of 3 classes in colours/learn" in str(plan_.lines[0])


def _one_class(root: Path) -> None:
    fill(root, 4, ("red",))


def _single_image(root: Path) -> None:
    fill(root, 4)
    for number in range(1, 4):
        (root / "red" / f"{number}.jpg").unlink()


def _broken_images(root: Path) -> None:
    fill(root, 6)
    for name in ("blue/1.jpg", "red/2.jpg"):
        (root / name).write_bytes((root / name).read_bytes()[:500])


@pytest.mark.parametrize(
    ("make", "args", "message"),
    [
        (lambda root: None, (), "DIR images: no such folder"),
        (lambda root: root.write_text(""), (), "DIR images: neither a folder nor a .tar file"),
        (lambda root: root.mkdir(), (), "images holds no images; they belong in images/CLASS/"),
        (_one_class, (), "images has one class, red; it takes two or more"),
        (
            lambda root: fill(root / "all", 2),
            (),
            "one class, all; it takes two or more, each in its folder; give images/all",
        ),
        (_single_image, (), "class red in images has one image; it takes two, to train on one"),
        (_broken_images, (), "2 of 18 images cannot be used, mend or remove them: images/blue/1.jpg: cannot be read ("),
        (_broken_images, (), "; images/red/2.jpg: cannot be read ("),
        (lambda root: fill(root / "val"), (), "images has no train folder, only val"),
        (fill, ("--model", "glit_huge"), "no model 'glit_huge'; `glit list` shows what there is"),
        (fill, ("--model", "tests"), "no model 'tests'"),
        (fill, ("--model", "."), ".: no model folder, config.json is missing"),
        (fill, ("--model", "glit_small"), "glit_small: no weights on this machine"),
        (fill, ("--img-size", "50"), "img_size must be a multiple of patch_size=16, got 50 x 50"),
        (fill, ("--batch-size", "0"), "glit: --batch-size must be at least 1, got 0"),
        (fill, ("--batch-size", "100"), "--batch-size 100 is more than the 48 images to train on"),
        (fill, ("--set", "data.hold_out=1"), "data.hold_out must be from 3 to 57"),
        (fill, ("--set", "data.root=images"), "data.root cannot be set: the images are the folder images, scored on"),
        (fill, ("--set", "data.train_on_validation=true"), "data.train_on_validation cannot be set"),
        (fill, ("--set", "data.fractals.num_classes=2"), "data.fractals.num_classes cannot be set"),
        (fill, ("--epochs", "2", "--set", "optim.epochs=3"), "--epochs and --set optim.epochs say the same"),
        (fill, ("--model", "a", "--set", "model.name=b"), "--model and --set model.name say the same"),
        (fill, ("--set", "data.validation_split=dev"), "images has no dev folder, no folders of splits"),
        (fill, ("--set", "data.validation_split=dev", "--set", "data.hold_out=6"), "exclude each other; set one"),
        (fill, ("--set", "optim.rate=1"), "unknown key optim.rate; did you mean optim."),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    make: Any, args: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
):
    make(Path("images"))
    before = sorted(Path().rglob("*"))
    assert finetune("images", *args) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert sorted(Path().rglob("*")) == before


def test_small_classes_can_count_more_and_the_scores_say_how_all_classes_do(
    small: str, capsys: pytest.CaptureFixture[str]
):
    fill(Path("images"), 12, ("blue", "green"))
    fill(Path("images"), 3, ("red",))
    command = ("images", "--model", small, "--epochs", "1", "--out", "run")
    assert finetune(*command, "--set", "class_weights=weights.yaml") == 2
    assert "weights.yaml is neither 'balanced' nor a file to be read" in capsys.readouterr().err
    for text, complaint in (
        ("{blue: 1, green: 1, red: -2}", "weights.yaml: the weight of class red must be a positive number, got -2"),
        ("{blue: 1, green: 1, red: 1" + "0" * 400 + "}", "the weight of class red must be a positive number, got 1000"),
        ("[" * 60_000, "weights.yaml is neither 'balanced' nor a file to be read: nested more than 50 deep"),
    ):
        Path("weights.yaml").write_text(text)
        assert finetune(*command, "--class-weights", "weights.yaml") == 2
        assert complaint in capsys.readouterr().err
    shutil.rmtree("run", ignore_errors=True)
    assert finetune(*command, "--class-weights", "balanced") == 0
    out = capsys.readouterr().out
    assert "class weights: balanced, as asked" in out
    assert "balanced accuracy " in out
    result = json.loads(Path("run/result.json").read_text())
    assert {"validation_balanced_accuracy", "validation_macro_f1"} <= set(result)
    names = [metric["name"] for metric in json.loads(Path("run/model/entry.json").read_text())["metrics"]]
    assert "macro-F1 on 5 validation images, which also chose the epoch, %" in names
    lines = [str(line) for line in plan("images", small, CPU).lines]
    assert any("class weights: none; class_weights='balanced' raises the small classes" in line for line in lines)


@pytest.mark.parametrize("mixes", [False, True])
def test_smoothed_labels_do_not_pull_towards_the_classes_of_larger_weight(mixes: bool):
    counts = torch.tensor([97, 2, 1])
    weights, labels = 100 / (3 * counts), torch.arange(3).repeat_interleave(counts)
    augment = AugmentSection(label_smoothing=0.1)
    objective = Objective(augment, DistillSection(), 3, {}, lambda name: torch.nn.Identity(), weights)
    targets = 0.9 * torch.eye(3)[labels] + 0.1 / 3 if mixes else labels
    logits = torch.zeros(100, 3, requires_grad=True)
    objective.loss(logits, logits, targets).backward()
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad.sum(0), torch.zeros(3))  # the classes are in balance
    assert bool((logits.grad[torch.arange(100), labels] < 0).all())


def test_every_class_is_drawn_equally_often(small: str, capsys: pytest.CaptureFixture[str]):
    fill(Path("images"), 40, ("blue",))
    fill(Path("images"), 2, ("red",))
    command = ("images", "--model", small, "--epochs", "1", "--img-size", "16", "--batch-size", "4", "--balanced")
    assert finetune(*command, "--out", "run") == 0
    assert "sampling: every class equally often, as asked" in capsys.readouterr().out
    recipe = load_recipe("run/recipe.yaml")
    feed = Trainer(recipe, "other", "cpu").feed
    seen = [int(label) for parts in feed.steps(0, 0) for _, labels in parts for label in labels]
    assert len(seen) == 32  # the whole batches of 34 images to train on
    assert abs(seen.count(0) - seen.count(1)) <= 2  # two images are left out
    assert finetune(*command, "--out", "refused", "--set", "augment.repeats=2") == 2
    assert "--balanced cannot be used with augment.repeats; leave one of them out" in capsys.readouterr().err


def test_balanced_weights_are_one_in_the_mean_and_a_batch_is_the_mean_of_its_parts(small: str):
    fill(Path("images"), 12, ("blue", "green"))
    fill(Path("images"), 3, ("red",))
    splits = plan("images", small, CPU).splits
    counts = splits.count_train()
    weights = class_weights("balanced", splits, CPU)
    assert weights is not None
    assert counts is not None
    torch.testing.assert_close(weights * torch.tensor(counts), torch.full((3,), sum(counts) / 3))
    objective = Objective(AugmentSection(), DistillSection(), 3, {}, lambda name: torch.nn.Identity(), weights)
    logits, labels = torch.randn(6, 3), torch.tensor([0, 1, 2, 2, 0, 0])
    parts = [objective.loss(logits[part], logits[part], labels[part]) for part in (slice(3), slice(3, 6))]
    torch.testing.assert_close(sum(parts) / 2, objective.loss(logits, logits, labels))
    one = torch.nn.functional.one_hot(labels, 3).float()
    smoothed = 0.9 * one + 0.1 / 3
    torch.testing.assert_close(objective.loss(logits, logits, smoothed), objective.loss(logits, logits, labels))


def test_many_broken_images_are_all_in_a_list(small: str, capsys: pytest.CaptureFixture[str]):
    fill(Path("images"), 6)
    for path in Path("images/red").iterdir():
        path.write_bytes(b"")
    assert finetune("images", "--model", small) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("glit: 6 of 18 images cannot be used, mend or remove them: images/red/0.jpg: not an image")
    assert line.endswith("; ...; all are listed in runs/images/broken-images.txt")
    assert len(Path("runs/images/broken-images.txt").read_text().splitlines()) == 6


def test_a_model_that_does_not_classify_is_refused(small: str, monkeypatch: pytest.MonkeyPatch):
    fill(Path("colours"), 4)

    def without_head(section: Any, num_classes: int) -> torch.nn.Module:
        return torch.nn.Flatten()

    monkeypatch.setattr(finetuning, "create_model", without_head)
    with pytest.raises(finetuning.RecipeError, match=r"is no classifier: it makes \[1, 12288\] of one image"):
        plan("colours", small, CPU)


def test_the_default_model_is_the_recipes_and_there():
    assert load_recipe("finetune").model.name == finetuning.DEFAULT
    assert finetuning.DEFAULT in resolve.registry()


@pytest.mark.parametrize(("correct", "count", "low", "high"), [(50, 100, 0.4038, 0.5962), (0, 10, 0.0, 0.2775)])
def test_the_interval_of_a_score_is_wilsons(correct: int, count: int, low: float, high: float):
    assert accuracy_interval(100 * correct / count, count) == (
        pytest.approx(100 * low, abs=1e-2),
        pytest.approx(100 * high, abs=1e-2),
    )


def test_the_imagenet_recipe_trains_on_folders_of_images():
    fill(Path("imagenet/train"), 10)
    fill(Path("imagenet/val"), 3)
    block = "{num_global_heads: 1, num_local_heads: 2, mlp_ratio: 2, qkv_ratio: 1, kernel_size: 5, expand_ratio: 2}"
    reduced = [
        f"model.spec={{embed_dim: 24, num_heads: 3, patch_size: 8, blocks: [{block}]}}", "model.img_size=32",
        "optim.batch_size=12", "optim.epochs=2", "optim.warmup_epochs=1", "data.num_workers=1",
    ]  # fmt: skip
    result = Trainer(load_recipe("deit_imagenet", ["data.root=imagenet", *reduced]), "run", device="cpu").run()
    assert result is not None
    assert result["epochs"] == 2
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "epoch" in line] == [2, 4]


def test_the_imagenet_recipe_is_deits():
    recipe = load_recipe("deit_imagenet")
    optim, augment = recipe.optim, recipe.augment
    assert (optim.epochs, optim.batch_size, optim.lr, optim.lr_base_batch) == (300, 1024, 5e-4, 512)
    assert (optim.opt, optim.weight_decay, optim.min_lr, optim.warmup_lr, optim.warmup_epochs) == (
        "adamw", 0.05, 1e-5, 1e-6, 5,
    )  # fmt: skip
    assert (augment.mixup, augment.cutmix, augment.mixup_switch_prob, augment.label_smoothing) == (0.8, 1.0, 0.5, 0.1)
    assert (augment.auto_augment, augment.re_prob, augment.re_mode, augment.repeats) == (
        "rand-m9-mstd0.5-inc1", 0.25, "pixel", 3,
    )  # fmt: skip
    assert (recipe.model.drop_path_rate, optim.clip_grad, recipe.data.crop_pct) == (0.1, 1.0, 0.875)
