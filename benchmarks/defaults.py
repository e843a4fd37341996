"""Which settings of `glit finetune` are best within 2, 10 or 60 minutes of a CPU? On three folders of real images.

Each arm changes one choice of `glit finetune`, and trains for as many epochs as fit into the time: CPU seconds of one
thread, from a trial of a few steps. Three folders:

- `fashion`: 1,000 images of Fashion-MNIST to train on, and all 10,000 test images;
- `stamps`: seven classes of cut-out photographs, half of them to train on; needs Debian's `tuxpaint-stamps-default`;
- `crops`: which of the photographs in scikit-image is a crop of? From the left half to train on, from the right half to
  test on; needs `pip install scikit-image`.

`stamps` has another split for every seed. Nothing is chosen on test images. The scores are kept in
`benchmarks/defaults.json`: what is there is not trained again. The command can be stopped and given again, and several
processes share the work.
"""

import argparse
import dataclasses
import os
import random
import statistics
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import torch
from PIL import Image, UnidentifiedImageError

from glit_models.data import open_splits
from glit_models.errors import RunError
from glit_models.runs.files import scratch_folder, temporary_folder, write_text
from glit_models.runs.signals import StopRequest
from glit_models.training import Recipe, Trainer
from glit_models.training.finetuning import plan

from . import report
from .ablation import paired

TABLE = Path(__file__).with_suffix(".json")
ARMS: dict[str, dict[str, object]] = {
    "the defaults": {},
    "from scratch": {"model.pretrained": False, "optim.layer_decay": None},
    "no layer decay": {"optim.layer_decay": None},
    "layer decay 0.9": {"optim.layer_decay": 0.9},
    "64 pixels": {"model.img_size": 64},
    "224 pixels": {"model.img_size": 224},
    "three times the rate": {},  # see RATES
    "a third of the rate": {},
    "larger crops": {"augment.scale": (0.8, 1.0)},
    "smaller crops": {"augment.scale": (0.2, 1.0)},
    "RandAugment": {"augment.auto_augment": "rand-m9-mstd0.5-inc1"},
    "mixing of images": {"augment.mixup": 0.2, "augment.cutmix": 1.0},
}
RATES = {"three times the rate": 3, "a third of the rate": 1 / 3}
STAMPS = Path("/usr/share/tuxpaint/stamps")
KINDS = ("animals/birds", "animals/insects", "animals/mammals", "food/fruit", "food/vegetables", "plants/flowers",
         "town/houses")  # fmt: skip
SMALLEST = 384  # pixels: the smaller side of a photograph that is cropped
TRIAL_STEPS = (2, 8)
Key = tuple[str, float, str, int]  # folder, minutes, arm, seed


def main() -> None:
    """Train what the table lacks, and print."""
    parser = report.parser(__doc__, rounds=3)
    parser.add_argument("--minutes", type=float, nargs="+", default=[2], help="of CPU time")
    parser.add_argument("--folders", nargs="+", default=list(FOLDERS), choices=list(FOLDERS))
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--out", default="runs/defaults", type=Path, help="folder of the images and runs")
    parser.add_argument("--max-minutes", type=float, help="save and exit after this time")
    parser.add_argument("--show", action="store_true", help="run nothing; print what is done")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if not options.show:
        options.stop = StopRequest(options.max_minutes)
        for key in _keys(options):
            _train(options, key)
    show(options)


def _keys(options: argparse.Namespace) -> Iterator[Key]:
    for minutes in options.minutes:
        for seed in range(options.rounds):
            for folder in options.folders:
                for arm in options.arms:
                    yield folder, minutes, arm, seed


def _train(options: argparse.Namespace, key: Key) -> None:
    """Fine-tune once and add the scores to the table, unless they are there or another process is at it."""
    folder, minutes, arm, seed = key
    run = options.out / f"{folder} {minutes:g} {arm} {seed}"
    if key in report.read_rows(TABLE) or (run / "scores.json").is_file():
        return
    images = options.out / (f"images {folder} {seed}" if folder == "stamps" else f"images {folder}")
    if not images.exists():
        with scratch_folder(images) as temporary:
            FOLDERS[folder](temporary, seed)
            os.replace(temporary, images)
    try:
        recipe = _recipe(images, arm, seed, options.out / "trials" / run.name, minutes)
        result = Trainer(recipe, run, "cpu", options.stop.minutes_left).run()
    except RunError as error:
        print(error, file=sys.stderr)
        return
    if result is None:
        sys.exit("stopped; run the same command to resume")
    scores = {"test_top1": round(result["test_top1"], 2), "epochs": recipe.optim.epochs}
    report.keep_row(TABLE, run, key, scores)


def _recipe(images: Path, arm: str, seed: int, kept: Path, minutes: float) -> Recipe:
    """The recipe of a run: the arm's, with the epochs that fit into its time, which are kept in a file."""
    if kept.is_file():
        return _plan(images, arm, seed, int(kept.read_text()))
    trial = _plan(images, arm, seed, 1)
    steps = (trial.data.limit or 0) // trial.optim.batch_size
    epochs = max(1, round(60 * minutes / (_seconds(trial) * steps)))
    write_text(kept, str(epochs), parents=True)
    return _plan(images, arm, seed, epochs)


def _plan(images: Path, arm: str, seed: int, epochs: int) -> Recipe:
    keys: dict[str, object] = {
        "seed": seed,
        "data.num_workers": 0,
        "optim.epochs": epochs,
        "eval_every": max(1, epochs // 10),
    }
    keys |= ARMS[arm]
    if arm in RATES:
        keys["optim.lr"] = RATES[arm] * plan(str(images), None, torch.device("cpu")).recipe.optim.lr
    return plan(str(images), None, torch.device("cpu"), keys).recipe


def _seconds(recipe: Recipe) -> float:
    """CPU seconds of a training step and its images, from two short trainings of different lengths."""
    batch, times = recipe.optim.batch_size, []
    for steps in TRIAL_STEPS:
        short = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, limit=batch * steps))
        with temporary_folder() as folder:
            before = time.process_time()
            Trainer(short, folder / "run", "cpu", score_test=False).run()
            times.append(time.process_time() - before)
    return (times[1] - times[0]) / (TRIAL_STEPS[1] - TRIAL_STEPS[0])


# ---- the folders ----


def _write_fashion(folder: Path, seed: int) -> None:
    splits = open_splits("fashion-mnist", None, 1, 1000, 0)
    for name, dataset in (("train", splits.train), ("test", splits.test)):
        for index in range(len(dataset)):
            image, label = dataset[index]
            _save(image, folder / name / splits.class_names[label].replace("/", " or "), index)


def _write_stamps(folder: Path, seed: int) -> None:
    if not STAMPS.is_dir():
        raise SystemExit(f"{STAMPS} is missing: apt-get install tuxpaint-stamps-default")
    for kind in KINDS:
        paths = sorted((STAMPS / kind).rglob("*.png"))
        random.Random(f"{seed} {kind}").shuffle(paths)
        for index, path in enumerate(paths):
            with Image.open(path) as image:
                whole = Image.new("RGB", image.size, "white")
                rgba = image.convert("RGBA")
                whole.paste(rgba, mask=rgba)
            whole.thumbnail((256, 256))
            _save(whole, folder / ("train" if index < len(paths) // 2 else "test") / Path(kind).name, index)


def _write_crops(folder: Path, seed: int) -> None:
    found = find_spec("skimage")
    if found is None or found.origin is None:
        raise SystemExit("crops are cut from the photographs of scikit-image: pip install scikit-image")
    for path in sorted(Path(found.origin).parent.joinpath("data").iterdir()):
        try:
            with Image.open(path) as image:
                photograph = image.convert("RGB")
        except (UnidentifiedImageError, OSError, IsADirectoryError):
            continue
        if min(photograph.size) < SMALLEST:
            continue
        rng = random.Random(path.name)
        width, height = photograph.size
        for name, left in (("train", 0), ("test", width // 2)):
            for index in range(60):
                size = rng.randint(64, 128)
                x, y = left + rng.randint(0, width // 2 - size), rng.randint(0, height - size)
                _save(photograph.crop((x, y, x + size, y + size)), folder / name / path.stem, index)


def _save(image: Image.Image, folder: Path, index: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    image.save(folder / f"{index}.png")


FOLDERS = {"fashion": _write_fashion, "stamps": _write_stamps, "crops": _write_crops}


# ---- the result ----


def show(options: argparse.Namespace) -> None:
    """Print the finished arms beside the defaults, paired by seed."""
    scores: dict[tuple[str, float, str], list[float]] = {}
    epochs: dict[tuple[str, float, str], list[int]] = {}
    for (folder, minutes, arm, seed), found in sorted(report.read_rows(TABLE).items()):
        if seed < options.rounds:
            scores.setdefault((folder, minutes, arm), []).append(found["test_top1"])
            epochs.setdefault((folder, minutes, arm), []).append(found["epochs"])
    whole = {key: tests for key, tests in scores.items() if len(tests) == options.rounds}
    if not whole:
        sys.exit(f"no arm has {options.rounds} finished seeds yet")
    rows: list[report.Row] = []
    for folder in FOLDERS:
        for minutes in sorted({minutes for _, minutes, _ in whole}):
            base = whole.get((folder, minutes, "the defaults"))
            for arm in ARMS:
                if tests := whole.get((folder, minutes, arm)):
                    compared = base and arm != "the defaults" and options.rounds > 1
                    rows.append({
                        "folder": folder, "minutes": f"{minutes:g}", "changed": arm,
                        "epochs": statistics.median(epochs[folder, minutes, arm]),
                        "test top-1, %": f"{statistics.mean(tests):.1f}",
                        "to the defaults (95 %)": paired(tests, base, 1) if compared else "",
                    })  # fmt: skip
    report.show("defaults", options, rows, "mean")


if __name__ == "__main__":
    main()
