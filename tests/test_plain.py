"""Tests of the baseline of `benchmarks.export`: GLiT in the authors' plain form computes the same logits."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from exported import small_glit
from reference import official_state, reference_tensors
from torch import nn
from weight_folders import small_model

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def plain() -> ModuleType:
    spec = importlib.util.spec_from_file_location("plain", ROOT / "benchmarks" / "plain.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["plain"] = module
    spec.loader.exec_module(module)
    return module


def test_the_plain_form_computes_the_same_logits_from_the_same_weights(plain: ModuleType) -> None:
    for model in (small_model(), small_glit()):
        height, width = model.patch_embed.img_size
        images = torch.randn(3, 3, height, width, generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            torch.testing.assert_close(plain.plain_glit(model)(images), model(images), rtol=1e-5, atol=1e-5)


def test_the_plain_form_computes_what_the_authors_code_does_from_its_state_dict(plain: ModuleType) -> None:
    state = official_state()
    expected = reference_tensors("official_w48_io")
    network = plain.PlainGLiT(small_model())
    network.load_state_dict(state)
    with torch.inference_mode():
        logits = network.eval()(expected["input"])
    torch.testing.assert_close(logits, expected["logits"], rtol=1e-5, atol=1e-5)


def test_the_plain_form_is_of_conv1d_and_separate_batch_norm(plain: ModuleType) -> None:
    modules = list(plain.plain_glit(small_model()).modules())
    assert sum(isinstance(module, nn.Conv1d) for module in modules) == 3 * 7
    assert sum(isinstance(module, nn.BatchNorm1d) for module in modules) == 7
