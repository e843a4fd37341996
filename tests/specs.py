"""Specs of networks for tests, small enough to build in a fraction of a second. No assertions."""

import random

from glit_models import GLIT_TINY, BlockSpec, GLiTSpec

TINY48 = GLIT_TINY.scaled(48, 3)  # all twelve blocks; the reference tensors are of this one
SMALL = GLiTSpec(TINY48.blocks[:3], 48, 3)  # one global, one local and one mixed block
MIXED = GLiTSpec(TINY48.blocks[2:3], 48, 3)  # the mixed block alone


def random_spec(rng: random.Random) -> GLiTSpec:
    """Any network near the paper's search space, a little beyond it in every direction."""
    num_heads = rng.choice([1, 2, 3, 4])
    blocks = []
    for _ in range(rng.randint(1, 5)):
        num_global = rng.randint(0, num_heads)
        blocks.append(
            BlockSpec(
                num_global_heads=num_global,
                num_local_heads=num_heads - num_global,
                mlp_ratio=rng.choice([0.5, 2, 4, 6]),
                qkv_ratio=rng.choice([0.5, 1, 2]),
                kernel_size=rng.choice([1, 5, 31, 45]),
                expand_ratio=rng.choice([1, 2, 4]),
            )
        )
    return GLiTSpec(tuple(blocks), num_heads * rng.choice([8, 12, 16]), num_heads, rng.choice([4, 8, 16]))
