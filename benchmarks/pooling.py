"""Is the class token or the mean of the patches the better input of the head? Five seeds of each, in pairs.

The networks are trained as those of the frozen table are (`benchmarks/ranked`): on 20,000 images of Fashion-MNIST for
10 epochs. Nothing is chosen on the 10,000 test images. The searched network ends with a block without attention: its
class token, which comes first in the sequence, only sees the patches that the kernel reaches. In the third network one
head of that block is attention. `--patch-size 2` gives 196 tokens instead of 49, and kernels of the paper's sizes.

The scores are kept in `benchmarks/ranked/pooling.json`: what is there is not trained again. The command can be
stopped and resumed, and several processes share the work.
"""

import argparse
import dataclasses
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from glit_models import GLiTSpec
from glit_models.errors import RunError
from glit_models.runs.signals import StopRequest

from . import report
from .ablation import ATTENTION, paired
from .ranked.__main__ import FOLDER, WINNER, train_network

TABLE = FOLDER / "pooling.json"
KERNELS = {9: 17, 15: 31, 23: 45}  # of 7 x 7 and 14 x 14 patches
TOKEN, MEAN = "token", "avg"
Key = tuple[int, str, str, int]  # patch size, network, pooling, seed


def main() -> None:
    """Train what the table lacks, and print."""
    parser = report.parser(__doc__, rounds=5)
    parser.add_argument("--patch-size", type=int, default=4, choices=(4, 2), help="in pixels")
    parser.add_argument("--out", default="runs/pooling", type=Path, help="folder of the runs")
    parser.add_argument("--device", help="cpu, cuda, ... (default: the GPU if there is one)")
    parser.add_argument("--max-minutes", type=float, help="save and exit after this time")
    parser.add_argument("--show", action="store_true", help="run nothing; print what is done")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if not options.show:
        options.stop = StopRequest(options.max_minutes)
        for seed in range(options.rounds):
            for (name, spec), pool in _arms(options.patch_size):
                _train(options, (options.patch_size, name, pool, seed), spec)
    show(options)


def _arms(patch_size: int) -> Iterator[tuple[tuple[str, GLiTSpec], str]]:
    """Each network with each pooling; the network with another last block only with the class token."""
    searched = GLiTSpec.from_json(WINNER.read_text())
    last = dataclasses.replace(searched.blocks[-1], num_global_heads=1, num_local_heads=2, qkv_ratio=1)
    mixed = dataclasses.replace(searched, blocks=(*searched.blocks[:-1], last))
    for name, spec in (("searched", searched), ("attention only", ATTENTION)):
        for pool in (TOKEN, MEAN):
            yield (name, _with_patches(spec, patch_size)), pool
    yield ("searched, attention at the end", _with_patches(mixed, patch_size)), TOKEN


def _with_patches(spec: GLiTSpec, patch_size: int) -> GLiTSpec:
    if patch_size == spec.patch_size:
        return spec
    blocks = (dataclasses.replace(block, kernel_size=KERNELS.get(block.kernel_size or 0)) for block in spec.blocks)
    return dataclasses.replace(spec, blocks=tuple(blocks), patch_size=patch_size)


def _train(options: argparse.Namespace, key: Key, spec: GLiTSpec) -> None:
    """Train one network and add its scores to the table, unless it is there or another process is at it."""
    patch_size, name, pool, seed = key
    run = options.out / f"{patch_size} {name} {pool} {seed}"
    if key in report.read_rows(TABLE) or (run / "scores.json").is_file():
        return
    try:
        scores = train_network(spec, seed, run, options.device, options.stop, [f"train.model.global_pool={pool}"])
    except RunError as error:
        print(error, file=sys.stderr)
        return
    if scores is None:
        sys.exit("stopped; run the same command to resume")
    report.keep_row(TABLE, run, key, scores)


def show(options: argparse.Namespace) -> None:
    """Print the finished networks, and the differences between them, paired by seed."""
    scores: dict[tuple[str, str], list[dict[str, float]]] = {}
    for (size, name, pool, seed), found in sorted(report.read_rows(TABLE).items()):
        if size == options.patch_size and seed < options.rounds:
            scores.setdefault((name, pool), []).append(found)
    whole = {key: found for key, found in scores.items() if len(found) == options.rounds}
    if not whole:
        sys.exit(f"no network has {options.rounds} finished seeds yet")
    rows: list[report.Row] = [
        {"network": name, "pooling": pool,
         "test top-1 of each seed, %": " ".join(f"{score['test_top1']:.2f}" for score in found),
         "mean": f"{statistics.mean(score['test_top1'] for score in found):.2f}"}
        for (name, pool), found in whole.items()
    ]  # fmt: skip
    report.show("pooling", options, rows, "mean")
    pairs = [
        (("searched", MEAN), ("searched", TOKEN)),
        (("attention only", MEAN), ("attention only", TOKEN)),
        (("searched, attention at the end", TOKEN), ("searched", TOKEN)),
    ]
    differences: list[report.Row] = [
        {"difference": f"{', '.join(a)} - {', '.join(b)}"}
        | {
            f"on the {split} images, points (95 %)": paired(*([s[f"{split}_top1"] for s in whole[x]] for x in (a, b)))
            for split in ("search", "test")
        }
        for a, b in pairs
        if options.rounds > 1 and a in whole and b in whole
    ]
    if differences:
        print()
        report.show("pooling", options, differences, "mean")


if __name__ == "__main__":
    main()
