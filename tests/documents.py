"""Run the fenced blocks of README and tutorials, in order, in the current folder.

A block with a title is written to a file. Python blocks share their names. Shell blocks are run line by line: `glit` in
this process, `glit ... &` as a separate process that `kill %1` ends, anything else with bash.
"""

from __future__ import annotations

import contextlib
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from glit_models.cli import main

BLOCK = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)


def blocks_of(path: Path) -> list[tuple[str, str, str]]:
    """Language, title and text of each fenced block."""
    return BLOCK.findall(path.read_text(encoding="utf-8"))


def run_blocks(blocks: Iterable[tuple[str, str, str]], patch: pytest.MonkeyPatch) -> None:
    """Run blocks in order; an error or a status other than 0 raises."""
    names: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        for language, title, text in blocks:
            if title:
                Path(title).write_text(text)
            elif language == "python":
                exec(compile(text, repr(text[:60]), "exec"), names)
            elif language == "sh":
                _run_lines(text, patch, stack)


def _run_lines(text: str, patch: pytest.MonkeyPatch, stack: contextlib.ExitStack) -> None:
    started: list[subprocess.Popen[bytes]] = []
    for line in filter(None, text.replace("\\\n", " ").split("\n")):
        words = shlex.split(line, comments=True)
        if words[:2] == ["pip", "install"]:
            continue
        if words[0] == "export":
            name, _, value = words[1].partition("=")
            patch.setenv(name, value)
            if name == "PYTHONPATH":
                patch.syspath_prepend(str(Path(value).absolute()))
        elif words[-1] == "&":
            process = subprocess.Popen([sys.executable, "-m", "glit_models", *words[1:-1]])
            started.append(process)
            stack.callback(process.kill)
        elif words[:2] == ["kill", "%1"]:
            started[0].terminate()
            assert started[0].wait(30) == 143, line
        elif words[0] == "glit":
            assert main(words[1:]) == 0, line
        else:
            subprocess.run(["bash", "-ec", line], check=True)
