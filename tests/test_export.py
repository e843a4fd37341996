"""Tests of `export_onnx`: equal logits, a clean graph, no partial files, and errors on bad input."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import glit_models.export.onnx as export_module
import numpy as np
import onnx
import pytest
import timm
import torch
from exported import CLASSES, difference, exported, searched_glit, small_glit
from glit_models.export import ExportInfo, ImageSource, OnnxArtifact, OnnxClassifier, export_onnx, tracing, verify
from glit_models.export.form import ExportForm
from glit_models.export.images import generated_images, prepare
from glit_models.export.preprocessing import preprocessing_model
from glit_models.export.sessions import open_session
from glit_models.export.source import open_source
from PIL import Image
from specs import MIXED, TINY48
from weight_folders import CLASSES as NAMES
from weight_folders import small_model

from glit_models import SpecTransformer, __version__
from glit_models.cli import main
from glit_models.errors import GlitError
from glit_models.weights.files import sha256_of
from glit_models.weights.folder import save_folder

pytestmark = pytest.mark.usefixtures("cached_graphs")

FASHION_MNIST = str(Path(__file__).parent / "fixtures" / "fashion-mnist")
TOLERANCE = 1e-4
NEWER = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 15)  # whose exporter makes smaller graphs


def operators(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(path).graph.node)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "small"
    save_folder(small_glit(spec=MIXED, num_classes=10), path, class_names=NAMES, dtype="float32")
    return path


# ---- the same numbers ----


@pytest.mark.parametrize("opset", [23, 20, 18])
def test_a_file_of_any_opset_gives_the_logits_of_pytorch_for_batches_of_any_size(opset: int) -> None:
    artifact = exported(opset=opset)
    assert artifact.info.opset == onnx.load(artifact.path).opset_import[0].version == opset
    for batch in (1, 2, 33):
        assert difference(artifact, small_glit(), batch) < TOLERANCE


def test_networks_of_other_shapes_give_the_logits_of_pytorch() -> None:
    for name, model in {
        "searched": searched_glit(),
        "one channel": small_glit(in_chans=1, global_pool="avg"),
    }.items():
        for batch in (1, 33):
            assert difference(exported(name), model, batch) < TOLERANCE, name


def test_a_last_block_of_any_kind_may_compute_the_class_token_alone() -> None:
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for kind in range(3):
        blocks = TINY48.blocks[kind : kind + 1]
        model = small_glit(spec={**TINY48.to_dict(), "blocks": [block.to_dict() for block in blocks]})
        for attention in ("operator", "products", "fused"):
            with torch.inference_mode():
                form = ExportForm(model, attention)
                torch.testing.assert_close(form(images), model(images), rtol=1e-5, atol=1e-5)


def test_a_rectangular_size_resamples_the_position_embedding_as_timm_does() -> None:
    model = small_glit()
    artifact = exported(image_size=(48, 32))
    assert artifact.info.input_size == (3, 48, 32)
    model.set_input_size((48, 32))
    assert difference(artifact, model, 3) < TOLERANCE


def test_a_dynamic_size_takes_every_size_that_the_patch_divides() -> None:
    artifact = exported("one block", image_size="dynamic")
    assert artifact.agreement is not None
    assert len(artifact.agreement.sizes) == 3
    if torch.__version__ < "2.14":  # resamples in another way, which verification finds
        assert artifact.path.suffix == ".unverified"
        assert "a logit differs" in artifact.agreement.problems[0]
        return
    for size in ((32, 32), (16, 64), (80, 48)):
        model = small_glit(spec=MIXED)
        model.set_input_size(size)
        assert difference(artifact, model, 2, size) < TOLERANCE
    with pytest.raises(GlitError, match="sides that 16 divides"):
        OnnxClassifier(artifact.path).logits(np.zeros((1, 3, 40, 32), np.float32))


def test_a_fixed_batch_is_fixed_and_the_runtime_fills_it_up() -> None:
    artifact = exported(batch=4)
    images = np.random.default_rng(0).normal(size=(6, 3, 32, 32)).astype(np.float32)
    with torch.inference_mode():
        expected = small_glit()(torch.from_numpy(images)).numpy()
    classifier = OnnxClassifier(artifact.path)
    np.testing.assert_allclose(classifier.logits(images), expected, atol=TOLERANCE)
    with pytest.raises(Exception, match="Got: 3 Expected: 4"):
        classifier.session.run(None, {"images": images[:3]})


def test_half_precision_is_half_the_size_and_agrees() -> None:
    whole, half = exported(opset=23), exported(precision="fp16", opset=23)
    assert half.num_bytes < 0.6 * whole.num_bytes
    assert half.agreement is not None
    assert half.agreement.top1_agreement == 100
    assert half.agreement.max_abs < 0.05
    graph = onnx.load(half.path).graph
    assert graph.output[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT  # whatever computes, logits are float32
    assert operators(half.path)["Cast"] <= 2
    attention = next(node for node in graph.node if node.op_type == "Attention")
    assert {a.name: a.i for a in attention.attribute}["softmax_precision"] == onnx.TensorProto.FLOAT
    norm = next(node for node in graph.node if node.op_type == "LayerNormalization")
    assert {a.name: a.i for a in norm.attribute}.get("stash_type", 1) == onnx.TensorProto.FLOAT


def test_the_model_that_was_given_stays_as_it_was(tmp_path: Path) -> None:
    model = small_glit().train()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    export_onnx(model, tmp_path / "half.onnx", precision="fp16", verify=0)
    export_onnx(model, tmp_path / "high.onnx", image_size=(48, 32), verify=0)
    assert model.training
    assert model.patch_embed.img_size == (32, 32)
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[key])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> OnnxArtifact:
    """GLiT-Tiny as it is."""
    return export_onnx(_named("glit_tiny"), tmp_path_factory.mktemp("tiny") / "model.onnx", opset=23, verify=2)


def _named(name: str) -> SpecTransformer:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=5).eval()


def test_glit_tiny_gives_the_logits_of_pytorch(tiny: OnnxArtifact) -> None:
    for batch in (1, 3):
        assert difference(tiny, _named("glit_tiny"), batch) < TOLERANCE


@pytest.mark.parametrize(
    "name", [pytest.param("glit_small", marks=pytest.mark.slow), pytest.param("glit_base", marks=pytest.mark.extended)]
)
def test_larger_networks_give_the_logits_of_pytorch(name: str, tmp_path: Path) -> None:
    artifact = export_onnx(_named(name), tmp_path / "model.onnx", opset=23, verify=2)
    for batch in (1, 3):
        assert difference(artifact, _named(name), batch) < TOLERANCE
    assert operators(artifact.path)["Attention"] == 8


# ---- a clean graph ----


def test_attention_norms_and_gelu_are_single_nodes_and_batch_norm_is_gone(tiny: OnnxArtifact) -> None:
    found = operators(tiny.path)
    assert found["Attention"] == 8
    assert found["LayerNormalization"] == 25
    assert found["Gelu"] == 12
    assert found["Conv"] == 8  # the patches, and one depthwise convolution for each of seven local blocks
    assert not {"BatchNormalization", "Softmax", "Erf", "Cast"} & set(found)
    assert tiny.num_nodes <= (274 if NEWER else 280)
    kernels = {tuple(tensor.dims[2:]) for tensor in onnx.load(tiny.path).graph.initializer if len(tensor.dims) == 4}
    assert kernels == {(16, 16), (1, 31), (1, 45)}


def test_the_file_tells_nothing_of_the_machine_that_made_it() -> None:
    for artifact in (exported(), exported(opset=18), exported(preprocess=True)):
        content = artifact.path.read_bytes()
        for trace in (b".py", b"stack_trace", b"pkg.torch", b"File ", str(Path(__file__).parents[1]).encode()):
            assert trace not in content, trace
        model = onnx.load(artifact.path)
        assert all(prop.key.startswith("glit.") for prop in model.metadata_props)
        assert (model.producer_name, model.producer_version) == ("glit-models", __version__)
        assert not any(node.metadata_props or node.doc_string for node in model.graph.node)


def test_the_file_asks_no_more_of_a_runtime_than_its_opset_does() -> None:
    for opset, ir_version in ((18, 8), (20, 9), (23, 11)):
        model = onnx.load(exported(opset=opset).path)
        assert (model.opset_import[0].version, model.ir_version) == (opset, ir_version)
        assert not any(a.name == "allowzero" for node in model.graph.node for a in node.attribute)
    assert exported().info.opset == 20


def test_nodes_and_weights_are_called_as_in_the_model() -> None:
    graph = onnx.load(exported(opset=23).path).graph
    names = [node.name for node in graph.node]
    assert "blocks.0.mixer.attn/Attention" in names
    assert "blocks.1.mixer.conv.dwconv/Conv" in names
    assert len(set(names)) == len(names)
    assert "blocks.0.norm1.weight" in {tensor.name for tensor in graph.initializer}


@pytest.mark.parametrize("options", [{}, {"opset": 18}, {"image_size": "dynamic"}, {"preprocess": True}, {"batch": 4}])
def test_the_checker_passes_with_full_shape_inference(options: dict[str, Any]) -> None:
    name = "one block" if "image_size" in options else "small"
    model = onnx.load(exported(name, **options).path)
    onnx.checker.check_model(model, full_check=True)
    batch, classes = model.graph.output[0].type.tensor_type.shape.dim
    assert (batch.dim_param or batch.dim_value, classes.dim_value) == (options.get("batch", "batch"), 5)


def test_the_same_model_gives_the_same_file_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_module, "trace", tracing.trace)  # not from the cache
    again = export_onnx(small_glit(), tmp_path / "again.onnx", opset=18, verify=0)
    assert sha256_of(again.path) == sha256_of(exported(opset=18).path)


# ---- preprocessing in the graph ----


def test_a_file_that_prepares_images_gives_what_timms_transform_and_the_model_give() -> None:
    artifact = exported(preprocess=True)
    assert artifact.agreement is not None
    assert artifact.agreement.levels is not None
    assert artifact.agreement.levels <= 1.0
    classifier, plain = OnnxClassifier(artifact.path), OnnxClassifier(exported().path)
    images = list(generated_images(6, (50, 40), seed=1))
    np.testing.assert_allclose(classifier.probabilities(images), plain.probabilities(images), atol=2e-3)
    arrays = np.stack([np.asarray(images[0])] * 3)
    assert classifier.logits(arrays).shape == (3, 5)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize(("crop_mode", "crop_pct"), [("center", 1.0), ("center", 0.875), ("squash", 0.9)])
def test_prepared_pixels_are_within_one_level_of_timms(interpolation: str, crop_mode: str, crop_pct: float) -> None:
    rng = np.random.default_rng(0)
    for channels, height, width in ((3, 64, 64), (3, 96, 64), (1, 48, 48)):
        info = ExportInfo(
            "x", "0", "0", 18, "fp32", None, (channels, height, width), False, 16, True, (0.5,) * channels,
            (0.25,) * channels, interpolation, crop_pct, crop_mode, 5, None,
        )  # fmt: skip
        session = open_session(preprocessing_model(info)).session
        for shape in ((40, 50), (64, 64), (97, 301), (200, 130), (1, 1)):
            # Noise at full contrast, but for tall images, which Pillow's versions filter in different orders.
            wide = shape[0] <= shape[1]
            noise = rng.integers(0 if wide else 64, 256 if wide else 192, (*shape, 3), dtype=np.uint8)
            image = Image.fromarray(noise)
            array = np.asarray(image if channels == 3 else image.convert("L"))
            (found,) = session.run(None, {"images": array.reshape(1, *shape, channels)})
            levels = np.abs(found - prepare(info, [image])) * 0.25 * 255
            assert np.quantile(levels, 0.95) <= 1.01, (shape, channels)


# ---- metadata ----


def test_the_file_says_where_it_comes_from_and_what_it_takes(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    artifact = export_onnx(str(folder), path, opset=20, batch=2, verify=2)
    info = OnnxClassifier(path).info
    assert info == artifact.info
    assert (info.source, info.sha256) == ("small", sha256_of(folder / "model.safetensors"))
    assert (info.opset, info.precision, info.batch, info.input_size) == (20, "fp32", 2, (3, 32, 32))
    config = json.loads((folder / "config.json").read_text())
    assert list(info.class_names or ()) == config["label_names"]
    for key in ("interpolation", "crop_pct"):
        assert getattr(info, key) == config["pretrained_cfg"][key]
    assert info.mean == tuple(config["pretrained_cfg"]["mean"])


# ---- proven equal ----


def test_the_report_stands_beside_the_file(tmp_path: Path) -> None:
    artifact = export_onnx(
        small_glit(spec=MIXED, num_classes=10),
        tmp_path / "model.onnx",
        verify=30,
        images=ImageSource("fashion-mnist", FASHION_MNIST),
    )
    report = json.loads((tmp_path / "model.onnx.json").read_text())
    assert report["verified"] is True
    found = report["agreement"]
    assert (found["num_images"], found["origin"]) == (30, "fashion-mnist test")
    assert found["max_abs"] <= TOLERANCE
    assert found["accuracy"] == found["torch_accuracy"]
    assert artifact.agreement is not None
    assert artifact.agreement.accuracy == found["accuracy"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "model.onnx.json"]


def test_any_number_of_images_is_compared_in_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    real, sizes = verify.torch_logits, []
    monkeypatch.setattr(verify, "torch_logits", lambda model, images: sizes.append(len(images)) or real(model, images))
    runner, source = OnnxClassifier(exported().path, ["cpu"]), open_source(small_glit())
    agreement = verify.compare(runner, source, 100, None)
    assert (agreement.num_images, agreement.holds, sizes) == (100, True, [1, 32, 32, 32, 3])
    fixed = OnnxClassifier(exported(batch=5).path, ["cpu"])
    sizes.clear()
    assert verify.compare(fixed, source, 40, None).holds
    assert sizes == [1, 30, 9]  # whole batches of the file


def test_a_file_that_differs_is_marked_and_ends_with_status_1(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "model.onnx"
    path.write_text("an earlier one")
    monkeypatch.setitem(verify.LIMITS, "fp32", verify.Limit(0.0, 99.0))
    assert main(["export", str(folder), "--out", str(path), "--verify", "3", "--force", "--opset", "18"]) == 1
    assert "a logit differs by" in capsys.readouterr().err
    assert path.read_text() == "an earlier one"
    assert json.loads((tmp_path / "model.onnx.unverified.json").read_text())["verified"] is False
    assert OnnxClassifier(tmp_path / "model.onnx.unverified").info.num_classes == 10

    monkeypatch.undo()
    assert main(["export", str(folder), "--out", str(path), "--verify", "3", "--force", "--opset", "18"]) == 0
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.onnx", "model.onnx.json"]


@pytest.mark.parametrize(("precision", "least"), [("fp16", 99.0), ("bf16", 98.0), ("int8", 98.0)])
def test_lower_precisions_are_held_to_their_top_1_agreement(precision: str, least: float) -> None:
    assert verify.LIMITS[precision].top1_agreement == least


def test_without_verification_the_file_is_marked(tmp_path: Path) -> None:
    artifact = export_onnx(small_glit(), tmp_path / "model.onnx", precision="bf16", verify=0)
    assert artifact.path == tmp_path / "model.onnx.unverified"
    assert artifact.agreement is None
    weights = {tensor.data_type for tensor in onnx.load(artifact.path).graph.initializer if len(tensor.dims) > 1}
    assert onnx.TensorProto.BFLOAT16 in weights


# ---- the command ----


def test_the_command_says_what_it_chose_and_found(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "deeper" / "model.onnx"
    arguments = ["export", str(folder), "--out", str(path), "--batch", "2", "--image-size", "64,32", "--preprocess"]
    assert main([*arguments, "--data", "fashion-mnist", "--root", FASHION_MNIST, "--verify", "10"]) == 0
    out = capsys.readouterr().out
    for part in (str(path), "opset 20", "10 images (fashion-mnist test) by CPUExecutionProvider", "100.00 %"):
        assert part in out
    assert OnnxClassifier(path).info.input_size == (3, 64, 32)

    assert main(["export", str(folder), "--out", str(path), "--force", "--json", "--verify", "2"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["path"] == str(path)
    assert result["agreement"]["top1_agreement"] == 100


def test_bad_input_is_one_line_and_writes_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.onnx").write_text("something")
    (tmp_path / "empty").mkdir()
    shutil.copytree(folder, tmp_path / "other")
    config = json.loads((folder / "config.json").read_text())
    config["model_args"]["spec"]["embed_dim"] = 96
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    cases = {
        "resnet_none: no such folder, and no MODEL.TAG": ["resnet_none", "--out", "x.onnx"],
        "glit_small: no weights on this machine": ["glit_small", "--out", "x.onnx"],
        "do not fit the model": ["other", "--out", "x.onnx"],
        "there.onnx exists; --force replaces it": [str(folder), "--out", "there.onnx"],
        "empty is a folder; give the file to write": [str(folder), "--out", "empty"],
        "there.onnx is no folder": [str(folder), "--out", "there.onnx/x.onnx"],
        "--opset must be one of 20, 23, 18, got 17": [str(folder), "--out", "x.onnx", "--opset", "17"],
        "--precision must be one of fp32, fp16, bf16, int8": [str(folder), "--out", "x.onnx", "--precision", "fp8"],
        "--batch must be 'dynamic' or a number": [str(folder), "--out", "x.onnx", "--batch", "0"],
        "--image-size must be HEIGHT,WIDTH": [str(folder), "--out", "x.onnx", "--image-size", "big"],
        "img_size must be a multiple of patch_size=16": [str(folder), "--out", "x.onnx", "--image-size", "30,32"],
        "--verify must be 0 or more images": [str(folder), "--out", "x.onnx", "--verify", "-1"],
        "int8 needs images to calibrate with": [str(folder), "--out", "x.onnx", "--precision", "int8"],
        "--calibration and --dynamic-int8 exclude each other": [
            *(str(folder), "--out", "x.onnx", "--precision", "int8", "--calibration", "empty", "--dynamic-int8")
        ],
        "calibration is for int8, not for fp32": [str(folder), "--out", "x.onnx", "--calibration", "empty"],
        "no images in": [str(folder), "--out", "x.onnx", "--data", "empty", "--opset", "18"],
        "nowhere: no such folder": [str(folder), "--out", "x.onnx", "--data", "nowhere", "--opset", "18"],
        "no provider 'cuda'": [str(folder), "--out", "x.onnx", "--provider", "cuda"],
        "the network sees one size": [str(folder), "--out", "x.onnx", "--image-size", "dynamic", "--preprocess"],
    }
    before = sorted(path.name for path in tmp_path.rglob("*"))
    for message, arguments in cases.items():
        if "cuda" in message and "CUDAExecutionProvider" in export_module.sessions.available_providers():
            continue
        assert main(["export", *arguments]) == 2, arguments
        err = capsys.readouterr().err
        assert message in err, (message, err)
        assert err.count("\n") == 1, err
    assert sorted(path.name for path in tmp_path.rglob("*")) == before
    assert (tmp_path / "there.onnx").read_text() == "something"


def test_bf16_has_one_opset(tmp_path: Path) -> None:
    with pytest.raises(GlitError, match="bf16 needs opset 23; 20 has no convolution of it"):
        export_onnx(small_glit(), tmp_path / "model.onnx", precision="bf16", opset=20)


def test_a_precision_that_cannot_be_run_here_is_named_with_one_that_can(tmp_path: Path) -> None:
    with pytest.raises(GlitError, match="CPUExecutionProvider of onnxruntime .* cannot run it: .*; opset 23 with fp16"):
        export_onnx(small_glit(), tmp_path / "model.onnx", precision="bf16", opset=23, providers=["cpu"])
    assert list(tmp_path.iterdir()) == []


def test_an_opset_that_cannot_be_run_here_is_named_with_one_that_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = export_module.sessions.open_session

    def old_runtime(model: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(model, bytes) and onnx.load_from_string(model).opset_import[0].version > 20:
            raise export_module.UnrunnableError("opset 23 is not known here")
        return real(model, *args, **kwargs)

    monkeypatch.setattr(export_module.sessions, "open_session", old_runtime)
    with pytest.raises(GlitError, match="opset 23 is not known here; opset 20 with fp32 can be run; verify 0 exports"):
        export_onnx(small_glit(), tmp_path / "model.onnx", opset=23, verify=2)
    assert list(tmp_path.iterdir()) == []
    assert export_onnx(small_glit(), tmp_path / "model.onnx", verify=2).info.opset == 20


def test_models_that_cannot_be_exported_are_refused_with_the_reason(tmp_path: Path) -> None:
    broken = small_glit()
    with torch.no_grad():
        broken.head.weight[0, 0] = float("nan")
    random_crop = small_glit(pretrained_cfg_overlay={"interpolation": "lanczos"})
    for model, options, message in (
        (torch.nn.Linear(3, 3), {}, "Linear is not a model that timm.create_model made"),
        (small_glit(num_classes=0), {}, "has no head"),
        (small_glit(global_pool=""), {}, "does not pool its tokens"),
        (broken, {}, "'head.weight' holds values that are not finite"),
        (random_crop, {"preprocess": True}, "interpolation 'lanczos' has no ONNX operator"),
        (small_model(), {"batch": 0}, "batch must be from 1 to 100000, or None for any number, got 0"),
    ):
        with pytest.raises(GlitError, match=message):
            export_onnx(model, tmp_path / "model.onnx", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_graph_beyond_what_one_file_holds_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_module.graph, "_LIMIT", 1000)
    with pytest.raises(GlitError, match="GiB, and one ONNX file holds 2; use precision='fp16'"):
        export_onnx(small_glit(), tmp_path / "model.onnx", verify=0)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_named_with_the_extra_that_brings_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    with pytest.raises(GlitError, match=r'onnxscript cannot be imported .*pip install "\.\[export\]"'):
        export_onnx(small_glit(), tmp_path / "model.onnx")


def test_the_class_names_reach_the_file() -> None:
    assert OnnxClassifier(exported().path).class_names == CLASSES
    assert OnnxClassifier(exported("searched").path).class_names == CLASSES
