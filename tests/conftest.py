"""Fixtures for all tests."""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator
from hashlib import sha256
from typing import Any

import pytest

_graphs: dict[str, bytes] = {}


def _content_key(*values: Any) -> str:
    """A hash of what modules and other objects consist of: classes, settings, and the numbers in tensors."""
    from torch import Tensor, nn

    # Hooks are numbered through the whole process; labels and preprocessing are no part of what a network computes.
    ignored = ("_hooks", "_with_kwargs", "pretrained_cfg", "default_cfg")

    class Pickler(pickle.Pickler):
        def reducer_override(self, value: Any) -> Any:
            if isinstance(value, Tensor):
                numbers = value.detach().float().contiguous().numpy().tobytes()
                return str, (f"{value.dtype} {tuple(value.shape)} {sha256(numbers).hexdigest()}",)
            if isinstance(value, nn.Module):
                return str, (
                    type(value).__qualname__,
                    {k: v for k, v in vars(value).items() if not k.endswith(ignored)},
                )
            return NotImplemented

    file = io.BytesIO()
    Pickler(file).dump(values)
    return sha256(file.getvalue()).hexdigest()


@pytest.fixture(scope="module")
def cached_graphs() -> Iterator[None]:
    """Trace each network once for all exports of it in this process: `pytest.mark.usefixtures("cached_graphs")`.

    torch's exporter takes 5 s a network, and a dozen tests look at the same few networks. The key of the cache holds
    all that tracing depends on, so that a hit is what tracing would give.
    """
    import glit_models.export.onnx as module
    import onnx

    trace = module.trace

    def cached(network: Any, images: Any, info: Any) -> onnx.ModelProto:
        shapes = (images, info.opset, info.batch, info.dynamic_size, info.patch_size)
        try:
            key = _content_key(network, *shapes)
        except (pickle.PicklingError, AttributeError, TypeError):  # a class within a function, for example
            return trace(network, images, info)
        if key not in _graphs:
            _graphs[key] = trace(network, images, info).SerializeToString()
        return onnx.load_from_string(_graphs[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "trace", cached)
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The path of a small weight folder, for modules that have no model of their own."""
    from weight_folders import small_folder

    folder = tmp_path_factory.mktemp("model") / "small"
    small_folder(folder)
    return str(folder)
