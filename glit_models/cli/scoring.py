"""Commands that run a model on a data set: eval, embed."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DataError, GlitError
from .common import Commands, add_command, add_device, echo, model_identity, print_json_text, print_table

if TYPE_CHECKING:
    from ..data.labelled import LabelledSplit
    from ..evaluate import Evaluation
    from ..evaluate.report import Training
    from ..predict import Classifier

__all__ = ["add_embed", "add_eval"]


def _add_data_options(parser: argparse.ArgumentParser, split_help: str, batch_size: int) -> None:
    """Add the options that select the images and set how they are loaded."""
    parser.add_argument("--root", metavar="DIR", help="folder of a data set given by name, or of a table's images")
    parser.add_argument("--split", metavar="NAME", help=split_help)
    parser.add_argument("--download", action="store_true", help="download the data set if it is missing")
    parser.add_argument("--input-key", metavar="COLUMN", help="image column of a table (default: detected by timm)")
    parser.add_argument("--target-key", metavar="COLUMN", help="label column of a table")
    parser.add_argument(
        "--batch-size", type=int, default=batch_size, metavar="N", help=f"batch size (default: {batch_size})"
    )
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="processes that load images (default: 0)")
    add_device(parser)


def _check_loading(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `open_labelled` that only some data sets have. Raises GlitError on an invalid number."""
    if args.batch_size < 1:
        raise GlitError(f"--batch-size must be at least 1, got {args.batch_size}")
    if args.workers < 0:
        raise GlitError(f"--workers must be 0 or more, got {args.workers}")
    return {"download": args.download, "input_key": args.input_key, "target_key": args.target_key}


# ---- glit embed ----


def add_embed(commands: Commands) -> None:
    parser = add_command(
        commands, "embed", _run_embed, "Write image features to a file, one row per image; run again to resume.",
        {"num_workers": "workers"},
    )  # fmt: skip
    parser.add_argument("data", help="a folder of images, with or without classes, or a data set as for `glit eval`")
    parser.add_argument("--model", required=True, help="timm's MODEL or MODEL.TAG, a weight folder or a Hub repository")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FILE",
        help="file to write: .npy (with a .csv that lists the images), .csv or .parquet",
    )  # fmt: skip
    _add_data_options(parser, "split to use (default: all images of a folder; test for a data set given by name)", 32)


def _run_embed(args: argparse.Namespace) -> int:
    from ..embed import check_embedding, open_images, write_embedding
    from ..predict import Classifier, load_model, pick_device

    keys = _check_loading(args)
    check_embedding(args.out)
    device = pick_device(args.device)
    data = open_images(args.data, args.root, args.split, **keys)
    classifier = Classifier(load_model(args.model), device)
    about = model_identity(args.model)
    total, failed = write_embedding(args.out, classifier, data, about, args.batch_size, args.workers)
    rows = args.out.with_suffix(".csv") if args.out.suffix == ".npy" else args.out
    echo(f"{args.out}: {total:,} images, {failed:,} of which could not be read; column error of {rows} says why")
    return 2 if failed == total else 1 if failed else 0


# ---- glit eval ----


_MOST_CLASSES = 20  # maximum rows of the printed table


def add_eval(commands: Commands) -> None:
    parser = add_command(
        commands,
        "eval",
        _run_eval,
        "Score a model on a labelled data set: top-1, top-5, per-class scores, speed.",
        {"num_workers": "workers"},
    )
    parser.add_argument("model", help="timm's MODEL or MODEL.TAG, a weight folder or a Hub repository")
    parser.add_argument(
        "data",
        help="a folder of CLASS/* or val/CLASS/*, FILE.csv, fashion-mnist, or timm's torch/NAME, hfds/NAME",
    )
    _add_data_options(parser, "split to use (default: test; validation for a folder without one)", 250)
    parser.add_argument(
        "--knn", type=int, nargs="?", const=20, metavar="K",
        help="score frozen features with the K nearest training images (default: 20) instead of the model's head",
    )  # fmt: skip
    parser.add_argument("--linear", action="store_true", help="score frozen features with a linear classifier")
    parser.add_argument("--confusion", type=Path, metavar="FILE.png", help="draw the confusion matrix")
    parser.add_argument(
        "--report", type=Path, metavar="DIR",
        help="write an HTML report: mistakes, calibration, near-duplicates, possibly wrong labels",
    )  # fmt: skip
    parser.add_argument("--no-compare", action="store_true", help="--report: leave out the training images")
    parser.add_argument("--json", action="store_true", help="print JSON, with every class and the confusion matrix")


def _run_eval(args: argparse.Namespace) -> int:
    from ..data.labelled import open_labelled
    from ..embed import check_features
    from ..evaluate import evaluate
    from ..evaluate.report import Observed, check_report, write_report
    from ..predict import Classifier, load_model, pick_device
    from ..runs.figures import check_can_draw

    keys = _check_loading(args)
    if args.confusion is not None:
        check_can_draw(args.confusion, "the confusion matrix")
    device = pick_device(args.device)
    data = open_labelled(args.data, args.root, args.split, **keys)  # before the model, which may be downloaded
    head = {"model": args.model, "dataset": data.name, "split": data.split, "device": str(device)}
    if data.is_multilabel:
        return _run_multilabel(args, data, head)
    if args.no_compare and args.report is None:
        raise GlitError("--no-compare needs --report DIR")
    if args.knn is not None or args.linear:
        return _run_probes(args, data, keys, head)
    observed = Observed()
    if args.report is not None:
        check_report(args.report, data)
    classifier = Classifier(load_model(args.model), device)
    if classifier.is_multilabel:
        raise GlitError(f"{args.model} is a multilabel model, and {data} has one class per image")
    if args.report is not None:
        check_features(classifier.model)
    observe = None if args.report is None else observed.add
    result = evaluate(classifier, data, args.batch_size, args.workers, observe=observe)
    if classifier.has_names and result.matched_by == "position":
        pairs = [f"{theirs} is {own}" for theirs, own in zip(data.class_names, classifier.class_names, strict=True)]
        text = f"the data's class names are not the model's; by their order {', '.join(pairs[:3])}, ..."
        echo(f"glit: {text}", error=True)
    title = f"{args.model} on {data}"
    if args.json:
        _print_result(head | result.to_dict())
    else:
        _print_evaluation(title, result)
        print(
            f"{result.images_per_second:.0f} images/s by the model alone, "
            f"{result.images_per_second_with_loading:.0f} with loading, on {device}"
        )
    _draw(args, result, title)
    if args.report is not None:
        training = _embed_training(args, classifier, data, keys)
        page = write_report(args.report, title, result, observed, data, training)
        if not args.json:
            echo(f"Report: {page}")
    return 0


def _run_multilabel(args: argparse.Namespace, data: LabelledSplit, head: dict[str, Any]) -> int:
    """Score a model on images with several labels."""
    from ..evaluate.multilabel import evaluate_multilabel
    from ..predict import Classifier, load_model, pick_device

    for name in ("knn", "linear", "report", "confusion"):
        if getattr(args, name):
            raise GlitError(f"--{name} needs one class per image, and {data} has several")
    classifier = Classifier(load_model(args.model), pick_device(args.device))
    result = evaluate_multilabel(classifier, data, args.batch_size, args.workers)
    if args.json:
        _print_result(head | result.to_dict())
        return 0
    echo(f"{args.model} on {data}: mAP {result.mean_average_precision:.2f} %, {result.images:,} images")
    print(
        f"at a probability of one half: macro-F1 {result.macro_f1:.2f} %, micro-F1 {result.micro_f1:.2f} %, all "
        f"classes right of {result.exact:,} images"
    )
    rows = list(zip(result.classes, result.average_precisions, strict=True))
    shown = sorted(rows, key=lambda row: 101.0 if row[1] is None else row[1])[:_MOST_CLASSES]
    columns = [("class", "left"), *((name, "right") for name in ("images", "AP", "recall", "precision"))]
    print_table(
        None, columns,
        [(row.name, f"{row.images}", _percent(ap), _percent(row.recall), _percent(row.precision)) for row, ap in shown],
    )  # fmt: skip
    if len(shown) < len(rows):
        print(f"These are the {len(shown)} classes of lowest AP; --json has all {len(rows)}.")
    return 0


def _embed_training(args: argparse.Namespace, classifier: Classifier, data: LabelledSplit, keys: Any) -> Training:
    """The training images that a report compares with, or None."""
    from ..data.labelled import open_training
    from ..evaluate.report import Training, embed_training

    if args.no_compare:
        return Training(note="No training images were compared with, as --no-compare was given.")
    try:
        train = open_training(data, args.root, **keys)
        return embed_training(classifier, train, args.batch_size, args.workers)
    except DataError as error:
        return Training(note=f"No training images were compared with: {error}.")


def _run_probes(args: argparse.Namespace, data: LabelledSplit, keys: dict[str, Any], head: dict[str, Any]) -> int:
    """Score frozen features with the requested probes."""
    from ..data.labelled import open_training
    from ..evaluate.probe import embed_splits, score_linear, score_neighbours
    from ..predict import Classifier, load_model, pick_device

    if args.knn is not None and args.knn < 1:
        raise GlitError(f"--knn must be at least 1, got {args.knn}")
    if args.confusion is not None and args.knn is not None and args.linear:
        raise GlitError("--confusion draws one matrix; give it --knn or --linear")
    if args.report is not None:
        raise GlitError("--report is of the model's own head; leave out --knn and --linear")
    train = open_training(data, args.root, **keys)
    classifier = Classifier(load_model(args.model), pick_device(args.device))
    features = embed_splits(classifier, train, data, args.batch_size, args.workers)
    num_train, width = features.train.shape
    results: dict[str, tuple[str, Evaluation, dict[str, Any]]] = {}
    if args.knn is not None:
        k = min(args.knn, num_train)
        result = score_neighbours(features, k)
        results["knn"] = f"{k} nearest of {num_train:,} training images", result, {"k": k}
    if args.linear:
        result, l2 = score_linear(features)
        results["linear"] = f"a linear classifier of {num_train:,} training images, l2 {l2:g}", result, {"l2": l2}
    if args.json:
        found = {name: facts | result.to_dict() for name, (_, result, facts) in results.items()}
        _print_result(head | {"train_images": num_train, "features": width} | found)
    for text, result, _ in results.values():
        title = f"{args.model}, frozen, {text}, on {data}"
        if not args.json:
            _print_evaluation(title, result)
        _draw(args, result, title)
    return 0


def _print_result(result: dict[str, Any]) -> None:
    from ..weights.folder import to_json

    print_json_text(to_json(result).rstrip("\n"))


def _draw(args: argparse.Namespace, result: Evaluation, title: str) -> None:
    """Draw the confusion matrix, if requested."""
    from ..evaluate.confusion_figure import draw_confusion

    if args.confusion is not None:
        draw_confusion(result, args.confusion, f"{title}: top-1 {result.top1:.2f} %")
        if not args.json:
            echo(f"Confusion matrix: {args.confusion}")


def _print_evaluation(title: str, result: Evaluation) -> None:
    top5 = "" if result.top5 is None else f", top-5 {result.top5:.2f} % ({result.correct_top5})"
    echo(f"{title}: top-1 {result.top1:.2f} % ({result.correct} of {result.images}){top5}")
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


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} %"
