"""Score networks with the weights that they inherit from a supernet, sharing work between them as a tree.

The output of a block and its BatchNorm statistics depend only on the width of the network and the blocks before it. So
networks with a common prefix share its work, within a generation and between generations, and the scores equal those
of evaluating each one separately. The search method decides which networks come next.

If weights are shared from both sides, each side of a network is scored as a network of its own, and the score is the
mean of both scores (ViTAS, arXiv 2106.13700): what is extracted in the end is one side.

Axes: B batch, N tokens, C channels, S images of the search set.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from glit_models import Spec, SpecTransformer
from glit_models.errors import SearchError

from .block import Side, take_channels
from .supernet import Supernet

__all__ = ["Evaluator", "Images", "Score", "add_in_order", "check_memory", "compare_logits", "prefixes_of"]

Prefix = tuple[Any, ...]  # the prefix of a network: its width and side, then its first blocks
Slot = tuple[Spec, Side]  # one side of a network


@final
@dataclass(frozen=True)
class Images:
    """Batches that can be read repeatedly: images [B, in_chans, H, W] and labels [B].

    Attributes:
        batches: returns the batches with given numbers, and reads no others.
        num_batches: number of all batches.
    """

    batches: Callable[[range], Iterable[tuple[Tensor, Tensor]]]
    num_batches: int

    @property
    def all(self) -> range:
        """The numbers of all batches."""
        return range(self.num_batches)


@final
@dataclass(frozen=True)
class Score:
    """The score of a network with inherited weights.

    Attributes:
        accuracy: top-1, in percent of the images.
        loss: mean cross-entropy over the images. Unlike accuracy, it distinguishes networks with equal accuracy.
    """

    accuracy: float
    loss: float


@final
@dataclass(eq=False)
class _Node:
    """A prefix of some networks; `leaf` if one of them ends here, even if others continue."""

    prefix: Prefix
    children: dict[Any, _Node] = field(default_factory=dict)  # by width and side below the root, else by block
    leaf: Slot | None = None


def _tree(specs: Iterable[Spec], sides: Iterable[Side]) -> _Node:
    root = _Node(())
    for side in sides:
        for spec in specs:
            node = root
            for step in ((spec.embed_dim, side), *spec.blocks):
                node = node.children.setdefault(step, _Node((*node.prefix, step)))
            node.leaf = spec, side
    return root


@final
class _Cache:
    """Cached outputs of prefixes, by batch, up to a number of bytes. Entries are kept until `retain`."""

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
    """Scores networks of one supernet, whose weights must not change in the meantime.

    Args:
        supernet: in evaluation mode, on the device that computes.
        calibration: training images, on which BatchNorm statistics are recomputed for each network.
        search_set: the images to score on, in the same random order every time.
        memory_mb: memory for outputs of blocks, in units of 10**6 bytes.
        share: whether networks share work; the scores are the same without.
        bf16: compute under bfloat16 autocast.
        on_batch: called with (finished batches, all batches) during an evaluation.

    Raises:
        SearchError: if a single batch does not fit into the memory.
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
        self._inputs: dict[str, tuple[range, list[tuple[Tensor, Tensor]]]] = {}  # some batches: tokens and labels
        self._memory = int(memory_mb * 1e6)
        self._share, self._bf16, self._on_batch = share, bf16, on_batch
        self._cache = _Cache(0)
        self._sized = False
        self._statistics: dict[Prefix, dict[str, Tensor]] = {}
        self.block_images = 0  # images times blocks computed, including calibration

    # ---- results ----

    @torch.inference_mode()
    def evaluate(self, specs: Sequence[Spec], sides: Sequence[Side] | None = None) -> dict[Spec, Score]:
        """Score these networks; the scores do not depend on other networks that are or were evaluated.

        Args:
            specs: the networks.
            sides: the sides whose scores are averaged; default: those of the supernet.

        Raises:
            SearchError: if a spec is not a member of the space.
        """
        if not self._share and len(specs) > 1:
            return {spec: score for each in specs for spec, score in self.evaluate([each], sides).items()}
        specs = self._prepare(specs)
        if not specs:
            return {}
        parts, count = self._sums(specs, self._images["search"].all, sides or self.supernet.sides)
        # In order of batches, like `add_in_order`: the scores do not depend on which process scored which batch.
        sums = functools.reduce(torch.add, parts.unbind(1)).tolist()
        return {spec: Score(100 * right / count, loss / count) for spec, (right, loss) in zip(specs, sums, strict=True)}

    @torch.inference_mode()
    def sums(self, specs: Sequence[Spec], batches: range) -> Tensor:
        """Correct images and the sum of cross-entropies of each network on each batch: float64 [networks, batches, 2].

        Args:
            batches: numbers of batches of the search set; no others are read.

        Raises:
            SearchError: as in `evaluate`.
        """
        if not self._share and len(specs) > 1:
            return torch.cat([self.sums([spec], batches) for spec in specs])
        return self._sums(self._prepare(specs), batches, self.supernet.sides)[0]

    @torch.inference_mode()
    def losses(self, specs: Sequence[Spec], num_batches: int) -> Tensor:
        """The cross-entropy of each network on each image of the first batches of the search set, [networks, images].

        Raises:
            SearchError: as in `evaluate`.
        """
        if not self._share and len(specs) > 1:
            return torch.cat([self.losses([spec], num_batches) for spec in specs])
        specs, sides = self._prepare(specs), self.supernet.sides
        tree, parts = _tree(specs, sides), dict[Slot, list[Tensor]]()
        for number, x, labels in self._embedded("search", self._images["search"].all[:num_batches]):
            for slot, y in self._walk(tree, x, ("search", number), None):
                losses = F.cross_entropy(self._classify(y, slot[1]), labels, reduction="none")
                parts.setdefault(slot, []).append(losses)
        return _mean_over_sides(specs, sides, {slot: torch.cat(losses).double() for slot, losses in parts.items()})

    @torch.no_grad()
    def extract(self, spec: Spec) -> SpecTransformer:
        """A stand-alone network, in evaluation mode, with the weights and the statistics that it is scored with.

        Raises:
            SearchError: if it is not a member of the space.
        """
        spec = self._prepare([spec])[0]
        model = self.supernet.extract(spec)
        for index, prefix in enumerate(prefixes_of(spec)):
            statistics = {f"blocks.{index}.{name}": tensor for name, tensor in self._statistics[prefix].items()}
            model.load_state_dict(statistics, strict=False)
        return model.eval()

    def _prepare(self, specs: Sequence[Spec]) -> list[Spec]:
        """Convert networks to members of the space, and compute the statistics of their blocks."""
        if not self._share:
            self._cache.retain(set())
            self._statistics.clear()
        members = [self.supernet.space.canonical(spec) for spec in specs]
        self._calibrate(members)
        return members

    def retain(self, specs: Iterable[Spec]) -> None:
        """If memory is scarce, forget the cached prefixes that these networks do not have."""
        if self._cache.bytes > self._cache.max_bytes / 2:
            self._cache.retain({prefix for spec in specs for prefix in self._prefixes(spec, whole=False)})

    def _prefixes(self, spec: Spec, whole: bool = True) -> list[Prefix]:
        """The prefixes of all sides of a network; with `whole`, including the network itself."""
        return [p for side in self.supernet.sides for p in prefixes_of(spec, side)[: None if whole else -1]]

    def _calibrate(self, specs: Sequence[Spec]) -> None:
        """Compute BatchNorm statistics of all blocks of these networks, over calibration batches (SPOS, section 3.4).

        As in `torch.optim.swa_utils.update_bn`, each batch is normalised by its own statistics, and those of all
        batches are averaged.
        """
        missing = [spec for spec in specs if any(p not in self._statistics for p in self._prefixes(spec))]
        if not missing:
            return
        tree, fresh = _tree(missing, self.supernet.sides), dict[Prefix, dict[str, Tensor]]()
        for number, x, _ in self._embedded("calibration", self._images["calibration"].all):
            for _ in self._walk(tree, x, ("calibration", number), fresh):
                pass
        self._statistics |= fresh

    def _sums(self, specs: Sequence[Spec], batches: range, sides: Sequence[Side]) -> tuple[Tensor, int]:
        """The result of `sums`, and the number of images in the batches."""
        sums = dict[Slot, list[Tensor]]()  # on the device: reading them after every network would stall a GPU
        tree, count = _tree(specs, sides), 0
        for number, x, labels in self._embedded("search", batches):
            for slot, y in self._walk(tree, x, ("search", number), None):
                sums.setdefault(slot, []).append(compare_logits(self._classify(y, slot[1]), labels))
            count += len(labels)
        return _mean_over_sides(specs, sides, {slot: torch.stack(rows) for slot, rows in sums.items()}), count

    # ---- computation ----

    def _embedded(self, kind: str, wanted: range) -> Iterator[tuple[int, Tensor, Tensor]]:
        """The batches of a kind with these numbers: number, tokens [B, N, C] before the first block, labels [B]."""
        first, kept = self._inputs.get(kind, (range(0), []))
        is_kept = wanted.start in first and wanted[-1] in first
        batches = kept[wanted.start - first.start :][: len(wanted)] if is_kept else self._embed(kind, wanted)
        calibration = self._images["calibration"].num_batches
        before = calibration if kind == "search" else 0
        total = calibration + (len(wanted) if kind == "search" else self._images["search"].num_batches)
        for done, (x, labels) in enumerate(batches):
            yield wanted[done], x, labels
            self._on_batch(done + 1 + before, total)

    def _embed(self, kind: str, wanted: range) -> Iterator[tuple[Tensor, Tensor]]:
        """Read and embed these batches, and keep them if they take at most a third of the memory."""
        kept: list[tuple[Tensor, Tensor]] | None = []
        device = next(self.supernet.parameters()).device
        for images, labels in self._images[kind].batches(wanted):
            with self._autocast(device):
                x = self.supernet.embed(images.to(device), self.supernet.width)
            labels = labels.to(device)
            self._size_cache(x)
            if kept is not None and (len(kept) + 1) * x.nbytes <= self._memory / 3:
                kept.append((x, labels))
            else:
                kept = None
            yield x, labels
        if kept is not None:
            self._inputs[kind] = wanted, kept

    def _size_cache(self, x: Tensor) -> None:
        if self._sized:
            return
        self._sized = True
        stack = check_memory(self._memory / 1e6, self.supernet.space.depth, len(x), x[0].nbytes)
        self._cache.max_bytes = max(self._memory // 2 - stack, 0) if self._share else 0

    def _walk(
        self, node: _Node, x: Tensor, batch: tuple[str, int], fresh: dict[Prefix, dict[str, Tensor]] | None
    ) -> Iterator[tuple[Slot, Tensor]]:
        """Yield every network below `node` with the output of its last block, given the output `x` [B, N, C] of `node`.

        A network of two sides is yielded once for each.

        With `fresh`, missing statistics of blocks are collected, and all blocks normalise by the batch's statistics.
        """
        while node.children:
            if node.leaf is not None:
                yield node.leaf, x
            *others, last = node.children.items()
            for step, child in others:
                yield from self._walk(child, self._step(child, step, x, batch, fresh), batch, fresh)
            x = self._step(last[1], last[0], x, batch, fresh)  # the last child needs no output kept for the way back
            node = last[1]
        if node.leaf is not None:
            yield node.leaf, x

    def _step(
        self, node: _Node, step: Any, x: Tensor, batch: tuple[str, int],
        fresh: dict[Prefix, dict[str, Tensor]] | None,
    ) -> Tensor:  # fmt: skip
        """Compute a node's output from that of its parent: some channels of the tokens, or a block."""
        width, side = node.prefix[0]
        if len(node.prefix) == 1:
            return take_channels(x, width, side)
        key = (*batch, node.prefix)
        known = fresh is None or node.prefix in self._statistics
        if known and key in self._cache.outputs:
            return self._cache.outputs[key]
        place = len(node.prefix) - 2
        block, parts = self.supernet.blocks[place], self.supernet.parts_of(place, step, width)
        if parts.is_identity:
            if fresh is not None:
                fresh.setdefault(node.prefix, {})
            return x
        tensors, template = block.tensors(parts, side), block.template(parts)
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

    def _classify(self, x: Tensor, side: Side) -> Tensor:
        with self._autocast(x.device):
            return self.supernet.classify(x, side).float()

    def _autocast(self, device: torch.device) -> Any:
        return torch.autocast(device.type, torch.bfloat16) if self._bf16 else nullcontext()


def check_memory(memory_mb: float, depth: int, batch_size: int, image_bytes: int) -> int:
    """The bytes that one batch takes in networks of this depth: one output per branch.

    Args:
        memory_mb: available memory, in units of 10**6 bytes.
        depth: number of blocks of the deepest network.
        batch_size: number of images.
        image_bytes: bytes of the tokens of an image.

    Raises:
        SearchError: if the available memory is too small.
    """
    stack = (depth + 1) * batch_size * image_bytes
    if stack > memory_mb * 1e6:
        raise SearchError(
            f"evaluation.memory_mb must be at least {math.ceil(stack / 1e6)} for batches of {batch_size} images, "
            f"got {memory_mb:g}"
        )
    return stack


def compare_logits(logits: Tensor, labels: Tensor) -> Tensor:
    """Logits [B, num_classes], labels [B] -> [correct images, sum of cross-entropies], float64."""
    right = (logits.argmax(1) == labels).sum()
    return torch.stack([right.double(), F.cross_entropy(logits.float(), labels, reduction="sum").double()])


def add_in_order(values: Iterable[float]) -> float:
    """The sum in float64, in order; Python's `sum` depends on its version."""
    return functools.reduce(operator.add, values, 0.0)


def prefixes_of(spec: Spec, side: Side = "first") -> list[Prefix]:
    """All prefixes of a network with at least one block, shortest first."""
    return [((spec.embed_dim, side), *spec.blocks[:depth]) for depth in range(1, spec.depth + 1)]


def _mean_over_sides(specs: Sequence[Spec], sides: Sequence[Side], values: dict[Slot, Tensor]) -> Tensor:
    """The mean of each network's tensors, on the CPU: [networks, ...]."""
    return torch.stack([torch.stack([values[spec, side] for side in sides]).mean(0) for spec in specs]).cpu()


def _statistics_in(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    names = ("running_mean", "running_var", "num_batches_tracked")
    return {name: tensor for name, tensor in tensors.items() if name.rpartition(".")[2] in names}


def _reset(name: str, tensor: Tensor) -> Tensor:
    return torch.ones_like(tensor) if name.endswith("running_var") else torch.zeros_like(tensor)


class _collecting:  # noqa: N801 - used as a function
    """Inside a `with`, BatchNorm normalises by the batch and averages its statistics over batches."""

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
