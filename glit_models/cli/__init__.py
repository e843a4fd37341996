"""The `glit` command: parse arguments, call the package, print results.

A command consists of `add_<name>(commands)`, which declares its arguments, and `_run_<name>(args) -> int`, which
imports what it needs, prints, and returns the exit status: 0, or 1 if the work was done but problems were found. Bad
input raises a GlitError, which `main` prints. To add a command, write both functions and add the first to `_COMMANDS`.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence

from .. import __version__
from ..errors import GlitError, failure_of_machine
from ..extensions import import_module
from . import deploying, images, scoring, searching, training, weights
from .common import Commands, echo, spelled

__all__ = ["main", "make_parser"]

_COMMANDS: tuple[Callable[[Commands], None], ...] = (
    weights.add_list,
    weights.add_info,
    images.add_predict,
    images.add_explain,
    images.add_demo,
    training.add_train,
    searching.add_search,
    training.add_finetune,
    scoring.add_eval,
    scoring.add_embed,
    weights.add_convert,
    weights.add_publish,
    weights.add_verify,
    training.add_fractals,
    deploying.add_export,
    deploying.add_serve,
    deploying.add_bench,
)


def make_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line; docs/hooks.py generates the reference from it."""
    parser = argparse.ArgumentParser(prog="glit", description="GLiT vision transformers: models, weights, the Hub.")
    parser.add_argument("--version", action="version", version=f"glit-models {__version__}")
    parser.add_argument(
        "--import", dest="modules", metavar="MODULE", action="append", default=[],
        help="import a Python module that registers custom parts, families or targets",
    )  # fmt: skip
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for add in _COMMANDS:
        add(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's arguments) and return its exit status."""
    try:
        args = make_parser().parse_args(argv)
    except SystemExit as stop:  # argparse has printed the help or the error
        return int(stop.code or 0)
    try:
        for module in args.modules:
            import_module(module, f"--import {module}", GlitError)
        status: int = args.run(args)
        sys.stdout.flush()
        return status
    except GlitError as error:
        echo(f"glit: {spelled(error.message, args)}", error=True)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader has closed the pipe; without this, Python would print an error when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (RuntimeError, MemoryError, OSError) as error:
        known = failure_of_machine(error)
        if known is None:
            raise
        echo(f"glit: {spelled(known.message, args)}", error=True)
        return 2
