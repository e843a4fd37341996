"""Promises of the data sets and of the batches made from them."""

import gzip
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform

from glit_models.data import open_splits
from glit_models.data.fashion_mnist import FashionMNIST, find_folder
from glit_models.data.loading import eval_loader, train_loader
from glit_models.errors import DataError

FIXTURE = Path(__file__).parent / "fixtures" / "fashion-mnist"


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    return Path(shutil.copytree(FIXTURE, tmp_path / "data"))


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 2)):
        for label in ("cat", "dog", "emu"):
            (tmp_path / split / label).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 255, (20, 30, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / split / label / f"{i}.png")
    return tmp_path


def test_fashion_mnist_gives_rgb_pictures_and_their_labels():
    dataset = FashionMNIST("train", FIXTURE)
    picture, label = dataset[0]
    assert (len(dataset), picture.size, picture.mode) == (400, (28, 28), "RGB")
    assert dataset.classes[label] == "Ankle boot"
    assert len(FashionMNIST("test", FIXTURE)) == 100


def test_fashion_mnist_is_found_in_torchvisions_layout(tmp_path: Path):
    raw = Path(shutil.copytree(FIXTURE, tmp_path / "FashionMNIST" / "raw"))
    assert find_folder(tmp_path) == raw


def test_a_folder_without_fashion_mnist_is_named(tmp_path: Path):
    with pytest.raises(DataError, match=f"{tmp_path}: no Fashion-MNIST here"):
        open_splits("fashion-mnist", tmp_path, hold_out=5)


def test_a_truncated_file_is_named(damaged: Path):
    path = damaged / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(DataError, match="train-images-idx3-ubyte.gz: damaged or cut short"):
        FashionMNIST("train", damaged)


def test_a_file_that_is_no_idx_is_named(damaged: Path):
    (damaged / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(b"not an idx file"))
    with pytest.raises(DataError, match="train-labels-idx1-ubyte.gz: not an IDX file"):
        FashionMNIST("train", damaged)


def test_a_header_that_promises_more_than_there_is_is_refused(damaged: Path):
    (damaged / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(bytes([0, 0, 8, 1, 0, 0, 1, 144, 7])))
    with pytest.raises(DataError, match="1 bytes of data where its header says 400"):
        FashionMNIST("train", damaged)


def test_training_validation_and_test_pictures_never_overlap():
    splits = open_splits("fashion-mnist", FIXTURE, hold_out=100, seed=3)
    train, validation = set(splits.train.indices), set(splits.validation.indices)
    assert len(train) == 300
    assert len(validation) == 100
    assert not train & validation
    assert splits.test.labels is not splits.train.dataset.labels


def test_the_held_out_pictures_depend_on_the_seed_alone():
    first, again, other = (open_splits("fashion-mnist", FIXTURE, hold_out=50, seed=s).validation for s in (1, 1, 2))
    assert first.indices == again.indices != other.indices


def test_holding_out_more_than_there_is_says_so():
    with pytest.raises(DataError, match="400 training pictures, too few to hold out 400"):
        open_splits("fashion-mnist", FIXTURE, hold_out=400)


def test_an_image_folder_opens_through_timm_with_its_class_names(image_folder: Path):
    splits = open_splits("folder", image_folder)
    assert splits.class_names == ("cat", "dog", "emu")
    assert (len(splits.train), len(splits.validation), splits.test) == (18, 6, None)
    assert splits.train[17][1] == 2


def test_holding_out_of_an_image_folder_leaves_its_own_validation_for_the_end(image_folder: Path):
    splits = open_splits("folder", image_folder, hold_out=4)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (14, 4, 6)


def test_a_missing_folder_is_named():
    with pytest.raises(DataError, match="nowhere: no such folder"):
        open_splits("folder", "nowhere")


def _batches(**kwargs: int) -> list[torch.Tensor]:
    dataset = FashionMNIST("train", FIXTURE)
    transform = create_transform(32, is_training=True, scale=(0.3, 1.0), re_prob=0.5, auto_augment="rand-m9-mstd0.5")
    return [images for images, _ in train_loader(dataset, transform, 64, seed=5, epoch=2, **kwargs)]


def test_batches_are_the_same_however_many_workers_load_them():
    alone, shared = _batches(), _batches(num_workers=2)
    assert len(alone) == 6
    assert all(torch.equal(a, b) for a, b in zip(alone, shared, strict=True))


def test_an_epoch_goes_on_from_any_batch():
    whole, rest = _batches(), _batches(first_batch=4)
    assert len(rest) == 2
    assert all(torch.equal(a, b) for a, b in zip(whole[4:], rest, strict=True))


def test_evaluation_takes_every_picture_once_in_order():
    dataset = FashionMNIST("test", FIXTURE)
    labels = torch.cat([labels for _, labels in eval_loader(dataset, create_transform(32), 33)])
    assert labels.tolist() == dataset.labels.tolist()
