"""Stage search: measure the cost of a search on a GPU, for training its supernet and for evaluating its networks.

Axes: B batch.
"""

from __future__ import annotations

import dataclasses
import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from glit_models.search import NAMED_SPACES, SearchSpace, Supernet, load_search_recipe
from glit_models.search.supernets.scoring import Evaluator, Images

from glit_models import GLiTSpec
from glit_models.errors import first_line

from ..search import supernet_rows
from .context import Context, Result

CUDA_ONLY = {
    "search": ("CUDA graphs of whole networks", "a supernet's step under bfloat16 on the GPU", "waiting for launches"),
}

_TEST_RECIPE = Path(__file__).resolve().parents[2] / "tests" / "fixtures" / "search.yaml"


def run_search(context: Context) -> Result:
    """Compare a supernet's step with a plain one, and measure networks per minute for each way of evaluation."""
    result: Result = {}
    size, batch = (32, 4) if context.rehearse else (224, 256)
    steps = partial(
        supernet_rows, context.device, batch, size, 1 if context.rehearse else 5, bf16=not context.rehearse,
        space=_space(context),
    )  # fmt: skip
    parts: dict[str, Callable[[], Iterable[Any]]] = {
        "evaluation": partial(_evaluation_rows, context, size),
        "step": steps,
        "launches": partial(_launch_rows, context, size),
    }
    for name, part in parts.items():
        result[name] = []
        try:
            for row in part():
                result[name].append(row)
                context.save(result)
        except Exception as error:  # devices can raise anything; it is the result of this part
            result[name].append({"error": f"{type(error).__name__}: {first_line(error)}"[:300]})
        context.save(result)
    return result


def _population(space: SearchSpace, count: int) -> list[GLiTSpec]:
    """Networks as in a generation: half of them random, half of them changed in one of the last blocks."""
    rng = random.Random(0)
    specs = [space.sample(rng) for _ in range(count // 2)]
    for parent in specs[: count - len(specs)]:
        other, keep = space.sample(rng), rng.randrange(space.depth // 2, space.depth)
        specs.append(dataclasses.replace(parent, blocks=(*parent.blocks[:keep], *other.blocks[keep:])))
    return specs


def _space(context: Context) -> SearchSpace | None:
    """The space of the tests, for a rehearsal."""
    return load_search_recipe(str(_TEST_RECIPE)).load_space() if context.rehearse else None


def _supernet(context: Context, size: int) -> Supernet:
    torch.manual_seed(0)
    space = _space(context) or NAMED_SPACES["glit"]()
    return Supernet(space, img_size=size, num_classes=10).to(context.device).eval()


def _evaluation_rows(context: Context, size: int) -> Iterator[dict[str, Any]]:
    """Networks per minute on 5,000 images with 10 batches of calibration, as in the recipe `fashion_mnist`."""
    supernet = _supernet(context, size)
    count, batches, images = (2, 1, 4) if context.rehearse else (16, 10, 500)
    batch = torch.randn(images, 3, size, size, device=context.device), torch.zeros(images, dtype=torch.int64)
    data = Images(lambda wanted: [batch] * len(wanted), batches)
    specs = _population(supernet.space, count)
    for name, share in (("one by one", False), ("shared", True)):
        evaluator = Evaluator(supernet, data, data, memory_mb=30_000, share=share, bf16=not context.rehearse)
        if not context.rehearse:
            evaluator.evaluate(_population(supernet.space, 2))  # warm
        evaluator.block_images = 0
        began = time.perf_counter()
        evaluator.evaluate(specs)
        seconds = time.perf_counter() - began
        row = {"evaluated": name, "networks": count, "networks a minute": 60 * count / seconds}
        yield row | {"images through blocks a second": evaluator.block_images / seconds}


def _launch_rows(context: Context, size: int) -> Iterator[dict[str, Any]]:
    """Run a network of the space kernel by kernel, and as a single CUDA graph, to see whether the GPU waits."""
    supernet = _supernet(context, size)
    model = supernet.extract(supernet.space.sample(random.Random(0))).eval()
    batches = (2,) if context.rehearse else (32, 500, 256)
    for B in batches:
        images = torch.randn(B, 3, size, size, device=context.device)
        eager = _forward(model, images, bf16=not context.rehearse)
        row = {"batch": B, "eager, ms": _median_ms(eager, context)}
        if context.device.startswith("cuda"):
            row["CUDA graph, ms"] = _median_ms(_graphed(eager), context)
        yield row
    compiled = context.compile(model, dynamic=False)  # takes too long to do it for every size
    yield {"batch": B, "compiled, ms": _median_ms(_forward(compiled, images, bf16=not context.rehearse), context)}


def _forward(model: Callable[..., Any], images: torch.Tensor, bf16: bool) -> Callable[[], object]:
    def run() -> object:
        with torch.no_grad(), torch.autocast(images.device.type, torch.bfloat16, enabled=bf16, cache_enabled=False):
            return model(images)

    return run


def _graphed(run: Callable[[], object]) -> Callable[[], object]:
    """Record a function as a CUDA graph, after some passes on another stream as torch requires."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def _median_ms(run: Callable[[], object], context: Context) -> float:
    times = []
    for _ in range(2 if context.rehearse else 15):
        began = time.perf_counter()
        run()
        if context.device.startswith("cuda"):
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - began))
    return statistics.median(times[1:])
