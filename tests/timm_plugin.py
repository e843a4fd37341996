"""A pytest plugin that runs timm's test suite on this package's models. No assertions.

timm's tests choose models through `timm.list_models` with lists of name patterns and of module names. Those lists do
not include outside families, so here the listing treats ours like the vision transformers, and then keeps only the
models named in the environment variable GLIT_TIMM_TESTS (separated by commas).
"""

import os
from collections.abc import Iterable
from typing import Any

import pytest
import timm
import timm.models

from glit_models.families import FAMILIES, named_specs

MODELS = os.environ["GLIT_TIMM_TESTS"].split(",")
MODULES = list(FAMILIES)
PATTERNS = list(named_specs())

_list_models = timm.list_models


def _extended(patterns: str | Iterable[str], vit: str, ours: list[str]) -> str | list[str]:
    """The same patterns, and ours where the vision transformers' stands among them."""
    if isinstance(patterns, str):
        return patterns
    patterns = list(patterns)
    return [*patterns, *ours] if vit in patterns else patterns


def _list_our_models(filter: Any = "", module: Any = "", pretrained: bool = False, exclude_filters: Any = "", **kwargs):
    names = _list_models(
        _extended(filter, "vit_*", PATTERNS),
        module=_extended(module, "vision_transformer", MODULES),
        pretrained=pretrained,
        exclude_filters=_extended(exclude_filters, "vit_*", PATTERNS),
        **kwargs,
    )
    return [name for name in names if name.partition(".")[0] in MODELS]


timm.list_models = timm.models.list_models = _list_our_models


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Drop the tests of single, named models of other families, and stop if nothing is left."""
    ours = [item for item in items if _model_name(item).partition(".")[0] in MODELS]
    tested = {_model_name(item).partition(".")[0] for item in ours}
    if tested != set(MODELS):
        raise pytest.UsageError(f"timm's suite has tests of {sorted(tested)}, wanted {MODELS}")
    config.hook.pytest_deselected(items=[item for item in items if item not in set(ours)])
    items[:] = ours


def _model_name(item: pytest.Item) -> str:
    callspec = getattr(item, "callspec", None)
    return str(callspec.params.get("model_name", "")) if callspec else ""
