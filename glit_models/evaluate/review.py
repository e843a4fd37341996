"""Find images and labels of a data set to review: near-duplicates, and labels that are likely wrong.

Axes: N images, D features, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..neighbours import nearest

__all__ = ["Doubt", "Pair", "doubtful_labels", "near_duplicates"]

_SIMILAR = 0.98  # cosine similarity of centred features
_SAME_PIXELS = 0.985  # correlation of small copies
_SIDE = 32  # side of these copies
_SAME_LEVEL = 4  # maximum difference of plain images, of 255
_MOST_PAIRS = 300  # maximum number of pairs whose images are opened
_NEIGHBOURS = 10
_SURE = 0.5  # minimum probability of a class other than the label

Open = Callable[[int], Image.Image]


@dataclass(frozen=True)
class Pair:
    """Two nearly identical images: their indices, and the similarity of their features and of their pixels, at most 1.

    `second` is an index into the other data set if two were compared.
    """

    first: int
    second: int
    similarity: float
    correlation: float


def near_duplicates(
    features: Tensor, open_image: Open, others: Tensor | None = None, open_other: Open | None = None
) -> list[Pair]:
    """Find images that are copies of each other except for size and compression, most similar first.

    Each image is compared with its nearest neighbour by features. Because a good classifier gives nearly the same
    features to all images of a class, the pixels of small copies decide, for at most 300 pairs.

    Args:
        features: [N, D]. others: features of another data set [M, D]; None finds pairs within the first.
        open_image, open_other: map an index to an image.
    """
    if len(features) < 2 and others is None:
        return []
    mean, within = features.mean(0), others is None
    similarity, index = nearest(features - mean, features - mean if others is None else others - mean, 1, not within)
    found: dict[tuple[int, int], float] = {}
    for one in similarity[:, 0].argsort(descending=True, stable=True).tolist():
        other, value = int(index[one, 0]), float(similarity[one, 0])
        if value < _SIMILAR or len(found) == _MOST_PAIRS:
            break
        found.setdefault((min(one, other), max(one, other)) if within else (one, other), value)
    pairs = [
        Pair(one, other, value, _correlation(open_image(one), (open_other or open_image)(other)))
        for (one, other), value in found.items()
    ]
    return [pair for pair in pairs if pair.correlation >= _SAME_PIXELS]


def _correlation(first: Image.Image, second: Image.Image) -> float:
    """Correlation of the pixels of small copies with centred channels; for plain images, 1 if the colours agree."""
    small = [np.asarray(image.convert("RGB").resize((_SIDE, _SIDE)), np.float64) for image in (first, second)]
    one, other = (values - values.mean((0, 1)) for values in small)
    if min(one.std(), other.std()) < 1:
        return float(np.abs(small[0] - small[1]).max() <= _SAME_LEVEL)
    return float((one * other).mean() / (one.std() * other.std()))


@dataclass(frozen=True)
class Doubt:
    """An image whose label is likely wrong: its index, and the number of its neighbours with the predicted class."""

    index: int
    agreeing: int
    neighbours: int


def doubtful_labels(
    features: Tensor, truth: Tensor, predicted: Tensor, confidence: Tensor, others: Sequence[Tensor] = ()
) -> list[Doubt]:
    """Find images that the model confidently assigns to another class, which most of their neighbours also have.

    Args:
        features: [N, D]. truth, predicted: classes [N]. confidence: in the predicted class [N], 0 to 1.
        others: features [M, D] and classes [M] of more images that count as neighbours.

    Returns:
        The doubtful labels, most doubtful first.
    """
    wrong = ((predicted != truth) & (confidence >= _SURE)).nonzero().flatten()
    known, classes = (torch.cat([own, *more]) for own, more in ((features, others[:1]), (truth, others[1:])))
    k = min(_NEIGHBOURS, len(known) - 1)
    if not k or not len(wrong):
        return []
    mean = known.mean(0)
    _, neighbours = nearest(features[wrong] - mean, known - mean, k + 1)
    doubts = []
    for index, row in zip(wrong.tolist(), neighbours.tolist(), strict=True):
        around = [classes[other] for other in row if other != index][:k]
        agreeing = sum(int(label == predicted[index]) for label in around)
        if 2 * agreeing > k:
            doubts.append(Doubt(index, agreeing, k))
    return sorted(doubts, key=lambda doubt: (-doubt.agreeing, -float(confidence[doubt.index])))
