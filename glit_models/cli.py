"""The `glit` command: reads arguments, calls the package, prints. What the commands do is done elsewhere.

A command is one `_add_<name>(commands)` that declares its arguments, and one `_run_<name>(args) -> int` that imports
what it needs, prints, and returns the exit status: 0, or 1 if the work was done and something was found wrong. Bad
input is a GlitError, which `main` prints. To add a command, write both and add the first to `_COMMANDS`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import DataError, GlitError, SearchError

if TYPE_CHECKING:
    from glit_models.search.recipe import SearchRecipe

    from .evaluation import Evaluation
    from .inference import Prediction
    from .spec import GLiTSpec

__all__ = ["main"]

Commands = Any  # argparse has no public name for what `add_subparsers` returns


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (of the process by default) and return its exit status."""
    parser = argparse.ArgumentParser(prog="glit", description="GLiT vision transformers: models, weights, the Hub.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for add in _COMMANDS:
        add(commands)
    try:
        args = parser.parse_args(argv)
    except SystemExit as stop:  # argparse has printed the help, or what is wrong
        return int(stop.code or 0)
    try:
        status: int = args.run(args)
        sys.stdout.flush()
        return status
    except GlitError as error:
        print(f"glit: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader has gone; Python would complain once more when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _add(commands: Commands, name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    parser.set_defaults(run=run)
    return parser


def _print_json(data: Any) -> None:
    print(json.dumps(data, indent=2, ensure_ascii=False))


def _print_table(title: str | None, columns: Sequence[tuple[str, str]], rows: Sequence[Sequence[str]]) -> None:
    """Print a table; a column is its name and 'left' or 'right'."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    for name, justify in columns:
        table.add_column(name, justify="right" if justify == "right" else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console = Console(markup=False, highlight=False, emoji=False)
    if not console.is_terminal:
        console.width = 120  # in a file or a pipe there is no width to keep to
    with console.capture() as captured:  # rich would answer a broken pipe with an exit status of its own
        console.print(table)
    print(captured.get(), end="")


# ---- glit list ----


def _add_list(commands: Commands) -> None:
    parser = _add(commands, "list", _run_list, "List the models and the weights that exist for them.")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _run_list(args: argparse.Namespace) -> int:
    from . import hub

    entries = list(hub.registry().values())
    if args.json:
        _print_json([{"name": entry.name, "where": hub.where(entry), **entry.to_dict()} for entry in entries])
        return 0
    rows = [
        (
            entry.name,
            hub.where(entry),
            entry.dataset,
            f"{entry.input_size[1]}",
            f"{entry.params / 1e6:.2f} M",
            f"{entry.macs / 1e9:.3f} G",
            ", ".join(f"{metric.value:g}" for metric in entry.metrics) or "-",
        )
        for entry in entries
    ]
    columns = [("model", "left"), ("weights", "left"), ("data", "left"), ("pixels", "right"), ("parameters", "right")]
    _print_table(None, [*columns, ("MACs", "right"), ("score", "right")], rows)
    for entry in entries:
        for metric in entry.metrics:
            print(f"{entry.name}: {metric.name} {metric.value:g} ({metric.source})")
    return 0


# ---- glit info ----


def _add_info(commands: Commands) -> None:
    parser = _add(commands, "info", _run_info, "Show a network: its blocks, parameters, multiply-adds and weights.")
    parser.add_argument("model", help="MODEL, MODEL.TAG, a weight folder, or a spec as a JSON file")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _run_info(args: argparse.Namespace) -> int:
    from .cost import count_macs, count_params

    spec, task, weights = _describe(args.model)
    size, num_classes, in_chans = task["img_size"], task["num_classes"], task["in_chans"]
    blocks = _block_rows(spec, size)
    total = {
        "params": count_params(spec, num_classes, size, in_chans),
        "macs": count_macs(spec, size, num_classes, in_chans),
    }
    if args.json:
        _print_json(
            {"model": args.model, **task, "spec": spec.to_dict(), "blocks": blocks, **total, "weights": weights}
        )
        return 0
    rows = [
        (
            str(index),
            *("-" if row[key] is None else f"{row[key]:g}" for key in ("G", "L", "K", "E", "r", "d_z")),
            f"{row['params']:,}",
            f"{row['macs'] / 1e6:,.2f} M",
        )
        for index, row in enumerate(blocks)
    ]
    rows.append(
        (
            "other",
            *[""] * 6,
            f"{total['params'] - sum(row['params'] for row in blocks):,}",
            f"{(total['macs'] - sum(row['macs'] for row in blocks)) / 1e6:,.2f} M",
        )
    )
    rows.append(("total", *[""] * 6, f"{total['params']:,}", f"{total['macs'] / 1e6:,.2f} M"))
    columns = ["block", "G", "L", "K", "E", "r", "d_z", "parameters", "MACs"]
    title = (
        f"{args.model}: width {spec.embed_dim}, {spec.num_heads} heads, patch {spec.patch_size}, "
        f"{in_chans} x {size[0]} x {size[1]} pixels, {num_classes} classes"
    )
    _print_table(title, [(column, "right") for column in columns], rows)
    print(
        "G, L: global and local heads; K, E: kernel and expansion of the convolution; r, d_z: width of query, key and"
    )
    print(
        "value, and of the feed-forward network, over the channels. MACs: matrix products and convolutions, one image."
    )
    print(f"Weights: {weights}")
    return 0


def _block_rows(spec: GLiTSpec, size: tuple[int, int]) -> list[dict[str, Any]]:
    from .cost import count_block_macs, count_block_params

    tokens = (size[0] // spec.patch_size) * (size[1] // spec.patch_size) + 1
    return [
        {
            "G": block.num_global_heads,
            "L": block.num_local_heads,
            "K": block.kernel_size,
            "E": block.expand_ratio,
            "r": block.qkv_ratio,
            "d_z": block.mlp_ratio,
            "params": count_block_params(spec, block),
            "macs": count_block_macs(spec, block, tokens),
        }
        for block in spec.blocks
    ]


def _describe(model: str) -> tuple[GLiTSpec, dict[str, Any], str]:
    """The spec that `model` names, the task it is for, and where its weights are."""
    from . import hub
    from .folders import read_config, spec_of
    from .glit import NAMED_SPECS
    from .spec import GLiTSpec

    path = Path(model)
    if path.is_dir():
        config = read_config(path)
        channels, height, width = config["pretrained_cfg"].get("input_size", (3, 224, 224))
        task = {"img_size": (height, width), "num_classes": config.get("num_classes", 1000), "in_chans": channels}
        return spec_of(config), task, f"in {model}"
    if path.suffix == ".json" or path.is_file():
        return GLiTSpec.parse(path), {"img_size": (224, 224), "num_classes": 1000, "in_chans": 3}, "none, a bare spec"
    entry = hub.get_entry(model)
    channels, height, width = entry.input_size
    task = {"img_size": (height, width), "num_classes": entry.num_classes, "in_chans": channels}
    place = hub.where(entry)
    weights = place if place != "none" else f"none on this machine; {entry.note or ''}".rstrip("; ")
    return NAMED_SPECS[entry.architecture], task, f"{entry.name}, {weights}"


# ---- glit convert ----


def _add_convert(commands: Commands) -> None:
    parser = _add(
        commands, "convert", _run_convert, "Turn a checkpoint, of the authors' code or ours, into safetensors."
    )
    parser.add_argument("checkpoint", help="a torch pickle (.pth, .pth.tar) or a safetensors file")
    parser.add_argument("--model", required=True, help="MODEL or MODEL.TAG that it belongs to")
    parser.add_argument("--install", action="store_true", help="install it for pretrained=True on this machine")
    parser.add_argument("--out", metavar="DIR", help="write a weight folder")
    parser.add_argument("--spec", metavar="FILE", help="JSON file of its architecture, if not the model's own")
    parser.add_argument("--num-classes", type=int, metavar="N", help="its classes, if not the model's own")
    parser.add_argument("--img-size", type=int, metavar="PIXELS", help="its image size, if not the model's own")


def _run_convert(args: argparse.Namespace) -> int:
    from .publishing import convert

    folders = convert(
        args.checkpoint,
        args.model,
        out=args.out,
        install=args.install,
        spec=args.spec,
        num_classes=args.num_classes,
        img_size=args.img_size,
    )
    for folder in folders:
        print(f"wrote {folder}")
    if args.install:
        name = args.model if "." in args.model else f"{args.model}.in1k"
        print(f'timm.create_model("{name}", pretrained=True) now works on this machine, after import glit_models')
    return 0


# ---- glit publish ----


def _add_publish(commands: Commands) -> None:
    parser = _add(commands, "publish", _run_publish, "Publish weights with a model card, to the Hub or as a folder.")
    parser.add_argument("source", help="MODEL.TAG, a weight folder, or a Hub repository NAMESPACE/NAME")
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--repo", metavar="NAMESPACE/NAME", help="upload to this Hub repository; made if missing")
    target.add_argument("--to-folder", metavar="DIR", help="write a folder instead")
    target.add_argument("--to-package", action="store_true", help="ship it: write into the package (for a checkout)")
    parser.add_argument("--name", metavar="MODEL.TAG", help="name of the weights in the registry")
    for fact, text in (
        ("dataset", "the data they were trained on"),
        ("license", "their licence, as an SPDX identifier"),
        ("recipe", "the command that trained them"),
        ("origin", "where they come from, when it was not a command"),
    ):
        parser.add_argument(f"--{fact}", help=text)
    parser.add_argument(
        "--metric",
        nargs=3,
        action="append",
        metavar=("NAME", "VALUE", "SOURCE"),
        help="a score, and the command that prints it",
    )


def _run_publish(args: argparse.Namespace) -> int:
    from .publishing import publish, ship

    facts = {key: getattr(args, key) for key in ("name", "dataset", "license", "recipe", "origin")}
    facts["metrics"] = [_metric(*metric) for metric in args.metric or ()]
    if args.to_package:
        if not args.name:
            raise GlitError("--to-package needs --name MODEL.TAG")
        entry = ship(args.source, args.name, facts=facts)
        print("added to the registry of this package:")
        _print_json({entry.name: entry.to_dict()})
        return 0
    published = publish(args.source, repo=args.repo, folder=args.to_folder, facts=facts)
    where = f"{published.place}@{published.revision}" if published.revision else published.place
    print(f"published {where}, sha256 {published.sha256}")
    print(f"loads with timm.create_model({_timm_name(args, published.revision)!r}, pretrained=True)")
    if published.revision and published.entry:
        print("the registry entry, for glit_models/weights/registry.json:")
        _print_json({published.entry.name: published.entry.to_dict()})
    return 0


def _timm_name(args: argparse.Namespace, revision: str | None) -> str:
    return f"hf-hub:{args.repo}@{revision}" if args.repo else f"local-dir:{args.to_folder}"


def _metric(name: str, value: str, source: str) -> dict[str, Any]:
    try:
        return {"name": name, "value": float(value), "source": source}
    except ValueError:
        raise GlitError(f"--metric {name!r}: VALUE must be a number, got {value!r}") from None


# ---- glit verify ----


def _add_verify(commands: Commands) -> None:
    parser = _add(
        commands, "verify", _run_verify, "Recompute hash, parameter count and golden logits; 1 if one differs."
    )
    parser.add_argument("source", help="MODEL.TAG, a weight folder, or a Hub repository NAMESPACE/NAME[@REVISION]")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _run_verify(args: argparse.Namespace) -> int:
    from dataclasses import asdict

    from .verify import verify

    checks = verify(args.source)
    if args.json:
        _print_json([asdict(check) for check in checks])
    else:
        verdict = {True: "agrees", False: "DIFFERS", None: "-"}
        columns = [(name, "left") for name in ("check", "expected", "found", "")]
        _print_table(args.source, columns, [(c.name, c.expected, c.found, verdict[c.agrees]) for c in checks])
    return 1 if any(check.agrees is False for check in checks) else 0


# ---- glit predict ----


def _add_predict(commands: Commands) -> None:
    parser = _add(commands, "predict", _run_predict, "Classify pictures: files, and folders with all they hold.")
    parser.add_argument("pictures", nargs="+", metavar="IMAGE", help="a picture, or a folder of them")
    parser.add_argument("--model", help="MODEL.TAG, a weight folder or a repository (glit_tiny.fashion_mnist)")
    parser.add_argument("--onnx", metavar="FILE", help="a file that `glit export` wrote, instead of a model")
    parser.add_argument("--topk", type=int, default=5, metavar="K", help="how many classes to show (default 5)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--device", help="cpu, cuda, ...; the GPU if there is one unless given")


def _run_predict(args: argparse.Namespace) -> int:
    from .inference import find_pictures

    if args.topk < 1:
        raise GlitError(f"--topk must be at least 1, got {args.topk}")
    paths = find_pictures(args.pictures)
    title, classifier = _onnx_classifier(args) if args.onnx else _torch_classifier(args)
    predictions = list(classifier.predict(paths, args.topk))
    if args.json:
        _print_json([_prediction_dict(prediction) for prediction in predictions])
    else:
        rows = [
            (str(prediction.path) if rank == 0 else "", name, f"{probability:.1%}")
            for prediction in predictions
            for rank, (name, probability) in enumerate(prediction.classes)
        ]
        if rows:
            _print_table(title, [("picture", "left"), ("class", "left"), ("probability", "right")], rows)
    failed = [prediction for prediction in predictions if prediction.error is not None]
    for prediction in failed:
        print(f"glit: {prediction.error}", file=sys.stderr)
    if len(failed) == len(predictions):
        return 2
    return 1 if failed else 0


def _torch_classifier(args: argparse.Namespace) -> tuple[str, Any]:
    from .inference import Classifier, load_model, pick_device

    name = args.model or "glit_tiny.fashion_mnist"
    device = pick_device(args.device)
    return name, Classifier(load_model(name), device)


def _onnx_classifier(args: argparse.Namespace) -> tuple[str, Any]:
    from glit_models.export import OnnxClassifier

    if args.model is not None:
        raise GlitError("--model and --onnx exclude each other; the file is the model")
    providers = None if args.device is None else [args.device]
    classifier = OnnxClassifier(args.onnx, providers, strict=args.device is not None)
    return f"{args.onnx} ({classifier.info.source}) on {classifier.provider}", classifier


def _prediction_dict(prediction: Prediction) -> dict[str, Any]:
    if prediction.error is not None:
        return {"picture": str(prediction.path), "error": prediction.error}
    classes = [{"class": name, "probability": round(value, 6)} for name, value in prediction.classes]
    return {"picture": str(prediction.path), "classes": classes}


# ---- glit demo ----


def _add_demo(commands: Commands) -> None:
    parser = _add(commands, "demo", _run_demo, "Classify the pictures that come with the package, and draw them.")
    parser.add_argument("--out", default="glit-demo.png", metavar="FILE", help="the contact sheet (glit-demo.png)")


def _run_demo(args: argparse.Namespace) -> int:
    from .demo import MODEL, run_demo

    results = run_demo(Path(args.out))
    rows = [
        (
            prediction.path.name,
            ", ".join(f"{name} {probability:.0%}" for name, probability in prediction.classes),
            label,
            "yes" if prediction.classes[0][0] == label else "no",
        )
        for prediction, label in results
    ]
    columns = [("picture", "left"), ("first three", "left"), ("true label", "left"), ("right", "left")]
    _print_table(f"{MODEL} on pictures of the Fashion-MNIST test set", columns, rows)
    print(f"{sum(row[-1] == 'yes' for row in rows)} of {len(rows)} right. Contact sheet: {args.out}")
    return 0


# ---- glit train ----


def _add_train(commands: Commands) -> None:
    parser = _add(commands, "train", _run_train, "Train a model; the same command again goes on where it stopped.")
    parser.add_argument("recipe", help="name of a shipped recipe, or the path of a YAML file")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the run")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override, such as optim.lr=1e-4"
    )
    parser.add_argument("--device", help="cpu, cuda, ...; the GPU if there is one unless given")
    parser.add_argument("--max-minutes", type=float, metavar="M", help="save and leave after so long")


def _run_train(args: argparse.Namespace) -> int:
    from .inference import pick_device
    from .training import Trainer, load_recipe

    device = pick_device(args.device)
    command = shlex.join(["glit", "train", args.recipe, *(word for text in args.set for word in ("--set", text))])
    trainer = Trainer(load_recipe(args.recipe, args.set), args.out, device, args.max_minutes, command)
    result = trainer.run()
    if result is not None and trainer.rank == 0:
        print(json.dumps(result, indent=2))
        print(
            f"the model is in {Path(args.out) / 'model'}: try `glit predict IMAGE --model {Path(args.out) / 'model'}`"
        )
    return 0


# ---- glit search ----


def _add_search(commands: Commands) -> None:
    parser = _add(
        commands, "search", _run_search,
        "Search for a network; the same command again goes on where it stopped. `glit search report DIR` shows a "
        "search in a page, `glit search rank DIR` measures how far its supernet can be trusted.",
    )  # fmt: skip
    parser.add_argument("what", metavar="RECIPE", help="name of a shipped recipe, path of a YAML file; report; rank")
    parser.add_argument("folder", metavar="DIR", nargs="?", type=Path, help="of the search, after report and rank")
    parser.add_argument("--out", metavar="DIR", type=Path, help="folder of the search")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override, such as evolution.generations=10"
    )
    parser.add_argument("--networks", type=int, metavar="N", help="rank: how many to train from scratch (10)")
    parser.add_argument("--stage", help="rank: whose supernet (that of the last stage)")
    parser.add_argument("--device", help="cpu, cuda, ...; the GPU if there is one unless given")
    parser.add_argument("--max-minutes", type=float, metavar="M", help="save and leave after so long")


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

    from .inference import pick_device

    command = shlex.join(["glit", "search", args.what, *(word for text in args.set for word in ("--set", text))])
    recipe = load_search_recipe(args.what, args.set)
    run = SearchRun(recipe, args.out, pick_device(args.device), args.max_minutes, command, _runtimes(recipe))
    result = run.run()
    if result is not None and run.context.rank == 0:
        print(json.dumps(result, indent=2))
        print(f"the winner is {args.out / 'winner.json'}, trained it is {args.out / 'model'}; next:")
        print(f"    glit search report {args.out}")
        print(f"    glit info {args.out / 'winner.json'}")
        print(f"    glit predict IMAGE --model {args.out / 'model'}")
    return 0


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

    print(f"the report is {write_report(args.folder)}")
    return 0


def _run_search_rank(args: argparse.Namespace) -> int:
    from glit_models.search import rank_networks
    from glit_models.search.pipeline import read_recipe_of

    from .inference import pick_device

    ranking = rank_networks(
        args.folder, args.networks or 10, args.stage, pick_device(args.device), args.max_minutes,
        _runtimes(read_recipe_of(args.folder)),
    )  # fmt: skip
    if ranking is not None:
        print(ranking)
    return 0


# ---- glit finetune ----


def _add_finetune(commands: Commands) -> None:
    parser = _add(commands, "finetune", _run_finetune, "Fine-tune a model on a folder of pictures; again goes on.")
    parser.add_argument("folder", metavar="DIR", help="of CLASS/*, or of train/CLASS/*, val/CLASS/*, test/CLASS/*")
    parser.add_argument("--model", help="MODEL.TAG, a weight folder or a repository to start from")
    parser.add_argument("--out", metavar="RUN", type=Path, help="folder of the run (runs/ and the name of DIR)")
    for name, text in (("epochs", "how often to see all pictures"), ("img-size", "pixels"), ("batch-size", "pictures")):
        parser.add_argument(f"--{name}", type=int, metavar="N", help=text)
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="any key of a recipe, such as optim.lr=1e-4"
    )
    parser.add_argument("--device", help="cpu, cuda, ...; the GPU if there is one unless given")
    parser.add_argument("--max-minutes", type=float, metavar="M", help="save and leave after so long")


def _run_finetune(args: argparse.Namespace) -> int:
    from .inference import pick_device
    from .training import Trainer
    from .training.finetuning import check_pictures, describe_score, next_commands, plan

    device = pick_device(args.device)
    sizes = {"optim.epochs": args.epochs, "model.img_size": args.img_size, "optim.batch_size": args.batch_size}
    overrides = [f"{key}={value}" for key, value in sizes.items() if value is not None]
    plan_ = plan(args.folder, args.model, device, [*args.set, *overrides])
    out = args.out or Path("runs") / Path(args.folder).resolve().name
    first = os.environ.get("RANK", "0") == "0"
    if first:
        print("\n".join(plan_.lines))
        print(f"run: {out}; the same command goes on where it stopped", flush=True)
        if not (out / "recipe.yaml").exists():
            check_pictures(plan_.splits)
    words = [("--model", args.model), ("--epochs", args.epochs), ("--img-size", args.img_size)]
    words += [("--batch-size", args.batch_size), *(("--set", text) for text in args.set)]
    asked = [str(word) for pair in words if pair[1] is not None for word in pair]
    command = shlex.join(["glit", "finetune", args.folder, *asked])
    result = Trainer(plan_.recipe, out, device, args.max_minutes, command).run()
    if result is not None and first:
        print("\n".join([*describe_score(result, plan_.splits), "next:"]))
        print("\n".join(f"    {line}" for line in next_commands(args.folder, out, plan_.splits)))
    return 0


# ---- glit eval ----


_MOST_CLASSES = 20  # rows of a table that people read


def _add_eval(commands: Commands) -> None:
    parser = _add(commands, "eval", _run_eval, "Score a model on a labelled data set: top-1, top-5, each class, speed.")
    parser.add_argument("model", help="MODEL or MODEL.TAG of timm, a weight folder or a repository")
    parser.add_argument(
        "data", help="a folder of CLASS/* or val/CLASS/*, fashion-mnist, or timm's torch/NAME, hfds/NAME"
    )
    parser.add_argument("--root", metavar="DIR", help="the folder of a data set that is given by name")
    parser.add_argument("--split", metavar="NAME", help="test unless given; of a folder without one, validation")
    parser.add_argument("--download", action="store_true", help="fetch the data set if it is not there")
    parser.add_argument("--input-key", metavar="COLUMN", help="the pictures' column in a table, if timm cannot tell")
    parser.add_argument("--target-key", metavar="COLUMN", help="the labels' column")
    parser.add_argument("--batch-size", type=int, default=250, metavar="N", help="pictures at a time (default 250)")
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="processes that load pictures (default 0)")
    parser.add_argument("--device", help="cpu, cuda, ...; the GPU if there is one unless given")
    parser.add_argument("--confusion", type=Path, metavar="FILE.png", help="draw the confusion matrix")
    parser.add_argument("--json", action="store_true", help="print JSON, with every class and the confusion matrix")


def _run_eval(args: argparse.Namespace) -> int:
    from .confusion import check_can_draw, draw_confusion
    from .data.labelled import open_labelled
    from .evaluation import evaluate
    from .folders import to_json
    from .inference import Classifier, load_model, pick_device

    if args.batch_size < 1:
        raise GlitError(f"--batch-size must be at least 1, got {args.batch_size}")
    if args.workers < 0:
        raise GlitError(f"--workers must be 0 or more, got {args.workers}")
    if args.confusion is not None:
        check_can_draw(args.confusion)
    device = pick_device(args.device)
    keys = {"download": args.download, "input_key": args.input_key, "target_key": args.target_key}
    with _keys_called_options():
        data = open_labelled(args.data, args.root, args.split, **keys)  # before the model, which may need fetching
        classifier = Classifier(load_model(args.model), device)
        result = evaluate(classifier, data, args.batch_size, args.workers)
    if classifier.has_names and result.matched_by == "position":
        pairs = [f"{theirs} is {own}" for theirs, own in zip(data.class_names, classifier.class_names, strict=True)]
        text = f"the data's class names are not the model's; by their order {', '.join(pairs[:3])}, ..."
        print(f"glit: {text}", file=sys.stderr)
    title = f"{args.model} on {data}"
    if args.json:
        head = {"model": args.model, "dataset": data.name, "split": data.split, "device": str(device)}
        print(to_json(head | result.to_dict()), end="")
    else:
        _print_evaluation(title, result, str(device))
    if args.confusion is not None:
        draw_confusion(result, args.confusion, f"{title}: top-1 {result.top1:.2f} %")
        if not args.json:
            print(f"Confusion matrix: {args.confusion}")
    return 0


@contextlib.contextmanager
def _keys_called_options() -> Iterator[None]:
    """Let an error about data that names a recipe's key, `data.root`, name the option, `--root`."""
    try:
        yield
    except DataError as error:
        text = str(error).replace("data.num_workers", "--workers")
        raise DataError(re.sub(r"\bdata\.(root|download|input_key|target_key)\b", _option_of_key, text)) from None


def _option_of_key(match: re.Match[str]) -> str:
    return f"--{match[1].replace('_', '-')}"


def _print_evaluation(title: str, result: Evaluation, device: str) -> None:
    top5 = "" if result.top5 is None else f", top-5 {result.top5:.2f} % ({result.correct_top5})"
    print(f"{title}: top-1 {result.top1:.2f} % ({result.correct} of {result.pictures}){top5}")
    rows = [(index, row) for index, row in enumerate(result.classes) if row.pictures or row.predicted]
    shown = rows
    if len(rows) > _MOST_CLASSES:
        shown = sorted(rows, key=lambda pair: 101.0 if pair[1].recall is None else pair[1].recall)[:_MOST_CLASSES]
    columns = [("class", "left"), *((name, "right") for name in ("pictures", "correct", "recall", "precision"))]
    table = [
        (
            row.name,
            f"{row.pictures}",
            f"{row.correct}",
            _percent(row.recall),
            _percent(row.precision),
            "{} ({})".format(*mistaken) if (mistaken := result.mistaken_for(index)) else "",
        )
        for index, row in shown
    ]
    _print_table(None, [*columns, ("most often taken for", "left")], table)
    if len(shown) < len(rows):
        print(f"These are the {len(shown)} classes of lowest recall; --json has all {len(rows)}.")
    if empty := sum(not row.pictures for row in result.classes):
        print(f"{empty} of the model's {len(result.classes)} classes have no pictures here.")
    print(
        f"{result.images_per_second:.0f} images/s by the model alone, "
        f"{result.images_per_second_with_loading:.0f} with loading, on {device}"
    )


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} %"


# ---- glit fractals ----


def _add_fractals(commands: Commands) -> None:
    parser = _add(
        commands, "fractals", _run_fractals, "Draw a sheet of the fractals that pretraining needs no data for."
    )
    parser.add_argument("--out", default="glit-fractals.png", metavar="FILE", help="the sheet (glit-fractals.png)")
    parser.add_argument("--classes", type=int, default=12, metavar="N", help="the first classes, a row each (12)")
    parser.add_argument("--instances", type=int, default=8, metavar="N", help="pictures of each class (8)")
    parser.add_argument("--size", type=int, default=112, metavar="PIXELS", help="side of a picture (112)")
    parser.add_argument("--seed", type=int, default=0, help="of the classes and their instances (0)")
    parser.add_argument("--max-maps", type=int, metavar="N", help="maps that a class may have")
    parser.add_argument(
        "--perturbation", type=float, metavar="SHARE", help="how far instances leave their class's maps"
    )
    parser.add_argument("--single", action="store_true", default=None, help="all classes are changes of one fractal")
    parser.add_argument("--delta", type=float, metavar="D", help="with --single: how far classes lie from that fractal")
    parser.add_argument("--color", choices=("gray", "color"), help="one level of gray, or four colours")
    parser.add_argument("--render", choices=("point", "patch"), help="points, or a 3 x 3 pattern at each of them")
    parser.add_argument("--density", type=float, metavar="POINTS", help="points drawn for each pixel")


def _run_fractals(args: argparse.Namespace) -> int:
    from .data.fractals import FractalConfig, Fractals, draw_sheet

    for name, value in (("classes", args.classes), ("instances", args.instances)):
        if value < 1:
            raise GlitError(f"--{name} must be at least 1, got {value}")
    keys = ("max_maps", "perturbation", "single", "delta", "color", "render", "density")
    chosen = {key: getattr(args, key) for key in keys if getattr(args, key) is not None}
    fractals = Fractals(FractalConfig(num_classes=args.classes, **chosen), args.seed)
    draw_sheet(fractals, args.instances, args.size, Path(args.out))
    print(f"{args.classes} classes, {args.instances} instances of each, {args.size} pixels a side: {args.out}")
    return 0


# ---- glit export ----


def _add_export(commands: Commands) -> None:
    parser = _add(
        commands,
        "export",
        _run_export,
        "Export a model to ONNX (or torch), compared with PyTorch; 1 if they differ.",
    )
    parser.add_argument("model", help="MODEL.TAG, a weight folder, or a Hub repository NAMESPACE/NAME")
    parser.add_argument("--out", required=True, metavar="FILE", help="the file to write, model.onnx say; or repository")
    parser.add_argument("--format", choices=("onnx", "torch", "aotinductor"), default="onnx", help="of the file (onnx)")
    parser.add_argument("--serving", choices=("triton",), help="write a model repository for this server instead")
    parser.add_argument("--name", help="serving: of the model in the repository")
    parser.add_argument("--serve-on", choices=("gpu", "cpu"), default="gpu", help="serving: where (gpu)")
    parser.add_argument("--max-batch", type=int, default=64, metavar="N", help="serving: images put together (64)")
    parser.add_argument("--instances", type=int, default=1, metavar="N", help="serving: copies of the model (1)")
    parser.add_argument("--opset", type=int, metavar="N", help="23, 20 or 18; the newest that can be run here")
    parser.add_argument("--precision", default="fp32", metavar="P", help="fp32 (the default), fp16, bf16 or int8")
    parser.add_argument("--batch", default="dynamic", metavar="N", help="images at a time; any number unless given")
    parser.add_argument(
        "--image-size", metavar="H,W", help="height and width, or dynamic; the model's own unless given"
    )
    parser.add_argument(
        "--preprocess", action="store_true", help="take uint8 pictures; resize, crop and normalise in the graph"
    )
    parser.add_argument("--calibration", metavar="DATA", help="int8: pictures like those it will see")
    parser.add_argument("--dynamic-int8", action="store_true", help="int8 with scales chosen at run time, uncalibrated")
    parser.add_argument("--verify", type=int, default=64, metavar="N", help="pictures to compare on (64); 0 for none")
    parser.add_argument("--data", help="compare on these, a folder or data set as for `glit eval`; else on generated")
    parser.add_argument("--root", metavar="DIR", help="folder of a named data set")
    parser.add_argument("--provider", help="cpu, cuda or tensorrt to verify with; the fastest there is unless given")
    parser.add_argument("--force", action="store_true", help="replace what is there")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _run_export(args: argparse.Namespace) -> int:
    if args.format != "onnx":
        artifact = _export_torch(args)
    elif args.serving:
        artifact = _export_triton(args)
    else:
        from glit_models.export import export_onnx

        artifact = export_onnx(args.model, args.out, **_onnx_options(args))
    if args.json:
        from dataclasses import asdict

        _print_json({**asdict(artifact), "path": str(artifact.path)})
    else:
        _print_artifact(artifact)
    for problem in artifact.agreement.problems if artifact.agreement else ():
        print(f"glit: {artifact.path} is not what PyTorch computes: {problem}", file=sys.stderr)
    return 1 if artifact.agreement is not None and not artifact.agreement.holds else 0


def _onnx_options(args: argparse.Namespace) -> dict[str, Any]:
    from glit_models.export import Pictures

    return {
        "opset": args.opset,
        "precision": args.precision,
        "batch": _export_batch(args.batch),
        "image_size": _export_size(args.image_size),
        "preprocess": args.preprocess,
        "calibration": Pictures(args.calibration, args.root, training=True) if args.calibration else None,
        "dynamic_int8": args.dynamic_int8,
        "verify": args.verify,
        "pictures": Pictures(args.data, args.root) if args.data else None,
        "providers": [args.provider] if args.provider else None,
        "force": args.force,
    }


def _export_torch(args: argparse.Namespace) -> Any:
    from glit_models.export.program import export_torch

    options = _onnx_options(args)
    for name in ("opset", "preprocess", "calibration", "dynamic_int8", "providers"):
        if options.pop(name):
            raise GlitError(f"--{name.replace('_', '-').rstrip('s')} is for --format onnx")
    if options["image_size"] == "dynamic" or args.serving:
        raise GlitError("--serving and a dynamic image size are for --format onnx")
    return export_torch(args.model, args.out, compiled=args.format == "aotinductor", **options)


def _export_triton(args: argparse.Namespace) -> Any:
    from glit_models.export.serving import TritonOptions, export_triton

    how = TritonOptions(max_batch_size=args.max_batch, instances=args.instances, gpu=args.serve_on == "gpu")
    return export_triton(args.model, args.out, name=args.name, options=how, **_onnx_options(args))


def _export_batch(text: str) -> int | None:
    if text == "dynamic":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise GlitError(f"--batch must be 'dynamic' or a number of images from 1, got {text!r}")
    return int(text)


def _export_size(text: str | None) -> Any:
    if text is None or text == "dynamic":
        return text
    sides = re.fullmatch(r"(\d+)(?:[,x](\d+))?", text)
    if sides is None:
        raise GlitError(f"--image-size must be HEIGHT,WIDTH in pixels or 'dynamic', got {text!r}")
    return int(sides[1]), int(sides[2] or sides[1])


def _print_artifact(artifact: Any) -> None:
    info, agreement = artifact.info, artifact.agreement
    facts = [f"{artifact.num_bytes / 1e6:.1f} MB", info.precision, *getattr(artifact, "notes", ())]
    facts += [f"{artifact.num_nodes} nodes"] if hasattr(artifact, "num_nodes") else []
    print(f"{artifact.path}: {', '.join(facts)}")
    if agreement is None:
        print("not compared with PyTorch, so it is marked .unverified")
        return
    of = f"{agreement.pictures} pictures ({agreement.origin}) by {agreement.provider}"
    rows = [
        ("largest difference of a logit", f"{agreement.max_abs:.2e}"),
        ("over the picture's largest logit", f"{agreement.max_rel:.2e}"),
        ("same most probable class", f"{agreement.top1_agreement:.2f} %"),
    ]
    if agreement.levels is not None:
        rows.append(("prepared pixels, 19 in 20 within", f"{agreement.levels:.2f} levels of 255"))
    if agreement.accuracy is not None:
        rows.append(
            ("top-1 of the file and of PyTorch", f"{agreement.accuracy:.2f} %, {agreement.torch_accuracy:.2f} %")
        )
    print(f"compared with PyTorch on {of}:")
    for text, value in rows:
        print(f"  {text:<38}{value}")


# ---- glit bench ----


def _add_bench(commands: Commands) -> None:
    parser = _add(commands, "bench", _run_bench, "Measure a model in PyTorch and ONNX Runtime, in one interleaved run.")
    parser.add_argument("model", help="MODEL.TAG, a weight folder, or a Hub repository NAMESPACE/NAME")
    parser.add_argument("--onnx", action="append", default=[], metavar="FILE", help="an exported file; may be repeated")
    parser.add_argument("--batch", default="1,16", metavar="N,...", help="images at a time (1,16)")
    parser.add_argument("--providers", metavar="P,...", help="cpu, cuda, tensorrt; the fastest there is unless given")
    parser.add_argument("--rounds", type=int, default=30, metavar="N", help="measurements of each (30)")
    parser.add_argument("--threads", type=int, metavar="N", help="on the CPU; all of it unless given")
    parser.add_argument("--device", help="of PyTorch: cpu, cuda, ...; the GPU if there is one unless given")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--no-baseline", action="store_true", help="leave deit_tiny_patch16_224 out")
    parser.add_argument("--plot", metavar="FILE.png", help="draw it")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _run_bench(args: argparse.Namespace) -> int:
    from dataclasses import asdict

    from glit_models.export import bench

    from .inference import pick_device

    batches = [_export_batch(text) for text in args.batch.split(",")]
    if None in batches:
        raise GlitError("--batch must be numbers, separated by commas")
    rows, left_out = bench.bench(
        args.model,
        files=args.onnx,
        batches=[batch for batch in batches if batch],
        providers=args.providers.split(",") if args.providers else None,
        rounds=args.rounds,
        threads=args.threads,
        device=pick_device(args.device),
        compiled=not args.no_compile,
        baseline=not args.no_baseline,
    )
    about = bench.machine()
    if args.json:
        found = [{**asdict(row), "images_per_second": row.images_per_second} for row in rows]
        _print_json({"model": args.model, **about, "rounds": args.rounds, "rows": found, "left_out": left_out})
    else:
        columns = [
            ("what", "left"),
            ("on", "left"),
            *((name, "right") for name in ("batch", "median", "p95", "images/s")),
        ]
        cells = [
            (row.what, row.provider, str(row.batch), f"{row.median_ms:.2f} ms", f"{row.p95_ms:.2f} ms",
             f"{row.images_per_second:.0f}")
            for row in rows
        ]  # fmt: skip
        _print_table(args.model, columns, cells)
        print(f"{args.rounds} rounds; {', '.join(f'{key} {value}' for key, value in about.items())}")
    for line in left_out:
        print(f"glit: left out: {line}", file=sys.stderr)
    if args.plot:
        bench.draw_bench(rows, args.model, Path(args.plot))
    return 0


_COMMANDS: tuple[Callable[[Commands], None], ...] = (
    _add_list,
    _add_info,
    _add_predict,
    _add_demo,
    _add_train,
    _add_search,
    _add_finetune,
    _add_eval,
    _add_convert,
    _add_publish,
    _add_verify,
    _add_fractals,
    _add_export,
    _add_bench,
)
