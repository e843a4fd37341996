"""Clean ONNX graphs for publication: readable names, no traces of the machine that made them, and a final check.

Works on graphs only, not on models.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from glit_models import __version__
from glit_models.errors import Argument, ExportError, first_line

from .extras import require
from .form import name_in_model
from .sessions import UnrunnableError

if TYPE_CHECKING:
    import onnx

__all__ = ["check", "clean", "join", "rename_input", "set_metadata", "to_bytes"]

_SCOPES = "pkg.torch.onnx.name_scopes"
_LIMIT = 2**31 - 1  # maximum bytes of a protobuf message


def clean(model: onnx.ModelProto) -> onnx.ModelProto:
    """Name nodes and values after the modules they come from, and drop the notes that torch adds. In place.

    The notes contain stack traces with paths of this machine.
    """
    graph = model.graph
    _rename(graph)
    for item in [model, graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer]:
        item.ClearField("metadata_props")
        item.ClearField("doc_string")
    graph.name = "glit"
    _drop_allowzero(graph)
    model.producer_name, model.producer_version = "", ""
    # The lowest version that has all features used here: servers of the opset's time read no later one.
    model.ir_version = require("onnx").helper.find_min_ir_version_for(model.opset_import)
    return model


def _drop_allowzero(graph: onnx.GraphProto) -> None:
    """Drop `allowzero` of reshapes to shapes without a zero: it has no effect there, and some converters lack it.

    In a shape that is computed only the batch may be zero. It comes first there and in the input, so it is copied.
    """
    to_array = require("onnx").numpy_helper.to_array
    constants = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Reshape":
            shape = constants.get(node.input[1])
            if shape is None or to_array(shape).all():
                node.ClearField("attribute")


def _rename(graph: onnx.GraphProto) -> None:
    kept = {value.name for value in [*graph.input, *graph.output]}
    names: dict[str, str] = {}
    seen: Counter[str] = Counter()
    initializers = {tensor.name for tensor in graph.initializer}
    for node in graph.node:
        scope = _scope(node)
        stem = f"{scope}/{node.op_type}" if scope else node.op_type
        seen[stem] += 1
        node.name = stem if seen[stem] == 1 else f"{stem}_{seen[stem] - 1}"
        for index, output in enumerate(node.output):
            if output and output not in kept:
                names[output] = f"{node.name}:{index}"
        for index, value in enumerate(node.input):
            if value not in initializers or value in names:
                continue
            if value.startswith("form."):
                names[value] = name_in_model(value)
            else:  # folded by the exporter, such as a transposed weight, so it has no name in the model
                names[value] = f"{node.name}.{index}"
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
    for item in [*graph.initializer, *graph.value_info]:
        item.name = names.get(item.name, item.name)


def _scope(node: onnx.NodeProto) -> str:
    """The dotted name of the module that a node comes from."""
    notes = {note.key: note.value for note in node.metadata_props}
    try:
        scopes = ast.literal_eval(notes.get(_SCOPES, "[]"))
    except (SyntaxError, ValueError):
        return ""
    scope = str(scopes[-2]) if len(scopes) > 1 else ""
    # torch's exporter uses this name for nodes without a module.
    return "" if scope.startswith("_empty") else name_in_model(scope)


def join(first: onnx.GraphProto, model: onnx.ModelProto, link: tuple[str, str]) -> onnx.ModelProto:
    """Put a graph in front of a model: its output `link[0]` becomes the model's input `link[1]`.

    The model's input is renamed in the result, because it may have the same name as the first graph's.
    """
    onnx = require("onnx")
    output, given = link
    for node in model.graph.node:
        node.input[:] = [output if name == given else name for name in node.input]
    nodes = [*first.node, *model.graph.node]
    constants = [*first.initializer, *model.graph.initializer]
    known = [*first.output, *model.graph.value_info]
    graph = onnx.helper.make_graph(
        nodes, model.graph.name, first.input, model.graph.output, constants, value_info=known
    )
    model.graph.CopyFrom(graph)
    return model


def rename_input(model: onnx.ModelProto, name: str) -> None:
    """Rename the model's only input. Raises ExportError if the graph already has a value of this name."""
    (given,) = model.graph.input
    if given.name == name:
        return
    if any(name in (*node.input, *node.output) for node in model.graph.node):
        raise ExportError(Argument("input_name", name), ": another value of the graph is called so")
    for node in model.graph.node:
        node.input[:] = [name if value == given.name else value for value in node.input]
    given.name = name


def set_metadata(model: onnx.ModelProto, texts: Mapping[str, str]) -> None:
    """Replace the model's metadata, and set its producer."""
    require("onnx").helper.set_model_props(model, dict(texts))
    model.producer_name, model.producer_version = "glit-models", __version__


def check(model: onnx.ModelProto) -> None:
    """Run ONNX's checker with full shape inference.

    Raises:
        UnrunnableError: if the check fails. ExportError: if the graph is too large for one file.
    """
    _check_size(model)
    onnx = require("onnx")
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, ValueError) as error:
        raise UnrunnableError(f"the exported graph does not pass ONNX's checker: {first_line(error)}") from None


def to_bytes(model: Any) -> bytes:
    """Serialise the model. Raises ExportError if it is too large for one file."""
    _check_size(model)
    content: bytes = model.SerializeToString(deterministic=True)
    return content


def _check_size(model: Any) -> None:
    size = model.ByteSize()
    if size > _LIMIT:
        raise ExportError(
            f"the graph is {size / 2**30:.1f} GiB, and one ONNX file holds 2; use ", Argument("precision", "fp16")
        )
