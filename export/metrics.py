"""Collect the metrics of a server, in the text format of Prometheus.

https://prometheus.io/docs/instrumenting/exposition_formats/
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import final

__all__ = ["CONTENT_TYPE", "Metrics", "exposition"]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)  # seconds
_NAMES = {
    "requests": "Requests for answers of a model.",
    "failures": "Requests that were answered with an error.",
    "images": "Images that were classified.",
    "runs": "Runs of the model; requests share them.",
}


@final
@dataclass(eq=False)
class Metrics:
    """The metrics of one model. Only one thread may write to it."""

    requests: int = 0
    failures: int = 0
    images: int = 0
    runs: int = 0
    seconds: float = 0.0
    _latencies: Counter[int] = field(default_factory=Counter)  # index of the first bound that a request met

    def observe(self, seconds: float, images: int, failed: bool) -> None:
        """Count a request with its duration and number of images."""
        self.requests += 1
        self.failures += failed
        self.images += images
        self.seconds += seconds
        self._latencies[bisect_left(_BOUNDS, seconds)] += 1

    def buckets(self) -> dict[str, int]:
        """Cumulative number of requests within each bound."""
        met = [sum(self._latencies[below] for below in range(index + 1)) for index in range(len(_BOUNDS))]
        return {**{f"{bound:g}": count for bound, count in zip(_BOUNDS, met, strict=True)}, "+Inf": self.requests}


def exposition(models: Mapping[str, Metrics]) -> str:
    """The exposition text for models by name. A name has no quotes, backslashes or line breaks."""
    lines = []
    for name, text in _NAMES.items():
        lines += [f"# HELP glit_{name}_total {text}", f"# TYPE glit_{name}_total counter"]
        lines += [f'glit_{name}_total{{model="{model}"}} {getattr(found, name)}' for model, found in models.items()]
    name = "glit_request_seconds"
    lines += [f"# HELP {name} From a request's first byte to its answer.", f"# TYPE {name} histogram"]
    for model, found in models.items():
        label = f'model="{model}"'
        lines += [f'{name}_bucket{{{label},le="{bound}"}} {count}' for bound, count in found.buckets().items()]
        lines += [f"{name}_sum{{{label}}} {found.seconds:.6f}", f"{name}_count{{{label}}} {found.requests}"]
    return "\n".join(lines) + "\n"
