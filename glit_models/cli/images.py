"""Commands that classify images and explain predictions: predict, explain, demo."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..errors import GlitError
from .common import Commands, add_command, add_device, echo, model_identity, print_json, print_table

__all__ = ["add_demo", "add_explain", "add_predict"]


# ---- glit predict ----


def add_predict(commands: Commands) -> None:
    parser = add_command(commands, "predict", _run_predict, "Classify image files, and all images in folders.")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="an image, or a folder of images")
    parser.add_argument("--model", help="MODEL.TAG, a weight folder or a repository (default: glit_tiny.fashion_mnist)")
    parser.add_argument("--onnx", metavar="FILE", help="use a file written by `glit export` instead of a model")
    parser.add_argument(
        "--topk", type=int, metavar="K",
        help="number of classes to show (default: 5; for a multilabel model, those of at least 50 %%)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="write a table: .csv, .jsonl or .parquet; run again to resume"
    )
    add_device(parser)


def _run_predict(args: argparse.Namespace) -> int:
    from ..data.image_files import find_images
    from ..prediction_table import check_table, prediction_dict

    if args.topk is not None and args.topk < 1:
        raise GlitError(f"--topk must be at least 1, got {args.topk}")
    if args.out is not None and args.json:
        raise GlitError("--out and --json exclude each other; --out FILE.jsonl writes JSON")
    if args.out is not None:
        check_table(args.out)
    paths = find_images(args.images)
    title, classifier = _onnx_classifier(args) if args.onnx else _torch_classifier(args)
    if args.topk is None and not getattr(classifier, "is_multilabel", False):
        args.topk = 5
    if args.out is not None:
        return _write_predictions(args, paths, classifier)
    predictions = list(classifier.predict(paths, args.topk))
    if args.json:
        print_json([prediction_dict(prediction) for prediction in predictions])
    else:
        rows = [
            (str(prediction.path) if rank == 0 else "", name, "" if probability is None else f"{probability:.1%}")
            for prediction in predictions
            for rank, (name, probability) in enumerate(prediction.classes or [("none of the classes", None)])
            if prediction.error is None
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

    about = {**model_identity(args.onnx or args.model or "glit_tiny.fashion_mnist"), "topk": args.topk}
    total, failed = write_table(args.out, paths, lambda left: classifier.predict(left, args.topk), about)
    echo(f"{args.out}: {total:,} images, {failed:,} of which could not be read; column error says why")
    return 2 if failed == total else 1 if failed else 0


# ---- glit explain ----


def add_explain(commands: Commands) -> None:
    parser = add_command(
        commands, "explain", _run_explain, "Draw what a model looks at, and how its blocks mix tokens."
    )
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="an image, or a folder of images")
    parser.add_argument(
        "--model", default="glit_tiny.fashion_mnist", help="as for `glit predict` (default: glit_tiny.fashion_mnist)"
    )
    parser.add_argument(
        "--method", default="attention", metavar="METHOD",
        help="attention (default), gradcam (any timm model; needs grad-cam) or locality",
    )  # fmt: skip
    parser.add_argument("--block", type=int, metavar="N", help="show only this block, numbered from 0")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.png", help="image file to write")
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
    parser = add_command(
        commands, "demo", _run_demo, "Classify the example images of the package and draw them, or serve a page."
    )
    parser.add_argument("--out", default="glit-demo.png", metavar="FILE", help="contact sheet (default: glit-demo.png)")
    parser.add_argument("--serve", action="store_true", help="serve a page to drop images on, until Ctrl-C (gradio)")
    parser.add_argument("--model", help="with --serve: as for `glit predict` (default: glit_tiny.fashion_mnist)")
    parser.add_argument("--host", help="with --serve: address (default: this machine only)")
    parser.add_argument("--port", type=int, metavar="N", help="with --serve: port (default: first free from 7860)")
    add_device(parser)


def _run_demo(args: argparse.Namespace) -> int:
    if args.serve:
        from ..demo import serve_demo

        return serve_demo(args.model or "glit_tiny.fashion_mnist", args.host or "127.0.0.1", args.port, args.device)
    for name in ("model", "host", "port", "device"):
        if getattr(args, name) is not None:
            raise GlitError(f"--{name} needs --serve; without it, the example images are classified")
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
    echo(f"{sum(row[-1] == 'yes' for row in rows)} of {len(rows)} right. Contact sheet: {args.out}")
    return 0
