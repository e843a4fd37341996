"""What all commands share: how they are declared, and how they print tables and JSON."""

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
    """A command's parser, whose `run` is called with what it reads.

    Args:
        options: the option's `dest`, or the recipe's key, for each argument of the library that has another name; for
            messages.
    """
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    parser.set_defaults(run=run, parser=parser, options=options)
    return parser


def spelled(message: Message, args: argparse.Namespace) -> str:
    """The text of a message, with the options of the command that read `args` where it names arguments."""
    return message.spelled(lambda argument: _option(argument, args))


def _option(argument: Argument, args: argparse.Namespace) -> str:
    """`--force` for `force=True`; of a command that takes a recipe, `--set KEY=VALUE` for what has no own option.

    What the command has no option for is written as in Python.
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
    """Print a line, to stderr if `error`, with what a terminal would act upon escaped: names may be anybody's."""
    print(printable(line), file=sys.stderr if error else sys.stdout, flush=error)


def add_device(parser: argparse.ArgumentParser) -> None:
    """The option of where to compute, as `predict.pick_device` takes it."""
    parser.add_argument("--device", help="cpu, cuda, ...; the GPU if there is one unless given")


def add_run_options(parser: argparse.ArgumentParser, set_help: str) -> None:
    """The options of a command that trains: overrides of its recipe, the device, a limit of time."""
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=set_help)
    add_device(parser)
    parser.add_argument("--max-minutes", type=float, metavar="M", help="save and leave after so long, with status 3")


def model_identity(name: str) -> dict[str, str | None]:
    """What tells a model from others in a file of results that is gone on with: its name, and a hash of its file."""
    from ..weights.files import WEIGHTS_FILE, sha256_of

    file = Path(name) / WEIGHTS_FILE if Path(name).is_dir() else Path(name)
    return {"model": name, "sha256": sha256_of(file) if file.is_file() else None}


def print_json(data: Any) -> None:
    """Print data as indented JSON."""
    text = json.dumps(data, indent=2, ensure_ascii=False)
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
        console.width = 120  # in a file or a pipe there is no width to keep to
    with console.capture() as captured:  # rich would answer a broken pipe with an exit status of its own
        console.print(table)
    print(captured.get(), end="")
