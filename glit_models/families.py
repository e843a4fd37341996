"""Families of networks, and the table of their names.

To add a custom family, subclass `Spec` and `SpecTransformer`, describe them in a `Family`, call `register_family`, and
write timm entry points that call `create` (entry.py). See docs/extending.md.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from .errors import SpecError, WeightsError
from .extensions import Table
from .model import SpecTransformer
from .spec import Spec, read_spec_file

__all__ = [
    "FAMILIES",
    "Family",
    "Paper",
    "check_layout",
    "family_of",
    "family_of_architecture",
    "named_specs",
    "parse_spec",
    "register_family",
]


class Paper(NamedTuple):
    """The source of a network.

    Attributes:
        identifier: arXiv identifier, as in timm's `paper_ids`.
        authors_url: URL of the authors' code.
        citation: BibTeX entry.
        summary: description of the networks for model cards: 'X, a vision transformer whose ...'.
    """

    identifier: str
    authors_url: str = ""
    citation: str = ""
    summary: str = "a vision transformer"


class Family(NamedTuple):
    """A family of networks.

    Attributes:
        name: name in specs, search spaces and tables.
        spec: class of its specs.
        model: class of its models.
        references: makes known networks of a depth, a width and a spec's other fields, by name; a search scores them
            along with its candidates.
        named: its named networks, by timm's name; the first one builds any other when given its spec.
        paper: arXiv identifier, as in timm's `paper_ids`.
        authors_url: URL of the authors' code.
        citation: BibTeX entry.
        papers: the papers of named networks that come from another paper than the family's.
        summary: description of its networks, for model cards.
    """

    name: str
    spec: type[Spec]
    model: type[SpecTransformer]
    named: Mapping[str, Spec]
    references: Callable[[int, int, Mapping[str, Any]], Mapping[str, Spec]] = lambda depth, width, network: {}
    paper: str = ""
    authors_url: str = ""
    citation: str = ""
    papers: Mapping[str, Paper] = MappingProxyType({})
    summary: str = "a vision transformer"

    def paper_of(self, architecture: str) -> Paper:
        """The paper of a named network."""
        return self.papers.get(architecture) or Paper(self.paper, self.authors_url, self.citation, self.summary)

    @property
    def architecture(self) -> str:
        """The timm name that builds any network of the family when given `spec=`."""
        return next(iter(self.named))


FAMILIES: Table[Family] = Table("family", Family, SpecError)


def register_family(family: Family) -> Family:
    """Add a family to the table. Raises SpecError if its name is taken or it has no named network."""
    if not family.named:
        raise SpecError(f"family {family.name!r} must name at least one network")
    return FAMILIES.register(family.name, family)


def named_specs() -> dict[str, Spec]:
    """The named networks of all families, by timm's name."""
    return {name: spec for family in FAMILIES.values() for name, spec in family.named.items()}


def family_of(spec: Spec) -> Family:
    """The family of a spec."""
    return FAMILIES[spec.family]


def family_of_architecture(architecture: str) -> Family:
    """The family of an architecture's timm name. Raises WeightsError if there is none."""
    for family in FAMILIES.values():
        if architecture in family.named:
            return family
    raise WeightsError(f"{architecture}: no such model; known: {', '.join(named_specs())}")


def check_layout(state_dict: Mapping[str, Any], family: Family, where: str = "weights") -> None:
    """Check that a state dict is not in the layout of another family's authors.

    Raises:
        WeightsError: names both families.
    """
    if family.model.is_foreign(state_dict):
        return
    for other in FAMILIES.values():
        if other.model.is_foreign(state_dict):
            raise WeightsError(
                f"{where} do not fit the model: they are of the family {other.name}, the model is of {family.name}"
            )


def parse_spec(value: Spec | Mapping[str, Any] | str | os.PathLike[str]) -> Spec:
    """Create a spec of any family from a spec, a dict of its fields or the path of a JSON file, by the field 'family'.

    Raises:
        SpecError: if the file cannot be read, the family is unknown, or it is not a valid spec.
    """
    if isinstance(value, Spec):
        return value
    if isinstance(value, (str, os.PathLike)):
        return read_spec_file(value, parse_spec)
    if not isinstance(value, Mapping):
        raise SpecError(f"spec must be an object of named fields, got {type(value).__name__}")
    name = value.get("family", "glit")  # version 0.1 only had GLiT and wrote no family
    if not isinstance(name, str):
        raise SpecError(f"family must be a name, got {name!r}")
    return FAMILIES[name].spec.parse(value)
