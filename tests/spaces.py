"""Search spaces for tests, small and random ones. No assertions."""

import random
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence

from glit_models.search import BlockChoices, SearchSpace, autoformer, glit, glit_released, vitas

# Two blocks of 2 * 1 * 2 * 2 * 2 = 16 combinations, of which 4 + 2 differ: small enough to go through.
PRODUCT = glit(48, 2, 2, kernel_sizes=(3, 5), expand_ratios=(1,), qkv_ratios=(0.5, 1), mlp_ratios=(2, 4))
TIED = glit_released(48, 3, 2, kernel_sizes=(3, 5), expand_ratios=(1, 2), mlp_ratios=(2, 6), mixed_kernel_size=5)


def choices(heads: Sequence[int], mlp: Sequence[float], qkv: Sequence[float] = (), kernels: Sequence[int] = (),
            expands: Sequence[int] = ()) -> BlockChoices:  # fmt: skip
    """A product of choices for a GLiT block."""
    return BlockChoices(
        num_global_heads=heads, mlp_ratios=mlp, qkv_ratios=qkv, kernel_sizes=kernels, expand_ratios=expands
    )


SCATTERED = SearchSpace(  # options one by one, with nothing in common
    (
        (choices((2,), (1,), (0.5,)), choices((0,), (3,), (), (7,), (1,)), choices((1,), (5,), (2,), (3,), (4,))),
        (choices((0, 1, 2), (1, 2), (1,), (3, 5), (1,)),),
    ),
    embed_dim=32,
    num_heads=2,
    patch_size=8,
)
# 2 widths * (2 * 2) ** depth: 2 * (16 + 64) networks of two or three blocks.
AUTOFORMER = autoformer((24, 32), (2, 3), (1, 2), (1.0, 2.0), 8, head_dim=8, max_relative_position=2)
# 2 widths * 9 ** 3: an identity block, or 2 numbers of heads, 2 widths of each and 2 hidden widths.
VITAS = vitas((24, 32), 3, (0, 2, 4), (48, 96), (16, 32), 8)
LOCAL = glit(
    24, 3, 2, 8, kernel_sizes=(3, 5), expand_ratios=(1, 2), qkv_ratios=(1,), mlp_ratios=(1, 2), window_sizes=(3, 5),
    local_parts=("local_conv", "local_conv2d", "window_attention"),
)  # fmt: skip
SMALL_SPACES = {"product": PRODUCT, "tied": TIED, "scattered": SCATTERED}


def random_space(rng: random.Random) -> SearchSpace:
    """Any space of a few blocks, each with one to three products of choices."""
    num_heads = rng.randint(1, 4)

    def some(values: list) -> tuple:
        return tuple(rng.sample(values, rng.randint(1, len(values))))

    def product() -> BlockChoices:
        heads = some(list(range(num_heads + 1)))
        return choices(heads, some([1, 2, 4]), some([0.5, 1, 2]), some([3, 5, 31]), some([1, 2, 4]))

    blocks = tuple(tuple(product() for _ in range(rng.randint(1, 3))) for _ in range(rng.randint(1, 4)))
    return SearchSpace(blocks, 16 * num_heads, num_heads=num_heads, patch_size=rng.choice([8, 16]))


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
