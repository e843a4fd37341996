"""Stage full_search: run the search `fashion_mnist` at 224 pixels, over several calls.

Its result is the search's folder in parts that are small enough, without the checkpoints of trainings: an unfinished
training starts again, everything finished is kept.
"""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import torch
from glit_models.search import SearchRun, load_search_recipe
from safetensors.torch import load_file, save

from .context import Context, Result
from .files import MAX_BYTES

CUDA_ONLY = {"full_search": ("the real space, images and batch sizes",)}

_TEST_RECIPE = Path(__file__).resolve().parents[2] / "tests" / "fixtures" / "search.yaml"
_PART = MAX_BYTES - 1
_MAX_PARTS = 5
_RESERVE = 25.0  # seconds for packing the results


def run_full_search(context: Context) -> Result:
    """Search until the time is up, and pack the folder."""
    folder = context.work / "search"
    if not folder.is_dir():
        unpack(context.out, folder)
    recipe = load_search_recipe(
        str(_TEST_RECIPE) if context.rehearse else "fashion_mnist", [f"train.data.root={context.data}"]
    )
    minutes = max(context.seconds_left - _RESERVE, 1) / 60
    summary = SearchRun(recipe, folder, torch.device(context.device), minutes).run()
    parts = pack(folder, context.out)
    return {"finished": summary is not None, "parts": parts, "progress": _progress(folder), "summary": summary}


def _progress(folder: Path) -> dict[str, Any]:
    """The number of lines in each file of records, which grow with the search."""
    return {
        str(path.relative_to(folder)): len(path.read_text().splitlines()) for path in sorted(folder.rglob("*.jsonl"))
    }


def pack(folder: Path, out: Path) -> int:
    """Write the files of `folder` to `out/search.N`, weights in float16; returns the number of parts.

    Raises:
        ValueError: it takes more than 5 parts.
    """
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz", compresslevel=1) as archive:
        for path in sorted(folder.rglob("*")):
            if not path.is_file() or path.suffix in (".pt", ".tmp") or path.name == "lock":
                continue
            content = _halved(path) if path.suffix == ".safetensors" else path.read_bytes()
            info = tarfile.TarInfo(str(path.relative_to(folder)))
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    content = packed.getvalue()
    parts = [content[start : start + _PART] for start in range(0, len(content), _PART)]
    if len(parts) > _MAX_PARTS:
        raise ValueError(f"{folder} takes {len(parts)} parts of {_PART} bytes, {_MAX_PARTS} are allowed")
    for old in out.glob("search.*"):
        old.unlink()
    for number, part in enumerate(parts):
        (out / f"search.{number}").write_bytes(part)
    return len(parts)


def unpack(out: Path, folder: Path) -> None:
    """Restore the files that `pack` wrote, if there are any."""
    parts = sorted(out.glob("search.*"))
    if parts:
        content = io.BytesIO(b"".join(part.read_bytes() for part in parts))
        with tarfile.open(fileobj=content, mode="r:gz") as archive:
            archive.extractall(folder, filter="data")


def _halved(path: Path) -> bytes:
    tensors = load_file(path)
    return save({name: t.half() if t.is_floating_point() else t for name, t in tensors.items()})
