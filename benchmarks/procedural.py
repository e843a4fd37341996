"""Procedural warm-up: train the blocks of a vision transformer on brackets before the first image.

Based on "Can You Learn to See Without Images?" (Shinnick et al., arXiv 2511.13945): random strings of the formal
language k-Dyck (balanced brackets of k kinds), as long as an image has patches, enter through a frozen random embedding
instead of the patch embedding; some symbols are masked, and the blocks learn to predict them. Afterwards only the
blocks are kept, and the training on images begins.

Axes: B sequences, N symbols, C channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glit_models import GLiT

__all__ = ["dyck", "warm_up"]

NUM_KINDS = 64
MASK = 2 * NUM_KINDS  # the mask symbol
MASKED_SHARE = 0.3
OPEN_PROB = 0.5
BATCH, LR, WEIGHT_DECAY = 32, 1e-3, 0.05


def dyck(batch: int, length: int, generator: torch.Generator, num_kinds: int = NUM_KINDS) -> Tensor:
    """Balanced strings of brackets: int64 [B, N], where kind k opens as k and closes as `num_kinds + k`.

    A bracket opens with probability 1/2 where the string allows both, and its kind is random.

    Raises:
        ValueError: if the length is odd.
    """
    if length % 2:
        raise ValueError(f"length must be even, got {length}")
    kinds = torch.randint(num_kinds, (batch, length), generator=generator)
    opens = torch.rand(batch, length, generator=generator) < OPEN_PROB
    strings = torch.empty(batch, length, dtype=torch.int64)
    rows = torch.arange(batch)
    stack = torch.zeros(batch, length // 2 + 1, dtype=torch.int64)  # kinds of the open brackets; index 0 is never read
    depth = torch.zeros(batch, dtype=torch.int64)
    for place in range(length):
        open_here = (opens[:, place] | (depth == 0)) & (depth < length - place)
        closing = stack[rows, depth]
        strings[:, place] = torch.where(open_here, kinds[:, place], num_kinds + closing)
        depth = depth + torch.where(open_here, 1, -1)
        stack[rows, depth] = torch.where(open_here, kinds[:, place], stack[rows, depth])
    return strings


def warm_up(model: GLiT, steps: int, seed: int) -> float:
    """Train the blocks of a model on masked k-Dyck strings, in place; no other weights change.

    Args:
        model: on the CPU, of an image size with an even number of patches.
        steps: optimiser steps, of 32 strings each.
        seed: seed of the strings, the masks, the embedding and the head.

    Returns:
        The fraction of hidden symbols predicted correctly in the last tenth of the steps.
    """
    generator = torch.Generator().manual_seed(seed)
    embedding = 0.02 * torch.randn(MASK + 1, model.embed_dim, generator=generator)  # as wide as the position embedding
    head = nn.Linear(model.embed_dim, 2 * NUM_KINDS)
    nn.init.trunc_normal_(head.weight, std=0.02, generator=generator)
    nn.init.zeros_(head.bias)
    parameters = [*model.blocks.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=LR, weight_decay=WEIGHT_DECAY)
    ramp = max(steps // 10, 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / ramp, 1.0))
    model.train()
    shares = []
    for _ in range(steps):
        loss, share = _masked_loss(model, head, embedding, generator)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        shares.append(share)
    last = shares[-ramp:]
    return sum(last) / len(last)


def _masked_loss(model: GLiT, head: nn.Module, embedding: Tensor, generator: torch.Generator) -> tuple[Tensor, float]:
    """The loss of one batch, and the fraction of its hidden symbols that were predicted."""
    strings = dyck(BATCH, model.patch_embed.num_patches, generator)
    hidden = torch.rand(strings.shape, generator=generator) < MASKED_SHARE
    x = embedding[torch.where(hidden, MASK, strings)]  # [B, N, C]
    if model.cls_token is not None:
        x = torch.cat([model.cls_token.detach().expand(len(x), -1, -1), x], dim=1)
    x = model.norm(model.blocks(x + model.pos_embed.detach()))[:, model.num_prefix_tokens :]
    logits, symbols = head(x[hidden]), strings[hidden]
    return F.cross_entropy(logits, symbols), (logits.argmax(1) == symbols).float().mean().item()
