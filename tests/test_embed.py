"""Tests of `glit embed`: one row of features per image, for all kinds of data, and resuming."""

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from glit_models import embed
from glit_models.cli import main
from glit_models.predict import Classifier, load_model

FASHION_MNIST = Path(__file__).parent / "fixtures" / "fashion-mnist"


@pytest.fixture(autouse=True)
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Seven images, one of which is broken; some lie in class folders, some of these in a split."""
    monkeypatch.chdir(tmp_path)
    for number, place in enumerate((".", "cat", "dog", "dog/old", "train/cat", "train/cat", "train/dog")):
        folder = Path("images") / place
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("L", (20, 20), 30 * number).save(folder / f"{number}.png")
    Path("images/dog/2.png").write_text("no image")
    return Path("images")


def run(model: str, data: str, out: str, *options: str) -> int:
    return main(["embed", data, "--model", model, "--out", out, "--device", "cpu", *options])


def rows_of(path: str) -> list[dict[str, str]]:
    return list(csv.DictReader(Path(path).read_text().splitlines()))


def test_an_array_has_a_row_for_each_image_and_a_list_of_them_beside_it(model: str, capsys: pytest.CaptureFixture[str]):
    assert run(model, "images", "out.npy") == 1
    line = "out.npy: 7 images, 1 of which could not be read; column error of out.csv says why\n"
    assert capsys.readouterr().out == line
    rows, features = rows_of("out.csv"), np.load("out.npy")
    labels = {row["image"].rpartition("/")[2][0]: row["label"] for row in rows}
    assert labels == {"0": "", "1": "cat", "2": "dog", "3": "dog", "4": "cat", "5": "cat", "6": "dog"}
    assert (features.shape, features.dtype) == ((7, 48), np.float32)
    broken = [row["image"] == "images/dog/2.png" for row in rows]
    assert [bool(row["error"]) for row in rows] == broken
    assert np.isnan(features).all(1).tolist() == broken
    assert sorted(path.name for path in Path().iterdir()) == ["images", "out.csv", "out.npy"]

    classifier = Classifier(load_model(model), torch.device("cpu"))
    with Image.open(rows[0]["image"]) as image, torch.inference_mode():
        batch = classifier.transform(image.convert("RGB"))[None]
        expected = classifier.model.forward_head(classifier.model.forward_features(batch), pre_logits=True)
        logits = classifier.model.head(torch.from_numpy(features[:1]))
        torch.testing.assert_close(logits, classifier.model(batch))
    np.testing.assert_allclose(features[0], expected[0].numpy(), rtol=1e-4, atol=1e-5)


def test_csv_and_parquet_say_the_same(model: str):
    assert run(model, "images", "out.npy", "--split", "train") == 0
    assert run(model, "images", "sheet.csv", "--split", "train") == 0
    features, rows = np.load("out.npy"), rows_of("sheet.csv")
    assert [row["label"] for row in rows] == ["cat", "cat", "dog"]
    written = np.array([[row[f"feature_{index}"] for index in range(48)] for row in rows], np.float32)
    assert np.array_equal(written, features)
    parquet = pytest.importorskip("pyarrow.parquet")
    assert run(model, "images", "out.parquet") == 1
    table = {row["image"]: row for row in parquet.read_table("out.parquet").to_pylist()}
    assert table["images/dog/2.png"]["features"] is None
    assert "not an image" in table["images/dog/2.png"]["error"]
    np.testing.assert_allclose(table["images/train/cat/4.png"]["features"], features[0], atol=1e-5)


def test_a_data_set_by_name_has_its_labels(model: str):
    assert run(model, "fashion-mnist", "out.csv", "--root", str(FASHION_MNIST)) == 0
    rows = rows_of("out.csv")
    assert (len(rows), rows[0]["image"], rows[0]["label"]) == (100, "image 0 of fashion-mnist test", "Ankle boot")


def test_a_stopped_file_goes_on_where_it_was(
    model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    assert run(model, "images", "whole.npy") == 1
    whole, seen = embed.embed, 0

    def until_stopped(*args: Any, **options: Any) -> Iterator[Any]:
        nonlocal seen
        for batch in whole(*args, **options):
            seen += len(batch[0])
            yield batch
            if seen == 4:
                raise KeyboardInterrupt

    monkeypatch.setattr(embed, "embed", until_stopped)
    assert run(model, "images", "out.npy", "--batch-size", "2") == 130
    part = Path("out.npy.part")
    part.write_bytes(part.read_bytes()[:-10])  # a kill in the middle of a row
    assert not Path("out.npy").exists()
    Path("out.csv").touch()  # a kill between the list and the array
    assert run(str(Path(model)) + "/", "images", "out.npy") == 2
    assert "out.npy.part was begun with another model or other options" in capsys.readouterr().err
    assert run(model, "images", "out.npy", "--batch-size", "2") == 1
    assert seen == 4 + 4
    np.testing.assert_allclose(np.load("out.npy"), np.load("whole.npy"), rtol=1e-4, atol=1e-5)
    assert rows_of("out.csv") == rows_of("whole.csv")
    assert not part.exists()


@pytest.mark.parametrize(
    ("data", "out", "message"),
    [
        ("images", "out.txt", "out.txt: a file of features ends in one of .npy, .csv, .parquet"),
        ("images", "gone/out.npy", "gone/out.npy cannot be written: its folder is missing"),
        ("images", "there.npy", "there.csv, which lists the images of there.npy, exists"),
        ("empty", "out.npy", "empty: no images in this folder"),
        ("nowhere", "out.npy", "nowhere: no such folder, and no data set"),
    ],
)
def test_what_cannot_be_read_or_written_is_said_before_the_work(
    data: str, out: str, message: str, capsys: pytest.CaptureFixture[str]
):
    Path("there.csv").touch()
    Path("empty").mkdir()
    assert run("no-such-model", data, out) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_if_no_image_can_be_read_the_file_says_why(model: str):
    Path("bad").mkdir()
    Path("bad/1.png").write_text("no image")
    assert run(model, "bad", "out.npy") == 2
    assert np.load("out.npy").shape == (1, 0)
    assert "not an image" in rows_of("out.csv")[0]["error"]
