"""Measure how each command ends when the Hub fails: the seconds until its one-line error, for each kind of fault.

Every command must end with status 2 and one line, and must write nothing outside the client's cache.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, get_args

import timm
import torch
from huggingface_hub import constants
from PIL import Image

from glit_models.cli import main as glit
from glit_models.weights import download
from glit_models.weights.folder import save_folder
from tests.hub_server import Fault, HubServer

from . import report

REPO = "somebody/small"
BLOCK = {"num_global_heads": 2, "num_local_heads": 0, "mlp_ratio": 1, "qkv_ratio": 1}
FAULTS: dict[str, str] = {
    "no answer": "hang", "10 bytes a second": "slow", "silent TLS": "tls", "stops in the body": "stall",
    "429, Retry-After 3600": "429", "500": "500", "401": "401", "redirect loop": "loop", "connection reset": "reset",
    "half the body": "truncate", "too long a Content-Length": "long", "hostile ETag and commit": "elsewhere",
    "unknown host": "dns", "closed port": "closed",
}  # fmt: skip


def commands(place: Path) -> dict[str, list[str]]:
    """Each command with the repository as its model."""
    images, out = str(place / "images"), str(place / "out")
    return {
        "predict": ["predict", images, "--model", REPO],
        "eval": ["eval", REPO, images],
        "finetune": ["finetune", images, "--model", REPO, "--out", out],
        "embed": ["embed", images, "--model", REPO, "--out", f"{out}.csv"],
        "explain": ["explain", images, "--model", REPO, "--out", f"{out}.png"],
        "export": ["export", REPO, "--out", f"{out}.onnx"],
        "verify": ["verify", REPO],
    }


def make_inputs(place: Path) -> dict[str, bytes]:
    """Ten images of two classes in `place`; the files of a repository with a network of one block."""
    model = timm.create_model("glit_tiny", spec={"embed_dim": 8, "num_heads": 2, "patch_size": 8, "blocks": [BLOCK]},
                              img_size=16, num_classes=2)  # fmt: skip
    save_folder(model, place / "folder", class_names=["a", "b"])
    for number in range(10):
        path = place / "images" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16)).save(path)
    return {path.name: path.read_bytes() for path in (place / "folder").iterdir()}


def point_client_at(endpoint: str, place: Path) -> None:
    """Set what HF_ENDPOINT and HF_HOME would set if the client were imported after them."""
    constants.ENDPOINT = endpoint
    constants.HUGGINGFACE_CO_URL_TEMPLATE = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    constants.HF_HUB_CACHE = str(place / "hf")
    constants.HF_TOKEN_PATH = str(place / "token")


def ending(words: list[str], place: Path) -> tuple[float, int, str]:
    """Run a command in a fork of this process; returns seconds, status and stderr."""
    log = place / "stderr"
    began = time.monotonic()
    pid = os.fork()
    if not pid:
        with log.open("w") as err, open(os.devnull, "w") as out:
            os.dup2(err.fileno(), 2)
            os.dup2(out.fileno(), 1)
            status = 70
            try:
                status = glit(words)
            finally:
                sys.stderr.flush()
                os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return time.monotonic() - began, status, log.read_text()


def main() -> int:
    """Run every command with every fault and print the seconds; returns 1 if one ended in another way."""
    options = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    options.add_argument(
        "--faults", nargs="+", choices=FAULTS.values(), default=[*FAULTS.values()], help="default: all"
    )
    args = options.parse_args()
    torch.set_num_threads(1)
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    rows: list[dict[str, Any]] = []
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as folder, HubServer() as server, socket.socket() as silent:
        place = Path(folder)
        os.environ["GLIT_HOME"] = str(place / "home")
        server.add(REPO, make_inputs(place))
        silent.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{silent.getsockname()[1]}"
        endpoints = {"tls": closed.replace("http", "https"), "dns": "http://no-such-host.invalid", "closed": closed}
        for name, fault in sorted(FAULTS.items(), key=lambda item: item[1] == "tls"):  # after it the port is open
            if fault not in args.faults:
                continue
            if fault == "tls":
                silent.listen(64)
            server.fault = fault if fault in get_args(Fault) else ""
            point_client_at(endpoints.get(fault, server.endpoint), place)
            row: dict[str, Any] = {"the Hub": name}
            for command, words in commands(place).items():
                before = {path for path in place.iterdir() if path.name != "hf"} | {place / "stderr"}
                seconds, status, err = ending(words, place)
                row[command] = round(seconds, 1)
                lines = err.splitlines()
                after = {path for path in place.iterdir() if path.name != "hf"} - before
                outside = [*after, *place.rglob("outside*")]
                if status != 2 or len(lines) != 1 or not lines[0].startswith("glit: ") or outside:
                    wrong.append(f"{name}, {command}: status {status}, left {outside}, {json.dumps(err[-300:])}")
            rows.append(row)
    print(*wrong, sep="\n", file=sys.stderr)
    print(f"seconds to the end, GLIT_HUB_TIMEOUT {download.hub_timeout():g}; {len(wrong)} wrong\n")
    report.print_rows(rows)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
