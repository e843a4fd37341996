"""How good networks are with the weights that they inherit from a supernet: a population at a time, as a tree.

What a block computes, and its BatchNorm statistics, depend only on the width of the network and the blocks before it.
So networks that begin alike share the work up to where they part, within a generation and from one to the next, and the
scores are those of evaluating each by itself. Which networks come next is others' business.

Axes: B batch, N tokens, C channels, S images of the search set.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, final

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from glit_models import Spec
from glit_models.errors import SearchError

from .supernet import Supernet

__all__ = ["Evaluator", "Images", "Score", "may_reach", "prefixes_of"]

Prefix = tuple[Any, ...]  # how a network begins: its width, then its first blocks


@final
@dataclass(frozen=True)
class Images:
    """Batches that can be gone through again and again: images [B, in_chans, H, W] and labels [B]."""

    batches: Callable[[], Iterable[tuple[Tensor, Tensor]]]
    num_batches: int


@final
@dataclass(frozen=True, eq=False)
class Score:
    """What is known of one network.

    Attributes:
        accuracy: percent of the search set; estimated, from the difference to a better network on the pictures seen,
            where `images` is less than all.
        images: pictures that were seen.
        correct: for each of these, whether it was right: [images] bool.
    """

    accuracy: float
    images: int
    correct: np.ndarray


def may_reach(correct: np.ndarray, reference: np.ndarray, risk: float) -> bool:
    """Whether a network may still be as often right as another one on all pictures, after the first S of them.

    The pictures come in random order, so those on which just one of the two is right are drawn without replacement
    from all such. If it were at least as good in the end, it would trail by d of m of them with a probability of at
    most exp(-d**2 / 2m) (Hoeffding 1963, theorem 2 and section 6); below `risk` it may not.

    Args:
        correct, reference: whether each of them was right on each picture, [S] bool.
        risk: probability of a wrong no.
    """
    wins = int(np.count_nonzero(correct & ~reference))
    losses = int(np.count_nonzero(reference & ~correct))
    behind = losses - wins
    return behind <= 0 or math.exp(-(behind**2) / (2 * (wins + losses))) > risk


@final
@dataclass(eq=False)
class _Node:
    """A prefix of some networks; `leaf` where one of them ends, which others may go on from."""

    prefix: Prefix
    children: dict[Any, _Node] = field(default_factory=dict)  # by width below the root, else by block
    leaf: Spec | None = None


def _tree(specs: Iterable[Spec]) -> _Node:
    root = _Node(())
    for spec in specs:
        node = root
        for step in (spec.embed_dim, *spec.blocks):
            node = node.children.setdefault(step, _Node((*node.prefix, step)))
        node.leaf = spec
    return root


@final
class _Cache:
    """Outputs of prefixes, by batch, while they fit into a number of bytes. What is in stays until `retain`."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self.bytes = max_bytes, 0
        self.outputs: dict[tuple[str, int, Prefix], Tensor] = {}

    def put(self, key: tuple[str, int, Prefix], output: Tensor) -> None:
        if self.bytes + output.nbytes <= self.max_bytes:
            self.outputs[key] = output
            self.bytes += output.nbytes

    def retain(self, prefixes: set[Prefix]) -> None:
        self.outputs = {key: output for key, output in self.outputs.items() if key[2] in prefixes}
        self.bytes = sum(output.nbytes for output in self.outputs.values())


@final
class Evaluator:
    """Scores networks of one supernet, whose weights must not change meanwhile.

    Args:
        supernet: in evaluation mode, on the device that computes.
        calibration: training images, on which BatchNorm statistics are recomputed for each network.
        search_set: the images to score on, in the same random order every time.
        memory_mb: for the outputs of blocks, in units of 10**6 bytes.
        share: whether networks share the work on what they have in common; the scores are the same without.
        bf16: compute under bfloat16 autocast.
        on_batch: called with (batches done, batches in all) during an evaluation.

    Raises:
        SearchError: if one batch alone does not fit into the memory.
    """

    def __init__(
        self,
        supernet: Supernet,
        calibration: Images,
        search_set: Images,
        *,
        memory_mb: float = 2000,
        share: bool = True,
        bf16: bool = False,
        on_batch: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        self.supernet = supernet.eval()
        self._images = {"calibration": calibration, "search": search_set}
        self._inputs: dict[str, list[tuple[Tensor, np.ndarray]]] = {}  # embedded tokens and labels, if they fit
        self._memory = int(memory_mb * 1e6)
        self._share, self._bf16, self._on_batch = share, bf16, on_batch
        self._cache = _Cache(0)
        self._sized = False
        self._statistics: dict[Prefix, dict[str, Tensor]] = {}
        self.block_images = 0  # images that went through a block, calibration included

    # ---- what is evaluated ----

    @torch.inference_mode()
    def evaluate(self, specs: Sequence[Spec], reference: Score | None = None, risk: float = 0.0) -> dict[Spec, Score]:
        """The scores of these networks; each is the same whatever others are evaluated with it, or were before.

        Args:
            specs: members of the supernet's space.
            reference: of a network, fully scored; those that cannot reach it are given up early.
            risk: probability, for each network, that one is given up although it would have been as good.

        Raises:
            SearchError: if a spec is no member of the space.
        """
        if not self._share and len(specs) > 1:
            scores: dict[Spec, Score] = {}
            for spec in specs:
                scores |= self.evaluate([spec], reference, risk)
            return scores
        if not self._share:
            self._cache.retain(set())
            self._statistics.clear()
        specs = [self.supernet.space.canonical(spec) for spec in specs]
        self._calibrate(specs)
        return self._score(specs, reference, risk)

    def retain(self, specs: Iterable[Spec]) -> None:
        """Make room, if it is scarce, by forgetting what these networks do not begin with."""
        if self._cache.bytes > self._cache.max_bytes / 2:
            self._cache.retain({prefix for spec in specs for prefix in prefixes_of(spec)[:-1]})

    def _calibrate(self, specs: Sequence[Spec]) -> None:
        """BatchNorm statistics of every block of these networks, over the calibration batches (SPOS, section 3.4).

        As `torch.optim.swa_utils.update_bn` computes them: each batch is normalised by its own statistics, and those
        of all batches are averaged.
        """
        missing = [spec for spec in specs if any(p not in self._statistics for p in prefixes_of(spec))]
        if not missing:
            return
        tree, fresh = _tree(missing), dict[Prefix, dict[str, Tensor]]()
        for number, x, _ in self._embedded("calibration"):
            for _ in self._walk(tree, x, ("calibration", number), fresh):
                pass
        self._statistics |= fresh

    def _score(self, specs: Sequence[Spec], reference: Score | None, risk: float) -> dict[Spec, Score]:
        left = dict.fromkeys(specs)
        correct: dict[Spec, list[np.ndarray]] = {spec: [] for spec in left}
        stopped: dict[Spec, Score] = {}
        tree, seen = _tree(left), 0
        for number, x, labels in self._embedded("search"):
            for spec, y in self._walk(tree, x, ("search", number), None):
                correct[spec].append(self._predict(y) == labels)
            seen += len(labels)
            if reference is not None and risk > 0 and number + 1 < self._images["search"].num_batches:
                # The risk is that of all looks together.
                ended = self._losers(left, correct, reference, risk / (self._images["search"].num_batches - 1), seen)
                stopped |= ended
                if ended:
                    left = {spec: None for spec in left if spec not in ended}
                    tree = _tree(left)
            if not left:
                break
        whole = {spec: np.concatenate(correct[spec]) for spec in left}
        scores = {spec: Score(100 * float(right.mean()), len(right), right) for spec, right in whole.items()}
        return {spec: scores.get(spec) or stopped[spec] for spec in specs}

    def _losers(
        self, left: Iterable[Spec], correct: dict[Spec, list[np.ndarray]], reference: Score, risk: float,
        seen: int,
    ) -> dict[Spec, Score]:  # fmt: skip
        ended = {}
        for spec in left:
            right, other = np.concatenate(correct[spec]), reference.correct[:seen]
            if not may_reach(right, other, risk):
                behind = 100 * (int(other.sum()) - int(right.sum())) / seen
                ended[spec] = Score(reference.accuracy - behind, seen, right)
        return ended

    # ---- how ----

    def _embedded(self, kind: str) -> Iterator[tuple[int, Tensor, np.ndarray]]:
        """The batches of a kind: number, tokens [B, N, C] before the first block, labels [B]."""
        if kind in self._inputs:
            batches: Iterable[tuple[Tensor, np.ndarray]] = self._inputs[kind]
        else:
            batches = self._embed(kind)
        for number, (x, labels) in enumerate(batches):
            yield number, x, labels
            done = number + 1 + (self._images["calibration"].num_batches if kind == "search" else 0)
            self._on_batch(done, sum(images.num_batches for images in self._images.values()))

    def _embed(self, kind: str) -> Iterator[tuple[Tensor, np.ndarray]]:
        """Reads and embeds the batches, and keeps them if all of them take at most a quarter of the memory."""
        kept: list[tuple[Tensor, np.ndarray]] | None = []
        device = next(self.supernet.parameters()).device
        for images, labels in self._images[kind].batches():
            with self._autocast(device):
                x = self.supernet.embed(images.to(device), self.supernet.width)
            self._size_cache(x)
            if kept is not None and (len(kept) + 1) * x.nbytes <= self._memory / 4:
                kept.append((x, labels.cpu().numpy()))
            else:
                kept = None
            yield x, labels.cpu().numpy()
        if kept is not None:
            self._inputs[kind] = kept

    def _size_cache(self, x: Tensor) -> None:
        if self._sized:
            return
        self._sized = True
        stack = (self.supernet.space.depth + 1) * x.nbytes  # one output at each branch on the way to a network
        if stack > self._memory:
            raise SearchError(
                f"evaluation.memory_mb must be at least {math.ceil(stack / 1e6)} for batches of {len(x)} images, "
                f"got {self._memory / 1e6:g}"
            )
        self._cache.max_bytes = max(self._memory // 2 - stack, 0) if self._share else 0

    def _walk(
        self, node: _Node, x: Tensor, batch: tuple[str, int], fresh: dict[Prefix, dict[str, Tensor]] | None
    ) -> Iterator[tuple[Spec, Tensor]]:
        """Every network below `node` with the output of its last block, from the output `x` [B, N, C] of the node's.

        With `fresh` the statistics of blocks that have none are collected there, and all normalise by the batch's.
        """
        while node.children:
            if node.leaf is not None:
                yield node.leaf, x
            *others, last = node.children.items()
            for step, child in others:
                yield from self._walk(child, self._step(child, step, x, batch, fresh), batch, fresh)
            x = self._step(last[1], last[0], x, batch, fresh)  # of the last one, nothing waits for the way back
            node = last[1]
        if node.leaf is not None:
            yield node.leaf, x

    def _step(
        self, node: _Node, step: Any, x: Tensor, batch: tuple[str, int],
        fresh: dict[Prefix, dict[str, Tensor]] | None,
    ) -> Tensor:  # fmt: skip
        """From the output of a node's parent to its own: the first channels of the tokens, or a block."""
        if len(node.prefix) == 1:
            return x[..., :step]
        key = (*batch, node.prefix)
        known = fresh is None or node.prefix in self._statistics
        if known and key in self._cache.outputs:
            return self._cache.outputs[key]
        place = len(node.prefix) - 2
        block, parts = self.supernet.blocks[place], self.supernet.parts_of(place, step, node.prefix[0])
        if parts.is_identity:
            if fresh is not None:
                fresh.setdefault(node.prefix, {})
            return x
        tensors, template = block.tensors(parts), block.template(parts)
        if parts.has_running_statistics:
            own = _statistics_in(tensors)
            if fresh is None:
                tensors |= self._statistics[node.prefix]
            elif known:
                tensors |= {name: tensor.clone() for name, tensor in own.items()}
            else:
                if node.prefix not in fresh:
                    fresh[node.prefix] = {name: _reset(name, tensor) for name, tensor in own.items()}
                tensors |= fresh[node.prefix]
        elif fresh is not None:
            fresh.setdefault(node.prefix, {})
        with self._autocast(x.device), _collecting(template, fresh is not None):
            y = functional_call(template, tensors, (x,))
        self.block_images += len(x)
        if node.leaf is None:
            self._cache.put(key, y)
        return y

    def _predict(self, x: Tensor) -> np.ndarray:
        """[B, N, C] after the last block -> the most probable classes [B]."""
        with self._autocast(x.device):
            return self.supernet.classify(x).argmax(1).cpu().numpy()

    def _autocast(self, device: torch.device) -> Any:
        return torch.autocast(device.type, torch.bfloat16) if self._bf16 else nullcontext()


def prefixes_of(spec: Spec) -> list[Prefix]:
    """All beginnings of a network that have a block, the shortest first."""
    return [(spec.embed_dim, *spec.blocks[:depth]) for depth in range(1, spec.depth + 1)]


def _statistics_in(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    names = ("running_mean", "running_var", "num_batches_tracked")
    return {name: tensor for name, tensor in tensors.items() if name.rpartition(".")[2] in names}


def _reset(name: str, tensor: Tensor) -> Tensor:
    return torch.ones_like(tensor) if name.endswith("running_var") else torch.zeros_like(tensor)


class _collecting:  # noqa: N801 - used as a function
    """BatchNorm normalises by the batch and averages its statistics over batches, inside a `with`."""

    def __init__(self, template: nn.Module, collect: bool) -> None:
        self.norms = [m for m in template.modules() if isinstance(m, _BatchNorm)] if collect else []

    def __enter__(self) -> None:
        for norm in self.norms:
            norm.train()
            norm.momentum = None

    def __exit__(self, *_: Any) -> None:
        for norm in self.norms:
            norm.eval()
            norm.momentum = 0.1
