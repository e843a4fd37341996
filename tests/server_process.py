"""A server in a process of its own, for tests."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path


def free_ports(count: int) -> list[str]:
    """Ports of this machine that nothing listens on."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [str(bound.getsockname()[1]) for bound in sockets]
    for bound in sockets:
        bound.close()
    return ports


@contextlib.contextmanager
def server_process(
    command: Sequence[str | Path], ready: str, folder: Path, environment: Mapping[str, str], seconds: float = 60
) -> Iterator[None]:
    """Run a server in a folder until the block ends; the block begins once the address `ready` answers with 200."""
    log = folder / "log"
    with log.open("w") as to:
        process = subprocess.Popen(
            command, env={**os.environ, **environment}, cwd=folder, stdout=to, stderr=subprocess.STDOUT
        )
    try:
        deadline = time.monotonic() + seconds
        while not _answers(ready):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        yield
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=5):
            return True
    except urllib.error.HTTPError as error:
        error.close()
    except OSError:  # it does not listen yet
        pass
    return False
