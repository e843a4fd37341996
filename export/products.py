"""Run only the matrix products of a model in ONNX Runtime, to show how far its graph is from this limit.

The products are the `Gemm` and `MatMul` nodes of the exported graph, and the convolutions over all channels, with their
weights and shapes. Everything else is left out, also what moves data between them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from glit_models.errors import ExportError

from . import graph
from .extras import require
from .onnx import OnnxOptions, build_graph
from .sessions import open_session
from .source import ModelSource

if TYPE_CHECKING:
    import onnx

__all__ = ["products_runner"]

_Shape = tuple[int, ...]


def products_runner(source: ModelSource, batch: int, threads: int | None = None) -> Callable[[], object]:
    """Prepare the matrix products of a model at one batch size, in float32 on the CPU.

    Args:
        source: the model. batch: batch size. threads: threads of a product; None leaves the choice to ONNX Runtime.

    Returns:
        A function that computes all of them once, from random numbers.

    Raises:
        ExportError: if the model cannot be exported or run.
    """
    onnx, runtime = require("onnx"), require("onnxruntime")
    whole = onnx.shape_inference.infer_shapes(build_graph(source, OnnxOptions(batch=batch), 20), data_prop=True)
    proto = _products(whole, onnx)
    session = open_session(graph.to_bytes(proto), ["cpu"], strict=True, threads=threads).session
    # Values of one shape share their memory, and no result is copied.
    generator = np.random.default_rng(0)
    shapes = {value.name: _shape(value) for value in [*proto.graph.input, *proto.graph.output]}
    memory = {
        shape: runtime.OrtValue.ortvalue_from_numpy(generator.normal(size=shape).astype(np.float32))
        for shape in {shapes[value.name] for value in proto.graph.input}
    }
    results = {
        shape: runtime.OrtValue.ortvalue_from_shape_and_type(shape, np.float32)
        for shape in {shapes[value.name] for value in proto.graph.output}
    }
    binding = session.io_binding()
    for value in proto.graph.input:
        binding.bind_ortvalue_input(value.name, memory[shapes[value.name]])
    for value in proto.graph.output:
        binding.bind_ortvalue_output(value.name, results[shapes[value.name]])
    return lambda: session.run_with_iobinding(binding)


def _products(whole: onnx.ModelProto, onnx: Any) -> onnx.ModelProto:
    """The graph of the products alone: their activations are its inputs, and their results its outputs."""
    constants = {tensor.name: tensor for tensor in whole.graph.initializer}
    values = {value.name: value for value in [*whole.graph.input, *whole.graph.value_info, *whole.graph.output]}
    nodes = [node for node in whole.graph.node if _is_product(node)]
    used = {name for node in nodes for name in node.input if name}
    made = {name for node in nodes for name in node.output}
    renamed = {name: f"{name}, given" for name in used & made}  # a product of a product takes random numbers, too
    inputs = []
    for name in sorted(used - constants.keys()):
        shape = _shape(values.get(name))
        inputs.append(onnx.helper.make_tensor_value_info(renamed.get(name, name), onnx.TensorProto.FLOAT, shape))
    for node in nodes:
        node.input[:] = [renamed.get(name, name) for name in node.input]
    outputs = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, _shape(values.get(name)))
        for name in sorted(made)
    ]
    weights = [constants[name] for name in sorted(used & constants.keys())]
    made_graph = onnx.helper.make_graph(nodes, "products", inputs, outputs, weights)
    return onnx.helper.make_model(made_graph, opset_imports=whole.opset_import, ir_version=whole.ir_version)


def _is_product(node: onnx.NodeProto) -> bool:
    groups = next((attribute.i for attribute in node.attribute if attribute.name == "group"), 1)
    return node.op_type in ("Gemm", "MatMul") or (node.op_type == "Conv" and groups == 1)


def _shape(value: onnx.ValueInfoProto | None) -> _Shape:
    shape = () if value is None else tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim)
    if not shape or not all(shape):
        raise ExportError("the shapes of its matrix products cannot be inferred")
    return shape
