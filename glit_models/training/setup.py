"""Create the model, optimiser, schedule and transforms of a run from its recipe, with timm's components."""

from __future__ import annotations

import difflib
import logging
from dataclasses import asdict
from typing import Any

import timm
import torch
from PIL import Image, ImageOps
from timm.data import create_transform, resolve_data_config
from timm.layers import Attention
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import nn
from torch.optim import Optimizer

from .. import activations
from ..errors import Argument, GlitError, RecipeError, first_line
from ..weights import loading
from .recipe import AugmentSection, DataSection, ModelSection, OptimSection, Recipe

__all__ = [
    "create_eval_transform",
    "create_model",
    "create_optimizer",
    "create_schedule",
    "create_train_transform",
    "freeze",
    "resolve_preprocessing",
]

_HOW_TO_RUN = ("freeze", "grad_checkpointing", "compile", "img_size_shares")  # not keywords of the model
_ELSEWHERE = ("local-dir:", "hf-hub:", "hf_hub:")


def create_model(section: ModelSection, num_classes: int, dynamic: bool = False) -> Any:
    """Create the model of a recipe, with its initial weights if any. `dynamic`: accept images of any size.

    Raises:
        RecipeError: if there is no such model, or it cannot be built with these settings.
        WeightsError, SpecError: on errors in its weights or spec.
    """
    if not section.name.startswith(_ELSEWHERE) and not timm.is_model(section.name.partition(".")[0]):
        raise RecipeError(f"model.name {section.name!r} is no model; `glit list` shows what there is")
    keywords = {key: value for key, value in asdict(section).items() if key not in ("name", *_HOW_TO_RUN)}
    for key in ("spec", "global_pool"):  # None is no keyword: only GLiT models have a spec
        if keywords[key] is None:
            del keywords[key]
    if dynamic:
        keywords["dynamic_img_size"] = True
    try:
        model = _create(section.name, num_classes, keywords)
    except GlitError:
        raise
    except (RuntimeError, TypeError, ValueError, OSError, KeyError, AssertionError) as error:
        raise RecipeError(f"model.name {section.name!r} cannot be built: {first_line(error)}") from None
    if section.grad_checkpointing:
        try:
            model.set_grad_checkpointing()
        except (AttributeError, AssertionError):
            raise RecipeError(f"model.grad_checkpointing: {section.name} has none") from None
    return model


def _create(name: str, num_classes: int, keywords: dict[str, Any]) -> Any:
    """Create timm's model. Keywords that it rejects are dropped if they change nothing, like a convnet's image size."""
    try:
        return loading.create_model(name, num_classes=num_classes, **keywords)
    except TypeError as error:
        idle = [key for key, value in keywords.items() if f"'{key}'" in str(error) and (key == "img_size" or not value)]
        if "unexpected keyword" not in str(error) or not idle:
            raise
        return _create(name, num_classes, {key: value for key, value in keywords.items() if key not in idle})


def check_memory(model: nn.Module, recipe: Recipe, num_trained: int, num_scored: int, device: torch.device) -> None:
    """Raise GlitError if training on `num_trained` images, or scoring `num_scored`, at a time exceeds the memory."""
    size, channels = recipe.model.img_size, getattr(model, "in_chans", 3)
    largest = max(size, *(recipe.model.img_size_shares or {size: 1}))
    batch, smaller = Argument("optim.batch_size"), Argument("model.img_size")
    shape = (num_trained, channels, largest, largest)
    activations.check_memory(model, shape, device, "take a smaller ", batch, " or ", smaller, training=True)
    way_out = ("take a smaller ", Argument("eval_batch_size"), " or ", smaller)
    activations.check_memory(model, (num_scored, channels, size, size), device, *way_out)


def prepare_for_device(model: nn.Module, device_type: str) -> None:
    """Choose the operators that train fastest on the device."""
    if device_type == "cpu":
        for module in model.modules():
            if isinstance(module, Attention):
                module.fused_attn = False  # the fused operator's backward pass is slower on CPU


def freeze(model: nn.Module, prefixes: tuple[str, ...]) -> list[nn.Module]:
    """Freeze all parameters whose names start with a prefix; returns the modules to keep in evaluation mode.

    Raises:
        RecipeError: if a prefix matches nothing, or nothing is left to train.
    """
    frozen = []
    for prefix in prefixes:
        inside = [p for name, p in model.named_parameters() if _is_under(name, prefix)]
        if not inside:
            names = [name for name, _ in model.named_modules()] + [name for name, _ in model.named_parameters()]
            near = difflib.get_close_matches(prefix, names, n=1, cutoff=0.0)[0]
            raise RecipeError(f"model.freeze: {prefix!r} is no part of the model; did you mean {near!r}?")
        for parameter in inside:
            parameter.requires_grad_(False)
        frozen += [module for name, module in model.named_modules() if _is_under(name, prefix)]
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise RecipeError("model.freeze leaves nothing to train")
    return frozen


def _is_under(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(f"{prefix}.")


def create_optimizer(model: nn.Module, optim: OptimSection) -> Optimizer:
    """Create timm's optimiser: no decay on biases, norms and embeddings, and layer-wise rates if requested.

    Raises:
        RecipeError: if there is no such optimiser, or it rejects the recipe's values.
    """
    keywords: dict[str, Any] = {} if optim.betas is None else {"betas": optim.betas}
    if optim.opt in ("adam", "adamw"):
        keywords["fused"] = True  # one kernel instead of hundreds of small ones
    try:
        return create_optimizer_v2(
            model, optim.opt, lr=scaled_lr(optim), weight_decay=optim.weight_decay, momentum=optim.momentum,
            layer_decay=optim.layer_decay, **keywords,
        )  # fmt: skip
    except (ValueError, TypeError, AssertionError, ImportError) as error:
        raise RecipeError(f"optim.opt {optim.opt!r} cannot be made: {first_line(error)}") from None


def scaled_lr(optim: OptimSection) -> float:
    """The peak learning rate for the batch of all processes; linear in the batch size if the recipe has a base."""
    return optim.lr if optim.lr_base_batch is None else optim.lr * optim.batch_size / optim.lr_base_batch


def create_schedule(optimizer: Optimizer, optim: OptimSection, steps_per_epoch: int) -> CosineLRScheduler:
    """Linear warm-up, then half a cosine down to `min_lr` at the last step."""
    logging.getLogger("timm.scheduler.cosine_lr").setLevel(logging.ERROR)  # it warns of a run of one step
    return CosineLRScheduler(
        optimizer,
        t_initial=steps_per_epoch * optim.epochs,
        lr_min=optim.min_lr,
        warmup_t=int(optim.warmup_epochs * steps_per_epoch),
        warmup_lr_init=optim.warmup_lr,
        warmup_prefix=False,
        t_in_epochs=False,
    )


def resolve_preprocessing(model: nn.Module, data: DataSection) -> dict[str, Any]:
    """Mean, std, interpolation and crop: the recipe's if given, else the model's."""
    own = resolve_data_config(model=model)
    given = {key: getattr(data, key) for key in ("mean", "std", "interpolation", "crop_pct")}
    return {key: own[key] if value is None else value for key, value in given.items()}


def create_train_transform(size: int, augment: AugmentSection, preprocessing: dict[str, Any]) -> Any:
    """Create timm's training transform.

    Raises:
        RecipeError: if `augment.auto_augment` is not a policy of timm.
    """
    color_jitter: Any = augment.color_jitter or None  # timm's types leave out None, which turns it off
    try:
        transform = create_transform(
            size,
            is_training=True,
            scale=augment.scale,
            ratio=augment.ratio,
            hflip=augment.hflip,
            vflip=augment.vflip,
            color_jitter=color_jitter,
            auto_augment=augment.auto_augment,
            re_prob=augment.re_prob,
            re_mode=augment.re_mode,
            interpolation=augment.train_interpolation or preprocessing["interpolation"],
            mean=preprocessing["mean"],
            std=preprocessing["std"],
        )
    except (AssertionError, ValueError, KeyError, IndexError) as error:
        raise RecipeError(f"augment.auto_augment {augment.auto_augment!r} is no policy: {first_line(error)}") from None
    for policy in transform.transforms:
        for operation in getattr(policy, "ops", ()):
            if operation.name.startswith("Posterize"):
                operation.aug_fn = _posterize
    return transform


def _posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """Posterize as timm does, but return black for 0 bits (full strength), which Pillow 13 rejects."""
    if bits == 0:
        return Image.new(image.mode, image.size)
    return image if bits >= 8 else ImageOps.posterize(image, bits)


def create_eval_transform(size: int, preprocessing: dict[str, Any]) -> Any:
    """Create timm's evaluation transform."""
    return create_transform(size, **preprocessing)
