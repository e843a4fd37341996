"""Shared code of the commands: declare them, and print tables and JSON."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ..errors import UNPRINTABLE, Argument, Message, printable

__all__ = [
    "Commands",
    "add_command",
    "add_device",
    "add_run_options",
    "echo",
    "model_identity",
    "print_json",
    "print_table",
    "spelled",
]

Commands = Any  # argparse has no public name for what `add_subparsers` returns


def add_command(
    commands: Commands,
    name: str,
    run: Callable[[argparse.Namespace], int],
    text: str,
    options: Mapping[str, str] = MappingProxyType({}),
) -> argparse.ArgumentParser:
    """Add a command and return its parser; `run` is called with the parsed arguments.

    Args:
        options: for messages: the option's `dest`, or the recipe's key, of each library argument that has another name.
    """
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    parser.set_defaults(run=run, parser=parser, options=options)
    return parser


def spelled(message: Message, args: argparse.Namespace) -> str:
    """The text of a message, with arguments written as the options of the command that parsed `args`."""
    return message.spelled(lambda argument: _option(argument, args))


def _option(argument: Argument, args: argparse.Namespace) -> str:
    """Write an argument as an option: `--force` for `force=True`; for a key of a recipe `--set KEY=VALUE`.

    Arguments without an option are written as in Python.
    """
    dest = args.options.get(argument.name, argument.name)
    action = next((action for action in args.parser._actions if action.dest == dest), None)
    value = argument.value
    if action is None:
        argument = argument._replace(name=dest)
        if "." not in argument.name or value is None:
            return str(argument)
        text = "VALUE" if value is ... else value if isinstance(value, str) else json.dumps(value)
        return f"--set {argument.name}={text}"
    metavar = action.metavar if isinstance(action.metavar, str) else action.dest.upper()
    name = next((option for option in action.option_strings if option.startswith("--")), metavar)
    if value is None or action.nargs == 0:  # a flag takes no value
        return name
    if value is ...:
        return name if name == metavar else f"{name} {metavar}"
    return f"{name} {value}"


def echo(line: str, error: bool = False) -> None:
    """Print a line, to stderr if `error`, with control characters escaped, because names may be untrusted."""
    print(printable(line), file=sys.stderr if error else sys.stdout, flush=error)


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add the option --device; see `predict.pick_device`."""
    parser.add_argument("--device", help="cpu, cuda, ... (default: the GPU if there is one)")


def add_run_options(parser: argparse.ArgumentParser, set_help: str) -> None:
    """Add the options of a command that trains: overrides of its recipe, the device, a time limit."""
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=set_help)
    add_device(parser)
    parser.add_argument("--max-minutes", type=float, metavar="M", help="save and exit with status 3 after M minutes")


def model_identity(name: str) -> dict[str, str | None]:
    """Identify a model in a file of results that can be resumed: its name, and a hash of its file."""
    from ..weights.files import WEIGHTS_FILE, sha256_of

    file = Path(name) / WEIGHTS_FILE if Path(name).is_dir() else Path(name)
    return {"model": name, "sha256": sha256_of(file) if file.is_file() else None}


def print_json(data: Any) -> None:
    """Print data as indented JSON."""
    print_json_text(json.dumps(data, indent=2, ensure_ascii=False))


def print_json_text(text: str) -> None:
    """Print JSON, with control characters escaped."""
    lines = (UNPRINTABLE.sub(lambda match: f"\\u{ord(match[0]):04x}", line) for line in text.split("\n"))
    print("\n".join(lines))


def print_table(title: str | None, columns: Sequence[tuple[str, str]], rows: Sequence[Sequence[str]]) -> None:
    """Print a table; a column is its name and 'left' or 'right'."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(title=None if title is None else printable(title), box=box.SIMPLE_HEAD, title_justify="left")
    for name, justify in columns:
        table.add_column(name, justify="right" if justify == "right" else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(printable, row))
    console = Console(markup=False, highlight=False, emoji=False)
    if not console.is_terminal:
        console.width = 120  # for a file or a pipe
    with console.capture() as captured:  # rich would exit on a broken pipe with another status
        console.print(table)
    print(captured.get(), end="")
