"""Tests of `glit export --serving triton`: a repository that Triton can read, and the client in the docs."""

from __future__ import annotations

import dataclasses
import json
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from exported import CLASSES, small_glit
from glit_models.export import ExportInfo, OnnxArtifact, OnnxClassifier
from glit_models.export.serving import TritonOptions, _arranged, export_triton, served_name, triton_config
from glit_models.export.source import open_source
from PIL import Image

from glit_models.cli import main
from glit_models.errors import ExportError
from glit_models.weights.folder import save_folder

pytestmark = pytest.mark.usefixtures("cached_graphs")

DOCS = Path(__file__).resolve().parents[1] / "docs" / "export.md"


def parsed(text: str) -> Any:
    """The configuration read with Triton's own schema, which refuses unknown fields and wrong types."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # grpc's and protobuf's, of each other's versions
        pytest.importorskip("grpc")
        config = pytest.importorskip("tritonclient.grpc.model_config_pb2")
        from google.protobuf import text_format

        return text_format.Parse(text, config.ModelConfig())


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with one small model that prepares images."""
    root = tmp_path_factory.mktemp("triton")
    save_folder(small_glit(), root / "pets", class_names=CLASSES)
    arguments = ["--serving", "triton", "--preprocess", "--verify", "4", "--max-batch", "16", "--instances", "2"]
    assert main(["export", str(root / "pets"), "--out", str(root / "repository"), *arguments]) == 0
    return root / "repository"


def test_the_repository_is_laid_out_as_triton_looks_for_it(repository: Path) -> None:
    files = {str(path.relative_to(repository)) for path in repository.rglob("*") if path.is_file()}
    assert files == {f"pets/{name}" for name in ("config.pbtxt", "labels.txt", "report.json", "1/model.onnx")}
    assert (repository / "pets" / "labels.txt").read_text().splitlines() == list(CLASSES)
    assert json.loads((repository / "pets" / "report.json").read_text())["verified"] is True


@pytest.mark.parametrize("device", ["gpu", "cpu"])
def test_kserve_gets_a_manifest_for_the_same_repository(repository: Path, tmp_path: Path, device: str) -> None:
    given = ["--serving", "kserve", "--preprocess", "--verify", "2", "--serve-on", device, "--name", "My_pets"]
    given += ["--storage-uri", "s3://bucket/repository"]
    assert main(["export", str(repository.parent / "pets"), "--out", str(tmp_path / "out"), *given]) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"My_pets", "My_pets.kserve.yaml"}
    manifest = yaml.safe_load((tmp_path / "out" / "My_pets.kserve.yaml").read_text())
    assert (manifest["apiVersion"], manifest["kind"]) == ("serving.kserve.io/v1beta1", "InferenceService")
    assert manifest["metadata"] == {"name": "my-pets"}
    model = manifest["spec"]["predictor"]["model"]
    assert (model["runtime"], model["protocolVersion"]) == ("kserve-tritonserver", "v2")
    assert (model["modelFormat"], model["storageUri"]) == ({"name": "triton"}, "s3://bucket/repository")
    assert model.get("resources") == ({"limits": {"nvidia.com/gpu": "1"}} if device == "gpu" else None)
    text = (tmp_path / "out" / "My_pets" / "config.pbtxt").read_text()
    # ONNX Runtime creates the last folder of this path only, and the container has no others than /tmp.
    assert ('key: "trt_engine_cache_path" value: "/tmp/My_pets"' in text) == (device == "gpu")
    assert parsed(text).name == "My_pets"


def test_kserve_must_be_told_where_the_repository_is_and_unverified_models_get_no_manifest(
    repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["export", str(repository.parent / "pets"), "--serving", "kserve", "--out", str(tmp_path / "out")]
    for uri in ([], ["--storage-uri", "bucket/repository"]):
        assert main([*arguments, *uri]) == 2
        assert "glit: --storage-uri must say where the cluster reads the repository" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    assert main([*arguments, "--verify", "0", "--storage-uri", "pvc://models/repository"]) == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["pets.unverified"]


def test_models_of_runs_are_called_by_their_runs(tmp_path: Path) -> None:
    save_folder(small_glit(), tmp_path / "my pets" / "model", class_names=CLASSES)
    assert served_name(open_source(tmp_path / "my pets" / "model").name) == "my_pets"
    names = [served_name(name) for name in ("runs/pets/model", "runs/my pets/model", "glit_tiny.in1k", "you/model")]
    assert names == ["pets", "my_pets", "glit_tiny_in1k", "you"]
    assert served_name("model") == "model"


def test_the_configuration_agrees_with_the_model_that_it_is_of(repository: Path) -> None:
    config = parsed((repository / "pets" / "config.pbtxt").read_text())
    classifier = OnnxClassifier(repository / "pets" / "1" / config.default_model_filename, ["cpu"])
    assert (config.name, config.backend, config.max_batch_size) == ("pets", "onnxruntime", 16)
    types = {"TYPE_UINT8": "tensor(uint8)", "TYPE_FP32": "tensor(float)"}
    for ours, theirs in ((config.input, classifier.session.get_inputs()),
                         (config.output, classifier.session.get_outputs())):  # fmt: skip
        (field,), (value,) = ours, theirs
        name = type(field).DESCRIPTOR.fields_by_name["data_type"].enum_type.values_by_number[field.data_type].name
        assert (field.name, types[name]) == (value.name, value.type)
        # Triton puts the batch in front of what stands in the configuration.
        assert [dim if isinstance(dim, int) else -1 for dim in value.shape] == [-1, *field.dims]
    assert config.output[0].label_filename == "labels.txt"
    assert list(config.dynamic_batching.preferred_batch_size) == [8, 16]
    assert (config.instance_group[0].count, config.instance_group[0].kind) == (2, 0)  # KIND_AUTO
    (accelerator,) = config.optimization.execution_accelerators.gpu_execution_accelerator
    assert accelerator.name == "tensorrt"
    assert accelerator.parameters["precision_mode"] == "FP32"
    assert accelerator.parameters["trt_engine_cache_path"] == "/engines/pets"


def test_the_warm_up_is_what_the_model_takes(repository: Path) -> None:
    config = parsed((repository / "pets" / "config.pbtxt").read_text())
    classifier = OnnxClassifier(repository / "pets" / "1" / "model.onnx", ["cpu"])
    assert [warm.batch_size for warm in config.model_warmup] == [1, 16]
    for warm in config.model_warmup:
        shape = (warm.batch_size, *warm.inputs["images"].dims)
        assert classifier.logits(np.zeros(shape, np.uint8)).shape == (warm.batch_size, 5)


def test_other_precisions_and_places_are_written_down() -> None:
    info = ExportInfo(
        "a", "0", "0", 23, "fp16", None, (3, 32, 32), False, 16, False, (0.5,) * 3, (0.5,) * 3, "bicubic", 1.0,
        "center", 5, None,
    )  # fmt: skip
    config = parsed(triton_config(info, "a", TritonOptions(max_batch_size=4)))
    assert list(config.input[0].dims) == [3, 32, 32]
    assert config.input[0].data_type == 10  # TYPE_FP16
    assert list(config.dynamic_batching.preferred_batch_size) == [4]
    (accelerator,) = config.optimization.execution_accelerators.gpu_execution_accelerator
    assert accelerator.parameters["precision_mode"] == "FP16"
    assert parsed(triton_config(info, "a", TritonOptions(gpu=True))).instance_group[0].kind == 1  # KIND_GPU
    config = parsed(triton_config(info, "a", TritonOptions(gpu=False)))
    assert config.instance_group[0].kind == 2  # KIND_CPU
    assert not config.optimization.execution_accelerators.gpu_execution_accelerator


def test_a_class_keeps_to_its_line_of_the_labels_whatever_it_is_called(repository: Path, tmp_path: Path) -> None:
    info = OnnxClassifier(repository / "pets" / "1" / "model.onnx").info
    info = dataclasses.replace(info, class_names=(*CLASSES[:3], "a\nb", "\x1b[2Jc"))
    for name in ("model.onnx", "model.onnx.json"):
        (tmp_path / name).touch()
    artifact = OnnxArtifact(tmp_path / "model.onnx", info, num_bytes=0, agreement=None)
    folder = _arranged(artifact, tmp_path / "pets", TritonOptions()).path.parents[1]
    assert (folder / "labels.txt").read_text().split("\n") == [*CLASSES[:3], r"a\nb", r"\x1b[2Jc", ""]


def test_what_cannot_be_served_is_refused_and_nothing_written(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    for options, message in (
        ({"batch": 4}, "leave the batch dynamic"),
        ({"image_size": "dynamic"}, "images of one size"),
        ({"name": "a/b"}, "not a name for a model"),
        ({"name": "there"}, "there exists; force=True replaces it, name=... names another"),
    ):
        with pytest.raises(ExportError, match=message):
            export_triton(small_glit(), tmp_path, **options)
    with pytest.raises(ExportError, match="max_batch_size must be at least 1, got 0"):
        TritonOptions(max_batch_size=0)
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_the_client_in_the_docs_builds_a_request_that_the_model_takes(repository: Path, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # gevent's
        http = pytest.importorskip("tritonclient.http")
        (code,) = (block for block in re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.S) if "triton" in block)
        client: dict[str, Any] = {"__name__": "client"}
        exec(compile(code, str(DOCS), "exec"), client)
        Image.new("RGB", (40, 30), 99).save(tmp_path / "a.png")
        inputs, outputs = client["request"](str(tmp_path / "a.png"))
        body, header_length = http.InferenceServerClient.generate_request_body(inputs, outputs=outputs)
    header = json.loads(body[:header_length])
    (given,) = header["inputs"]
    assert (given["name"], given["datatype"], given["shape"]) == ("images", "UINT8", [1, 30, 40, 3])
    assert header["outputs"][0]["parameters"]["classification"] == 3
    image = np.frombuffer(body[header_length:], np.uint8).reshape(given["shape"])
    assert OnnxClassifier(repository / "pets" / "1" / "model.onnx").logits(image).shape == (1, 5)
