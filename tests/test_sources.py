"""Tests of the data sets that timm opens: folders, tar files, torchvision, Hugging Face, WebDataset, TFDS."""

import gzip
import json
import os
import shutil
import tarfile
from collections import Counter
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from timm.data import create_transform

from glit_models.data import Splits, open_splits
from glit_models.data.loading import eval_loader, train_parts
from glit_models.data.sources import open_source
from glit_models.errors import DataError, RecipeError
from glit_models.training import load_recipe
from glit_models.training.feed import Feed

FIXTURE = Path(__file__).parent / "fixtures" / "fashion-mnist"
CLASSES = ("cat", "dog", "emu")


def draw(label: int, number: int) -> Image.Image:
    """A flat image that tells its class and number by its colour."""
    return Image.new("RGB", (24, 20), (80 * label, number, 0))


def fill(folder: Path, counts: dict[str, int]) -> Path:
    for label, (name, count) in enumerate(counts.items()):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            draw(label, number).save(folder / name / f"{number}.png")
    return folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    fill(tmp_path / "data" / "train", dict.fromkeys(CLASSES, 6))
    fill(tmp_path / "data" / "val", dict.fromkeys(CLASSES, 2))
    return tmp_path / "data"


def labels_of(dataset: Any) -> list[int]:
    return [dataset[index][1] for index in range(len(dataset))]


def colours(splits: Splits, split: str) -> set[Any]:
    dataset = getattr(splits, split)
    return {dataset[index][0].getpixel((0, 0)) for index in range(len(dataset))}


# ---- image folders ----


@pytest.mark.parametrize("name", ["folder", "torch/image_folder"])
def test_a_folder_without_validation_images_says_what_to_set(root: Path, name: str):
    shutil.rmtree(root / "val")
    with pytest.raises(DataError, match=r"has no validation folder, only train; set hold_out to validate on some"):
        open_splits(name, root)


def test_a_folder_of_classes_is_one_set_to_hold_images_out_of(tmp_path: Path):
    fill(tmp_path, {"cat": 10, "dog": 5, "emu": 2, "yak": 1})
    splits = open_splits("folder", tmp_path, hold_out=4)
    assert splits.class_names == ("cat", "dog", "emu", "yak")
    assert Counter(labels_of(splits.validation)) == {0: 2, 1: 1, 2: 1}
    assert Counter(labels_of(splits.train)) == {0: 8, 1: 4, 2: 1, 3: 1}
    assert not colours(splits, "train") & colours(splits, "validation")
    assert splits.test is None
    with pytest.raises(DataError, match="no folders of splits; set hold_out"):
        open_splits("folder", tmp_path)


def test_what_is_held_out_of_a_folder_depends_on_the_seed_alone(root: Path):
    first, again, other = (open_splits("folder", root, 6, None, seed).validation.indices for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize("hold_out", [2, 16])
def test_a_hold_out_that_cannot_have_every_class_says_its_bounds(root: Path, hold_out: int):
    with pytest.raises(DataError, match=f"hold_out must be from 3 to 15.*got {hold_out}"):
        open_splits("folder", root, hold_out=hold_out)


def test_limit_takes_from_what_is_not_held_out(root: Path):
    splits = open_splits("folder", root, hold_out=6, limit=5)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (5, 6, 6)
    assert not set(splits.train.indices) & set(splits.validation.indices)


def test_splits_may_be_called_by_their_synonyms(root: Path):
    (root / "val").rename(root / "valid")
    assert len(open_splits("folder", root).validation) == 6


def test_a_test_folder_is_opened_when_asked_for(root: Path):
    fill(root / "test", dict.fromkeys(CLASSES, 1))
    splits = open_splits("folder", root, test_split="test")
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (18, 6, 3)


@pytest.mark.parametrize(("change", "message"), [
    (lambda val: (val / "emu").rename(val / "gnu"), "the validation split has gnu, unlike the training split"),
    (lambda val: shutil.rmtree(val / "emu"), "the validation split lacks emu, unlike the training split"),
])  # fmt: skip
def test_folders_with_other_classes_are_refused(root: Path, change: Any, message: str):
    change(root / "val")
    with pytest.raises(DataError, match=message):
        open_splits("folder", root)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda train: draw(0, 0).save(train / "stray.png"), "train/stray.png lies in no class folder"),
        (lambda train: (train / "cow").mkdir(), "train/cow holds no images; remove it, or put the images"),
    ],
)
def test_folders_that_would_make_other_classes_than_meant_are_named(root: Path, change: Any, message: str):
    change(root / "train")
    with pytest.raises(DataError, match=message):
        open_splits("folder", root)


@pytest.mark.filterwarnings("ignore:unclosed file")
@pytest.mark.parametrize("kind", ["folder", "torch/image_folder", "tar"])
def test_a_class_is_the_first_folder_and_those_below_belong_to_it(tmp_path: Path, kind: str):
    root = tmp_path / "data"
    for name, patients in (("pos", ("patient1", "patient2")), ("neg", ("patient3", "patient1"))):
        fill(root / "train" / name, dict.fromkeys(patients, 2))
        fill(root / "val" / name, {"patient9": 1})
    fill(root / "train", {".ipynb_checkpoints": 1})
    (root / "train" / "pos" / "patient1" / "._0.png").touch()
    (root / "train" / "pos" / "loop").symlink_to(root)
    if kind == "tar":
        for split in ("train", "val"):
            with tarfile.open(root / f"{split}.tar", "w") as tar:
                tar.add(root / split, split)  # below a folder that all images share
            shutil.rmtree(root / split)
    splits = open_splits("folder" if kind == "tar" else kind, root)
    assert splits.class_names == ("neg", "pos")
    assert Counter(labels_of(splits.train)) == {0: 4, 1: 4}
    assert Counter(labels_of(splits.validation)) == {0: 1, 1: 1}


def test_an_empty_folder_says_where_images_belong(tmp_path: Path):
    with pytest.raises(DataError, match=f"{tmp_path} holds no images; they belong in {tmp_path}/CLASS/$"):
        open_splits("folder", tmp_path, hold_out=1)


def test_images_are_rgb_whatever_the_files_are(root: Path):
    Image.new("L", (24, 20), 7).save(root / "train" / "cat" / "0.png")
    Image.new("P", (24, 20)).save(root / "train" / "cat" / "1.png")
    train = open_splits("folder", root).train
    assert {train[index][0].mode for index in range(len(train))} == {"RGB"}


@pytest.mark.parametrize(("name", "message"), [
    ("fashion_mnist", "no data set 'fashion_mnist'; there are fashion-mnist, folder, torch/NAME"),
    ("torch/nothing", "torch/nothing train in .*: Unknown torchvision dataset nothing"),
    ("torch/cifar10", "torch/cifar10 train in .*: Dataset not found or corrupted. Give download=True to fetch it"),
])  # fmt: skip
def test_an_unknown_data_set_is_one_line(root: Path, name: str, message: str):
    with pytest.raises(DataError, match=message) as error:
        open_splits(name, root)
    assert "\n" not in str(error.value)


# ---- tar files ----


@pytest.mark.filterwarnings("ignore:unclosed file")  # timm keeps a tar file open while its data set lives
def test_tar_files_are_splits_and_several_workers_can_read_one(root: Path):
    for split in ("train", "val"):
        with tarfile.open(root / f"{split}.tar", "w") as tar:
            tar.add(root / split, ".")
        shutil.rmtree(root / split)
    splits = open_splits("folder", root)
    assert splits.class_names == CLASSES
    assert labels_of(splits.train) == [0] * 6 + [1] * 6 + [2] * 6  # opened here, before there are workers
    images = torch.cat([images for images, _ in eval_loader(splits.train, create_transform(16), 3, num_workers=2)])
    alone = torch.cat([images for images, _ in eval_loader(splits.train, create_transform(16), 3)])
    assert torch.equal(images, alone)
    held_out = open_splits("folder", root / "train.tar", hold_out=3)
    assert sorted(labels_of(held_out.validation)) == [0, 1, 2]


# ---- what splits may not share ----


@pytest.mark.parametrize(("name", "train", "validation"), [
    ("folder", "train", "training"),
    ("torch/cifar10", "train", "train"),
    ("hfds/any", "train", "train[90%:]"),
    ("tfds/any", "train[:80%]", "train[70%:]"),
    ("hfds/any", "train[:500]", "test+train[499:]"),
])  # fmt: skip
def test_splits_that_share_images_are_refused(root: Path, name: str, train: str, validation: str):
    with pytest.raises(DataError, match="share images of"):
        open_splits(name, root, train_split=train, validation_split=validation)


def test_a_test_split_that_is_the_validation_split_is_refused(root: Path):
    with pytest.raises(DataError, match="validation_split='validation' and test_split='test' share images"):
        open_splits("torch/cifar10", root, test_split="test")


# ---- other libraries, each where its package is there ----


def test_torchvisions_own_data_sets_open_with_their_class_names(tmp_path: Path):
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for path in FIXTURE.glob("*.gz"):
        shutil.copy(path, raw / path.name)
        with gzip.open(path) as packed:
            (raw / path.stem).write_bytes(packed.read())
    splits = open_splits("torch/fashion_mnist", tmp_path, hold_out=40)
    assert (len(splits.train), len(splits.validation)) == (360, 40)
    assert splits.class_names[9] == "Ankle boot"
    assert splits.train[0][0].mode == "RGB"


def test_torchvisions_image_folder_opens_by_split(root: Path):
    splits = open_splits("torch/image_folder", root)
    assert splits.class_names == CLASSES
    assert (len(splits.train), len(splits.validation)) == (18, 6)


def png(label: int, number: int) -> bytes:
    file = BytesIO()
    draw(label, number).save(file, "png")
    return file.getvalue()


def table(folder: Path, count: int, columns: tuple[str, str] = ("image", "label")) -> None:
    """A Hugging Face data set as its Hub keeps it: parquet files with typed columns."""
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({columns[0]: datasets.Image(), columns[1]: datasets.ClassLabel(names=list(CLASSES))})
    for split, first in (("train", 0), ("validation", 100)):
        rows = {columns[0]: [{"bytes": png(i % 3, first + i), "path": None} for i in range(count)],
                columns[1]: [i % 3 for i in range(count)]}  # fmt: skip
        (folder / "data").mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / "data" / f"{split}-00000.parquet")


@pytest.mark.parametrize("columns", [("image", "label"), ("img", "fine_label")])
def test_hugging_face_data_sets_open_with_their_class_names(tmp_path: Path, columns: tuple[str, str]):
    table(tmp_path / "table", 12, columns)
    splits = open_splits(f"hfds/{tmp_path / 'table'}", tmp_path / "cache")
    assert splits.class_names == CLASSES
    assert (len(splits.train), len(splits.validation)) == (12, 12)
    assert labels_of(splits.train) == [0, 1, 2] * 4
    assert not colours(splits, "train") & colours(splits, "validation")
    held_out = open_splits(f"hfds/{tmp_path / 'table'}", tmp_path / "cache", hold_out=3, limit=6)
    assert (len(held_out.train), len(held_out.validation)) == (6, 3)


def test_tables_that_name_no_classes_or_columns(tmp_path: Path):
    datasets = pytest.importorskip("datasets")
    features = {"image": datasets.Image()}
    for name, labels in (("numbers", [0, 2]), ("texts", ["cat", "dog"])):
        rows = {"image": [{"bytes": png(0, 0), "path": None}] * 2, "label": labels}
        kind = datasets.Value("int64" if name == "numbers" else "string")
        made = datasets.Dataset.from_dict(rows, features=datasets.Features({**features, "label": kind}))
        (tmp_path / name / "data").mkdir(parents=True)
        made.to_parquet(tmp_path / name / "data" / "train-0.parquet")
    splits = open_splits(f"hfds/{tmp_path / 'numbers'}", tmp_path / "cache", hold_out=1)
    assert splits.class_names == ("0", "1", "2")
    with pytest.raises(DataError, match="does not name its classes; its labels must be numbers or of a type that has"):
        open_splits(f"hfds/{tmp_path / 'texts'}", tmp_path / "cache", hold_out=1)
    with pytest.raises(DataError, match="""validation in .*: Unknown split "validation". Should be one of"""):
        open_splits(f"hfds/{tmp_path / 'numbers'}", tmp_path / "cache")
    with pytest.raises(DataError) as error:
        open_splits(f"hfds/{tmp_path / 'nothing'}", tmp_path / "cache")
    assert "\n" not in str(error.value)


def shards(folder: Path, info: dict[str, Any]) -> Path:
    """Two shards of nine images to train on, one of six to validate on."""
    pytest.importorskip("webdataset")
    splits: dict[str, Any] = {"train": ["train-0.tar", "train-1.tar"], "validation": ["validation-0.tar"]}
    folder.mkdir(parents=True)
    for split, names in splits.items():
        size = 9 if split == "train" else 6
        for shard, name in enumerate(names):
            with tarfile.open(folder / name, "w") as tar:
                for i in range(size):
                    number = shard * size + i + (100 if split == "validation" else 0)
                    for suffix, content in (("png", png(i % 3, number)), ("cls", str(i % 3).encode())):
                        member = tarfile.TarInfo(f"{number:05}.{suffix}")
                        member.size = len(content)
                        tar.addfile(member, BytesIO(content))
        splits[split] = {"name": split, "filenames": names, "shard_lengths": [size] * len(names),
                         "num_samples": size * len(names)}  # fmt: skip
    (folder / "_info.json").write_text(json.dumps({"splits": splits, **info}))
    return folder


def numbers(batches: Any) -> list[int]:
    """The images in the batches, by the number in their colour."""
    return [round(float(value) * 255) for images, _ in batches for value in images[:, 1, 0, 0]]


PLAIN = create_transform(16, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), interpolation="nearest")


def parts(splits: Splits, epoch: int = 0, num_parts: int = 1, part: int = 0, **options: Any) -> list[int]:
    return numbers(train_parts(splits.train, PLAIN, batch_size=4, num_parts=num_parts, parts=(part,), seed=1,
                               epoch=epoch, **options))  # fmt: skip


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning")
def test_web_data_sets_are_read_as_a_stream(tmp_path: Path):
    splits = open_splits("wds/", shards(tmp_path / "shards", {"class_names": list(CLASSES)}))
    assert splits.class_names == CLASSES
    assert (len(splits.train), len(splits.validation)) == (18, 6)
    first, again, second = parts(splits), parts(splits), parts(splits, epoch=1)
    assert first == again != second
    assert len(set(first)) == len(first) == 16
    assert parts(splits, num_workers=2) == parts(splits, num_workers=2)
    assert parts(splits, first_step=2) == first[8:]
    assert parts(splits, first_step=1, num_workers=2) == parts(splits, num_workers=2)[4:]
    shares = [parts(splits, num_parts=2, part=part) for part in (0, 1)]
    assert [len(share) for share in shares] == [8, 8]
    assert not set(shares[0]) & set(shares[1])
    scored = [numbers(eval_loader(splits.validation, PLAIN, 4, rank=rank, world_size=2)) for rank in (0, 1)]
    assert sorted(scored[0] + scored[1]) == list(range(100, 106))


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning")
def test_what_a_stream_cannot_do_is_one_line(tmp_path: Path):
    pytest.importorskip("webdataset")
    with pytest.raises(DataError, match="names no classes; put class_names or num_classes into its _info.json"):
        open_splits("wds/", shards(tmp_path / "unnamed", {}))
    root = shards(tmp_path / "numbered", {"num_classes": 3})
    with pytest.raises(DataError, match="hold_out cannot be set for wds/, which is read as a stream"):
        open_splits("wds/", root, hold_out=3)
    splits = open_splits("wds/", root)
    assert splits.class_names == ("0", "1", "2")
    recipe = load_recipe("deit_imagenet", ["data.dataset=wds/", f"data.root={root}"])
    with pytest.raises(RecipeError, match="augment.repeats must be 1 for wds/, which is read as a stream, got 3"):
        Feed(recipe, splits, {}, torch.device("cpu"), 1, (0,), 0, 1)
    with pytest.raises(DataError, match="too few images for worker 3 of 3 of process 1 of 1; set num_workers"):
        parts(splits, num_workers=3)
    (root / "_info.json").write_text((root / "_info.json").read_text().replace('"num_samples": 6', '"num_samples": 7'))
    with pytest.raises(DataError, match="wds/ validation promises 7 images, and 6 could be read"):
        numbers(eval_loader(open_splits("wds/", root).validation, PLAIN, 4))


def test_streamed_hugging_face_data_sets_open(tmp_path: Path):
    table(tmp_path / "table", 12)
    splits = open_splits(f"hfids/{tmp_path / 'table'}", tmp_path / "cache", download=True)
    assert splits.class_names == CLASSES
    first, again, second = parts(splits), parts(splits), parts(splits, epoch=1)
    assert first == again != second
    assert sorted(first) == list(range(12))
    assert sorted(numbers(eval_loader(splits.validation, PLAIN, 5))) == list(range(100, 112))


@pytest.mark.parametrize("name", [b"d\xffg", b"d\ng", b"d\x1b[31mg"])
def test_a_class_whose_name_is_no_text_is_refused_before_training(tmp_path: Path, name: bytes):
    fill(tmp_path, {"cat": 2, os.fsdecode(name): 2})
    with pytest.raises(DataError, match=r"d\\(udcff|n|x1b\[31m)g: a class name must be UTF-8"):
        open_source("folder", tmp_path, "train")


@pytest.mark.parametrize(
    ("name", "root", "split", "complaint"),
    [
        ("wds/x", "pipe:touch {}; true", "train", "root pipe:touch .*: no such folder; data are read from folders"),
        ("wds/x", "https://example.org/x", "train", "root https://example.org/x: no such folder"),
        ("tfds/x", "gs://bucket/x", "train", "root gs://bucket/x: no such folder"),
        ("wds/x", ".", "x-{{0..999999}}-{{0..999999}}.tar|9", "names 1,000,000,000,000 files; 100,000 are the most"),
        ("hfds/https://example.org/x.py", None, "train", "a data set is named by its folder or as NAMESPACE/NAME"),
        ("tfds/huggingface:x", None, "train", "never by a URL or a command"),
        ("hfds/pandas", None, "train", "never by a URL or a command"),
    ],
)
def test_a_recipe_cannot_run_a_command_or_fetch_from_a_url(
    tmp_path: Path, name: str, root: str | None, split: str, complaint: str
):
    trace = tmp_path / "trace"
    with pytest.raises(DataError, match=complaint):
        open_source(name, root and root.format(trace), split.format(trace))
    assert not trace.exists()


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning")
def test_what_a_web_data_set_calls_its_files_is_a_path_never_a_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    root = shards(tmp_path / "shards", {"num_classes": 3})
    info = json.loads((root / "_info.json").read_text())
    info["splits"]["train"]["filenames"] = [f"pipe:touch {tmp_path / 'trace'}", "pipe:true"]
    (root / "_info.json").write_text(json.dumps(info))
    monkeypatch.chdir(root)
    source = open_source("wds/", ".", "train")
    assert list(source.read(0, 0)) == []  # there are no such files
    assert not (tmp_path / "trace").exists()


def test_a_package_that_runs_scripts_of_data_sets_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr("glit_models.data.sources.version", lambda name: "3.6.0")
    with pytest.raises(DataError, match="hfds/a/b needs datasets 4 or newer, which runs no code of data sets"):
        open_source("hfds/a/b", None, "train")


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, root: Path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name, package in (("hfds/x", "datasets"), ("wds/", "webdataset"), ("tfds/x", "tensorflow-datasets tensorflow")):
        with pytest.raises(DataError, match=f"{name} needs a package that is not here: pip install {package}$"):
            open_splits(name, root)


@pytest.mark.filterwarnings("default")
def test_tensorflow_data_sets_are_read_as_a_stream(tmp_path: Path):
    tfds = pytest.importorskip("tensorflow_datasets")

    class Pets(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self) -> Any:
            features = {"image": tfds.features.Image(encoding_format="png"),
                        "label": tfds.features.ClassLabel(names=list(CLASSES))}  # fmt: skip
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager: Any) -> Any:
            return {"train": self._generate_examples(0, 18), "validation": self._generate_examples(100, 6)}

        def _generate_examples(self, first: int, count: int) -> Any:
            for i in range(count):
                yield i, {"image": BytesIO(png(i % 3, first + i)), "label": i % 3}

    Pets(data_dir=tmp_path).download_and_prepare()
    splits = open_splits("tfds/pets", tmp_path)
    assert splits.class_names == CLASSES
    assert (len(splits.train), len(splits.validation)) == (18, 6)
    first = parts(splits)
    assert len(first) == 16
    assert parts(splits, epoch=1) != first
    assert len(parts(splits, first_step=2)) == 8
    assert sorted(numbers(eval_loader(splits.validation, PLAIN, 4))) == list(range(100, 106))
    with pytest.raises(DataError, match="tfds/pets nothing in"):
        open_splits("tfds/pets", tmp_path, train_split="nothing")
    with pytest.raises(DataError, match="tfds/cars train in"):
        open_splits("tfds/cars", tmp_path)
