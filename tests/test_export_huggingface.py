"""Tests of `glit export --format huggingface`: the folder for optimum and transformers.js."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from exported import CLASSES, exported, small_glit
from glit_models.export import ExportInfo, OnnxClassifier, export_model
from glit_models.export.huggingface import _preprocessor
from glit_models.export.images import generated_images

from glit_models.cli import main
from glit_models.errors import ExportError
from glit_models.weights.folder import save_folder

pytestmark = pytest.mark.usefixtures("cached_graphs")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("huggingface")
    save_folder(small_glit(), root / "pets", class_names=CLASSES)
    assert main(["export", str(root / "pets"), "--format", "huggingface", "--out", str(root / "out")]) == 0
    return root / "out"


def _info(**changes: Any) -> ExportInfo:
    return dataclasses.replace(exported().info, **changes)


def test_the_folder_holds_what_both_libraries_look_for(folder: Path) -> None:
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert files == {"onnx/model.onnx", "config.json", "preprocessor_config.json", "report.json"}
    config = json.loads((folder / "config.json").read_text())
    assert [config["id2label"][str(index)] for index in range(5)] == list(CLASSES)
    assert config["label2id"] == {label: index for index, label in enumerate(CLASSES)}
    assert (config["model_type"], config["image_size"], config["num_channels"]) == ("vit", 32, 3)
    graph = onnx.load(folder / "onnx" / "model.onnx").graph
    assert [value.name for value in (*graph.input, *graph.output)] == ["pixel_values", "logits"]
    assert json.loads((folder / "report.json").read_text())["verified"] is True


def test_the_input_has_another_name_and_the_answers_are_the_same(folder: Path) -> None:
    images = list(generated_images(3, (40, 50)))
    found = OnnxClassifier(folder / "onnx" / "model.onnx", ["cpu"]).probabilities(images)
    np.testing.assert_allclose(found, OnnxClassifier(exported().path, ["cpu"]).probabilities(images), atol=1e-6)


def test_images_are_prepared_as_timm_prepares_them() -> None:
    found = _preprocessor(_info(crop_pct=0.9, interpolation="bilinear"))
    assert (found["size"], found["crop_size"]) == ({"shortest_edge": 35}, {"height": 32, "width": 32})
    assert (found["resample"], found["do_center_crop"], found["image_mean"]) == (2, True, [0.5, 0.5, 0.5])
    assert _preprocessor(_info(crop_pct=1.0, crop_mode="squash"))["size"] == {"height": 32, "width": 32}


def test_what_these_libraries_cannot_do_is_refused(tmp_path: Path) -> None:
    for options, message in (
        ({"preprocess": True}, "leave the preprocessing to them"),
        ({"image_size": "dynamic"}, "leave the preprocessing to them"),
        ({"precision": "bf16"}, "precision must be one of fp32, fp16, int8, got 'bf16'"),
        ({"input_name": "a b"}, "input_name must be letters, digits and '_', got 'a b'"),
        ({"input_name": "logits"}, "another value of the graph is called so"),
    ):
        with pytest.raises(ExportError, match=message):
            export_model(small_glit(), tmp_path / "out", "huggingface", verify=0, **options)
    for changes in ({"interpolation": "box"}, {"crop_mode": "border"}, {"input_size": (3, 48, 32)}):
        with pytest.raises(ExportError, match="these libraries do not"):
            _preprocessor(_info(**changes))
    assert list(tmp_path.iterdir()) == []
