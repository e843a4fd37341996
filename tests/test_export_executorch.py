"""Tests of the formats executorch and litert: agreement with PyTorch if they are installed; errors in any case."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exported import small_glit
from glit_models.export import TARGETS, ExecutorchModel, LiteRtModel, export_model
from glit_models.export.images import generated_images, prepare
from glit_models.export.source import open_source
from glit_models.export.verify import torch_logits
from specs import MIXED

from glit_models.cli import main
from glit_models.errors import ExportError
from glit_models.weights.folder import save_folder


@pytest.mark.parametrize("name", ["executorch", "litert"])
def test_without_the_packages_the_command_that_installs_them_is_one_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(TARGETS[name], "packages", ("glit_no_such_package",))
    save_folder(small_glit(), tmp_path / "pets")
    assert main(["export", str(tmp_path / "pets"), "--format", name, "--out", str(tmp_path / "a.pte")]) == 2
    err = capsys.readouterr().err
    assert err.startswith("glit: glit_no_such_package cannot be imported")
    assert f"[{name}]" in err
    assert err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["pets"]


def test_a_program_has_a_fixed_batch_and_size(tmp_path: Path) -> None:
    for options, message in (
        ({"batch": None}, "batch must be a number of images in this format"),
        ({"batch": 0}, "batch must be from 1"),
        ({"image_size": "dynamic"}, "image_size must be a height and width, got 'dynamic'"),
    ):
        with pytest.raises(ExportError, match=message):
            export_model(small_glit(), tmp_path / "a.pte", "executorch", **options)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # from the converters
@pytest.mark.parametrize(
    ("name", "package", "load"),
    [("executorch", "executorch.runtime", ExecutorchModel), ("litert", "litert_torch", LiteRtModel)],
)
def test_a_program_computes_what_pytorch_does(name: str, package: str, load: Any, tmp_path: Path) -> None:
    pytest.importorskip(package)
    source = open_source(small_glit(spec=MIXED))
    artifact = export_model(source, tmp_path / "a.model", name, batch=2, verify=3)
    assert artifact.path == tmp_path / "a.model"
    assert artifact.agreement is not None
    assert (artifact.agreement.holds, artifact.agreement.provider) == (True, load.provider)
    images = prepare(artifact.info, generated_images(3, (40, 50)))
    found = load(artifact.path, artifact.info).logits(images)
    np.testing.assert_allclose(found, torch_logits(source.model, images), atol=1e-4)
    (tmp_path / "b.model").write_bytes(b"no program")
    with pytest.raises(ExportError, match="b.model: .* cannot read it"):
        load(tmp_path / "b.model", artifact.info)
