"""Tests of `glit eval --knn` and `--linear`: scores computed by hand, on splits that share no images."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.optimize import minimize

from glit_models.cli import main
from glit_models.evaluate.probe import FrozenFeatures, classify_linearly, score_linear, score_neighbours, vote

COLOURS = {"blue": (40, 40, 200), "green": (40, 200, 40), "red": (200, 40, 40)}


@pytest.fixture
def colours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 2)):
        for name, colour in COLOURS.items():
            folder = Path("colours") / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = np.clip(colour + rng.normal(0, 20, (16, 16, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    return Path("colours")


def clouds(num_train: int = 90, num_classes: int = 3, width: int = 6) -> FrozenFeatures:
    """Overlapping clouds of points, one for each class."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(num_classes, width))
    labels = rng.integers(0, num_classes, num_train + 40)
    points = torch.from_numpy(centres[labels] + rng.normal(0, 1.5, (len(labels), width))).float()
    truth = torch.from_numpy(labels)
    names = tuple("abc"[:num_classes])
    return FrozenFeatures(names, points[:num_train], truth[:num_train], points[num_train:], truth[num_train:], 1.0)


def test_votes_of_neighbours_are_what_counting_by_hand_gives():
    data = clouds()
    votes = vote(data.train, data.train_labels, data.test, 3, k=5).numpy()
    train, test = (points.double().numpy() for points in (data.train, data.test))
    for image, counted in zip(test, votes, strict=True):
        cosines = [image @ other / np.linalg.norm(image) / np.linalg.norm(other) for other in train]
        expected = np.zeros(3)
        for index in sorted(range(len(train)), key=lambda i: -cosines[i])[:5]:
            expected[data.train_labels[index]] += np.exp((cosines[index] - 1) / 0.07)
        np.testing.assert_allclose(counted, expected, rtol=1e-3, atol=1e-8)
    correct = int((torch.from_numpy(votes).argmax(1) == data.test_labels).sum())
    assert score_neighbours(data, 5).correct == correct
    assert score_neighbours(data, 1000).images == 40  # more than there are


def test_the_linear_classifier_is_the_minimum_that_another_optimiser_finds():
    data = clouds()
    (logits,) = classify_linearly(data.train, data.train_labels, data.test, 3, [1e-2])
    train, test, labels = data.train.double().numpy(), data.test.double().numpy(), data.train_labels.numpy()
    mean, std = train.mean(0), train.std(0)
    train, test = (train - mean) / std, (test - mean) / std

    def loss(flat: np.ndarray) -> float:
        weight, bias = flat[:18].reshape(3, 6), flat[18:]
        scores = train @ weight.T + bias
        log_sum = np.log(np.exp(scores).sum(1))
        return float((log_sum - scores[np.arange(len(labels)), labels]).mean() + 0.5e-2 * (weight**2).sum())

    best = minimize(loss, np.zeros(21), tol=1e-10).x
    expected = test @ best[:18].reshape(3, 6).T + best[18:]
    centred = logits.numpy() - logits.numpy().mean(1, keepdims=True)
    np.testing.assert_allclose(centred, expected - expected.mean(1, keepdims=True), atol=5e-3)
    assert torch.equal(logits, classify_linearly(data.train, data.train_labels, data.test, 3, [1e-2])[0])


def test_the_penalty_is_chosen_without_the_images_that_are_scored():
    data = clouds()
    result, l2 = score_linear(data)
    assert result.top1 > 50
    other = FrozenFeatures(data.class_names, data.train, data.train_labels, -data.test, 2 - data.test_labels, 1.0)
    assert score_linear(other)[1] == l2
    alone = FrozenFeatures(("a", "b"), data.train[:2], torch.tensor([0, 1]), data.test[:2], torch.tensor([0, 1]), 1.0)
    assert score_linear(alone)[1] == 1e-2  # an image of each class: none can be held out


def test_features_are_scored_whatever_classes_the_model_has(
    model: str, colours: Path, capsys: pytest.CaptureFixture[str]
):
    command = ["eval", model, str(colours), "--device", "cpu", "--knn", "3", "--linear"]
    assert main([*command, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["split"], result["train_images"], result["features"]) == ("validation", 18, 48)
    assert (result["knn"]["k"], result["knn"]["images"], result["linear"]["images"]) == (3, 6, 6)
    assert result["knn"]["correct"] == result["linear"]["correct"] == 6
    assert main(command[:-1]) == 0
    out = capsys.readouterr().out
    assert "frozen, 3 nearest of 18 training images, on colours validation: top-1 100.00 % (6 of 6)\n" in out


def test_what_cannot_be_scored_so_is_one_line(model: str, colours: Path, capsys: pytest.CaptureFixture[str]):
    one = Path("one")
    for split in ("train", "test"):
        (one / split / "red").mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(one / split / "red" / "1.png")
    (colours / "val" / "red" / "1.png").write_text("no image")
    cases = {
        "colours/train has no train split; it takes one in train/CLASS/*": ["colours/train", "--knn"],
        "colours train is what is trained on; score another split": ["colours", "--knn", "--split", "train"],
        "1 of 24 images cannot be used, mend or remove them: colours/val/red/1.png": ["colours", "--linear"],
        "one train has one class, red; it takes two or more": ["one", "--knn"],
        "--knn must be at least 1, got 0": ["colours", "--knn", "0"],
        "--confusion draws one matrix; give it --knn or --linear": [
            "colours", "--knn", "--linear", "--confusion", "m.png",
        ],
    }  # fmt: skip
    for message, arguments in cases.items():
        assert main(["eval", model, *arguments]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line
