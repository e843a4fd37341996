"""Tests of `glit eval --report`: a stand-alone page with correct numbers and escaped names."""

import base64
import html.parser
import io
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from weight_folders import small_folder

from glit_models.cli import main
from glit_models.evaluate import report as evaluation_report
from glit_models.evaluate.calibration import calibrate, calibration_bins, calibration_error, fit_temperature
from glit_models.evaluate.review import doubtful_labels, near_duplicates

EVIL = ("<script>alert(1)<script>", "a&b \"c\" 'd'", "\u202egnp.exe", "שלום")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model") / "small"
    small_folder(folder)
    return str(folder)


def noise(seed: int, side: int = 40) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (5, 5, 3), np.uint8)).resize((side, side))


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Ten classes, as the model has, and one image in two splits."""
    monkeypatch.chdir(tmp_path)
    for split in ("train", "test"):
        for label in range(10):
            folder = Path("data") / split / f"class {label}"
            folder.mkdir(parents=True)
            noise(label + 100 * (split == "train")).save(folder / f"{label}.png")
    noise(3, 60).save("data/train/class 4/copy.jpg", quality=70)
    return Path("data")


class Reader(html.parser.HTMLParser):
    """What a browser would make of a page: tags, their attributes, and text."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.text = ""
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for name, value in attrs if name == "src"]
        assert not any(name.startswith("on") for name, _ in attrs)

    def handle_data(self, data: str) -> None:
        self.text += data + "\n"


def run(model: str, *arguments: str) -> int:
    return main(["eval", model, *arguments, "--device", "cpu"])


def test_the_page_stands_alone_and_says_what_was_counted(model: str, data: Path, capsys: pytest.CaptureFixture[str]):
    assert run(model, "data", "--report", "report") == 0
    out = capsys.readouterr().out
    assert out.endswith("Report: report/index.html\n")
    top1 = re.search(r"top-1 (\d+\.\d\d %) \(", out)
    page = Reader(Path("report/index.html"))
    assert top1 is not None
    assert f"{top1[1]} (" in page.text
    for heading in ("Scores", "Confusion matrix", "Worst mistakes", "Classes", "Calibration", "Near-duplicates"):
        assert f"\n{heading}\n" in page.text
    assert "Within data test: none was found." in page.text
    assert "Between data test and data train, on which the model may have been trained: 1 pair." in page.text
    assert "labels: class 3; class 4" in page.text
    assert "data/train/class 4/copy.jpg" in page.text
    for source in page.sources:
        kind, _, content = source.partition(";base64,")
        assert kind in ("data:image/png", "data:image/jpeg")
        Image.open(io.BytesIO(base64.b64decode(content))).verify()
    assert not {"script", "link", "iframe"} & set(page.tags)
    assert sorted(path.name for path in Path("report").iterdir()) == ["calibration.png", "confusion.png", "index.html"]
    assert sorted(path.name for path in Path().iterdir()) == ["data", "report"]


def test_names_of_classes_and_files_do_nothing_in_the_page(
    model: str, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    shutil.rmtree("data/train")
    for label in range(4, 10):
        Path(f"data/test/class {label}").rename(f"data/test/kind {label}")
    for label, name in enumerate(EVIL):  # a class folder of the third name is refused before
        Path(f"data/test/class {label}").rename(f"data/test/{'kind' if name == EVIL[2] else name}")
        place = next(Path("data/test").glob(f"*/{label}.png"))
        place.rename(place.with_name(f"{name}.png"))
    assert run(model, "data", "--report", "report") == 0
    text = Path("report/index.html").read_text(encoding="utf-8")
    assert not re.search("[\x00-\x09\x0b-\x1f\u202a-\u202e\u2066-\u2069]", text)
    assert "<script" not in text
    page = Reader(Path("report/index.html"))
    assert EVIL[0] + ".png" in page.text
    assert EVIL[1] in page.text
    assert EVIL[3] in page.text
    assert "\\u202egnp.exe.png" in page.text
    assert "No training images were compared with: data has no train folder, only test" in page.text


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out matplotlib, which takes most of the time."""
    monkeypatch.setattr(evaluation_report, "png_bytes", lambda draw, style: b"")


@pytest.mark.parametrize("labels", [[0], [0, 0, 0]])
def test_one_image_and_one_class_make_a_page(labels: list[int], model: str, data: Path, undrawn: None):
    for label in range(1, 10):
        shutil.rmtree(f"data/test/class {label}")
    for number in range(1, len(labels)):
        noise(number).save(f"data/test/class 0/{number}0.png")
    assert run(model, "data/test", "--report", "report", "--json") == 0
    text = Reader(Path("report/index.html")).text
    assert "These images are too few to fit a temperature." in text
    assert "data/test has no train split" in text


def test_training_images_can_be_left_out(
    model: str, data: Path, undrawn: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(evaluation_report, "embed_training", None)  # is not called
    assert run(model, "data", "--report", "report", "--no-compare") == 0
    text = Reader(Path("report/index.html")).text
    assert "No training images were compared with, as --no-compare was given." in text
    assert "Within data test" in text


def test_what_cannot_be_written_is_said_before_the_work(
    data: Path, model: str, undrawn: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    Path("there").mkdir()
    Path("there/index.html").touch()
    Path("empty").mkdir()
    cases = {
        "there exists; remove it or give another name": ("data", "--report", "there"),
        "gone/report cannot be written: its folder is missing": ("data", "--report", "gone/report"),
        "--report is of the model's own head": ("data", "--report", "report", "--knn"),
        "empty holds no images": ("empty", "--report", "report"),
        "--no-compare needs --report DIR": ("data", "--no-compare"),
    }
    for message, arguments in cases.items():
        assert run("no-such-model", *arguments) == 2
        assert message in capsys.readouterr().err

    def stop(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluation_report, "_write_doubts", stop)
    assert run(model, "data", "--report", "report") == 130
    assert "top-1" in capsys.readouterr().out  # what was scored is not lost
    assert not Path("report").exists()


# ---- calibration ----


def test_the_calibration_error_is_what_counting_by_hand_gives():
    logits = torch.tensor([[2.0, 0.0], [2.0, 0.0], [0.0, 0.2], [0.0, 0.21]])
    truth = torch.tensor([0, 1, 1, 1])
    sure, unsure = torch.tensor([2.0, 0.0]).softmax(0).max().item(), logits[2:].softmax(1).max(1)[0].mean().item()
    error = calibration_error(calibration_bins(logits, truth))
    assert error == pytest.approx(100 * (2 / 4 * abs(0.5 - sure) + 2 / 4 * abs(1 - unsure)), abs=1e-4)


def test_the_temperature_of_overconfident_logits_is_found_and_lessens_the_error():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4000, 5, generator=generator)
    truth = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
    assert fit_temperature(3 * logits, truth) == pytest.approx(3, rel=0.05)
    found = calibrate(3 * logits, truth)
    assert found.error_before is not None
    assert found.error_after is not None
    assert found.error_after < 4 < 20 < found.error_before
    assert calibrate(logits[:10], truth[:10]).temperature is None


# ---- the second look ----


def test_copies_are_found_whatever_their_size_and_alike_images_are_not():
    images = [noise(0), noise(1), noise(0, 70), noise(2), Image.new("RGB", (9, 9), "red"), Image.new("RGB", (8, 8))]
    features = torch.randn(6, 16, generator=torch.Generator().manual_seed(0))
    features[2] = features[0] + 0.01
    features[3] = features[1] + 0.01  # alike to the model, but not the same
    features[5] = features[4]
    (pair,) = near_duplicates(features, lambda index: images[index])
    assert (pair.first, pair.second) == (0, 2)
    (pair,) = near_duplicates(features[:2], lambda index: images[index], features[2:4], lambda index: images[2 + index])
    assert (pair.first, pair.second) == (0, 0)
    assert near_duplicates(features[:1], lambda index: images[index]) == []


def test_a_wrong_label_is_doubted_if_its_neighbours_are_of_the_predicted_class():
    generator = torch.Generator().manual_seed(0)
    truth = torch.arange(40) % 2
    features = torch.randn(40, 4, generator=generator) + 8 * truth[:, None]
    predicted = truth.clone()
    truth[6] = 1  # wrong: 6 looks like class 0, and the model says so
    predicted[9] = 0  # the model is wrong: 9 looks like class 1
    confidence = torch.full((40,), 0.9)
    (doubt,) = doubtful_labels(features, truth, predicted, confidence)
    assert (doubt.index, doubt.agreeing, doubt.neighbours) == (6, 10, 10)
    assert doubtful_labels(features, truth, predicted, torch.full((40,), 0.3)) == []
