"""Tests of `examples/mlserver`: MLServer answers as `glit serve`, where MLServer is installed."""

from __future__ import annotations

import json
import shutil
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exported import CLASSES, exported
from glit_models.export import OnnxClassifier
from server_process import free_ports, server_process

pytest.importorskip("mlserver")
pytest.importorskip("glit_runtime")

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "mlserver"
START = [sys.executable, "-c", "from mlserver.cli import main; main()", "start"]
IMAGES = np.random.default_rng(0).integers(0, 256, (2, 30, 40, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of the model at a running server."""
    repository = tmp_path_factory.mktemp("repository")
    (repository / "pets" / "1").mkdir(parents=True)
    shutil.copy(exported(preprocess=True).path, repository / "pets" / "1" / "model.onnx")
    for file in EXAMPLE.iterdir():
        if file.is_file():
            shutil.copy(file, repository / "pets")
    name = json.loads((EXAMPLE / "model-settings.json").read_text())["name"]
    http, grpc, metrics = free_ports(3)
    settings = {"HTTP_PORT": http, "GRPC_PORT": grpc, "METRICS_PORT": metrics, "PARALLEL_WORKERS": "0"}
    settings = {f"MLSERVER_{key}": value for key, value in settings.items()}
    address = f"http://127.0.0.1:{http}/v2/models/{name}"
    with server_process([*START, repository], f"{address}/ready", repository, settings):
        yield address


def _ask(address: str, **changes: Any) -> tuple[int, Any]:
    tensor = {"name": "images", "shape": list(IMAGES.shape), "datatype": "UINT8", "data": IMAGES.ravel().tolist()}
    body = json.dumps({"inputs": [tensor | changes]}).encode()
    request = urllib.request.Request(f"{address}/infer", body, {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def test_it_answers_as_the_file(model: str) -> None:
    status, answer = _ask(model)
    assert status == 200
    (output,) = answer["outputs"]
    assert (output["name"], output["datatype"], output["shape"]) == ("logits", "FP32", [2, len(CLASSES)])
    expected = OnnxClassifier(exported(preprocess=True).path, ["cpu"]).logits(IMAGES)
    np.testing.assert_allclose(np.reshape(output["data"], output["shape"]), expected, atol=1e-5)


def test_it_says_what_it_takes(model: str) -> None:
    with urllib.request.urlopen(model, timeout=20) as answer:
        about = json.load(answer)
    assert about["inputs"] == [{"name": "images", "datatype": "UINT8", "shape": [-1, -1, -1, 3]}]
    assert about["outputs"] == [{"name": "logits", "datatype": "FP32", "shape": [-1, len(CLASSES)]}]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "other"}, "the only input is 'images' of type UINT8"),
        ({"datatype": "FP32"}, "the only input is 'images' of type UINT8"),
        ({"shape": [2, 30, 120]}, "takes uint8 [B, h, w, 3], got uint8 [2, 30, 120]"),
        ({"shape": [2, 30, 40, 4]}, "cannot reshape array"),
        ({"data": [300] * IMAGES.size}, "300 out of bounds"),
    ],
)
def test_a_wrong_request_is_refused_in_one_line(model: str, changes: dict[str, Any], message: str) -> None:
    status, answer = _ask(model, **changes)
    assert status == 400
    assert message in answer["error"]
    assert "\n" not in answer["error"]
