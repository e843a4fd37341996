"""Find the broken images of a data set, all at once, before a job or during it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from ..errors import DataError, WriteError
from ..runs.console import track
from ..runs.files import write_text
from .loading import eval_loader
from .sources import Stream

__all__ = ["Readable", "readable_batches", "refuse_broken"]

_MOST_NAMED = 5  # per message


class Readable:
    """A map-style data set's pairs of image and (label, reason); a broken image is blank, without a label.

    The reason is empty for images that can be read. A missing label is -1, or with several labels per image [K] of -1.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        width = getattr(dataset, "label_width", None)  # as in `Images`
        self.no_label: Any = -1 if width is None else np.full(width, -1, np.float32)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Image.Image, tuple[Any, str]]:
        try:
            image, label = self.dataset[index]
        except DataError as error:
            return Image.new("RGB", (8, 8)), (self.no_label, str(error))
        return image, (label, "")


def readable_batches(
    source: Any, transform: Any, batch_size: int, num_workers: int, doing: str
) -> Iterator[tuple[Tensor, Tensor, Sequence[str]]]:
    """Yield all images in order, with a progress bar: images [B, C, H, W], labels [B], and why each is broken, or ''.

    Multilabel data has labels [B, K].

    Args:
        source: map-style, or a `Stream`; a broken image of a stream raises DataError.
        doing: description of the progress bar.
    """
    is_stream = isinstance(source, Stream)
    loader = eval_loader(source if is_stream else Readable(source), transform, batch_size, num_workers)
    for images, labels in track(loader, doing):
        yield (images, labels, [""] * len(labels)) if is_stream else (images, *labels)


def refuse_broken(broken: Sequence[str], total: int, listing: Path) -> None:
    """Raise DataError if there are broken images; names them.

    Args:
        broken: the fault of each broken image. total: number of all images.
        listing: a file to list them in if they are too many for a message.
    """
    if not broken:
        return
    named = "; ".join(sorted(broken)[:_MOST_NAMED])
    if len(broken) > _MOST_NAMED:
        named += "; ..."
        with suppress(WriteError):  # the broken images are the error to report
            write_text(listing, "\n".join(sorted(broken)) + "\n", parents=True)
            named += f"; all are listed in {listing}"
    raise DataError(f"{len(broken):,} of {total:,} images cannot be used, mend or remove them: {named}")
