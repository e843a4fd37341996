"""Measure what class weights and balanced sampling gain where one class has a fiftieth of the images of the others.

Fine-tunes `glit_tiny.fractal1k` at 32 pixels on three similar classes of Fashion-MNIST: 500 pullovers, 500 coats and 10
shirts. The last weights are scored on the 3,000 test images of these classes; nothing is chosen on them.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

import torch

from glit_models.data import open_splits
from glit_models.training import Trainer
from glit_models.training.finetuning import plan

from . import report

IMAGES = {"Pullover": 500, "Coat": 500, "Shirt": 10}
WAYS: dict[str, dict[str, object]] = {
    "as they are": {},
    "--class-weights balanced": {"class_weights": "balanced"},
    "--balanced": {"data.balanced": True},
}


def main() -> None:
    """Train and print."""
    parser = report.parser(__doc__, rounds=3)
    parser.add_argument("--epochs", type=int, default=10)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "images"
        _write(folder)
        rows = [_row(folder, name, keys, options) for name, keys in WAYS.items()]
    report.show("imbalance", options, rows, "mean")


def _write(folder: Path) -> None:
    """Write the images of the three classes as PNG files, the test images whole."""
    splits = open_splits("fashion-mnist", None, 1, None, 0)
    for name, dataset in (("train", splits.train), ("test", splits.test)):
        counts = dict.fromkeys(IMAGES, 0)
        for index in range(len(dataset)):
            image, label = dataset[index]
            kind = splits.class_names[label]
            if kind in counts and (name == "test" or counts[kind] < IMAGES[kind]):
                path = folder / name / kind / f"{counts[kind]}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                image.save(path)
                counts[kind] += 1


def _row(folder: Path, name: str, keys: dict[str, object], options: argparse.Namespace) -> report.Row:
    results = []
    for seed in range(options.rounds):
        given = {"seed": seed, "keep": "last", "model.img_size": 32, "optim.epochs": options.epochs, **keys}
        recipe = plan(str(folder), "glit_tiny.fractal1k", torch.device("cpu"), given).recipe
        result = Trainer(recipe, folder.parent / f"{name}-{seed}", "cpu").run()
        assert result is not None
        results.append(result)
    columns = {
        "top-1, %": "test_top1",
        "balanced accuracy, %": "test_balanced_accuracy",
        "macro-F1, %": "test_macro_f1",
    }
    return {"small class": name} | {
        column: " ".join(f"{result[key]:.1f}" for result in results)
        + f" ({statistics.mean(result[key] for result in results):.1f})"
        for column, key in columns.items()
    }


if __name__ == "__main__":
    main()
