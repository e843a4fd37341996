"""Tests of tables of labels in `glit finetune` and `glit eval`, and of one-line errors on bad tables."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from glit_models.cli import main
from glit_models.data import open_splits
from glit_models.data.label_table import read_label_table
from glit_models.embed import open_images
from glit_models.errors import DataError
from glit_models.training import load_recipe
from glit_models.training.finetuning import plan

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Twelve images, red ones of even numbers and blue ones, in no class folders."""
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    Path("shots").mkdir()
    for number in range(12):
        pixels = rng.integers(0, 60, (20, 20, 3), np.uint8)
        pixels[..., 2 * (number % 2)] += 180
        Image.fromarray(pixels).save(f"shots/{number}.png")
    return Path("shots")


def rows(header: str = "image,label", *more: str, folder: str = "shots/", numbers: range = range(12)) -> str:
    """A table of all images, with more cells by split where they are given."""
    lines = [f"{folder}{number}.png,{('red', 'blue')[number % 2]}" for number in numbers]
    ends = [f",{more[number // 2 % len(more)]}" if more else "" for number in numbers]
    return "\n".join([header, *(line + end for line, end in zip(lines, ends, strict=True))]) + "\n"


def table(text: str, name: str = "labels.csv", encoding: str = "utf-8") -> str:
    Path(name).write_text(text, encoding=encoding)
    return name


def test_rows_are_images_with_their_labels_whatever_a_spreadsheet_makes_of_the_file():
    plain = read_label_table(table(rows()))
    assert (plain.classes, plain.has_splits) == (("blue", "red"), False)
    assert plain.samples("train")[:2] == [("shots/0.png", 1), ("shots/1.png", 0)]
    semicolons = rows("Label;Note;Image").replace(",", ";").splitlines()
    swapped = [semicolons[0]] + [f"{line.split(';')[1]};a, note;{line.split(';')[0]}" for line in semicolons[1:]]
    written = table("\r\n".join(swapped) + "\r\n\r\n", "semicolons.csv", "utf-8-sig")
    assert read_label_table(written).samples("train") == plain.samples("train")
    assert read_label_table(table(rows().replace(",", "\t"), "tabs.tsv")).parts == plain.parts
    moved = read_label_table(table(rows(folder=""), "elsewhere.csv"), "shots")
    assert moved.samples(None) == plain.samples("train")
    absolute = read_label_table(table(rows(folder=f"{Path('shots').resolve()}/"), "absolute.csv"))
    assert {Path(path).name for path, _ in absolute.samples("training")} == {f"{number}.png" for number in range(12)}


def test_classes_that_differ_in_case_only_have_one_order():
    names = ("cat", "Cat", "2", "10", "02", "10\u00b2")
    text = "image,label\n" + "".join(f"shots/{number}.png,{name}\n" for number, name in enumerate(names))
    assert read_label_table(table(text)).classes == ("02", "2", "10", "10\u00b2", "Cat", "cat")


def test_parquet_is_read_too():
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    columns = {"image": ["shots/0.png", "shots/1.png"], "label": [7, 12], "split": ["train", "train"]}
    parquet.write_table(pyarrow.table(columns), "labels.parquet")
    read = read_label_table("labels.parquet")
    assert (read.classes, read.samples("train")) == (("7", "12"), [("shots/0.png", 0), ("shots/1.png", 1)])
    with_bytes = {"image": [{"bytes": b"..."}], "label": [7]}
    parquet.write_table(pyarrow.table(with_bytes), "bytes.parquet")
    with pytest.raises(DataError, match=r"bytes.parquet: its column image must hold the paths of image files, got"):
        read_label_table("bytes.parquet")
    categories = pyarrow.array(columns["image"]).dictionary_encode()
    parquet.write_table(pyarrow.table({**columns, "image": categories}), "categories.parquet")
    assert read_label_table("categories.parquet").parts == read.parts
    Path("bad.parquet").write_text("image,label")
    with pytest.raises(DataError, match="bad.parquet: cannot be read"):
        read_label_table("bad.parquet")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "its first line must name the columns image and label, got ''"),
        ("file,class\na,b\n", "must name the columns image and label, got 'file,class\\n'"),
        ("image,label\n", "labels.csv has no rows below its header"),
        ("image,label\nshots/0.png,\n", "line 2 has no label"),
        ("image,label\n\n,red\n", "line 3 has no image"),
        ("image,label\nshots/0.png,red,blue\n", "line 2 has 3 cells, the header 2"),
        ("image,label,split\nshots/0.png,red,dev\n", "line 2 has the split 'dev'; it must be train, val or test"),
        ("image,label,split\nshots/0.png,red\n", "line 2 has the split ''"),
        ("image,label\nshots/0.png,a\u202eb\n", "line 2 has control characters in its label, a\\u202eb"),
        ('image,label\nshots/0.png,"red\n', "labels.csv: no CSV (unexpected end of data)"),
        (
            "image,label\nshots/0.png,red\nshots/1.png,blue\n./shots/0.png,blue\n",
            "./shots/0.png has two labels, red (line 2) and blue (line 4)",
        ),
        (
            "image,label,split\nshots/0.png,red,train\nshots/0.png,red,test\n",
            "shots/0.png has two splits, train (line 2) and test (line 3)",
        ),
        (rows() + "shots/a.png,red\n", "1 of its images are missing: shots/a.png; relative paths start at the table"),
        (rows(folder="x/"), "12 of its images are missing: x/0.png; x/1.png; x/2.png; x/3.png; x/4.png; ...; relative"),
        (rows("image,label,split", "train"), "labels.csv has only a train split; to score on that, name it"),
    ],
)
def test_a_table_that_cannot_be_used_is_one_line(text: str, message: str, capsys: pytest.CaptureFixture[str]):
    table(text)
    assert main(["eval", "no-such-model", "labels.csv"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_files_that_are_no_table_are_one_line(capsys: pytest.CaptureFixture[str]):
    table(rows(), "utf16.csv", "utf-16")
    cases = {
        "gone.csv: cannot be read (No such file or directory)": ["gone.csv"],
        "utf16.csv: not text in UTF-8": ["utf16.csv"],
        "nowhere: no such folder": ["utf16.csv", "--root", "nowhere"],
    }
    for message, arguments in cases.items():
        assert main(["eval", "no-such-model", *arguments]) == 2
        assert message in capsys.readouterr().err
    assert main(["finetune", "shots", "--root", "shots"]) == 2
    assert "shots is a folder, which is all that is needed; leave out --root" in capsys.readouterr().err
    table(rows(numbers=range(0, 12, 2)))
    assert main(["finetune", "labels.csv"]) == 2
    assert "labels.csv has one class, red; it takes two or more\n" in capsys.readouterr().err
    table(rows("image,label,split", "train", "test", numbers=range(0, 12, 2)) + "shots/1.png,blue,test\n")
    assert main(["finetune", "labels.csv"]) == 2
    assert "labels.csv has no training image of the class blue" in capsys.readouterr().err


def test_a_column_of_splits_is_used_and_otherwise_some_are_held_out(model: str):
    plan_ = plan(table(rows("image,label,split", "train", "val", "test")), model, CPU)
    assert plan_.splits.test is not None
    assert [len(part) for part in (plan_.splits.train, plan_.splits.validation, plan_.splits.test)] == [4, 4, 4]
    assert plan_.splits.count_train() == [2, 2]
    plan_ = plan(table(rows(folder=""), "plain.csv"), model, CPU, root="shots")
    names = [
        [part.filename(index) for index in range(len(part))] for part in (plan_.splits.train, plan_.splits.validation)
    ]
    assert plan_.splits.test is None
    assert (len(names[0]), len(names[1]), len({*names[0], *names[1]})) == (10, 2, 12)
    with pytest.raises(DataError, match="labels.csv has no validation images, only train, test; set hold_out"):
        open_splits(table(rows("image,label,split", "train", "test")))
    with pytest.raises(DataError, match="share images"):
        open_splits("labels.csv", validation_split="training")


def test_a_recipe_names_a_table_and_means_the_same_from_every_folder():
    table(rows())
    recipe = load_recipe("smoke", ["data.dataset=labels.csv", "data.root=shots"])
    assert recipe.meaning()["data"]["dataset"] == str(Path("labels.csv").resolve())


def test_a_link_to_the_data_means_the_same_run(tmp_path: Path):
    (tmp_path / "data").mkdir()
    (tmp_path / "link").symlink_to("data")
    real, link = (load_recipe("finetune", {"data.root": str(tmp_path / name)}) for name in ("data", "link"))
    assert link.meaning() == real.meaning()
    assert link.meaning() != load_recipe("finetune", {"data.root": str(tmp_path / "other")}).meaning()


def test_a_table_is_fine_tuned_on_scored_and_embedded(model: str, capsys: pytest.CaptureFixture[str]):
    table(rows("image,label,split", "train", "val", folder=""))
    command = ["labels.csv", "--root", "shots"]
    assert main(["finetune", *command, "--model", model, "--epochs", "1", "--device", "cpu"]) == 0
    assert f"glit eval runs/labels/model {' '.join(command)}" in capsys.readouterr().out
    entry = json.loads(Path("runs/labels/model/entry.json").read_text())
    assert entry["dataset"] == "labels"
    assert "--root shots" in entry["recipe"]
    assert main(["eval", "runs/labels/model", *command, "--device", "cpu", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["dataset"], result["split"], result["images"]) == ("labels.csv", "validation", 6)
    assert [row["name"] for row in result["classes"]] == ["blue", "red"]
    assert main(["eval", "runs/labels/model", *command, "--device", "cpu", "--json", "--knn"]) == 0
    assert json.loads(capsys.readouterr().out)["train_images"] == 6
    data = open_images("labels.csv", "shots")
    assert (len(data.names), data.labels[0], data.names[0]) == (12, "red", "shots/0.png")


def test_a_table_is_read_within_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "labels.csv"
    path.write_text("image,label\n" + "x" * 1000)
    monkeypatch.setattr("glit_models.data.label_table._MOST_BYTES", 500)
    with pytest.raises(DataError, match=r"labels.csv has 1,012 bytes; a table may have 500"):
        read_label_table(path)
