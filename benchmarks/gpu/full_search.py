"""Stage full_search: run the search `fashion_mnist` at 224 pixels, over several calls.

Its result is the search's folder in parts that are small enough, without the checkpoints of trainings: an unfinished
training starts again. Finished ones are kept, as many of their weights as there is room for.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from glit_models.search import SearchRun, load_search_recipe
from safetensors.torch import load_file, save

from .context import Context, Result
from .files import MAX_BYTES, MAX_TOTAL_BYTES, read_json

CUDA_ONLY = {"full_search": ("the real space, images and batch sizes",)}

_TEST_RECIPE = Path(__file__).resolve().parents[2] / "tests" / "fixtures" / "search.yaml"
_PART = MAX_BYTES - 1
_MAX_PARTS = 5
_OTHER_BYTES = 6 * 2**20  # for the log and gpu.json, which grow
_RESERVE = 25.0  # seconds for packing the results


def run_full_search(context: Context) -> Result:
    """Search until the time is up, and pack the folder."""
    folder = context.work / "search"
    if not folder.is_dir():
        unpack(context.out, folder)
    recipe = load_search_recipe(
        str(_TEST_RECIPE) if context.rehearse else "fashion_mnist", [f"train.data.root={context.data}"]
    )
    search = SearchRun(recipe, folder, torch.device(context.device))
    search.context.stop.max_minutes = max(context.seconds_left - _RESERVE, 1) / 60  # its clock starts with the run
    try:
        summary = search.run()
    finally:
        parts, left_out = pack(folder, context.out)
    return {
        "finished": summary is not None, "parts": parts, "left_out": left_out, "progress": _progress(folder),
        "summary": summary,
    }  # fmt: skip


def _progress(folder: Path) -> dict[str, Any]:
    """The number of lines in each file of records, which grow with the search."""
    return {
        str(path.relative_to(folder)): len(path.read_text().splitlines()) for path in sorted(folder.rglob("*.jsonl"))
    }


def pack(folder: Path, out: Path) -> tuple[int, list[str]]:
    """Write the files of `folder` to `out/search.N`: all records, and the weights in float16 that there is room for.

    Returns:
        The number of parts, and the weights that are left out. The `result.json` beside those is left out as well, so
        that a resumed search trains that network again if it needs it; of candidates it only needs the accuracies.
    """
    old = list(out.glob("search.*"))
    others = [path for path in out.iterdir() if path.is_file() and path not in old]
    weights = {path: _halved(path) for path in sorted(folder.rglob("model.safetensors"), key=_rank(folder))}
    records = {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file() and _is_record(path)}
    room = MAX_TOTAL_BYTES - _OTHER_BYTES - sum(path.stat().st_size for path in others)
    room = min(room, _PART * _MAX_PARTS) - sum(map(len, records.values()))
    left_out = []
    for path, content in list(weights.items()):
        room -= len(content)
        if room < 0:
            room += len(weights.pop(path))
            left_out.append(str(path.relative_to(folder)))
            if "retrain" not in path.parts:
                run = path.parent.parent if path.parent.name == "model" else path.parent
                records.pop(run / "result.json", None)
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz", compresslevel=1) as archive:
        for path, content in (records | weights).items():
            info = tarfile.TarInfo(str(path.relative_to(folder)))
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    content = packed.getvalue()
    parts = [content[start : start + _PART] for start in range(0, len(content), _PART)]
    for path in old:
        path.unlink()
    for number, part in enumerate(parts):
        (out / f"search.{number}").write_bytes(part)
    return len(parts), left_out


def _is_record(path: Path) -> bool:
    """Whether a file is no weights: neither a checkpoint nor the best weights of a training, which its model holds."""
    named = path.name in ("lock", "model.safetensors", "best.safetensors") or path.name.startswith("events.out")
    return not named and path.suffix not in (".pt", ".tmp")


def _rank(folder: Path) -> Callable[[Path], tuple[int, float]]:
    """The order in which weights are packed: what a resumed search needs, then the rest, the newest first."""
    results = [path for path in folder.glob("*/retrain/*/result.json") if (path.parent / "model").is_dir()]
    best = max(results, key=lambda path: float((read_json(path) or {}).get("validation_top1", 0)), default=None)
    needed = {folder / "model", folder / "final" / "model", *([best.parent / "model"] if best else [])}

    def rank(path: Path) -> tuple[int, float]:
        is_open = path.parent.name == "supernet" and not (path.parents[1] / "retrained.json").is_file()
        return 0 if is_open else 1 if path.parent in needed else 2, -path.stat().st_mtime

    return rank


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
