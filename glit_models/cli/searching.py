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

    from ..predict import pick_device

    command = shlex.join(["glit", "search", args.what, *(word for text in args.set for word in ("--set", text))])
    recipe = load_search_recipe(args.what, args.set)
    run = SearchRun(recipe, args.out, pick_device(args.device), args.max_minutes, command, _runtimes(recipe))
    result = run.run()
    if result is not None and run.context.rank == 0:
        print_json(result)
        echo(f"the winner is {args.out / 'winner.json'}, trained it is {args.out / 'model'}; next:")
        echo(f"    glit search report {args.out}")
        echo(f"    glit info {args.out / 'winner.json'}")
        echo(f"    glit predict IMAGE --model {args.out / 'model'}")
    return run.context.stop.exit_status if result is None else 0


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
    from glit_models.search.pipeline import read_recipe_of

    from ..predict import pick_device
    from ..runs.signals import StopRequest

    stop = StopRequest(args.max_minutes)
    ranking = rank_networks(
        args.folder, args.networks or 10, args.stage, pick_device(args.device),
        runtimes=_runtimes(read_recipe_of(args.folder)), stop=stop,
    )  # fmt: skip
    if ranking is None:
        return stop.exit_status
    print(ranking)
    return 0
