"""Measure the speed of loading training images, compared with `timm.data.create_loader` for the same data.

Fashion-MNIST with the recipe fashion_mnist (64 pixels per side), and a generated folder of JPEG files of 400 x 300
pixels with DeiT's ImageNet augmentation (random crop, RandAugment, random erasing; 224 pixels per side). Includes all
work up to batches of normalised float32 on the CPU, and the start of the workers.
"""

from collections.abc import Callable, Iterable
from functools import partial
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import timm.data
import torch
from PIL import Image

from glit_models.data import open_splits
from glit_models.data.datasets import Subset
from glit_models.data.loading import train_parts
from glit_models.training import load_recipe, setup
from glit_models.training.recipe import AugmentSection

from . import report

# DeiT's magnitude of 9, without noise: at 10, timm asks Pillow for 0 bits of a colour, which Pillow 13.0 rejects.
DEIT = AugmentSection(auto_augment="rand-m9-inc1", re_prob=0.25, re_mode="pixel")
IMAGENET: dict[str, Any] = {
    "mean": timm.data.IMAGENET_DEFAULT_MEAN,
    "std": timm.data.IMAGENET_DEFAULT_STD,
    "interpolation": "bicubic",
}


def main() -> None:
    """Measure and print."""
    parser = report.parser(__doc__.splitlines()[0] if __doc__ else None, rounds=5)
    parser.add_argument("--workers", default="0,1", help="numbers, separated by commas")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--fashion-mnist", type=int, default=4096, help="number of Fashion-MNIST images to load")
    parser.add_argument("--jpeg", type=int, default=512, help="number of JPEG files to make and load")
    report.add_clock(parser)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    with TemporaryDirectory() as root:
        _write_jpegs(Path(root), options.jpeg)
        sources = {"Fashion-MNIST, 64 px": _fashion_mnist(options.fashion_mnist), "JPEG, 224 px": _jpegs(root)}
        cases: dict[tuple[str, str, str], Callable[[], None]] = {}
        for (name, source), workers in product(sources.items(), options.workers.split(",")):
            for how, make in (("timm", _timm_loader), ("glit_models", _our_loader)):
                cases[name, workers, how] = partial(_load, make, *source, options.batch_size, int(workers))
        seconds = report.interleaved(
            {"|".join(key): case for key, case in cases.items()}, options.rounds, options.clock
        )
    rows: list[report.Row] = []
    for name, workers in product(sources, options.workers.split(",")):
        images = len(sources[name][0]) // options.batch_size * options.batch_size
        rates = {f"{how}, images/s": images / seconds[f"{name}|{workers}|{how}"] for how in ("timm", "glit_models")}
        rows.append({"data": name, "workers": workers, **rates})
    report.show("loading", options, rows)


def _load(make: Callable[..., Iterable[Any]], *arguments: Any) -> None:
    for _ in make(*arguments):
        pass


Source = tuple[Any, int, AugmentSection, dict[str, Any]]  # images, size, augmentation, mean and so on


def _fashion_mnist(count: int) -> Source:
    recipe = load_recipe("fashion_mnist")
    splits = open_splits("fashion-mnist", hold_out=recipe.data.hold_out, limit=count)
    preprocessing = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": recipe.data.interpolation}
    return splits.train, recipe.model.img_size, recipe.augment, preprocessing


def _jpegs(root: str) -> Source:
    splits = open_splits("folder", root, hold_out=2)
    source = splits.train.dataset
    return Subset(source, range(len(source))), 224, DEIT, IMAGENET


def _write_jpegs(root: Path, count: int) -> None:
    """Smooth colours with some noise, which compress about like photographs."""
    generator = np.random.default_rng(0)
    for number in range(count):
        folder = root / "train" / f"class{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(generator.integers(0, 256, (30, 40, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((400, 300), Image.Resampling.BICUBIC), dtype=float)
        noisy = smooth + generator.normal(0, 8, smooth.shape)
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / f"{number}.jpg", quality=90)


def _our_loader(
    images: Any, size: int, augment: AugmentSection, preprocessing: dict[str, Any], batch_size: int, workers: int
) -> Iterable[Any]:
    transform = setup.create_train_transform(size, augment, preprocessing)
    return train_parts(
        images, transform, batch_size=batch_size, num_parts=1, parts=(0,), seed=0, epoch=0, num_workers=workers
    )


class _Settable(torch.utils.data.Dataset[Any]):
    """A data set whose transform timm's loader can set."""

    transform: Callable[[Any], torch.Tensor]

    def __init__(self, images: Any) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        image, label = self.images[index]
        return self.transform(image), label


def _timm_loader(
    images: Any, size: int, augment: AugmentSection, preprocessing: dict[str, Any], batch_size: int, workers: int
) -> Iterable[Any]:
    return timm.data.create_loader(
        _Settable(images), size, batch_size, is_training=True, scale=augment.scale, ratio=augment.ratio,
        hflip=augment.hflip, color_jitter=None, auto_augment=augment.auto_augment, re_prob=augment.re_prob,
        re_mode=augment.re_mode, num_workers=workers, use_prefetcher=False, persistent_workers=False,
        pin_memory=torch.cuda.is_available(), **preprocessing,
    )  # fmt: skip


if __name__ == "__main__":
    main()
