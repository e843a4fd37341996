"""Make a given network cheaper, block by block: the idea of NAT++, applied to whole networks.

Y. Guo et al., Towards accurate and compact architectures via neural architecture transformer, arXiv 2102.10301,
section 3. There every edge of a cell changes its operation to a cheaper type (first level), or to the same or a cheaper
type with a smaller kernel (second level). Here a block changes as a whole.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, final

import numpy as np
from numpy.typing import NDArray

from glit_models import Spec
from glit_models.errors import SearchError

from ..spaces.choices import BlockChoices, key_of
from ..spaces.space import SearchSpace
from .evolution import METHODS, Evolution

__all__ = ["LearnedTransformation", "Transformation", "cheaper_blocks"]


def cheaper_blocks(space: SearchSpace, given: Spec, index: int, cost: Callable[[Spec], float]) -> Iterator[Any]:
    """The options that may replace a block of a network, including itself.

    None may cost more. None may have a larger value of a size that both have: kernel, expansion, ratios, the number of
    attention heads. So attention may become convolution but not vice versa, and kernels may shrink.

    Args:
        cost: maps a network to its cost, additive over its blocks.
    """
    before, after = given.blocks[:index], given.blocks[index + 1 :]
    largest, sizes = cost(given), space.spec_class.genes_of(given.blocks[index])
    for block in space.options(index):
        genes = space.spec_class.genes_of(block)
        pairs = ((genes[name], size) for name, size in sizes.items() if name in genes)
        numbers = (pair for pair in pairs if all(isinstance(value, (int, float)) for value in pair))
        if all(new <= old for new, old in numbers):
            network = space.make_spec((*before, block, *after), given.embed_dim)
            if cost(network) <= largest:
                yield block


class Transformation(Evolution):
    """Evolution among the networks that a given one can be transformed to by replacing blocks with cheaper ones."""

    method = "transform"
    needs_given: ClassVar[bool] = True
    description = "Transformation: a given network, made cheaper block by block, by evolution."

    @classmethod
    def narrow(cls, space: SearchSpace, given: Spec, cost: Callable[[Spec], float]) -> SearchSpace:
        """The networks that the given one can be transformed to.

        Raises:
            SearchError: if it is not a member of the space, or cannot be transformed to any other.
        """
        given = space.canonical(given)
        blocks = []
        for index in range(given.depth):
            genes = (space.spec_class.genes_of(block) for block in cheaper_blocks(space, given, index, cost))
            blocks.append([
                BlockChoices(**{key_of(name): (value,) for name, value in of_block.items() if value is not None})
                for of_block in genes
            ])  # fmt: skip
        narrow = SearchSpace(blocks, given.embed_dim, family=space.family, **space.network)
        if narrow.size == 1:
            raise SearchError("given is the cheapest network that it can become: no block has a cheaper option")
        return narrow


@final
class LearnedTransformation(Transformation):
    """`Transformation` by a policy that learns from the fitness of its networks (REINFORCE).

    The policy is a softmax per block over the allowed options. After each generation its logits move along the gradient
    of each network's log-probability, times the difference of its fitness to the running mean, in standard deviations.
    NAT++'s policy is a graph network trained on many given networks; for a single one, a table is enough.
    """

    method = "transform_policy"
    uses_surrogate: ClassVar[bool] = False
    description = "Transformation: a given network, made cheaper block by block, by a learned policy."

    def propose(self) -> None:
        """Propose networks drawn from the policy, and random ones if it repeats itself."""
        policy = self._policy()
        options = [options.blocks for options in self.space.block_options]

        def make() -> Spec:
            blocks = (
                of_block[int(np.searchsorted(np.cumsum(p), self.rng.random() * p.sum()).clip(0, len(p) - 1))]
                for of_block, p in zip(options, policy, strict=True)
            )
            return self.space.make_spec(blocks, self.space.embed_dims[0])

        if self.candidates:
            self.add_children("policy", self.config.population, make)
        self.add_random()

    def _policy(self) -> list[NDArray[np.float64]]:
        """The probabilities of each block's options, computed from all generations so far."""
        logits = [np.zeros(len(options.blocks)) for options in self.space.block_options]
        generations: dict[int, list[tuple[Spec, float]]] = defaultdict(list)
        for candidate in self.candidates:
            if candidate.fitness is not None:
                generations[candidate.generation].append((candidate.spec, candidate.fitness))
        known: list[float] = []
        for _, scored in sorted(generations.items()):
            known += [fitness for _, fitness in scored]
            mean, spread = float(np.mean(known)), float(np.std(known)) or 1.0
            self._learn(logits, [(spec, (fitness - mean) / spread) for spec, fitness in scored])
        return [_softmax(values) for values in logits]

    def _learn(self, logits: list[NDArray[np.float64]], scored: Sequence[tuple[Spec, float]]) -> None:
        """One step of gradient ascent, in place."""
        for index, options in enumerate(self.space.block_options):
            gradient = np.zeros_like(logits[index])
            for spec, advantage in scored:
                gradient[options.index[spec.blocks[index]]] += advantage
                gradient -= advantage * _softmax(logits[index])
            logits[index] += self.config.policy_rate * gradient / len(scored)


def _softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    exponents = np.exp(logits - logits.max())
    probabilities: NDArray[np.float64] = exponents / exponents.sum()
    return probabilities


METHODS.register("transform", Transformation)
METHODS.register("transform_policy", LearnedTransformation)
