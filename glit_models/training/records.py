"""Record a run: `metrics.jsonl`, TensorBoard events if it is installed, `curves.png`, and the progress bar.

Only the first process of a run writes records.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, TextColumn, TimeRemainingColumn

from ..errors import WriteError, first_line
from ..runs.console import say
from ..runs.figures import new_figure
from ..runs.files import whole_file, write_text
from .tracking import Trackers

__all__ = ["Records", "progress_columns"]

_DRAW_EVERY = 30.0  # seconds; drawing takes as long as a short epoch of a small network


def progress_columns() -> tuple[ProgressColumn, ...]:
    """The columns of a progress bar over steps, whose tasks have the fields `epoch` and `status`."""
    return (
        TextColumn("epoch {task.fields[epoch]}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[status]}"),
        TimeRemainingColumn(),
    )


class Records:
    """The records in one run's folder. An entry is a dict with `step`; entries for an epoch also have `epoch`.

    Args:
        folder: folder of the run.
        track: names of trackers that get the same numbers; see `check_trackers`.
    """

    def __init__(self, folder: Path, track: Sequence[str] = ()) -> None:
        self.folder, self.track = folder, track
        self.trackers: Trackers | None = None
        self.path = folder / "metrics.jsonl"
        self.board: Any = None
        self.drawn = time.monotonic()
        self.has_undrawn_epoch = False
        self.can_draw = True

    def begin(self, step: int, epochs_done: int, config: Mapping[str, Any]) -> None:
        """Begin, or begin again, after `step`: entries of later steps and epochs are dropped.

        Args:
            config: the recipe's values, for trackers.
        """

        def is_past(entry: dict[str, Any]) -> bool:
            return entry["step"] <= step and entry.get("epoch", 0) <= epochs_done

        self.close()
        text = "".join(f"{json.dumps(entry)}\n" for entry in self.entries(is_past)) if step else ""
        write_text(self.path, text)
        self.trackers = Trackers(self.track, self.folder, config)
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:  # not installed
            return
        self.board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=step + 1)

    def entries(self, is_wanted: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
        """The entries so far that `wanted` accepts; incomplete and damaged lines are skipped."""
        lines = self.path.read_text(errors="replace").splitlines() if self.path.is_file() else []
        return [entry for line in lines if (entry := _parse(line)) and is_wanted(entry)]

    def write(self, entry: dict[str, Any]) -> None:
        """Append an entry. Raises WriteError if the disk is full."""
        try:
            with self.path.open("a") as file:
                file.write(json.dumps(entry) + "\n")
        except OSError as error:
            raise WriteError(f"{self.path} cannot be written: {error.strerror}") from None
        if self.trackers is not None:
            self.trackers.log({key: value for key, value in entry.items() if key != "step"}, entry["step"])
        if self.board is not None:
            for key, value in entry.items():
                if key not in ("step", "epoch"):
                    self.board.add_scalar(key, value, entry["step"])
            if "epoch" in entry:
                self.board.flush()
        self.has_undrawn_epoch |= "epoch" in entry

    def draw_if_due(self) -> None:
        """Write `curves.png`, at most once every 30 seconds."""
        if time.monotonic() - self.drawn >= _DRAW_EVERY:
            self.draw()

    def draw(self) -> None:
        """Write `curves.png`: loss, learning rate and validation accuracy over the steps.

        A failure to draw is reported once, and does not stop the run.
        """
        self.drawn = time.monotonic()
        self.has_undrawn_epoch = False
        try:
            self._draw()
        except Exception as error:  # from matplotlib, its settings, or a font
            if self.can_draw:
                say(f"glit: curves.png is not drawn ({first_line(error)}); the numbers are in {self.path}")
            self.can_draw = False

    def _draw(self) -> None:
        entries = self.entries(lambda entry: True)
        figure = new_figure(figsize=(12, 3.5))
        panels = (("loss", "train_loss"), ("lr", None), ("validation_top1", "validation_map"))
        mean = any("validation_map" in entry for entry in entries)
        titles = ("training loss", "learning rate", f"validation {'mAP' if mean else 'top-1'}, %")
        for axes, keys, title in zip(figure.subplots(1, 3), panels, titles, strict=True):
            for key, style in zip(keys, ("-", "o-"), strict=True):
                points = [(entry["step"], entry[key]) for entry in entries if key in entry]
                if points:
                    axes.plot(*zip(*points, strict=True), style if len(points) > 1 else "o", markersize=3)
            axes.set(title=title, xlabel="step")
            axes.grid(alpha=0.3)
        with whole_file(self.folder / "curves.png") as path:
            figure.savefig(path, format="png", dpi=80)

    def close(self) -> None:
        """Close TensorBoard's file and the trackers."""
        if self.trackers is not None:
            self.trackers.close()
        if self.board is not None:
            self.board.close()
        self.trackers = self.board = None


def _parse(line: str) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):  # a killed run wrote part of it, or somebody changed it
        return None
    return entry if isinstance(entry, dict) and type(entry.get("step")) is int else None
