"""The search command, and its subcommands: plan, report, rank, again, extract."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import SearchError
from .common import Commands, add_command, add_run_options, echo, print_json, print_table

if TYPE_CHECKING:
    import torch

    from glit_models.search import SearchRun
    from glit_models.search.executors import Executor
    from glit_models.search.recipe import SearchRecipe

__all__ = ["add_search"]


def add_search(commands: Commands) -> None:
    parser = add_command(
        commands, "search", _run_search,
        "Search for a network; run the same command again to resume. Subcommands: `glit search plan RECIPE` estimates "
        "the cost of a search, `report DIR` writes it as an HTML page, `rank DIR` measures how well its supernet ranks "
        "networks, `extract DIR --out FOLDER` writes networks with the weights that they inherit, and `again DIR "
        "--set ... --out DIR2` searches again on its trained supernets, for example with another budget.",
        {f"data.{key}": f"train.data.{key}" for key in ("root", "download", "hold_out")}
        | {"num_workers": "train.data.num_workers"},
    )  # fmt: skip
    parser.add_argument(
        "what", metavar="RECIPE", help="name of a shipped recipe, a YAML file, or a subcommand: plan, report, rank, ..."
    )
    parser.add_argument(
        "folder", metavar="DIR", nargs="?", type=Path, help="report, rank, ...: folder of the search; plan: a recipe"
    )
    parser.add_argument("--out", metavar="DIR", type=Path, help="folder of the search; extract: folder of the model")
    add_run_options(parser, "override, such as evolution.generations=10")
    parser.add_argument(
        "--engine", metavar="E", help="engine that runs tasks: local, ray, slurm or module:Name (default: this process)"
    )
    parser.add_argument("--workers", type=int, metavar="N", help="number of tasks that the engine runs at once")
    parser.add_argument("--address", metavar="HOST:PORT", help="address of a Ray cluster (default: this machine's)")
    parser.add_argument("--engine-options", nargs="+", default=[], metavar="KEY=VALUE", help="such as num_gpus=1")
    parser.add_argument("--supernet-only", action="store_true", help="stop after training the first supernet")
    parser.add_argument("--networks", type=int, metavar="N", help="rank: networks to train from scratch (default: 10)")
    parser.add_argument("--stage", help="rank, extract: stage whose supernet to use (default: the last)")
    parser.add_argument("--place", type=int, metavar="N", help="extract: the network's place, 1 for the best")
    parser.add_argument(
        "--front", metavar="COST", help="extract: the Pareto front of fitness and macs, params or latency_ms"
    )
    parser.add_argument("--json", action="store_true", help="plan: print JSON")
    parser.add_argument("--keep-winner", action="store_true", help="again: keep the result of the first stage")
    parser.add_argument("--spec", metavar="FILE", help="extract: spec of the network, a JSON file")


_ENGINE = ("engine", "workers", "address", "engine_options")
# The options of each subcommand, besides --device; those of a search itself are at ''.
_TAKES = {
    "": ("out", "set", "max_minutes", *_ENGINE, "supernet_only"),
    "plan": ("folder", "set", "json"),
    "report": ("folder",),
    "rank": ("folder", "networks", "stage", "max_minutes", *_ENGINE),
    "again": ("folder", "out", "set", "keep_winner", "max_minutes", *_ENGINE),
    "extract": ("folder", "out", "stage", "place", "front", "spec"),
}
_NEEDS = ("folder", "out")


def _run_search(args: argparse.Namespace) -> int:
    command = args.what if args.what in _TAKES else ""
    _check_options(args, command)
    return _RUN[command](args)


def _check_options(args: argparse.Namespace, command: str) -> None:
    """Raise SearchError if a subcommand lacks a required option, or was given one that it does not take."""
    name, takes = f"glit search {command}".strip(), _TAKES[command]
    for option in dict.fromkeys(option for options in _TAKES.values() for option in options):
        value = getattr(args, option)
        given = value is not None and value is not False and value != []  # 0 is given, too
        positional = "a recipe" if command == "plan" else "DIR, the folder of a search"
        flag = positional if option == "folder" else f"--{option.replace('_', '-')}"
        if given and option not in takes:
            takers = (f"`glit search {other}".strip() + "`" for other, options in _TAKES.items() if option in options)
            raise SearchError(f"{name} takes no {flag}; it is for {', '.join(takers)}")
        if option in _NEEDS and option in takes and not given:
            raise SearchError(f"{name} needs {flag}" if command else "glit search takes a recipe and --out DIR")


def _run_recipe(args: argparse.Namespace) -> int:
    from glit_models.search import SearchRun, load_search_recipe

    recipe = load_search_recipe(args.what, args.set)
    executor = _open_executor(args, args.out)
    command = _command(args.what, args.set)
    run = SearchRun(recipe, args.out, _pick_device(args), args.max_minutes, command, _runtimes(recipe), executor)
    if not args.supernet_only:
        return _finish(run, args)
    result = run.run(supernet_only=True)
    if result is not None and run.context.rank == 0:
        print_json(result)
        # Only methods of one stage start from a supernet, and only from one of another such method.
        start = f"--set supernet.from={args.out} in another search; " if len(recipe.method_class.stages) == 1 else ""
        echo(f"next: {start}resume this one without --supernet-only")
    return run.context.stop.exit_status if result is None else 0


def _run_again(args: argparse.Namespace) -> int:
    from glit_models.search import search_again
    from glit_models.search.run.again import again_recipe

    options = ["--keep-winner"] if args.keep_winner else []
    run = search_again(
        args.folder, args.out, args.set, keep_winner=args.keep_winner, device=_pick_device(args),
        max_minutes=args.max_minutes, command=_command("again", args.set, str(args.folder), *options),
        runtimes=_runtimes(again_recipe(args.folder, args.set)), executor=_open_executor(args, args.out),
    )  # fmt: skip
    return _finish(run, args)


def _finish(run: SearchRun, args: argparse.Namespace) -> int:
    result = run.run()
    if result is not None and run.context.rank == 0:
        print_json(result)
        echo(f"the winner is {args.out / 'winner.json'}, trained it is {args.out / 'model'}; next:")
        echo(f"    glit search report {args.out}")
        echo(f"    glit info {args.out / 'winner.json'}")
        echo(f"    glit predict IMAGE --model {args.out / 'model'}")
    return run.context.stop.exit_status if result is None else 0


def _command(what: str, overrides: list[str], *options: str) -> str:
    """The command line, for the records of trained models."""
    return shlex.join(["glit", "search", what, *options, *(word for text in overrides for word in ("--set", text))])


def _pick_device(args: argparse.Namespace) -> torch.device | str | None:
    """The device of this process; None leaves the choice to each worker of an engine."""
    from ..predict import pick_device

    return args.device if args.engine else pick_device(args.device)


def _open_executor(args: argparse.Namespace, folder: Path) -> Executor | None:
    """Open the engine, or return None for this process. Raises SearchError if options are given without an engine."""
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
    """The runtimes besides PyTorch that the recipe measures latency with; `search` does not import `export`.

    Raises:
        ExportError: if one is not installed; raised before a supernet is trained.
    """
    if recipe.latency.runtime != "onnx":
        return {}
    from glit_models.export import onnx_runner
    from glit_models.export.extras import require

    for package in ("onnx", "onnxscript", "onnxruntime"):
        require(package)
    return {"onnx": onnx_runner}


def _run_plan(args: argparse.Namespace) -> int:
    from glit_models.search import load_search_recipe, plan_search

    recipe = load_search_recipe(str(args.folder), args.set)
    plan = plan_search(recipe, _pick_device(args), _runtimes(recipe))
    print_json(plan.to_dict()) if args.json else print(plan)
    return 0


def _run_report(args: argparse.Namespace) -> int:
    from glit_models.search import write_report

    echo(f"the report is {write_report(args.folder)}")
    return 0


def _run_rank(args: argparse.Namespace) -> int:
    from glit_models.search import rank_networks
    from glit_models.search.recipe import read_recipe_of

    from ..runs.signals import StopRequest

    networks = 10 if args.networks is None else args.networks
    if networks < 3:
        raise SearchError(f"--networks must be at least 3, because fewer cannot be ranked, got {networks}")
    stop = StopRequest(args.max_minutes)
    ranking = rank_networks(
        args.folder, networks, args.stage, _pick_device(args),
        runtimes=_runtimes(read_recipe_of(args.folder)), stop=stop, executor=_open_executor(args, args.folder),
    )  # fmt: skip
    if ranking is None:
        return stop.exit_status
    print(ranking)
    return 0


def _run_extract(args: argparse.Namespace) -> int:
    from glit_models.search import extract_networks
    from glit_models.search.recipe import read_recipe_of

    options = ("stage", "place", "front", "spec")
    choices = [
        word for name in options if (value := getattr(args, name)) is not None for word in (f"--{name}", str(value))
    ]
    extracted = extract_networks(
        args.folder, args.out, stage=args.stage, place=args.place, front=args.front, spec=args.spec,
        device=_pick_device(args), command=_command("extract", [], str(args.folder), *choices),
        runtimes=_runtimes(read_recipe_of(args.folder)),
    )  # fmt: skip
    costs = list(extracted[0].costs)
    rows = [
        [str(network.folder), *(f"{network.costs[cost]:,.12g}" for cost in costs), f"{network.accuracy:.2f}"]
        for network in extracted
    ]
    columns = [(name, "right") for name in (*costs, "top-1 on the search set, %")]
    print_table("Networks with inherited weights", [("model", "left"), *columns], rows)
    return 0


_RUN: dict[str, Callable[[argparse.Namespace], int]] = {
    "": _run_recipe,
    "plan": _run_plan,
    "report": _run_report,
    "rank": _run_rank,
    "again": _run_again,
    "extract": _run_extract,
}
