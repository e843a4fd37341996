"""The base class of specs: an immutable description of a network that validates itself and round-trips as JSON.

A family subclasses `Spec` (the whole network) and describes its blocks with frozen dataclasses. All other modules
(cost, model, search, figures, export) get the parts of a block from the spec and never look at a family's fields.
Standard library only.
"""

from __future__ import annotations

import dataclasses
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar

from . import reading
from .errors import SpecError

if TYPE_CHECKING:
    from .parts import BlockParts

__all__ = [
    "MAX_BLOCKS",
    "MAX_SIZE",
    "Spec",
    "check_depth",
    "check_fields",
    "check_int",
    "check_odd",
    "check_ratio",
    "parse_blocks",
    "read_spec_file",
]

T = TypeVar("T")

MAX_BLOCKS = 1000
MAX_SIZE = 1 << 16  # of widths, heads, kernels; larger ones overflow the counts of parameters and multiply-adds


def check_int(name: str, value: Any, minimum: int) -> None:
    """Raise SpecError unless `value` is an integer of at least `minimum`, and at most 65,536."""
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise SpecError(f"{name} must be an integer of at least {minimum}, got {value!r}")
    if value > MAX_SIZE:
        raise SpecError(f"{name} must be at most {MAX_SIZE}, got {_short(value)}")


def check_odd(name: str, value: Any) -> None:
    """Raise SpecError unless `value` is an odd positive integer below 65,536."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1 or value % 2 == 0 or value > MAX_SIZE:
        below = f" and below {MAX_SIZE}" if isinstance(value, int) and value > MAX_SIZE else ""
        raise SpecError(f"{name} must be odd and positive{below}, got {_short(value)}")


def check_ratio(name: str, value: Any) -> None:
    """Raise SpecError unless `value` is a positive finite number of at most 65,536."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
        raise SpecError(f"{name} must be a positive finite number, got {value!r}")
    if value > MAX_SIZE:
        raise SpecError(f"{name} must be at most {MAX_SIZE}, got {_short(value)}")


def check_depth(blocks: Sequence[Any]) -> None:
    """Raise SpecError unless there are from 1 to 1,000 blocks."""
    if not blocks:
        raise SpecError("blocks must hold at least one block, got none")
    if len(blocks) > MAX_BLOCKS:
        raise SpecError(f"blocks must hold at most {MAX_BLOCKS} blocks, got {len(blocks)}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."


def check_fields(cls: type, where: str, data: Any, extra: tuple[str, ...] = ()) -> dict[str, Any]:
    """Check `data` and return it as keyword arguments of the dataclass `cls`.

    Args:
        cls: the dataclass.
        where: name of `data` in errors.
        data: a mapping with all required fields of `cls`, and with no keys besides its fields and `extra`.
        extra: names that are allowed in addition to the fields.

    Raises:
        SpecError: names the unknown or missing field.
    """
    if not isinstance(data, Mapping):
        raise SpecError(f"{where} must be an object of named fields, got {type(data).__name__}")
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    for key in data:
        if key not in fields and key not in extra:
            raise SpecError(f"{where} has an unknown field {key!r}; known: {', '.join((*fields, *extra))}")
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in data:
            raise SpecError(f"{where} lacks the field {name!r}")
    return dict(data)


def parse_blocks(value: Any, parse: Callable[[Any], T]) -> tuple[T, ...]:
    """Parse the blocks of a spec from a list of plain values, each with `parse`. Raises SpecError; names the block."""
    if not isinstance(value, (list, tuple)):
        raise SpecError(f"blocks must be a list, got {type(value).__name__}")
    check_depth(value)
    blocks = []
    for index, block in enumerate(value):
        try:
            blocks.append(parse(block))
        except SpecError as error:
            separator = " " if str(error).startswith("block ") else "."
            raise SpecError(f"blocks[{index}]{separator}{str(error).removeprefix('block ')}") from None
    return tuple(blocks)


class Spec(ABC):
    """A spec of a network of some family. Subclasses are frozen dataclasses with at least these fields.

    Attributes:
        family: name of the family (class attribute).
        symbols: the paper's letters for fields of a block, in the order of tables (class attribute).
        block_class: the dataclass that describes a block (class attribute).
        leading_genes: genes of a block that determine which other genes matter, for a search (class attribute).
        first_stage: if a family's leading genes can be searched in a separate stage, the values of all other genes in
            that stage; else None (class attribute).
        blocks: one description per block, first to last; each family has its type.
        embed_dim: C, channels of a token.
        patch_size: side of a square patch, in pixels.
    """

    family: ClassVar[str]
    symbols: ClassVar[Mapping[str, str]] = {}
    block_class: ClassVar[type]
    leading_genes: ClassVar[tuple[str, ...]] = ()
    first_stage: ClassVar[Mapping[str, Any] | None] = None
    blocks: tuple[Any, ...]
    embed_dim: int
    patch_size: int

    @abstractmethod
    def block_parts(self, index: int) -> BlockParts:
        """The parts of block `index`, with their sizes."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Plain values, as stored in JSON and in a Hub `config.json`."""

    @classmethod
    @abstractmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`. Raises SpecError on an unknown, missing or impossible field."""

    @property
    def summary(self) -> str:
        """A short description of the sizes that all blocks share."""
        return f"{self.depth} blocks, width {self.embed_dim}, patch {self.patch_size}"

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    # ---- genes that a search may vary ----

    @classmethod
    def known_genes(cls, choices: Mapping[str, Sequence[Any]]) -> tuple[str, ...]:
        """The names of all genes that a block may have, in the order of its fields; by default its fields.

        Args:
            choices: values by gene, some of which may add genes.
        """
        return tuple(field.name for field in dataclasses.fields(cls.block_class))

    @classmethod
    def block_from_genes(cls, genes: Mapping[str, Any], network: Mapping[str, Any]) -> Any:
        """Build a block from genes; genes that have no effect with these values are ignored.

        Args:
            genes: values by gene; missing ones get the block's defaults.
            network: the spec's other fields, except `embed_dim`.

        Raises:
            SpecError: names the gene, the value and the bound.
        """
        return cls.block_class(**genes)

    @classmethod
    def genes_of(cls, block: Any) -> dict[str, Any]:
        """The genes of a block in the order in which a search changes them; None for those that have no effect."""
        return {name: getattr(block, name) for name in cls.known_genes({})}

    def block_table(self) -> tuple[dict[str, str], list[dict[str, Any]]]:
        """The blocks as a table: headings by field, in order, and one row of plain values per block."""
        rows = [block.to_dict() for block in self.blocks]
        names = dict.fromkeys(name for row in rows for name in row)
        ordered = sorted(names, key=lambda name: [*self.symbols, name].index(name))
        return {name: self.symbols.get(name, name.replace("_", " ")) for name in ordered}, rows

    def to_json(self, indent: int | None = 2) -> str:
        """The spec as JSON text."""
        return json.dumps(self.to_dict(), indent=indent)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The inverse of `to_json`. Raises SpecError on text that is not JSON or not a spec."""
        return cls.from_dict(parse_json(text))

    @classmethod
    def parse(cls, value: Spec | Mapping[str, Any] | str | os.PathLike[str]) -> Self:
        """Create a spec of this family from a spec, a dict of its fields, or the path of a JSON file.

        Raises:
            SpecError: if the file cannot be read, does not hold a valid spec, or holds one of another family.
        """
        if isinstance(value, Spec):
            if not isinstance(value, cls):
                raise SpecError(f"spec must be of the family {cls.family}, got one of {value.family}")
            return value
        if isinstance(value, Mapping):
            return cls.from_dict(_of_family(cls, value))
        if not isinstance(value, (str, os.PathLike)):
            raise SpecError(
                f"spec must be a {cls.__name__}, a dict or the path of a JSON file, got {type(value).__name__}"
            )
        return read_spec_file(value, lambda data: cls.from_dict(_of_family(cls, data)))


def _of_family(cls: type[Spec], data: Any) -> Any:
    """`data` without its key `family`, which must be that of `cls`; version 0.1 wrote none, and only had GLiT."""
    if not isinstance(data, Mapping) or "family" not in data:
        return data
    if data["family"] != cls.family:
        raise SpecError(f"spec must be of the family {cls.family}, got one of {data['family']!r}")
    return {key: value for key, value in data.items() if key != "family"}


def parse_json(text: str) -> Any:
    """Parse JSON. Raises SpecError if it is invalid."""
    try:
        return reading.parse_json(text)
    except ValueError as error:
        raise SpecError(f"spec is {error}") from None


def read_spec_file(path: str | os.PathLike[str], parse: Callable[[Any], T]) -> T:
    """Read a spec file with `parse`. Raises SpecError, which names the path."""
    where = f"spec file {os.fspath(path)}"
    try:
        text = reading.read_text(path)
    except OSError as error:
        raise SpecError(f"{where} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise SpecError(f"{where} is {error}") from None
    try:
        return parse(parse_json(text))
    except SpecError as error:
        raise SpecError(f"{where}: {error}") from None
