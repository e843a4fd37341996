"""A linear model of networks' quality, with one coefficient for each value of each gene of each block.

It is fitted to scored networks and predicts the scores of others. Its coefficients estimate the contribution of each
choice to the score.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from glit_models import Spec
from glit_models.errors import SearchError

from ..spaces.space import SearchSpace

__all__ = ["Surrogate"]

Feature = tuple[int | str, str, Any]  # block (or the whole network), gene, value


@final
class Surrogate:
    """Ridge regression on one-hot genes.

    The penalty minimises the leave-one-out error, which ridge regression gives in closed form
    (A. E. Hoerl and R. W. Kennard, Technometrics 12, 1970; G. H. Golub et al., Technometrics 21, 1979).

    Args:
        space: the space of the networks.
        specs: scored networks.
        values: score of each of them; larger is better.
        penalties: candidate penalties of the squared coefficients.

    Raises:
        SearchError: on fewer than two networks, or if there is not one finite number for each.
    """

    def __init__(
        self,
        space: SearchSpace,
        specs: Sequence[Spec],
        values: Sequence[float],
        penalties: Sequence[float] = (0.01, 0.1, 1, 10, 100, 1000),
    ) -> None:
        self.space = space
        y = np.asarray(values, np.float64)
        if len(specs) < 2 or y.shape != (len(specs),) or not np.isfinite(y).all():
            raise SearchError(f"a surrogate needs two networks or more, and a finite number for each; got {len(specs)}")
        self.features = list(dict.fromkeys(feature for spec in specs for feature in self._features_of(spec)))
        self._place = {feature: place for place, feature in enumerate(self.features)}
        X = self._encode(specs)
        self._mean, self._offset = X.mean(0), float(y.mean())
        X, y = X - self._mean, y - self._offset
        left, singular, right = np.linalg.svd(X, full_matrices=False)
        projected = left.T @ y

        def shrink(penalty: float) -> NDArray[np.float64]:
            return singular**2 / (singular**2 + penalty)

        def left_out_error(penalty: float) -> float:
            kept = shrink(penalty)
            residuals = y - left @ (kept * projected)
            leverage = (left**2) @ kept + 1 / len(y)  # the mean is fitted too
            return float(np.mean((residuals / np.maximum(1 - leverage, 1e-9)) ** 2))

        self.penalty = min(penalties, key=left_out_error)
        weights = np.divide(
            shrink(self.penalty) * projected, singular, out=np.zeros_like(singular), where=singular > 1e-9
        )
        self._coefficients = right.T @ weights

    def predict(self, specs: Sequence[Spec]) -> list[float]:
        """Predicted scores of these networks; values that no scored network had count as average."""
        return ((self._encode(specs) - self._mean) @ self._coefficients + self._offset).tolist()

    def effects(self) -> Mapping[Feature, float]:
        """The contribution of each value of each gene of each block, relative to the mean."""
        return dict(zip(self.features, self._coefficients.tolist(), strict=True))

    def _features_of(self, spec: Spec) -> list[Feature]:
        genes_of = self.space.spec_class.genes_of
        features: list[Feature] = [("network", "embed_dim", spec.embed_dim), ("network", "depth", spec.depth)]
        for index, block in enumerate(spec.blocks):
            features += [(index, gene, value) for gene, value in genes_of(block).items() if value is not None]
        return features

    def _encode(self, specs: Sequence[Spec]) -> NDArray[np.float64]:
        """Encode networks: one row per network, one column per feature: [S, F]."""
        X = np.zeros((len(specs), len(self.features)))
        for row, spec in zip(X, specs, strict=True):
            for feature in self._features_of(spec):
                if feature in self._place:
                    row[self._place[feature]] = 1
        return X
