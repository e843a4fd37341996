"""Write stand-alone HTML pages, with figures embedded and also saved as files next to the page.

A page has headings, texts, tables, figures and galleries of images; the reports of searches and of evaluations are such
pages. Names may be untrusted, so all text is escaped, including marks that change the direction of text.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import final

from .errors import printable
from .runs.files import whole_folder

__all__ = ["Page"]

_STYLE = """
body{font:16px/1.5 system-ui,sans-serif;color:#22262b;background:#fff;max-width:64rem;margin:2rem auto;padding:0 1rem}
h1,h2{line-height:1.2}h2{margin-top:2.5rem;border-top:1px solid #dde1e6;padding-top:1.2rem}
img{max-width:100%;height:auto}figure{margin:1rem 0}figcaption,.note{color:#4a5058;max-width:46rem}
table{border-collapse:collapse;font-size:.92rem;margin:1rem 0}th,td{padding:.25rem .8rem .25rem 0;text-align:left}
td{border-top:1px solid #e6e9ed;font-variant-numeric:tabular-nums}.missing{color:#8a6d1b}
dt{font-weight:600;float:left;clear:left;margin-right:.5rem}dd{margin:0 0 .3rem}code{font-size:.9em}
.scroll{overflow-x:auto}.gallery{display:flex;flex-wrap:wrap;gap:1rem}.gallery figure{margin:0;max-width:15rem}
.gallery img{height:7rem;max-width:15rem;margin-right:.3rem}
.gallery div{font-size:.85rem;line-height:1.35;overflow-wrap:anywhere}
""".strip()

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


@final
class Page:
    """An HTML page to which content is appended; all text is escaped."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.parts: list[str] = []
        self.figures: dict[str, bytes] = {}

    def heading(self, text: str) -> None:
        self.parts.append(f"<h2>{_escape(text)}</h2>")

    def text(self, text: str, kind: str = "note") -> None:
        self.parts.append(f'<p class="{kind}">{_escape(text)}</p>')

    def missing(self, text: str) -> None:
        self.text(f"Not there yet: {text}", "missing")

    def figure(self, name: str, png: bytes, caption: str) -> None:
        """Add a figure, in the page and as `name`.png next to it."""
        self.figures[f"{name}.png"] = png
        source, caption = _embedded(png, "png"), _escape(caption)
        self.parts.append(
            f'<figure><img src="{source}" alt="{_escape(name)}"><figcaption>{caption}</figcaption></figure>'
        )

    def gallery(self, cards: Sequence[tuple[Sequence[bytes], Sequence[str]]]) -> None:
        """Add cards of a JPEG image with lines of text below it; the images are only in the page."""
        figures = []
        for images, lines in cards:
            shown = "".join(f'<img src="{_embedded(image, "jpeg")}" alt="">' for image in images)
            text = "".join(f"<div>{_escape(line)}</div>" for line in lines)
            figures.append(f"<figure>{shown}<figcaption>{text}</figcaption></figure>")
        self.parts.append(f'<div class="gallery">{"".join(figures)}</div>')

    def words(self, words: Mapping[str, str]) -> None:
        items = "".join(f"<dt>{_escape(word)}</dt><dd>{_escape(text)}</dd>" for word, text in words.items())
        self.parts.append(f"<dl>{items}</dl>")

    def table(self, rows: Sequence[Mapping[str, str]]) -> None:
        """Add a table."""
        head = "".join(f"<th>{_escape(column)}</th>" for column in rows[0])
        lines = (f"<tr>{''.join(f'<td>{_escape(value)}</td>' for value in row.values())}</tr>" for row in rows)
        self.parts.append(f'<div class="scroll"><table><tr>{head}</tr>{"".join(lines)}</table></div>')

    def save(self, title: str) -> Path:
        """Write the page and its figures. Raises WriteError if that fails."""
        title = _escape(title)
        page = (
            '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
            f"<title>{title}</title>\n<style>{_STYLE}</style></head>\n<body><h1>{title}</h1>\n"
        )
        with whole_folder(self.folder) as folder:
            for name, png in self.figures.items():
                (folder / name).write_bytes(png)
            (folder / "index.html").write_text(page + "\n".join(self.parts) + "\n</body></html>\n", encoding="utf-8")
        return self.folder / "index.html"


def _escape(text: str) -> str:
    return html.escape(printable(text))


def _embedded(image: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"
