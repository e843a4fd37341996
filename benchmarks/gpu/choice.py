"""Choose the form of the depthwise convolution from measured speeds of whole networks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ..depthwise_forms import FORMS

__all__ = ["CURRENT", "LEAST_GAIN", "choose", "finalists"]

CURRENT = "conv2d, rows"  # the model's form
LEAST_GAIN = 1.05


def finalists(rows: Iterable[Mapping[str, Any]], count: int = 2) -> list[str]:
    """The forms, other than the model's, that took the least time between their neighbours in the model.

    Args:
        rows: of `benchmarks.depthwise_uses`. A form counts if it ran in every use in chain; wrong ones have no time.
        count: maximum number of forms to return, fastest first.
    """
    best: dict[str, dict[str, float]] = {}
    for row in rows:
        if row["form"] in FORMS and "chain" in row["use"] and isinstance(row["ms"], float):
            times = best.setdefault(row["form"], {})
            times[row["use"]] = min(row["ms"], times.get(row["use"], row["ms"]))
    uses = {use for times in best.values() for use in times}
    sums = {form: sum(times.values()) for form, times in best.items() if times.keys() == uses and form != CURRENT}
    return sorted(sums, key=lambda form: sums[form])[:count]


def choose(rates: Mapping[str, float]) -> str:
    """Choose the form to use, from images per second of the whole compiled network in each form.

    Chooses the fastest of torch's forms, unless another form beats it by `LEAST_GAIN`: a custom kernel must be
    maintained, and stops the compiler from fusing around it, which a measurement of the kernel alone does not show.
    """
    stock = {form: rate for form, rate in rates.items() if FORMS[form].stock}
    custom = {form: rate for form, rate in rates.items() if not FORMS[form].stock}
    best = max(stock, key=lambda form: stock[form], default=CURRENT)
    if custom:
        fastest = max(custom, key=lambda form: custom[form])
        if not stock or custom[fastest] >= LEAST_GAIN * stock[best]:
            return fastest
    return best
