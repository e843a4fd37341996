"""A custom fitness: how many of a network's parameters lie in its later half."""

from collections.abc import Sequence

from glit_models.search import Fitness

from glit_models import Spec


class LateParameters(Fitness):
    """The share of the blocks' parameters that the later half of the blocks holds, in percent."""

    label = "parameters in the later half, %"

    def score(self, specs: Sequence[Spec]) -> Sequence[float]:
        return [self._share(spec) for spec in specs]

    def _share(self, spec: Spec) -> float:
        params = [spec.block_parts(index).num_params for index in range(spec.depth)]
        return 100 * sum(params[spec.depth // 2 :]) / sum(params)
