"""Tests of `glit predict --out FILE`: one row per image, the format given by the suffix, and resuming."""

import csv
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from weight_folders import CLASSES

from glit_models import predict
from glit_models.cli import main
from glit_models.errors import GlitError, RunError
from glit_models.runs.lock import lock_file
from glit_models.runs.row_table import write_table


@pytest.fixture(autouse=True)
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Ten images, three batches, of which one is broken."""
    monkeypatch.setattr("glit_models.prediction.BATCH", 4)
    monkeypatch.chdir(tmp_path)
    folder = Path("images")
    folder.mkdir()
    for number in range(10):
        Image.new("L", (20, 20), 20 * number).save(folder / f"{number:02}.png")
    (folder / "07.png").write_text("no image")
    return folder


def run(model: str, out: str, *options: str) -> int:
    return main(["predict", "images", "--model", model, "--topk", "2", "--out", out, *options])


def test_a_csv_has_a_row_for_each_image_also_for_a_broken_one(model: str, capsys: pytest.CaptureFixture[str]):
    assert run(model, "out.csv") == 1
    assert capsys.readouterr().out == "out.csv: 10 images, 1 of which could not be read; column error says why\n"
    rows = list(csv.DictReader(Path("out.csv").read_text().splitlines()))
    assert list(rows[0]) == ["image", "class_1", "probability_1", "class_2", "probability_2", "error"]
    assert [row["image"] for row in rows] == [f"images/{number:02}.png" for number in range(10)]
    assert [row["image"] for row in rows if row["error"]] == ["images/07.png"]
    assert rows[0]["class_1"] in CLASSES
    assert sorted(path.name for path in Path().iterdir()) == ["images", "out.csv"]


def test_json_lines_and_parquet_say_the_same(model: str, capsys: pytest.CaptureFixture[str]):
    assert run(model, "out.jsonl") == 1
    rows = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
    assert (len(rows), len(rows[0]["classes"]), "error" in rows[7]) == (10, 2, True)
    parquet = pytest.importorskip("pyarrow.parquet")
    assert run(model, "out.parquet") == 1
    table = parquet.read_table("out.parquet").to_pylist()
    assert [row["class_1"] for row in table] == [row.get("classes", [{"class": None}])[0]["class"] for row in rows]


def test_a_stopped_table_goes_on_where_it_was(
    model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    assert run(model, "whole.jsonl") == 1
    classify = predict.Classifier.predict
    seen: list[Path] = []

    def until_stopped(self: Any, paths: Any, top_k: int) -> Iterator[Any]:
        for prediction in classify(self, paths, top_k):
            seen.append(prediction.path)
            if len(seen) == 6:
                raise KeyboardInterrupt
            yield prediction

    monkeypatch.setattr(predict.Classifier, "predict", until_stopped)
    out = "out.jsonl"
    assert run(model, out) == 130
    assert not Path("out.jsonl").exists()
    part = Path("out.jsonl.part")
    part.write_text(part.read_text()[:-10])  # a kill in the middle of a row
    assert run(model, "out.jsonl", "--topk", "3") == 2
    assert "out.jsonl.part was begun with another model or other options" in capsys.readouterr().err
    assert run(model, "out.jsonl") == 1
    assert len(seen) == 6 + 6
    once, resumed = (list(map(json.loads, Path(name).read_text().splitlines())) for name in ("whole.jsonl", out))
    assert [row["image"] for row in resumed] == [row["image"] for row in once]
    for row, other in zip(once, resumed, strict=True):  # in batches of other images, so up to rounding
        values = [[pair["probability"] for pair in each.get("classes", [])] for each in (row, other)]
        assert values[0] == pytest.approx(values[1], abs=1e-5)
    assert not part.exists()


def test_names_that_are_not_utf_8_are_escaped_and_the_table_is_resumed(
    model: str, images: Path, capsys: pytest.CaptureFixture[str]
):
    (images / os.fsdecode(b"photo\xe9.png")).write_bytes((images / "00.png").read_bytes())
    for name in ("out.csv", "out.jsonl"):
        assert run(model, name) == 1
        assert "photo\\udce9.png" in Path(name).read_text(encoding="utf-8").replace("\\\\", "\\")
    assert "out.jsonl: 11 images" in capsys.readouterr().out


def test_an_unfinished_table_that_is_damaged_or_in_use_is_one_line(model: str, capsys: pytest.CaptureFixture[str]):
    assert run(model, "out.jsonl") == 1
    rows = Path("out.jsonl").read_text().splitlines()
    about = {"model": "m"}
    part = Path("new.jsonl.part")
    for row in ("{", "[]", "1", '{"label": 1}'):
        part.write_text(f"{json.dumps(about)}\n{row}\n{rows[0]}\n")
        with pytest.raises(GlitError, match=r"new.jsonl.part is damaged; remove it"):
            write_table(Path("new.jsonl"), [], lambda left: [], about, lambda path, rows: None)
    with lock_file(part), pytest.raises(RunError, match="new.jsonl.part is in use by another process"):
        write_table(Path("new.jsonl"), [], lambda left: [], about, lambda path, rows: None)


@pytest.mark.parametrize(
    ("out", "options", "message"),
    [
        ("out.xlsx", (), "a table of predictions ends in one of .csv, .jsonl, .parquet"),
        ("gone/out.csv", (), "gone/out.csv cannot be written: its folder is missing"),
        ("there.csv", (), "there.csv cannot be written: it exists; remove it or give another name"),
        ("out.csv", ("--json",), "--out and --json exclude each other"),
    ],
)
def test_what_cannot_be_written_is_said_before_the_work(
    model: str, out: str, options: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
):
    Path("there.csv").touch()
    assert run("no-such-model", out, *options) == 2
    assert message in capsys.readouterr().err


def test_without_pyarrow_a_parquet_file_says_what_to_do(
    model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    assert run(model, "out.parquet") == 2
    assert capsys.readouterr().err == ("glit: Parquet files need pyarrow: pip install pyarrow, or take .csv\n")
