"""Commands that classify images and explain what comes out: predict, explain, demo, eval."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import GlitError
from .common import Commands, add_command, add_device, echo, print_json, print_table

if TYPE_CHECKING:
    from ..evaluate import Evaluation

__all__ = ["add_demo", "add_eval", "add_explain", "add_predict"]


# ---- glit predict ----


def add_predict(commands: Commands) -> None:
    parser = add_command(commands, "predict", _run_predict, "Classify images: files, and folders with all they hold.")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="an image, or a folder of them")
    parser.add_argument("--model", help="MODEL.TAG, a weight folder or a repository (glit_tiny.fashion_mnist)")
    parser.add_argument("--onnx", metavar="FILE", help="a file that `glit export` wrote, instead of a model")
    parser.add_argument("--topk", type=int, default=5, metavar="K", help="how many classes to show (default 5)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="write a table: .csv, .jsonl or .parquet; the same command goes on"
    )
    add_device(parser)


def _run_predict(args: argparse.Namespace) -> int:
    from ..data.image_files import find_images
    from ..prediction_table import check_table, prediction_dict

    if args.topk < 1:
        raise GlitError(f"--topk must be at least 1, got {args.topk}")
    if args.out is not None and args.json:
        raise GlitError("--out and --json exclude each other; --out FILE.jsonl writes JSON")
    if args.out is not None:
        check_table(args.out)
    paths = find_images(args.images)
    title, classifier = _onnx_classifier(args) if args.onnx else _torch_classifier(args)
    if args.out is not None:
        return _write_predictions(args, paths, classifier)
    predictions = list(classifier.predict(paths, args.topk))
    if args.json:
        print_json([prediction_dict(prediction) for prediction in predictions])
    else:
        rows = [
            (str(prediction.path) if rank == 0 else "", name, f"{probability:.1%}")
            for prediction in predictions
            for rank, (name, probability) in enumerate(prediction.classes)
        ]
        if rows:
            print_table(title, [("image", "left"), ("class", "left"), ("probability", "right")], rows)
    failed = [prediction for prediction in predictions if prediction.error is not None]
    for prediction in failed:
        echo(f"glit: {prediction.error}", error=True)
    if len(failed) == len(predictions):
        return 2
    return 1 if failed else 0


def _torch_classifier(args: argparse.Namespace) -> tuple[str, Any]:
    from ..predict import Classifier, load_model, pick_device

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


def _write_predictions(args: argparse.Namespace, paths: list[Path], classifier: Any) -> int:
    from ..prediction_table import write_table
    from ..weights.files import WEIGHTS_FILE, sha256_of

    name = args.onnx or args.model or "glit_tiny.fashion_mnist"
    file = Path(name) / WEIGHTS_FILE if Path(name).is_dir() else Path(name)
    about = {"model": name, "sha256": sha256_of(file) if file.is_file() else None, "topk": args.topk}
    total, failed = write_table(args.out, paths, lambda left: classifier.predict(left, args.topk), about)
    print(f"{args.out}: {total:,} images, {failed:,} of which could not be read; column error says why")
    return 2 if failed == total else 1 if failed else 0


# ---- glit explain ----


def add_explain(commands: Commands) -> None:
    parser = add_command(
        commands, "explain", _run_explain, "Draw what a model looks at, and how its blocks mix tokens."
    )
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="an image, or a folder of them")
    parser.add_argument(
        "--model", default="glit_tiny.fashion_mnist", help="as `glit predict` takes it (glit_tiny.fashion_mnist)"
    )
    parser.add_argument(
        "--method", default="attention", metavar="METHOD",
        help="attention (default), gradcam (any model of timm's; needs grad-cam) or locality",
    )  # fmt: skip
    parser.add_argument("--block", type=int, metavar="N", help="this block alone, by its number from 0")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.png", help="the sheet")
    add_device(parser)


def _run_explain(args: argparse.Namespace) -> int:
    from ..data.image_files import find_images
    from ..explanation_sheet import check_method, draw_explanations
    from ..predict import Classifier, load_model, pick_device
    from ..runs.figures import check_can_draw

    check_can_draw(args.out, "a sheet")
    paths = find_images(args.images)
    device = pick_device(args.device)
    model = load_model(args.model)
    check_method(model, args.method, args.block)
    failed = draw_explanations(Classifier(model, device), paths, args.out, args.method, args.block)
    for line in failed:
        echo(f"glit: {line}", error=True)
    if len(failed) == len(paths):
        return 2
    count = len(paths) - len(failed)
    echo(f"{args.out}: {args.method} of {args.model} on {count} image{'' if count == 1 else 's'}")
    return 1 if failed else 0


# ---- glit demo ----


def add_demo(commands: Commands) -> None:
    parser = add_command(commands, "demo", _run_demo, "Classify the images that come with the package, and draw them.")
    parser.add_argument("--out", default="glit-demo.png", metavar="FILE", help="the contact sheet (glit-demo.png)")


def _run_demo(args: argparse.Namespace) -> int:
    from ..predict import DEMO_MODEL, run_demo

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
    columns = [("image", "left"), ("first three", "left"), ("true label", "left"), ("right", "left")]
    print_table(f"{DEMO_MODEL} on images of the Fashion-MNIST test set", columns, rows)
    print(f"{sum(row[-1] == 'yes' for row in rows)} of {len(rows)} right. Contact sheet: {args.out}")
    return 0


# ---- glit eval ----


_MOST_CLASSES = 20  # rows of a table that people read


def add_eval(commands: Commands) -> None:
    parser = add_command(
        commands,
        "eval",
        _run_eval,
        "Score a model on a labelled data set: top-1, top-5, each class, speed.",
        {"num_workers": "workers"},
    )
    parser.add_argument("model", help="MODEL or MODEL.TAG of timm, a weight folder or a repository")
    parser.add_argument(
        "data", help="a folder of CLASS/* or val/CLASS/*, fashion-mnist, or timm's torch/NAME, hfds/NAME"
    )
    parser.add_argument("--root", metavar="DIR", help="the folder of a data set that is given by name")
    parser.add_argument("--split", metavar="NAME", help="test unless given; of a folder without one, validation")
    parser.add_argument("--download", action="store_true", help="fetch the data set if it is not there")
    parser.add_argument("--input-key", metavar="COLUMN", help="the images' column in a table, if timm cannot tell")
    parser.add_argument("--target-key", metavar="COLUMN", help="the labels' column")
    parser.add_argument("--batch-size", type=int, default=250, metavar="N", help="images at a time (default 250)")
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="processes that load images (default 0)")
    add_device(parser)
    parser.add_argument("--confusion", type=Path, metavar="FILE.png", help="draw the confusion matrix")
    parser.add_argument("--json", action="store_true", help="print JSON, with every class and the confusion matrix")


def _run_eval(args: argparse.Namespace) -> int:
    from ..data.labelled import open_labelled
    from ..evaluate import draw_confusion, evaluate
    from ..predict import Classifier, load_model, pick_device
    from ..runs.figures import check_can_draw
    from ..weights.folder import to_json

    if args.batch_size < 1:
        raise GlitError(f"--batch-size must be at least 1, got {args.batch_size}")
    if args.workers < 0:
        raise GlitError(f"--workers must be 0 or more, got {args.workers}")
    if args.confusion is not None:
        check_can_draw(args.confusion, "the confusion matrix")
    device = pick_device(args.device)
    keys = {"download": args.download, "input_key": args.input_key, "target_key": args.target_key}
    data = open_labelled(args.data, args.root, args.split, **keys)  # before the model, which may need fetching
    classifier = Classifier(load_model(args.model), device)
    result = evaluate(classifier, data, args.batch_size, args.workers)
    if classifier.has_names and result.matched_by == "position":
        pairs = [f"{theirs} is {own}" for theirs, own in zip(data.class_names, classifier.class_names, strict=True)]
        text = f"the data's class names are not the model's; by their order {', '.join(pairs[:3])}, ..."
        echo(f"glit: {text}", error=True)
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


def _print_evaluation(title: str, result: Evaluation, device: str) -> None:
    top5 = "" if result.top5 is None else f", top-5 {result.top5:.2f} % ({result.correct_top5})"
    print(f"{title}: top-1 {result.top1:.2f} % ({result.correct} of {result.images}){top5}")
    balanced, f1 = result.balanced_accuracy, result.macro_f1
    print(f"balanced accuracy {balanced:.2f} %, macro-F1 {f1:.2f} %: each class counts the same")
    rows = [(index, row) for index, row in enumerate(result.classes) if row.images or row.predicted]
    shown = rows
    if len(rows) > _MOST_CLASSES:
        shown = sorted(rows, key=lambda pair: 101.0 if pair[1].recall is None else pair[1].recall)[:_MOST_CLASSES]
    columns = [("class", "left"), *((name, "right") for name in ("images", "correct", "recall", "precision"))]
    table = [
        (
            row.name,
            f"{row.images}",
            f"{row.correct}",
            _percent(row.recall),
            _percent(row.precision),
            "{} ({})".format(*mistaken) if (mistaken := result.mistaken_for(index)) else "",
        )
        for index, row in shown
    ]
    print_table(None, [*columns, ("most often taken for", "left")], table)
    if len(shown) < len(rows):
        print(f"These are the {len(shown)} classes of lowest recall; --json has all {len(rows)}.")
    if empty := sum(not row.images for row in result.classes):
        print(f"{empty} of the model's {len(result.classes)} classes have no images here.")
    print(
        f"{result.images_per_second:.0f} images/s by the model alone, "
        f"{result.images_per_second_with_loading:.0f} with loading, on {device}"
    )


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} %"
