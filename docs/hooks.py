"""Generate pages of the site from other files when `make docs` builds it.

The README is the home page; CHANGELOG, CONTRIBUTING, SECURITY and the cards of the shipped weights are pages too; the
command-line reference is generated from the parsers. Links between files of the repository become links between pages.
"""

from __future__ import annotations

import argparse
import importlib
import os
import posixpath
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
CARDS = "glit_models/weights"
# Files outside docs/, and their places on the site.
PROJECT_FILES = {
    "README.md": "index.md",
    "CHANGELOG.md": "project/changelog.md",
    "CONTRIBUTING.md": "project/contributing.md",
    "SECURITY.md": "project/security-policy.md",
    f"{CARDS}/glit_tiny.fractal1k/README.md": "project/glit_tiny.fractal1k.md",
    f"{CARDS}/glit_tiny.fashion_mnist/README.md": "project/glit_tiny.fashion_mnist.md",
}
CARD_FIGURES = {
    source.replace("README.md", "architecture.png"): page.replace(".md", ".png")
    for source, page in PROJECT_FILES.items()
    if source.startswith(CARDS)
}
CLI_PAGE = "reference/cli.md"
_LOADED = re.compile(
    r'<(script|img|iframe)\b[^>]*\bsrc="(https?:)?//[^"]*"|<link rel="stylesheet" href="(https?:)?//[^"]*"'
)
_LINK = re.compile(r"(\]\()([^)#:\s]+)(#[^)\s]*)?(\))")


def on_startup(**_: object) -> None:
    """Copy the code of the three folders into build/api under its import paths, where mkdocstrings reads it."""
    api = ROOT / "build" / "api"
    shutil.rmtree(api, ignore_errors=True)
    for folder, package in (("glit_models", ""), ("search", "search"), ("export", "export")):
        for path in (ROOT / folder).rglob("*.py"):
            target = api / "glit_models" / package / path.relative_to(ROOT / folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Add the pages that have no file in docs/."""
    from mkdocs.structure.files import File

    for source, page in PROJECT_FILES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        text = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)  # a card's metadata for the Hub
        files.append(File.generated(config, page, content=text))
    for source, page in CARD_FIGURES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    files.append(File.generated(config, CLI_PAGE, content=cli_reference()))


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrite links between files of the repository to links between pages."""
    there = page.file.src_uri
    moved = PROJECT_FILES | CARD_FIGURES
    source = next((name for name, uri in moved.items() if uri == there), f"docs/{there}")

    def relink(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), match[2]))
        uri = moved.get(target, target.removeprefix("docs/"))
        return f"{match[1]}{posixpath.relpath(uri, posixpath.dirname(there) or '.')}{match[3] or ''}{match[4]}"

    return _LINK.sub(relink, markdown)


def on_post_build(config: MkDocsConfig) -> None:
    """Raise PluginError if a public name is not in the reference, or a page loads something from another site."""
    from mkdocs.exceptions import PluginError

    for path in Path(config.site_dir).rglob("*.html"):
        if loaded := _LOADED.search(path.read_text(encoding="utf-8")):
            raise PluginError(f"{path.name} loads {loaded[0]}")
    written = "".join(path.read_text(encoding="utf-8") for path in Path(config.site_dir, "reference").glob("*.html"))
    sources = "".join(path.read_text(encoding="utf-8") for path in Path(config.docs_dir, "reference").glob("*.md"))
    for module in re.findall(r"^::: (\S+)$", sources, re.MULTILINE):
        for name in importlib.import_module(module).__all__:
            if f'id="{module}.{name}"' not in written:
                raise PluginError(f"the reference lacks {module}.{name}; has it a docstring?")


def cli_reference() -> str:
    """The page of the `glit` command, with the usage and options of every command."""
    from glit_models.cli import make_parser

    os.environ["COLUMNS"] = "82"  # for the usage lines
    parser = make_parser()
    lines = ["# Command line", "", "`glit COMMAND --help` prints the same.", "", *_describe(parser)]
    for name, command in _commands(parser).items():
        lines += [f"## glit {name}", "", command.description or "", "", *_describe(command)]
    return "\n".join(lines) + "\n"


def _commands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The parser of each command, by its name."""
    (action,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return dict(action.choices)


def _describe(parser: argparse.ArgumentParser) -> Iterator[str]:
    yield from ("```text", parser.format_usage().strip(), "```", "", "| argument | meaning |", "|---|---|")
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction | argparse._HelpAction):
            continue
        name = ", ".join(action.option_strings) or str(action.metavar or action.dest)
        if action.option_strings and action.nargs != 0:
            choices = "{" + ",".join(action.choices) + "}" if action.choices else action.dest.upper()
            value = action.metavar or choices
            name += f" {value if isinstance(value, str) else ' '.join(value)}"
        yield f"| `{name}` | {_cell(action.help or '')} |"
    yield ""


def _cell(text: str) -> str:
    return text.replace("%%", "%").replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")
