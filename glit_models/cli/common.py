"""What all commands share: how they are declared, and how they print tables and JSON."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["Commands", "add_command", "add_device", "add_run_options", "print_json", "print_table"]

Commands = Any  # argparse has no public name for what `add_subparsers` returns


def add_command(
    commands: Commands, name: str, run: Callable[[argparse.Namespace], int], text: str
) -> argparse.ArgumentParser:
    """A command's parser, whose `run` is called with what it reads."""
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    parser.set_defaults(run=run)
    return parser


def add_device(parser: argparse.ArgumentParser) -> None:
    """The option of where to compute, as `predict.pick_device` takes it."""
    parser.add_argument("--device", help="cpu, cuda, ...; the GPU if there is one unless given")


def add_run_options(parser: argparse.ArgumentParser, set_help: str) -> None:
    """The options of a command that trains: overrides of its recipe, the device, a limit of time."""
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=set_help)
    add_device(parser)
    parser.add_argument("--max-minutes", type=float, metavar="M", help="save and leave after so long")


def print_json(data: Any) -> None:
    """Print data as indented JSON."""
    print(json.dumps(data, indent=2, ensure_ascii=False))


def print_table(title: str | None, columns: Sequence[tuple[str, str]], rows: Sequence[Sequence[str]]) -> None:
    """Print a table; a column is its name and 'left' or 'right'."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    for name, justify in columns:
        table.add_column(name, justify="right" if justify == "right" else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console = Console(markup=False, highlight=False, emoji=False)
    if not console.is_terminal:
        console.width = 120  # in a file or a pipe there is no width to keep to
    with console.capture() as captured:  # rich would answer a broken pipe with an exit status of its own
        console.print(table)
    print(captured.get(), end="")
