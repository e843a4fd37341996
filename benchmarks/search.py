"""Measure the speed of a search's evaluations, and the cost of a step of its supernet.

Evaluation: repeats the evaluations of a finished search, by generation and for each way of sharing work, with the
same weights and images. Stops with an error if the scores differ.

The supernet: a training step of GLiT-Tiny as the active path, compared with the stand-alone network, at 64 pixels.
"""

import argparse
import json
import random
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from glit_models.search import NAMED_SPACES, SearchSpace, Supernet, load_space
from glit_models.search.recipe import read_recipe_of
from glit_models.search.run.context import RunContext
from glit_models.search.supernets.path_optimizer import keep_to_paths
from glit_models.search.supernets.scoring import Evaluator, Score, prefixes_of
from glit_models.search.supernets.supernet import Sharing
from torch import nn

from glit_models import GLIT_TINY, Spec, parse_spec
from glit_models.training import setup
from glit_models.training.recipe import OptimSection

from . import report

BATCH, SIZE = 32, 64
Generations = list[list[Spec]]


def main() -> None:
    """Measure and print."""
    parser = report.parser(__doc__, rounds=5)
    parser.add_argument("--search", type=Path, help="folder of a finished search (default: only measure the supernet)")
    parser.add_argument("--stage", default="stage2", help="stage whose candidates are evaluated again")
    parser.add_argument("--count", action="store_true", help="only count the work that could be shared")
    parser.add_argument("--memory-mb", type=float, default=2000, help="memory for outputs shared by networks")
    parser.add_argument("--device", type=report.device, default="cuda" if torch.cuda.is_available() else "cpu")
    report.add_clock(parser)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.count:
        report.show("search", options, _counted_rows(options), "counted, not a median")
        return
    if options.search is not None:
        report.show("search", options, _evaluation_rows(options), "one run, not a median")
        print()
    report.show("search", options, supernet_rows(options.device, BATCH, SIZE, options.rounds, options.clock))


# ---- evaluation ----


def _evaluation_rows(options: argparse.Namespace) -> list[report.Row]:
    """Each way of sharing, on the whole evolution of a stage."""
    recipe = read_recipe_of(options.search)
    context = RunContext(recipe, options.search, options.device, None)
    space = load_space(options.search / options.stage / "space.yaml")
    weights = options.search / options.stage / "supernet" / "model.safetensors"
    generations = [
        [spec for spec, _ in generation] for generation in _scored(options.search / options.stage / "candidates.jsonl")
    ]
    parents = recipe.evolution.num_parents
    total = sum(map(len, generations))

    def make(share: bool, memory_mb: float) -> Evaluator:
        evaluator = context.evaluator(space, weights, lambda done, total: None)
        evaluator._share, evaluator._memory = share, int(memory_mb * 1e6)
        return evaluator

    cases: dict[str, Callable[[], tuple[Evaluator, dict[Spec, Score]]]] = {
        "one by one": lambda: _run(make(False, options.memory_mb), generations, parents, "nothing"),
        "shared within a generation": lambda: _run(make(True, options.memory_mb), generations, parents, "nothing"),
        "parents kept": lambda: _run(make(True, options.memory_mb), generations, parents, "parents"),
        "all kept that fits": lambda: _run(make(True, options.memory_mb), generations, parents, "all"),
    }
    rows: list[report.Row] = []
    first: dict[Spec, Score] = {}
    now = report.CLOCKS[options.clock]
    base = (0.0, 0)
    for name, case in cases.items():
        began = now()
        evaluator, scores = case()
        seconds = now() - began
        if not first:
            first, base = scores, (seconds, evaluator.block_images)
        if scores != first:
            sys.exit(f"{name}: the scores differ from those of one by one")
        rows.append({
            "evaluated": name,
            "networks a minute": 60 * total / seconds,
            "faster": f"{base[0] / seconds:.2f}x",
            "less work in blocks": f"{base[1] / evaluator.block_images:.2f}x",
        })  # fmt: skip
    return rows


def _counted_rows(options: argparse.Namespace) -> list[report.Row]:
    """Work left by each way of sharing, with unlimited memory: blocks that no earlier network had."""
    scored: list[tuple[Spec, float]] = []
    asked, blocks = 0, dict.fromkeys(("shared within a generation", "parents kept", "all kept"), 0)
    for generation in _scored(options.search / options.stage / "candidates.jsonl"):
        parents = sorted(scored, key=lambda pair: -pair[1])[: read_recipe_of(options.search).evolution.num_parents]
        new = _prefixes(generation)
        for name, known in zip(blocks, ((), parents, scored), strict=True):
            blocks[name] += len(new - _prefixes(known))
        asked += sum(spec.depth for spec, _ in generation)
        scored += generation
    return [{"evaluated": name, "less work in blocks": f"{asked / count:.2f}x"} for name, count in blocks.items()]


def _prefixes(scored: Iterable[tuple[Spec, float]]) -> set[tuple[Any, ...]]:
    return {prefix for spec, _ in scored for prefix in prefixes_of(spec)}


def _scored(path: Path) -> list[list[tuple[Spec, float]]]:
    """The networks of each generation with their accuracies."""
    generations: dict[int, list[tuple[Spec, float]]] = {}
    for line in path.read_text().splitlines():
        entry = json.loads(line)
        generations.setdefault(entry["generation"], []).append((parse_spec(entry["spec"]), entry["fitness"]))
    return list(generations.values())


def _run(
    evaluator: Evaluator, generations: Generations, num_parents: int, keep: str
) -> tuple[Evaluator, dict[Spec, Score]]:
    scores: dict[Spec, Score] = {}
    for generation in generations:
        top = _best(scores, num_parents)
        if keep == "parents":
            evaluator._cache.retain({prefix for spec in top for prefix in prefixes_of(spec)[:-1]})
        elif keep == "nothing":
            evaluator._cache.retain(set())
        else:
            evaluator.retain(top)
        scores |= evaluator.evaluate(generation)
    return evaluator, scores


def _best(scores: dict[Spec, Score], count: int) -> list[Spec]:
    return sorted(scores, key=lambda spec: -scores[spec].accuracy)[:count]


# ---- the supernet ----


def supernet_rows(
    device: str,
    batch: int,
    size: int,
    rounds: int,
    clock: str = "wall",
    bf16: bool = False,
    space: SearchSpace | None = None,
) -> list[report.Row]:
    """Seconds per step and bytes of state: both ways of sharing over a space, and one of its networks alone.

    By default, the space is the released one, and its network is GLiT-Tiny.
    """
    network = GLIT_TINY if space is None else space.sample(random.Random(0))
    space = NAMED_SPACES["glit_released"]() if space is None else space
    torch.manual_seed(0)
    images, labels = torch.randn(batch, 3, size, size, device=device), torch.arange(batch, device=device) % 10
    models: dict[str, nn.Module] = {
        "GLiT-Tiny, stand-alone": timm.create_model("glit_tiny", spec=network, img_size=size, num_classes=10)
    }
    sharings: tuple[Sharing, ...] = ("independent", "entangled")  # this space cannot be shared from both sides
    for sharing in sharings:
        models[f"supernet, {sharing}"] = Supernet(space, sharing, img_size=size, num_classes=10)
    steps: dict[str, Callable[[], object]] = {}
    optimizers = {}
    for name, model in models.items():
        model.to(device).train()
        setup.prepare_for_device(model, torch.device(device).type)
        optimizer = optimizers[name] = setup.create_optimizer(model, OptimSection())
        if isinstance(model, Supernet):
            model.prepare_blocks(lambda block: setup.prepare_for_device(block, torch.device(device).type))
            if model.sharing == "entangled":
                keep_to_paths(optimizer, model)
            model.activate(network)
        steps[name] = _step(model, optimizer, images, labels, bf16)
    seconds = report.interleaved(steps, rounds, clock)
    rng = random.Random(0)
    rows: list[report.Row] = []
    for name, model in models.items():
        if isinstance(model, Supernet):
            for _ in range(20):  # paths that together cover nearly all weights
                model.activate(space.sample(rng))
                steps[name]()
        rows.append({
            "trained": name,
            "parameters, M": sum(parameter.numel() for parameter in model.parameters()) / 1e6,
            "with moments, MB": (_bytes(model.parameters()) + _bytes(_moments(optimizers[name]))) / 1e6,
            "ms a step": seconds[name] * 1e3,
            "relative": f"{seconds[name] / seconds['GLiT-Tiny, stand-alone']:.2f}",
        })  # fmt: skip
    return rows


def _step(
    model: nn.Module, optimizer: torch.optim.Optimizer, images: torch.Tensor, labels: torch.Tensor, bf16: bool
) -> Callable[[], object]:
    def step() -> None:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
            loss = F.cross_entropy(model(images).float(), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if images.device.type == "cuda":
            torch.cuda.synchronize()

    return step


def _moments(optimizer: torch.optim.Optimizer) -> Iterable[torch.Tensor]:
    return (value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor))


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


if __name__ == "__main__":
    main()
