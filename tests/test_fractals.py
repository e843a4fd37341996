"""Tests of formula-driven images: determinism, properties of the classes, and the sheet that shows them."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import glit_models
from glit_models.cli import main
from glit_models.data import FractalConfig, Fractals
from glit_models.data.fractals import dataset as module
from glit_models.data.fractals.classes import measure
from glit_models.data.fractals.ifs import MAX_STRETCH, contract, hash_keys, stretch
from glit_models.errors import DataError, RecipeError

CHECKOUT = Path(glit_models.__file__).parents[1]
LAST = 2**63 - 1
# Of the images that `digest` takes. A change here changes every model that is trained on fractals: say so.
# Means of the pixels of four images, from 0 to 255. Single pixels differ between processors: points fall on edges.
MEANS = [82.93, 72.65, 103.41, 57.53]


@pytest.fixture(scope="module")
def fractals() -> Fractals:
    return Fractals(FractalConfig(num_classes=8, perturbation=0.1), seed=3)


def variant(fractals: Fractals, **keys: Any) -> Fractals:
    """Other settings of the same classes, without another search."""
    other = Fractals.__new__(Fractals)
    other.__dict__ = {**fractals.__dict__, "config": FractalConfig(**{**fractals.config.__dict__, **keys})}
    return other


def digest(fractals: Fractals) -> str:
    return hashlib.sha256(four_images(fractals).numpy().tobytes()).hexdigest()[:16]


def four_images(fractals: Fractals) -> torch.Tensor:
    return fractals.batch([0, 1, 2, 7], [0, 1, 2, LAST], 48)


def covered(images: torch.Tensor) -> torch.Tensor:
    """The share of each image that is not black."""
    return (images.amax(1) > 0).float().mean((1, 2))


VARIANTS = [{"color": color, "render": render} for color in ("gray", "color") for render in ("point", "patch")]


@pytest.mark.parametrize("keys", VARIANTS)
@pytest.mark.parametrize("size", [8, 33, 64])
def test_images_are_bytes_of_the_asked_size(fractals: Fractals, keys: dict[str, Any], size: int) -> None:
    images = variant(fractals, **keys).batch([0, 5, 5], [1, 2, 3], size)
    assert images.dtype == torch.uint8
    assert images.shape == (3, 3, size, size)
    assert (covered(images) > 0).all()
    if keys["color"] == "gray":
        assert set(images.unique().tolist()) <= {0, 127}
    else:
        assert (images.float().std(1) > 0).any()


@pytest.mark.parametrize("keys", VARIANTS)
def test_an_image_is_the_same_in_every_batch(fractals: Fractals, keys: dict[str, Any]) -> None:
    fractals = variant(fractals, **keys)
    labels, indices = torch.arange(8).repeat(2), torch.arange(16) + 10**12
    together = fractals.batch(labels, indices, 40)
    backwards = fractals.batch(labels.flip(0), indices.flip(0), 40).flip(0)
    alone = torch.cat([fractals.batch([label], [index], 40) for label, index in zip(labels, indices, strict=True)])
    assert torch.equal(together, backwards)
    assert torch.equal(together, alone)


def test_an_image_is_the_same_however_the_work_is_cut(fractals: Fractals, monkeypatch: pytest.MonkeyPatch) -> None:
    labels, indices = torch.arange(8), torch.arange(8)
    expected = fractals.batch(labels, indices, 40)
    monkeypatch.setattr(module, "images_at_once", lambda *_: 3)
    monkeypatch.setattr("glit_models.data.fractals.ifs._held", lambda _: (1, 1))
    assert torch.equal(fractals.batch(labels, indices, 40), expected)


def test_another_index_class_or_seed_gives_another_image(fractals: Fractals) -> None:
    first = fractals.batch([2], [0], 32)
    others = fractals.batch([2, 2, 3], [1, LAST, 0], 32)
    assert all(not torch.equal(first[0], other) for other in others)
    elsewhere = variant(fractals)
    elsewhere.seed = 4
    assert not torch.equal(first, elsewhere.batch([2], [0], 32))


def test_images_are_those_of_this_release_and_the_same_in_every_process(fractals: Fractals) -> None:
    means = four_images(fractals).float().mean((1, 2, 3))
    torch.testing.assert_close(means, torch.tensor(MEANS), rtol=0.01, atol=0)
    script = (
        "import sys; sys.path.insert(0, 'tests'); import test_fractals as t; from glit_models.data import *;"
        "print(t.digest(Fractals(FractalConfig(num_classes=8, perturbation=0.1), seed=3)))"
    )
    run = subprocess.run([sys.executable, "-c", script], cwd=CHECKOUT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == digest(fractals)


def test_the_first_classes_do_not_depend_on_how_many_there_are(fractals: Fractals) -> None:
    fewer = Fractals(FractalConfig(num_classes=3), seed=3)
    assert torch.equal(fewer.maps, fractals.maps[:3])
    assert len(fewer) == 3
    assert len(variant(fractals, instances=5)) == 40
    assert len(set(fractals.class_names)) == 8


@pytest.mark.parametrize("keys", [{}, {"max_maps": 8}, {"single": True}])
def test_classes_are_contractions_that_meet_both_thresholds(keys: dict[str, Any]) -> None:
    fractals = Fractals(FractalConfig(num_classes=40, filling_rate=0.21, variance=0.1, **keys), seed=5)
    used = torch.arange(fractals.maps.shape[1]) < fractals.num_maps[:, None]
    assert (stretch(fractals.maps)[used] <= MAX_STRETCH).all()
    assert (torch.linalg.matrix_norm(fractals.maps[used][:, :4].unflatten(1, (2, 2)), 2) < 1).all()
    assert fractals.num_maps.min() >= 2
    # the mean over eight others than the search drew: a class that was just good enough there may not be in one
    rounds = [measure(fractals.maps, fractals.num_maps, hash_keys(torch.arange(40), chance)) for chance in range(8)]
    filling_rate, variance = (torch.stack(values).mean(0) for values in zip(*rounds, strict=True))
    assert (filling_rate > 0.19).all()
    assert (variance > 0.09).all()


def test_without_thresholds_classes_would_miss_them() -> None:
    free = Fractals(FractalConfig(num_classes=40, filling_rate=0, variance=0), seed=5)
    filling_rate, variance = measure(free.maps, free.num_maps, hash_keys(torch.arange(40)))
    assert ((filling_rate < 0.19) | (variance < 0.09)).float().mean() > 0.5


def test_classes_of_one_fractal_lie_close_to_it_and_differ() -> None:
    classes = Fractals(FractalConfig(num_classes=30, single=True, delta=0.1), seed=1)
    assert len(classes.num_maps.unique()) == 1
    maps = classes.maps[:, : classes.num_maps[0]]
    spread = maps.amax(0) - maps.amin(0)
    assert (spread <= 0.2 + 1e-6).all()
    assert (spread > 0.05).all()


def test_without_perturbation_instances_differ_by_their_view_alone(fractals: Fractals) -> None:
    still: dict[str, Any] = {"zoom_min": 1.0, "zoom_max": 1.0, "rotation": 0.0, "flip_prob": 0.0, "color": "gray"}
    indices = list(range(20))
    same = variant(fractals, perturbation=0.0, density=8.0, **still).batch([2] * 20, indices, 32)
    moved = variant(fractals, perturbation=0.2, density=8.0, **still).batch([2] * 20, indices, 32)
    assert difference(same) < 0.1  # what is left is which points were drawn
    assert difference(moved) > 2 * difference(same)


def difference(images: torch.Tensor) -> float:
    """The mean share of pixels in which images differ from the first."""
    return (images[1:] != images[:1]).float().mean().item()


def test_a_view_is_never_empty_however_close(fractals: Fractals) -> None:
    close = variant(fractals, zoom_min=4.0, zoom_max=8.0)
    assert (covered(close.batch(torch.arange(200) % 8, torch.arange(200), 32)) > 0).all()


def test_zoom_changes_the_size_of_the_fractal(fractals: Fractals) -> None:
    shares = [
        covered(variant(fractals, zoom_min=zoom, zoom_max=zoom).batch([1] * 20, range(20), 48)).mean()
        for zoom in (0.25, 0.5, 1.0)
    ]
    assert shares[0] < shares[1] / 2 < shares[2] / 3


def test_patches_only_add_to_the_points(fractals: Fractals) -> None:
    labels, indices = [label for label in range(8) for _ in range(10)], list(range(80))
    points = covered(variant(fractals, render="point").batch(labels, indices, 48))
    patches = covered(variant(fractals, render="patch").batch(labels, indices, 48))
    assert patches.mean() > points.mean()


def test_perturbed_maps_stay_contractions() -> None:
    maps = 4 * torch.rand(100, 8, 6, generator=torch.Generator().manual_seed(0)) - 2
    assert (stretch(contract(maps)) <= MAX_STRETCH + 1e-5).all()
    assert torch.equal(contract(maps)[..., 4:], maps[..., 4:])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"num_classes": 0}, "fractals.num_classes must be from 1 to 1000000, got 0"),
        ({"instances": 0}, "fractals.instances must be at least 1, got 0"),
        ({"max_maps": 9}, "fractals.max_maps must be from 2 to 8, got 9"),
        ({"perturbation": 0.7}, "fractals.perturbation must be from 0 to 0.5, got 0.7"),
        ({"perturbation": float("nan")}, "fractals.perturbation must be from 0 to 0.5, got nan"),
        ({"delta": 0}, "fractals.delta must be above 0 and at most 1, got 0"),
        ({"color": "blue"}, "fractals.color must be gray or color, got 'blue'"),
        ({"render": "line"}, "fractals.render must be point or patch, got 'line'"),
        ({"density": 0}, "fractals.density must be from 0.1 to 16, got 0"),
        ({"zoom_min": 2.0, "zoom_max": 1.0}, "fractals.zoom_max must be from zoom_min=2.0 to 8, got 1.0"),
        ({"rotation": 200}, "fractals.rotation must be from 0 to 180, got 200"),
        ({"flip_prob": -1}, "fractals.flip_prob must be from 0 to 1, got -1"),
        ({"filling_rate": 0.5}, "fractals.filling_rate must be from 0 to 0.35, got 0.5"),
        ({"variance": 1}, "fractals.variance must be from 0 to below 1, got 1"),
    ],
)
def test_a_setting_that_cannot_be_is_named_with_its_bound(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        FractalConfig(**keys)
    assert str(caught.value) == message


def test_thresholds_that_no_class_meets_end_the_search_with_one_line() -> None:
    with pytest.raises(
        DataError, match=r"^fractals\.filling_rate=0\.35 and fractals\.variance=0\.9 leave 0 classes .*$"
    ):
        Fractals(FractalConfig(num_classes=2, filling_rate=0.35, variance=0.9))


@pytest.mark.parametrize(
    ("labels", "indices", "size", "message"),
    [
        ([8], [0], 32, "label must be from 0 to 7, got 8"),
        ([0, -1], [0, 0], 32, "label must be from 0 to 7, got -1"),
        ([0], [-5], 32, f"index must be from 0 to {LAST}, got -5"),
        ([0], [2**63], 32, "labels and indices must be whole numbers of 64 bits"),
        ([0, 1], [0], 32, "labels and indices must be equally long, got [2] and [1]"),
        ([0], [0], 7, "size must be from 8 to 1024, got 7"),
        ([0], [0], 2000, "size must be from 8 to 1024, got 2000"),
    ],
)
def test_images_that_do_not_exist_are_refused(
    fractals: Fractals, labels: list[int], indices: list[int], size: int, message: str
) -> None:
    with pytest.raises(DataError) as caught:
        fractals.batch(labels, indices, size)
    assert str(caught.value) == message


def test_a_seed_below_zero_is_refused() -> None:
    with pytest.raises(DataError, match="seed must be from 0"):
        Fractals(FractalConfig(num_classes=2), seed=-1)


def test_an_empty_batch_is_empty(fractals: Fractals) -> None:
    assert fractals.batch([], [], 32).shape == (0, 3, 32, 32)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("keys", VARIANTS)
def test_a_gpu_draws_the_same_pixels_as_a_cpu(fractals: Fractals, keys: dict[str, Any]) -> None:
    fractals = variant(fractals, **keys)
    labels, indices = torch.arange(64) % 8, torch.arange(64)
    different = fractals.batch(labels, indices, 96, "cuda").cpu() != fractals.batch(labels, indices, 96)
    assert int(different.sum()) == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_drawing_never_waits_for_the_gpu(fractals: Fractals) -> None:
    labels, indices = torch.arange(8, device="cuda"), torch.arange(8, device="cuda")
    fractals.batch(labels, indices, 64, "cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        fractals.batch(labels, indices, 64, "cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_sheet_shows_a_row_for_each_class(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "sheet.png"
    command = ["fractals", "--out", str(out), "--classes", "3", "--instances", "4", "--size", "32", "--seed", "3"]
    assert main(command) == 0
    assert str(out) in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["sheet.png"]
    with Image.open(out) as sheet:
        assert sheet.size[1] == 3 * 32
        images = sheet.crop((sheet.width - 4 * 32, 0, sheet.width, 3 * 32))
        pixels = torch.frombuffer(bytearray(images.tobytes()), dtype=torch.uint8).view(3, 32, 4, 32, 3)
    drawn = Fractals(FractalConfig(num_classes=3), seed=3).batch([2], [3], 32)
    assert torch.equal(pixels[2, :, 3].permute(2, 0, 1), drawn[0])
    assert main([*command, "--color", "gray", "--render", "patch", "--single", "--perturbation", "0.1"]) == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--classes", "0"], "--classes must be at least 1, got 0"),
        (["--instances", "0"], "--instances must be at least 1, got 0"),
        (["--size", "2"], "size must be from 8 to 1024, got 2"),
        (["--density", "99"], "fractals.density must be from 0.1 to 16, got 99.0"),
        (["--classes", "10", "--instances", "9999"], "a sheet of 10 classes, 9999 instances and 112 pixels a side"),
        (["--out", "/nowhere/sheet.png"], "/nowhere/sheet.png cannot be written: No such file or directory"),
    ],
)
def test_a_sheet_that_cannot_be_is_refused_in_one_line(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["fractals", "--classes", "1", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"glit: {message}")
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())
