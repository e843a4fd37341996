"""Tests of `glit export --format torch`: a program that loads with torch alone, verified, and errors."""

from __future__ import annotations

import json
import resource
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from exported import CLASSES, small_glit
from glit_models.export.program import Program, export_torch

from glit_models.cli import main
from glit_models.errors import ExportError, WriteError
from glit_models.weights.folder import save_folder


def test_a_program_gives_the_logits_of_the_model_for_any_batch_without_our_code(tmp_path: Path) -> None:
    artifact = export_torch(small_glit(), tmp_path / "model.pt2", verify=8)
    assert artifact.agreement is not None
    assert artifact.agreement.max_abs < 1e-4
    loaded = torch.export.load(artifact.path).module()
    for batch in (1, 33):
        images = torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(batch))
        with torch.inference_mode():
            torch.testing.assert_close(loaded(images), small_glit()(images), rtol=1e-4, atol=1e-4)
    with zipfile.ZipFile(artifact.path) as archive:
        for name in archive.namelist():
            assert b".py" not in archive.read(name)
    assert Program(artifact.path).info == artifact.info
    assert artifact.info.class_names == CLASSES


def test_a_bf16_program_with_a_fixed_batch_agrees_too(tmp_path: Path) -> None:
    artifact = export_torch(small_glit(), tmp_path / "model.pt2", precision="bf16", batch=3, verify=7)
    assert artifact.agreement is not None
    assert artifact.agreement.max_rel < 0.25
    assert Program(artifact.path).logits(np.zeros((4, 3, 32, 32), np.float32)).shape == (4, 5)


@pytest.mark.slow
def test_a_compiled_package_gives_the_logits_of_the_model(tmp_path: Path) -> None:
    if shutil.which("g++") is None:
        pytest.skip("there is no C++ compiler")
    artifact = export_torch(small_glit(), tmp_path / "model.pt2", compiled=True, verify=8)
    assert artifact.agreement is not None
    assert artifact.agreement.provider == "AOTInductor"
    assert artifact.agreement.max_abs < 1e-4
    assert Program(artifact.path).info == artifact.info


def test_the_command_writes_and_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_folder(small_glit(), tmp_path / "pets", class_names=CLASSES)
    out = tmp_path / "model.pt2"
    assert main(["export", str(tmp_path / "pets"), "--format", "torch", "--out", str(out), "--verify", "4"]) == 0
    assert "by torch" in capsys.readouterr().out
    assert json.loads((tmp_path / "model.pt2.json").read_text())["verified"] is True
    for extra, message in (
        ([], "exists; --force replaces it"),
        (["--force", "--opset", "18"], "--opset is not an option of --format torch, which takes --verify, --data"),
        (["--force", "--precision", "int8", "--dynamic-int8"], "--dynamic-int8 is not an option of --format torch"),
        (["--force", "--precision", "fp8"], "--precision of a torch program must be one of fp32, fp16, bf16"),
        (["--force", "--serving", "triton"], "--serving triton and --format torch exclude each other"),
    ):
        assert main(["export", str(tmp_path / "pets"), "--format", "torch", "--out", str(out), *extra]) == 2
        err = capsys.readouterr().err
        assert message in err
        assert err.count("\n") == 1


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))  # fails writes as a full disk does
    try:
        with pytest.raises(WriteError, match=r"model.pt2 cannot be written: File too large$"):
            export_torch(small_glit(), tmp_path / "model.pt2", verify=0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())


def test_files_that_are_no_program_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ExportError, match=r"x.onnx: torch loads such programs only from files that end in .pt2"):
        export_torch(small_glit(), tmp_path / "x.onnx")
    with pytest.raises(ExportError, match="nowhere.pt2: no such file"):
        Program(tmp_path / "nowhere.pt2")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ExportError, match="needs a C.. compiler; install g"):
        export_torch(small_glit(), tmp_path / "x.pt2", compiled=True)
    assert list(tmp_path.iterdir()) == []
