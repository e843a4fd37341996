"""Tests of messages that name arguments: as arguments in Python, as options on the command line."""

from __future__ import annotations

import argparse
import json
import pickle
from pathlib import Path

import pytest

from glit_models.cli import main
from glit_models.cli.common import add_command, add_run_options, print_json, print_table, spelled
from glit_models.data import open_splits
from glit_models.errors import UNPRINTABLE, Argument, DataError, Message, WriteError, printable
from glit_models.runs.console import say
from glit_models.training import load_recipe
from glit_models.training.feed import open_data

FIXTURES = Path(__file__).parent / "fixtures"
NAMED = [
    (Argument("root"), "root", "--root"),
    (Argument("out", ...), "out=...", "--out DIR"),
    (Argument("force", True), "force=True", "--force"),
    (Argument("precision", "fp16"), "precision='fp16'", "--precision fp16"),
    (Argument("num_workers"), "num_workers", "--workers"),
    (Argument("folder", ...), "folder=...", "PLACE"),
    (Argument("data.download", True), "data.download=True", "--set data.download=true"),
    (Argument("data.hold_out", ...), "data.hold_out=...", "--set data.hold_out=VALUE"),
    (Argument("data.hold_out"), "data.hold_out", "data.hold_out"),
    (Argument("nowhere", 1), "nowhere=1", "nowhere=1"),
]


@pytest.fixture
def args() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    options = {"num_workers": "workers"}
    command = add_command(parser.add_subparsers(), "do", lambda args: 0, "Do it.", options)
    command.add_argument("folder", metavar="PLACE")
    command.add_argument("--out", "-o", metavar="DIR")
    for name in ("--root", "--precision", "--workers"):
        command.add_argument(name)
    command.add_argument("--force", action="store_true")
    add_run_options(command, "override")
    return parser.parse_args(["do", "here"])


@pytest.mark.parametrize(("argument", "python", "option"), NAMED)
def test_python_reads_the_argument_and_the_command_line_prints_its_option(
    argument: Argument, python: str, option: str, args: argparse.Namespace
) -> None:
    error = DataError("give ", argument, ", or none")
    assert str(error) == f"give {python}, or none"
    assert spelled(error.message, args) == f"give {option}, or none"


def test_an_error_crosses_processes_with_its_arguments(args: argparse.Namespace) -> None:
    for kind in (DataError, WriteError):
        error = pickle.loads(pickle.dumps(kind("set ", Argument("num_workers"), " lower")))
        assert (type(error), str(error)) == (kind, "set num_workers lower")
        assert spelled(error.message, args) == "set --workers lower"


def test_the_data_name_their_arguments_and_a_recipe_its_keys(tmp_path: Path) -> None:
    root = tmp_path / "nowhere"
    with pytest.raises(DataError, match=rf"^root {root}: no such folder$"):
        open_splits("folder", root)
    recipe = load_recipe(str(FIXTURES / "tiny.yaml"), {"data.dataset": "folder", "data.root": str(root)})
    with pytest.raises(DataError, match=rf"^data.root {root}: no such folder"):
        open_data(recipe)


def test_a_message_is_its_parts() -> None:
    assert str(Message("a ", Argument("b", 1), " c")) == "a b=1 c"


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["train", "finetune", "--out", "run"], "folder needs --set data.root=VALUE, the folder where it is"),
        (["search", "smoke", "--out", "run", "--set", "train.data.dataset=folder", "--set", "train.data.root=gone"],
         "train.data.root gone: no such folder"),
        (["train", "smoke", "--out", "run", "--set", "optim.epochs=0"],
         "optim.epochs must be from 1 to 1000000, got 0"),
    ],
)  # fmt: skip
def test_a_message_names_the_options_and_keys_of_its_own_command(
    command: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*command, "--device", "cpu"]) == 2
    assert capsys.readouterr().err == f"glit: {message}\n"


def test_what_a_terminal_would_act_upon_is_escaped_on_every_way_to_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evil = "\x1b[2Jdog\n\x9b31m\u202e\udcff"
    escaped = r"\x1b[2Jdog\n\x9b31m\u202e\udcff"
    assert printable(evil) == escaped
    image = tmp_path / evil / "not.png"
    image.parent.mkdir()
    image.write_bytes(b"no image")
    assert main(["predict", str(image)]) == 2
    assert capsys.readouterr().err == f"glit: {tmp_path}/{escaped}/not.png: not an image of a known format\n"
    assert main(["info", str(tmp_path / evil)]) == 2
    say(evil)
    assert capsys.readouterr().err.count("\n") == 2
    print_table(evil, [("class", "left")], [(evil,)])
    print_json({evil: [evil]})
    printed = capsys.readouterr().out
    assert printed.count(escaped) == 2
    assert not UNPRINTABLE.search(printed.replace("\n", ""))
    assert json.loads(printed[printed.index("{") :]) == {evil: [evil]}


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried\nC++"), "memory is short"),
        (OSError(36, "File name too long", "9" * 5000), f"{'9' * 200}: File name too long"),
        (MemoryError(), "memory is short (MemoryError); a smaller batch, image or network takes less"),
        (RuntimeError("DataLoader worker (pid 3) is killed by signal: Killed. "), "a process that loads data died"),
    ],
)
def test_a_failure_of_the_machine_is_one_line_wherever_it_is_raised(
    error: Exception, line: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("glit_models.training.trainer.Trainer.run", fail)
    recipe = str(FIXTURES / "tiny.yaml")
    assert main(["train", recipe, "--out", str(tmp_path), "--device", "cpu"]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"glit: {line}")
    assert err.count("\n") == 1
    monkeypatch.setattr("glit_models.training.trainer.Trainer.run", lambda *_: {}["a bug"])
    with pytest.raises(KeyError):
        main(["train", recipe, "--out", str(tmp_path), "--device", "cpu"])
