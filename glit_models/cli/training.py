"""Training commands: train, finetune, fractals."""

from __future__ import annotations

import argparse
import os
import shlex
from pathlib import Path

from ..errors import Argument, GlitError
from .common import Commands, add_command, add_run_options, echo, print_json, spelled

__all__ = ["add_finetune", "add_fractals", "add_train"]


# ---- glit train ----


def add_train(commands: Commands) -> None:
    parser = add_command(
        commands, "train", _run_train, "Train a model; run the same command again to resume.",
        {"num_workers": "data.num_workers"},
    )  # fmt: skip
    parser.add_argument("recipe", help="name of a shipped recipe, or the path of a YAML file")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the run")
    _add_track(parser)
    add_run_options(parser, "override, such as optim.lr=1e-4")


def _run_train(args: argparse.Namespace) -> int:
    from ..predict import pick_device
    from ..training import Trainer, load_recipe

    device = pick_device(args.device)
    command = shlex.join(["glit", "train", args.recipe, *(word for text in args.set for word in ("--set", text))])
    recipe = load_recipe(args.recipe, args.set)
    trainer = Trainer(recipe, args.out, device, args.max_minutes, command, track=args.track, fits_threads=True)
    result = trainer.run()
    if result is not None and trainer.rank == 0:
        print_json(result)
        echo(f"the model is in {Path(args.out) / 'model'}: try `glit predict IMAGE --model {Path(args.out) / 'model'}`")
    return trainer.stop.exit_status if result is None else 0


def _add_track(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--track", metavar="NAMES", default=(), type=lambda text: text.split(","),
        help="also send metrics to these trackers of accelerate, separated by commas: wandb, mlflow, ...",
    )  # fmt: skip


# ---- glit finetune ----


def add_finetune(commands: Commands) -> None:
    parser = add_command(
        commands,
        "finetune",
        _run_finetune,
        "Fine-tune a model on a folder or a table of images; run again to resume.",
        {
            "data.root": "folder",
            "model.name": "model",
            "optim.epochs": "epochs",
            "model.img_size": "img_size",
            "optim.batch_size": "batch_size",
            "class_weights": "class_weights",
            "data.balanced": "balanced",
            "patience": "patience",
            "num_workers": "data.num_workers",
        },
    )
    parser.add_argument(
        "folder", metavar="DIR",
        help="a folder of CLASS/*, or train/CLASS/*, val/CLASS/*, test/CLASS/*; or a table of images, FILE.csv",
    )  # fmt: skip
    parser.add_argument("--root", metavar="IMAGES", help="folder of a table's images (default: the table's folder)")
    parser.add_argument("--model", help="MODEL.TAG, a weight folder or a Hub repository to start from")
    parser.add_argument("--out", metavar="RUN", type=Path, help="folder of the run (default: runs/ and DIR's name)")
    for name, text in (("epochs", "epochs to run"), ("img-size", "image size in pixels"), ("batch-size", "batch size")):
        parser.add_argument(f"--{name}", type=int, metavar="N", help=text)
    parser.add_argument("--patience", type=int, metavar="N", help="stop after N epochs without a better score")
    parser.add_argument("--class-weights", metavar="FILE", help="balanced, or a YAML file of CLASS: WEIGHT")
    parser.add_argument("--balanced", action="store_const", const=True, help="draw every class equally often")
    _add_track(parser)
    add_run_options(parser, "any key of a recipe, such as optim.lr=1e-4")


def _run_finetune(args: argparse.Namespace) -> int:
    from ..data.label_table import is_label_table
    from ..predict import pick_device
    from ..recipes import parse_overrides
    from ..runs.signals import StopRequest
    from ..training import Trainer
    from ..training.finetuning import check_images, describe_score, next_commands, plan

    device = pick_device(args.device)
    StopRequest(args.max_minutes)  # raises if the limit is impossible, before the choices are printed
    given = parse_overrides(args.set)
    for key, dest in args.options.items():
        value = getattr(args, dest, None)
        if key in given and value is not None and dest != "folder":
            raise GlitError(Argument(key), f" and --set {key} say the same; give one of them")
        if value is not None and dest not in ("folder", "model"):
            given[key] = value
    plan_ = plan(args.folder, args.model, device, given, args.root)
    place = Path(args.folder).resolve()
    out = args.out or Path("runs") / (place.stem if is_label_table(args.folder) else place.name)
    first = os.environ.get("RANK", "0") == "0"
    if first:
        for choice in plan_.lines:
            echo(spelled(choice, args))
        echo(f"run: {out}; the same command resumes it")
        if not (out / "recipe.yaml").exists():
            check_images(plan_.splits, out / "broken-images.txt")
    words = [("--root", args.root), ("--model", args.model), ("--epochs", args.epochs), ("--img-size", args.img_size)]
    words += [("--batch-size", args.batch_size), ("--class-weights", args.class_weights)]
    words += [("--patience", args.patience)]
    words += [*(("--set", text) for text in args.set)]
    asked = [str(word) for pair in words if pair[1] is not None for word in pair]
    asked += ["--balanced"] if args.balanced else []
    command = shlex.join(["glit", "finetune", args.folder, *asked])
    trainer = Trainer(plan_.recipe, out, device, args.max_minutes, command, track=args.track, fits_threads=True)
    result = trainer.run()
    if result is not None and first:
        commands = [f"    {line}" for line in next_commands(args.folder, out, plan_.splits, args.root)]
        for line in (*describe_score(result, plan_.splits, plan_.recipe.keep), "next:", *commands):
            echo(line)
    return trainer.stop.exit_status if result is None else 0


# ---- glit fractals ----


def add_fractals(commands: Commands) -> None:
    parser = add_command(
        commands, "fractals", _run_fractals, "Draw a sheet of the fractals that are used for pretraining without data."
    )
    parser.add_argument("--out", default="glit-fractals.png", metavar="FILE", help="sheet (default: glit-fractals.png)")
    parser.add_argument("--classes", type=int, default=12, metavar="N", help="classes, one row each (default: 12)")
    parser.add_argument("--instances", type=int, default=8, metavar="N", help="images per class (default: 8)")
    parser.add_argument("--size", type=int, default=112, metavar="PIXELS", help="side of an image (default: 112)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the classes and their instances (default: 0)")
    parser.add_argument("--max-maps", type=int, metavar="N", help="maximum number of maps of a class")
    parser.add_argument(
        "--perturbation", type=float, metavar="SHARE", help="random relative change of a class's maps in each instance"
    )
    parser.add_argument("--single", action="store_true", default=None, help="make all classes variants of one fractal")
    parser.add_argument("--delta", type=float, metavar="D", help="with --single: maximum change of that fractal")
    parser.add_argument("--color", choices=("gray", "color"), help="one level of gray, or four colours")
    parser.add_argument("--render", choices=("point", "patch"), help="points, or a 3 x 3 pattern at each of them")
    parser.add_argument("--density", type=float, metavar="POINTS", help="points per pixel")


def _run_fractals(args: argparse.Namespace) -> int:
    from ..data.fractals import FractalConfig, Fractals
    from ..data.fractals.sheet import draw_sheet

    for name, value in (("classes", args.classes), ("instances", args.instances)):
        if value < 1:
            raise GlitError(f"--{name} must be at least 1, got {value}")
    keys = ("max_maps", "perturbation", "single", "delta", "color", "render", "density")
    chosen = {key: getattr(args, key) for key in keys if getattr(args, key) is not None}
    fractals = Fractals(FractalConfig(num_classes=args.classes, **chosen), args.seed)
    draw_sheet(fractals, args.instances, args.size, Path(args.out))
    echo(f"{args.classes} classes, {args.instances} instances of each, {args.size} pixels a side: {args.out}")
    return 0
