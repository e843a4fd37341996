"""Tests of `glit export --format openvino`: agreement with PyTorch, and metadata."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exported import CLASSES, exported, small_glit
from glit_models.export import Artifact, OpenVinoModel, export_model
from glit_models.export.images import ImageSource, generated_images, prepare

from glit_models.cli import main
from glit_models.errors import ExportError
from glit_models.weights.folder import save_folder

pytest.importorskip("openvino")
pytestmark = pytest.mark.usefixtures("cached_graphs")


def _export(path: Path, **options: Any) -> Artifact:
    return export_model(small_glit(), path, "openvino", **{"verify": 4, **options})


@pytest.mark.parametrize(("options", "size"), [({}, 1.0), ({"precision": "fp16"}, 0.6), ({"batch": 2}, 1.0)])
def test_a_folder_computes_what_pytorch_does(tmp_path: Path, options: dict[str, Any], size: float) -> None:
    artifact = _export(tmp_path / "out", **options)
    assert artifact.path == tmp_path / "out"
    assert {file.name for file in artifact.path.iterdir()} == {"model.xml", "model.bin", "report.json"}
    assert artifact.agreement is not None
    assert artifact.agreement.holds
    assert artifact.agreement.provider == "OpenVINO CPU"
    assert json.loads((artifact.path / "report.json").read_text())["verified"] is True
    model = OpenVinoModel(artifact.path / "model.xml")
    assert (model.info.precision, model.info.batch) == (options.get("precision", "fp32"), options.get("batch"))
    weights = sum(parameter.numel() for parameter in small_glit().parameters()) * 4
    assert (artifact.path / "model.bin").stat().st_size < 1.1 * size * weights


def test_glit_bench_measures_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_folder(small_glit(), tmp_path / "pets")
    folder = _export(tmp_path / "out", batch=2).path
    arguments = ["--onnx", str(exported().path), "--batch", "1,2", "--rounds", "1", "--no-compile", "--no-baseline"]
    assert main(["bench", str(tmp_path / "pets"), *arguments, "--openvino", str(folder), "--json"]) == 0
    rows = [row for row in json.loads(capsys.readouterr().out)["rows"] if row["what"] == f"{folder}{os.sep}, fp32"]
    assert [row["batch"] for row in rows] == [2]
    assert rows[0]["provider"] in ("OpenVINO CPU, f32", "OpenVINO CPU, bf16")
    for path in (tmp_path / "nowhere", tmp_path):
        assert main(["bench", str(tmp_path / "pets"), *arguments, "--openvino", str(path)]) == 2
        assert capsys.readouterr().err == f"glit: {path / 'model.xml'}: no such file\n"


def test_it_answers_as_the_onnx_file_does(tmp_path: Path) -> None:
    model = OpenVinoModel(_export(tmp_path / "out").path / "model.xml")
    images = prepare(model.info, generated_images(3, (40, 50)))
    from glit_models.export import OnnxClassifier

    np.testing.assert_allclose(model.logits(images), OnnxClassifier(exported().path, ["cpu"]).logits(images), atol=1e-4)
    assert model.info.num_classes == len(CLASSES)


def test_int8_is_what_the_onnx_file_holds(tmp_path: Path) -> None:
    artifact = _export(tmp_path / "out", precision="int8", dynamic_int8=True, verify=0)
    assert artifact.path.name == "out.unverified"
    assert OpenVinoModel(artifact.path / "model.xml").info.precision == "int8"


def test_calibrated_int8_is_compared_on_images_that_did_not_calibrate(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for index, image in enumerate(generated_images(20, (40, 50))):
        image.save(tmp_path / "images" / f"{index:02}.png")
    source = ImageSource(str(tmp_path / "images"))
    artifact = _export(tmp_path / "out", precision="int8", calibration=source, verify=64)
    assert artifact.agreement is not None
    assert (artifact.agreement.origin, artifact.agreement.num_images) == (f"a fifth of {source.name}, held out", 4)
    assert any("calibrated on 16 images" in note for note in artifact.notes)


def test_what_this_format_cannot_do_is_refused(tmp_path: Path) -> None:
    for options, message in (
        ({"preprocess": True}, "leave the preprocessing to the program"),
        ({"precision": "bf16"}, "precision must be one of fp32, fp16, int8, got 'bf16'; OpenVINO computes in bfloat16"),
    ):
        with pytest.raises(ExportError, match=message):
            _export(tmp_path / "out", **options)
    (tmp_path / "taken").mkdir()
    with pytest.raises(ExportError, match="taken exists"):
        _export(tmp_path / "taken")
    (tmp_path / "other.xml").write_text("<net/>")
    with pytest.raises(ExportError, match="other.xml is a file; give the folder to write"):
        _export(tmp_path / "other.xml")
    with pytest.raises(ExportError, match="other.xml: OpenVINO cannot read it"):
        OpenVinoModel(tmp_path / "other.xml")
    assert {path.name for path in tmp_path.iterdir()} == {"taken", "other.xml"}
