"""Open ONNX Runtime sessions on the requested provider, or raise an error that names the actual one.

ONNX Runtime silently falls back to other providers, and finally to the CPU; here the provider of a session is always
known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ExportError, first_line
from .extras import require, runtime_build

__all__ = [
    "PROVIDERS",
    "Opened",
    "UnrunnableError",
    "available_providers",
    "chosen_providers",
    "open_session",
    "provider_name",
]

# From the fastest to the one that is always available.
PROVIDERS = ("TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider")
_SHORT = {"tensorrt": PROVIDERS[0], "trt": PROVIDERS[0], "cuda": PROVIDERS[1], "gpu": PROVIDERS[1], "cpu": PROVIDERS[2]}
_FATAL = 4  # hide ONNX Runtime's messages; our errors replace them


class UnrunnableError(ExportError):
    """A graph is not valid ONNX, or a provider of ONNX Runtime cannot run it."""


@dataclass(frozen=True)
class Opened:
    """A session, ONNX Runtime's name of the provider that runs its graph, and the build of ONNX Runtime."""

    session: Any
    provider: str
    build: str


def provider_name(text: str) -> str:
    """ONNX Runtime's name of a provider: 'cuda' is 'CUDAExecutionProvider'."""
    return _SHORT.get(text.lower(), text)


def available_providers() -> tuple[str, ...]:
    """The providers of this installation, fastest first. A provider can be built in and not work on this machine."""
    built_in = require("onnxruntime").get_available_providers()
    known = [name for name in PROVIDERS if name in built_in]
    return (*known, *(name for name in built_in if name not in PROVIDERS))


def open_session(
    model: Path | bytes,
    providers: Sequence[str] | None = None,
    *,
    strict: bool = False,
    threads: int | None = None,
    options: dict[str, dict[str, Any]] | None = None,
    where: str | None = None,
) -> Opened:
    """Open a model.

    Args:
        model: path of a file, or its content.
        providers: in order of preference, 'cuda' or 'CUDAExecutionProvider'; None tries TensorRT, CUDA, CPU.
        strict: accept only the first requested provider.
        threads: threads of one operator on the CPU; None leaves the choice to ONNX Runtime.
        options: options of providers, by provider name.
        where: name of the model in errors.

    Raises:
        ExportError: if the file is incomplete, the provider cannot run it, or with `strict` another one would run it.
    """
    runtime, build = require("onnxruntime"), runtime_build()
    where = where or (str(model) if isinstance(model, Path) else "the model")
    wanted = chosen_providers(providers)
    settings = runtime.SessionOptions()
    settings.log_severity_level = _FATAL
    if threads is not None:
        settings.intra_op_num_threads = settings.inter_op_num_threads = threads
    if wanted[0] != PROVIDERS[-1] and hasattr(runtime, "preload_dlls"):
        runtime.preload_dlls()  # CUDA's libraries from torch's wheel, if the system has none
    listed = [(name, (options or {}).get(name, {})) for name in wanted]
    content = model if isinstance(model, bytes) else str(model)
    try:
        session = runtime.InferenceSession(content, settings, providers=listed)
    except Exception as error:  # its exceptions have no other common base class
        raise _complaint(where, wanted[0], build, error) from None
    got = session.get_providers()[0]
    if strict and got != wanted[0]:
        raise ExportError(f"{where}: {wanted[0]} cannot be used here, only {got}; name no provider to take that")
    return Opened(session, got, build)


def chosen_providers(providers: Sequence[str] | None) -> list[str]:
    """The providers that `open_session` tries, in this order. Raises ExportError if one is not built in."""
    available = available_providers()
    if providers is None:
        return [name for name in PROVIDERS if name in available]
    names = [provider_name(text) for text in providers]
    for text, name in zip(providers, names, strict=True):
        if name not in available:
            gpu = "; for a GPU uninstall onnxruntime and install onnxruntime-gpu" if name in PROVIDERS[:2] else ""
            raise ExportError(f"{runtime_build()} has no provider {text!r}, only {', '.join(available)}{gpu}")
    if not names:
        raise ExportError(f"no provider given; {runtime_build()} has {', '.join(available)}")
    return names if PROVIDERS[-1] in names else [*names, PROVIDERS[-1]]


def _complaint(where: str, provider: str, build: str, error: Exception) -> ExportError:
    text, kind = first_line(error), type(error).__name__
    if kind == "InvalidProtobuf" or any(words in text for words in ("No graph was found", "does not have a graph")):
        return ExportError(f"{where}: not a whole ONNX file, probably cut short; export it again")
    return UnrunnableError(f"{where}: {provider} of {build} cannot run it: {text}")
