"""Tests of opening images: upright, in RGB, within limits, and only of listed formats."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from glit_models.export.images import ImageSource
from PIL import ExifTags, Image
from weight_folders import small_folder

from glit_models.cli import main
from glit_models.data import image_files, open_splits
from glit_models.data.image_files import find_images, open_image
from glit_models.errors import DataError
from glit_models.predict import Classifier, load_model

RED, BLUE = (254, 0, 0), (0, 0, 254)


def phone_photo(path: Path, size: tuple[int, int] = (40, 20)) -> Path:
    """Stored on its side, as phones do it: shown upright, the upper half is red and the lower half blue."""
    image = Image.new("RGB", size, RED)
    image.paste(BLUE, (size[0] // 2, 0, *size))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, exif=exif, quality=95)
    return path


def is_upright(image: Image.Image) -> bool:
    top, bottom = (image.getpixel((10, y)) for y in (5, 35))
    return image.size == (20, 40) and top[0] > 200 > 50 > top[2] and bottom[2] > 200 > 50 > bottom[0]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model") / "small"
    small_folder(folder)
    return str(folder)


# ---- what comes out ----


@pytest.mark.filterwarnings("ignore:unclosed file")  # timm keeps a tar file open while its data set lives
def test_a_photo_on_its_side_is_upright_for_prediction_training_scoring_and_calibration(tmp_path: Path) -> None:
    pets = tmp_path / "pets"
    for name in ("cat/0", "cat/1", "dog/0", "dog/1"):
        phone_photo(pets / f"{name}.jpg")
    assert is_upright(open_image(pets / "cat" / "0.jpg"))
    with tarfile.open(tmp_path / "pets.tar", "w") as tar:
        tar.add(pets, ".")
    for name, root in (("folder", pets), ("torch/image_folder", pets), ("folder", tmp_path / "pets.tar")):
        splits = open_splits(name, root, hold_out=2)
        assert all(is_upright(part[i][0]) for part in (splits.train, splits.validation) for i in range(2))
    assert all(map(is_upright, ImageSource(str(pets)).pick(4).images()))


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning")
def test_streams_turn_their_images_upright_too(tmp_path: Path) -> None:
    pytest.importorskip("webdataset")
    photo = phone_photo(tmp_path / "photo.jpg").read_bytes()
    with tarfile.open(tmp_path / "train-0.tar", "w") as tar:
        for name, content in (("0.jpg", photo), ("0.cls", b"0")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    split = {"name": "train", "filenames": ["train-0.tar"], "shard_lengths": [1], "num_samples": 1}
    (tmp_path / "_info.json").write_text(json.dumps({"splits": {"train": split}, "num_classes": 1}))
    from glit_models.data.sources import open_source

    assert is_upright(next(open_source("wds/", tmp_path, "train").read(0, 0))[0])


def grey_16(dtype: str, top: float) -> Image.Image:
    return Image.fromarray((np.linspace(0, top, 64).reshape(8, 8)).astype(dtype))


@pytest.mark.parametrize(
    ("image", "suffix"),
    [
        (grey_16("uint16", 65535), "png"),
        (grey_16("uint16", 65535), "tiff"),
        (grey_16("int32", 65535), "tiff"),
        (grey_16("int32", 2e9), "tiff"),
        (grey_16("float32", 1), "tiff"),
        (grey_16("float32", 255), "tiff"),
        (grey_16("float32", 9e6), "tiff"),
    ],
)
def test_grey_levels_of_more_than_8_bits_are_scaled_and_not_clipped(
    tmp_path: Path, image: Image.Image, suffix: str
) -> None:
    image.save(tmp_path / f"x.{suffix}")
    values = np.asarray(open_image(tmp_path / f"x.{suffix}"))[..., 0].ravel()
    assert np.abs(values - np.linspace(0, 255, 64)).max() <= 1


def transparent(mode: str) -> tuple[Image.Image, dict[str, Any]]:
    if mode == "P":
        image = Image.new("P", (4, 4))
        image.putpalette([255, 0, 0, 0, 255, 0])
        return image, {"transparency": 0}
    return Image.new(mode, (4, 4), {"RGBA": (255, 0, 0, 0), "LA": (9, 0)}[mode]), {}


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pixels_are_white(tmp_path: Path, mode: str) -> None:
    image, options = transparent(mode)
    image.save(tmp_path / "x.png", **options)
    assert open_image(tmp_path / "x.png").getpixel((0, 0)) == (255, 255, 255)


def test_cmyk_palette_and_bilevel_images_keep_their_colours(tmp_path: Path) -> None:
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "x.jpg", quality=95)
    Image.new("RGB", (8, 8), RED).convert("P").save(tmp_path / "x.gif")
    Image.new("1", (8, 8), 1).save(tmp_path / "x.bmp")
    found = [open_image(tmp_path / f"x.{suffix}").getpixel((4, 4)) for suffix in ("jpg", "gif", "bmp")]
    expected = [(255, 0, 0), (255, 0, 0), (255, 255, 255)]
    assert np.abs(np.array(found) - np.array(expected)).max() < 8


def test_the_first_frame_of_an_animation_is_taken_and_said_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_files, "_told", set())
    frames = [Image.new("RGB", (8, 8), color) for color in (RED, BLUE)]
    for suffix in ("gif", "webp"):
        frames[0].save(tmp_path / f"x.{suffix}", save_all=True, append_images=frames[1:])
    assert all(open_image(path).getpixel((4, 4))[0] > 200 for path in sorted(tmp_path.iterdir()))
    assert capsys.readouterr().err == (
        f"glit: {tmp_path}/x.gif holds several images; of such files the first one is taken\n"
    )


# ---- what is refused ----


def test_a_file_of_another_format_is_refused_whatever_its_suffix(tmp_path: Path) -> None:
    path = tmp_path / "cat.jpg"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n")
    with pytest.raises(DataError, match="cat.jpg: not an image of a known format"):
        open_image(path)


def test_images_out_of_bounds_are_named_and_the_others_classified(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_files, "MOST_PIXELS", 50_000)
    Image.new("L", (9, 9)).save(tmp_path / "a.png")
    Image.new("1", (1, 20_000)).save(tmp_path / "b.png")
    Image.new("1", (300, 200)).save(tmp_path / "c.png")
    Image.new("L", (9, 9)).save(tmp_path / "d.png")
    assert main(["predict", str(tmp_path), "--model", model, "--json"]) == 1
    out, err = capsys.readouterr()
    assert ["classes" in row for row in json.loads(out)] == [True, False, False, True]
    assert err.splitlines() == [
        f"glit: {tmp_path}/b.png: has 1 x 20000 pixels, one side more than 200 times the other; crop it",
        f"glit: {tmp_path}/c.png: has 300 x 200 pixels, more than 50,000 together; scale it down",
    ]


def test_one_image_is_in_memory_at_a_time_until_it_is_scaled(model: str, tmp_path: Path) -> None:
    paths = [phone_photo(tmp_path / f"{number}.jpg") for number in range(3)]
    opened: list[int] = []
    classifier = Classifier(load_model(model), torch.device("cpu"))
    transform = classifier.transform
    classifier.transform = lambda image: opened.append(len(seen)) or transform(image)  # type: ignore[func-returns-value]
    seen: list[Path] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("glit_models.prediction.open_image", lambda path: seen.append(path) or open_image(path))
        assert len(list(classifier.predict([*paths, paths[0]]))) == 4
    assert opened == [1, 2, 3, 4]


# ---- what is found ----


def test_hidden_files_and_links_that_lead_back_are_left_out(tmp_path: Path) -> None:
    for name in ("a.JPG", "deeper/b.tif", "._a.jpg", ".thumbs/c.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "notes.txt").touch()
    (tmp_path / "deeper" / "loop").symlink_to(tmp_path)
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    found = [str(path.relative_to(tmp_path)) for path in find_images([str(tmp_path)])]
    assert found == ["a.JPG", "deeper/b.tif", "gone.png"]
