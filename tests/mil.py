"""Compute what a Core ML package says, operator by operator in torch, because only macOS can run Core ML.

It covers the operators of our own models. It shows that the conversion is right, not that Core ML is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def run_package(path: Path, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The outputs of an `.mlpackage`, by name, in float32. Raises KeyError at an operator that is not in the table."""
    import coremltools
    from coremltools.converters.mil.frontend.milproto.load import load

    model = coremltools.models.MLModel(str(path), skip_model_load=True)
    specification = model.get_spec()
    program = load(specification, specification.specificationVersion, model.weights_dir)
    (function,) = program.functions.values()
    values: dict[str, Any] = {name: torch.from_numpy(array) for name, array in inputs.items()}
    for op in function.operations:
        given = {name: _values(value, values) for name, value in op.inputs.items() if value is not None}
        results = [op.outputs[0].val] if op.op_type == "const" else _OPERATORS[op.op_type](**given)
        for variable, result in zip(op.outputs, results if isinstance(results, list) else [results], strict=True):
            values[variable.name] = result
    return {variable.name: _tensor(values[variable.name]).numpy() for variable in function.outputs}


def _values(variable: Any, values: Mapping[str, Any]) -> Any:
    if isinstance(variable, list | tuple):
        return [values[part.name] for part in variable]
    return values[variable.name]


def _tensor(value: Any) -> Tensor:
    tensor = torch.as_tensor(value)
    return tensor.float() if tensor.is_floating_point() else tensor


def _conv(
    x: Tensor, weight: Any, strides: Any, pad_type: Any, pad: Any, dilations: Any, groups: Any, bias: Any
) -> Tensor:
    before, after = pad[::2].tolist(), pad[1::2].tolist()
    assert pad_type in ("custom", "valid")
    assert before == after
    padding = before if pad_type == "custom" else 0
    weight, bias = _tensor(weight), _tensor(bias)
    return F.conv2d(x, weight, bias, strides.tolist(), padding, dilations.tolist(), int(groups))


def _slice(x: Tensor, begin: Any, end: Any, stride: Any = 1, **masks: Any) -> Tensor:
    assert (np.asarray(stride) == 1).all()
    none = np.zeros(x.ndim, bool)
    squeezed, from_start, to_end = (masks.pop(f"{name}_mask", none) for name in ("squeeze", "begin", "end"))
    assert not masks
    index: list[Any] = []
    for axis in range(x.ndim):
        first = None if from_start[axis] else int(begin[axis])
        index.append(first if squeezed[axis] else slice(first, None if to_end[axis] else int(end[axis])))
    return x[tuple(index)]


def _matmul(x: Tensor, y: Tensor, transpose_x: Any = False, transpose_y: Any = False) -> Tensor:
    return (x.mT if transpose_x else x) @ (y.mT if transpose_y else y)


_OPERATORS: dict[str, Callable[..., Any]] = {
    "add": lambda x, y: _tensor(x) + _tensor(y),
    "cast": lambda x, dtype: _tensor(x),  # float16 and float32: all is computed in float32
    "concat": lambda values, axis, interleave: torch.cat([_tensor(value) for value in values], int(axis)),
    "conv": _conv,
    "expand_dims": lambda x, axes: x[(slice(None),) * int(axes[0]) + (None,)],
    "gelu": lambda x, mode: F.gelu(x, approximate="none" if mode == "EXACT" else "tanh"),
    "layer_norm": lambda x, axes, gamma, beta, epsilon: F.layer_norm(
        x, x.shape[-len(axes) :], _tensor(gamma), _tensor(beta), float(epsilon)
    ),
    "linear": lambda x, weight, bias: F.linear(x, _tensor(weight), _tensor(bias)),
    "matmul": _matmul,
    "mul": lambda x, y: _tensor(x) * _tensor(y),
    "reshape": lambda x, shape: x.reshape(shape.tolist()),
    "sigmoid": lambda x: x.sigmoid(),
    "silu": lambda x: F.silu(x),
    "slice_by_index": _slice,
    "softmax": lambda x, axis: x.softmax(int(axis)),
    "split": lambda x, split_sizes, axis: list(x.split(split_sizes.tolist(), int(axis))),
    "transpose": lambda x, perm: x.permute(perm.tolist()),
}
