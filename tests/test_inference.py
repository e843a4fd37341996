"""Tests of `glit predict`, `glit eval` and `glit demo`: output, files, and errors on bad input."""

import json
import shutil
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from weight_folders import CLASSES

from glit_models import predict
from glit_models.cli import main
from glit_models.data.fashion_mnist import FashionMNIST

IMAGES = Path(predict.__file__).parent / "data" / "images"
FASHION_MNIST = str(Path(__file__).parent / "fixtures" / "fashion-mnist")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Three images, one in a folder of its own, and a text file."""
    folder = tmp_path / "images"
    (folder / "deeper").mkdir(parents=True)
    for index, name in enumerate(("a.png", "b.jpg", "deeper/c.webp")):
        Image.new("RGB" if index else "L", (50, 40 + index), 60 * index).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    return folder


def test_a_folder_is_searched_and_every_image_classified(model: str, images: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["predict", str(images), "--model", model, "--topk", "3", "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert [Path(result["image"]).name for result in results] == ["a.png", "b.jpg", "c.webp"]
    for result in results:
        probabilities = [row["probability"] for row in result["classes"]]
        assert len(probabilities) == 3
        assert probabilities == sorted(probabilities, reverse=True)
        assert {row["class"] for row in result["classes"]} <= set(CLASSES)


def test_probabilities_are_those_of_the_plain_model(model: str, images: Path):
    classifier = predict.Classifier(predict.load_model(model), torch.device("cpu"))
    image = predict.open_image(images / "b.jpg")
    with torch.inference_mode():
        expected = predict.load_model(model)(classifier.transform(image).unsqueeze(0)).softmax(-1)
    torch.testing.assert_close(classifier.probabilities([image]), expected, rtol=1e-5, atol=1e-6)


def test_a_model_sees_images_of_the_size_at_which_timm_scores_it():
    net = timm.create_model("test_vit", dynamic_img_size=True)
    net.pretrained_cfg |= {"input_size": (3, 32, 32), "test_input_size": (3, 48, 48), "test_crop_pct": 1.0}
    classifier = predict.Classifier(net, torch.device("cpu"))
    assert classifier.transform(Image.new("RGB", (60, 50))).shape == (3, 48, 48)


def test_a_table_is_printed_for_people(model: str, images: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["predict", str(images / "a.png"), "--model", model]) == 0
    table = capsys.readouterr().out
    assert "a.png" in table
    assert table.count("%") == 5


def test_a_broken_image_is_reported_and_the_others_still_done(
    model: str, images: Path, capsys: pytest.CaptureFixture[str]
):
    whole = (images / "b.jpg").read_bytes()
    (images / "b.jpg").write_bytes(whole[: len(whole) // 2])
    assert main(["predict", str(images), "--model", model, "--json"]) == 1
    out, err = capsys.readouterr()
    first, broken, last = json.loads(out)
    assert "classes" in first
    assert "classes" in last
    assert "b.jpg: cannot be read" in broken["error"]
    assert err.count("\n") == 1
    assert "b.jpg" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["predict", "nowhere.png"], "nowhere.png: no such file or folder"),
        (["predict", "https://example.com/cat.png"], "URLs are not fetched"),
        (["predict", FASHION_MNIST], "no images in this folder"),
        (["predict", __file__], "test_inference.py: not an image"),
        (["predict", str(IMAGES), "--topk", "0"], "--topk must be at least 1, got 0"),
        (["predict", str(IMAGES), "--device", "abacus"], "device 'abacus' cannot be used here"),
        (["eval", "fashion-mnist", "--split", "validation"], "no split 'validation'"),
        (["eval", "fashion-mnist", "--root", "nowhere"], "nowhere: no Fashion-MNIST here"),
        (["eval", "folder", "--root", "nowhere"], "nowhere: no such folder"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    arguments: list[str], message: str, model: str, capsys: pytest.CaptureFixture[str]
):
    where = [model, *arguments[1:]] if arguments[0] == "eval" else [*arguments[1:], "--model", model]
    assert main([arguments[0], *where]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet0", "no model 'resnet0'; `glit list` shows what there is"),
        ("glit_tiny.nothing", "glit_tiny.nothing: no such weights; glit_tiny has"),
        (FASHION_MNIST, "config.json is missing"),
        (__file__, "not a model folder"),
    ],
)
def test_a_model_that_is_none_is_named(name: str, message: str, capsys: pytest.CaptureFixture[str]):
    assert main(["predict", str(IMAGES), "--model", name]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_truncated_weights_are_refused_by_name(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = Path(shutil.copytree(model, tmp_path / "cut"))
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    assert main(["predict", str(IMAGES), "--model", str(folder)]) == 2
    err = capsys.readouterr().err
    assert "model.safetensors: not a whole safetensors file" in err
    assert err.count("\n") == 1


def test_eval_counts_what_predict_says(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["eval", model, "fashion-mnist", "--root", FASHION_MNIST, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    dataset = FashionMNIST("test", FASHION_MNIST)
    classifier = predict.Classifier(predict.load_model(model), torch.device("cpu"))
    guesses = classifier.probabilities(dataset[index][0] for index in range(len(dataset))).argmax(1)
    correct = int((guesses == torch.tensor(dataset.labels.tolist())).sum())
    assert (result["correct"], result["images"], result["top1"]) == (correct, 100, correct)


def test_a_data_set_of_another_class_count_is_refused(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for label in ("cat", "dog"):
        (tmp_path / "test" / label).mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(tmp_path / "test" / label / "0.png")
    assert main(["eval", model, "folder", "--root", str(tmp_path)]) == 2
    assert f"{tmp_path} has 2 classes, the model 10" in capsys.readouterr().err


def test_the_demo_classifies_the_shipped_images_and_draws_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    sheet = tmp_path / "sheet.png"
    assert main(["demo", "--out", str(sheet)]) == 0
    out = capsys.readouterr().out
    labels = json.loads((IMAGES / "labels.json").read_text())
    assert len(labels) == 20
    assert all(name in out for name in labels)
    assert int(out.rpartition(" of 20 right")[0].split()[-1]) >= 15  # the score on 10,000 images is far higher
    with Image.open(sheet) as image:
        assert image.size == (950, 888)


def test_a_contact_sheet_that_cannot_be_written_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["demo", "--out", str(tmp_path / "missing" / "sheet.png")]) == 2
    assert "sheet.png cannot be written" in capsys.readouterr().err


def test_the_shipped_images_are_the_test_sets_own():
    labels = json.loads((IMAGES / "labels.json").read_text())
    fixture = FashionMNIST("test", FASHION_MNIST)
    assert sorted(labels.values()) == sorted(2 * list(FashionMNIST.classes))
    for name, label in labels.items():
        image, number = fixture[int(Path(name).stem.removeprefix("test-"))]
        assert predict.open_image(IMAGES / name).tobytes() == image.tobytes()
        assert fixture.classes[number] == label
