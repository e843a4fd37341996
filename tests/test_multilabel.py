"""Promises of images with several labels: from the table to the card."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from glit_models.export import ExportInfo, OnnxClassifier, huggingface
from PIL import Image
from weight_folders import CLASSES, SPEC

from glit_models.cli import main
from glit_models.data import open_splits
from glit_models.data.label_table import read_label_table
from glit_models.embed import open_images
from glit_models.errors import DataError, ExportError
from glit_models.evaluate.multilabel import average_precision, score_multilabel
from glit_models.predict import Classifier, load_model
from glit_models.training import Trainer
from glit_models.training.finetuning import plan
from glit_models.weights.folder import save_folder

COLOURS = {"blue": (40, 40, 230), "green": (40, 230, 40), "red": (230, 40, 40)}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A weight folder to start from: two blocks, 32 pixels."""
    folder = tmp_path_factory.mktemp("weights") / "small"
    torch.manual_seed(0)
    spec = dataclasses.replace(SPEC, patch_size=8, blocks=SPEC.blocks[2:4])
    save_folder(timm.create_model("glit_tiny", spec=spec, img_size=32, num_classes=10), folder, class_names=CLASSES)
    return str(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of a grey ground with stripes of colours, and a table of which."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    rows = ["image,label,split"]
    for number in range(60):
        names = [name for name in COLOURS if rng.random() < 0.5]
        pixels = np.full((32, 32, 3), 128, np.uint8)
        for name in names:
            start = 10 * list(COLOURS).index(name)
            pixels[:, start : start + 10] = COLOURS[name]
        Image.fromarray(pixels).save(folder / f"{number}.png")
        split = "test" if number >= 50 else "val" if number >= 40 else "train"
        rows.append(f"{number}.png,{'|'.join(names) or '|'},{split}")
    (folder / "stripes.csv").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture(scope="module")
def run(small: str, data: Path) -> Path:
    """A finished run."""
    torch.set_num_threads(1)
    out = data / "run"
    arguments = ["finetune", str(data / "stripes.csv"), "--model", small, "--out", str(out), "--epochs", "12"]
    arguments += ["--set", "augment.hflip=0", "--set", "augment.scale=[1.0, 1.0]", "--set", "augment.re_prob=0"]
    assert main([*arguments, "--batch-size", "8", "--set", "optim.lr=0.01", "--device", "cpu"]) == 0
    return out


def test_a_label_of_a_table_may_be_several_or_none(tmp_path: Path):
    for name in "abc":
        (tmp_path / f"{name}.png").touch()
    table = tmp_path / "t.csv"
    table.write_text("image,label\na.png,cat | dog\nb.png,|\nc.png,dog\n")
    found = read_label_table(table)
    assert found.is_multilabel
    assert found.classes == ("cat", "dog")
    assert [label for _, label in found.samples("train")] == [(0, 1), (), (1,)]
    table.write_text("image,label\na.png,cat\nb.png,dog\nc.png,dog\n")
    assert not read_label_table(table).is_multilabel
    table.write_text("image,label\na.png,cat|dog\nb.png,\n")
    with pytest.raises(DataError, match="line 3 has no label"):
        read_label_table(table)


def test_lists_of_labels_in_parquet_are_several_labels(tmp_path: Path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    for name in "abc":
        (tmp_path / f"{name}.png").touch()
    labels = pyarrow.array([["cat", "dog"], [], ["dog"]], pyarrow.list_(pyarrow.string()))
    parquet.write_table(pyarrow.table({"image": ["a.png", "b.png", "c.png"], "label": labels}), tmp_path / "t.parquet")
    found = read_label_table(tmp_path / "t.parquet")
    assert [label for _, label in found.samples("train")] == [(0, 1), (), (1,)]


def test_features_have_the_labels_as_the_table_has_them(tmp_path: Path):
    (tmp_path / "t.csv").write_text("image,label\na.png,dog|cat\nb.png,|\n")
    for name in "ab":
        (tmp_path / f"{name}.png").touch()
    assert open_images(str(tmp_path / "t.csv")).labels == ["cat|dog", "|"]


def test_every_class_keeps_an_image_to_train_on(tmp_path: Path):
    labels = ["a|b", "a", "a", "a", "a", "|", "c"]
    for number in range(len(labels)):
        (tmp_path / f"{number}.png").touch()
    rows = "".join(f"{number}.png,{label}\n" for number, label in enumerate(labels))
    (tmp_path / "t.csv").write_text(f"image,label\n{rows}")
    for seed in range(5):
        splits = open_splits(str(tmp_path / "t.csv"), hold_out=3, seed=seed)
        assert splits.is_multilabel
        assert (len(splits.train), len(splits.validation)) == (4, 3)
        counts = splits.count_train()
        assert counts is not None
        assert min(counts) >= 1
    with pytest.raises(DataError, match="hold_out must be at most [45], so that every class has an image to train on"):
        open_splits(str(tmp_path / "t.csv"), hold_out=6)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("a.png,cat|dog\n", "has one image; it takes two, to train on one and validate on the other"),
        ("a.png,|\n", "has no class; it takes two or more"),
        ("a.png,cat|\nb.png,|\n", "has one class, cat; it takes two or more"),
    ],
)
def test_too_few_images_or_classes_are_one_line(rows: str, message: str, small: str, tmp_path: Path):
    for name in "ab":
        Image.new("RGB", (32, 32)).save(tmp_path / f"{name}.png")
    (tmp_path / "t.csv").write_text(f"image,label\n{rows}")
    with pytest.raises(DataError, match=message):
        plan(str(tmp_path / "t.csv"), small, torch.device("cpu"))


def test_average_precision_is_the_mean_of_the_precision_at_each_hit():
    scores = np.array([0.9, 0.8, 0.7, 0.6])
    assert average_precision(scores, np.array([True, False, True, False])) == pytest.approx(100 * (1 + 2 / 3) / 2)
    assert average_precision(np.zeros(4), np.array([True, False, False, False])) == pytest.approx(25)  # ties
    assert average_precision(scores, np.zeros(4, bool)) is None


def test_scores_are_what_counting_by_hand_gives():
    logits = np.array([[2.0, -1.0, 0.0], [1.0, 1.0, -2.0], [-1.0, 2.0, -3.0]])
    truth = np.array([[1, 0, 0], [1, 0, 0], [1, 1, 0]])
    result = score_multilabel(logits, truth, ("a", "b", "c"))
    assert [(row.images, row.predicted, row.correct) for row in result.classes] == [(3, 2, 2), (1, 2, 1), (0, 1, 0)]
    assert result.mean_average_precision == 100.0  # of a and b; c has no images
    assert result.macro_f1 == pytest.approx(100 * (4 / 5 + 2 / 3 + 0) / 3)
    assert result.micro_f1 == pytest.approx(100 * 6 / 9)
    assert result.exact == 0


def test_a_table_of_several_labels_becomes_a_model_that_says_each_by_itself(
    run: Path, data: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    result = json.loads((run / "result.json").read_text())
    assert result["test_map"] > 90
    model = run / "model"
    config = json.loads((model / "config.json").read_text())
    assert config["problem_type"] == "multi_label_classification"

    assert main(["eval", str(model), str(data / "stripes.csv"), "--json", "--device", "cpu"]) == 0
    scored = json.loads(capsys.readouterr().out)
    assert scored["map"] == pytest.approx(result["test_map"])
    assert [row["name"] for row in scored["classes"]] == list(COLOURS)
    assert main(["eval", str(model), str(data / "stripes.csv"), "--device", "cpu"]) == 0
    assert "mAP" in capsys.readouterr().out

    classifier = Classifier(load_model(str(model)), torch.device("cpu"))
    assert classifier.is_multilabel
    names = [sorted(name for name, _ in prediction.classes) for prediction in classifier.predict([data / "55.png"])]
    rows = dict(line.split(",")[:2] for line in (data / "stripes.csv").read_text().splitlines()[1:])
    assert names == [[name for name in rows["55.png"].split("|") if name]]
    assert len(next(classifier.predict([data / "55.png"], top_k=3)).classes) == 3

    out = tmp_path / "predictions.csv"
    assert main(["predict", str(data / "55.png"), "--model", str(model), "--out", str(out), "--device", "cpu"]) == 0
    assert main(["predict", *map(str, data.glob("5?.png")), "--model", str(model), "--device", "cpu"]) == 0
    facts = ["--license", "CC0-1.0", "--to-folder", str(tmp_path / "published")]
    assert main(["publish", str(model), *facts]) == 0
    card = (tmp_path / "published" / "README.md").read_text()
    assert "an image may have several or none: blue, green, red" in card
    assert ".sigmoid()" in card
    assert "mAP on 10 validation images" in card


@pytest.mark.parametrize("option", ["--knn", "--linear", "--report=r", "--confusion=c.png"])
def test_what_takes_one_class_an_image_refuses_in_one_line(
    option: str, run: Path, data: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["eval", str(run / "model"), str(data / "stripes.csv"), option]) == 2
    name = option.partition("=")[0]
    expected = f"glit: {name} needs one class per image, and {data / 'stripes.csv'} test has several\n"
    assert capsys.readouterr().err == expected


def test_models_and_data_of_the_other_kind_are_refused(
    run: Path, small: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["eval", small, str(data / "stripes.csv"), "--device", "cpu"]) == 2
    assert "several labels an image, but the model was trained for one class" in capsys.readouterr().err
    for name in COLOURS:
        (tmp_path / name).mkdir()
        Image.new("RGB", (32, 32), COLOURS[name]).save(tmp_path / name / "0.png")
    assert main(["eval", str(run / "model"), str(tmp_path), "--device", "cpu"]) == 2
    assert "is a multilabel model, and" in capsys.readouterr().err


def test_an_exported_file_gives_the_same_classes_as_the_model(
    run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "m.onnx"
    assert (
        main(["export", str(run / "model"), "--out", str(out), "--verify", "8", "--data", str(data / "stripes.csv")])
        == 0
    )
    exported, classifier = OnnxClassifier(out, ["cpu"]), Classifier(load_model(str(run / "model")), torch.device("cpu"))
    assert exported.info.multilabel
    paths = sorted(data.glob("5?.png"))
    for top_k in (None, 2):
        for ours, torchs in zip(exported.predict(paths, top_k), classifier.predict(paths, top_k), strict=True):
            assert [name for name, _ in ours.classes] == [name for name, _ in torchs.classes]
            assert [value for _, value in ours.classes] == pytest.approx(
                [value for _, value in torchs.classes], abs=1e-3
            )
    assert len({len(prediction.classes) for prediction in exported.predict(paths)}) > 1
    images = [np.asarray(Image.open(path)) for path in paths]
    np.testing.assert_allclose(exported.probabilities(images)[:2], 1 / (1 + np.exp(-exported.logits_of(images)[:2])))
    assert exported.probabilities([]).shape == (0, 3)
    texts = exported.info.to_texts()
    del texts["glit.multilabel"]  # as in files of version 0.1
    assert not ExportInfo.from_texts(texts, "old.onnx").multilabel
    with pytest.raises(ExportError, match=r"'glit.multilabel' is damaged"):
        ExportInfo.from_texts({**texts, "glit.multilabel": "3"}, "bad.onnx")
    capsys.readouterr()
    assert main(["predict", str(data / "55.png"), "--onnx", str(out), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)[0]["classes"]
    assert [row["class"] for row in shown] == [name for name, _ in next(classifier.predict([data / "55.png"])).classes]
    assert huggingface._config(exported.info)["problem_type"] == "multi_label_classification"


@pytest.mark.parametrize("override", ["augment.cutmix=1.0", "class_weights=balanced", "augment.batched=true"])
def test_what_cannot_be_had_of_several_labels_is_named(override: str, small: str, data: Path, tmp_path: Path):
    table = str(data / "stripes.csv")
    extra = ["augment.color_jitter=0", "augment.re_prob=0"] if "batched" in override else []
    recipe = plan(table, small, torch.device("cpu"), [override, *extra]).recipe
    key = override.partition("=")[0]
    with pytest.raises(Exception, match=rf"{key} cannot be used for images with several labels"):
        Trainer(recipe, tmp_path, "cpu")


def test_broken_images_are_named(run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "a.png").write_bytes(b"no image")
    (tmp_path / "b.png").write_bytes((data / "0.png").read_bytes())
    (tmp_path / "t.csv").write_text("image,label\na.png,red|blue\nb.png,green\n")
    assert main(["eval", str(run / "model"), str(tmp_path / "t.csv"), "--device", "cpu"]) == 2
    assert "1 of 2 images cannot be used, mend or remove them" in capsys.readouterr().err
