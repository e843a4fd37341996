"""What in a labelled data set deserves a second look: near-duplicates, and labels that are likely wrong.

Axes: N images, D features, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .neighbours import nearest

__all__ = ["Doubt", "Pair", "doubtful_labels", "near_duplicates"]

_SIMILAR = 0.98  # cosine of features less their mean
_SAME_PIXELS = 0.985  # correlation of small copies
_SIDE = 32  # of these
_SAME_LEVEL = 4  # of 255, between images that show nothing else
_MOST_PAIRS = 300  # whose images are opened
_NEIGHBOURS = 10
_SURE = 0.5  # the probability of another class than the label's

Open = Callable[[int], Image.Image]


@dataclass(frozen=True)
class Pair:
    """Two images that are nearly the same: their indices, and how near their features and their pixels are, at most 1.

    `second` is of the other data set where two were compared.
    """

    first: int
    second: int
    similarity: float
    correlation: float


def near_duplicates(
    features: Tensor, open_image: Open, others: Tensor | None = None, open_other: Open | None = None
) -> list[Pair]:
    """Images that are copies of each other but for size and compression, nearest first.

    Each image is compared with its nearest neighbour by features. Because a good classifier gives nearly the same
    features to all images of a class, the pixels of small copies decide, for at most 300 pairs.

    Args:
        features: [N, D]. others: of another data set [M, D]; None looks for pairs within the first.
        open_image, open_other: index -> image.
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
    """Of the pixels of small copies, each channel less its mean; of flat images, 1 where the colour is the same."""
    small = [np.asarray(image.convert("RGB").resize((_SIDE, _SIDE)), np.float64) for image in (first, second)]
    one, other = (values - values.mean((0, 1)) for values in small)
    if min(one.std(), other.std()) < 1:
        return float(np.abs(small[0] - small[1]).max() <= _SAME_LEVEL)
    return float((one * other).mean() / (one.std() * other.std()))


@dataclass(frozen=True)
class Doubt:
    """An image whose label is likely wrong: its index, and how many of its neighbours bear the predicted class."""

    index: int
    agreeing: int
    neighbours: int


def doubtful_labels(
    features: Tensor, truth: Tensor, predicted: Tensor, confidence: Tensor, others: Sequence[Tensor] = ()
) -> list[Doubt]:
    """Images of which the model is sure that they are of another class, and most of their neighbours are of that one.

    Args:
        features: [N, D]. truth, predicted: classes [N]. confidence: in the predicted class [N], 0 to 1.
        others: features [M, D] and classes [M] of further images that count as neighbours.

    Returns:
        The most doubtful first.
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
