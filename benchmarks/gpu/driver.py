"""Run the stages of a plan, each in a separate process, and record every result immediately.

This module starts processes, limits their time and writes files; each stage has its own module.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO, Any

from .checkout import ROOT
from .context import Context
from .files import join_logs, over_limits, read_json, tail, write_json
from .plans import PLANS, Planned

__all__ = ["Driver", "Options"]

_GRACE = 12.0  # seconds between SIGTERM and SIGKILL, in which a training saves its weights
_LEAST = 8.0  # seconds that a stage needs to be worth starting


@dataclass(frozen=True)
class Options:
    """The options of the command line.

    Attributes:
        out, work, data: folders; see `Context`.
        minutes: time limit for all results to be on disk; the command ends `margin` seconds earlier.
    """

    out: Path
    work: Path
    data: Path
    plan: str = "first"
    device: str = "cuda"
    minutes: float = 9.0
    rehearse: bool = False
    margin: float = 30.0


@dataclass
class _Process:
    """A running stage."""

    planned: Planned
    context: Context
    process: subprocess.Popen[bytes]
    log: IO[bytes]
    began: float


class Driver:
    """Runs one call of the command."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.end = time.time() + 60 * options.minutes - options.margin
        self.stopped: str | None = None
        options.out.mkdir(parents=True, exist_ok=True)
        options.work.mkdir(parents=True, exist_ok=True)
        # If the machine empties the results folder between two calls, the copy in `work` is still there.
        found = read_json(options.out / "gpu.json") or read_json(options.work / "gpu.json") or {}
        self.record: dict[str, Any] = {"version": 1, "calls": [], "plans": {}} | found
        self.record["calls"].append({"command": sys.argv, "minutes": options.minutes, "rehearse": options.rehearse})
        self.entries: dict[str, Any] = self.record["plans"].setdefault(options.plan, {})
        self.fresh: set[str] = set()  # stages that ran in this call

    def run(self) -> int:
        """Run the rest of the plan; returns the number of stages that did not succeed."""
        previous = {number: signal.signal(number, self._on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            self._run_plan(PLANS[self.options.plan])
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
            self._write()
        return sum(entry["status"] in ("failed", "overran") for entry in self.entries.values())

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.stopped = signal.Signals(number).name

    # ---- the plan ----

    def _run_plan(self, plan: Sequence[Planned]) -> None:
        beside: list[_Process] = []
        for index, planned in enumerate(plan):
            if self.stopped:
                break
            if self._is_finished(planned):
                print(f"gpu: {planned.stage}: finished before", flush=True)
                continue
            if planned.beside and self._is_finished(plan[index + 1]):  # it would run beside one that measures time
                print(f"gpu: {planned.stage}: too late, for {plan[index + 1].stage} is finished", flush=True)
                continue
            box = self._box(plan, index)
            if box < _LEAST:
                self._enter(planned.stage, {"status": "skipped", "why": f"{max(box, 0):.0f} s were left"})
                continue
            running = self._start(planned, box)
            if planned.beside and not self.options.rehearse:
                beside.append(running)
                continue
            self._wait([running, *beside])
            beside = []
            if planned.stage == "environment" and self._is_without_device():
                print("gpu: without a working device nothing else is tried", flush=True)
                break
        self._wait(beside)

    def _is_without_device(self) -> bool:
        """Whether the stage `environment` failed before its first result, a tensor on the device."""
        entry = self.entries["environment"]
        return entry["status"] == "failed" and not entry["result"]

    def _is_finished(self, planned: Planned) -> bool:
        done = self.entries.get(planned.stage, {}).get("status") == "done"
        return done and self.fresh.isdisjoint(planned.after)

    def _box(self, plan: Sequence[Planned], index: int) -> float:
        """Seconds for a stage: its limit, or its share of the time that the later stages' limits leave."""
        left = self.end - time.time()
        planned, later = plan[index], plan[index + 1 :]
        if self.options.rehearse:
            return left  # the limits do not apply to a CPU's speed
        if planned.seconds is not None:
            return min(planned.seconds, left)
        shares = sum(other.share for other in later if other.seconds is None and not self._is_finished(other))
        reserved = sum(other.seconds or 0 for other in later if not self._is_finished(other))
        return max(left - reserved, left / 2) * planned.share / (planned.share + shares)

    # ---- one stage ----

    def _start(self, planned: Planned, box: float) -> _Process:
        options = self.options
        began = time.time()
        earlier = {name: entry.get("result") or {} for name, entry in self._all_entries().items()}
        context = Context(
            planned.stage, options.out.resolve(), options.work.resolve(), options.data.resolve(), options.device,
            options.rehearse, began + box, earlier,
        )  # fmt: skip
        context.result_path.unlink(missing_ok=True)
        request = options.work / "requests" / f"{planned.stage}.json"
        request.parent.mkdir(exist_ok=True)
        request.write_text(context.to_json(), encoding="utf-8")
        log = self._log(planned.stage).open("wb")
        command = [sys.executable, "-m", f"{__package__}.stage", str(request.resolve())]
        print(f"gpu: {planned.stage}: at most {box:.0f} s", flush=True)
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            env=_environment(options), process_group=0,
        )  # fmt: skip
        return _Process(planned, context, process, log, began)

    def _all_entries(self) -> dict[str, Any]:
        """Entries of all plans, this one's last: a later plan uses decisions of an earlier one."""
        merged: dict[str, Any] = {}
        for entries in (*self.record["plans"].values(), self.entries):
            merged |= entries
        return merged

    def _wait(self, running: Sequence[_Process]) -> None:
        """Wait until all have ended, or their time is up."""
        left = list(running)
        while left:
            for one in left[:]:
                late = time.time() >= one.context.deadline
                if one.process.poll() is None and not late and not self.stopped:
                    continue
                killed = one.process.poll() is None
                if killed:
                    _end(one.process)
                left.remove(one)
                self._finish(one, "stopped" if killed and self.stopped else "overran" if killed else None)
            time.sleep(0.1)

    def _finish(self, one: _Process, why: str | None) -> None:
        """Record a stage that has ended; `why`: the reason if it was stopped."""
        one.log.close()
        code, result = one.process.returncode, read_json(one.context.result_path)
        status = why or ("failed" if code else "done" if (result or {}).get("finished", True) else "unfinished")
        entry = {"status": status, "seconds": round(time.time() - one.began, 1), "result": result}
        if status in ("failed", "overran"):
            entry |= {"exit_code": code, "log": tail(self._log(one.planned.stage), 4000)}
        self.fresh.add(one.planned.stage)
        self._enter(one.planned.stage, entry)

    def _enter(self, stage: str, entry: dict[str, Any]) -> None:
        before = self.entries.get(stage)
        if entry["status"] == "skipped" and before is not None:
            return  # keep the better result of an earlier call
        self.entries[stage] = entry
        print(f"gpu: {stage}: {entry['status']}, {entry.get('seconds', 0):.0f} s", flush=True)
        if "log" in entry:
            print("    " + "\n    ".join(entry["log"].splitlines()[-4:]), flush=True)
        self._write()

    # ---- files ----

    def _log(self, stage: str) -> Path:
        folder = self.options.work / "logs"
        folder.mkdir(exist_ok=True)
        return folder / f"{stage}.log"

    def _write(self) -> None:
        logs = sorted((self.options.work / "logs").glob("*.log"), key=lambda path: path.stat().st_mtime)
        join_logs(logs, self.options.out / "gpu.log")
        self.record["over_limits"] = over_limits(self.options.out)
        for folder in (self.options.work, self.options.out):
            write_json(folder / "gpu.json", self.record)


def _environment(options: Options) -> dict[str, str]:
    """The environment of a stage: compilers keep their caches where the next stage finds them."""
    own = {
        "TORCHINDUCTOR_CACHE_DIR": str(options.work.resolve() / "inductor"),
        "TRITON_CACHE_DIR": str(options.work.resolve() / "triton"),
        "PYTHONUNBUFFERED": "1",
        "PYTHONFAULTHANDLER": "1",
    }
    return os.environ | own


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and all of its children, which are in one group."""
    for number, grace in ((signal.SIGTERM, _GRACE), (signal.SIGKILL, 5.0)):
        try:
            os.killpg(process.pid, number)
            process.wait(grace)
        except ProcessLookupError:
            break
        except subprocess.TimeoutExpired:
            continue
    with contextlib.suppress(ProcessLookupError):  # children that outlived it
        os.killpg(process.pid, signal.SIGKILL)
    process.poll()
