"""Draw explanations of image files on one sheet, a PNG file: images with their maps, or the blocks' mixing of tokens.

This module opens images and draws; `explain.py` computes.

Axes: L blocks, N tokens, H heads, h/w height and width of the grid of patches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from timm.data import resolve_input_data_config
from torch import Tensor

from .data.image_files import open_image
from .errors import Argument, DataError, GlitError
from .explain import (
    BlockMixing,
    attention_map,
    check_block,
    check_ours,
    gradcam,
    import_gradcam,
    mean_distances,
    rollout,
    token_mixing,
)  # fmt: skip
from .predict import Classifier
from .runs.console import say, track
from .runs.figures import new_figure, png_bytes, save_png

__all__ = ["METHODS", "check_method", "draw_explanations", "explain_image"]

_MOST_IMAGES = 50  # maximum rows of a sheet
_CELL = 1.5  # inches
_COLORS = "tab10"

Row = list[tuple[str, np.ndarray]]  # a title and a map [h, w], for each map of an image


def check_method(model: Any, method: str, block: int | None = None) -> None:
    """Raise GlitError if the method does not support the model, or it has no such block."""
    if method not in METHODS:
        raise GlitError(Argument("method"), f" must be one of {', '.join(METHODS)}, got {method!r}")
    if method == "gradcam":
        import_gradcam()
    else:
        check_ours(model)
        check_block(model, block)


def draw_explanations(
    classifier: Classifier, paths: Sequence[Path], out: Path, method: str = "attention", block: int | None = None
) -> list[str]:
    """Explain a model's predictions for image files, and draw the sheet.

    Args:
        classifier: the model and its preprocessing.
        paths: image files; files that cannot be read are skipped.
        out: PNG file to write; has passed `runs.figures.check_can_draw`.
        method: 'attention', 'gradcam' or 'locality'.
        block: show only this block, head by head; for 'gradcam', use the features of this block.

    Returns:
        One line for each file that could not be read. If none could be read, nothing is written.

    Raises:
        GlitError: if the method does not support the model, or there are too many images.
        WriteError: if `out` cannot be written.
    """
    check_method(classifier.model, method, block)
    if len(paths) > _MOST_IMAGES:
        raise GlitError(f"a sheet takes at most {_MOST_IMAGES} images, got {len(paths)}")
    classifier.check_memory(len(paths) or 1, "give fewer images, or take a smaller network")
    failed: list[str] = []
    images = list(_prepared(classifier, paths, failed))
    if images:
        save_png(out, METHODS[method](classifier, images, block))
    return failed


def explain_image(classifier: Classifier, image: Image, method: str) -> bytes:
    """The sheet of one RGB image as the content of a PNG file. Raises GlitError as `draw_explanations`."""
    check_method(classifier.model, method)
    return png_bytes(METHODS[method](classifier, [("", classifier.transform(image))], None), {})


Images = list[tuple[str, Tensor]]  # file name and preprocessed image [C, height, width]
Draw = Callable[[], Any]  # returns the figure


def _prepared(classifier: Classifier, paths: Sequence[Path], failed: list[str]) -> Iterator[tuple[str, Tensor]]:
    for path in paths:
        try:
            yield path.name, classifier.transform(open_image(path))
        except DataError as error:
            failed.append(str(error))


# ---- maps over images ----


def _attention_sheet(classifier: Classifier, images: Images, block: int | None) -> Draw:
    return _map_sheet(classifier, images, lambda image: _attention_row(classifier.model, image, block))


def _attention_row(model: Any, image: Tensor, block: int | None) -> tuple[str, Row]:
    """Maps of all blocks and their rollout, or of one block's heads and the rollout up to that block."""
    blocks = token_mixing(model, image)
    if block is None:
        named = [("rollout", rollout(blocks))]
        named += [(f"block {index}", mixing.matrix) for index, mixing in enumerate(blocks)]
    else:
        named = [(f"rollout to {block}", rollout(blocks[: block + 1])), (f"block {block}", blocks[block].matrix)]
        named += [
            (f"{kind} {head}" if heads.shape[1] > 1 else kind, heads[:, head])
            for kind, heads in blocks[block].heads.items()
            for head in range(heads.shape[1])
        ]
    return "", [(name, attention_map(model, matrix, image)[0].cpu().numpy()) for name, matrix in named]


def _gradcam_sheet(classifier: Classifier, images: Images, block: int | None) -> Draw:
    told: set[str] = set()

    def explain(image: Tensor) -> tuple[str, Row]:
        result = gradcam(classifier.model, image, block)
        if result.note and result.note not in told:
            told.add(result.note)
            say(f"glit: {result.note}")
        title = "Grad-CAM" if result.block is None else f"Grad-CAM, block {result.block}"
        return classifier.class_names[int(result.classes[0])], [(title, result.maps[0].numpy())]

    return _map_sheet(classifier, images, explain)


def _map_sheet(classifier: Classifier, images: Images, explain: Callable[[Tensor], tuple[str, Row]]) -> Draw:
    rows = []
    for name, image in track(images, "explaining"):
        text, maps = explain(image[None].to(classifier.device))
        rows.append((f"{name}\n{text}" if text else name, _shown(classifier.model, image), maps))
    return lambda: _draw_maps(rows)


def _draw_maps(rows: Sequence[tuple[str, np.ndarray, Row]]) -> Any:
    """Draw one row per image: the preprocessed image, and its maps overlaid, each scaled to its maximum."""
    columns = 1 + len(rows[0][2])
    figure = new_figure(figsize=(_CELL * columns, (_CELL + 0.35) * len(rows)))
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for line, (name, image, maps) in zip(axes, rows, strict=True):
        height, width = image.shape[:2]
        for axis, (title, values) in zip(line, [(name, None), *maps], strict=True):
            axis.set_axis_off()
            axis.set_title(title, fontsize=6, parse_math=False)
            axis.imshow(image)
            if values is not None:
                largest = max(float(values.max()), 1e-12)
                box = (-0.5, width - 0.5, height - 0.5, -0.5)
                axis.imshow(
                    values, cmap="inferno", alpha=0.6, vmin=0, vmax=largest, extent=box, interpolation="nearest"
                )
    return figure


def _shown(model: Any, image: Tensor) -> np.ndarray:
    """The preprocessed image as RGB: [C, height, width] -> [height, width, 3] from 0 to 1."""
    config = resolve_input_data_config(model, use_test_size=True)
    mean, std = (torch.tensor(config[key]).view(-1, 1, 1) for key in ("mean", "std"))
    colors: np.ndarray = (image * std + mean).clamp(0, 1).expand(3, -1, -1).permute(1, 2, 0).numpy()
    return colors


# ---- locality ----


def _locality_sheet(classifier: Classifier, images: Images, block: int | None) -> Draw:
    """Draw the mean over all images."""
    batches = [image[None].to(classifier.device) for _, image in images]
    results = [token_mixing(classifier.model, batch) for batch in track(batches, "explaining")]
    blocks = [_mean_over_images(per_block) for per_block in zip(*results, strict=True)]
    distances = [mean_distances(classifier.model, mixing, batches[0]) for mixing in blocks]
    return lambda: _draw_locality(_matrices(blocks, block), distances)


def _draw_locality(columns: Sequence[Column], distances: Sequence[Mapping[str, Tensor]]) -> Any:
    """Draw the mean distance of every head at the top, and the matrices below."""
    deepest = max(len(matrices) for _, matrices in columns)
    figure = new_figure(figsize=(max(_CELL * len(columns), 5.0), 2.6 + (_CELL + 0.35) * deepest))
    grid = figure.add_gridspec(1 + deepest, len(columns), height_ratios=[1.5, *[1.0] * deepest])
    _draw_distances(figure.add_subplot(grid[0, :]), distances)
    for column, (title, matrices) in enumerate(columns):
        for row, (name, matrix) in enumerate(matrices, 1):
            axis = figure.add_subplot(grid[row, column])
            axis.imshow(matrix, cmap="viridis", vmin=0, vmax=np.quantile(matrix, 0.99), interpolation="nearest")
            axis.set_title(f"{title}\n{name}", fontsize=6)
            axis.set_xticks([])
            axis.set_yticks([])
    return figure


def _mean_over_images(mixings: Sequence[BlockMixing]) -> BlockMixing:
    heads = {
        kind: torch.stack([mixing.heads[kind].cpu().mean(0, keepdim=True) for mixing in mixings]).mean(0)
        for kind in mixings[0].heads
    }
    return BlockMixing(heads, torch.stack([mixing.matrix.cpu() for mixing in mixings]).mean(0))


Column = tuple[str, list[tuple[str, np.ndarray]]]  # a title, and named matrices [N, N]


def _matrices(blocks: Sequence[BlockMixing], block: int | None) -> list[Column]:
    """One column per block, with the mean over each part's heads; for a single block, one column per head."""
    if block is None:
        return [
            (f"block {index}", [(kind, heads[0].mean(0).numpy()) for kind, heads in mixing.heads.items()])
            for index, mixing in enumerate(blocks)
        ]
    return [
        (kind, [(f"head {head}", matrix.numpy())])
        for kind, heads in blocks[block].heads.items()
        for head, matrix in enumerate(heads[0])
    ]


def _draw_distances(axis: Any, distances: Sequence[Mapping[str, Tensor]]) -> None:
    for kind in dict.fromkeys(kind for block in distances for kind in block):
        points = [
            (index, value)
            for index, block in enumerate(distances)
            for value in block.get(kind, torch.empty(0)).tolist()
        ]
        axis.plot(*zip(*points, strict=True), "o", markersize=4, label=kind, alpha=0.8)
    axis.set_xticks(range(len(distances)))
    axis.set_xlabel("block")
    axis.set_ylabel("mean distance, patches")
    axis.set_ylim(0, 1.1 * max(float(heads.max()) for block in distances for heads in block.values()) + 1e-6)
    axis.legend(fontsize=7)


METHODS: dict[str, Callable[[Classifier, Images, int | None], Draw]] = {
    "attention": _attention_sheet, "gradcam": _gradcam_sheet, "locality": _locality_sheet,
}  # fmt: skip
