"""Requests and responses of the Open Inference Protocol (KServe v2), with its extensions for binary data and classes.

Parses the body of a request into an array, and writes logits into the body of a response.
https://github.com/kserve/open-inference-protocol
https://github.com/triton-inference-server/server/tree/main/docs/protocol
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import BaseModel, Field, StrictInt, StrictStr, ValidationError

from glit_models.errors import DataError

from .metadata import OUTPUT

__all__ = ["DATATYPES", "HEADER_LENGTH", "Answer", "InferRequest", "answer", "parse"]

HEADER_LENGTH = "inference-header-content-length"
_MOST_VALUES = 2**31  # of a tensor; a body is at most as large
DATATYPES = {np.dtype(np.uint8): "UINT8", np.dtype(np.float32): "FP32", np.dtype(np.float16): "FP16"}


class Tensor(BaseModel):
    """An input: its values are in `data`, or follow the JSON."""

    name: StrictStr
    shape: list[StrictInt] = Field(max_length=8)
    datatype: StrictStr
    parameters: dict[str, Any] = {}
    data: list[Any] | None = None


class Requested(BaseModel):
    """A requested output."""

    name: StrictStr
    parameters: dict[str, Any] = {}


class InferRequest(BaseModel):
    """The JSON of a request."""

    id: StrictStr = ""
    parameters: dict[str, Any] = {}
    inputs: list[Tensor] = Field(min_length=1, max_length=1)
    outputs: list[Requested] = Field(default=[], max_length=1)


@dataclass(frozen=True)
class Answer:
    """A body, and the length of its JSON if binary data follows it."""

    body: bytes
    header_length: int | None


# ---- requests ----


def parse(body: bytes, header_length: str | None, name: str, dtype: np.dtype) -> tuple[InferRequest, np.ndarray]:
    """Read a request.

    Args:
        body: JSON, optionally followed by binary data.
        header_length: the length of the JSON, from the HTTP header; None if nothing follows.
        name, dtype: of the only input.

    Raises:
        DataError: in one line, if it violates the protocol or has another name or type.
    """
    length = _header_length(header_length, len(body))
    try:
        request = InferRequest.model_validate_json(body[:length])
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(map(str, first["loc"])) or "the request"
        raise DataError(f"{where}: {first['msg']}") from None
    (tensor,) = request.inputs
    if tensor.name != name:
        raise DataError(f"there is no input {tensor.name[:100]!r}; the input is {name!r}")
    if tensor.datatype != DATATYPES[dtype]:
        raise DataError(f"input {name!r} is of type {DATATYPES[dtype]}, got {tensor.datatype[:100]!r}")
    for output in request.outputs:
        _check_output(output)
    return request, _array(tensor, body[length:], dtype)


def _header_length(text: str | None, num_bytes: int) -> int:
    if text is None:
        return num_bytes
    if not (text.isascii() and text.isdecimal() and len(text) < 20 and int(text) <= num_bytes):
        raise DataError(
            f"Inference-Header-Content-Length must be a number of bytes up to the body's {num_bytes}, got {text[:40]!r}"
        )
    return int(text)


def _check_output(output: Requested) -> None:
    if output.name != OUTPUT:
        raise DataError(f"there is no output {output.name[:100]!r}; the output is {OUTPUT!r}")
    if "shared_memory_region" in output.parameters:
        raise DataError("shared memory is not supported")
    count = output.parameters.get("classification", 0)
    if type(count) is not int or count < 0:
        raise DataError("the parameter 'classification' must be a number of classes")


def _array(tensor: Tensor, rest: bytes, dtype: np.dtype) -> np.ndarray:
    """The values of an input. `rest` is the data after the JSON."""
    if "shared_memory_region" in tensor.parameters:
        raise DataError("shared memory is not supported")
    # An empty tensor can have huge sides, which numpy cannot hold.
    if math.prod(max(abs(side), 1) for side in tensor.shape) > _MOST_VALUES:
        raise DataError(f"input {tensor.name!r}: the shape is of more than {_MOST_VALUES:,} values")
    if any(side < 0 for side in tensor.shape):
        raise DataError(f"input {tensor.name!r}: a shape has no negative sides, got {tensor.shape}")
    size = math.prod(tensor.shape)
    num_bytes = tensor.parameters.get("binary_data_size")
    if (num_bytes is None) == (tensor.data is None):
        raise DataError(f"input {tensor.name!r} must have either 'data' or the parameter 'binary_data_size'")
    if len(rest) != (num_bytes or 0):
        raise DataError(f"input {tensor.name!r}: {len(rest)} bytes follow the JSON, announced are {num_bytes or 0}")
    if tensor.data is None:
        if len(rest) != size * dtype.itemsize:
            raise DataError(f"input {tensor.name!r}: {tensor.shape} are {size * dtype.itemsize} bytes, got {len(rest)}")
        values = np.frombuffer(rest, dtype.newbyteorder("<")).astype(dtype, copy=False)
    else:
        values = _from_json(tensor, dtype)
        if values.size != size:
            raise DataError(f"input {tensor.name!r}: {tensor.shape} are {size} values, got {values.size}")
    if dtype.kind == "f" and not np.isfinite(values).all():
        raise DataError(f"input {tensor.name!r} has values that are not finite")
    return values.reshape(tensor.shape)


def _from_json(tensor: Tensor, dtype: np.dtype) -> np.ndarray:
    """Convert a nested or flat list of numbers to an array."""
    try:
        given = np.asarray(tensor.data)
    except ValueError:  # ragged lists
        given = np.asarray(None)
    if given.size == 0:
        return np.empty(0, dtype)
    if given.dtype.kind not in ("iu" if dtype.kind == "u" else "iuf"):
        kind = "integers" if dtype.kind == "u" else "numbers"
        raise DataError(f"input {tensor.name!r}: 'data' must be {kind}, in lists of equal lengths")
    if dtype.kind == "u" and (given.min() < 0 or given.max() > np.iinfo(dtype).max):
        raise DataError(f"input {tensor.name!r}: values go from 0 to {np.iinfo(dtype).max}")
    with np.errstate(over="ignore"):  # overflow gives infinity, which is rejected
        return given.astype(dtype)


# ---- responses ----


def answer(model: str, version: str, request: InferRequest, logits: np.ndarray, labels: Sequence[str]) -> Answer:
    """The body of the response to a request.

    Args:
        logits: [B, K]. labels: names of the K classes.
    """
    wanted = request.outputs[0].parameters if request.outputs else {}
    binary = wanted.get("binary_data", request.parameters.get("binary_data_output", False)) is True
    output: dict[str, Any] = {"name": OUTPUT, "datatype": "FP32", "shape": list(logits.shape)}
    data: list[Any]
    data, raw = _numbers(logits, binary)
    if count := wanted.get("classification", 0):
        lines = _classes(logits, min(count, logits.shape[1]), labels)
        output |= {"datatype": "BYTES", "shape": [len(lines), len(lines[0])]}
        data, raw = _texts([text for line in lines for text in line], binary)
    output |= {"parameters": {"binary_data_size": len(raw)}} if binary else {"data": data}
    about = {"model_name": model, "model_version": version, **({"id": request.id} if request.id else {})}
    header = json.dumps({**about, "outputs": [output]}, ensure_ascii=False).encode()
    return Answer(header + raw, len(header) if binary else None)


def _numbers(values: np.ndarray, binary: bool) -> tuple[list[float], bytes]:
    return ([], values.astype("<f4").tobytes()) if binary else (values.ravel().tolist(), b"")


def _texts(texts: list[str], binary: bool) -> tuple[list[str], bytes]:
    """Encode strings as the type BYTES: each is its length in four bytes, then its bytes."""
    if not binary:
        return texts, b""
    encoded = [text.encode() for text in texts]
    return [], b"".join(struct.pack("<I", len(text)) + text for text in encoded)


def _classes(logits: np.ndarray, count: int, labels: Sequence[str]) -> list[list[str]]:
    """For each image, `value:index:label` of the best classes, best first."""
    order = np.argsort(-logits, axis=1, kind="stable")[:, :count]
    return [
        [f"{row[index]:f}:{index}:{labels[index]}" for index in indices]
        for row, indices in zip(logits, order, strict=True)
    ]
