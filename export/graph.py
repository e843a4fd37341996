"""ONNX graphs made fit to be given away: readable names, nothing of the machine that made them, checked.

Works on graphs alone, not on models.
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
_LIMIT = 2**31 - 1  # bytes that protobuf can hold in one message


def clean(model: onnx.ModelProto) -> onnx.ModelProto:
    """Name nodes and values after the modules they come from, and drop all notes that torch leaves. In place.

    The notes hold stack traces with paths of this machine.
    """
    graph = model.graph
    _rename(graph)
    for item in [model, graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer]:
        item.ClearField("metadata_props")
        item.ClearField("doc_string")
    graph.name = "glit"
    _drop_allowzero(graph)
    model.producer_name, model.producer_version = "", ""
    # The lowest version that has what is used here: a server of the opset's time reads no later one.
    model.ir_version = require("onnx").helper.find_min_ir_version_for(model.opset_import)
    return model


def _drop_allowzero(graph: onnx.GraphProto) -> None:
    """Drop `allowzero` of reshapes to shapes without a zero, which it does nothing for: some converters lack it."""
    to_array = require("onnx").numpy_helper.to_array
    constants = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Reshape" and (shape := constants.get(node.input[1])) and to_array(shape).all():
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
            else:  # folded by the exporter, such as a transposed weight, so that it has no name of the model's
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
    # torch's exporter calls a node of no module so.
    return "" if scope.startswith("_empty") else name_in_model(scope)


def join(first: onnx.GraphProto, model: onnx.ModelProto, link: tuple[str, str]) -> onnx.ModelProto:
    """A graph put in front of a model: its output `link[0]` becomes the model's input `link[1]`.

    The model's own input is called by another name in the result, which may be that of the first graph's.
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
    """Call the model's one input by another name. Raises ExportError if a value in the graph is called so."""
    (given,) = model.graph.input
    if given.name == name:
        return
    if any(name in (*node.input, *node.output) for node in model.graph.node):
        raise ExportError(Argument("input_name", name), ": another value of the graph is called so")
    for node in model.graph.node:
        node.input[:] = [name if value == given.name else value for value in node.input]
    given.name = name


def set_metadata(model: onnx.ModelProto, texts: Mapping[str, str]) -> None:
    """Replace the model's metadata, and say who made it."""
    require("onnx").helper.set_model_props(model, dict(texts))
    model.producer_name, model.producer_version = "glit-models", __version__


def check(model: onnx.ModelProto) -> None:
    """Run ONNX's checker with full shape inference.

    Raises:
        UnrunnableError: if it refuses. ExportError: if one file cannot hold the graph.
    """
    _check_size(model)
    onnx = require("onnx")
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, ValueError) as error:
        raise UnrunnableError(f"the exported graph does not pass ONNX's checker: {first_line(error)}") from None


def to_bytes(model: Any) -> bytes:
    """The file's content. Raises ExportError where one file cannot hold it."""
    _check_size(model)
    content: bytes = model.SerializeToString(deterministic=True)
    return content


def _check_size(model: Any) -> None:
    size = model.ByteSize()
    if size > _LIMIT:
        raise ExportError(
            f"the graph is {size / 2**30:.1f} GiB, and one ONNX file holds 2; use ", Argument("precision", "fp16")
        )
