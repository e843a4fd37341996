"""Training recipes: dataclasses for all settings of a run, read from YAML and checked before the run starts."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..data.fractals import FractalConfig
from ..data.label_table import is_label_table
from ..data.sources import is_streamed
from ..errors import Argument, RecipeError
from ..recipes import Overrides, build_recipe, read_recipe, to_yaml

__all__ = ["Recipe", "load_recipe", "shipped_recipes", "without_machine_keys"]

_SHIPPED = Path(__file__).with_name("recipes")


@dataclass(frozen=True)
class ModelSection:
    """The model: keywords of `timm.create_model`, and how it is run."""

    name: str = "glit_tiny"  # any timm classifier: MODEL, MODEL.TAG, 'local-dir:DIR', 'hf-hub:NAMESPACE/NAME'
    spec: dict[str, Any] | str | None = None  # the fields of a GLiTSpec, or the path of its JSON file
    pretrained: bool = False
    img_size: int = 224
    # Other image sizes, each with its share of the steps: cheap pretraining on small images.
    img_size_shares: dict[int, float] | None = None
    global_pool: str | None = None  # 'token' (class token) or 'avg' (mean of the patch tokens); None: the model's own
    drop_rate: float = 0.0
    drop_path_rate: float = 0.0
    freeze: tuple[str, ...] = ()  # prefixes of parameters to freeze, with their normalisation statistics
    # Recompute activations in the backward pass: less memory, a third more time. BatchNorm's running statistics are
    # updated twice per step.
    grad_checkpointing: bool = False
    compile: bool = False  # torch.compile


@dataclass(frozen=True)
class DataSection:
    """The data; see `glit_models.data.open_splits`."""

    # 'fashion-mnist', 'fractals', 'folder', the path of a table of labels, or a name of timm.data.create_dataset.
    dataset: str = "folder"
    root: str | None = None
    train_split: str = "train"
    validation_split: str = "validation"
    test_split: str | None = None  # scored once, at the end
    hold_out: int = 0  # number of training images for the validation set
    limit: int | None = None  # maximum number of the remaining training images
    split_seed: int | None = None  # seed of both draws, and of the classes of fractals; default: the run's seed
    balanced: bool = False  # draw every class equally often, images of small classes several times an epoch
    train_on_validation: bool = False  # also train on the validation images; they are then not scored
    download: bool = False  # allow the data set's library to download it
    input_key: str | None = None  # names of the image and label columns, if unusual
    target_key: str | None = None
    fractals: FractalConfig = field(default_factory=FractalConfig)
    num_workers: int = 1
    mean: tuple[float, ...] | None = None  # default for these four: the model's preprocessing
    std: tuple[float, ...] | None = None
    interpolation: str | None = None
    crop_pct: float | None = None


@dataclass(frozen=True)
class AugmentSection:
    """Augmentation: keywords of `timm.data.create_transform` and `timm.data.Mixup`."""

    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (0.75, 1.3333)
    hflip: float = 0.5
    vflip: float = 0.0
    color_jitter: float = 0.0
    auto_augment: str | None = None
    train_interpolation: str | None = None  # of the random crop; 'random' chooses bilinear or bicubic
    re_prob: float = 0.0
    re_mode: Literal["const", "rand", "pixel"] = "const"
    repeats: int = 1  # repeated augmentation: each image this often in an epoch, of fewer images
    mixup: float = 0.0
    cutmix: float = 0.0
    mixup_switch_prob: float = 0.5
    label_smoothing: float = 0.1
    # Crop and flip whole batches as tensors on the training device: faster for small images, which must all have one
    # size of at most model.img_size. Crops are bilinear; of this section, only scale, ratio, hflip and vflip apply.
    batched: bool = False

    @property
    def beyond_batched(self) -> str | None:
        """The first key that is set and that `batched` does not support."""
        keys = ("color_jitter", "auto_augment", "train_interpolation", "re_prob")
        return next((key for key in keys if getattr(self, key)), "repeats" if self.repeats > 1 else None)


@dataclass(frozen=True)
class OptimSection:
    """Optimiser and schedule; lengths are in epochs, rates are per step."""

    opt: str = "adamw"
    lr: float = 1e-3
    lr_base_batch: int | None = None  # batch size that lr is for; lr scales linearly with batch_size
    min_lr: float = 1e-5
    warmup_lr: float = 1e-6
    weight_decay: float = 0.05
    layer_decay: float | None = None  # ratio of each block's rate to the next one's
    momentum: float = 0.9
    betas: tuple[float, float] | None = None
    batch_size: int = 128  # per step, over all processes and accumulated parts
    grad_accumulation: int = 1  # number of parts of a process's share of a batch
    epochs: int = 10
    warmup_epochs: float = 1.0
    clip_grad: float | None = 1.0
    ema_decay: float | None = 0.999


@dataclass(frozen=True)
class DistillSection:
    """Distillation from a teacher (DeiT, arXiv 2012.12877, section 4)."""

    teacher: str | None = None  # any timm classifier with weights, named as model.name
    kind: Literal["soft", "hard"] = "hard"
    alpha: float = 0.5  # weight of the teacher in the loss
    temperature: float = 3.0  # of 'soft'


@dataclass(frozen=True)
class Recipe:
    """All settings of a run.

    Raises:
        RecipeError: on an invalid value; names the key, the value and the bound.
    """

    model: ModelSection = field(default_factory=ModelSection)
    data: DataSection = field(default_factory=DataSection)
    augment: AugmentSection = field(default_factory=AugmentSection)
    optim: OptimSection = field(default_factory=OptimSection)
    distill: DistillSection = field(default_factory=DistillSection)
    class_weights: str | None = None  # in the loss: 'balanced', or a YAML file of CLASS: WEIGHT
    seed: int = 0
    precision: Literal["fp32", "bf16"] = "fp32"  # bf16: autocast, parameters stay float32
    retries: int = 0  # maximum restarts of a diverged run from its last checkpoint at half the rate
    checkpoint_minutes: float = 2.0
    keep: Literal["best", "last"] = "best"  # the epoch whose weights are kept; 'best' on the validation set
    eval_every: int = 1  # epochs
    patience: int | None = None  # stop after this many epochs without a better validation score
    eval_batch_size: int = 250
    threads: int | None = None  # torch's threads on a CPU; None: the default, fewer if other programs keep cores busy
    save_dtype: Literal["float32", "float16"] = "float32"  # of the saved weights

    def __post_init__(self) -> None:
        model, data, augment, optim, distill = self.model, self.data, self.augment, self.optim, self.distill
        for key, value, valid, bound in (
            ("model.img_size", model.img_size, model.img_size >= 1, "at least 1"),
            ("model.img_size_shares", model.img_size_shares, _are_shares(model.img_size_shares),
             "sizes with positive shares, or null"),
            ("model.drop_rate", model.drop_rate, 0 <= model.drop_rate < 1, "from 0 to below 1"),
            ("model.drop_path_rate", model.drop_path_rate, 0 <= model.drop_path_rate < 1, "from 0 to below 1"),
            ("data.mean", data.mean, data.mean is None or len(data.mean) in (1, 3), "one value or three, or null"),
            ("data.std", data.std, data.std is None or (len(data.std) in (1, 3) and min(data.std) > 0),
             "one positive value or three, or null"),
            ("augment.mixup", augment.mixup, augment.mixup >= 0, "at least 0"),
            ("augment.cutmix", augment.cutmix, augment.cutmix >= 0, "at least 0"),
            ("data.hold_out", data.hold_out, data.hold_out >= 0, "at least 0"),
            ("data.limit", data.limit, data.limit is None or data.limit >= 1, "at least 1, or null"),
            ("data.split_seed", data.split_seed, data.split_seed is None or data.split_seed >= 0,
             "at least 0, or null"),
            ("data.num_workers", data.num_workers, data.num_workers >= 0, "at least 0"),
            ("augment.repeats", augment.repeats, augment.repeats >= 1, "at least 1"),
            ("augment.label_smoothing", augment.label_smoothing, 0 <= augment.label_smoothing < 1,
             "from 0 to below 1"),
            ("optim.lr", optim.lr, optim.lr > 0, "positive"),
            ("optim.lr_base_batch", optim.lr_base_batch, optim.lr_base_batch is None or optim.lr_base_batch >= 1,
             "at least 1, or null"),
            ("optim.layer_decay", optim.layer_decay, optim.layer_decay is None or 0 < optim.layer_decay <= 1,
             "above 0 and at most 1, or null"),
            ("optim.batch_size", optim.batch_size, optim.batch_size >= 1, "at least 1"),
            ("optim.grad_accumulation", optim.grad_accumulation, optim.grad_accumulation >= 1, "at least 1"),
            ("optim.epochs", optim.epochs, 1 <= optim.epochs <= 1_000_000, "from 1 to 1000000"),
            ("optim.warmup_epochs", optim.warmup_epochs, 0 <= optim.warmup_epochs <= optim.epochs,
             f"from 0 to optim.epochs={optim.epochs}"),
            ("optim.ema_decay", optim.ema_decay, optim.ema_decay is None or 0 < optim.ema_decay < 1,
             "between 0 and 1, or null"),
            ("distill.alpha", distill.alpha, 0 <= distill.alpha <= 1, "from 0 to 1"),
            ("distill.temperature", distill.temperature, distill.temperature > 0, "positive"),
            ("seed", self.seed, 0 <= self.seed < 1 << 63, "from 0 to below 2^63"),
            ("retries", self.retries, self.retries >= 0, "at least 0"),
            ("checkpoint_minutes", self.checkpoint_minutes, self.checkpoint_minutes >= 0, "at least 0"),
            ("patience", self.patience, self.patience is None or self.patience >= max(self.eval_every, 1),
             f"at least eval_every={self.eval_every}, or null"),
            ("eval_every", self.eval_every, self.eval_every >= 1, "at least 1"),
            ("eval_batch_size", self.eval_batch_size, self.eval_batch_size >= 1, "at least 1"),
            ("threads", self.threads, self.threads is None or self.threads >= 1, "at least 1, or null"),
        ):  # fmt: skip
            if not valid:
                raise RecipeError(Argument(key), f" must be {bound}, got {value!r}")
        self.check_parts(1)
        if data.dataset == "fractals" and data.hold_out:
            raise RecipeError("data.hold_out cannot be set for fractals, which hold out images of their own")
        if data.dataset == "fractals" and augment.repeats > 1:
            raise RecipeError("augment.repeats cannot be set for fractals; data.fractals.instances repeats them")
        if data.train_on_validation and self.keep == "best":
            raise RecipeError("data.train_on_validation needs keep=last: no images are left to choose an epoch by")
        if self.patience is not None and self.keep == "last":
            raise RecipeError("patience needs keep=best: it is epochs since the best one")
        if augment.batched and augment.beyond_batched:
            raise RecipeError(f"augment.{augment.beyond_batched} cannot be set with augment.batched")
        if augment.batched and model.img_size_shares:
            raise RecipeError("model.img_size_shares cannot be set with augment.batched")

    @property
    def split_seed(self) -> int:
        """The seed of the draws for `hold_out` and `limit`, and of the classes of fractals."""
        return self.seed if self.data.split_seed is None else self.data.split_seed

    def check_parts(self, num_processes: int) -> int:
        """The number of equal parts of a batch: processes times accumulated parts.

        Raises:
            RecipeError: if the batch cannot be divided into them.
        """
        parts = num_processes * self.optim.grad_accumulation
        even = 2 if self.augment.mixup or self.augment.cutmix else 1
        if self.optim.batch_size % (parts * even):
            raise RecipeError(
                Argument("optim.batch_size"),
                f" must be a multiple of {parts * even} (processes x accumulated parts"
                f"{' x 2 for mixup and cutmix' if even == 2 else ''}), got {self.optim.batch_size}",
            )
        return parts

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as stored in YAML."""
        return dataclasses.asdict(self)

    def to_yaml(self) -> str:
        """The whole recipe as YAML, with all defaults, and with absolute paths."""
        return to_yaml(self._located())

    def meaning(self) -> dict[str, Any]:
        """The settings that define the run; equal for recipes of the same run."""
        only_last = self.eval_every >= self.optim.epochs  # only the last epoch is scored, so it is the best
        return {**without_machine_keys(self._located().to_dict()), "keep": "last" if only_last else self.keep}

    def _located(self) -> Recipe:
        """The recipe with absolute paths of its data and of a model's folder."""
        root, name, dataset = self.data.root, self.model.name, self.data.dataset
        if root is not None and "://" not in root:
            root = os.path.realpath(root)
        if is_label_table(dataset):
            dataset = os.path.realpath(dataset)
        _, is_folder, folder = name.partition("local-dir:")
        return dataclasses.replace(
            self,
            data=dataclasses.replace(self.data, root=root, dataset=dataset),
            model=dataclasses.replace(self.model, name=f"local-dir:{os.path.realpath(folder)}" if is_folder else name),
        )


def without_machine_keys(values: dict[str, Any]) -> dict[str, Any]:
    """Remove, from a recipe's values, those that only suit a machine, so that a run can be resumed on another one."""
    for key in ("retries", "checkpoint_minutes", "eval_batch_size"):
        del values[key]
    if not is_streamed(values["data"]["dataset"]):  # of a stream, each of these processes reads another part
        del values["data"]["num_workers"]
    return values


def _are_shares(shares: Mapping[int, float] | None) -> bool:
    return shares is None or (bool(shares) and all(size >= 1 and share > 0 for size, share in shares.items()))


def shipped_recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(path.stem for path in _SHIPPED.glob("*.yaml"))


def load_recipe(name: str, overrides: Overrides = ()) -> Recipe:
    """Read a recipe: a shipped one by name, or any by path.

    Args:
        overrides: values by `section.key`, or strings `section.key=value`.

    Raises:
        RecipeError: if it is missing, is not YAML, or has an unknown key or a wrong type; names the nearest valid key.
    """
    recipe: Recipe = build_recipe(Recipe, read_recipe(name, overrides, _SHIPPED))
    return recipe
