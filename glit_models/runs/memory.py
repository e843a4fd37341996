"""Measure the free memory of this machine. Standard library only."""

from __future__ import annotations

from pathlib import Path

__all__ = ["free_memory"]


def free_memory() -> int:
    """Bytes that this process can still allocate, on Linux, also in a container; infinite if unknown."""
    left = [1 << 62]
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        left.append(sum(1024 * int(lines[key].split()[0]) for key in ("MemAvailable", "SwapFree")))
        group = Path("/sys/fs/cgroup")
        left.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    except (OSError, ValueError, KeyError):  # not Linux; no container, or one without a limit
        pass
    return max(min(left), 0)
