"""Measure the contribution of each part of the search, on Fashion-MNIST on a CPU: the paper's ablation in small.

Every network is found, and trained stand-alone, with the recipe fashion_mnist_cpu on 3,000 of its images, within the
same budget of multiply-adds. Single-stage methods have as many evaluations, and as many epochs of their supernet, as
both stages of the hierarchical search together. Each search is a run in a separate folder, so the command can be
stopped and resumed; several processes at a time share the work. Accuracies are on the 10,000 test images; no choice
uses them.
"""

import argparse
import json
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from glit_models.search import Ranking, SearchRun, load_search_recipe, rank_networks
from glit_models.search.recipe import SearchRecipe

from glit_models import BlockSpec, GLiTSpec, count_macs
from glit_models.errors import RunError
from glit_models.runs.files import whole_folder
from glit_models.training import Recipe, Trainer

from . import report

GLOBAL_ONLY = "{space: global_only, embed_dim: 48, depth: 6, patch_size: 4}"
SCALE = {"train.data.limit": 3000, "retrain.top": 2}  # of the recipe's 10,000 images and three networks
RANKED = ("spos", "independent")  # searches of the joint space, by their weight sharing


def main() -> None:
    """Run the remaining parts, and print."""
    parser = report.parser(__doc__, rounds=3)
    parser.add_argument("--out", default="runs/ablation", type=Path, help="folder of the runs")
    parser.add_argument("--device", help="cpu, cuda, ... (default: the GPU if there is one)")
    parser.add_argument("--networks", type=int, default=12, help="networks for ranking each way of weight sharing")
    parser.add_argument("--show", action="store_true", help="only print finished results")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for wait in (False,) if options.show else (False, True):
        scores: dict[str, list[dict[str, Any]]] = {}
        for seed in range(options.rounds):
            for name, result in _seed(options, seed, wait).items():
                scores.setdefault(name, []).append(result)
    ranked = [name for name in RANKED if (options.out / "seed0" / name / "joint" / "rank.json").is_file()]
    if not scores:
        sys.exit(f"{options.out} has no finished run yet")
    report.show("ablation", options, [_row(name, results) for name, results in scores.items()], "mean")
    if ranked:
        print()
        report.show("ablation", options, [_rank(options, name) for name in ranked], "seed 0 alone")


def _row(name: str, results: list[dict[str, Any]]) -> report.Row:
    tests = [result["test"] for result in results]
    spread = f" ± {statistics.stdev(tests):.2f}" if len(tests) > 1 else ""
    return {
        "found by": name,
        "evaluations": results[0]["evaluations"],
        "MACs, M": " ".join(f"{result['macs'] / 1e6:.2f}" for result in results),
        "test top-1 of each seed, %": " ".join(f"{test:.2f}" for test in tests),
        "mean": f"{statistics.mean(tests):.2f}{spread}",
    }


def _recipe(seed: int, **changes: str) -> SearchRecipe:
    settings = {"seed": seed, **SCALE, **{key.replace("__", "."): v for key, v in changes.items()}}
    return load_search_recipe("fashion_mnist_cpu", [f"{key}={value}" for key, value in settings.items()])


def _seed(options: argparse.Namespace, seed: int, wait: bool) -> dict[str, dict[str, Any]]:
    """Test accuracy, MACs and number of evaluations of every row; only of finished ones, unless it waits for others."""
    out: Path = options.out / f"seed{seed}"
    both = _recipe(seed)
    done: dict[str, dict[str, Any]] = {}

    def search(name: str, recipe: SearchRecipe) -> dict[str, Any] | None:
        if options.show and not (out / name / "result.json").is_file():
            return None
        return _shared(wait, lambda: SearchRun(recipe, out / name, options.device).run())

    found = search("hierarchical", both)
    attention = GLiTSpec((BlockSpec(3, 0, mlp_ratio=4, qkv_ratio=1),) * 6, 48, 3, 4)
    baseline = _train(options, both.retrain_recipe(attention), out / "baseline", wait)
    if baseline is not None:
        done["nothing: attention only"] = {**baseline, "evaluations": 0, "macs": count_macs(attention, 28, 10)}
    only = search("global_only", _recipe(seed, space=GLOBAL_ONLY, method="spos"))
    if only is not None:
        done["one level, without locality"] = _of(only)
    if found is not None:
        first = json.loads((out / "hierarchical" / "stage1" / "retrained.json").read_text())[0]
        high = _train(options, both.retrain_recipe(GLiTSpec.from_dict(first["spec"])), out / "high", wait)
        if high is not None:
            done["the high level only"] = {**high, "evaluations": found["num_evaluated"] // 2, "macs": first["macs"]}
        done["hierarchical: both levels"] = _of(found)
    spos = search("spos", _recipe(seed, method="spos"))
    if spos is not None:
        done["one level, by evolution"] = _of(spos)
        if not options.show:
            _copy(out / "spos" / "joint" / "supernet", out / "random" / "joint" / "supernet")
        chance = search("random", _recipe(seed, method="random"))
        if chance is not None:
            done["one level, at random"] = _of(chance)
    if seed == 0:
        apart = search("independent", _recipe(seed, method="spos", supernet__sharing="independent"))
        if apart is not None:
            done["one level, by evolution, independent weights"] = _of(apart)
        if spos is not None and not options.show:
            for name in RANKED:
                _shared(wait, lambda name=name: rank_networks(out / name, options.networks, device=options.device))
                _copy(out / "spos" / "joint" / "rank", out / "independent" / "joint" / "rank")
    return done


def _shared(wait: bool, work: Callable[[], Any]) -> Any:
    """Return the result of `work`; if another process is running it, return None or wait."""
    while True:
        try:
            result = work()
        except RunError as error:
            if "in use by another process" not in str(error):
                raise
            if not wait:
                return None
            time.sleep(5)
            continue
        if result is None:
            sys.exit(130)
        return result


def _copy(source: Path, target: Path) -> None:
    """Copy results of equal trainings: both methods have the same supernets and networks to rank."""
    if source.is_dir() and not target.exists():
        with whole_folder(target) as folder:
            shutil.copytree(source, folder, dirs_exist_ok=True)


def _of(result: dict[str, Any]) -> dict[str, Any]:
    return {"test": result["test_accuracy"], "macs": result["macs"], "evaluations": result["num_evaluated"]}


def _train(options: argparse.Namespace, recipe: Recipe, out: Path, wait: bool) -> dict[str, Any] | None:
    if options.show and not (out / "result.json").is_file():
        return None
    result = _shared(wait, lambda: Trainer(recipe, out, options.device).run())
    return None if result is None else {"test": result["test_top1"]}


def _rank(options: argparse.Namespace, name: str) -> report.Row:
    ranking = Ranking.from_dict(json.loads((options.out / "seed0" / name / "joint" / "rank.json").read_text()))
    row: dict[str, Any] = {"sharing": "entangled" if name == "spos" else name, "networks": len(ranking.networks)}
    taus = {**ranking.taus["loss"], "without error": ranking.ceilings["loss"]}
    for measure in ("inherited loss", "inherited top-1", "MACs", "without error"):
        row[f"tau of {measure}"] = f"{taus[measure].value:.2f} ({taus[measure].low:.2f} to {taus[measure].high:.2f})"
    return row


if __name__ == "__main__":
    main()
