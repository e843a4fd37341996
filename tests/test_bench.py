"""Tests of `glit bench`: its rows, output and figure, and errors on bad input. No assertions on speed."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import onnx
import pytest
from exported import exported, small_glit
from glit_models.export import products
from glit_models.export.bench import PRODUCTS
from glit_models.export.sessions import open_session
from glit_models.export.source import open_source
from PIL import Image

from glit_models.cli import main
from glit_models.weights.folder import save_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("bench") / "small"
    save_folder(small_glit(), path)
    return str(path)


def test_every_way_is_measured_at_every_batch_beside_the_baseline(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [str(exported().path), str(exported(preprocess=True).path), str(exported(batch=4).path)]
    arguments = [word for file in files for word in ("--onnx", file)]
    arguments += ["--batch", "1,4", "--rounds", "2", "--no-compile", "--device", "cpu", "--providers", "cpu"]
    plot = tmp_path / "deeper" / "bench.png"
    assert main(["bench", folder, *arguments, "--json", "--plot", str(plot)]) == 0
    result = json.loads(capsys.readouterr().out)
    measured = {(row["what"], row["batch"]) for row in result["rows"]}
    any_batch = [f"{files[0]}, fp32, opset 20", f"{files[1]}, fp32, opset 20, preprocessing"]
    baseline = ("deit_tiny_patch16_224, eager, 32 x 32", "deit_tiny_patch16_224.onnx, fp32, opset 20")
    for what in ("eager", PRODUCTS, *baseline, *any_batch):
        assert {(what, 1), (what, 4)} <= measured
    assert (f"{files[2]}, fp32, opset 20", 4) in measured
    assert len(measured) == 13
    for row in result["rows"]:
        assert row["p95_ms"] >= row["median_ms"] > 0
        assert row["images_per_second"] == pytest.approx(1e3 * row["batch"] / row["median_ms"])
    assert {"machine", "threads", "torch", "runtime", "rounds"} <= set(result)
    with Image.open(plot) as image:
        assert image.size[0] > 500

    assert (
        main(["bench", folder, *arguments[:2], "--batch", "1", "--rounds", "1", "--no-compile", "--no-baseline"]) == 0
    )
    out = capsys.readouterr().out
    assert "CPUExecutionProvider" in out
    assert "deit" not in out


def test_the_products_are_those_of_the_exported_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []

    def open_recorded(content: bytes, *args: Any, **kwargs: Any) -> Any:
        opened.append(onnx.load_from_string(content))
        return open_session(content, *args, **kwargs)

    monkeypatch.setattr(products, "open_session", open_recorded)
    products.products_runner(open_source(small_glit()), batch=2, threads=1)()
    whole = onnx.load(exported(batch=2).path)

    def found(graph: Any) -> Counter[str]:
        return Counter(
            node.op_type
            for node in graph.node
            if node.op_type in ("Gemm", "MatMul") or (node.op_type == "Conv" and "patch_embed" in node.name)
        )

    (alone,) = opened
    assert Counter(node.op_type for node in alone.graph.node) == found(whole.graph)
    weights = {tensor.name: list(tensor.dims) for tensor in whole.graph.initializer}
    assert all(weights[tensor.name] == list(tensor.dims) for tensor in alone.graph.initializer)
    # Each product has its own result of the model's shape.
    logits = next(value for value in alone.graph.output if value.name == "logits")
    assert [dim.dim_value for dim in logits.type.tensor_type.shape.dim] == [2, 5]
    assert len(alone.graph.output) == len(alone.graph.node)


def test_bad_input_is_one_line(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["nowhere"], "nowhere: no such folder"),
        ([folder, "--batch", "dynamic"], "--batch must be numbers"),
        ([folder, "--batch", "1,0"], "--batch must be 'dynamic' or a number of images from 1"),
        ([folder, "--rounds", "0"], "rounds and batches must be at least 1"),
        ([folder, "--threads", "0"], "--threads must be at least 1, got 0"),
        ([folder, "--rounds", "9" * 30], "--rounds must be at most 100000, got 999"),
        ([folder, "--onnx", "nowhere.onnx"], "nowhere.onnx: no such file"),
        ([folder, "--onnx", str(exported().path), "--providers", "abacus"], "no provider 'abacus'"),
        ([folder, "--onnx", str(exported(image_size=(48, 32)).path)], "is of 48 x 32 pixels and the model of 32 x 32"),
    ):
        assert main(["bench", *arguments]) == 2
        err = capsys.readouterr().err
        assert message in err
        assert err.count("\n") == 1
