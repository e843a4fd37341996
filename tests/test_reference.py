"""Tests against the authors' code: the same weights give the same blocks and logits, for every way to load them."""

import argparse
import pickle
from pathlib import Path

import pytest
import timm
import torch
from reference import official_bytes, official_state, reference_tensors
from safetensors.torch import save_file
from specs import TINY48
from timm.models import load_checkpoint
from torch import Tensor

import glit_models
from glit_models import GLiT
from glit_models.errors import WeightsError
from glit_models.glit.checkpoint import to_official
from glit_models.weights.files import read_state_dict

TASK = {"spec": TINY48, "img_size": 64, "num_classes": 10}


@pytest.fixture(scope="module")
def official() -> dict[str, Tensor]:
    """A state dict of the authors' code at C = 48, 64 x 64 pixels and 10 classes, every tensor random."""
    return official_state()


@pytest.fixture(scope="module")
def reference() -> dict[str, Tensor]:
    """What the authors' code computes with it in eval mode."""
    return reference_tensors("official_w48_io")


def assert_agrees(actual: Tensor, expected: Tensor) -> None:
    # Activations reach 18, where processors differ by more than 1e-5 in single values of float32.
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=max(1e-5, 1e-6 * float(expected.abs().max())))


def assert_is_official_model(model: GLiT, reference: dict[str, Tensor]) -> None:
    model.eval()
    with torch.no_grad():
        tokens = model.forward_intermediates(
            reference["input"], output_fmt="NLC", return_prefix_tokens=True, intermediates_only=True
        )
        features = model.forward_features(reference["input"])
        logits = model(reference["input"])
    assert len(tokens) == 12
    for index, (patches, class_token) in enumerate(tokens):
        assert_agrees(torch.cat([class_token, patches], dim=1), reference[f"block_{index:02d}"])
    assert_agrees(features[:, 0], reference["class_token_features"])
    assert_agrees(logits, reference["logits"])


def test_the_embedded_tokens_are_the_official_ones(official, reference) -> None:
    model = GLiT(**TASK)
    model.load_state_dict(glit_models.convert_official_state_dict(official))
    embedded = []
    model.blocks[0].register_forward_pre_hook(lambda _, inputs: embedded.append(inputs[0]))
    with torch.no_grad():
        model.eval()(reference["input"])
    assert_agrees(embedded[0], reference["embedded_tokens"])


def test_converted_weights_give_the_official_numbers(official, reference) -> None:
    model = GLiT(**TASK)
    model.load_state_dict(glit_models.convert_official_state_dict(official))
    assert_is_official_model(model, reference)


def test_a_fused_model_gives_the_official_numbers(official, reference) -> None:
    model = GLiT(**TASK)
    model.load_state_dict(official)
    assert_is_official_model(model.fuse(), reference)


def test_the_forward_pass_of_training_gives_the_official_numbers(official, reference) -> None:
    """BatchNorm and all in evaluation mode, but with gradients, for which the convolution has code of its own."""
    model = GLiT(**TASK).eval()
    model.load_state_dict(official)
    logits = model(reference["input"])
    assert logits.requires_grad
    assert_agrees(logits.detach(), reference["logits"])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_agrees(compiled(reference["input"]).detach(), reference["logits"])


def test_the_authors_whole_checkpoint_converts_too(official, reference) -> None:
    model = GLiT(**TASK)
    model.load_state_dict(glit_models.convert_official_state_dict({"model": official, "epoch": 299}))
    assert_is_official_model(model, reference)


def test_a_plain_load_state_dict_takes_official_weights(official, reference) -> None:
    model = GLiT(**TASK)
    model.load_state_dict(official)
    assert_is_official_model(model, reference)
    assert any(key.startswith("blocks.0.0.") for key in official), "the caller's dict must stay as it was"


@pytest.fixture(params=["bare", "wrapped", "wrapped with args"])
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path, official: dict[str, Tensor]) -> Path:
    """The forms in which such a checkpoint lies on a disk."""
    path = tmp_path / "glit_tiny.pth.tar"
    content = {
        "bare": official,
        "wrapped": {"model": official},
        "wrapped with args": {"model": official, "epoch": 299, "args": argparse.Namespace(lr=5e-4, model="glit")},
    }[request.param]
    torch.save(content, path)
    return path


def test_timm_s_own_loading_takes_the_authors_file(checkpoint: Path, reference) -> None:
    overlay = {"file": str(checkpoint), "num_classes": 10}
    model = timm.create_model("glit_tiny", pretrained=True, pretrained_cfg_overlay=overlay, **TASK)
    assert_is_official_model(model, reference)


def test_timm_s_load_checkpoint_takes_the_authors_file(checkpoint: Path, reference) -> None:
    model = timm.create_model("glit_tiny", **TASK)
    load_checkpoint(model, str(checkpoint), use_ema=False)
    assert_is_official_model(model, reference)


def test_checkpoint_path_takes_the_authors_file(checkpoint: Path, reference) -> None:
    assert_is_official_model(timm.create_model("glit_tiny", checkpoint_path=str(checkpoint), **TASK), reference)


def test_a_safetensors_file_in_the_official_layout_loads_as_well(tmp_path: Path, official, reference) -> None:
    path = tmp_path / "official.safetensors"
    save_file(official, path)
    overlay = {"file": str(path), "num_classes": 10}
    model = timm.create_model("glit_tiny", pretrained=True, pretrained_cfg_overlay=overlay, **TASK)
    assert_is_official_model(model, reference)


def test_conversion_and_its_inverse_change_nothing(official) -> None:
    back = to_official(glit_models.convert_official_state_dict(official))
    assert back.keys() == official.keys()
    assert all(torch.equal(back[key], official[key]) for key in official)


def test_a_key_that_the_authors_do_not_have_is_named(official) -> None:
    with pytest.raises(WeightsError, match=r"^'blocks\.0\.0\.attn\.net\.9\.weight' is not a key of the authors'"):
        glit_models.convert_official_state_dict({**official, "blocks.0.0.attn.net.9.weight": torch.zeros(1)})


class Payload:
    """Code in a pickle: makes a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.target,))


@pytest.fixture(params=["zip", "plain pickle"])
def malicious(request: pytest.FixtureRequest, tmp_path: Path, official: dict[str, Tensor]) -> tuple[Path, Path]:
    """A checkpoint with code in it, and the file that the code would make."""
    path, target = tmp_path / "glit_tiny.pth.tar", tmp_path / "was_run"
    content = {"model": official, "args": Payload(target)}
    if request.param == "zip":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content, protocol=2))
    return path, target


def test_a_pickle_with_code_in_it_is_refused_and_not_run(malicious: tuple[Path, Path]) -> None:
    path, target = malicious
    with pytest.raises(WeightsError) as error:
        read_state_dict(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    assert not target.exists()


def test_timm_s_own_loading_does_not_run_code_either(malicious: tuple[Path, Path]) -> None:
    path, target = malicious
    with pytest.raises((pickle.UnpicklingError, RuntimeError)):
        timm.create_model("glit_tiny", pretrained=True, pretrained_cfg_overlay={"file": str(path)}, **TASK)
    with pytest.raises((pickle.UnpicklingError, RuntimeError)):
        load_checkpoint(timm.create_model("glit_tiny", **TASK), str(path), use_ema=False)
    assert not target.exists()


def test_a_file_cut_short_is_named_in_one_line(tmp_path: Path) -> None:
    whole = official_bytes()
    for name, content in [("cut.safetensors", whole[:5000]), ("cut.pth", b"PK\x03\x04broken"), ("empty.pth", b"")]:
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(WeightsError) as error:
            read_state_dict(path)
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value)


def test_weights_of_another_network_name_the_first_difference(official) -> None:
    model = GLiT(**{**TASK, "spec": glit_models.GLIT_TINY.scaled(96, 3)})
    with pytest.raises(WeightsError, match=r"'cls_token' is \(1, 1, 48\), the model needs \(1, 1, 96\)"):
        glit_models.model.checkpoint_filter_fn(official, model)
