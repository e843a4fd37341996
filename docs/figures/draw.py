"""Draw the figures of the documentation: `python docs/figures/draw.py`. A test checks that the files are up to date."""

from __future__ import annotations

import re
from pathlib import Path

from glit_models.search import glit

from glit_models import GLIT_TINY
from glit_models.figure import network_svg

CELL, GAP, LEFT, TOP = 40, 6, 190, 64
INK = "#1f2430"
BLUE, ORANGE, GREY = "#2f6db5", "#e8833a", "#9aa1ad"
STYLE = """
.out0 { animation: out0 14s infinite } .out1 { animation: out1 14s infinite } .out2 { animation: out2 14s infinite }
.in2 { animation: in2 14s infinite } .say { opacity: 0; animation: say 14s infinite }
@keyframes out0 { 0%, 22% { opacity: 1 } 27%, 100% { opacity: 0 } }
@keyframes out1 { 0%, 30% { opacity: 1 } 46%, 100% { opacity: .08 } }
@keyframes out2 { 0%, 22% { opacity: 1 } 27%, 50% { opacity: .08 } 54%, 58% { opacity: 1 } 72%, 100% { opacity: .08 } }
@keyframes in2 { 0%, 22% { opacity: 1 } 27%, 50% { opacity: .08 } 54%, 100% { opacity: 1 } }
@keyframes say { 0%, 22% { opacity: 1 } 25%, 100% { opacity: 0 } }
@media (prefers-reduced-motion: reduce) {
  * { animation: none !important } .out0 { opacity: 0 } .out1, .out2 { opacity: .08 } .last { opacity: 1 }
}
"""


GENES = {
    "num_global_heads": ("heads that attend", (3, 2, 1, 0), BLUE),
    "kernel_size": ("kernel", (17, 31, 45), ORANGE),
    "expand_ratio": ("expansion", (1, 2, 4), ORANGE),
    "qkv_ratio": ("q/k/v ratio", (0.5, 1, 2), BLUE),
    "mlp_ratio": ("MLP ratio", (2, 4, 6), GREY),
}


def search_svg() -> str:
    """How the two stages narrow the space, as an animation that ends at GLiT-Tiny."""
    parts, y = [_label(LEFT - 44, TOP - 10, "block")], TOP
    parts += [_label(LEFT + index * (CELL + GAP) + 24, TOP - 10, str(index)) for index in range(GLIT_TINY.depth)]
    for gene, (name, values, color) in GENES.items():
        stage = 1 if gene == "num_global_heads" else 2
        parts.append(_label(LEFT - 44, y + 9 * len(values) + 4, name))
        boxes: dict[str, list[str]] = {"out0": [], f"out{stage}": [], f"in{stage}": []}
        for number, value in enumerate(values):
            parts.append(_label(LEFT - 8, y + 18 * number + 12, str(value)))
            for index, block in enumerate(GLIT_TINY.blocks):
                chosen = getattr(block, gene)  # None if the gene has no effect with this division of heads
                name_of_class = "out0" if chosen is None else f"{'in' if value == chosen else 'out'}{stage}"
                boxes[name_of_class].append(f"M{LEFT + index * (CELL + GAP)} {y + 18 * number}h{CELL}v16h-{CELL}z")
        parts += [f'<path class="{name}" fill="{color}" d="{"".join(d)}"/>' for name, d in boxes.items() if d]
        y += 18 * len(values) + 14
    width = LEFT + GLIT_TINY.depth * (CELL + GAP) + 10
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {y}" role="img" font-size="12"'
    paper = f'<rect width="{width}" height="{y}" fill="#fff"/><style>{STYLE}</style>'
    title = "<title>How the two stages of the search narrow the space</title>"
    lines = [f'{head} font-family="system-ui, sans-serif" fill="{INK}">', title, paper, *parts, *_captions(), "</svg>"]
    return "\n".join(lines) + "\n"


def _captions() -> list[str]:
    space = glit()
    texts = (
        f"the whole space: {_power(space.size)} networks",
        f"stage 1 divides the heads: {space.stage_one().size:,} ways",
        f"stage 2 chooses the sizes: {_power(space.stage_two(GLIT_TINY).size)} networks have these heads",
        "the winner: one network",
    )
    return [
        f'<text class="say{" last" if text is texts[-1] else ""}" style="animation-delay: {3.5 * number - 14}s" '
        f'x="{LEFT}" y="28" font-size="17">{text}</text>'
        for number, text in enumerate(texts)
    ]


def _power(number: int) -> str:
    digits, _, exponent = f"{number:.1e}".partition("e+")
    return f"{digits} \u00d7 10" + exponent.translate(str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹"))


def _label(x: int, y: int, text: str) -> str:
    return f'<text x="{x}" y="{y}" text-anchor="end">{text}</text>'


def table(page: str, command: str) -> list[dict[str, str]]:
    """The rows of the first table after a command in a page: cells by column."""
    text = (Path(__file__).parents[1] / page).read_text(encoding="utf-8")
    lines = re.search(r"^\|.*\|$(\n\|.*\|$)+", text[text.index(f"`{command}`") :], re.MULTILINE)
    assert lines is not None, f"{page} has no table below {command}"
    head, _, *rows = ([cell.strip() for cell in line[1:-1].split("|")] for line in lines[0].split("\n"))
    return [dict(zip(head, row, strict=True)) for row in rows]


def bars(title: str, groups: dict[str, dict[str, tuple[float, str]]], colors: dict[str, str]) -> str:
    """A chart of horizontal bars. `groups`: of each label, for each series, the number and its text."""
    left, right, y = 250, 390, 58
    scale = right / max(number for group in groups.values() for number, _ in group.values())
    parts = [f'<text x="14" y="24" font-size="15">{title}</text>']
    if len(colors) > 1:
        for number, (name, color) in enumerate(colors.items()):
            parts.append(f'<path fill="{color}" d="M{left + 130 * number} 34h12v12h-12z"/>')
            parts.append(f'<text x="{left + 130 * number + 17}" y="45">{name}</text>')
    else:
        y = 42
    for label, group in groups.items():
        parts.append(_label(left - 8, y + 9 * len(group) + 4, label))
        for name, (number, text) in group.items():
            width = round(number * scale)
            parts.append(f'<path fill="{colors[name]}" d="M{left} {y}h{width}v16h-{width}z"/>')
            parts.append(f'<text x="{left + width + 6}" y="{y + 12}">{text}</text>')
            y += 18
        y += 8
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 {y}" role="img" font-size="12"'
    paper = f'<title>{title}</title><rect width="760" height="{y}" fill="#fff"/>'
    return "\n".join([f'{head} font-family="system-ui, sans-serif" fill="{INK}">', paper, *parts, "</svg>"]) + "\n"


def speed_svg() -> str:
    """GLiT-Tiny beside DeiT-Tiny and the plain form, on a CPU."""
    colors = {"GLiT-Tiny": BLUE, "DeiT-Tiny": ORANGE, "GLiT-Tiny, plain form": GREY}
    groups: dict[str, dict[str, tuple[float, str]]] = {}
    for row in table("performance.md", "python -m benchmarks.performance --rounds 11"):
        rate = row["images/s"]
        groups.setdefault(f"{row['use']}, {row['type']}", {})[row["network"]] = (float(rate), rate)
    return bars("Images per second on two CPU threads, batches of 16", groups, colors)


def pretraining_svg() -> str:
    """What the shipped weights add where labels are few."""
    starts = {"scratch, %": "from scratch", "glit_tiny.fractal1k, %": "pretrained"}
    groups = {
        f"{row['labels']} labels, {row['epochs']} epochs": {
            name: (float(row[column].split()[0]), row[column]) for column, name in starts.items()
        }
        for row in table("benchmarks.md", "python -m benchmarks.few_labels --threads 1")
    }
    return bars("Test accuracy on Fashion-MNIST, %", groups, {"from scratch": GREY, "pretrained": BLUE})


def ablation_svg() -> str:
    """What each part of the search adds."""
    rows = table("search-benchmarks.md", "python -m benchmarks.ablation --threads 1")
    groups = {row["found by"]: {"": (float(row["mean"].split()[0]), row["mean"])} for row in rows if "±" in row["mean"]}
    return bars("Test accuracy of what each search finds, %, three seeds", groups, {"": BLUE})


FIGURES = {
    "glit_tiny.svg": lambda: network_svg(GLIT_TINY),
    "search.svg": search_svg,
    "speed.svg": speed_svg,
    "pretraining.svg": pretraining_svg,
    "ablation.svg": ablation_svg,
}

if __name__ == "__main__":
    for name, draw in FIGURES.items():
        Path(__file__).with_name(name).write_text(draw())
