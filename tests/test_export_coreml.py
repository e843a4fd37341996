"""Tests of `glit export --format coreml`: the conversion if coremltools is installed; errors in any case."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exported import CLASSES, small_glit
from glit_models.export import CoreMlModel, export_model
from glit_models.export.images import generated_images, prepare
from glit_models.export.source import open_source
from glit_models.export.verify import torch_logits
from mil import run_package
from specs import MIXED

from glit_models.errors import ExportError

FOREIGN = pytest.mark.filterwarnings("ignore")  # from coremltools


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("model", {}, "model must end in .mlpackage"),
        ("taken.mlpackage", {}, "taken.mlpackage exists"),
        ("a.mlpackage", {"precision": "int8"}, "precision must be one of fp32, fp16, got 'int8'"),
        ("a.mlpackage", {"batch": None}, "batch must be a number of images in this format"),
    ],
)
def test_what_this_format_cannot_do_is_refused(
    name: str, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    (tmp_path / "taken.mlpackage").mkdir()
    with pytest.raises(ExportError, match=message):
        export_model(small_glit(), tmp_path / name, "coreml", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["taken.mlpackage"]


@FOREIGN
@pytest.mark.skipif(sys.platform == "darwin", reason="Core ML runs here")
@pytest.mark.parametrize(("precision", "tolerance", "size"), [("fp32", 1e-4, 1.0), ("fp16", 2e-2, 0.5)])
def test_a_package_says_what_pytorch_computes_and_is_not_called_verified(
    precision: str, tolerance: float, size: float, tmp_path: Path
) -> None:
    pytest.importorskip("coremltools")
    source = open_source(small_glit(spec=MIXED))
    for _ in range(2):  # the second replaces the first
        artifact = export_model(source, tmp_path / "a.mlpackage", "coreml", precision=precision, batch=2)
    assert (artifact.path, artifact.agreement) == (tmp_path / "a.mlpackage.unverified", None)
    assert artifact.notes == ("converted, not run: Core ML runs on macOS only",)
    report = json.loads((tmp_path / "a.mlpackage.unverified.json").read_text())
    assert (report["verified"], report["notes"]) == (False, list(artifact.notes))
    weights = sum(parameter.numel() for parameter in source.model.parameters()) * 4
    assert artifact.num_bytes < 1.2 * size * weights + 1e5  # and the graph

    package = artifact.path.rename(tmp_path / "b.mlpackage")
    assert {path.name for path in package.iterdir()} == {"Data", "Manifest.json"}
    images = prepare(artifact.info, generated_images(2, (40, 50)))
    found = run_package(package, {"images": images})["logits"]
    np.testing.assert_allclose(found, torch_logits(source.model, images), atol=tolerance)
    with pytest.raises(ExportError, match="Core ML runs on macOS only"):
        CoreMlModel(package).logits(images)


@FOREIGN
def test_where_core_ml_runs_the_package_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    coremltools = pytest.importorskip("coremltools")

    # In place of macOS: the operators in torch.
    def predict(self: Any, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return run_package(Path(self.package_path), inputs)

    if sys.platform != "darwin":
        monkeypatch.setattr("glit_models.export.coreml._runs_here", lambda: True)
        monkeypatch.setattr(coremltools.models.MLModel, "predict", predict)
    artifact = export_model(small_glit(), tmp_path / "a.mlpackage", "coreml", verify=3)
    assert artifact.path == tmp_path / "a.mlpackage"
    assert artifact.agreement is not None
    assert (artifact.agreement.holds, artifact.agreement.provider) == (True, "Core ML")
    assert json.loads((tmp_path / "a.mlpackage.json").read_text())["verified"] is True
    assert CoreMlModel(artifact.path).info.class_names == CLASSES
