"""Tests that Triton serves the repository of `glit export --serving triton`: run them with `make test-triton`.

The server in PyPI's nvidia-pytriton has a backend for Python, but none for ONNX Runtime. So a few lines of Python run
`model.onnx` in ONNX Runtime. Everything else is as it was exported: inputs and outputs, the largest batch, dynamic
batching, instances, acceleration, warm-up and labels. The environment of the server is `TRITON_ENV`.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exported import CLASSES, small_glit
from glit_models.export import OnnxClassifier, export_triton
from server_process import free_ports, server_process

PACKAGES = next(Path(os.environ.get("TRITON_ENV", "no environment")).resolve().glob("lib/python3*/site-packages"), None)
if PACKAGES is None:
    pytest.skip("make test-triton installs a Triton server", allow_module_level=True)
triton = pytest.importorskip("tritonclient.http")

IMAGES = np.random.default_rng(0).integers(0, 256, (2, 30, 40, 3), dtype=np.uint8)
BACKEND = """
import os, sys
sys.path.insert(0, {packages!r})
import onnxruntime
import triton_python_backend_utils as backend

class TritonPythonModel:
    def initialize(self, args):
        path = os.path.join(args["model_repository"], args["model_version"], "model.onnx")
        self.session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def execute(self, requests):
        images = [backend.get_input_tensor_by_name(request, "images").as_numpy() for request in requests]
        logits = [self.session.run(None, {{"images": x}})[0] for x in images]
        return [backend.InferenceResponse([backend.Tensor("logits", x)]) for x in logits]
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Path]]:
    """A client of a running server, and the model's folder."""
    folder = tmp_path_factory.mktemp("triton")
    model = folder / "repository" / "pets"
    export_triton(small_glit(), folder / "repository", name="pets", preprocess=True, verify=8)
    (model / "1" / "model.py").write_text(BACKEND.format(packages=str(PACKAGES)))
    config = (model / "config.pbtxt").read_text()
    for exported, replaced in (('backend: "onnxruntime"', 'backend: "python"'), ('"model.onnx"', '"model.py"')):
        assert config.count(exported) == 1
        config = config.replace(exported, replaced)
    (model / "config.pbtxt").write_text(config)
    assert PACKAGES is not None
    installed = PACKAGES / "pytriton" / "tritonserver"
    shutil.copytree(installed / "backends" / "python", folder / "backends" / "python")
    python = PACKAGES.parent.name.removeprefix("python")  # 3.11
    shutil.copy(installed / "python_backend_stubs" / python / "triton_python_backend_stub", folder / "backends/python")
    http, grpc, metrics = free_ports(3)
    command = [
        installed / "bin" / "tritonserver", "--model-repository=repository", f"--backend-directory={folder}/backends",
        f"--http-port={http}", f"--grpc-port={grpc}", f"--metrics-port={metrics}",
    ]  # fmt: skip
    libraries = {"LD_LIBRARY_PATH": str(PACKAGES / "nvidia_pytriton.libs")}
    with (
        server_process(command, f"http://127.0.0.1:{http}/v2/models/pets/ready", folder, libraries),
        triton.InferenceServerClient(f"127.0.0.1:{http}", concurrency=16) as client,
    ):
        yield client, model


def _request(images: np.ndarray[Any, Any], **output: Any) -> dict[str, Any]:
    tensor = triton.InferInput("images", list(images.shape), "UINT8")
    tensor.set_data_from_numpy(images)
    return {"inputs": [tensor], "outputs": [triton.InferRequestedOutput("logits", **output)]}


def test_it_answers_as_the_file(server: tuple[Any, Path]) -> None:
    client, model = server
    expected = OnnxClassifier(model / "1" / "model.onnx", ["cpu"]).logits(IMAGES)
    logits = client.infer("pets", **_request(IMAGES)).as_numpy("logits")
    np.testing.assert_allclose(logits, expected, atol=2e-4)
    (best,) = client.infer("pets", **_request(IMAGES[:1], class_count=1)).as_numpy("logits")[0]
    _, index, label = best.decode().split(":")
    assert (int(index), label) == (expected[0].argmax(), CLASSES[expected[0].argmax()])


def test_it_answers_many_requests_at_a_time(server: tuple[Any, Path]) -> None:
    client, model = server
    expected = OnnxClassifier(model / "1" / "model.onnx", ["cpu"]).logits(IMAGES)

    asked = [client.async_infer("pets", **_request(IMAGES[place % 2 :][:1])) for place in range(64)]
    for place, answer in enumerate(asked):
        np.testing.assert_allclose(answer.get_result().as_numpy("logits")[0], expected[place % 2], atol=2e-4)


def test_it_has_the_configuration_of_the_export(server: tuple[Any, Path]) -> None:
    client, _ = server
    config = client.get_model_config("pets")
    assert config["max_batch_size"] == 64
    assert config["dynamic_batching"]["preferred_batch_size"] == [8, 16, 32, 64]
    assert [group["kind"] for group in config["instance_group"]] == ["KIND_CPU"]  # KIND_AUTO, without a GPU
    assert [request["batch_size"] for request in config["model_warmup"]] == [1, 64]
    (accelerator,) = config["optimization"]["execution_accelerators"]["gpu_execution_accelerator"]
    assert accelerator["name"] == "tensorrt"


def test_a_wrong_request_is_refused(server: tuple[Any, Path]) -> None:
    client, _ = server
    with pytest.raises(triton.InferenceServerException, match="unexpected shape"):
        client.infer("pets", **_request(IMAGES[..., :2]))
    with pytest.raises(triton.InferenceServerException, match="batch-size must be <= 64"):
        client.infer("pets", **_request(np.repeat(IMAGES, 33, 0)))
