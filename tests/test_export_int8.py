"""Tests of `glit export --precision int8`: size, agreement with PyTorch, and sensitive layers that stay in float."""

from __future__ import annotations

import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from exported import CLASSES, exported, small_glit
from glit_models.export import ImageSource, OnnxArtifact, OnnxClassifier, export_onnx, images, quantize
from glit_models.export.form import ExportForm
from glit_models.export.images import generated_images
from glit_models.export.sensitivity import measure_sensitivity
from PIL import Image

from glit_models.data import sources
from glit_models.data.image_files import open_image
from glit_models.errors import DataError

pytestmark = pytest.mark.usefixtures("cached_graphs")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ImageSource:
    folder = tmp_path_factory.mktemp("images")
    for index, image in enumerate(generated_images(40, (40, 40), seed=5)):
        image.save(folder / f"{index:02d}.png")
    return ImageSource(str(folder))


@pytest.fixture(scope="module")
def static(source: ImageSource, tmp_path_factory: pytest.TempPathFactory) -> OnnxArtifact:
    path = tmp_path_factory.mktemp("int8") / "model.onnx"
    return export_onnx(small_glit(), path, precision="int8", calibration=source, images=source, verify=40)


def weights(path: Path) -> Counter[int]:
    """Numbers in matrices and kernels, by ONNX's type."""
    found: Counter[int] = Counter()
    for tensor in onnx.load(path).graph.initializer:
        if len(tensor.dims) > 1:
            found[tensor.data_type] += int(np.prod(tensor.dims))
    return found


def test_linear_layers_and_the_patch_projection_are_in_eight_bits_and_depthwise_ones_are_not(
    static: OnnxArtifact,
) -> None:
    found = weights(static.path)
    floats = found.pop(onnx.TensorProto.FLOAT)
    model = small_glit()
    depthwise = sum(p.numel() for name, p in model.named_parameters() if "dwconv.weight" in name)
    assert floats == depthwise + model.pos_embed.numel() + model.cls_token.numel()
    matrices = sum(p.numel() for name, p in model.named_parameters() if p.ndim > 1 and "dwconv" not in name)
    assert found == {onnx.TensorProto.INT8: matrices - model.pos_embed.numel() - model.cls_token.numel()}


def test_a_calibrated_file_is_near_pytorch_and_smaller(static: OnnxArtifact) -> None:
    assert static.path.suffix == ".onnx"
    assert static.agreement is not None
    assert static.agreement.holds
    assert static.agreement.max_rel < 0.1
    assert static.num_bytes < 0.5 * exported().num_bytes
    assert static.info.precision == "int8"
    assert any("calibrated on 40 images" in note for note in static.notes)


def test_batches_stay_dynamic_and_the_checker_passes(static: OnnxArtifact) -> None:
    onnx.checker.check_model(onnx.load(static.path), full_check=True)
    classifier = OnnxClassifier(static.path, ["cpu"])
    images = np.random.default_rng(0).normal(size=(33, 3, 32, 32)).astype(np.float32)
    together = classifier.session.run(None, {"images": images})[0]
    np.testing.assert_allclose(together, classifier.logits(images), atol=1e-4)


def test_ranges_may_be_found_at_run_time_without_images(tmp_path: Path) -> None:
    artifact = export_onnx(
        small_glit(), tmp_path / "model.onnx", precision="int8", dynamic_int8=True, verify=8, opset=18
    )
    assert artifact.agreement is not None
    assert artifact.agreement.max_rel < 0.1
    assert artifact.num_bytes < 0.65 * exported().num_bytes


def test_preprocessing_stands_in_front_of_an_int8_network_with_a_fixed_batch(
    source: ImageSource, tmp_path: Path
) -> None:
    path = tmp_path / "model.onnx"
    artifact = export_onnx(small_glit(), path, precision="int8", calibration=source, preprocess=True, batch=3, verify=9)
    assert artifact.agreement is not None
    assert artifact.agreement.levels is not None
    assert artifact.agreement.levels <= 1.0
    # Compared on images that did not calibrate, rather than on generated ones.
    assert (artifact.agreement.origin, artifact.agreement.num_images) == (f"a fifth of {source.name}, held out", 8)
    assert any("calibrated on 32 images" in note for note in artifact.notes)
    assert OnnxClassifier(path).probabilities(generated_images(4, (50, 60))).shape == (4, 5)


def test_sensitivity_finds_the_layer_that_eight_bits_ruin() -> None:
    form = ExportForm(small_glit(), "fused")
    images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    before = form(images)
    calm = measure_sensitivity(form, images)
    # The same function, but one channel is so large that all others fall between two of its 256 levels.
    block = form.get_submodule("form.blocks.1")
    block.norm2.weight[0] *= 1e3
    block.norm2.bias[0] *= 1e3
    block.mlp.fc1.weight[:, 0] /= 1e3
    torch.testing.assert_close(form(images), before, rtol=1e-3, atol=1e-4)
    found = measure_sensitivity(form, images)
    assert next(iter(found)) == "blocks.1.mlp.fc1"
    assert found["blocks.1.mlp.fc1"] > 10 * calm["blocks.1.mlp.fc1"]
    assert list(found.values()) == sorted(found.values(), reverse=True)
    assert len(found) == len([m for m in form.modules() if isinstance(m, torch.nn.Linear)]) + 1

    torch.testing.assert_close(form(images), before, rtol=1e-3, atol=1e-4)  # it left everything as it was


def test_the_most_sensitive_layers_stay_in_float_until_it_agrees(
    source: ImageSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(quantize, "ENOUGH", 101.0)  # so that it never does
    monkeypatch.setattr(quantize, "_FEWER_IMAGES", 8)
    monkeypatch.setattr(quantize, "_KEPT", (0, 2))
    names = ["blocks.0.mlp.fc2", "patch_embed.proj"]
    monkeypatch.setattr(quantize, "measure_sensitivity", lambda form, images: dict.fromkeys([*names, "head"], 0.0))
    artifact = export_onnx(small_glit(), tmp_path / "model.onnx", precision="int8", calibration=source, verify=0)
    assert f"kept in float as the most sensitive: {', '.join(names)}" in artifact.notes
    kept = {tensor.name for tensor in onnx.load(artifact.path).graph.initializer if tensor.data_type == 1}
    assert {f"{name}.weight" for name in names} <= kept
    assert "blocks.0.mlp.fc1.weight" not in kept
    tries = [line.partition(" % of ")[0] for line in capsys.readouterr().err.splitlines() if "keep their class" in line]
    assert len(tries) == 3  # each is told when it ends
    assert tries[0].startswith("int8: ranges of 8 images, all linear layers in eight bits: ")
    assert tries[1].startswith("int8: ranges of 40 images, all linear layers in eight bits: ")
    assert tries[2].startswith(f"int8: ranges of 40 images, kept in float as the most sensitive: {', '.join(names)}: ")


def test_a_calibration_folder_without_images_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty: no images in this folder"):
        export_onnx(
            small_glit(), tmp_path / "x.onnx", precision="int8", calibration=ImageSource(str(tmp_path / "empty"))
        )
    Image.new("RGB", (8, 8)).save(tmp_path / "one.png")
    (tmp_path / "two.png").write_text("no image")
    (tmp_path / "empty").rmdir()
    with pytest.raises(DataError, match=r"two.png: not an image"):
        export_onnx(small_glit(), tmp_path / "x.onnx", precision="int8", calibration=ImageSource(str(tmp_path)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.png", "two.png"]


# ---- memory ----


def test_photographs_are_read_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for index, image in enumerate(generated_images(80, (40, 40))):
        (tmp_path / CLASSES[index % 5]).mkdir(exist_ok=True)
        image.save(tmp_path / CLASSES[index % 5] / f"{index:02d}.png")
    open_files: set[int] = set()
    most: list[int] = []

    def counted(*args: Any) -> Image.Image:
        image = open_image(*args)
        open_files.add(number := len(most))
        weakref.finalize(image, open_files.discard, number)
        most.append(len(open_files))
        return image

    monkeypatch.setattr(sources, "open_image", counted)  # of class folders
    monkeypatch.setattr(images, "open_image", counted)  # of a folder without them
    for folder, preprocess in ((tmp_path, False), (tmp_path, True), (tmp_path / CLASSES[0], True)):
        most.clear()
        source = ImageSource(str(folder))
        options = {"calibration": source, "images": source, "preprocess": preprocess}
        artifact = export_onnx(small_glit(), tmp_path / "x.onnx", precision="int8", verify=80, force=True, **options)
        assert artifact.agreement is not None
        count = artifact.agreement.num_images
        assert count == (80 if folder == tmp_path else 16)
        assert len(most) >= 2 * count  # for the calibration, and for the comparison
        assert max(most) <= 2  # one is being read while the one before is still named
