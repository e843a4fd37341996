"""Tests that the closed forms of parameters and multiply-adds equal torch's counts."""

import random

import pytest
import timm
import torch
from specs import SMALL, random_spec
from torch.utils.flop_counter import FlopCounterMode

from glit_models import GLIT_BASE, GLIT_SMALL, GLIT_TINY, GLiT, GLiTSpec, count_macs, count_params

NAMED = [
    ("glit_tiny", GLIT_TINY, 7_264_456, 1_472_873_280),
    ("glit_small", GLIT_SMALL, 27_897_256, 5_579_507_328),
    ("glit_base", GLIT_BASE, 109_270_888, 21_694_057_728),
]


def counted_params(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def counted_macs(model: GLiT, img_size: tuple[int, int]) -> int:
    """Half of the floating-point operations that torch sees in one forward pass on the meta device."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(torch.empty(1, model.in_chans, *img_size, device="meta"))
    assert counter.get_total_flops() % 2 == 0
    return counter.get_total_flops() // 2


@pytest.mark.parametrize(("name", "spec", "params", "macs"), NAMED)
def test_the_named_models_have_the_published_table_s_exact_counts(
    name: str, spec: GLiTSpec, params: int, macs: int
) -> None:
    assert (count_params(spec), count_macs(spec)) == (params, macs)
    model = timm.create_model(name, device="meta")
    assert (counted_params(model), counted_macs(model, (224, 224))) == (params, macs)


@pytest.mark.parametrize("seed", range(24))
def test_the_closed_form_equals_what_torch_counts_for_any_network_and_task(seed: int) -> None:
    rng = random.Random(seed)
    spec = random_spec(rng)
    img_size = (spec.patch_size * rng.randint(1, 5), spec.patch_size * rng.randint(1, 5))
    task = {"num_classes": rng.choice([0, 1, 10, 1000]), "in_chans": rng.choice([1, 3, 4])}
    class_token = rng.random() < 0.6
    model = GLiT(
        spec, img_size, class_token=class_token, global_pool="token" if class_token else "avg", device="meta", **task
    )
    assert count_params(spec, img_size=img_size, class_token=class_token, **task) == counted_params(model)
    assert count_macs(spec, img_size=img_size, class_token=class_token, **task) == counted_macs(model, img_size)


def test_one_number_means_a_square_image() -> None:
    assert count_macs(SMALL, 64) == count_macs(SMALL, (64, 64))
    assert count_params(SMALL, img_size=64) == count_params(SMALL, img_size=(64, 64))
