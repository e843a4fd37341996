"""Measure the free memory of this machine. Standard library only."""

from __future__ import annotations

from pathlib import Path

__all__ = ["free_memory"]

_GROUP = Path("/sys/fs/cgroup")  # of this container


def free_memory() -> int:
    """Bytes that this process can still allocate, on Linux, also in a container; infinite if unknown.

    Files that the system keeps in memory, and drops if it is short, count as free.
    """
    left = [1 << 62]
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        left.append(sum(1024 * int(lines[key].split()[0]) for key in ("MemAvailable", "SwapFree")))
        most, used = (int((_GROUP / f"memory.{name}").read_text()) for name in ("max", "current"))
        counts = dict(line.split() for line in (_GROUP / "memory.stat").read_text().splitlines())
        left.append(most - used + sum(int(counts[key]) for key in ("active_file", "inactive_file")))
    except (OSError, ValueError, KeyError):  # not Linux; no container, or one without a limit
        pass
    return max(min(left), 0)
