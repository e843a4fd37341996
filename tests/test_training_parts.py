"""Tests of the recipe's options: objective, optimiser, freezing, sizes, other models."""

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from glit_models.errors import RecipeError
from glit_models.training import Trainer, load_recipe
from glit_models.training.feed import open_data
from glit_models.training.objective import Objective
from glit_models.training.recipe import AugmentSection, DistillSection, OptimSection, Recipe
from glit_models.training.reports import DivergedError, StepReports
from glit_models.training.selection import Selection
from glit_models.training.setup import (
    create_optimizer,
    create_schedule,
    create_train_transform,
    freeze,
    scaled_lr,
)

FIXTURES = Path(__file__).parent / "fixtures"
NORMAL = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.25, 0.3)}


def _tiny(*overrides: str) -> Recipe:
    return load_recipe(str(FIXTURES / "tiny.yaml"), [f"data.root={FIXTURES / 'fashion-mnist'}", *overrides])


def _model(**keywords: object) -> nn.Module:
    spec = _tiny().model.spec
    return timm.create_model("glit_tiny", spec=spec, img_size=32, num_classes=10, **keywords)


class _FixedTeacher(nn.Module):
    """Answers the mean of each channel, for as many classes as there are channels."""

    num_classes = 3
    pretrained_cfg = {"input_size": (3, 8, 8), "mean": (0.1, 0.2, 0.3), "std": (0.5, 0.6, 0.7)}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 5 * self.scale * x.mean((2, 3))


def _objective(**distill: object) -> Objective:
    section = DistillSection(teacher="fixed", **distill)
    return Objective(AugmentSection(label_smoothing=0.0), section, 3, NORMAL, lambda name: _FixedTeacher())


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(6, 3, 8, 8, generator=generator) + torch.randn(6, 3, 1, 1, generator=generator)
    return torch.randn(6, 3, generator=generator), images, torch.tensor([0, 1, 2, 0, 1, 2])


def _taught(images: torch.Tensor) -> torch.Tensor:
    """What the teacher says of the raw images, in its own normalisation."""
    raw = images * torch.tensor(NORMAL["std"])[:, None, None] + torch.tensor(NORMAL["mean"])[:, None, None]
    mean, std = torch.tensor([0.1, 0.2, 0.3])[:, None, None], torch.tensor([0.5, 0.6, 0.7])[:, None, None]
    return 5 * ((raw - mean) / std).mean((2, 3))


def test_hard_distillation_is_cross_entropy_with_the_teachers_choice(batch):
    logits, images, labels = batch
    expected = 0.3 * F.cross_entropy(logits, labels) + 0.7 * F.cross_entropy(logits, _taught(images).argmax(1))
    torch.testing.assert_close(_objective(kind="hard", alpha=0.7).loss(logits, images, labels), expected)


def test_soft_distillation_is_the_divergence_from_the_teacher_at_a_temperature(batch):
    logits, images, labels = batch
    p, q = (_taught(images) / 2).softmax(1), (logits / 2).softmax(1)
    divergence = (p * (p / q).log()).sum(1).mean() * 4
    expected = 0.5 * F.cross_entropy(logits, labels) + 0.5 * divergence
    torch.testing.assert_close(_objective(kind="soft", temperature=2.0).loss(logits, images, labels), expected)


def test_a_teacher_of_other_classes_is_refused():
    with pytest.raises(RecipeError, match="distill.teacher 'fixed' has 3 classes, the data 4"):
        Objective(AugmentSection(), DistillSection(teacher="fixed"), 4, NORMAL, lambda name: _FixedTeacher())


def test_an_unknown_teacher_is_one_line(tmp_path: Path):
    with pytest.raises(RecipeError, match=r"distill.teacher 'nobody' cannot be loaded: .*nobody"):
        Trainer(_tiny("distill.teacher=nobody"), tmp_path, device="cpu")


def test_smoothing_is_applied_once_with_and_without_mixup(batch):
    logits, images, labels = batch
    plain = Objective(AugmentSection(label_smoothing=0.1), DistillSection(), 3, NORMAL, lambda name: nn.Identity())
    expected = F.cross_entropy(logits, labels, label_smoothing=0.1)
    torch.testing.assert_close(plain.loss(logits, *plain.mix(images, labels)), expected)
    mixing = Objective(
        AugmentSection(label_smoothing=0.1, mixup=1.0), DistillSection(), 3, NORMAL, lambda name: nn.Identity()
    )
    np.random.seed(0)  # noqa: NPY002
    _, targets = mixing.mix(images.clone(), labels)
    assert targets.shape == (6, 3)
    torch.testing.assert_close(targets.sum(1), torch.ones(6))
    torch.testing.assert_close(mixing.loss(logits, images, targets), -(targets * logits.log_softmax(1)).sum(1).mean())


def test_biases_norms_and_embeddings_take_no_weight_decay():
    model = _model()
    optimizer = create_optimizer(model, OptimSection(weight_decay=0.1))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        free = parameter.ndim == 1 or name in ("pos_embed", "cls_token")
        assert decay[id(parameter)] == (0.0 if free else 0.1), name


def test_layer_decay_slows_each_block_by_its_depth():
    model = _model()
    optim = OptimSection(lr=1.0, layer_decay=0.5, warmup_epochs=0, min_lr=0.0)
    optimizer = create_optimizer(model, optim)
    create_schedule(optimizer, optim, 10).step_update(0)
    rate = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    rates = {name: rate[id(parameter)] for name, parameter in model.named_parameters()}
    assert rates["head.weight"] == 1.0
    assert rates["norm.weight"] == rates["blocks.1.mlp.fc1.weight"] == 0.5
    assert rates["blocks.0.mlp.fc1.weight"] == 0.25
    assert rates["patch_embed.proj.weight"] == rates["pos_embed"] == 0.125


def test_the_rate_follows_the_batch_where_the_recipe_has_a_base():
    assert scaled_lr(OptimSection(lr=5e-4, lr_base_batch=512, batch_size=1024)) == pytest.approx(1e-3)
    assert scaled_lr(OptimSection(lr=5e-4, batch_size=1024)) == 5e-4


def test_the_schedule_warms_up_and_ends_at_its_least_rate():
    optim = OptimSection(lr=1.0, warmup_lr=0.1, min_lr=0.01, epochs=10, warmup_epochs=2)
    optimizer = create_optimizer(nn.Linear(2, 2), optim)
    schedule = create_schedule(optimizer, optim, steps_per_epoch=5)
    rates = []
    for step in range(51):
        schedule.step_update(step)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[0] == pytest.approx(0.1)
    assert rates[5] == pytest.approx(0.55)
    assert rates[10] == pytest.approx(0.01 + 0.99 * (1 + math.cos(math.pi * 10 / 50)) / 2)
    assert rates[50] == pytest.approx(0.01)


def test_frozen_parts_keep_weights_and_statistics_and_the_rest_learns(tmp_path: Path):
    trainer = Trainer(_tiny("model.freeze=[patch_embed, pos_embed, blocks.1]", "optim.epochs=1"), tmp_path, "cpu")
    before = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    trainer.run()
    for key, value in trainer.model.state_dict().items():
        frozen = key.startswith(("patch_embed.", "pos_embed", "blocks.1."))
        assert torch.equal(value, before[key]) == (frozen or key.endswith("num_batches_tracked")), key


@pytest.mark.parametrize(
    ("prefixes", "message"),
    [
        (("patch_embd",), "model.freeze: 'patch_embd' is no part of the model; did you mean 'patch_embed'"),
        (("",), "is no part of the model"),
        (("patch_embed", "cls_token", "pos_embed", "blocks", "norm", "head"), "model.freeze leaves nothing to train"),
    ],
)
def test_freezing_what_is_not_there_or_everything_is_refused(prefixes: tuple[str, ...], message: str):
    with pytest.raises(RecipeError, match=message):
        freeze(_model(), prefixes)


def test_accumulated_parts_give_the_same_step_as_the_whole_batch(tmp_path: Path):
    attention = "{num_global_heads: 3, num_local_heads: 0, mlp_ratio: 2, qkv_ratio: 1}"  # BatchNorm would see parts
    overrides = [
        f"model.spec.blocks=[{attention}, {attention}]", "model.drop_path_rate=0", "optim.batch_size=60",
        "augment.cutmix=0.5", "optim.opt=sgd", "optim.epochs=2",
    ]  # fmt: skip
    whole = Trainer(_tiny(*overrides), tmp_path / "whole", "cpu")
    parts = Trainer(_tiny(*overrides, "optim.grad_accumulation=5"), tmp_path / "parts", "cpu")
    assert whole.run() is not None
    assert parts.run() is not None
    for key, value in whole.model.state_dict().items():
        torch.testing.assert_close(parts.model.state_dict()[key], value, rtol=1e-4, atol=1e-6)


def test_a_batch_that_does_not_divide_into_its_parts_is_refused(tmp_path: Path):
    with pytest.raises(RecipeError, match=r"must be a multiple of 8 \(processes x accumulated parts x 2"):
        Trainer(_tiny("optim.grad_accumulation=4"), tmp_path, "cpu")


def test_batches_of_several_sizes_train_one_model_of_the_recipes_size(tmp_path: Path):
    trainer = Trainer(_tiny("model.img_size_shares={16: 1, 32: 1, 48: 1}", "optim.epochs=2"), tmp_path, "cpu")
    sizes = [parts[0][0].shape[-1] for epoch in range(3) for parts in trainer.feed.steps(epoch, 0)]
    assert set(sizes) == {16, 32, 48}
    assert trainer.run() is not None
    model = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True)
    assert model.patch_embed.img_size == (32, 32)
    assert not model.dynamic_img_size


def test_any_timm_classifier_can_be_trained_beside_ours(tmp_path: Path):
    recipe = tmp_path / "vit.yaml"
    recipe.write_text(
        f"model: {{name: vit_tiny_patch16_224, img_size: 32, drop_path_rate: 0.1}}\n"
        f"data: {{dataset: fashion-mnist, root: {FIXTURES / 'fashion-mnist'}, hold_out: 100, num_workers: 0}}\n"
        "optim: {batch_size: 50, epochs: 1}\n"
    )
    result = Trainer(load_recipe(str(recipe)), tmp_path / "run", "cpu").run()
    assert result is not None
    assert "test_top1" in result
    model = timm.create_model(f"local-dir:{tmp_path / 'run' / 'model'}", pretrained=True)
    assert model.num_classes == 10


def test_gradient_checkpointing_changes_memory_not_results(tmp_path: Path):
    plain = Trainer(_tiny("optim.epochs=1", "optim.ema_decay=null"), tmp_path / "plain", "cpu")
    saving = Trainer(_tiny("optim.epochs=1", "optim.ema_decay=null", "model.grad_checkpointing=true"),
                     tmp_path / "saving", "cpu")  # fmt: skip
    assert saving.model.grad_checkpointing
    plain.run()
    saving.run()
    for key, value in plain.model.state_dict().items():
        if "running" not in key and "tracked" not in key:  # BatchNorm sees each batch twice
            torch.testing.assert_close(saving.model.state_dict()[key], value, rtol=1e-4, atol=1e-5)


def test_posterizing_to_no_bits_gives_black_under_every_pillow():
    transform = create_train_transform(
        32,
        AugmentSection(auto_augment="rand-m9-mstd0.5-inc1"),
        {**NORMAL, "interpolation": "bicubic"},
    )
    (policy,) = [step for step in transform.transforms if hasattr(step, "ops")]
    (posterize,) = [operation for operation in policy.ops if operation.name.startswith("Posterize")]
    image = Image.new("RGB", (4, 4), (200, 100, 50))
    posterize.magnitude, posterize.magnitude_std, posterize.prob = 10, 0, 1.0
    assert posterize(image).getpixel((0, 0)) == (0, 0, 0)
    posterize.magnitude = 5
    assert posterize(image).getpixel((0, 0)) == (192, 64, 0)


def test_a_run_with_batched_augmentation_stops_and_goes_on_to_the_same_result(tmp_path: Path):
    recipe = _tiny("augment={batched: true}", "data.split_seed=7", "model.img_size=32")
    whole = Trainer(recipe, tmp_path / "whole", "cpu").run()
    stopped = Trainer(recipe, tmp_path / "stopped", "cpu", max_minutes=0.0)
    assert stopped.run() is None
    result = Trainer(recipe, tmp_path / "stopped", "cpu").run()
    assert result is not None
    assert whole is not None
    assert {**result, "minutes": 0} == {**whole, "minutes": 0}
    best = "best.safetensors"
    assert (tmp_path / "whole" / best).read_bytes() == (tmp_path / "stopped" / best).read_bytes()


def test_the_split_is_drawn_by_its_own_seed_where_there_is_one():
    held_out = [
        open_data(_tiny("data.hold_out=20", f"seed={seed}", *split)).validation.indices
        for seed, *split in ((0, "data.split_seed=5"), (1, "data.split_seed=5"), (5,), (1,))
    ]
    assert held_out[0] == held_out[1] == held_out[2] != held_out[3]
    smoke = [load_recipe("smoke", {"seed": seed, "data.split_seed": 5}) for seed in (0, 1)]
    first, second = (open_data(recipe).train for recipe in smoke)
    assert np.array_equal(first.maps, second.maps)  # the same classes, for a second training with another seed


@pytest.mark.parametrize(("keep", "epoch"), [("best", 2), ("last", 4)])
def test_the_weights_that_are_kept_are_of_the_best_epoch_or_of_the_last(
    keep: str, epoch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    scores = iter([10.0, 30.0, 20.0, 25.0])
    monkeypatch.setattr(Selection, "score", lambda *_: next(scores))
    result = Trainer(_tiny(f"keep={keep}", "optim.epochs=4"), tmp_path, "cpu", score_test=False).run()
    assert result is not None
    assert result["epoch"] == epoch
    assert result["validation_top1"] == {2: 30.0, 4: 25.0}[epoch]
    last = torch.load(tmp_path / "last.pt", weights_only=True)["ema"]
    kept = load_file(tmp_path / "best.safetensors")
    assert all(torch.equal(kept[name], last[name].float()) for name in kept) == (keep == "last")


def test_training_on_the_validation_images_too_scores_nothing_on_them(tmp_path: Path):
    recipe = _tiny("data.train_on_validation=true", "keep=last", "optim.epochs=1", "data.split_seed=0")
    trainer = Trainer(recipe, tmp_path, "cpu", score_test=False)
    assert len(trainer.splits.train) == len(open_data(_tiny("data.split_seed=0")).train) + 100
    result = trainer.run()
    assert result is not None
    assert "validation_top1" not in result
    assert (tmp_path / "model" / "model.safetensors").is_file()


def test_the_best_of_one_epoch_that_is_scored_is_the_last():
    assert _tiny("keep=best", "eval_every=6").meaning() == _tiny("keep=last", "eval_every=6").meaning()
    assert _tiny("keep=best").meaning() != _tiny("keep=last").meaning()


def test_batched_augmentation_of_fractals_is_refused(tmp_path: Path):
    recipe = _tiny("data.dataset=fractals", "data.root=null", "data.hold_out=0", "augment={batched: true}")
    with pytest.raises(RecipeError, match="augment.batched cannot be set for fractals, which has no index of images"):
        Trainer(recipe, tmp_path, "cpu")


def test_a_rare_image_of_a_large_class_weight_is_no_divergence():
    accelerator = SimpleNamespace(reduce=lambda tensor, how: tensor, num_processes=1)
    for weight, limit in ((1.0, 6.9), (125.0, 860.0), (0.5, 6.9)):
        reports = StepReports(accelerator, 2, weight)
        reports.add(1, torch.tensor(limit), save=False, stop=False)
        assert [report.step for report in reports.read(0)] == [1]
        reports.add(2, torch.tensor(limit * 1.1), save=False, stop=False)
        with pytest.raises(DivergedError):
            list(reports.read(0))
