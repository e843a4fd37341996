"""Broken images of a data set: all of them at once, before the work or beside it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from ..errors import DataError, WriteError
from ..runs.console import track
from ..runs.files import write_text
from .loading import eval_loader
from .sources import Stream

__all__ = ["Readable", "readable_batches", "refuse_broken"]

_MOST_NAMED = 5  # in a message


class Readable:
    """A map-style data set's pairs of image and (label, reason): of a broken image a blank one, -1 and why.

    The reason is empty for the others.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Image.Image, tuple[int, str]]:
        try:
            image, label = self.dataset[index]
        except DataError as error:
            return Image.new("RGB", (8, 8)), (-1, str(error))
        return image, (label, "")


def readable_batches(
    source: Any, transform: Any, batch_size: int, num_workers: int, doing: str
) -> Iterator[tuple[Tensor, Tensor, Sequence[str]]]:
    """All images in order, with a progress bar: images [B, C, H, W], labels [B] and why each is broken, or ''.

    Args:
        source: map-style, or a `Stream`, of which a broken image raises DataError.
        doing: a word for the progress bar.
    """
    is_stream = isinstance(source, Stream)
    loader = eval_loader(source if is_stream else Readable(source), transform, batch_size, num_workers)
    for images, labels in track(loader, doing):
        yield (images, labels, [""] * len(labels)) if is_stream else (images, *labels)


def refuse_broken(broken: Sequence[str], total: int, listing: Path) -> None:
    """Raise DataError if there are broken images; names them.

    Args:
        broken: what is wrong with each. total: of all images.
        listing: a file for them all, if they are too many for a message.
    """
    if not broken:
        return
    named = "; ".join(sorted(broken)[:_MOST_NAMED])
    if len(broken) > _MOST_NAMED:
        named += "; ..."
        with suppress(WriteError):  # the images are what is wrong
            write_text(listing, "\n".join(sorted(broken)) + "\n", parents=True)
            named += f"; all are listed in {listing}"
    raise DataError(f"{len(broken):,} of {total:,} images cannot be used, mend or remove them: {named}")
