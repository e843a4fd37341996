"""Tests of the table of export targets, custom targets, and the architecture stored in an exported file."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest
import timm
import torch
from exported import CLASSES, exported, small_glit
from glit_models.export import (
    TARGETS,
    ExportInfo,
    ModelSource,
    OnnxClassifier,
    Target,
    export_model,
    export_onnx,
    export_torch,
)
from glit_models.export.program import Program
from glit_models.export.source import open_source
from test_export_parts import autoformer

from glit_models.cli import main
from glit_models.errors import ExportError
from glit_models.weights.folder import save_folder

OWN = "torchscript_target:TorchScriptTarget"


@pytest.fixture
def _extensions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parent / "extensions")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("weights") / "pets"
    save_folder(small_glit(), path, class_names=CLASSES)
    return str(path)


# ---- the table ----


def test_the_table_names_what_can_be_made() -> None:
    names = ["aoti", "coreml", "executorch", "huggingface", "kserve", "litert", "onnx", "openvino", "torch", "triton"]
    assert sorted(TARGETS) == names
    for name in TARGETS:
        target = TARGETS.find(name)
        assert target.name == name
        assert {"verify", "images", "force"} <= set(target.option_names())


def test_the_formats_are_listed_with_what_they_need(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TARGETS["openvino"], "packages", ("onnx", "no_such_package"))
    assert main(["export", "--list"]) == 0
    listed = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.split()}
    assert set(TARGETS) <= set(listed)
    assert listed["onnx"].rstrip().endswith("yes")
    assert "no: " in listed["openvino"]
    assert main(["export", "glit_tiny"]) == 2
    assert capsys.readouterr().err == "glit: glit export needs MODEL and --out FILE; --list shows the formats\n"


def test_a_target_is_chosen_by_name_and_gets_its_options(tmp_path: Path) -> None:
    source = open_source(small_glit())
    assert isinstance(source, ModelSource)
    artifact = export_model(source, tmp_path / "model.pt2", "torch", batch=2, verify=2)
    assert artifact.info.batch == 2
    assert Program(artifact.path).info == artifact.info


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        (
            "tflite",
            {},
            "'tflite'; known: aoti, coreml, executorch, huggingface, kserve, litert, onnx, openvino, torch, triton, or",
        ),
        ("torch", {"opset": 18}, "opset is not an option of the export target torch; it takes verify, images, force"),
        ("onnx", {"max_batch_size": 2}, "max_batch_size is not an option of the export target onnx"),
        ("nowhere_to_be_found:Target", {}, "there is no module 'nowhere_to_be_found'"),
        ("json:JSONDecoder", {}, "export target 'json:JSONDecoder' must be a subclass of Target"),
        ("glit_models.export:Target", {}, "export target 'glit_models.export:Target' lacks export"),
    ],
)
def test_unknown_targets_and_options_are_refused_in_one_line(
    target: str, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ExportError) as caught:
        export_model(small_glit(), tmp_path / "model", target, **options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


# ---- a target of one's own ----


@pytest.mark.usefixtures("_extensions")
def test_a_target_in_a_file_of_ones_own_exports_from_python_and_the_command_line(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    artifact = export_model(autoformer(), tmp_path / "a.pt", OWN, verify=4)
    assert artifact.agreement is not None
    assert artifact.agreement.holds
    assert artifact.agreement.provider == "TorchScript"

    out = tmp_path / "model.pt"
    assert main(["export", folder, "--format", OWN, "--out", str(out), "--verify", "3", "--set", "optimize=true"]) == 0
    assert "3 images (generated) by TorchScript" in capsys.readouterr().out
    assert json.loads((tmp_path / "model.pt.json").read_text())["verified"] is True
    images = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(torch.jit.load(str(out))(images), small_glit()(images), rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("_extensions")
def test_options_that_it_does_not_take_are_one_line_and_status_2(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    takes = "which takes --verify, --data, --force, --set optimize="
    for extra, message in (
        (["--opset", "18"], f"--opset is not an option of --format torchscript, {takes}"),
        (["--set", "speed=9"], "speed is not an option of the export target torchscript; it takes verify"),
        (["--set", "optimize=9"], "optimize must be true or false, got 9"),
        (["--set", "optimize=" + "[" * 3000], "optimize must be true or false, got '[[["),
        (["--set", "optimize"], "--set must be KEY=VALUE, got 'optimize'"),
    ):
        assert main(["export", folder, "--format", OWN, "--out", str(tmp_path / "model.pt"), *extra]) == 2
        err = capsys.readouterr().err
        assert message in err
        assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_the_formats_of_0_1_keep_their_names_and_others_are_one_line(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, message in (
        (["--format", "aotinductor", "--opset", "18"], "--opset is not an option of --format aoti, which takes"),
        (["--serving", "triton", "--batch", "4"], "Triton makes the batches itself; leave the batch dynamic"),
        (["--format", "onnx", "--max-batch", "4"], "--max-batch is not an option of --format onnx, which takes"),
        (
            ["--format", "tflite"],
            "'tflite'; known: aoti, coreml, executorch, huggingface, kserve, litert, onnx, openvino, torch, triton, or",
        ),
        (["--format", "torch", "--image-size", "dynamic"], "must be a height and width, got 'dynamic'"),
    ):
        assert main(["export", folder, "--out", str(tmp_path / "model"), *arguments]) == 2
        err = capsys.readouterr().err
        assert message in err
        assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_target_that_needs_what_is_not_installed_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Needy(Target):
        name, suffix, packages = "needy", ".x", ("glit_no_such_package",)

        def export(self, source: ModelSource, path: Path, options: Any) -> Any:
            raise AssertionError("it must not get here")

    monkeypatch.setitem(TARGETS._entries, "needy", Needy)
    with pytest.raises(ExportError, match="glit_no_such_package cannot be imported"):
        export_model(small_glit(), tmp_path / "model.x", "needy")


# ---- the architecture in the file ----


def test_an_onnx_file_and_a_torch_program_hold_the_spec(tmp_path: Path) -> None:
    assert OnnxClassifier(exported().path).info.spec == small_glit().spec
    artifact = export_torch(small_glit(), tmp_path / "model.pt2", verify=2)
    assert Program(artifact.path).info.spec == small_glit().spec
    texts = {prop.key: prop.value for prop in onnx.load(exported().path).metadata_props}
    assert json.loads(texts["glit.spec"])["family"] == "glit"


def test_a_file_of_a_family_that_is_not_registered_still_classifies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from glit_models.families import FAMILIES

    artifact = export_onnx(autoformer(), tmp_path / "model.onnx", verify=2)
    assert artifact.info.spec_data is not None
    assert artifact.info.spec_data["family"] == "autoformer"
    monkeypatch.delitem(FAMILIES._entries, "autoformer", raising=False)
    classifier = OnnxClassifier(artifact.path)
    with pytest.raises(ExportError, match="cannot be used here: unknown family 'autoformer'"):
        _ = classifier.info.spec


def texts_with(**changes: str | None) -> dict[str, str]:
    texts = exported().info.to_texts()
    for name, text in changes.items():
        texts.pop(f"glit.{name}", None)
        if text is not None:
            texts[f"glit.{name}"] = text
    return texts


def test_a_file_of_0_1_has_no_spec_and_still_loads() -> None:
    info = ExportInfo.from_texts(texts_with(spec=None), "old.onnx")
    assert info.spec is None
    assert info.num_classes == 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"spec": "x" * (1 << 20) + "x"}, "its metadata 'glit.spec' is longer than 1048576 characters"),
        ({"source": '"' + "x" * (1 << 23) + '"'}, "its metadata 'glit.source' is longer than"),
        ({"spec": "[" * 100_000}, "its metadata 'glit.spec' is damaged"),
        ({"class_names": "[" * 100_000}, "its metadata 'glit.class_names' is damaged"),
        ({"spec": "[1, 2]"}, "its metadata 'glit.spec' is damaged"),
        ({"spec": '"text"'}, "its metadata 'glit.spec' is damaged"),
        ({"class_names": "[1, 2, 3, 4, 5]"}, "its metadata 'glit.class_names' is damaged"),
        ({"mean": '["a"]'}, "its metadata 'glit.mean' is damaged"),
        ({"crop_pct": "NaN"}, "its metadata 'glit.crop_pct' is damaged"),
        ({"crop_pct": "0"}, "its metadata 'glit.crop_pct' is damaged"),
        ({"interpolation": "[]"}, "its metadata 'glit.interpolation' is damaged"),
        ({"patch_size": "0"}, "its metadata 'glit.patch_size' is damaged"),
        ({"dynamic_size": "1"}, "its metadata 'glit.dynamic_size' is damaged"),
    ],
)
def test_hostile_metadata_is_refused_in_one_line(changes: dict[str, str], message: str) -> None:
    with pytest.raises(ExportError) as caught:
        ExportInfo.from_texts(texts_with(**changes), "bad.onnx")
    assert str(caught.value).startswith("bad.onnx: ")
    assert message in str(caught.value)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"embed_dim": -1}, "lacks the field"),
        ({"family": ["glit"]}, "family must be a name"),
        ({"family": "no_such_family"}, "unknown family 'no_such_family'"),
        ({"family": "antigravity:Family"}, "names the module 'antigravity'; import it first"),
        ({"blocks": [{"local_part": "antigravity:Part"}]}, "names the module 'antigravity'; import it first"),
    ],
)
def test_a_spec_that_cannot_be_used_is_one_line_and_never_imports_a_module(data: Any, message: str) -> None:
    info = ExportInfo.from_texts(texts_with(spec=json.dumps(data)), "bad.onnx")
    with pytest.raises(ExportError) as caught:
        _ = info.spec
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "antigravity" not in sys.modules


# ---- models of timm ----


@pytest.mark.parametrize("name", [pytest.param("test_vit", marks=pytest.mark.slow), "test_resnet"])
def test_a_model_of_timm_is_exported_and_compared_like_ours(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "model.onnx"
    arguments = ["--random-weights", "--image-size", "64", "--verify", "3"]
    assert main(["export", name, "--out", str(out), *arguments]) == 0
    assert "same most probable class" in capsys.readouterr().out
    classifier = OnnxClassifier(out, ["cpu"])
    assert (classifier.info.source, classifier.info.input_size, classifier.info.spec) == (name, (3, 64, 64), None)
    if name == "test_vit":
        with pytest.raises(ExportError, match="image_size cannot be dynamic for a model of another library"):
            export_onnx(timm.create_model(name), tmp_path / "dynamic.onnx", image_size="dynamic")


def test_without_weights_the_way_out_is_to_export_random_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    assert main(["export", "resnet18", "--out", str(tmp_path / "model.onnx")]) == 2
    err = capsys.readouterr().err
    assert err.endswith("; --random-weights exports it untrained\n")
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet1", "no model 'resnet1'; `glit list` shows what there is"),
        ("", "the name of the model is empty"),
        ("you/model", "you/model: no such folder here; as NAMESPACE/NAME on the Hub: not in the cache"),
        ("hf-hub:you/birds", "you/birds/config.json: not in the cache"),
        ("http://localhost/model", "http://localhost/model: no such folder"),
        ("runs/pets/model", "runs/pets/model: no such folder"),
        ("local-dir:/nope", "local-dir:/nope cannot be created: "),
    ],
)
def test_a_wrong_model_to_export_untrained_is_named(
    name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert main(["export", name, "--random-weights", "--out", str(tmp_path / "model.onnx")]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"glit: {message}")
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_weight_folder_is_exported_untrained(folder: str, tmp_path: Path) -> None:
    arguments = ["export", folder, "--out", str(tmp_path / "model.onnx"), "--verify", "2"]
    assert main([*arguments, "--random-weights"]) == 0
    info = OnnxClassifier(tmp_path / "model.onnx", ["cpu"]).info
    assert (info.spec, info.class_names) == (small_glit().spec, CLASSES)
    assert info.sha256 != open_source(folder).sha256
