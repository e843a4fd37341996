"""Print the results of a call: the status of every stage, and the tables for docs/performance.md."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

__all__ = ["summary", "table"]

_TABLES = {
    "throughput": ("rows",),
    "depthwise": ("rows",),
    "search": ("evaluation", "launches", "step"),
    "few_labels": ("rows",),
    "onnx": ("rows",),
}
_FACTS = {
    "environment": ("device", "memory_tb_s", "bf16_tflops", "cudnn", "cudnn_causal_convolution", "shared_memory_gib"),
    "correct": ("failed", "right_forms", "wrong_forms"),
    "throughput": ("chosen",),
    "pretrain": ("form", "data, images/s", "model, images/s", "both, images/s", "images", "scores"),
    "fine_tune": ("form", "both, images/s", "epochs", "scores"),
    "scratch": ("both, images/s", "epochs", "scores"),
    "deit": ("both, images/s", "epochs", "scores"),
    "full_search": ("progress", "left_out", "summary"),
}


def summary(record: Mapping[str, Any]) -> str:
    """All stages of all plans, and the files that exceed the limits of the results folder."""
    lines = []
    for plan, entries in record["plans"].items():
        for stage, entry in entries.items():
            lines.append(f"\n{plan}, {stage}: {entry['status']}, {entry.get('seconds', 0):.0f} s")
            lines += _found(stage, entry.get("result") or {})
    lines += [f"over the limits: {problem}" for problem in record.get("over_limits", ())]
    return "\n".join(lines)


def _found(stage: str, result: Mapping[str, Any]) -> list[str]:
    lines = [f"  {name}: {_text(result[name])}" for name in _FACTS.get(stage, ()) if name in result]
    for name in _TABLES.get(stage, ()):
        rows = result.get(name)
        if isinstance(rows, list) and rows:
            lines += ["", *table(rows)]
        elif rows:
            lines.append(f"  {name}: {rows}")
    return lines


def table(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Format rows as lines of a Markdown table; their keys may differ."""
    rows = list(rows)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return lines + ["| " + " | ".join(_text(row.get(column, "")) for column in columns) + " |" for row in rows]


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return str(value)
