"""The packages that exporting needs and the zoo does not: said clearly where one is missing."""

from __future__ import annotations

import importlib
from typing import Any

from glit_models.errors import ExportError, pip_install

__all__ = ["require"]

_HINTS = {
    "onnxruntime": "; with an NVIDIA GPU install onnxruntime-gpu in place of onnxruntime",
    "tritonclient": '; `pip install "tritonclient[http]"`',
}


def require(module: str) -> Any:
    """The module of that name. Raises ExportError, with the way to install it, where it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        hint = _HINTS.get(package, "")
        raise ExportError(f"{package} cannot be imported ({error}): {pip_install('export')}{hint}") from None
