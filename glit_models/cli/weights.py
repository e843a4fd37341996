"""Model and weight commands: list, info, convert, publish, verify."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import GlitError
from .common import Commands, add_command, echo, print_json, print_table

if TYPE_CHECKING:
    from ..spec import Spec
    from ..weights.publish import Published

__all__ = ["add_convert", "add_info", "add_list", "add_publish", "add_verify"]


# ---- glit list ----


def add_list(commands: Commands) -> None:
    parser = add_command(commands, "list", _run_list, "List the models and their available weights.")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _run_list(args: argparse.Namespace) -> int:
    from ..weights import resolve

    entries = list(resolve.registry().values())
    outside = [_outside_facts(name) for name in resolve.outside_cfgs()]
    if args.json:
        print_json(
            [
                {"name": entry.name, "where": resolve.where(entry), "unverified": resolve.is_unverified(entry)}
                | entry.to_dict()
                for entry in entries
            ]
            + outside
        )
        return 0
    rows = [
        (
            entry.name,
            "unverified" if resolve.is_unverified(entry) else resolve.where(entry),
            entry.dataset,
            f"{entry.input_size[1]}",
            f"{entry.params / 1e6:.2f} M",
            f"{entry.macs / 1e9:.3f} G",
            ", ".join(f"{metric.value:g}" for metric in entry.metrics) or "-",
        )
        for entry in entries
    ]
    for facts in outside:
        costs = f"{facts['params'] / 1e6:.2f} M", f"{facts['macs'] / 1e9:.3f} G"
        rows.append((facts["name"], facts["where"], "-", f"{facts['input_size'][1]}", *costs, "-"))
    columns = [("model", "left"), ("weights", "left"), ("data", "left"), ("pixels", "right"), ("parameters", "right")]
    print_table(None, [*columns, ("MACs", "right"), ("score", "right")], rows)
    for entry in entries:
        for metric in entry.metrics:
            unverified = "; the installed file is unverified" if resolve.is_unverified(entry) else ""
            echo(f"{entry.name}: {metric.name} {metric.value:g} ({metric.source}{unverified})")
    return 0


def _outside_facts(name: str) -> dict[str, Any]:
    """What is known of a model of a family from outside the package: its spec's costs, and timm's configuration."""
    from timm.models import PretrainedCfg

    from ..cost import count_macs, count_params
    from ..families import named_specs
    from ..weights import resolve

    cfg = resolve.outside_cfg(name) or PretrainedCfg()
    places = {"file": cfg.file, "hub": cfg.hf_hub_id, "url": cfg.url}
    spec, (channels, height, width) = named_specs()[name.partition(".")[0]], cfg.input_size
    return {
        "name": name,
        "where": next((place for place, source in places.items() if source), "none"),
        "params": count_params(spec, cfg.num_classes, (height, width), channels),
        "macs": count_macs(spec, (height, width), cfg.num_classes, channels),
        "input_size": cfg.input_size,
        "num_classes": cfg.num_classes,
    }


# ---- glit info ----


def add_info(commands: Commands) -> None:
    parser = add_command(
        commands, "info", _run_info, "Show a network: its blocks, parameters, multiply-adds and weights."
    )
    parser.add_argument("model", help="MODEL, MODEL.TAG, a weight folder, or the JSON file of a spec")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _run_info(args: argparse.Namespace) -> int:
    from ..cost import count_macs, count_params

    spec, task, weights = _describe(args.model)
    size, num_classes, in_chans = task["img_size"], task["num_classes"], task["in_chans"]
    class_token = task.setdefault("class_token", True)
    blocks = _block_rows(spec, size, class_token)
    total = {
        "params": count_params(spec, num_classes, size, in_chans, class_token),
        "macs": count_macs(spec, size, num_classes, in_chans, class_token),
    }
    if args.json:
        print_json({"model": args.model, **task, "spec": spec.to_dict(), "blocks": blocks, **total, "weights": weights})
        return 0
    headings = spec.block_table()[0]
    letters = list(headings.values())
    rows = [
        (
            str(index),
            *(_show(row[letter]) for letter in letters),
            f"{row['params']:,}",
            f"{row['macs'] / 1e6:,.2f} M",
        )
        for index, row in enumerate(blocks)
    ]
    rows.append(
        (
            "other",
            *[""] * len(letters),
            f"{total['params'] - sum(row['params'] for row in blocks):,}",
            f"{(total['macs'] - sum(row['macs'] for row in blocks)) / 1e6:,.2f} M",
        )
    )
    rows.append(("total", *[""] * len(letters), f"{total['params']:,}", f"{total['macs'] / 1e6:,.2f} M"))
    columns = ["block", *letters, "parameters", "MACs"]
    title = f"{args.model}: {spec.summary}, {in_chans} x {size[0]} x {size[1]} pixels, {num_classes} classes"
    print_table(title, [(column, "right") for column in columns], rows)
    named = [f"{letter}: {name.replace('_', ' ')}" for name, letter in headings.items() if name in spec.symbols]
    echo("; ".join([*named, "MACs: matrix products and convolutions of one image"]) + ".")
    echo(f"Weights: {weights}")
    return 0


def _show(value: Any) -> str:
    return "-" if value is None else f"{value:g}" if isinstance(value, (int, float)) else str(value)


def _block_rows(spec: Spec, size: tuple[int, int], class_token: bool) -> list[dict[str, Any]]:
    from ..cost import count_block_macs, count_block_params
    from ..parts import TokenGrid

    tokens = TokenGrid(size[0] // spec.patch_size, size[1] // spec.patch_size, int(class_token))
    headings, blocks = spec.block_table()
    return [
        {
            **{heading: block.get(name) for name, heading in headings.items()},
            "params": count_block_params(spec, index),
            "macs": count_block_macs(spec, index, tokens),
        }
        for index, block in enumerate(blocks)
    ]


def _describe(model: str) -> tuple[Spec, dict[str, Any], str]:
    """The spec that `model` names, its task, and where its weights are."""
    from ..families import named_specs, parse_spec
    from ..weights import resolve
    from ..weights.folder import read_config, spec_of

    path = Path(model)
    if path.is_dir():
        config = read_config(path)
        channels, height, width = config["pretrained_cfg"].get("input_size", (3, 224, 224))
        task = {"img_size": (height, width), "num_classes": config.get("num_classes", 1000), "in_chans": channels}
        task["class_token"] = bool(config["model_args"].get("class_token", True))
        return spec_of(config), task, f"in {model}"
    if path.suffix == ".json" or path.is_file():
        return parse_spec(path), {"img_size": (224, 224), "num_classes": 1000, "in_chans": 3}, "none, a bare spec"
    architecture = model.partition(".")[0]
    if architecture in named_specs() and not resolve.is_registered(architecture):
        facts = _outside_facts(model)
        channels, height, width = facts["input_size"]
        task = {"img_size": (height, width), "num_classes": facts["num_classes"], "in_chans": channels}
        return named_specs()[architecture], task, f"{model}, {facts['where']}"
    entry = resolve.get_entry(model)
    channels, height, width = entry.input_size
    task = {"img_size": (height, width), "num_classes": entry.num_classes, "in_chans": channels}
    place = resolve.where(entry)
    weights = place if place != "none" else f"none on this machine; {entry.note or ''}".rstrip("; ")
    weights += ", unverified: the hash of the file was not compared" if resolve.is_unverified(entry) else ""
    return named_specs()[entry.architecture], task, f"{entry.name}, {weights}"


# ---- glit convert ----


def add_convert(commands: Commands) -> None:
    parser = add_command(
        commands, "convert", _run_convert, "Convert a checkpoint, of the authors' code or ours, to safetensors."
    )
    parser.add_argument("checkpoint", help="torch pickle (.pth, .pth.tar) or safetensors file")
    parser.add_argument("--model", required=True, help="MODEL or MODEL.TAG of the checkpoint")
    parser.add_argument("--install", action="store_true", help="install weights for pretrained=True on this machine")
    parser.add_argument("--out", metavar="DIR", help="write a weight folder")
    parser.add_argument("--spec", metavar="FILE", help="JSON file of its spec (default: the model's)")
    parser.add_argument("--num-classes", type=int, metavar="N", help="number of its classes (default: the model's)")
    parser.add_argument("--img-size", type=int, metavar="PIXELS", help="its image size (default: the model's)")
    parser.add_argument("--sha256", metavar="HEX", help="published hash of the file; any other file is rejected")


def _run_convert(args: argparse.Namespace) -> int:
    from ..weights.publish import convert

    folders = convert(
        args.checkpoint,
        args.model,
        out=args.out,
        install=args.install,
        spec=args.spec,
        num_classes=args.num_classes,
        img_size=args.img_size,
        sha256=args.sha256,
    )
    for folder in folders:
        echo(f"wrote {folder}")
    if args.install:
        name = args.model if "." in args.model else f"{args.model}.in1k"
        echo(f'timm.create_model("{name}", pretrained=True) now works on this machine, after import glit_models')
        if args.sha256 is None:
            echo("unverified: nothing says that this is the published file; --sha256 compares it with a published hash")
    return 0


# ---- glit publish ----


def add_publish(commands: Commands) -> None:
    parser = add_command(
        commands,
        "publish",
        _run_publish,
        "Publish weights with a model card, to the Hub or to a folder.",
        {"folder": "to_folder"},
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("source", nargs="?", help="MODEL.TAG, a weight folder, or a Hub repository NAMESPACE/NAME")
    source.add_argument("--all", action="store_true", help="all shipped weights, each under its own name")
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--repo", metavar="NAMESPACE/NAME", help="upload to this Hub repository; created if missing")
    target.add_argument("--namespace", metavar="NAME", help="with --all: user or organisation to upload to")
    target.add_argument("--to-folder", metavar="DIR", help="write to a folder instead; with --all, a folder for each")
    target.add_argument("--to-package", action="store_true", help="write into the package, in a checkout")
    parser.add_argument("--space", action="store_true", help="publish as a Space: a gradio page to try the model on")
    parser.add_argument("--name", metavar="MODEL.TAG", help="name of the weights in the registry")
    for fact, text in (
        ("dataset", "training data of the weights"),
        ("license", "licence of the weights, as an SPDX identifier"),
        ("recipe", "command that trained the weights"),
        ("origin", "source of the weights, if they were not trained with a command"),
    ):
        parser.add_argument(f"--{fact}", help=text)
    parser.add_argument(
        "--metric",
        nargs=3,
        action="append",
        metavar=("NAME", "VALUE", "SOURCE"),
        help="a score, its value, and the command that prints it",
    )


def _run_publish(args: argparse.Namespace) -> int:
    from ..weights.publish import publish, publish_all, ship

    facts = {key: getattr(args, key) for key in ("name", "dataset", "license", "recipe", "origin")}
    facts["metrics"] = [_metric(*metric) for metric in args.metric or ()]
    if args.all:
        _check_all(args, facts)
        for published in publish_all(namespace=args.namespace, folder=args.to_folder):
            _report_published(published)
        return 0
    if args.namespace:
        raise GlitError("--namespace goes with --all; for one set of weights give --repo NAMESPACE/NAME")
    if args.to_package:
        if args.space:
            raise GlitError("--space takes --repo or --to-folder")
        if not args.name:
            raise GlitError("--to-package needs --name MODEL.TAG")
        entry = ship(args.source, args.name, facts=facts)
        echo("added to the registry of this package:")
        print_json({entry.name: entry.to_dict()})
        return 0
    published = publish(args.source, repo=args.repo, folder=args.to_folder, facts=facts, space=args.space)
    _report_published(published, args.space)
    return 0


def _check_all(args: argparse.Namespace, facts: dict[str, Any]) -> None:
    if args.space:
        raise GlitError("--space cannot be given with --all; publish one Space at a time")
    if not (args.namespace or args.to_folder):
        raise GlitError("--all publishes several sets of weights; give --namespace NAME or --to-folder DIR")
    if given := [key for key, value in facts.items() if value]:
        option = given[0].removesuffix("s") if given[0] == "metrics" else given[0]
        raise GlitError(f"--{option} cannot be given with --all, which takes what the registry says of each")


def _report_published(published: Published, space: bool = False) -> None:
    where = f"{published.place}@{published.revision}" if published.revision else published.place
    echo(f"published {where}, sha256 {published.sha256}")
    if space:
        echo("the Hub shows it" if published.revision else f"run `python app.py` in {where}, with gradio installed")
        return
    source = "hf-hub" if published.revision else "local-dir"
    echo(f"loads with timm.create_model('{source}:{where}', pretrained=True)")
    if published.revision and published.entry:
        echo("the registry entry, for glit_models/weights/registry.json:")
        print_json({published.entry.name: published.entry.to_dict()})


def _metric(name: str, value: str, source: str) -> dict[str, Any]:
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise GlitError(f"--metric {name!r}: VALUE must be a number, got {value!r}")
    return {"name": name, "value": number, "source": source}


# ---- glit verify ----


def add_verify(commands: Commands) -> None:
    parser = add_command(
        commands, "verify", _run_verify, "Recompute hash, parameter count and golden logits; exit 1 if one differs."
    )
    parser.add_argument("source", help="MODEL.TAG, a weight folder, or a Hub repository NAMESPACE/NAME[@REVISION]")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _run_verify(args: argparse.Namespace) -> int:
    from dataclasses import asdict

    from ..weights.verify import verify

    checks = verify(args.source)
    if args.json:
        print_json([asdict(check) for check in checks])
    else:
        verdict = {True: "agrees", False: "DIFFERS", None: "-"}
        columns = [(name, "left") for name in ("check", "expected", "found", "")]
        print_table(args.source, columns, [(c.name, c.expected, c.found, verdict[c.agrees]) for c in checks])
    return 1 if any(check.agrees is False for check in checks) else 0
