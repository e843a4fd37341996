"""Model cards: the README of a Hub repository and the figure of the architecture in it, drawn from entry and spec.

It knows text and pictures; weights, folders and the Hub are `publishing.py`'s.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .cost import count_block_macs, count_block_params
from .hub import AUTHORS_URL, WeightEntry
from .spec import BlockSpec, GLiTSpec

__all__ = ["draw_architecture", "model_card"]

_CITATION = """@inproceedings{chen2021glit,
  title     = {{GLiT}: Neural Architecture Search for Global and Local Image Transformer},
  author    = {Chen, Boyu and Li, Peixia and Li, Chuming and Li, Baopu and Bai, Lei and Lin, Chen and Sun, Ming and
               Yan, Junjie and Ouyang, Wanli},
  booktitle = {Proceedings of the IEEE/CVF International Conference on Computer Vision (ICCV)},
  pages     = {12--21},
  year      = {2021}
}"""


def model_card(entry: WeightEntry, spec: GLiTSpec, repo: str | None) -> str:
    """The README of the weights `entry`, metadata in front; `repo` is where it will lie, None for a local folder."""
    sections = (
        _metadata(entry),
        f"# {entry.name}\n\n{_summary(entry, spec)}",
        f"## Use\n\n{_usage(entry, repo)}",
        f"## Data and training\n\n{_training(entry)}",
        f"## Scores\n\n{_scores(entry)}",
        "## Architecture\n\n"
        "![Blocks from first to last: global heads, local heads, feed-forward network](architecture.png)\n\n"
        f"{_blocks_table(entry, spec)}",
        f"## Limits\n\n{_limits(entry)}",
        f"## Citation\n\n```bibtex\n{_CITATION}\n```",
    )
    return "\n\n".join(sections) + "\n"


def _metadata(entry: WeightEntry) -> str:
    """YAML, its values written as JSON, which YAML contains."""
    is_identifier = " " not in entry.license
    data: dict[str, Any] = {
        "library_name": "timm",
        "pipeline_tag": "image-classification",
        "license": entry.license.lower() if is_identifier else "other",
        "tags": ["image-classification", "timm", "transformers", "glit"],
        "datasets": [entry.dataset.lower().replace(" ", "-")],
        "metrics": ["accuracy"],
    }
    if not is_identifier:
        data["license_name"] = entry.license.lower().replace(" ", "-")
    return "\n".join(["---", *(f"{key}: {json.dumps(value)}" for key, value in data.items()), "---"])


def _summary(entry: WeightEntry, spec: GLiTSpec) -> str:
    channels, height, width = entry.input_size
    return (
        f"Image classification with GLiT, a vision transformer whose blocks divide their heads between global "
        f"self-attention and local convolution, as an architecture search chose ([paper](https://arxiv.org/abs/"
        f"2107.02960), [authors' code]({AUTHORS_URL})).\n\n"
        f"| | |\n|---|---|\n| Parameters | {entry.params:,} |\n| Multiply-adds | {entry.macs / 1e6:,.1f} M (matrix "
        f"products and convolutions, one image) |\n| Input | {channels} x {height} x {width} |\n"
        f"| Classes | {_classes(entry)} |\n| Blocks, width, heads | {spec.depth}, {spec.embed_dim}, {spec.num_heads} |\n"
        f"| License | {entry.license} |"
    )


def _classes(entry: WeightEntry) -> str:
    if entry.class_names is None or len(entry.class_names) > 20:
        return str(entry.num_classes)
    return f"{entry.num_classes}: {', '.join(entry.class_names)}"


def _usage(entry: WeightEntry, repo: str | None) -> str:
    source = f"hf-hub:{repo}" if repo else "local-dir:PATH/OF/THIS/FOLDER"
    return f"""```python
import glit_models  # pip install glit-models; makes timm know GLiT
import timm
import torch
from PIL import Image

model = timm.create_model("{source}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
image = Image.open("picture.png").convert("{"L" if entry.input_size[0] == 1 else "RGB"}")
with torch.inference_mode():
    probabilities = model(transform(image).unsqueeze(0)).softmax(dim=-1)
```

`golden.safetensors` holds an `input` and the `logits` it must give; `glit verify {repo or "FOLDER"}` compares."""


def _training(entry: WeightEntry) -> str:
    lines = [f"Data: {entry.dataset}."]
    if entry.origin:
        lines.append(f"Origin: {entry.origin}.")
    if entry.recipe:
        lines.append(f"The command that trained them:\n\n```\n{entry.recipe}\n```")
    lines.append(
        f"Preprocessing: {entry.interpolation} resize, centre crop of {entry.crop_pct:g}, mean "
        f"{_numbers(entry.mean)}, standard deviation {_numbers(entry.std)}."
    )
    return "\n\n".join(lines)


def _numbers(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def _scores(entry: WeightEntry) -> str:
    if not entry.metrics:
        return "None were measured."
    rows = [f"| {metric.name} | {metric.value:g} | {_as_source(metric.source)} |" for metric in entry.metrics]
    return "\n".join(["| Metric | Value | Command or publication |", "|---|---|---|", *rows])


def _as_source(source: str) -> str:
    return f"`{source}`" if source.startswith(("glit ", "python ")) else source


def _blocks_table(entry: WeightEntry, spec: GLiTSpec) -> str:
    tokens = (entry.input_size[1] // spec.patch_size) * (entry.input_size[2] // spec.patch_size) + 1
    rows = [
        f"| {index} | {block.num_global_heads} | {block.num_local_heads} | {_or_dash(block.kernel_size)} | "
        f"{_or_dash(block.expand_ratio)} | {_or_dash(block.qkv_ratio)} | {block.mlp_ratio:g} | "
        f"{count_block_params(spec, block):,} | {count_block_macs(spec, block, tokens) / 1e6:.1f} M |"
        for index, block in enumerate(spec.blocks)
    ]
    return "\n".join(
        [
            "| Block | Global heads | Local heads | Kernel | Expansion | QKV ratio | MLP ratio | Parameters "
            "| Multiply-adds |",
            "|---|---|---|---|---|---|---|---|---|",
            *rows,
        ]
    )


def _or_dash(value: float | None) -> str:
    return "-" if value is None else f"{value:g}"


def _limits(entry: WeightEntry) -> str:
    limits = [
        f"Trained for {entry.dataset} and measured there, if at all; on other pictures the scores say nothing.",
        f"It always answers with one of its {entry.num_classes} classes, whatever the picture shows, and its "
        "probabilities are not calibrated.",
        f"Made for {entry.input_size[1]} x {entry.input_size[2]} pixels; at other sizes (`img_size=...`) the position "
        "embedding is resampled and accuracy falls.",
    ]
    if entry.architecture != "glit_tiny":
        limits.append(
            "This is the released GLiT-Tiny scaled in width; the network of the same name in the paper is a little "
            "smaller and was never released, so the paper's scores are not this model's."
        )
    return "\n".join(f"* {limit}" for limit in limits)


# Colours that stay apart for colour-blind readers and on a dark page.
_GLOBAL, _LOCAL, _MLP, _INK, _PAPER = "#3b6fb6", "#e08a2e", "#b9bfc9", "#1f2430", "#ffffff"
_CELL, _GAP, _MARGIN, _LEFT, _TWO_LINES = 76, 10, 24, 112, 38


def draw_architecture(spec: GLiTSpec, path: str | Path) -> None:
    """Draw the blocks of a spec as a PNG: a column a block, its heads above, its feed-forward network below.

    The height of a feed-forward box is its ratio, that of a head's box is the same for all heads.
    """
    from PIL import Image, ImageDraw, ImageFont

    head = max(14, min(48, 144 // spec.num_heads))
    heads_height = head * spec.num_heads
    unit = 96 / max(block.mlp_ratio for block in spec.blocks)
    top = _MARGIN + 34
    size = (_LEFT + spec.depth * (_CELL + _GAP) + _MARGIN, round(top + heads_height + 2 * _GAP + 96 + 40 + _MARGIN))
    image = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(size=14)

    def box(left: float, upper: float, height: float, colour: str, text: str, ink: str = _PAPER) -> None:
        draw.rounded_rectangle((left, upper, left + _CELL, upper + height - 2), 5, fill=colour)
        if height < _TWO_LINES:
            text = text.partition("\n")[0]
        draw.multiline_text(
            (left + _CELL / 2, upper + height / 2 - 1), text, fill=ink, font=font, anchor="mm", align="center"
        )

    for label, middle in (("heads", top + heads_height / 2), ("feed-forward", top + heads_height + 2 * _GAP + 48)):
        draw.text((_LEFT - 14, middle), label, fill=_INK, font=font, anchor="rm")
    for index, block in enumerate(spec.blocks):
        left = _LEFT + index * (_CELL + _GAP)
        draw.text((left + _CELL / 2, top - 16), str(index), fill=_INK, font=font, anchor="mm")
        global_height = head * block.num_global_heads
        if block.num_global_heads:
            box(left, top, global_height, _GLOBAL, _global_text(block))
        if block.num_local_heads:
            box(left, top + global_height, heads_height - global_height, _LOCAL, _local_text(block), _INK)
        mlp_height = unit * block.mlp_ratio
        box(left, top + heads_height + 2 * _GAP, mlp_height, _MLP, f"x {block.mlp_ratio:g}", _INK)
    legend = (
        "blue: global heads, self-attention (r: width of query, key, value)     "
        "orange: local heads, convolution (k: kernel, E: expansion)"
    )
    draw.text((_LEFT, size[1] - _MARGIN), legend, fill=_INK, font=font, anchor="lm")
    image.save(path, format="PNG")


def _global_text(block: BlockSpec) -> str:
    return f"{block.num_global_heads} global\nr {block.qkv_ratio:g}"


def _local_text(block: BlockSpec) -> str:
    return f"{block.num_local_heads} local\nk {block.kernel_size} E {block.expand_ratio}"
