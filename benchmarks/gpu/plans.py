"""The plans: the stages that run, their order, and their time limits."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["MODULES", "PLANS", "Planned"]

# The module of each stage; its function `run_NAME` is the stage.
MODULES = {
    "environment": "environment",
    "correct": "correct",
    "compile": "compiling",
    "depthwise": "depthwise",
    "throughput": "throughput",
    "search": "search",
    "pretrain": "training",
    "few_labels": "training",
    "fine_tune": "training",
    "scratch": "training",
    "deit": "training",
    "full_search": "full_search",
    "onnx": "onnx",
}


@dataclass(frozen=True)
class Planned:
    """A stage of a plan.

    Attributes:
        stage: its name.
        seconds: its time limit, or None for a share of the time that the stages with a limit leave.
        share: its share of that time, relative to the other such stages.
        beside: whether it runs at the same time as the next stage. Neither may measure time.
        after: stages whose new results make this one run again even if it is finished.
    """

    stage: str
    seconds: float | None = None
    share: float = 1.0
    beside: bool = False
    after: tuple[str, ...] = ()


_TRAINING = (
    Planned("few_labels", 50, after=("pretrain",)),
    Planned("fine_tune", share=0.6, after=("pretrain",)),
)

PLANS: dict[str, tuple[Planned, ...]] = {
    "first": (
        Planned("environment", 25),
        Planned("compile", 80, beside=True),
        Planned("correct", 80),
        Planned("depthwise", 60),
        Planned("throughput", 75),
        Planned("search", 40),
        Planned("pretrain"),
        *_TRAINING,
    ),
    "train": (
        Planned("pretrain"),
        *_TRAINING,
        Planned("scratch", share=0.3),
        Planned("deit", share=0.3),
    ),
    "search": (Planned("full_search"),),
    "onnx": (Planned("environment", 25), Planned("onnx")),
}
