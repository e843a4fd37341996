"""Damage all kinds of input at random from a seed: `python -m tests.fuzz --seed 0 --cases 2000`, or `make fuzz`.

A case passes if it succeeds, or raises a GlitError with a one-line message, within limits of time and memory. Every
other outcome is printed with its seed; `--only KIND` and `--seed` reproduce it.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import timm
import torch
import yaml
from glit_models.export.metadata import PREFIX, ExportInfo
from glit_models.search import load_search_recipe, load_space
from glit_models.search.report.findings import read_findings
from PIL import Image

from glit_models import parse_spec
from glit_models.cli import main as glit
from glit_models.data.sources import open_source
from glit_models.errors import GlitError
from glit_models.predict import open_image
from glit_models.runs.state import StateFiles, read_tensors
from glit_models.training import load_recipe
from glit_models.training.state import Checkpoints, Progress
from glit_models.weights import resolve
from glit_models.weights.files import read_state_dict
from glit_models.weights.folder import load_folder, save_folder
from glit_models.weights.registry import read_registry

SECONDS = 10
MEGABYTES = 1500
FIXTURES = Path(__file__).parent / "fixtures"
BLOCK = {
    "num_global_heads": 1,
    "num_local_heads": 1,
    "mlp_ratio": 1,
    "qkv_ratio": 1,
    "kernel_size": 3,
    "expand_ratio": 1,
}
SPEC = {"embed_dim": 8, "num_heads": 2, "patch_size": 8, "blocks": [BLOCK]}
NASTY = [
    None, True, False, 0, -1, 1, 3, 10**9, 10**30, -(10**30), 0.5, -0.5, 1e300, float("nan"), float("inf"), "", "evil",
    "\x1b[2J", "a\nb", "\udcff", "../../x", "x" * 5000, [], {}, [[]], [None], ["a", 1], {"a": {}}, {"": ""}, [0] * 1000,
    "pipe:true", "https://example.org", "2001-99-99", ":", "os:system", {1: 2},
]  # fmt: skip
NUMBERS = ["nan", "inf", "-1", "0", "1", "1e400", "9" * 30, "9" * 5000, "", "x", "٣", "0x10", "1.5", "--", "1e-400"]


# ---- damage ----


def damage_value(rng: random.Random, data: Any) -> Any:
    """Plain data with one or two of its values replaced, removed or added."""
    data = json.loads(json.dumps(data))
    for _ in range(rng.choice((1, 1, 2))):
        place = data
        while True:
            if not isinstance(place, (dict, list)) or not place:
                break
            key = rng.choice(list(place) if isinstance(place, dict) else range(len(place)))
            if isinstance(place[key], (dict, list)) and place[key] and rng.random() < 0.8:
                place = place[key]
                continue
            what = rng.random()
            if what < 0.1:
                del place[key]
            elif what < 0.2 and isinstance(place, dict):
                place[rng.choice(["evil", "", "\x1b", "family", "__class__"])] = rng.choice(NASTY)
            else:
                place[key] = rng.choice(NASTY)
            break
    return data


def damage_bytes(rng: random.Random, content: bytes) -> bytes:
    """Bytes with some changed, cut off, doubled or put in."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 2, 8))):
        at = rng.randrange(len(data) + 1)
        kind = rng.randrange(5)
        if kind == 0 and at < len(data):
            data[at] = rng.randrange(256)
        elif kind == 1:
            data = data[:at]
        elif kind == 2:
            data[at:at] = rng.randbytes(rng.choice((1, 4, 64)))
        elif kind == 3:
            data[at:at] = data[at : at + rng.choice((1, 8, 100))]
        else:
            del data[at : at + rng.choice((1, 8, 100))]
    return bytes(data)


def damage_text(rng: random.Random, data: Any, write: Callable[[Any], str]) -> bytes:
    if rng.random() < 0.7:
        with contextlib.suppress(Exception):  # what cannot be written, such as a mapping's key
            return write(damage_value(rng, data)).encode("utf-8", "surrogatepass")
    return damage_bytes(rng, write(data).encode())


# ---- what is read ----


class Readers:
    """One method a kind of input: it damages its base and reads that, in the folder `place`."""

    def __init__(self, place: Path) -> None:
        self.place = place
        torch.manual_seed(0)
        self.model = timm.create_model("glit_tiny", spec=SPEC, img_size=16, num_classes=3).eval()
        save_folder(self.model, place / "folder", class_names=["a", "b", "c"])
        self.linear = torch.nn.Linear(2, 2)
        self.sgd = torch.optim.AdamW(self.linear.parameters())
        Checkpoints(place, Progress(), self.linear, self.sgd, None).save(write=True)
        torch.save({"model": self.model.state_dict()}, place / "base.pth")
        Image.new("RGB", (9, 7)).save(place / "base.png")
        Image.new("RGB", (9, 7)).save(place / "base.jpg")
        self.registry = json.loads((resolve.SHIPPED / "registry.json").read_text())
        self.search = FIXTURES / "written_by_0_1" / "search_run"
        config = json.loads((place / "folder" / "config.json").read_text())
        self.config = config
        info = {"source": "x", "sha256": "0" * 64, "package_version": "0", "input_size": [3, 16, 16], "mean": [0.5] * 3,
                "std": [0.5] * 3, "interpolation": "bicubic", "crop_pct": 0.9, "crop_mode": "center", "num_classes": 3,
                "class_names": None, "precision": "fp32", "batch": None, "dynamic_size": False, "preprocess": False,
                "opset": 20, "patch_size": 8, "spec": SPEC}  # fmt: skip
        self.info = info

    def kinds(self) -> list[str]:
        return [name.removeprefix("read_") for name in vars(Readers) if name.startswith("read_")]

    def _file(self, name: str, content: bytes) -> Path:
        path = self.place / name
        path.write_bytes(content)
        return path

    def read_safetensors(self, rng: random.Random) -> None:
        content = (self.place / "folder" / "model.safetensors").read_bytes()
        read_state_dict(self._file("x.safetensors", damage_bytes(rng, content)))

    def read_pth(self, rng: random.Random) -> None:
        read_state_dict(self._file("x.pth", damage_bytes(rng, (self.place / "base.pth").read_bytes())))

    def read_checkpoint(self, rng: random.Random) -> None:
        run = self.place / "run"
        run.mkdir(exist_ok=True)
        state = torch.load(self.place / "last.pt", weights_only=True)
        if rng.random() < 0.5:
            key = rng.choice(list(state))
            state[key] = rng.choice([*NASTY, torch.zeros(3)])
            torch.save(state, run / "last.pt")
        else:
            (run / "last.pt").write_bytes(damage_bytes(rng, (self.place / "last.pt").read_bytes()))
        Checkpoints(run, Progress(), self.linear, self.sgd, None).load()
        StateFiles(run / "last.pt", run / "previous.pt").load(read_tensors)

    def read_spec(self, rng: random.Random) -> None:
        parse_spec(self._file("x.json", damage_text(rng, SPEC, json.dumps)))

    def read_config(self, rng: random.Random) -> None:
        (self.place / "folder" / "config.json").write_bytes(damage_text(rng, self.config, json.dumps))
        load_folder(self.place / "folder")

    def read_registry(self, rng: random.Random) -> None:
        read_registry(self._file("registry.json", damage_text(rng, self.registry, json.dumps)))

    def read_recipe(self, rng: random.Random) -> None:
        data = yaml.safe_load((FIXTURES / "tiny.yaml").read_text())
        load_recipe(str(self._file("x.yaml", damage_text(rng, data, yaml.safe_dump))))

    def read_search_recipe(self, rng: random.Random) -> None:
        data = yaml.safe_load((FIXTURES / "search.yaml").read_text())
        load_search_recipe(str(self._file("x.yaml", damage_text(rng, data, yaml.safe_dump))))

    def read_space(self, rng: random.Random) -> None:
        space = load_space("glit").to_dict() if rng.random() < 0.5 else {"space": "glit", "depth": 2, "mlp_ratios": [1]}
        load_space(self._file("x.yaml", damage_text(rng, space, yaml.safe_dump)))

    def read_override(self, rng: random.Random) -> None:
        key = rng.choice(["optim.lr", "model.spec", "augment.scale", "seed", "data.mean", "a.b.c", "", "optim", "."])
        value = rng.choice([*map(str, NASTY), *NUMBERS, "[1, 2]", "{a: 1}", "{a", "'", "[" * 100, "&a [*a]", "!!int x"])
        load_recipe("smoke", [f"{key}={value}"])

    def read_metadata(self, rng: random.Random) -> None:
        texts = {PREFIX + key: json.dumps(value) for key, value in self.info.items()}
        key = rng.choice(list(texts))
        damaged = [text for value in NASTY[:-1] if (text := json.dumps(value))]
        texts[key] = rng.choice([*damaged, "{", "", "[" * 100_000])
        ExportInfo.from_texts(texts, "x.onnx")

    def read_search_folder(self, rng: random.Random) -> None:
        folder = self.place / "search"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.search, folder)
        path = rng.choice([path for path in sorted(folder.rglob("*")) if path.suffix in (".json", ".jsonl", ".yaml")])
        path.write_bytes(damage_bytes(rng, path.read_bytes()))
        read_findings(folder)

    def read_image(self, rng: random.Random) -> None:
        base = self.place / rng.choice(["base.png", "base.jpg"])
        open_image(self._file("x.png", damage_bytes(rng, base.read_bytes())))

    def read_image_folder(self, rng: random.Random) -> None:
        root = self.place / "images"
        shutil.rmtree(root, ignore_errors=True)
        for _ in range(rng.choice((1, 2, 3))):
            name = rng.choice([b"cat", b"d\xffg", b"a\nb", b"\x1b[2J", b"x" * 255, b".hidden", b" ", b"train", b"a/b"])
            folder = root / os.fsdecode(name)
            folder.mkdir(parents=True, exist_ok=True)
            for image in range(rng.choice((0, 1, 2))):
                shutil.copy(self.place / "base.png", folder / f"{image}{rng.choice(['.png', '.PNG', '.txt', ''])}")
        root.mkdir(exist_ok=True)
        images = open_source("folder", root, rng.choice(["train", "validation", "", "\x00"]))
        if len(images):
            images[0]

    def read_number(self, rng: random.Random) -> None:
        image, out = str(self.place / "base.png"), str(self.place / "out")
        folder = str(self.place / "folder")
        number = rng.choice(NUMBERS)
        if number in ("1", "٣"):  # it would be done, which takes long
            return
        command = rng.choice([
            ["predict", image, "--topk", number], ["predict", image, "--device", number],
            ["eval", folder, str(self.place), "--batch-size", number], ["bench", folder, "--threads", number],
            ["bench", folder, "--batch", number], ["bench", folder, "--rounds", number],
            ["export", folder, "--out", out, "--batch", number],
            ["export", folder, "--out", out, "--image-size", number],
            ["export", folder, "--out", out, "--opset", number], ["train", number, "--out", out],
            ["train", "nowhere", "--max-minutes", number, "--out", out], ["predict", image, "--model", number],
            ["publish", folder, "--to-folder", out, "--metric", "top1", number, "x"], ["info", number],
            ["convert", str(self.place / "base.pth"), "--model", "glit_tiny", "--out", out, "--num-classes", number],
            ["convert", str(self.place / "base.pth"), "--model", "glit_tiny", "--out", out, "--img-size", number],
            ["finetune", str(self.place), "--epochs", number], ["fractals", "--delta", number, "--out", number],
        ])  # fmt: skip
        (self.place / "folder" / "config.json").write_text(json.dumps(self.config))
        with contextlib.redirect_stderr(io.StringIO()) as err, contextlib.redirect_stdout(io.StringIO()):
            status = glit(command)
        lines = [line for line in err.getvalue().splitlines() if line.startswith("glit")]
        if status not in (0, 1, 2) or (status == 2 and len(lines) != 1):
            raise AssertionError(f"{command}: status {status}, stderr {err.getvalue()[:500]!r}")


# ---- the run ----


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Interrupt after SECONDS of the processor, or ten times as long by the clock; raise if it grew by MEGABYTES."""

    def late(*_: object) -> None:
        raise AssertionError(f"it took more than {SECONDS} s")

    before = {number: signal.signal(number, late) for number in (signal.SIGALRM, signal.SIGPROF)}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    signal.alarm(10 * SECONDS)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.setitimer(signal.ITIMER_PROF, 0)
        for number, handler in before.items():
            signal.signal(number, handler)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) / 1000
        if grown > MEGABYTES:
            raise AssertionError(f"it took {grown:.0f} MB")


def run(seed: int, cases: int, only: str | None = None, seconds: float | None = None) -> tuple[Counter[str], list[str]]:
    """How many cases of each kind succeeded or were refused, and what went wrong. Ends after `seconds`, if given."""
    counts: Counter[str] = Counter()
    wrong: list[str] = []
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as place, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        readers = Readers(Path(place))
        kinds = [only] if only else readers.kinds()
        for case in range(cases):
            if seconds is not None and time.monotonic() - started > seconds:
                break
            kind = kinds[case % len(kinds)]
            try:
                with bounded(), contextlib.redirect_stderr(io.StringIO()):
                    getattr(readers, f"read_{kind}")(random.Random(f"{seed} {case}"))
                counts[f"{kind}: read"] += 1
            except GlitError as error:
                counts[f"{kind}: refused"] += 1
                if "\n" in str(error) or len(str(error)) > 9000:
                    wrong.append(
                        f"{kind} {seed} {case}: a message of {len(str(error))} characters: {str(error)[:300]!r}"
                    )
            except Exception:
                counts[f"{kind}: WRONG"] += 1
                wrong.append(f"{kind} {seed} {case}: {traceback.format_exc(limit=-4)}")
    return counts, wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--only", metavar="KIND")
    args = parser.parse_args()
    counts, wrong = run(args.seed, args.cases, args.only)
    print("\n".join([*wrong, *(f"{count:6} {name}" for name, count in sorted(counts.items()))]))
    print(f"seed {args.seed}: {counts.total()} cases, {len(wrong)} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
