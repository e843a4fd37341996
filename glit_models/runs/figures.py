"""Draw figures with matplotlib in memory: without a window system, without pyplot, and for any `MPLBACKEND`."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from ..errors import GlitError, first_line, pip_install
from .files import whole_file

__all__ = ["check_can_draw", "import_matplotlib", "new_figure", "png_bytes", "save_png"]

_BACKEND = "MPLBACKEND"


def import_matplotlib(extra: str = "train") -> Any:
    """Import matplotlib's object interface. Raises GlitError if it is missing; `extra` is what installs it.

    A notebook sets `MPLBACKEND` for all processes that it starts, and importing matplotlib fails if that backend is not
    installed.
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
    """A new empty figure, drawn in memory. Raises as `import_matplotlib`; `options` are those of `Figure`."""
    matplotlib = import_matplotlib(extra)
    figure = matplotlib.figure.Figure(**{"layout": "constrained", **options})
    matplotlib.backends.backend_agg.FigureCanvasAgg(figure)
    return figure


def check_can_draw(path: Path, what: str) -> None:
    """Raise GlitError if a PNG file of `what` could not be drawn or written. For use before the work."""
    import_matplotlib()
    if path.suffix.lower() != ".png":
        raise GlitError(f"{path}: {what} is a PNG; give a name that ends in .png")
    if path.is_dir() or not path.parent.is_dir():
        raise GlitError(f"{path} cannot be written: {'it is a folder' if path.is_dir() else 'its folder is missing'}")
    if not os.access(path.parent, os.W_OK):
        raise GlitError(f"{path} cannot be written: its folder is read-only")


def save_png(path: Path, draw: Callable[[], Any]) -> None:
    """Write the figure that `draw` returns.

    Raises:
        GlitError: if matplotlib is missing or fails.
        WriteError: if `path` cannot be written; an existing file is unchanged.
    """
    try:
        figure = draw()
    except Exception as error:  # from matplotlib, its settings, or a font
        raise GlitError(f"{path} cannot be drawn: {first_line(error)}") from None
    with whole_file(path) as temporary, _without_warnings():
        figure.savefig(temporary, format="png", dpi=150, bbox_inches="tight", pad_inches=0.15)


def png_bytes(draw: Callable[[], Any], style: Mapping[str, Any], extra: str = "train") -> bytes:
    """Render the figure that `draw` returns as a PNG file in 128 colours, a third of the size, to embed in pages.

    The result does not depend on the user's matplotlib settings; `style` changes its defaults.

    Raises:
        GlitError: if matplotlib is missing; `extra` is what installs it.
    """
    drawn, small = io.BytesIO(), io.BytesIO()
    with import_matplotlib(extra).style.context(["default", dict(style)]), _without_warnings():
        draw().savefig(drawn, dpi=130, metadata={"Software": None}, bbox_inches="tight", pad_inches=0.1)
    with Image.open(drawn) as image:
        colours = image.convert("RGB").quantize(128, dither=Image.Dither.NONE)
    colours.save(small, format="png", optimize=True)
    return small.getvalue()


@contextmanager
def _without_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # a name may use a script that the font lacks
        yield
