"""Tables of extension points by name: families, parts, search methods, fitnesses, export targets.

A name is a key of a table. In a recipe or on the command line, a user may also write `module:Name` for an object of an
importable module. Data from other sources (specs, configurations of weights) never triggers an import; call the
register function first.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

from .errors import GlitError, first_line

__all__ = ["IMPORTED", "Table", "import_module"]

IMPORTED: dict[str, None] = {}  # user modules, in order of import

T = TypeVar("T")


class Table(Generic[T]):
    """Entries of one kind by name, in order of registration.

    Args:
        what: the kind, for error messages: 'part', 'search method'.
        base: the class that entries are subclasses or instances of.
        error: the exception to raise on an unknown name or a wrong object.
    """

    def __init__(self, what: str, base: type, error: type[GlitError]) -> None:
        self.what, self.base, self.error = what, base, error
        self._entries: dict[str, T] = {}

    def register(self, name: str, entry: T) -> T:
        """Add an entry. Raises the table's error if the name is taken by another, or the entry is incomplete."""
        self._check(name, entry)
        known = self._entries.get(name)
        if known is not None and _source(known) != _source(entry):
            raise self.error(f"{self.what} {name!r} exists already ({_source(known)}); take another name")
        self._entries[name] = entry
        return entry

    def register_class(self, attribute: str) -> Callable[[type], type]:
        """A class decorator that registers classes under the value of one of their attributes."""

        def decorate(cls: type) -> type:
            name = getattr(cls, attribute, None)
            if not isinstance(name, str):
                raise self.error(f"{cls.__module__}.{cls.__qualname__} lacks the class attribute {attribute!r}")
            self.register(name, cls)  # type: ignore[arg-type]
            return cls

        return decorate

    def __getitem__(self, name: str) -> T:
        """The entry of this name; imports nothing. Raises the table's error if there is none."""
        if isinstance(name, str) and name in self._entries:
            return self._entries[name]
        raise self._unknown(name, "")

    def get(self, name: object) -> T | None:
        """The entry of this name, or None; imports nothing."""
        return self._entries.get(name) if isinstance(name, str) else None

    def find(self, name: str) -> T:
        """The entry of this name, or the object `module:Name`, which is imported.

        Raises:
            GlitError: of the table's type, if there is none, the module cannot be imported, or the object is wrong.
        """
        if name in self._entries:
            return self._entries[name]
        if isinstance(name, str) and ":" in name:
            entry = self._import(name)
            self._check(name, entry)
            return entry
        raise self._unknown(name, ", or module:Name")

    def _unknown(self, name: object, others: str) -> GlitError:
        near = difflib.get_close_matches(str(name), self._entries, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        return self.error(f"unknown {self.what} {name!r}; known: {', '.join(sorted(self._entries))}{others}{hint}")

    def _import(self, name: str) -> Any:
        module_name, _, attribute = name.partition(":")
        module = import_module(module_name, f"{self.what} {name!r}", self.error)
        if not hasattr(module, attribute):
            raise self.error(f"{self.what} {name!r}: {module_name} has no {attribute!r}")
        return getattr(module, attribute)

    def _check(self, name: str, entry: object) -> None:
        if isinstance(entry, type):
            if not issubclass(entry, self.base):
                raise self.error(f"{self.what} {name!r} must be a subclass of {self.base.__name__}, got {entry!r}")
            missing = getattr(entry, "__abstractmethods__", ())
            if missing:
                raise self.error(f"{self.what} {name!r} lacks {', '.join(sorted(missing))}")
        elif not isinstance(entry, self.base):
            raise self.error(f"{self.what} {name!r} must be a {self.base.__name__}, got {type(entry).__name__}")

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def values(self) -> list[T]:
        """The entries, in order of registration."""
        return list(self._entries.values())


def _source(entry: object) -> str:
    """Where an object is defined, which stays the same if the module is imported again."""
    cls = entry if isinstance(entry, type) else type(entry)
    name = getattr(entry, "name", "") if not isinstance(entry, type) else ""
    return f"{cls.__module__}.{cls.__qualname__}{f' {name}' if name else ''}"


def import_module(name: str, what: str, error: type[GlitError]) -> Any:
    """Import the module `name`. Raises `error`, which begins with `what`, if it cannot be imported."""
    try:
        module = importlib.import_module(name)
        IMPORTED[name] = None
        return module
    except ModuleNotFoundError as missing:
        if missing.name == name or name.startswith(f"{missing.name}."):
            raise error(f"{what}: there is no module {name!r}; is its folder in PYTHONPATH?") from None
        raise error(f"{what}: module {name!r} cannot be imported: {first_line(missing)}") from None
    except GlitError:
        raise
    except Exception as failure:
        raise error(f"{what}: module {name!r} cannot be imported: {first_line(failure)}") from None
