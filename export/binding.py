"""Keep a session's input and output buffers on the GPU between batches, for a graph with fixed shapes.

`runtime.py` decides when to use it. Not thread-safe.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .extras import require
from .metadata import OUTPUT

__all__ = ["Binding"]


class Binding:
    """A session whose input and output are bound to device memory. Final.

    Args:
        session: a session of ONNX Runtime. input_shape, dtype, output_shape: of its only input and output.
        device: 'cuda', or 'cpu' without a GPU.
    """

    def __init__(
        self,
        session: Any,
        input_shape: tuple[int, ...],
        dtype: np.dtype,
        output_shape: tuple[int, ...],
        device: str = "cuda",
    ) -> None:
        runtime = require("onnxruntime")
        self.session = session
        output_type = {"tensor(float)": np.float32, "tensor(float16)": np.float16}[session.get_outputs()[0].type]
        self.input = runtime.OrtValue.ortvalue_from_shape_and_type(input_shape, dtype.type, device, 0)
        self.output = runtime.OrtValue.ortvalue_from_shape_and_type(output_shape, output_type, device, 0)
        self.binding = session.io_binding()
        self.binding.bind_ortvalue_input(session.get_inputs()[0].name, self.input)
        self.binding.bind_ortvalue_output(OUTPUT, self.output)

    def run(self, images: np.ndarray) -> np.ndarray:
        """Return the output for an input of the bound shape and type."""
        self.input.update_inplace(images)
        self.session.run_with_iobinding(self.binding)
        output: np.ndarray = self.output.numpy()
        return output
