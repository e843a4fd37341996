"""Tests of `glit serve`: responses, rejected requests, and robustness against clients."""

from __future__ import annotations

import http.client
import io
import json
import os
import queue
import re
import shutil
import signal
import socket
import struct
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exported import CLASSES, exported
from glit_models.export import OnnxClassifier
from glit_models.export.batching import Batcher
from PIL import Image

from glit_models.cli import main
from glit_models.errors import ExportError

pytest.importorskip("fastapi")
uvicorn = pytest.importorskip("uvicorn")

from glit_models.export.served import open_models  # noqa: E402
from glit_models.export.server import ServerOptions, _bound, make_server  # noqa: E402

pytestmark = pytest.mark.usefixtures("cached_graphs")

ROOT = Path(__file__).resolve().parents[1]
IMAGES = np.random.default_rng(0).integers(0, 256, (3, 30, 40, 3), dtype=np.uint8)
INFER = "/v2/models/pets/infer"


class Client:
    """One running server, and how it answers."""

    def __init__(self, port: int, models: Any, options: ServerOptions) -> None:
        self.port, self.models, self.options = port, models, options

    def ask(self, method: str, path: str, body: Any = None, headers: Any = None) -> tuple[int, Any, Any]:
        """Status, headers, and the body, read as JSON where it is."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            connection.request(method, path, body, headers or {})
            answer = connection.getresponse()
            content = answer.read()
        finally:
            connection.close()
        is_json = answer.headers.get("content-type") == "application/json"
        return answer.status, answer.headers, json.loads(content) if is_json else content


@contextmanager
def served(what: Path, max_delay: float = 0.0, **options: Any) -> Iterator[Client]:
    limits = ServerOptions(**options)
    opened = open_models(
        str(what), providers=["cpu"], threads=1, name="pets", max_delay=max_delay, max_batch=limits.max_batch
    )
    with opened as models, socket.create_server(("127.0.0.1", 0)) as listener:
        server = make_server(models, limits)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        port = listener.getsockname()[1]
        thread.start()
        try:
            yield Client(port, models, limits)
        finally:
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive()


@pytest.fixture(scope="module")
def file() -> Path:
    return exported(preprocess=True).path


@pytest.fixture(scope="module")
def classifier(file: Path) -> OnnxClassifier:
    return OnnxClassifier(file, ["cpu"], threads=1)


@pytest.fixture(scope="module")
def client(file: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """A server of a file that is overwritten after it was opened."""
    copy = Path(shutil.copy(file, tmp_path_factory.mktemp("served") / "model.onnx"))
    with served(copy, max_body=100_000) as client:
        copy.write_bytes(b"damaged")
        yield client


def tensor(**changes: Any) -> dict[str, Any]:
    return {
        "name": "images", "shape": list(IMAGES.shape), "datatype": "UINT8", "data": IMAGES.ravel().tolist(), **changes
    }  # fmt: skip


def png(size: tuple[int, int] = (40, 30)) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", size, (200, 30, 90)).save(content, "PNG")
    return content.getvalue()


# ---- what it answers ----


def test_it_tells_what_it_serves(client: Client) -> None:
    assert client.ask("GET", "/v2")[2]["extensions"] == ["binary_tensor_data", "classification"]
    for path in ("/v2/health/live", "/v2/health/ready", "/v2/models/pets/ready", "/v2/models/pets/versions/1/ready"):
        assert client.ask("GET", path)[0] == 200
    about = client.ask("GET", "/v2/models/pets")[2]
    assert about == client.ask("GET", "/v2/models/pets/versions/1")[2]
    assert about["inputs"] == [{"name": "images", "datatype": "UINT8", "shape": [-1, -1, -1, 3]}]
    assert about["outputs"] == [{"name": "logits", "datatype": "FP32", "shape": [-1, 5]}]


def test_json_comes_back_as_json(client: Client, classifier: OnnxClassifier) -> None:
    for data in (IMAGES.tolist(), IMAGES.ravel().tolist()):
        body = json.dumps({"id": "7", "inputs": [tensor(data=data)]})
        status, _, answer = client.ask("POST", "/v2/models/pets/versions/1/infer", body)
        assert (status, answer["id"], answer["model_name"]) == (200, "7", "pets")
        (output,) = answer["outputs"]
        assert (output["name"], output["datatype"], output["shape"]) == ("logits", "FP32", [3, 5])
        np.testing.assert_allclose(np.reshape(output["data"], (3, 5)), classifier.logits(IMAGES), atol=1e-5)


def test_the_client_for_triton_works_unchanged(client: Client, classifier: OnnxClassifier, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # gevent's
        triton = pytest.importorskip("tritonclient.http")
        code = next(
            code for code in re.findall(r"```python\n(.*?)```", (ROOT / "docs/export.md").read_text(), re.S)
            if "triton" in code
        )  # fmt: skip
        shown: dict[str, Any] = {"__name__": "client"}
        exec(compile(code, "export.md", "exec"), shown)
        (tmp_path / "a.png").write_bytes(png())
        expected = classifier.logits(IMAGES)
        with triton.InferenceServerClient(f"127.0.0.1:{client.port}") as server:
            assert server.is_server_live()
            assert server.is_server_ready()
            assert server.is_model_ready("pets", "1")
            assert server.get_model_metadata("pets")["name"] == "pets"
            inputs, outputs = shown["request"](str(tmp_path / "a.png"))
            (lines,) = server.infer("pets", inputs, outputs=outputs).as_numpy("logits")
            best = classifier.classify(str(tmp_path / "a.png"), 3)[0]
            assert [line.decode().split(":")[2] for line in lines] == [name for name, _ in best]
            for sent in (True, False):
                images = triton.InferInput("images", list(IMAGES.shape), "UINT8")
                images.set_data_from_numpy(IMAGES, binary_data=sent)
                for asked in (None, [triton.InferRequestedOutput("logits", binary_data=False)]):
                    found = server.infer("pets", [images], outputs=asked).as_numpy("logits")
                    np.testing.assert_allclose(found, expected, atol=1e-5)
            asked = [triton.InferRequestedOutput("logits", binary_data=False, class_count=99)]
            texts = server.infer("pets", [images], outputs=asked).as_numpy("logits")
            assert texts.shape == (3, 5)
            assert texts[1, 0].split(":")[1:] == [str(expected[1].argmax()), CLASSES[expected[1].argmax()]]
            with pytest.raises(Exception, match="there is no model 'cats'; served are pets"):
                server.infer("cats", [images])


def test_an_image_file_is_classified(client: Client, classifier: OnnxClassifier) -> None:
    expected = classifier.classify(Image.open(io.BytesIO(png())), 2)[0]
    form = b'--x\r\nContent-Disposition: form-data; name="f"; filename="a.png"\r\n\r\n' + png() + b"\r\n--x--\r\n"
    for body, kind in ((png(), "image/png"), (form, "multipart/form-data; boundary=x")):
        status, _, answer = client.ask("POST", "/classify?top_k=2", body, {"Content-Type": kind})
        assert status == 200
        assert [row["class"] for row in answer] == [name for name, _ in expected]
        np.testing.assert_allclose([row["probability"] for row in answer], [p for _, p in expected], atol=1e-5)


def test_the_page_loads_nothing_from_elsewhere(client: Client) -> None:
    status, headers, page = client.ask("GET", "/")
    assert (status, client.ask("GET", "/models")[2]) == (200, ["pets"])
    assert "default-src 'none'" in headers["content-security-policy"]
    assert b"//" not in page


def test_it_counts_what_it_does(client: Client) -> None:
    def counted() -> dict[str, float]:
        text = client.ask("GET", "/metrics")[2].decode()
        assert all(re.fullmatch(r'(# (HELP|TYPE) .*|\w+\{[\w=",.+]+\} [\d.]+)', line) for line in text.splitlines())
        lines = (line.rpartition(" ") for line in text.splitlines() if not line.startswith("#"))
        return {name: float(value) for name, _, value in lines}

    before = counted()
    client.ask("POST", INFER, json.dumps({"inputs": [tensor()]}))
    client.ask("POST", INFER, "{}")
    grown = {name: round(value - before[name], 6) for name, value in counted().items()}
    names = {"requests": 2, "failures": 1, "images": 3, "runs": 1}
    assert {name: grown[f'glit_{name}_total{{model="pets"}}'] for name in names} == names
    assert grown['glit_request_seconds_bucket{model="pets",le="+Inf"}'] == 2
    assert grown['glit_request_seconds_count{model="pets"}'] == 2


# ---- what it refuses ----

BAD_TENSORS = {
    "no input 'pixels'": {"name": "pixels"},
    "is of type UINT8, got 'FP32'": {"datatype": "FP32"},
    "are 3600 values, got 10800": {"shape": [1, 30, 40, 3]},
    "no negative sides": {"shape": [-3, 30, 40, 3]},
    "more than 2,147,483,648 values": {"shape": [0, 9 * 10**18, 3, 3], "data": []},
    "the shape is of more than 2,147,483,648": {"shape": [0, 2**31, 2**31, 2**31], "data": []},
    "shape is of more than 2,147,483,648": {"shape": [10**4000, 10**4000, 40, 3]},
    "is of more than 2,147,483,648 values": {"shape": [-(10**4000), 30, 40, 3]},
    "0 bytes follow the JSON, announced are 1000": {"data": None, "parameters": {"binary_data_size": 10**4000}},
    "inputs.0.shape.0: Input should be a valid integer": {"shape": ["3", 30, 40, 3]},
    "inputs.0.shape: List should have at most 8 items": {"shape": [1] * 9},
    "values go from 0 to 255": {"data": [256] * 10800},
    "must be integers": {"data": [0.5] * 10800},
    "in lists of equal lengths": {"data": [[1], [1, 2]]},
    "either 'data' or the parameter": {"data": None},
    "0 bytes follow the JSON, announced are 9": {"data": None, "parameters": {"binary_data_size": 9}},
    "takes uint8 [B, h, w, 3], got uint8 [10800]": {"shape": [10800]},
    "got uint8 [0, 30, 40, 3]|from 1 to 16 images a request, got 0": {"shape": [0, 30, 40, 3], "data": []},
    "from 1 to 16 images a request, got 20": {"shape": [20, 2, 2, 3], "data": [1] * 240},
    "one side is at most 20 times the other": {"shape": [1, 1, 21, 3], "data": [1] * 63},
    "shared memory is not supported": {"parameters": {"shared_memory_region": "a"}},
}


@pytest.mark.parametrize("message", BAD_TENSORS)
def test_a_wrong_tensor_is_named_in_a_line(client: Client, message: str) -> None:
    status, _, answer = client.ask("POST", INFER, json.dumps({"inputs": [tensor(**BAD_TENSORS[message])]}))
    assert status == 400
    assert any(part in answer["error"] for part in message.split("|")), answer
    assert "\n" not in answer["error"]


@pytest.mark.parametrize(
    ("path", "body", "headers", "status", "message"),
    [
        (INFER, b"{", {}, 400, "the request: Invalid JSON"),
        (INFER, b"[" * 50_000, {}, 400, "Invalid JSON"),
        (INFER, b"\xff\xfe", {}, 400, "Invalid JSON"),
        (INFER, b"{}", {}, 400, "inputs: Field required"),
        (INFER, b'{"inputs": [], "id": "a"}', {}, 400, "at least 1 item"),
        (INFER, b"{}", {"Inference-Header-Content-Length": "3"}, 400, "up to the body's 2, got '3'"),
        (INFER, b"{}", {"Inference-Header-Content-Length": "-1"}, 400, "must be a number of bytes"),
        (INFER, b"{}", {"Content-Encoding": "gzip"}, 415, "compressed bodies are not supported"),
        ("/v2/models/pets/versions/2/infer", b"{}", {}, 404, "pets has no version '2', only 1"),
        ("/v2/models/a%0Ab/infer", b"{}", {}, 404, "there is no model 'a\\nb'"),
        ("/nowhere", b"{}", {}, 404, "Not Found"),
        ("/v2", b"{}", {}, 405, "Method Not Allowed"),
        ("/classify", b"no image", {}, 400, "the image: not an image of a known format"),
        ("/classify", png()[:60], {}, 400, "the image: cannot be read"),
        ("/classify", png((210, 10)), {}, 400, "one side is at most 20 times the other"),
        ("/classify?top_k=x", png(), {}, 400, "top_k: Input should be a valid integer"),
        ("/classify?top_k=1&top_k=", png(), {}, 400, "top_k: Input should be a valid integer"),
        ("/classify?model=cats", png(), {}, 404, "there is no model 'cats'"),
        ("/classify", b"--x--", {"Content-Type": "multipart/form-data; boundary=x"}, 400, "the form has no file"),
        ("/classify", b"--x--", {"Content-Type": "multipart/form-data"}, 400, "the form has no file"),
    ],
)
def test_a_wrong_request_is_refused_in_a_line(
    client: Client, path: str, body: bytes, headers: dict[str, str], status: int, message: str
) -> None:
    found, _, answer = client.ask("POST", path, body, headers)
    assert (found, message in answer["error"], "\n" in answer["error"]) == (status, True, False), answer


def test_a_wrong_output_is_refused(client: Client) -> None:
    for output, message in (
        ({"name": "x"}, "no output 'x'"),
        ({"name": "logits", "parameters": {"classification": "3"}}, "must be a number of classes"),
    ):
        body = json.dumps({"inputs": [tensor()], "outputs": [output]})
        status, _, answer = client.ask("POST", INFER, body)
        assert (status, message in answer["error"]) == (400, True)


def test_a_body_that_is_too_large_is_refused_announced_or_not(client: Client) -> None:
    large = b"x" * 150_000
    for body in (large, iter([large[:75_000], large[75_000:]])):  # an iterator is sent in chunks
        status, _, answer = client.ask("POST", "/classify", body)
        assert (status, answer["error"]) == (413, "the body has more than 100,000 bytes")
    with socket.create_connection(("127.0.0.1", client.port), timeout=10) as waiting:
        waiting.sendall(b"POST /classify HTTP/1.1\r\nHost: a\r\nContent-Length: 999999\r\nExpect: 100-continue\r\n\r\n")
        assert waiting.recv(100).startswith(b"HTTP/1.1 413")


def test_too_many_requests_and_slow_answers_are_refused(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with served(file, timeout=0.3) as client:
        batcher = client.models["pets"].batcher
        release = threading.Event()
        monkeypatch.setattr(batcher, "_run", lambda images: release.wait(10) and np.zeros((len(images), 5), np.float32))
        try:
            status, _, answer = client.ask("POST", "/classify", png())
            assert (status, answer["error"]) == (504, "no answer within 0.3 s")
            with monkeypatch.context() as patch:
                patch.setattr(batcher, "_waiting", queue.Queue(1))
                batcher._waiting.put(None)
                status, _, answer = client.ask("POST", "/classify", png())
                assert (status, "more requests than it can answer" in answer["error"]) == (503, True)
            status, _, answer = 0, None, None
            with socket.create_connection(("127.0.0.1", client.port), timeout=10) as slow:
                slow.sendall(b"POST /classify HTTP/1.1\r\nHost: a\r\nContent-Length: 99\r\n\r\n")
                assert slow.recv(100).startswith(b"HTTP/1.1 504")
        finally:
            release.set()
        assert client.ask("POST", "/classify", png())[0] == 200


def test_a_thousand_broken_connections_stop_nothing(client: Client) -> None:
    whole = b"POST /classify HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % len(png()) + png()
    parts = (b"", b"\x00\x01\x02\r\n\r\n", whole[:30], whole[:-20], b"GET /v2 HTTP/1.1\r\n\r\n", whole)
    for number in range(1000):
        with socket.create_connection(("127.0.0.1", client.port), timeout=10) as broken:
            broken.sendall(parts[number % (len(parts) - (number > 60))])
            if number % 2:  # a reset instead of an end
                broken.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    assert client.ask("POST", "/classify", png())[0] == 200


# ---- batches ----


def test_requests_that_arrive_together_share_a_run(client: Client, file: Path, classifier: OnnxClassifier) -> None:
    with served(file, max_delay=0.3, max_batch=8) as client, ThreadPoolExecutor(8) as pool:
        bodies = [
            json.dumps({"inputs": [tensor(shape=[1, 30, 40, 3], data=np.roll(IMAGES[0], k).ravel().tolist())]})
            for k in range(8)
        ]
        answers = list(pool.map(lambda body: client.ask("POST", INFER, body)[2], bodies))
        assert client.models["pets"].batcher.runs < 8
    expected = classifier.logits(np.stack([np.roll(IMAGES[0], k) for k in range(8)]))
    np.testing.assert_allclose([answer["outputs"][0]["data"] for answer in answers], expected, atol=1e-5)


def test_batches_hold_to_their_size_and_images_of_one_shape_share_a_run() -> None:
    sizes: list[tuple[int, ...]] = []
    started, go = threading.Event(), threading.Event()

    def run(images: np.ndarray) -> np.ndarray:
        started.set()
        go.wait(10)
        sizes.append(images.shape)
        if images.shape[1] == 3:
            raise ValueError("three")
        return images[:, :1] * 2.0

    batcher = Batcher(run, max_batch=4, max_delay=0.05, max_waiting=9)
    first = batcher.submit(np.full((4, 2), 9))
    started.wait(10)
    futures = [batcher.submit(np.full((count, side), count)) for count, side in ((2, 2), (1, 5), (2, 2), (1, 3))]
    batcher.submit(np.zeros((1, 2))).cancel()
    for _ in range(4):
        batcher.submit(np.zeros((4, 1)))
    with pytest.raises(queue.Full):
        batcher.submit(np.zeros((4, 1)))
    go.set()
    batcher.close()  # what waits is answered
    assert first.result().tolist() == [[18]] * 4
    assert [future.result().tolist() for future in futures[:3]] == [[[4], [4]], [[2]], [[4], [4]]]
    with pytest.raises(ValueError, match="three"):
        futures[3].result()
    assert sizes == [(4, 2), (2, 2), (1, 5), (2, 2), (1, 3), *[(4, 1)] * 4]


# ---- what is served, and the command ----


def test_of_a_repository_the_latest_versions_are_served_and_nothing_unverified(file: Path, tmp_path: Path) -> None:
    for place in ("cats/1", "cats/10", "cats/9", "dogs/1", "dogs.unverified/1", "dogs/old"):
        (tmp_path / place).mkdir(parents=True)
        shutil.copy(file, tmp_path / place / "model.onnx")
    with open_models(str(tmp_path), providers=["cpu"], threads=1) as models:
        assert {name: model.version for name, model in models.items()} == {"cats": "10", "dogs": "1"}
    with pytest.raises(ExportError, match="name is for a single model"), open_models(str(tmp_path), name="a"):
        pass


def test_a_weight_folder_is_exported_with_its_preprocessing_and_must_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    artifact, asked = exported(preprocess=True), []

    def export(what: str, path: Path, **options: Any) -> Any:
        asked.append((what, options))
        path.write_bytes(artifact.path.read_bytes())
        return replace(artifact, path=path)

    monkeypatch.setattr("glit_models.export.served.export_onnx", export)
    with open_models("runs/pets/model", providers=["cpu"], threads=1) as models:
        assert list(models) == ["pets"]
        assert models["pets"].labels == CLASSES
    assert asked == [("runs/pets/model", {"preprocess": True})]
    artifact = replace(artifact, agreement=None)
    with pytest.raises(ExportError, match="is not what PyTorch computes"), open_models("runs/pets/model"):
        pass


def test_a_file_without_preprocessing_takes_prepared_images_and_classifies_files(file: Path) -> None:
    with served(exported().path) as client:
        about = client.ask("GET", "/v2/models/pets")[2]
        assert about["inputs"] == [{"name": "images", "datatype": "FP32", "shape": [-1, 3, 32, 32]}]
        assert client.ask("POST", "/classify", png())[0] == 200
        for value, status in ((0.5, 200), (1e300, 400)):
            one = tensor(shape=[1, 3, 32, 32], datatype="FP32", data=[value] * 3072)
            assert client.ask("POST", INFER, json.dumps({"inputs": [one]}))[0] == status


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def test_sigterm_ends_it_after_what_is_under_way(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    port = free_port()
    client, found = Client(port, None, ServerOptions()), []

    def ask_and_stop() -> None:
        for _ in range(200):
            try:
                assert client.ask("GET", "/v2/health/ready")[0] == 200
                break
            except OSError:
                time.sleep(0.05)
        asking = threading.Thread(target=lambda: found.append(client.ask("POST", "/classify", png())[0]))
        asking.start()
        time.sleep(0.2)  # it waits for others to join it
        os.kill(os.getpid(), signal.SIGTERM)
        asking.join(10)

    thread = threading.Thread(target=ask_and_stop)
    thread.start()
    arguments = ["--port", str(port), "--max-delay-ms", "600", "--provider", "cpu", "--threads", "1"]
    assert main(["serve", str(file), *arguments]) == 128 + signal.SIGTERM
    thread.join(10)
    assert found == [200]
    assert f"serving on http://127.0.0.1:{port}; Ctrl-C ends it" in capsys.readouterr().err


def test_answers_are_not_held_back_by_nagles_algorithm() -> None:
    with _bound("127.0.0.1", 0) as listener:
        assert listener.proto == socket.IPPROTO_TCP  # by which asyncio knows to turn it off


def test_what_cannot_be_served_is_one_line(
    file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        cases = (
            ([str(file), "--port", port], f"cannot listen on 127.0.0.1:{port}: Address already in use; --port N"),
            ([str(file), "--host", "no such host"], "cannot listen on 'no such host'"),
            ([str(file), "--port", "70000"], "--port must be from 0 to 65535, got 70000"),
            ([str(file), "--max-batch", "0"], "--max-batch must be from 1 to 1024, got 0"),
            ([str(file), "--max-delay-ms", "nan"], "--max-delay-ms must be from 0 to 10000, got nan"),
            ([str(file), "--max-body", "much"], "--max-body must be a size such as 20MB, got 'much'"),
            ([str(file), "--port", "0", "--name", "a/b"], "'a/b' is not a name for a model"),
            ([str(file), "--port", "0", "--threads", "0"], "--threads must be at least 1, got 0"),
            (["gone.onnx", "--port", "0"], "gone.onnx: no such file"),
            (["nothing.here", "--port", "0"], "nothing.here"),
        )  # fmt: skip
        for arguments, message in cases:
            assert main(["serve", *arguments]) == 2
            (line,) = capsys.readouterr().err.splitlines()
            assert message in line
    monkeypatch.setitem(sys.modules, "fastapi", None)
    assert main(["serve", str(file)]) == 2
    assert '[serve]"' in capsys.readouterr().err
