"""Read untrusted text: files of limited size, and JSON and YAML of limited size and nesting."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["is_file", "parse_json", "parse_yaml", "read_text"]

_MAX_BYTES = 1 << 20
_MAX_YAML_CHARS = 1 << 16  # a recipe takes 3 kB; reading this much takes two seconds
_MAX_VALUES = 100_000
_MAX_NESTING = 50


def is_file(path: str | os.PathLike[str]) -> bool:
    """Whether a file exists; False for a path that is too long."""
    try:
        return Path(path).is_file()
    except OSError:
        return False


def read_text(path: str | os.PathLike[str], max_bytes: int = _MAX_BYTES) -> str:
    """Read a UTF-8 file. Raises OSError, or ValueError in one line if it is too large or not text."""
    with Path(path).open("rb") as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise ValueError(f"larger than {max_bytes:,} bytes")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        raise ValueError("not text in UTF-8") from None


def parse_json(text: str) -> Any:
    """Parse JSON. Raises ValueError in one line if it is invalid, too large or too deeply nested."""
    try:
        data = json.loads(text)
    except RecursionError:
        raise ValueError(f"nested more than {_MAX_NESTING} deep") from None
    except ValueError as error:
        raise ValueError(f"not valid JSON: {error}") from None
    _check_extent(data)
    return data


def parse_yaml(text: str) -> Any:
    """Parse YAML. Raises ValueError in one line if it is invalid, too large (with aliases expanded) or too deep."""
    import yaml

    if len(text) > _MAX_YAML_CHARS:
        raise ValueError(f"longer than {_MAX_YAML_CHARS:,} characters")
    try:
        data = yaml.load(text, _bounded_loader())
    except _TooDeepError as error:
        raise ValueError(str(error)) from None
    except (yaml.YAMLError, ValueError, TypeError, AttributeError) as error:  # from YAML, or on an invalid number
        raise ValueError(f"not valid YAML: {' '.join(str(error).split())}") from None
    _check_extent(data)
    return data


class _TooDeepError(Exception):
    def __init__(self) -> None:
        super().__init__(f"nested more than {_MAX_NESTING} deep")


@functools.cache
def _bounded_loader() -> Any:
    """PyYAML's safe loader, modified to reject deep nesting at once instead of after seconds."""
    from yaml import SafeLoader

    class Loader(SafeLoader):
        depth = 0

        def compose_node(self, parent: Any, index: Any) -> Any:
            self.depth += 1
            if self.depth > _MAX_NESTING + 1:
                raise _TooDeepError
            node = super().compose_node(parent, index)
            self.depth -= 1
            return node

    return Loader


def _check_extent(data: Any) -> None:
    """Limit the size with aliases expanded: a few lines of YAML aliases can stand for more than fits in memory."""
    count, rest = 0, [(data, 0)]
    while rest:
        value, depth = rest.pop()
        if not isinstance(value, (Mapping, list, tuple, set)):
            continue
        if depth == _MAX_NESTING:
            raise ValueError(f"nested more than {_MAX_NESTING} deep")
        count += len(value)
        if count > _MAX_VALUES:
            raise ValueError(f"holds more than {_MAX_VALUES:,} values")
        rest += [(item, depth + 1) for item in (value.values() if isinstance(value, Mapping) else value)]
