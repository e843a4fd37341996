"""Tests of `glit eval`: its scores, data formats and figure, and errors where it would otherwise count wrongly."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from timm.data import create_dataset, create_loader, resolve_input_data_config
from timm.utils import accuracy
from torch import Tensor, nn
from weight_folders import CLASSES, small_folder

from glit_models import predict
from glit_models.cli import main
from glit_models.data.fashion_mnist import FashionMNIST
from glit_models.data.labelled import match_classes, open_labelled
from glit_models.evaluate import Evaluation, accuracy_interval, balanced_accuracy, evaluate, is_tie, macro_f1
from glit_models.predict import Classifier, load_model

FASHION_MNIST = Path(__file__).parent / "fixtures" / "fashion-mnist"


class Table(nn.Module):
    """Gives row n of a table of logits for an image that is uniformly of grey level n."""

    def __init__(self, logits: np.ndarray, names: Sequence[str] = ()) -> None:
        super().__init__()
        self.register_buffer("logits", torch.tensor(logits, dtype=torch.float32))
        self.num_classes = logits.shape[1]
        self.pretrained_cfg = {
            "input_size": (3, 8, 8),
            "mean": (0.0,) * 3,
            "std": (1.0,) * 3,
            "crop_pct": 1.0,
            "interpolation": "nearest",
            "label_names": list(names),
        }

    def forward(self, images: Tensor) -> Tensor:
        return self.logits[(255 * images.mean((1, 2, 3))).round().long()]


def write_images(folder: Path, labels: Sequence[str]) -> Path:
    """Image n, of grey level n, in the folder of its class."""
    for level, label in enumerate(labels):
        (folder / label).mkdir(parents=True, exist_ok=True)
        Image.new("L", (10, 10), level).save(folder / label / f"{level:03d}.png")
    return folder


def sure(labels: Sequence[int], num_classes: int) -> np.ndarray:
    """Logits of a model that says `labels[n]` of image n."""
    return 9.0 * np.eye(num_classes)[list(labels)]


def take(monkeypatch: pytest.MonkeyPatch, model: nn.Module) -> None:
    monkeypatch.setattr(predict, "load_model", lambda name: model.eval())


def score(model: nn.Module, data: Path, **options: int) -> Evaluation:
    return evaluate(Classifier(model.eval(), torch.device("cpu")), open_labelled(str(data)), **options)


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> dict[str, Any]:
    assert main(["eval", "model", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def complaint(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """The one line that a refused call prints."""
    assert main(["eval", "model", *map(str, arguments)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1, err
    assert err.startswith("glit: ")
    return err


@pytest.fixture
def cats_and_dogs(tmp_path: Path) -> Path:
    return write_images(tmp_path / "animals", ["cat", "dog", "dog", "cat"])


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of two classes that takes everything but the last image for what it is."""
    take(monkeypatch, Table(sure([0, 1, 1, 1], 2), ["cat", "dog"]))


# ---- numbers ----


def test_every_number_is_what_counting_by_hand_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    names = [f"kind {letter}" for letter in "abcdefgh"]
    labels = [*range(8), *rng.integers(0, 7, 52).tolist()]
    logits = rng.normal(size=(60, 8)) + 2 * np.eye(8)[labels]
    logits[:, 5] = -9.0  # a class that the model never says
    data = write_images(tmp_path, [names[label] for label in labels])
    take(monkeypatch, Table(logits, names))
    result = run(capsys, data)

    ranked = [sorted(range(8), key=lambda k: -row[k]) for row in logits.astype(np.float32)]
    said = [order[0] for order in ranked]
    confusion = [[sum((t, s) == (i, j) for t, s in zip(labels, said, strict=True)) for j in range(8)] for i in range(8)]
    assert result["confusion"] == confusion
    correct = sum(t == s for t, s in zip(labels, said, strict=True))
    in_five = sum(label in order[:5] for label, order in zip(labels, ranked, strict=True))
    assert (result["images"], result["correct"], result["correct_top5"]) == (60, correct, in_five)
    assert result["top1"] == pytest.approx(100 * correct / 60)
    assert result["top5"] == pytest.approx(100 * in_five / 60)
    for index, row in enumerate(result["classes"]):
        assert (row["name"], row["images"]) == (names[index], labels.count(index))
        assert row["recall"] == pytest.approx(100 * confusion[index][index] / labels.count(index))
        if index == 5:
            assert row["precision"] is None
        else:
            assert row["precision"] == pytest.approx(100 * confusion[index][index] / said.count(index))
    assert result["images_per_second"] > result["images_per_second_with_loading"] > 0


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # timm leaves them to the garbage collector
def test_the_scores_are_those_of_timms_own_loader_and_count(tmp_path: Path) -> None:
    small_folder(tmp_path / "model")
    dataset = FashionMNIST("test", FASHION_MNIST)
    for index in range(len(dataset)):
        image, label = dataset[index]
        (tmp_path / "data" / CLASSES[label]).mkdir(parents=True, exist_ok=True)
        image.save(tmp_path / "data" / CLASSES[label] / f"{index}.png")
    result = score(load_model(str(tmp_path / "model")), tmp_path / "data")

    model = load_model(str(tmp_path / "model"))
    config = resolve_input_data_config(model, use_test_size=True)
    dataset = create_dataset("", root=str(tmp_path / "data"))
    loader = create_loader(dataset, batch_size=100, num_workers=0, device=torch.device("cpu"), **config)
    with torch.inference_mode():
        ((images, labels),) = list(loader)
        top1, top5 = accuracy(model(images), labels, topk=(1, 5))
    assert (result.top1, result.top5) == (round(float(top1), 4), round(float(top5), 4))


def test_batches_and_workers_change_nothing_but_the_speed(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    data = write_images(tmp_path, [f"{label}" for label in (*range(7), *rng.integers(0, 7, 23))])
    model = Table(rng.normal(size=(30, 7)))
    whole, parts, loaded = score(model, data), score(model, data, batch_size=4), score(model, data, num_workers=1)
    for other in (parts, loaded):
        assert np.array_equal(whole.confusion, other.confusion)
        assert whole.correct_top5 == other.correct_top5


def test_five_classes_or_fewer_have_no_top_5(
    cats_and_dogs: Path, table: None, capsys: pytest.CaptureFixture[str]
) -> None:
    result = run(capsys, cats_and_dogs)
    assert {"top5", "correct_top5"} & set(result) == set()
    assert main(["eval", "model", str(cats_and_dogs)]) == 0
    out = capsys.readouterr().out
    assert "top-1 75.00 % (3 of 4)\n" in out
    assert "dog (1)" in out  # what a cat was taken for


def test_of_many_classes_the_worst_are_shown_and_json_has_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [f"kind{index:02d}" for index in range(25)]
    data = write_images(tmp_path, names)
    take(monkeypatch, Table(sure([*range(22), 0, 0, 0], 25), names))
    assert main(["eval", "model", str(data)]) == 0
    out = capsys.readouterr().out
    shown = [line.split()[0] for line in out.splitlines() if line.startswith("  kind")]
    assert shown[:4] == ["kind22", "kind23", "kind24", "kind00"]
    assert len(shown) == 20
    assert "These are the 20 classes of lowest recall; --json has all 25." in out
    assert [row["name"] for row in run(capsys, data)["classes"]] == names


def test_a_model_of_one_channel_sees_grey_images(cats_and_dogs: Path) -> None:
    model = Table(sure([0, 1, 1, 0], 2), ["cat", "dog"])
    model.pretrained_cfg |= {"input_size": (1, 8, 8), "mean": (0.0,), "std": (1.0,)}
    model.in_chans = 1
    assert score(model, cats_and_dogs).correct == 4


def test_nan_is_one_line_that_names_the_image(
    cats_and_dogs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    logits = sure([0, 1, 1, 0], 2)
    logits[2, 0] = np.nan
    take(monkeypatch, Table(logits))
    assert f"the model gives NaN on {cats_and_dogs / 'dog' / '002.png'}" in complaint(
        capsys, cats_and_dogs, "--batch-size", "3"
    )


def test_too_little_memory_is_one_line(
    cats_and_dogs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Table(sure([0, 1, 1, 0], 2))

    def forward(images: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    model.forward = forward
    take(monkeypatch, model)
    assert "250 images at a time do not fit on cpu" in complaint(capsys, cats_and_dogs, "--device", "cpu")


# ---- forms of data ----


@pytest.mark.parametrize(
    ("made", "arguments", "split"),
    [
        (["."], [], None),
        (["val"], [], "validation"),
        (["train", "validation"], [], "validation"),
        (["train", "val", "test"], [], "test"),
        (["train", "val", "test"], ["--split", "val"], "val"),
        (["train", "val", "test"], ["--split", "train"], "train"),
        (["train", "val", "rainy"], ["--split", "rainy"], "rainy"),
    ],
)
def test_a_folder_of_classes_or_of_splits_is_data(
    made: list[str],
    arguments: list[str],
    split: str | None,
    tmp_path: Path,
    table: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in made:
        write_images(tmp_path / name, ["cat", "dog", "dog", "cat"])
    result = run(capsys, tmp_path, *arguments)
    assert (result["images"], result["correct"]) == (4, 3)
    assert (result["dataset"], result["split"]) == (str(tmp_path), split)
    assert run(capsys, "folder", "--root", tmp_path, *arguments)["confusion"] == result["confusion"]


def test_data_that_are_none_are_one_line(
    tmp_path: Path, table: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_images(Path("plain"), ["cat", "dog"])
    write_images(Path("only/train"), ["cat", "dog"])
    write_images(Path("stray"), ["cat", "dog", "."])
    write_images(Path("loose"), ["."])
    Path("empty").mkdir()
    cases = {
        "nowhere: no such folder, and no data set": ["nowhere"],
        "plain has no test folder, no folders of splits": ["plain", "--split", "test"],
        "only has only a train split; to score on that, name it": ["only"],
        "only has no test folder, only train": ["only", "--split", "test"],
        "stray/002.png lies in no class folder": ["stray"],
        "loose/000.png lies in no class folder": ["loose"],
        " empty": ["empty"],
        "folder: give the folder's path in place of the word, or as --root": ["folder"],
        "nowhere: no such folder": ["folder", "--root", "nowhere"],
        "plain is a folder, which is all that is needed; leave out --root": ["plain", "--root", "elsewhere"],
        "torch/cifar10 needs --root": ["torch/cifar10"],
        "torch/cifar10 test in plain: Dataset not found": ["torch/cifar10", "--root", "plain"],
        "Give --download to fetch it": ["torch/mnist", "--root", "plain"],
        "--workers must be 0 or more, got -1": ["plain", "--workers", "-1"],
        "--batch-size must be at least 1, got 0": ["plain", "--batch-size", "0"],
    }
    for message, arguments in cases.items():
        assert message in complaint(capsys, *arguments)


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_images_are_all_named_and_none_put_in_their_place(
    workers: int,
    cats_and_dogs: Path,
    table: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = ("--workers", str(workers), "--batch-size", "1")
    first, last = cats_and_dogs / "cat" / "000.png", cats_and_dogs / "dog" / "002.png"
    first.write_bytes(first.read_bytes()[:40])
    last.write_text("no image")
    line = complaint(capsys, cats_and_dogs, *options)
    assert f"2 of 4 images cannot be used, mend or remove them: {first}: " in line
    assert f"; {last}: not an image" in line
    monkeypatch.chdir(cats_and_dogs.parent)
    for number in range(5):
        (cats_and_dogs / "cat" / f"{number}.png").touch()
    assert complaint(capsys, cats_and_dogs, *options).endswith("; ...; all are listed in broken-images.txt\n")
    assert len(Path("broken-images.txt").read_text().splitlines()) == 7


# ---- whose class is whose ----


def test_classes_in_another_order_are_found_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["T-shirt/top", "Dress", "Ankle boot"]
    data = write_images(tmp_path, ["T-shirt_top", "dress", "Ankle_boot", "dress"])
    take(monkeypatch, Table(sure([0, 1, 2, 0], 3), names))
    result = run(capsys, data)
    assert result["classes_matched_by"] == "name"
    assert [row["name"] for row in result["classes"]] == names
    assert result["confusion"] == [[1, 0, 0], [1, 1, 0], [0, 0, 1]]


def test_some_of_the_models_classes_are_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_images(tmp_path, ["dog", "cow"])
    take(monkeypatch, Table(sure([2, 0], 3), ["cat", "cow", "dog"]))
    assert run(capsys, data)["confusion"] == [[0, 0, 0], [1, 0, 0], [0, 0, 1]]
    assert main(["eval", "model", str(data)]) == 0
    assert "1 of the model's 3 classes have no images here" in capsys.readouterr().out


def test_other_names_are_taken_in_their_order_and_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_images(tmp_path, ["0_Katze", "1_Hund"])
    take(monkeypatch, Table(sure([0, 1], 2), ["cat", "dog"]))
    assert main(["eval", "model", str(data)]) == 0
    assert "by their order 0_Katze is cat, 1_Hund is dog" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("data", "model", "num_classes", "message"),
    [
        (["ant", "bee"], None, 3, "pets has 2 classes, the model 3"),
        (["ant", "bee", "cow"], ["ant", "bee"], 2, "pets has 3 classes, the model 2; not among the model's: 'cow'"),
        (["bee", "cow"], ["cow", "ant"], 2, "1 of the model's class names, but in another order; .*: 'bee'"),
    ],
)
def test_classes_that_cannot_be_told_apart_for_sure_are_refused(
    data: list[str], model: list[str] | None, num_classes: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        match_classes("pets", data, model, num_classes)


def test_names_that_differ_in_signs_alone_are_kept_apart() -> None:
    assert match_classes("code", ["C++", "C"], ["C", "C++"], 2) == ((1, 0), "name")
    assert match_classes("birds", ["a", "b"], ["crane", "crane"], 2) == ((0, 1), "position")


# ---- the confusion matrix ----


@pytest.mark.parametrize("num_classes", [3, 25, 120])
def test_the_confusion_matrix_is_drawn_for_few_and_many_classes(
    num_classes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [f"${index} 猫 " + "x" * 30 for index in range(num_classes)]
    data = write_images(tmp_path / "data", names)
    take(monkeypatch, Table(sure(range(num_classes), num_classes), names))
    image = tmp_path / "matrix.png"
    assert main(["eval", "model", str(data), "--confusion", str(image)]) == 0
    assert f"Confusion matrix: {image}" in capsys.readouterr().out
    with Image.open(image) as drawn:
        assert drawn.format == "PNG"
        assert min(drawn.size) > 600
        colours = set(np.asarray(drawn.convert("RGB")).reshape(-1, 3)[::7].sum(1).tolist())
    assert len(colours) > 20
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "matrix.png"]


def test_balanced_scores_count_each_class_the_same() -> None:
    confusion = np.array([[90, 10, 0, 0], [5, 5, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])  # two classes without images
    assert balanced_accuracy(confusion) == pytest.approx(100 * (0.9 + 0.5) / 2)
    assert macro_f1(confusion) == pytest.approx(100 * (180 / 195 + 10 / 25) / 2)


def test_an_image_that_cannot_be_drawn_is_refused_before_scoring(
    cats_and_dogs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unreachable(name: str) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(predict, "load_model", unreachable)
    folder = cats_and_dogs.parent
    for name, message in (
        ("missing/m.png", "its folder is missing"),
        ("m.jpg", "give a name that ends in .png"),
    ):
        assert message in complaint(capsys, cats_and_dogs, "--confusion", folder / name)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    message = complaint(capsys, cats_and_dogs, "--confusion", folder / "m.png")
    assert 'which is missing: pip install ".[train]"' in message


def test_a_disk_that_fails_leaves_nothing_behind_and_the_old_image_whole(
    cats_and_dogs: Path, table: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    image = cats_and_dogs.parent / "matrix.png"
    image.write_text("the old one")

    def full(figure: Figure, path: Path, **options: object) -> None:
        path.open("wb").close()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", full)
    assert main(["eval", "model", str(cats_and_dogs), "--confusion", str(image)]) == 2
    out, err = capsys.readouterr()
    assert "top-1 75.00 %" in out  # what was scored is not lost
    assert err == f"glit: {image} cannot be written: No space left on device\n"
    assert image.read_text() == "the old one"
    assert sorted(path.name for path in image.parent.iterdir()) == ["animals", "matrix.png"]


def test_the_interval_of_an_accuracy_covers_the_true_one_about_as_often_as_it_says() -> None:
    correct = np.random.default_rng(0).binomial(500, 0.9, size=2000)
    intervals = [accuracy_interval(100 * number / 500, 500) for number in correct]
    assert 0.93 < np.mean([low <= 90 <= high for low, high in intervals]) < 0.97
    assert accuracy_interval(100, 50)[0] < 100


def test_equally_good_networks_are_ties_in_95_of_100_cases() -> None:
    correct = np.random.default_rng(0).binomial(500, 0.9, size=(2000, 2)) / 5
    assert 0.93 < np.mean([is_tie(a, b, 500) for a, b in correct]) < 0.97
    assert not is_tie(90, 80, 500)
