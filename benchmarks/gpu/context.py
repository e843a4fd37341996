"""The input of a stage: output folder, device, time limit, and results of earlier stages."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .files import write_json

if TYPE_CHECKING:
    from glit_models import GLiTSpec

__all__ = ["Context", "Result"]

Result = dict[str, Any]


@dataclass(frozen=True)
class Context:
    """The context of one call of a stage.

    Attributes:
        stage: name of the stage.
        out: folder of the results: at most 8 files of less than 16 MiB.
        work: folder of larger files: checkpoints and compilers' caches.
        data: folder of the Fashion-MNIST files.
        device: 'cuda' or 'cpu'.
        rehearse: whether everything must be small enough for one CPU core.
        deadline: time limit of the stage, in seconds of `time.time`.
        earlier: results of earlier stages, by name, and the carried result of an earlier call.
    """

    stage: str
    out: Path
    work: Path
    data: Path
    device: str
    rehearse: bool
    deadline: float
    earlier: dict[str, Result] = field(default_factory=dict)

    @property
    def seconds_left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.time()

    @property
    def result_path(self) -> Path:
        """The path of the stage's result."""
        return self.work / "results" / f"{self.stage}.json"

    def save(self, result: Result) -> None:
        """Write the current result, so that it is kept if the stage runs out of time."""
        write_json(self.result_path, result)

    def compile(self, function: Callable[..., Any], **keywords: Any) -> Any:
        """`torch.compile`; a rehearsal traces without generating code, which takes a CPU half a minute per network."""
        import torch

        if self.rehearse:
            return torch.compile(function, backend="aot_eager", dynamic=keywords.get("dynamic"))
        return torch.compile(function, **keywords)

    def spec(self) -> GLiTSpec:
        """GLiT-Tiny; in a rehearsal two of its blocks, narrower, one of each kind of sub-module."""
        from glit_models import GLIT_TINY, GLiTSpec

        if not self.rehearse:
            return GLIT_TINY
        narrow = GLIT_TINY.scaled(48, 3)
        return GLiTSpec(narrow.blocks[1:3], narrow.embed_dim, narrow.num_heads, narrow.patch_size)

    def chosen_form(self, use: str) -> str:
        """The form of the depthwise convolution that the throughput stage chose for a use, if it is available."""
        from ..depthwise_forms import FORMS

        form = self.earlier.get("throughput", {}).get("chosen", {}).get(use, "conv2d, rows")
        return form if form in FORMS else "conv2d, rows"

    def to_json(self) -> str:
        """All fields as JSON, for the process of the stage."""
        return json.dumps(asdict(self), default=str)

    @staticmethod
    def from_json(text: str) -> Context:
        """The inverse of `to_json`."""
        fields = json.loads(text)
        paths = {name: Path(fields[name]) for name in ("out", "work", "data")}
        return Context(**fields | paths)
