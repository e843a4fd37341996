"""Plan fine-tuning on a folder of images: choose the settings, explain each choice, and describe the final score.

This module inspects the folder and makes a recipe; the trainer trains, and the command line prints. Values that do not
depend on the images are in `recipes/finetune.yaml`.
"""

from __future__ import annotations

import math
import os
import shlex
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.data import resolve_data_config

from ..activations import run_without_data
from ..data import Splits, open_splits
from ..data.label_table import flat_labels, is_label_table
from ..data.readable import readable_batches, refuse_broken
from ..data.sources import open_source, part_of
from ..errors import Argument, DataError, GlitError, Message, RecipeError, first_line
from ..evaluate import accuracy_interval
from ..recipes import Overrides, parse_overrides
from ..runs.processes import multiplies_bf16
from ..weights import loading
from ..weights.files import ENTRY_FILE
from .feed import naming_keys
from .recipe import Recipe, load_recipe
from .setup import create_model

__all__ = [
    "DEFAULT",
    "Plan",
    "check_images",
    "choose_batch_size",
    "choose_epochs",
    "data_keys",
    "describe_score",
    "next_commands",
    "plan",
]

DEFAULT = "glit_tiny.fractal1k"  # pretrained on formulas only, so no image licence applies

_HOLD_OUT_SHARE = 0.2
_MOST_HELD_OUT = 5000  # enough to measure accuracy to within half a percent
_STEPS = 1000  # minimum, within 100 epochs
_EPOCHS = (10, 100)
_BATCH_SIZES = (8, 16, 32, 64, 128)
_STEPS_PER_EPOCH = 12
_MANY_IMAGES = 10_000
_FEW_IMAGES = 1000
_IMBALANCE = 3  # ratio of the images of two classes
_FIXED = (
    "data.dataset", "data.root", "data.download", "data.input_key", "data.target_key", "data.fractals",
    "data.train_on_validation",
)  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """A recipe for one folder, a line of explanation for each choice in it, and the data."""

    recipe: Recipe
    lines: tuple[Message, ...]
    splits: Splits


def plan(
    directory: str | os.PathLike[str], model: str | None, device: torch.device, overrides: Overrides = (),
    root: str | os.PathLike[str] | None = None,
) -> Plan:  # fmt: skip
    """Inspect the images and choose the settings.

    Args:
        directory: contains `CLASS/*`, or `train/CLASS/*` with or without `val/CLASS/*` and `test/CLASS/*`; or a table
            of labels, see `read_label_table`.
        model: a model as in `predict.load_model`; None uses the default.
        device: device for training.
        overrides: values by `section.key`, or strings `section.key=value`; they take precedence over the choices here.
        root: the folder of a table's images, if it is not the table's folder.

    Raises:
        DataError: if there are too few images or classes, or the folders do not match.
        RecipeError, WeightsError: on a model or an override that cannot be used.
    """
    given = dict(overrides) if isinstance(overrides, Mapping) else parse_overrides(overrides)
    _refuse_fixed_keys(given, directory)
    model = given.get("model.name", model)
    name = loading.timm_name(model) if model is not None else DEFAULT
    dataset, root = data_keys(directory, root)
    choices = _Choices({**given, "model.name": name, "data.dataset": dataset, "data.root": root})
    choices.explain(f"model: {name}, {'as asked' if model else 'the default'} (", Argument("model"), ")")
    with naming_keys():
        train = open_source(dataset, root, choices.base.data.train_split)
    part = part_of(dataset, root, choices.base.data.train_split)
    place = part if isinstance(part, Path) else Path(directory)
    counts = Counter(train.classes[label] for label in flat_labels(train.labels or ()))
    several = _has_several(train)
    if len(counts) < 2:
        if not counts:
            raise DataError(f"{directory} has no class; it takes two or more")
        only = next(iter(counts))
        inner = place / only
        hint = f"; give {inner} if its folders are the classes" if any(map(Path.is_dir, inner.glob("*"))) else ""
        each = ", each in its folder" if dataset == "folder" else ""
        raise DataError(f"{directory} has one class, {only}; it takes two or more{each}{hint}")
    choices.lines.insert(0, Message(_describe_images(place, counts, len(train))))
    if several:
        choices.make(
            "augment.label_smoothing", 0.0,
            f"labels: several an image, or none, as {directory} has a | between them; each class by itself",
        )  # fmt: skip
    elif choices.base.class_weights is not None:
        choices.explain(f"class weights: {choices.base.class_weights}, as asked")
    elif choices.base.data.balanced:
        choices.explain("sampling: every class equally often, as asked")
    elif max(counts.values()) >= _IMBALANCE * min(counts.values()):
        choices.explain(
            "class weights: none; ", Argument("class_weights", "balanced"), " raises the small classes in the loss, ",
            Argument("data.balanced", True), " draws them more often",
        )  # fmt: skip
    splits = _choose_splits(choices, directory, counts, train)
    _choose_size(choices, name, device)
    _choose_length(choices, len(splits.train), several)
    _choose_machinery(choices, len(splits.train), device)
    recipe = choices.recipe()
    _check_classifier(recipe, len(counts))
    return Plan(recipe, tuple(choices.lines), splits)


def data_keys(directory: str | os.PathLike[str], root: str | os.PathLike[str] | None = None) -> tuple[str, str | None]:
    """`data.dataset` and `data.root` of a folder or a table. Raises DataError if `root` is given for a folder."""
    if is_label_table(str(directory)):
        return str(directory), None if root is None else str(root)
    if root is not None:
        raise DataError(f"{directory} is a folder, which is all that is needed; leave out ", Argument("root"))
    return "folder", str(directory)


def _refuse_fixed_keys(given: Mapping[str, Any], directory: Any) -> None:
    """Reject overrides of keys that would have no effect here."""
    for key in given:
        if key.startswith(_FIXED):
            raise RecipeError(
                f"{key} cannot be set: the images are the folder {directory}, scored on its validation images; "
                "`glit train finetune` takes every key"
            )
    if "data.validation_split" in given and given.get("data.hold_out"):
        raise RecipeError("data.validation_split and data.hold_out exclude each other; set one")


class _Choices:
    """Overrides of the finetune recipe by key, the user's and the chosen ones, and a line for each chosen one."""

    def __init__(self, given: Mapping[str, Any]) -> None:
        self.overrides = dict(given)
        self.given = set(given)
        self.base = load_recipe("finetune", self.overrides)
        self.lines: list[Message] = []

    def explain(self, *parts: str | Argument) -> None:
        self.lines.append(Message(*parts))

    def make(self, key: str, value: Any, *line: str | Argument) -> Any:
        """The value of a key: the user's if given, else `value`, which `line` and its parts explain."""
        section, _, field = key.partition(".")
        if not field:
            section, field = "", key
        if key in self.given:
            value = getattr(getattr(self.base, section) if section else self.base, field)
            if line:
                self.explain(f"{str(line[0]).partition(':')[0]}: {value}, as asked")
            return value
        self.overrides[key] = value
        if line:
            self.explain(*line)
        return value

    def recipe(self) -> Recipe:
        return load_recipe("finetune", self.overrides)


# ---- the choices ----


def _has_several(source: Any) -> bool:
    """Whether images may have several labels."""
    return getattr(source, "label_width", None) is not None


def _describe_images(place: Any, counts: Counter[str], total: int) -> str:
    listed = ", ".join(f"{name} {count}" for name, count in list(counts.items())[:5])
    if len(counts) > 5:
        listed += f", ...; from {min(counts.values())} to {max(counts.values())} each"
    return f"images: {total:,} of {len(counts)} classes in {place} ({listed})"


def _choose_splits(choices: _Choices, directory: Any, counts: Counter[str], train: Any) -> Splits:
    dataset, root = choices.base.data.dataset, choices.base.data.root
    if part_of(dataset, root, "test") is not None:
        choices.make("data.test_split", "test", "test: the images of its split, scored once at the end")
    has_validation = part_of(dataset, root, choices.base.data.validation_split) is not None
    if "data.hold_out" in choices.given or not (has_validation or "data.validation_split" in choices.given):
        hold_out = _choose_hold_out(choices, directory, counts, train)
    else:
        hold_out = 0
    # The recipe records the number of images, so that a run does not resume with different ones.
    limit = choices.make("data.limit", len(train) - hold_out)
    base = choices.base
    with naming_keys():
        splits = open_splits(
            dataset, root, hold_out, limit, base.split_seed, train_split=base.data.train_split,
            validation_split=base.data.validation_split, test_split=choices.recipe().data.test_split,
        )  # fmt: skip
    if not hold_out:
        choices.explain(f"validation: the {len(splits.validation):,} images of its split")
    return splits


def _choose_hold_out(choices: _Choices, directory: Any, counts: Counter[str], train: Any) -> int:
    several, total = _has_several(train), len(train)
    single = [] if several else [name for name, count in counts.items() if count == 1]
    if single:
        raise DataError(
            f"class {single[0]} in {directory} has one image; it takes two, to train on one and validate on the other"
        )
    if total == 1:
        raise DataError(f"{directory} has one image; it takes two, to train on one and validate on the other")
    share = min(round(_HOLD_OUT_SHARE * total), _MOST_HELD_OUT)
    hold_out = max(share, 1) if several else min(max(share, len(counts)), total - len(counts))
    return choices.make(
        "data.hold_out",
        hold_out,
        f"validation: {hold_out:,} of them, {'drawn at random' if several else 'each class its share'}, as there is no "
        "validation split (",
        Argument("data.hold_out", ...),
        ")",
    )


def _choose_size(choices: _Choices, name: str, device: torch.device) -> None:
    own = _choose_model(choices, name)
    half = own // 2
    if device.type == "cpu" and half >= 96 and half % 16 == 0:
        why = f"half the model's {own}, for a quarter of the time on this CPU; "
        best = Argument("model.img_size", own)
        choices.make("model.img_size", half, f"image size: {half} pixels, {why}", best, " for its best")
    else:
        line = f"image size: {own} pixels, the model's own ("
        choices.make("model.img_size", own, line, Argument("model.img_size"), ")")


def _choose_model(choices: _Choices, name: str) -> int:
    """Return the model's image size; turn stochastic depth off if the model does not support it."""
    try:
        try:
            model = loading.create_model(name, drop_path_rate=0.1)
        except TypeError as error:
            if "'drop_path_rate'" not in str(error):
                raise
            model = loading.create_model(name)
            choices.make("model.drop_path_rate", 0.0)
        return int(resolve_data_config(model=model)["input_size"][-1])
    except GlitError:
        raise
    except Exception as error:  # the model may come from any library
        raise RecipeError(Argument("model", name), f" cannot be built: {first_line(error)}") from None


def _choose_length(choices: _Choices, num_images: int, several: bool) -> None:
    """Choose batch size, epochs, learning rate and mixing from the number of training images."""
    batch = choose_batch_size(num_images)
    line = f"batch: {batch} of {num_images:,} images ("
    batch = choices.make("optim.batch_size", batch, line, Argument("optim.batch_size"), ")")
    epochs = choose_epochs(num_images, batch)
    steps = num_images // max(batch, 1) * epochs
    why = f"{steps:,} steps; {_STEPS:,} or more, but {_EPOCHS[0]} to {_EPOCHS[1]} epochs ("
    epochs = choices.make("optim.epochs", epochs, f"epochs: {epochs}, {why}", Argument("optim.epochs"), ")")
    choices.make("optim.warmup_epochs", round(0.1 * epochs, 1))
    of_recipe = load_recipe("finetune").optim
    lr = float(f"{of_recipe.lr * math.sqrt(batch / of_recipe.batch_size):.2g}")
    why = f"{of_recipe.lr:g} for a batch of {of_recipe.batch_size}, and by the root of the batch ("
    choices.make("optim.lr", lr, f"rate: {lr:g}, {why}", Argument("optim.lr", ...), ")")
    if several:
        return
    if num_images >= _MANY_IMAGES and batch % 2 == 0:
        choices.make("augment.mixup", 0.2)
        why, other = "on, as there are many (", Argument("augment.cutmix", 0)
        choices.make("augment.cutmix", 1.0, f"mixing of images: {why}", other, ")")
    else:
        why = f"it helps from some {_MANY_IMAGES:,} images on ("
        choices.make("augment.cutmix", 0.0, f"mixing of images: off, {why}", Argument("augment.cutmix", 1.0), ")")


def choose_batch_size(num_images: int) -> int:
    """The largest common batch size with enough steps per epoch."""
    fitting = [size for size in _BATCH_SIZES if size * _STEPS_PER_EPOCH <= num_images]
    return min(fitting[-1] if fitting else _BATCH_SIZES[0], num_images)


def choose_epochs(num_images: int, batch_size: int) -> int:
    """The number of epochs that gives enough steps, within 10 to 100."""
    steps = max(1, num_images // max(batch_size, 1))
    return min(max(math.ceil(_STEPS / steps), _EPOCHS[0]), _EPOCHS[1])


def _choose_machinery(choices: _Choices, num_images: int, device: torch.device) -> None:
    cores = _count_cores()
    on_cpu = device.type == "cpu"
    if on_cpu:
        workers = min(cores - 1, 1) if num_images >= _FEW_IMAGES else 0
        why = "as the CPU has to train as well"
    else:
        workers, why = min(cores, 8), f"of {cores} cores"
    line = (f"loading: by {workers} more processes, {why} (", Argument("data.num_workers", ...), ")")
    choices.make("data.num_workers", workers, *(line if workers else ()))
    fast = multiplies_bf16() if on_cpu else device.type == "cuda" and torch.cuda.is_bf16_supported()
    if fast:
        what = "CPU" if on_cpu else "GPU"
        line = (f"precision: bf16, for which this {what} is made (", Argument("precision", "fp32"), ")")
        choices.make("precision", "bf16", *line)


def _count_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _check_classifier(recipe: Recipe, num_classes: int) -> None:
    """Build the model as the trainer will, and run it on one empty image."""
    model, size = create_model(recipe.model, num_classes), recipe.model.img_size
    try:
        try:
            shape = tuple(run_without_data(model, (1, 3, size, size)).shape)
        except Exception:  # some models cannot run without data
            with torch.inference_mode():
                shape = tuple(model.eval()(torch.zeros(1, 3, size, size)).shape)
    except Exception as error:
        raise RecipeError(
            Argument("model", recipe.model.name), f" takes no images of {size} pixels: {first_line(error)}"
        ) from None
    if shape != (1, num_classes):
        raise RecipeError(
            Argument("model", recipe.model.name), f" is no classifier: it makes {list(shape)} of one image"
        )


# ---- before and after training ----


def _no_image(image: Image.Image) -> torch.Tensor:
    return torch.zeros(0)


def check_images(splits: Splits, listing: Path) -> None:
    """Read every image once, with a progress bar, so that errors appear before training starts.

    Args:
        listing: file for the names of broken images, if they are too many for a message.

    Raises:
        DataError: if some images cannot be read; names them.
    """
    broken: list[str] = []
    datasets = [dataset for dataset in (splits.train, splits.validation, splits.test) if dataset is not None]
    for dataset in datasets:
        num_workers = min(_count_cores(), 8) if len(dataset) >= _FEW_IMAGES else 0
        for _, _, reasons in readable_batches(dataset, _no_image, 16, num_workers, "reading the images"):
            broken += filter(None, reasons)
    refuse_broken(broken, sum(map(len, datasets)), listing)


def describe_score(result: dict[str, Any], splits: Splits, keep: str = "best") -> list[str]:
    """Describe the result and its confidence interval, as lines of text; `keep` is the recipe's."""
    which = f"epoch {result['epoch']} was the {keep}"
    kind, scored = ("validation", splits.validation) if splits.test is None else ("test", splits.test)
    if splits.is_multilabel:
        mean = result[f"{kind}_map"]
        return [
            f"{kind} mAP: {mean:.2f} % on {len(scored):,} images, {which}",
            f"at a probability of one half: macro-F1 {result[f'{kind}_macro_f1']:.2f} %, micro-F1 "
            f"{result[f'{kind}_micro_f1']:.2f} %",
        ]
    top1, count = result[f"{kind}_top1"], len(scored)
    correct = round(top1 * count / 100)
    lines = [f"{kind} top-1: {top1:.2f} % ({correct:,} of {count:,} images), {which}"]
    if f"{kind}_macro_f1" in result:
        balanced, f1 = result[f"{kind}_balanced_accuracy"], result[f"{kind}_macro_f1"]
        lines.append(f"balanced accuracy {balanced:.2f} %, macro-F1 {f1:.2f} %: each class counts the same")
    if count < _FEW_IMAGES:
        low, high = accuracy_interval(top1, count)
        lines.append(
            f"{count} images say only so much: the rate on others like them may be {low:.0f} % to "
            f"{high:.0f} % (95 % confidence)"
        )
    if splits.test is None and keep == "best":
        lines.append("these images also chose the epoch; images in a test folder would be scored once, at the end")
    return lines


def next_commands(
    directory: str | os.PathLike[str], out: Path, splits: Splits, root: str | os.PathLike[str] | None = None
) -> list[str]:
    """The commands to run next: predict on an image that was not used for training, score, publish."""
    unseen, model = splits.test or splits.validation, str(out / "model")
    keys = data_keys(directory, root)
    held_out = all(part_of(*keys, split) is None for split in ("test", "validation"))
    data = [str(directory), *(("--root", str(root)) if root is not None else ())]
    commands = [
        ["glit", "predict", unseen.filename(0), "--model", model],
        ["glit", "eval", model, *(["OTHER_IMAGES"] if held_out else data)],
    ]
    if (out / "model" / ENTRY_FILE).is_file():  # a model of this package, not another of timm's
        commands.append(["glit", "publish", model, "--to-folder", str(out / "published"), "--license", "LICENSE"])
    return [shlex.join(command) for command in commands]
