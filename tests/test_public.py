"""Tests of the public interface: all names have a docstring and are in the reference; examples use no others."""

import argparse
import ast
import importlib
import importlib.util
import inspect
import itertools
import re
from pathlib import Path
from typing import Any

import pytest

from glit_models.cli import make_parser

ROOT = Path(__file__).parents[1]
PAGES = [path.read_text() for path in (ROOT / "docs" / "reference").glob("*.md")]
MODULES = sorted({name for text in PAGES for name in re.findall(r"^::: (\S+)$", text, re.MULTILINE)})
EXAMPLES = [
    *ROOT.glob("*.md"),
    *(path for path in (ROOT / "docs").rglob("*.md") if path.parent.name != "reference"),
    *(ROOT / "tests" / "extensions").glob("*.py"),
]


def public_names(module: str) -> list[str]:
    return importlib.import_module(module).__all__


def described_values() -> set[str]:
    """Names of module-level values that a docstring follows, in all three code folders."""
    found = set()
    for path in (path for folder in ("glit_models", "search", "export") for path in (ROOT / folder).rglob("*.py")):
        body = ast.parse(path.read_text(encoding="utf-8")).body
        for statement, following in itertools.pairwise(body):
            if isinstance(statement, ast.Assign | ast.AnnAssign) and ast.get_docstring(ast.Module([following], [])):
                target = statement.targets[0] if isinstance(statement, ast.Assign) else statement.target
                found.add(getattr(target, "id", ""))
    return found


def test_every_public_name_has_a_docstring() -> None:
    values = described_values()
    bare = [
        f"{module}.{name}"
        for module in MODULES
        for name in public_names(module)
        if name not in values and not _is_described(getattr(importlib.import_module(module), name))
    ]
    assert bare == []


def _is_described(value: Any) -> bool:
    return (inspect.isclass(value) or inspect.isroutine(value)) and bool(vars(value).get("__doc__") or value.__doc__)


def test_every_public_package_stands_in_the_reference() -> None:
    assert {"glit_models", "glit_models.parts", "glit_models.search", "glit_models.export"} <= set(MODULES)
    index = (ROOT / "docs" / "reference" / "api.md").read_text()
    assert [module for module in MODULES if module.removeprefix("glit_models.") not in index] == []


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: str(path.relative_to(ROOT)))
def test_examples_import_public_names_alone(path: Path) -> None:
    found = re.findall(r"^from (glit_models[\w.]*) import ([\w, ]+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    private = [
        f"{module}.{name}"
        for module, names in found
        for name in names.split(", ")
        if module not in MODULES or name not in public_names(module)
    ]
    assert private == []


def test_the_reference_of_the_command_line_has_every_option_of_every_command() -> None:
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
    hooks: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    page = hooks.cli_reference()
    (commands,) = (action for action in make_parser()._actions if isinstance(action, argparse._SubParsersAction))
    for name, command in commands.choices.items():
        (section,) = re.findall(rf"^## glit {name}$(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)
        for action in command._actions:
            for option in action.option_strings[-1:] if action.dest != "help" else ():
                assert option in section, f"glit {name} {option}"
