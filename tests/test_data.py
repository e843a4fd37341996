"""Tests of data sets and of the batches made from them."""

import dataclasses
import gzip
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import Mixup, create_transform
from torch.utils.data._utils import signal_handling

from glit_models.data import open_splits
from glit_models.data.batched import TensorImages, random_affine
from glit_models.data.fashion_mnist import FashionMNIST, find_folder
from glit_models.data.loading import balanced_order, eval_loader, part_positions, train_parts
from glit_models.errors import DataError
from glit_models.training.recipe import AugmentSection

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


def test_fashion_mnist_gives_rgb_images_and_their_labels():
    dataset = FashionMNIST("train", FIXTURE)
    image, label = dataset[0]
    assert (len(dataset), image.size, image.mode) == (400, (28, 28), "RGB")
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


def test_training_validation_and_test_images_never_overlap():
    splits = open_splits("fashion-mnist", FIXTURE, hold_out=100, seed=3)
    train, validation = set(splits.train.indices), set(splits.validation.indices)
    assert len(train) == 300
    assert len(validation) == 100
    assert not train & validation
    assert splits.test.labels is not splits.train.dataset.labels


def test_the_held_out_images_depend_on_the_seed_alone():
    first, again, other = (open_splits("fashion-mnist", FIXTURE, hold_out=50, seed=s).validation for s in (1, 1, 2))
    assert first.indices == again.indices != other.indices


def test_holding_out_more_than_there_is_says_so():
    with pytest.raises(DataError, match="400 training images, too few to hold out 400"):
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


TRANSFORM = create_transform(32, is_training=True, scale=(0.3, 1.0), re_prob=0.5, auto_augment="rand-m9-mstd0.5")


def _parts(num_parts: int = 1, parts: Sequence[int] = (0,), **kwargs: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    dataset = kwargs.pop("dataset", None) or FashionMNIST("train", FIXTURE)
    options = {"batch_size": 64, "seed": 5, "epoch": 2, **kwargs}
    return list(train_parts(dataset, TRANSFORM, num_parts=num_parts, parts=parts, **options))


def test_batches_are_the_same_however_many_workers_load_them():
    alone, shared = _parts(), _parts(num_workers=2)
    assert len(alone) == 6
    assert all(torch.equal(a, b) for a, b in zip(alone[0] + alone[5], shared[0] + shared[5], strict=True))


def test_an_epoch_goes_on_from_any_step():
    whole, rest = _parts(2, (1,)), _parts(2, (1,), first_step=4)
    assert len(rest) == 2
    assert all(torch.equal(a[0], b[0]) for a, b in zip(whole[4:], rest, strict=True))


@pytest.mark.parametrize("num_parts", [2, 4, 8])
def test_the_parts_of_a_batch_are_the_batch(num_parts: int):
    (images, labels), *_ = _parts()
    parts = [_parts(num_parts, (part,))[0] for part in range(num_parts)]
    places = np.concatenate([part_positions(64, num_parts, part) for part in range(num_parts)])
    assert sorted(places) == list(range(64))
    assert torch.equal(torch.cat([part[0] for part in parts]), images[places])
    assert torch.equal(torch.cat([part[1] for part in parts]), labels[places])


def test_a_process_gets_its_parts_of_every_step_in_turn():
    mine = _parts(4, (2, 3))
    assert len(mine) == len(train_parts(FashionMNIST("train", FIXTURE), TRANSFORM, batch_size=64, num_parts=4,
                                        parts=(2, 3), seed=5, epoch=2)) == 12  # fmt: skip
    for index, part in enumerate((2, 3)):
        assert all(torch.equal(a[0], b[0]) for a, b in zip(mine[index::2], _parts(4, (part,)), strict=True))


@pytest.mark.parametrize("options", [{"mixup_alpha": 0.8, "cutmix_alpha": 0.0}, {"mixup_alpha": 0, "cutmix_alpha": 1}])
def test_mixing_the_parts_of_a_batch_is_mixing_the_batch(options: dict[str, float]):
    mixup = Mixup(**options, num_classes=10, label_smoothing=0.1)

    def mixed(images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        np.random.seed(3)  # noqa: NPY002  (timm draws from it)
        return mixup(images.clone(), labels)

    whole = mixed(*_parts()[0])
    assert not torch.equal(whole[0], _parts()[0][0])
    for part in range(4):
        places = part_positions(64, 4, part)
        for ours, theirs in zip(mixed(*_parts(4, (part,))[0]), whole, strict=True):
            assert torch.equal(ours, theirs[places])


def test_parts_of_odd_size_are_plain_slices():
    assert part_positions(9, 3, 1).tolist() == [3, 4, 5]
    assert part_positions(8, 2, 1).tolist() == [2, 3, 4, 5]


class _Numbered:
    """Ten flat images, each with its index as grey value and label."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.new("RGB", (8, 8), (index, index, index)), index


def test_repeated_augmentation_shows_fewer_images_each_so_often():
    def labels(**kwargs: Any) -> list[list[int]]:
        batches = train_parts(_Numbered(), TRANSFORM, batch_size=6, num_parts=1, parts=(0,), seed=0, **kwargs)
        return [labels.tolist() for _, labels in batches]

    assert len(labels(epoch=0, repeats=3)) == 1  # as many images an epoch as without
    (batch,) = labels(epoch=0, repeats=3)
    assert batch[:2] == batch[2:4] == batch[4:]
    assert len(set(batch)) == 2
    assert batch != labels(epoch=1, repeats=3)[0]


def test_a_balanced_epoch_takes_every_image_of_a_class_before_one_again():
    labels = np.array([0] * 10 + [1] * 3 + [2])
    order, before = balanced_order(labels, np.random.default_rng(0))
    counts = sorted(np.bincount(labels[order]).tolist())
    assert counts == [4, 5, 5]  # of 14 images and three classes
    assert len(set(order[labels[order] == 0])) == counts[0] or len(set(order[labels[order] == 0])) == counts[1]
    assert sorted(np.bincount(order)[10:13].tolist())[0] >= 1
    for index in range(len(labels)):
        assert sorted(before[order == index]) == list(range((order == index).sum()))
    again, _ = balanced_order(labels, np.random.default_rng(0))
    assert (again == order).all()


def test_each_repetition_is_augmented_in_its_own_way():
    images, labels = _parts(repeats=3, batch_size=12)[0]
    same = [place for place, label in enumerate(labels[:12:4].tolist()) if label == labels[0]]
    assert len(same) == 3
    assert not torch.equal(images[0], images[4])
    assert not torch.equal(images[4], images[8])


def test_evaluation_takes_every_image_once_in_order():
    dataset = FashionMNIST("test", FIXTURE)
    labels = torch.cat([labels for _, labels in eval_loader(dataset, create_transform(32), 33)])
    assert labels.tolist() == dataset.labels.tolist()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_processes_share_an_evaluation_without_counting_an_image_twice(num_workers: int):
    dataset = FashionMNIST("test", FIXTURE)
    shares = []
    for rank in range(3):
        batches = eval_loader(dataset, create_transform(32), 16, num_workers, rank, world_size=3)
        share = torch.cat([labels for _, labels in batches])
        assert share.tolist() == dataset.labels[rank::3].tolist()
        assert len(batches) == -(-len(share) // 16)
        shares.append(len(share))
    assert sum(shares) == 100


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_image_that_cannot_be_read_is_one_line_with_its_file(image_folder: Path, num_workers: int):
    broken = image_folder / "train" / "dog" / "3.png"
    broken.write_bytes(broken.read_bytes()[:200])
    (image_folder / "val" / "emu" / "0.png").write_bytes(b"no image")
    splits = open_splits("folder", image_folder)
    with pytest.raises(DataError) as error:
        list(train_parts(splits.train, TRANSFORM, batch_size=18, num_parts=1, parts=(0,), seed=0, epoch=0,
                         num_workers=num_workers))  # fmt: skip
    assert str(error.value).startswith(f"{broken}: cannot be read (")
    assert "\n" not in str(error.value)
    with pytest.raises(DataError, match="emu/0.png: not an image"):
        list(eval_loader(splits.validation, create_transform(32), 6, num_workers))


def test_a_program_that_fails_while_workers_load_ends():
    code = f"""
from timm.data import create_transform
from glit_models.data.fashion_mnist import FashionMNIST
from glit_models.data.loading import eval_loader
batches = iter(eval_loader(FashionMNIST("test", {str(FIXTURE)!r}), create_transform(32), 5, num_workers=1))
next(batches)
raise RuntimeError("of another kind")
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 1
    assert "RuntimeError: of another kind" in ended.stderr


def test_a_signal_does_not_end_a_worker_that_is_starting(monkeypatch: pytest.MonkeyPatch):
    install = signal_handling._set_worker_signal_handlers

    def install_slowly() -> None:  # torch's handlers, which end a worker; it ignores signals only after that
        install()
        time.sleep(1)

    def send() -> None:
        while not (started := multiprocessing.active_children()):
            time.sleep(0.01)
        os.kill(started[0].pid or 0, signal.SIGTERM)

    monkeypatch.setattr(signal_handling, "_set_worker_signal_handlers", install_slowly)
    sender = threading.Thread(target=send, daemon=True)
    sender.start()
    batches = list(eval_loader(FashionMNIST("test", FIXTURE), create_transform(32), 5, num_workers=1))
    sender.join()
    assert sum(len(labels) for _, labels in batches) == len(FashionMNIST("test", FIXTURE))


# ---- batches as tensors ----


def _tensor_images(size: int = 28, count: int = 12) -> TensorImages:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (count, 28, 28, 3), dtype=np.uint8)
    return TensorImages([(Image.fromarray(p), label) for label, p in enumerate(pixels)], size, torch.device("cpu"))


def test_a_crop_of_everything_is_the_image_and_a_flip_its_mirror_image() -> None:
    images = _tensor_images()
    whole = AugmentSection(scale=(1.0, 1.0), ratio=(1.0, 1.0), hflip=0.0)
    keywords = {"batch_size": 4, "num_parts": 1, "parts": (0,), "seed": 3, "epoch": 1}
    for flips, dims in (({}, ()), ({"hflip": 1.0}, (3,)), ({"vflip": 1.0}, (2,))):
        augment = dataclasses.replace(whole, **flips)
        seen = []
        for ((batch, labels),) in images.steps(augment, **keywords):
            torch.testing.assert_close(batch, images.images[labels].float().flip(dims) / 255, atol=1e-5, rtol=0)
            seen += labels.tolist()
        assert sorted(seen) == list(range(12))


def test_crops_lie_inside_the_image_and_cover_the_share_that_is_asked_for() -> None:
    theta = random_affine(2000, (0.25, 0.75), (0.8, 1.25), 0.5, 0.5, np.random.default_rng(0))
    width, height = theta[:, 0, 0].abs(), theta[:, 1, 1].abs()
    assert bool((theta[:, 0, 2].abs() + width <= 1 + 1e-6).all() and (theta[:, 1, 2].abs() + height <= 1 + 1e-6).all())
    area, aspect = width * height, width / height
    assert 0.25 <= area.min() < 0.27
    assert 0.73 < area.max() <= 0.75
    assert 0.8 - 1e-5 <= aspect.min() < 0.81
    assert 1.24 < aspect.max() <= 1.25 + 1e-5
    assert 900 < (theta[:, 0, 0] < 0).sum() < 1100


def test_a_batch_is_the_same_in_however_many_parts_and_from_wherever_it_is_continued() -> None:
    images = _tensor_images(size=32)
    keywords = {"batch_size": 4, "seed": 3, "epoch": 1}
    whole = [parts[0] for parts in images.steps(AugmentSection(), **keywords, num_parts=1, parts=(0,))]
    halves = list(images.steps(AugmentSection(), **keywords, num_parts=2, parts=(0, 1), first_step=1))
    assert len(whole) == 3
    assert len(halves) == 2
    assert whole[0][0].shape == (4, 3, 32, 32)
    for (batch, labels), parts in zip(whole[1:], halves, strict=True):
        for part, (images_of, labels_of) in enumerate(parts):
            positions = part_positions(4, 2, part)
            assert torch.equal(batch[positions], images_of)
            assert torch.equal(labels[positions], labels_of)


def test_images_that_cannot_be_batched_are_named() -> None:
    with pytest.raises(DataError, match="images of 28 x 28 pixels are larger than the 24 to train with"):
        _tensor_images(size=24)
    sizes = [(Image.new("RGB", (8, 8)), 0), (Image.new("RGB", (9, 8)), 1)]
    with pytest.raises(DataError, match="image 1 has 9 x 8 pixels, image 0 8 x 8; batched needs images of one size"):
        TensorImages(sizes, 32, torch.device("cpu"))
