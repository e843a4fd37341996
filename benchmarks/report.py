"""Shared code of the benchmarks: options, timing and output."""

import argparse
import json
import platform
import random
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch

from glit_models.errors import GlitError
from glit_models.predict import pick_device
from glit_models.runs.files import write_json, write_text

Row = Mapping[str, str | int | float]


def parser(description: str | None, rounds: int) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    options = argparse.ArgumentParser(description=description)
    options.add_argument("--rounds", type=int, default=rounds, help="number of measurements; medians are shown")
    options.add_argument("--threads", type=int, default=2, help="threads of torch")
    options.add_argument("--json", action="store_true", help="print JSON instead of a Markdown table")
    return options


def device(name: str) -> str:
    """The type of an option for a device: argparse prints a one-line error if it is not available."""
    try:
        return str(pick_device(name))
    except GlitError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def cpu_seconds() -> float:
    """CPU time of all threads of this process so far, and of its finished children."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": cpu_seconds}


def add_clock(options: argparse.ArgumentParser) -> None:
    """Add the option to count CPU time only."""
    what = "cpu counts computing time, for one thread on a machine that does other things besides"
    options.add_argument("--clock", choices=CLOCKS, default="wall", help=what)


def interleaved(cases: Mapping[str, Callable[[], object]], rounds: int, clock: str = "wall") -> dict[str, float]:
    """The median seconds of each case.

    Each round runs all of them, so that a slow minute affects all of them, and in a random order, so that no case
    always follows the same other case, whose data is still in the caches.
    """
    now = CLOCKS[clock]
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for function in cases.values():
        function()  # warm caches and allocators
    order, chance = list(cases), random.Random(0)
    for _ in range(rounds):
        chance.shuffle(order)
        for name in order:
            function = cases[name]
            start = now()
            function()
            seconds[name].append(now() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def device_name(device: str) -> str:
    """A GPU's name; for the CPU, `show` prints more."""
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else device


def show(name: str, options: argparse.Namespace, rows: Sequence[Row], statistic: str = "median") -> None:
    """Print the command, the machine, the versions and the rows, which are statistics over the rounds."""
    command = " ".join(["python", "-m", f"benchmarks.{name}", *sys.argv[1:]])
    about = {"command": command, "machine": _machine(), "threads": options.threads, "rounds": options.rounds}
    versions = {"python": platform.python_version(), "torch": torch.__version__, "timm": timm.__version__}
    if options.json:
        print(json.dumps({**about, "versions": versions, "rows": rows}, indent=2))
        return
    threads = f"{options.threads} thread{'s' if options.threads > 1 else ''}"
    clock = ", CPU time" if getattr(options, "clock", "wall") == "cpu" else ""
    print(f"`{command}`: {threads}, {statistic} of {options.rounds}{clock}")
    print(f"{about['machine']}; {', '.join(f'{key} {value}' for key, value in versions.items())}\n")
    print_rows(rows)


def print_rows(rows: Sequence[Row]) -> None:
    """Print a Markdown table."""
    print("| " + " | ".join(rows[0]) + " |")
    print("|" + "---|" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(map(_text, row.values())) + " |")


def _text(value: str | int | float) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _machine() -> str:
    """The CPU's name, if the system reports it, and the number of its cores."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = names[0] if names else name
        return f"{name}, {max(len(names), 1)} cores"
    return name


# ---- tables that are committed ----


def read_rows(table: Path) -> dict[tuple[Any, ...], dict[str, Any]]:
    """The scores of trainings, by what was trained; none if there is no such file yet."""
    rows = json.loads(table.read_text()) if table.is_file() else []
    return {tuple(key): scores for *key, scores in rows}


def keep_row(table: Path, run: Path, key: tuple[Any, ...], scores: Mapping[str, Any]) -> None:
    """Write a training's scores into its folder, and those of all folders next to it into the table, one to a line."""
    write_json(run / "scores.json", [*key, scores])
    rows = read_rows(table)
    for path in run.parent.glob("*/scores.json"):  # of other processes, too
        *other, found = json.loads(path.read_text())
        rows[tuple(other)] = found
    lines = [json.dumps([*other, rows[other]]) for other in sorted(rows)]
    write_text(table, "[\n" + ",\n".join(lines) + "\n]\n")
