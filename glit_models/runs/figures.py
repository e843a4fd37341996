"""Figures by matplotlib, drawn in memory: no window system, no pyplot, whatever `MPLBACKEND` says."""

from __future__ import annotations

import os
from typing import Any

from ..errors import GlitError, pip_install

__all__ = ["import_matplotlib", "new_figure"]

_BACKEND = "MPLBACKEND"


def import_matplotlib(extra: str = "train") -> Any:
    """Import matplotlib with its object interface. Raises GlitError if it is missing; `extra` is what installs it.

    A notebook sets `MPLBACKEND` to a backend of its own for all processes that it starts, and importing matplotlib
    fails where that one is not installed.
    """
    asked = os.environ.pop(_BACKEND, None)
    try:
        import matplotlib.backends.backend_agg
        import matplotlib.figure
        import matplotlib.style
    except ImportError:
        raise GlitError(f"figures are drawn with matplotlib, which is missing: {pip_install(extra)}") from None
    finally:
        if asked is not None:
            os.environ[_BACKEND] = asked
    return matplotlib


def new_figure(extra: str = "train", **options: Any) -> Any:
    """An empty figure that is drawn in memory. Raises as `import_matplotlib`; `options` are those of `Figure`."""
    matplotlib = import_matplotlib(extra)
    figure = matplotlib.figure.Figure(**{"layout": "constrained", **options})
    matplotlib.backends.backend_agg.FigureCanvasAgg(figure)
    return figure
