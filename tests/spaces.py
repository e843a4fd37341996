"""The search spaces that tests go through: small ones, and random ones. Spaces and statistics only, no assertions."""

import random
from collections import Counter
from collections.abc import Callable, Hashable, Mapping

from glit_models.search import BlockChoices, SearchSpace, glit, glit_released

# Two blocks of 2 * 1 * 2 * 2 * 2 = 16 combinations, of which 4 + 2 differ: small enough to go through.
PRODUCT = glit(48, 2, 2, kernel_sizes=(3, 5), expand_ratios=(1,), qkv_ratios=(0.5, 1), mlp_ratios=(2, 4))
TIED = glit_released(48, 3, 2, kernel_sizes=(3, 5), expand_ratios=(1, 2), mlp_ratios=(2, 6), mixed_kernel_size=5)
SCATTERED = SearchSpace(  # options one by one, with nothing in common
    (
        (
            BlockChoices((2,), (1,), (0.5,)),
            BlockChoices((0,), (3,), (), (7,), (1,)),
            BlockChoices((1,), (5,), (2,), (3,), (4,)),
        ),
        (BlockChoices((0, 1, 2), (1, 2), (1,), (3, 5), (1,)),),
    ),
    embed_dim=32,
    num_heads=2,
    patch_size=8,
)  # fmt: skip
SMALL_SPACES = {"product": PRODUCT, "tied": TIED, "scattered": SCATTERED}


def random_space(rng: random.Random) -> SearchSpace:
    """Any space of a few blocks, each with one to three products of choices."""
    num_heads = rng.randint(1, 4)

    def some(values: list) -> tuple:
        return tuple(rng.sample(values, rng.randint(1, len(values))))

    def product() -> BlockChoices:
        heads = some(list(range(num_heads + 1)))
        return BlockChoices(heads, some([1, 2, 4]), some([0.5, 1, 2]), some([3, 5, 31]), some([1, 2, 4]))

    blocks = tuple(tuple(product() for _ in range(rng.randint(1, 3))) for _ in range(rng.randint(1, 4)))
    return SearchSpace(blocks, 16 * num_heads, num_heads, rng.choice([8, 16]))


def chi_square(draw: Callable[[], Hashable], weights: Mapping[Hashable, float], num_draws: int) -> float:
    """The statistic of so many draws against chances by weights, less its mean, in its standard deviations."""
    counts = Counter(draw() for _ in range(num_draws))
    if set(counts) - set(weights):
        return float("inf")
    total = sum(weights.values())
    expected = {key: num_draws * weight / total for key, weight in weights.items()}
    statistic = sum((counts[key] - mean) ** 2 / mean for key, mean in expected.items())
    freedom = len(weights) - 1
    return (statistic - freedom) / (2 * freedom) ** 0.5
