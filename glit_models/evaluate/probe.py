"""Measure a model's frozen features without fine-tuning, with nearest neighbours and a linear classifier.

Axes: N training images, M scored images, D features, K classes.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.labelled import LabelledSplit, match_classes
from ..data.readable import refuse_broken
from ..embed import embed
from ..errors import Argument, DataError
from ..neighbours import nearest
from ..predict import Classifier
from .scores import Evaluation, evaluate_scores

__all__ = ["FrozenFeatures", "classify_linearly", "embed_splits", "score_linear", "score_neighbours", "vote"]

_TEMPERATURE = 0.07  # as for DINO's weighted neighbours
_L2 = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
_HELD_OUT = 5  # every fifth training image of a class is used to choose the l2
_MOST_STEPS = 200  # of L-BFGS


@dataclass(frozen=True, eq=False)
class FrozenFeatures:
    """Features [N, D] and [M, D] of training and scored images, and their labels [N] and [M] among `class_names`.

    `images_per_second`: of the scored ones, with loading.
    """

    class_names: tuple[str, ...]
    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor
    images_per_second: float


def embed_splits(
    classifier: Classifier, train: LabelledSplit, test: LabelledSplit, batch_size: int = 250, num_workers: int = 0,
    listing: Path = Path("broken-images.txt"),
) -> FrozenFeatures:  # fmt: skip
    """Compute the features of two splits, with a progress bar on a terminal.

    Args:
        train, test: their classes are matched by `match_classes`; the model's classes are not used.
        batch_size, num_workers, listing: see `evaluate.evaluate`.

    Raises:
        DataError: if the splits do not match, have one class or contain broken images; names them all.
        GlitError, WeightsError: see `embed.embed`.
    """
    names = train.class_names
    if len(names) < 2:
        raise DataError(f"{train} has one class, {names[0]}; it takes two or more")
    matched, _ = match_classes(test.name, test.class_names, names, len(names))
    broken: list[str] = []
    found = []
    for split, doing in ((train, "embedding the training images"), (test, "embedding the images to score")):
        started = time.perf_counter()
        features, labels = [], []
        for batch, batch_labels, reasons in embed(classifier, split.source, batch_size, num_workers, doing):
            broken += filter(None, reasons)
            features.append(batch)
            labels.append(batch_labels)
        found.append((torch.cat(features), torch.cat(labels), len(split.source) / (time.perf_counter() - started)))
    refuse_broken(broken, len(train.source) + len(test.source), listing)
    (own, own_labels, _), (other, other_labels, speed) = found
    return FrozenFeatures(names, own, own_labels, other, torch.tensor(matched)[other_labels], speed)


def _evaluation(data: FrozenFeatures, scores: Tensor) -> Evaluation:
    return evaluate_scores(scores, data.test_labels.numpy(), data.class_names, data.images_per_second)


# ---- nearest neighbours ----


def score_neighbours(data: FrozenFeatures, k: int = 20) -> Evaluation:
    """Score each image by the labels of its nearest training images; see `vote`.

    Args:
        k: number of neighbours; limited to the number of training images.

    Raises:
        DataError: if `k` is less than 1.
    """
    if k < 1:
        raise DataError(Argument("knn"), f" must be at least 1, got {k}")
    return _evaluation(data, vote(data.train, data.train_labels, data.test, len(data.class_names), k))


def vote(train: Tensor, labels: Tensor, test: Tensor, num_classes: int, k: int) -> Tensor:
    """Votes [M, K] of the k nearest neighbours by cosine similarity s, each weighted by exp(s / 0.07).

    Source: Wu et al., arXiv 1805.01978; Caron et al. (DINO), arXiv 2104.14294.
    """
    similarity, neighbours = nearest(test, train, min(k, len(train)))
    votes = torch.zeros(len(test), num_classes)
    return votes.scatter_add_(1, labels[neighbours], ((similarity - 1) / _TEMPERATURE).exp())


# ---- a linear classifier ----


def score_linear(data: FrozenFeatures) -> tuple[Evaluation, float]:
    """Score a linear classifier trained on the training images; also returns the l2 penalty chosen for it.

    The penalty is chosen on every fifth training image of each class; the classifier is then trained on all of them.
    """
    order = _order_in_class(data.train_labels, len(data.class_names))
    held_out = order % _HELD_OUT == 1  # starts with the second image of a class, so that one is left for training
    l2 = _L2[2]
    if bool(held_out.any()):
        part, rest = data.train[~held_out], data.train[held_out]
        results = classify_linearly(part, data.train_labels[~held_out], rest, len(data.class_names), _L2)
        truth = data.train_labels[held_out]
        correct = [int((scores.argmax(1) == truth).sum()) for scores in results]
        l2 = _L2[correct.index(max(correct))]  # the strongest of equally good ones
    path = _L2[: _L2.index(l2) + 1]
    scores = classify_linearly(data.train, data.train_labels, data.test, len(data.class_names), path)[-1]
    return _evaluation(data, scores), l2


def _order_in_class(labels: Tensor, num_classes: int) -> Tensor:
    """The index of each image [N] among those of its class."""
    order = torch.empty_like(labels)
    for label in range(num_classes):
        members = labels == label
        order[members] = torch.arange(int(members.sum()))
    return order


def classify_linearly(
    train: Tensor, labels: Tensor, test: Tensor, num_classes: int, penalties: Sequence[float]
) -> list[Tensor]:
    """Logits [M, K] of multinomial logistic regression, for each l2 penalty. Deterministic.

    Minimises the mean cross-entropy plus l2 / 2 times the sum of the squared weights with L-BFGS, on features with mean
    0 and variance 1 over `train` [N, D]. Each penalty starts from the solution of the previous one.
    """
    mean, std = train.mean(0), train.std(0, correction=0).clamp_min(1e-6)
    train, test = (train - mean) / std, (test - mean) / std
    weight = torch.zeros(num_classes, train.shape[1], requires_grad=True)
    bias = torch.zeros(num_classes, requires_grad=True)
    results = []
    for l2 in penalties:
        optimizer = torch.optim.LBFGS(
            [weight, bias], max_iter=_MOST_STEPS, tolerance_grad=1e-5, line_search_fn="strong_wolfe"
        )

        def loss(l2: float = l2, optimizer: torch.optim.Optimizer = optimizer) -> Tensor:
            optimizer.zero_grad()
            value = F.cross_entropy(train @ weight.T + bias, labels) + l2 / 2 * weight.square().sum()
            value.backward()
            return value

        optimizer.step(loss)
        results.append((test @ weight.T + bias).detach())
    return results
