"""Trace a torch network to a graph with `torch.onnx.export`, with named axes and without its messages.

This is the only module that calls torch's exporter.

Axes: B batch, C channels, H/W image height and width, K classes.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from glit_models.errors import first_line

from .metadata import INPUT, OUTPUT, ExportInfo
from .sessions import UnrunnableError

if TYPE_CHECKING:
    import onnx

__all__ = ["trace"]


def trace(network: nn.Module, images: Tensor, info: ExportInfo) -> onnx.ModelProto:
    """Export a network through `torch.onnx.export(dynamo=True)`.

    Args:
        network: maps one tensor to one tensor. images: example input of the right type and shape. info: opset, and the
            axes of variable length.

    Raises:
        UnrunnableError: if torch cannot export it in that opset.
    """
    dims: dict[int, Any] = {}
    if info.batch is None:
        dims[0] = torch.export.Dim("batch", min=1)
    if info.dynamic_size:
        dims |= {
            2: info.patch_size * torch.export.Dim("rows", min=1),
            3: info.patch_size * torch.export.Dim("columns", min=1),
        }
    with _quiet():
        try:
            program = torch.onnx.export(
                network,
                (images,),
                dynamo=True,
                opset_version=info.opset,
                dynamic_shapes=(dims,) if dims else None,
                input_names=[INPUT],
                output_names=[OUTPUT],
                verbose=False,
            )
        except torch.onnx.errors.OnnxExporterError as error:
            raise UnrunnableError(
                f"{info.source} cannot be exported to opset {info.opset}: {first_line(error)}"
            ) from None
    assert program is not None
    proto: onnx.ModelProto = program.model_proto
    return proto


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide the warnings of torch's exporter about its own deprecated calls."""
    names = ("torch.onnx", "onnxscript", "onnx_ir")
    levels = {name: logging.getLogger(name).level for name in names}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in names:
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)
