"""Kill commands with SIGKILL at random moments, run them again, and compare their files with undisturbed runs.

Each command runs in a separate folder, which also has its temporary files. It is killed up to six times, at moments
drawn from a seed, and then runs to its end. After a kill, no file may be half-written. At the end, no temporary file
may remain, and every file must have the bytes of the undisturbed run, except for wall times.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import signal
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image

from glit_models.cli import main as glit
from glit_models.weights.folder import save_folder

from . import report

FIXTURES = Path(__file__).parents[1] / "tests" / "fixtures"
BLOCK = {"num_global_heads": 1, "num_local_heads": 1, "mlp_ratio": 1, "qkv_ratio": 1, "kernel_size": 3,
         "expand_ratio": 1}  # fmt: skip
SPEC = {"embed_dim": 8, "num_heads": 2, "patch_size": 8, "blocks": [BLOCK]}
KILLS_IN_A_ROW = 6
# Wall times; `.ses` is a file of ONNX Runtime with a random session number.
TIMED = re.compile("seconds|minutes|time|images_per_second")
TIMED_FILES = re.compile(r"\.ses|times\.json|events\.out\.tfevents\..*")


def commands(inputs: Path) -> dict[str, list[str]]:
    """The commands, without the output that is their last argument."""
    data = ["--set", f"data.root={FIXTURES / 'fashion-mnist'}"]
    search = [f"train.data.root={FIXTURES / 'fashion-mnist'}", "train.data.limit=60", "train.optim.epochs=1",
              "supernet.train.optim.epochs=1", "evolution.generations=1", "retrain.top=1"]  # fmt: skip
    model = str(inputs / "folder")
    return {
        "convert": ["convert", str(inputs / "weights.pth"), "--model", "glit_tiny", "--spec",
                    str(inputs / "spec.json"), "--num-classes", "2", "--img-size", "16", "--out"],
        "publish": ["publish", model, "--name", "glit_tiny.kills", "--dataset", "noise", "--license", "apache-2.0",
                    "--recipe", "none", "--metric", "top1", "50", "none", "--to-folder"],
        "train": ["train", str(FIXTURES / "tiny.yaml"), *data, "--set", "optim.epochs=1", "--device", "cpu", "--out"],
        "finetune": ["finetune", str(inputs / "images"), "--model", model, "--img-size", "16", "--epochs", "1",
                     "--device", "cpu", "--out"],
        "search": ["search", str(FIXTURES / "search.yaml"), *(word for key in search for word in ("--set", key)),
                   "--device", "cpu", "--out"],
        "export": ["export", model, "--verify", "2", "--force", "--out"],
    }  # fmt: skip


def make_inputs(inputs: Path) -> None:
    """A network of one block, as a folder, a checkpoint and a spec, and 24 images of two classes."""
    torch.manual_seed(0)
    model = timm.create_model("glit_tiny", spec=SPEC, img_size=16, num_classes=2)
    save_folder(model, inputs / "folder", class_names=["a", "b"])
    torch.save({"model": model.state_dict()}, inputs / "weights.pth")
    (inputs / "spec.json").write_text(json.dumps(SPEC))
    rng = np.random.default_rng(0)
    for number in range(24):
        path = inputs / "images" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(path)


def start(words: Sequence[str], place: Path) -> int:
    """Run `glit` in a fork of this process, in `place`; returns its number. Importing torch would take most of it."""
    (place / "tmp").mkdir(parents=True, exist_ok=True)
    pid = os.fork()
    if pid:
        return pid
    status = 70
    with contextlib.suppress(BaseException):
        os.chdir(place)
        os.environ["TMPDIR"] = tempfile.tempdir = str(place / "tmp")
        os.environ["GLIT_HOME"] = str(place / "home")
        log = os.open(place.with_suffix(".log"), os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        status = glit([*words, "out.onnx" if words[0] == "export" else "out"])
    os._exit(status)


def finish(pid: int, place: Path) -> None:
    """Wait for the process. Raises RuntimeError if it did not succeed."""
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if status:
        raise RuntimeError(f"status {status}: {place.with_suffix('.log').read_text()[-1000:]}")


def kill_after(pid: int, seconds: float) -> bool:
    """Kill the process; whether it was still running."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return False if not status else _fail(status)
        time.sleep(0.001)
    os.kill(pid, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(pid, 0)[1])


def _fail(status: int) -> bool:
    raise RuntimeError(f"it ended by itself with status {os.waitstatus_to_exitcode(status)}")


# ---- what is compared ----


def contents(place: Path) -> dict[str, Any]:
    """What each file in `place` holds, without wall times and what shows them; temporary files too."""
    files = {path.relative_to(place).as_posix(): path for path in sorted(place.rglob("*")) if path.is_file()}
    return {name: _content(path) for name, path in files.items() if not TIMED_FILES.fullmatch(path.name)}


def _content(path: Path) -> Any:
    if path.suffix in (".json", ".jsonl"):
        lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
        return [_untimed(json.loads(line)) for line in lines]
    if path.suffix == ".pt":  # a zip archive of torch's, whose pickle holds the minutes
        with zipfile.ZipFile(path) as archive:
            numbers = [archive.read(name) for name in archive.namelist() if "/data/" in name]
        return numbers, repr(_untimed(torch.load(path, weights_only=True)))
    return path.read_bytes()


def _untimed(data: Any) -> Any:
    if isinstance(data, Mapping):
        return {key: _untimed(value) for key, value in data.items() if not TIMED.search(str(key))}
    return [_untimed(item) for item in data] if isinstance(data, (list, tuple)) else data


def differences(found: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """Which files are missing, too many, or other than expected."""
    return sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))


# ---- the run ----


def disturb(
    words: Sequence[str], place: Path, expected: Mapping[str, Any], moment: Callable[[], float], kills: int
) -> tuple[int, int, list[str]]:
    """Kill a command, run it to its end and compare: kills done, temporary files they left, what is wrong."""
    done, left, wrong = 0, 0, []
    resumes = words[0] in ("train", "finetune", "search")  # the others have one result, which is whole or not there
    for _ in range(kills):
        if not kill_after(start(words, place), moment()):
            break
        done += 1
        names = [path.relative_to(place).as_posix() for path in place.rglob("*") if path.is_file()]
        left += sum(name.endswith(".tmp") or ".tmp/" in name or name.startswith("tmp/") for name in names)
        if not resumes:
            there = {name: what for name, what in contents(place).items() if ".tmp" not in name and name[:4] != "tmp/"}
            wrong += [f"{name} half-written" for name in there if there[name] != expected.get(name)]
    finish(start(words, place), place)  # also where it was done: the next run removes what the killed one left
    if not wrong:
        wrong = differences(contents(place), expected)
    return done, left, wrong


def main() -> int:
    """Kill, compare and print; 1 if anything was wrong."""
    options = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    options.add_argument("--kills", type=int, default=100, help="of all commands together (100)")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--only", metavar="COMMAND")
    args = options.parse_args()
    torch.set_num_threads(1)
    chance, failures = random.Random(args.seed), 0
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        inputs = Path(folder) / "inputs"
        make_inputs(inputs)
        chosen = {name: words for name, words in commands(inputs).items() if args.only in (None, name)}
        for number, (name, words) in enumerate(chosen.items()):
            wanted = args.kills * (number + 1) // len(chosen) - args.kills * number // len(chosen)
            began = time.monotonic()
            finish(start(words, Path(folder) / name), Path(folder) / name)
            seconds = time.monotonic() - began
            expected = contents(Path(folder) / name)
            kills = runs = left = bad = 0
            while kills < wanted:
                place = Path(folder) / f"{name}-{runs}"
                in_a_row = min(KILLS_IN_A_ROW, wanted - kills)
                done, temporary, wrong = disturb(words, place, expected, partial(chance.uniform, 0, seconds), in_a_row)
                kills, runs, left, bad = kills + done, runs + 1, left + temporary, bad + bool(wrong)
                if wrong:
                    print(f"{place.name}: {', '.join(wrong)}", file=sys.stderr)
            failures += bad
            rows.append({"command": name, "kills": kills, "ends compared": runs, "files": len(expected),
                         "temporary files after kills": left, "ends that differ": bad})  # fmt: skip
    print(f"seed {args.seed}: {sum(row['kills'] for row in rows)} kills, {failures} wrong\n")
    report.print_rows(rows)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
