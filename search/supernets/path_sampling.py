"""Sample the networks that each step of a supernet's training uses, as a function of (seed, step)."""

from __future__ import annotations

import math
import random
from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from typing import Any, Literal, final

from glit_models import Spec
from glit_models.errors import SearchError

from ..spaces.budget import Budget, show_cost
from ..spaces.budget_sampler import BudgetSampler
from ..spaces.space import SearchSpace

__all__ = ["BalancedSampler", "DrawPaths", "IdentitySampler", "Sampling", "path_sampling", "solve_identity_prob"]

Sampling = Literal["uniform", "budget", "balanced", "sandwich", "identity"]
DrawPaths = Callable[[int], Sequence[Spec]]  # step -> its paths
_NUM_FOR_MEAN = 1000  # random networks whose mean cost is compared with the budget, as in ViTAS


def path_sampling(
    sampler: BudgetSampler | IdentitySampler,
    sampling: Sampling,
    num_paths: int,
    seed: int,
    ends: Sequence[Spec] = (),
    widen_steps: float = 0.0,
) -> DrawPaths:
    """Return the function that draws the paths of each step.

    Args:
        sampler: draws the random paths; 'balanced' uses only its space.
        sampling: 'balanced' for `BalancedSampler`; 'sandwich' for `ends` first in every step (arXiv 1903.05134, section
            3.1); otherwise each path is drawn independently.
        num_paths: number of paths per step.
        seed: seed of all draws.
        ends: for 'sandwich', the largest and the smallest network.
        widen_steps: number of initial steps that use only random networks of the larger sizes, first of the largest,
            then of more and more (ViT-ResNAS, arXiv 2109.00642). Without budgets, for 'uniform' and 'sandwich'.
    """
    if sampling == "balanced":
        balanced = BalancedSampler(sampler.space, seed)
        return lambda step: [balanced.draw(step * num_paths + place) for place in range(num_paths)]

    fixed = list(ends) if sampling == "sandwich" else []

    def draw(step: int) -> list[Spec]:
        rng = random.Random(f"{seed} {step}")
        if step < widen_steps:
            space = sampler.space.largest(step / widen_steps)
            return fixed + [space.sample(rng) for _ in range(num_paths - len(fixed))]
        if isinstance(sampler, IdentitySampler):
            return [sampler.sample(rng) for _ in range(num_paths)]
        return fixed + [sampler.sample(rng)[0] for _ in range(num_paths - len(fixed))]

    return draw


@final
class IdentitySampler:
    """Draws members of a space whose blocks are identity blocks with one probability (ViTAS, arXiv 2106.13700).

    Width, depth and the other options of a block are uniform over choices. Blocks without the option to be an identity
    block, or without another one, are drawn as usual.

    Args:
        space: the space of the members.
        prob: probability that a block is an identity block, from 0 to 1.
    """

    def __init__(self, space: SearchSpace, prob: float) -> None:
        self.space, self.prob = space, prob
        known = {options: space.identity_of(options) for options in dict.fromkeys(space.block_options)}
        self._identities = [known[options] for options in space.block_options]

    def sample(self, rng: random.Random) -> Spec:
        """Draw a random member. With another `prob`, the same `rng` gives the same network but for identity blocks."""
        spec = self.space.sample(rng)
        blocks = []
        for block, options, identity in zip(spec.blocks, self.space.block_options, self._identities, strict=False):
            if identity is not None:
                is_identity = rng.random() < self.prob
                while block == identity:
                    block = options.draw(rng, "choices")
                block = identity if is_identity else block
            blocks.append(block)
        return self.space.make_spec(blocks, spec.embed_dim)


def solve_identity_prob(space: SearchSpace, budget: Budget, seed: int) -> float:
    """The probability of identity blocks, nearest to 0.5, at which random networks are within a budget on average.

    In steps of 0.01, over 1000 random networks, as in ViTAS (arXiv 2106.13700). The mean cost falls as the probability
    rises, because the networks are the same but for identity blocks; so bisection finds the step that ViTAS's walk
    from 0.5 ends at.

    Args:
        space: its blocks may be identity blocks.
        budget: bounds of the mean cost.
        seed: seed of the random networks.

    Raises:
        SearchError: if no step from 0 to 0.99 gives a mean within the budget.
    """

    @cache
    def mean(percent: int) -> float:
        sampler = IdentitySampler(space, percent / 100)
        rngs = (random.Random(f"{seed} identity {place}") for place in range(_NUM_FOR_MEAN))
        return math.fsum(budget.cost(sampler.sample(rng)) for rng in rngs) / _NUM_FOR_MEAN

    low, high = (-math.inf if budget.low is None else budget.low), (math.inf if budget.high is None else budget.high)
    percent = 50
    if mean(50) > high:
        percent += bisect_left(range(50, 99), True, key=lambda p: mean(p) <= high)
    elif mean(50) < low:
        percent -= bisect_left(range(50, 0, -1), True, key=lambda p: mean(p) >= low)
    if budget.admits(mean(percent)):
        return percent / 100
    near = [f"{show_cost(round(mean(p)))} at {p / 100:.2f}" for p in (percent - 1, percent) if p >= 0]
    raise SearchError(
        f"supernet.sampling=identity: no probability of identity blocks gives random networks {budget} on average "
        f"({', '.join(near)}); widen or move budget.{budget.name}, or set supernet.sampling=budget"
    )


@final
class BalancedSampler:
    """Draws members of a space so that each value of each gene of each block is drawn equally often.

    Values are drawn without replacement until all values of the gene have been drawn (strict fairness: FairNAS, arXiv
    1907.01845, section 3). Depth and width count as genes. A block with several products of choices draws each in
    proportion to its combinations. A gene's draw counts even if the gene has no effect, such as the kernel of a block
    without local heads. Budgets do not apply.

    Args:
        space: the space of the members.
        seed: seed of all draws.
    """

    def __init__(self, space: SearchSpace, seed: int) -> None:
        self.space = space
        self._widths = _Deck(f"{seed} embed_dim", space.embed_dims)
        self._depths = _Deck(f"{seed} depth", space.depths)
        self._products = []
        self._genes = []
        for index, products in enumerate(space.blocks):
            values = [
                {gene: product.of(gene) for gene in product.known_genes(space.spec_class) if product.of(gene)}
                for product in products
            ]
            sizes = [math.prod(map(len, of_gene.values())) for of_gene in values]
            cards = [place for place, size in enumerate(sizes) for _ in range(size // math.gcd(*sizes))]
            self._products.append(_Deck(f"{seed} {index}", cards))
            self._genes.append([
                {gene: _Deck(f"{seed} {index} {place} {gene}", cards) for gene, cards in of_gene.items()}
                for place, of_gene in enumerate(values)
            ])  # fmt: skip

    def draw(self, number: int) -> Spec:
        """The member with this number, from 0."""
        depth = self._depths.card(number)
        blocks = []
        for index in range(depth):
            drawn = self._depths.count(number, [other for other in self.space.depths if other > index])
            place = self._products[index].card(drawn)
            drawn = self._products[index].count(drawn, (place,))
            genes = {gene: deck.card(drawn) for gene, deck in self._genes[index][place].items()}
            blocks.append(self.space.spec_class.block_from_genes(genes, self.space.network))
        return self.space.make_spec(blocks, self._widths.card(number))


@final
class _Deck:
    """Cards that are drawn without replacement, and reshuffled when all have been drawn."""

    def __init__(self, seed: str, cards: Sequence[Any]) -> None:
        self._seed, self._cards = seed, cards
        self._shuffled = lru_cache(maxsize=1)(self._shuffle)

    def _shuffle(self, turn: int) -> list[Any]:
        rng = random.Random(f"{self._seed} {turn}")
        keys = [rng.random() for _ in self._cards]
        return [self._cards[place] for place in sorted(range(len(keys)), key=keys.__getitem__)]

    def card(self, number: int) -> Any:
        """The card with this number, from 0."""
        turn, place = divmod(number, len(self._cards))
        return self._shuffled(turn)[place]

    def count(self, number: int, wanted: Sequence[Any]) -> int:
        """How many of the cards before this number are wanted ones."""
        turn, place = divmod(number, len(self._cards))
        before = self._shuffled(turn)[:place]
        return sum(turn * self._cards.count(card) + before.count(card) for card in wanted)
