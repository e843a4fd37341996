"""Write model cards: the README of a Hub repository and its figure of the architecture, from entry and spec.

`publish.py` handles weights, folders and the Hub.
"""

from __future__ import annotations

import json
from typing import Any

from ..cost import count_block_macs, count_block_params
from ..families import Paper, family_of_architecture
from ..parts import TokenGrid
from ..spec import Spec
from .registry import WeightEntry

__all__ = ["model_card"]


def model_card(entry: WeightEntry, spec: Spec, repo: str | None, class_token: bool = True) -> str:
    """The README of the weights `entry`, metadata first.

    Args:
        spec: of the network. class_token: whether it has one.
        repo: the repository of the weights; None for a local folder.
    """
    sections = (
        _metadata(entry, spec),
        f"# {entry.name}\n\n{_summary(entry, spec)}",
        f"## Use\n\n{_usage(entry, repo)}",
        f"## Data and training\n\n{_training(entry)}",
        f"## Scores\n\n{_scores(entry)}",
        "## Architecture\n\n"
        "![Blocks from first to last: what mixes tokens above, feed-forward network below](architecture.png)\n\n"
        f"{_blocks_table(entry, spec, class_token)}",
        f"## Limits\n\n{_limits(entry)}",
        f"## Citation\n\n```bibtex\n{_paper(entry).citation}\n```",
    )
    return "\n\n".join(sections) + "\n"


def _metadata(entry: WeightEntry, spec: Spec) -> str:
    """The metadata as YAML; values are written as JSON, which is valid YAML."""
    is_identifier = " " not in entry.license
    data: dict[str, Any] = {
        "library_name": "timm",
        "pipeline_tag": "image-classification",
        "license": entry.license.lower() if is_identifier else "other",
        "tags": ["image-classification", "timm", "transformers", spec.family],
        "datasets": _hub_data_sets(entry.dataset),
        "metrics": ["accuracy"],
    }
    if not data["datasets"]:
        del data["datasets"]
    if not is_identifier:
        data["license_name"] = entry.license.lower().replace(" ", "-")
    return "\n".join(["---", *(f"{key}: {json.dumps(value)}" for key, value in data.items()), "---"])


def _hub_data_sets(name: str) -> list[str]:
    """The data set as the Hub names it; empty for any other name, with which the Hub would reject the card."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # documented there

    source, _, identifier = name.partition("/")
    if source in ("torch", "wds", "tfds"):
        return []
    identifier = identifier if source in ("hfds", "hfids") else name.lower()
    try:
        validate_repo_id(identifier)
    except HFValidationError:
        return []
    return [identifier]


def _summary(entry: WeightEntry, spec: Spec) -> str:
    channels, height, width = entry.input_size
    paper = _paper(entry)
    url = f"https://arxiv.org/abs/{paper.identifier.removeprefix('arXiv:')}"
    links = f"[paper]({url}), [authors' code]({paper.authors_url})"
    return (
        f"Image classification with {paper.summary} ({links}).\n\n"
        f"| | |\n|---|---|\n| Parameters | {entry.params:,} |\n| Multiply-adds | {entry.macs / 1e6:,.1f} M (matrix "
        f"products and convolutions, one image) |\n| Input | {channels} x {height} x {width} |\n"
        f"| Classes | {_classes(entry)} |\n"
        f"| Network | {spec.summary} |\n| License | {entry.license} |"
    )


def _paper(entry: WeightEntry) -> Paper:
    return family_of_architecture(entry.architecture).paper_of(entry.architecture)


def _classes(entry: WeightEntry) -> str:
    several = ", of which an image may have several or none" if entry.multilabel else ""
    if entry.class_names is None or len(entry.class_names) > 20:
        return f"{entry.num_classes}{several}"
    return f"{entry.num_classes}{several}: {', '.join(entry.class_names)}"


def _usage(entry: WeightEntry, repo: str | None) -> str:
    source = f"hf-hub:{repo}" if repo else "local-dir:PATH/OF/THIS/FOLDER"
    return f"""```python
import glit_models  # makes timm know the model
import timm
import torch
from PIL import Image, ImageOps

model = timm.create_model("{source}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
image = ImageOps.exif_transpose(Image.open("image.png")).convert("{"L" if entry.input_size[0] == 1 else "RGB"}")
with torch.inference_mode():
    probabilities = model(transform(image).unsqueeze(0)).{"sigmoid()" if entry.multilabel else "softmax(dim=-1)"}
```

`golden.safetensors` holds an `input` (float16) and the float32 `logits` that it must give;
`glit verify {repo or "FOLDER"}` compares."""


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


def _blocks_table(entry: WeightEntry, spec: Spec, class_token: bool) -> str:
    height, width = entry.input_size[1:]
    tokens = TokenGrid(height // spec.patch_size, width // spec.patch_size, int(class_token))
    headings, blocks = spec.block_table()
    rows = []
    for index, block in enumerate(blocks):
        values = (_or_dash(block.get(name)) for name in headings)
        costs = (f"{count_block_params(spec, index):,}", f"{count_block_macs(spec, index, tokens) / 1e6:.1f} M")
        rows.append(f"| {' | '.join((str(index), *values, *costs))} |")
    names = ["Block", *(name.replace("_", " ") for name in headings), "Parameters", "MACs"]
    return "\n".join([f"| {' | '.join(names)} |", "|---" * len(names) + "|", *rows])


def _or_dash(value: Any) -> str:
    return "-" if value is None else f"{value:g}" if isinstance(value, (int, float)) else str(value)


def _limits(entry: WeightEntry) -> str:
    limits = [
        f"Trained for {entry.dataset} and measured there, if at all; on other images the scores say nothing.",
        f"It answers with {'any' if entry.multilabel else 'one'} of its {entry.num_classes} classes, whatever the "
        "image shows, and its probabilities are not calibrated.",
        f"Made for {entry.input_size[1]} x {entry.input_size[2]} pixels; at other sizes (`img_size=...`) the position "
        "embedding is resampled and accuracy falls.",
    ]
    if entry.architecture in ("glit_small", "glit_base"):
        limits.append(
            "This is the released GLiT-Tiny scaled in width; the network of the same name in the paper is a little "
            "smaller and was never released, so the paper's scores are not this model's."
        )
    return "\n".join(f"* {limit}" for limit in limits)
