"""Import the optional packages that exporting needs, with a clear error if one is missing."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from ..errors import ExportError, pip_install

__all__ = ["require", "runtime_build"]

_BUILDS = ("onnxruntime-gpu", "onnxruntime")  # distributions of the same module
_HINTS = {
    "onnxruntime": "; with an NVIDIA GPU the extra export-gpu",
    "tritonclient": '; `pip install "tritonclient[http]"`',
}


def runtime_build() -> str:
    """The installed build of ONNX Runtime with its version: 'onnxruntime-gpu 1.28.0'.

    Raises:
        ExportError: if both are installed: they write the same files, and the later one hides the other.
    """
    module = require("onnxruntime")
    folder = Path(module.__file__).parents[1]
    found = [name for name in _BUILDS if _is_in(name, folder)]
    if len(found) > 1:
        raise ExportError(
            f"{' and '.join(found)} are both installed and overwrite each other: pip uninstall both, then install one"
        )
    return f"{found[0] if found else 'onnxruntime'} {module.__version__}"


def _is_in(distribution: str, folder: Path) -> bool:
    import importlib.metadata  # slow

    try:
        return Path(str(importlib.metadata.distribution(distribution).locate_file(""))) == folder
    except importlib.metadata.PackageNotFoundError:
        return False


def require(module: str, extra: str = "export") -> Any:
    """Import a module by name. Raises ExportError, with the extra that installs it, if it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        hint = _HINTS.get(package, "")
        raise ExportError(f"{package} cannot be imported ({error}): {pip_install(extra)}{hint}") from None
