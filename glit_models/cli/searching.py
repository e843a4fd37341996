"""The command that searches, reports and ranks: search."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import SearchError
from .common import Commands, add_command, add_run_options, echo, print_json

if TYPE_CHECKING:
    import torch

    from glit_models.search.executors import Executor
    from glit_models.search.recipe import SearchRecipe

__all__ = ["add_search"]


def add_search(commands: Commands) -> None:
    parser = add_command(
        commands, "search", _run_search,
        "Search for a network; the same command again goes on where it stopped. `glit search report DIR` shows a "
        "search in a page, `glit search rank DIR` measures how far its supernet can be trusted.",
        {f"data.{key}": f"train.data.{key}" for key in ("root", "download", "hold_out", "num_workers")},
    )  # fmt: skip
    parser.add_argument("what", metavar="RECIPE", help="name of a shipped recipe, path of a YAML file; report; rank")
    parser.add_argument("folder", metavar="DIR", nargs="?", type=Path, help="of the search, after report and rank")
    parser.add_argument("--out", metavar="DIR", type=Path, help="folder of the search")
    add_run_options(parser, "override, such as evolution.generations=10")
    parser.add_argument(
        "--engine", metavar="E", help="who does the work: local, ray, slurm, module:Name (this process)"
    )
    parser.add_argument("--workers", type=int, metavar="N", help="of the engine: how many tasks are done at once")
    parser.add_argument("--address", metavar="HOST:PORT", help="of a Ray cluster (that of this machine)")
    parser.add_argument("--engine-options", nargs="+", default=[], metavar="KEY=VALUE", help="such as num_gpus=1")
    parser.add_argument("--networks", type=int, metavar="N", help="rank: how many to train from scratch (10)")
    parser.add_argument("--stage", help="rank: whose supernet (that of the last stage)")


def _run_search(args: argparse.Namespace) -> int:
    if args.what in ("report", "rank"):
        if args.folder is None or args.out is not None or args.set:
            raise SearchError(f"glit search {args.what} takes the folder of a search, and neither --out nor --set")
        return _run_search_report(args) if args.what == "report" else _run_search_rank(args)
    if args.out is None or args.folder is not None:
        raise SearchError("glit search takes a recipe and --out DIR")
    if args.networks is not None or args.stage is not None:
        raise SearchError("--networks and --stage are for `glit search rank DIR`")
    from glit_models.search import SearchRun, load_search_recipe

    command = shlex.join(["glit", "search", args.what, *(word for text in args.set for word in ("--set", text))])
    recipe = load_search_recipe(args.what, args.set)
    executor = _open_executor(args, args.out)
    run = SearchRun(recipe, args.out, _pick_device(args), args.max_minutes, command, _runtimes(recipe), executor)
    result = run.run()
    if result is not None and run.context.rank == 0:
        print_json(result)
        echo(f"the winner is {args.out / 'winner.json'}, trained it is {args.out / 'model'}; next:")
        echo(f"    glit search report {args.out}")
        echo(f"    glit info {args.out / 'winner.json'}")
        echo(f"    glit predict IMAGE --model {args.out / 'model'}")
    return run.context.stop.exit_status if result is None else 0


def _pick_device(args: argparse.Namespace) -> torch.device | str | None:
    """Where to compute; each worker of an engine finds out by itself."""
    from ..predict import pick_device

    return args.device if args.engine else pick_device(args.device)


def _open_executor(args: argparse.Namespace, folder: Path) -> Executor | None:
    """Who does the work, None for this process. Raises SearchError on options that no engine takes."""
    from glit_models.search import open_executor

    from ..recipes import parse_overrides

    options = parse_overrides(args.engine_options)
    if args.address is not None:
        options["address"] = args.address
    if args.engine is None:
        if options or args.workers is not None:
            raise SearchError("--workers, --address and --engine-options need --engine")
        return None
    return open_executor(args.engine, folder, args.workers, options)


def _runtimes(recipe: SearchRecipe) -> dict[str, Callable[..., Callable[[], object]]]:
    """What the recipe times networks with besides PyTorch: search and export do not know each other.

    Raises:
        ExportError: if it is not installed; said now, not after a supernet is trained.
    """
    if recipe.latency.runtime != "onnx":
        return {}
    from glit_models.export import onnx_runner
    from glit_models.export.extras import require

    for package in ("onnx", "onnxscript", "onnxruntime"):
        require(package)
    return {"onnx": onnx_runner}


def _run_search_report(args: argparse.Namespace) -> int:
    from glit_models.search import write_report

    echo(f"the report is {write_report(args.folder)}")
    return 0


def _run_search_rank(args: argparse.Namespace) -> int:
    from glit_models.search import rank_networks
    from glit_models.search.recipe import read_recipe_of

    from ..runs.signals import StopRequest

    stop = StopRequest(args.max_minutes)
    ranking = rank_networks(
        args.folder, args.networks or 10, args.stage, _pick_device(args),
        runtimes=_runtimes(read_recipe_of(args.folder)), stop=stop, executor=_open_executor(args, args.folder),
    )  # fmt: skip
    if ranking is None:
        return stop.exit_status
    print(ranking)
    return 0
