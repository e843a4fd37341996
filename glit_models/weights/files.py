"""Handle weight files: name, hash, read and write them, and locate the installed ones.

Works on tensors and names; only `check_fits` takes a model, to compare a state dict with it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from ..errors import WeightsError, WriteError, first_line
from ..runs.files import home, sha256_of, write_text

__all__ = [
    "CONFIG_FILE",
    "ENTRY_FILE",
    "GOLDEN_FILE",
    "MULTILABEL",
    "WEIGHTS_FILE",
    "check_fits",
    "home",
    "installed_folder",
    "read_state_dict",
    "sha256_checked_before",
    "sha256_of",
    "write_state_dict",
]

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
GOLDEN_FILE = "golden.safetensors"
ENTRY_FILE = "entry.json"
# The `problem_type` of a configuration, as in transformers, and of its model: several labels per image, or none.
MULTILABEL = "multi_label_classification"
# What DistributedDataParallel, AveragedModel and torch.compile put before the names of a model's tensors.
_WRAPPERS = re.compile(r"^((module|_orig_mod)\.)+")


# ---- installed weights ----


def installed_folder(name: str) -> Path:
    """The folder where the weights `model.tag` are installed."""
    return home() / "weights" / name


# ---- hashes ----


def sha256_checked_before(path: Path) -> str:
    """The sha256 of a file; the file is read only if its size or time changed since the last call.

    Results are cached in the store; if that is not writable, every call reads the file.
    """
    path = path.resolve()
    stat = path.stat()
    seen = _read_hashes()
    known = seen.get(str(path))
    if isinstance(known, list) and known[:2] == [stat.st_size, stat.st_mtime_ns] and isinstance(known[-1], str):
        return known[-1]
    digest = sha256_of(path)
    seen[str(path)] = [stat.st_size, stat.st_mtime_ns, digest]
    with contextlib.suppress(WriteError):  # only a cache: without it, the next call takes longer
        write_text(_hashes_file(), json.dumps(seen, indent=1), parents=True)
    return digest


def _hashes_file() -> Path:
    return home() / "hashes.json"


def _read_hashes() -> dict[str, object]:
    try:
        seen = json.loads(_hashes_file().read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return seen if isinstance(seen, dict) else {}


# ---- reading and writing ----


def read_state_dict(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file or a torch pickle (unwrapped from `model`, EMA weights preferred).

    Only tensors, plain values and the `argparse.Namespace` of training scripts are unpickled.

    Raises:
        WeightsError: if the file is missing or truncated, is not a checkpoint, or holds code; names the path.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"{path}: no such file")
    _refuse_web_page(path)
    try:
        if path.suffix == ".safetensors":
            return _finite(path, safetensors.torch.load_file(path))
        if not _is_pickled(path):
            raise WeightsError(f"{path}: neither a safetensors file nor a checkpoint of torch")
        _refuse_compressed(path)
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # on pickle protocols that torch may not support
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise WeightsError(f"{path}: not a whole safetensors file, probably cut short ({error})") from None
    except pickle.UnpicklingError:
        raise WeightsError(f"{path}: refused, this pickle holds more than tensors and could run code") from None
    except WeightsError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        raise WeightsError(f"{path}: not a readable checkpoint ({first_line(error)})") from None
    return _finite(path, _unwrap(path, checkpoint))


def _finite(path: Path, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    for key, value in state_dict.items():
        if value.is_floating_point() and not bool(value.to(torch.float32).isfinite().all()):
            raise WeightsError(f"{path}: {key!r} holds values that are not finite")
    return state_dict


def _refuse_web_page(path: Path) -> None:
    """Reject an HTML page, which browsers save instead of the file if a download page comes first."""
    try:
        with path.open("rb") as file:
            start = file.read(256).lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    except OSError:
        return  # the next reader reports it
    if start.startswith((b"<!doctype", b"<html", b"<head", b"<?xml")):
        raise WeightsError(f"{path}: a web page and no checkpoint; open the link and save the file behind it")


def _is_pickled(path: Path) -> bool:
    """Whether a file begins as torch's do: with a zip archive, or with a pickle of protocol 2 or later."""
    with path.open("rb") as file:
        return file.read(2).startswith((b"PK", b"\x80"))


def _refuse_compressed(path: Path) -> None:
    """Reject compressed archives: torch writes none, and one may be a thousand times as large in memory."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
                raise WeightsError(f"{path}: refused, this archive is compressed, which torch.save never does")


def _unwrap(path: Path, checkpoint: Any) -> dict[str, Tensor]:
    for key in ("state_dict_ema", "model_ema", "state_dict", "model"):
        if isinstance(checkpoint, dict) and isinstance(checkpoint.get(key), dict):
            checkpoint = checkpoint[key]
            break
    if not isinstance(checkpoint, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in checkpoint.items()
    ):
        raise WeightsError(f"{path}: no state dict found in this file")
    for key, value in checkpoint.items():
        if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized:
            raise WeightsError(f"{path}: {key!r} must be a dense tensor, got {value.layout} on {value.device}")
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise WeightsError(f"{path}: {key!r} has {value.numel():,} numbers, of which the file holds fewer")
    plain = {_WRAPPERS.sub("", key): value for key, value in checkpoint.items()}
    plain.pop("n_averaged", None)  # the counter of torch's AveragedModel
    return plain


def write_state_dict(state_dict: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write tensors as a safetensors file. Raises OSError, also if the disk is full."""
    contiguous = {key: tensor.contiguous() for key, tensor in state_dict.items()}
    try:
        safetensors.torch.save_file(contiguous, path, metadata)
    except SafetensorError as error:
        raise OSError(first_line(error)) from None
    with open(path, "r+b") as file:  # the library writes metadata in an order that changes from run to run
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header = {key: dict(sorted(value.items())) if key == "__metadata__" else value for key, value in header.items()}
        file.seek(8)
        file.write(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size))


def check_fits(
    state_dict: Mapping[str, Tensor],
    model: torch.nn.Module,
    ignore: Collection[str] = (),
    where: str = "weights",
    strict: bool = True,
) -> None:
    """Compare a state dict with what `model` expects, except for keys with a prefix in `ignore`.

    With `strict=False`, only the shapes of the keys that both have are compared.

    Raises:
        WeightsError: names the first missing key, unknown key, or key whose shape differs, with both shapes.
    """
    prefixes = tuple(ignore)
    expected = {key: value for key, value in model.state_dict().items() if not key.startswith(prefixes)}
    given = {key: value for key, value in state_dict.items() if not key.startswith(prefixes)}
    for key, value in expected.items():
        if key not in given and not strict:
            continue
        if key not in given:
            raise WeightsError(f"{where} do not fit the model: {key!r} is missing")
        if given[key].shape != value.shape:
            raise WeightsError(
                f"{where} do not fit the model: {key!r} is {tuple(given[key].shape)}, "
                f"the model needs {tuple(value.shape)}"
            )
    for key in given:
        if key not in expected and strict:
            raise WeightsError(f"{where} do not fit the model: it has no {key!r}")
