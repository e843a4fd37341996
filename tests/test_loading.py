"""Tests of loading weights: a user's file is read once, few modules take part, and one loader serves all."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import pytest
import safetensors.torch
import timm
import torch
from safetensors.torch import load_file, save_file
from weight_folders import SPEC, small_folder, small_model

import glit_models
from glit_models.errors import WeightsError
from glit_models.weights import resolve
from glit_models.weights.files import sha256_of
from glit_models.weights.loading import load_model

PACKAGE = Path(glit_models.__file__).parent
# What loading weights walked through in 0.1, but for the model itself: glit, weights.resolve, weights.registry,
# weights.files, model, spec, layers, depthwise, checkpoint, store.download.
MODULES_OF_0_1 = 10
# A model that is made without weights runs these as well.
BUILDING = ("__init__.py", "block.py", "cost.py", "depthwise.py", "memory.py", "model.py", "named.py", "parts",
            "spec.py")  # fmt: skip


@pytest.fixture(autouse=True)
def own_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLIT_HOME", str(tmp_path / "home"))


def modules_that_run(call: Callable[[], object]) -> set[str]:
    """The modules of this package, by path, whose functions a call runs."""
    seen = set()

    def profile(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(str(PACKAGE)):
            seen.add(Path(frame.f_code.co_filename).relative_to(PACKAGE).as_posix())

    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(None)
    return seen


def loading_modules(call: Callable[[], object]) -> set[str]:
    return {name for name in modules_that_run(call) if not set(name.split("/")) & set(BUILDING)}


def own_file(folder: Path, suffix: str) -> Path:
    state = {key: tensor.clone() for key, tensor in small_model().state_dict().items()}
    path = folder / f"own{suffix}"
    if suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save({"model": state}, path, _use_new_zipfile_serialization=suffix == ".pth")
    return path


def load_own(path: Path) -> torch.nn.Module:
    overlay = {"file": str(path), "input_size": (3, 64, 64)}
    return timm.create_model(
        "glit_tiny", pretrained=True, spec=SPEC, img_size=64, num_classes=10, pretrained_cfg_overlay=overlay
    )


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each file's tensors are read, by name."""
    counts: Counter[str] = Counter()

    def counted(read: Callable[..., object]) -> Callable[..., object]:
        def call(path: str | Path, *args: object, **kwargs: object) -> object:
            counts[Path(path).name] += 1
            return read(path, *args, **kwargs)

        return call

    monkeypatch.setattr(safetensors.torch, "safe_open", counted(safetensors.torch.safe_open))
    monkeypatch.setattr(torch, "load", counted(torch.load))
    return counts


def test_loading_registered_weights_walks_through_at_most_half_of_the_modules_of_0_1() -> None:
    resolve.registry()  # read once a process: whether a test before this one has, or had it forgotten, is not the point
    first = loading_modules(lambda: timm.create_model("glit_tiny.fashion_mnist", pretrained=True))
    assert first == {
        "entry.py", "weights/resolve.py", "weights/files.py", "runs/files.py", "glit/checkpoint.py",
    }  # fmt: skip
    assert len(first) <= MODULES_OF_0_1 / 2
    again = loading_modules(lambda: timm.create_model("glit_tiny.fashion_mnist", pretrained=True))
    assert again == first


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".legacy.pth.tar"])
def test_a_file_of_the_users_own_is_read_once(tmp_path: Path, suffix: str, reads: Counter[str]) -> None:
    path = own_file(tmp_path, suffix)
    found: list[torch.nn.Module] = []
    assert len(loading_modules(lambda: found.append(load_own(path)))) <= MODULES_OF_0_1 / 2
    assert reads[path.name] == 1
    expected, state = small_model().state_dict(), found[0].state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in expected.items())
    cfg = found[0].pretrained_cfg
    assert (cfg["file"], cfg.get("source"), cfg.get("state_dict")) == (str(path), None, None)


def test_a_folder_of_the_users_own_is_read_once_by_timm_and_by_the_loader(tmp_path: Path, reads: Counter[str]) -> None:
    small_folder(tmp_path / "own")
    reads.clear()
    model = timm.create_model(f"local-dir:{tmp_path / 'own'}", pretrained=True)
    assert reads == {"model.safetensors": 1}
    assert (model.pretrained_cfg["source"], model.pretrained_cfg["file"]) == ("local-dir", str(tmp_path / "own"))
    reads.clear()
    load_model(tmp_path / "own")
    assert reads == {"model.safetensors": 1}


def test_the_loader_says_where_the_weights_are_from(tmp_path: Path) -> None:
    shipped = load_model("glit_tiny.fashion_mnist")
    assert shipped.entry == resolve.get_entry("glit_tiny.fashion_mnist")
    assert shipped.sha256 == shipped.entry.sha256
    assert not shipped.model.training
    saved = small_folder(tmp_path / "own")
    own = load_model(tmp_path / "own")
    assert (own.name, own.entry, own.sha256) == (str(tmp_path / "own"), None, saved["sha256"])
    assert own.config is not None
    assert own.config["architecture"] == "glit_tiny"
    golden = load_file(tmp_path / "own" / "golden.safetensors")
    with torch.inference_mode():
        torch.testing.assert_close(own.model(golden["input"].float()), golden["logits"], atol=1e-5, rtol=0)
    assert own.sha256 == sha256_of(tmp_path / "own" / "model.safetensors")


def test_the_loader_verifies_what_has_a_hash_and_refuses_what_is_none(tmp_path: Path) -> None:
    for source, message in (
        ("resnet18", "no such folder, and no MODEL.TAG or Hub repository"),
        ("glit_tiny.nope", "no such weights"),
        (str(tmp_path), "no config.json in this folder"),
    ):
        with pytest.raises(WeightsError, match=message):
            load_model(source)
    with pytest.raises(WeightsError, match="no model 'resnet0'; `glit list` shows what there is"):
        load_model("resnet0", any_timm=True)


def test_models_of_timm_load_where_they_are_asked_for(tmp_path: Path) -> None:
    timm.models.save_for_hf(timm.create_model("test_vit"), tmp_path / "vit", safe_serialization=True)
    loaded = load_model(tmp_path / "vit", any_timm=True)
    assert (type(loaded.model).__name__, loaded.entry, loaded.sha256) == ("VisionTransformer", None, None)
    assert not loaded.model.training
    with pytest.raises(WeightsError, match="not the configuration of a model of this package"):
        load_model(tmp_path / "vit")
