"""Deployment commands: export, serve, bench."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from ..errors import Argument, GlitError, WeightsError, first_line
from ..reading import parse_yaml
from .common import Commands, add_command, echo, print_json, print_table

__all__ = ["add_bench", "add_export", "add_serve"]


# ---- glit export ----


# The options of export targets that are options of the command. Those without a default here were not given.
_OPTIONS = (
    "opset", "precision", "batch", "image_size", "preprocess", "calibration", "dynamic_int8", "verify", "images",
    "providers", "force", "name", "gpu", "max_batch_size", "instances", "engine_cache", "storage_uri", "input_name",
)  # fmt: skip
_FORMATS = {"aotinductor": "aoti"}  # names in version 0.1


def add_export(commands: Commands) -> None:
    parser = add_command(
        commands,
        "export",
        _run_export,
        "Export a model to ONNX, torch or a server, and compare outputs with PyTorch; exit with 1 if they differ.",
    )
    parser.add_argument(
        "model", nargs="?", help="MODEL.TAG, a weight folder, or a Hub repository NAMESPACE/NAME; any timm classifier"
    )
    parser.add_argument("--out", metavar="FILE", help="file or folder to write, such as model.onnx")
    parser.add_argument("--list", action="store_true", help="list the formats and the packages that each needs")
    parser.add_argument(
        "--format",
        metavar="NAME",
        help="onnx (default) or another of --list, or module:Name for a custom one",
    )
    parser.add_argument("--serving", choices=("triton", "kserve"), help="same as --format NAME")
    parser.add_argument("--name", help="triton: name of the model in the repository")
    parser.add_argument("--serve-on", dest="gpu", choices=("gpu", "cpu"), help="triton: device (gpu if there is one)")
    parser.add_argument(
        "--max-batch",
        dest="max_batch_size",
        type=int,
        metavar="N",
        help="triton: maximum batch size (default: 64)",
    )
    parser.add_argument("--instances", type=int, metavar="N", help="triton: number of model instances (default: 1)")
    parser.add_argument(
        "--engine-cache",
        metavar="DIR",
        help="triton: folder of the server's TensorRT engines (default: /engines; kserve: /tmp)",
    )
    parser.add_argument(
        "--storage-uri", metavar="URI", help="kserve: where the cluster reads the repository, s3://BUCKET/repository"
    )
    parser.add_argument("--opset", type=int, metavar="N", help="ONNX opset: 18, 20 or 23 (default: 20; 23 for bf16)")
    parser.add_argument("--input-name", metavar="NAME", help="graph input (default: images; huggingface: pixel_values)")
    parser.add_argument("--precision", metavar="P", help="fp32 (default), fp16, bf16 or int8")
    parser.add_argument("--batch", metavar="N", help="fixed batch size (default: any)")
    parser.add_argument("--image-size", metavar="H,W", help="height and width, or dynamic (default: the model's)")
    parser.add_argument(
        "--preprocess", action="store_true", help="accept uint8 images; resize, crop and normalise them in the graph"
    )
    parser.add_argument("--calibration", metavar="DATA", help="int8: representative images")
    parser.add_argument("--dynamic-int8", action="store_true", help="int8 scaled at run time, without calibration")
    parser.add_argument("--verify", type=int, metavar="N", help="images to compare on (default: 64; 0 for none)")
    parser.add_argument(
        "--data", dest="images", help="folder or data set to compare on, as for `glit eval` (default: generated images)"
    )
    parser.add_argument("--root", metavar="DIR", help="folder of a data set given by name")
    parser.add_argument(
        "--provider", dest="providers", help="provider to verify with: cpu, cuda or tensorrt (default: the fastest)"
    )
    parser.add_argument(
        "--random-weights", action="store_true", help="export MODEL untrained, for example to measure its speed"
    )
    parser.add_argument("--force", action="store_true", help="overwrite an existing file or folder")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="another option of a custom format"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def _run_export(args: argparse.Namespace) -> int:
    from glit_models.export import TARGETS, export_model

    from ..weights.loading import is_other_model

    if args.list:
        return _list_formats()
    if args.model is None or args.out is None:
        raise GlitError("glit export needs MODEL and --out FILE; --list shows the formats")
    if args.serving and args.format not in (None, args.serving):
        raise GlitError(f"--serving {args.serving} and --format {args.format} exclude each other")
    name = args.serving or _FORMATS.get(args.format, args.format) or "onnx"
    options = _export_options(args, TARGETS.find(name))
    try:
        artifact = export_model(
            _untrained(args.model) if args.random_weights else args.model, args.out, name, **options
        )
    except WeightsError as error:
        if args.random_weights or not is_other_model(args.model):
            raise
        raise WeightsError(*error.message.parts, "; --random-weights exports it untrained") from None
    if args.json:
        from dataclasses import asdict

        print_json({**asdict(artifact), "path": str(artifact.path)})
    else:
        _print_artifact(artifact)
    for problem in artifact.agreement.problems if artifact.agreement else ():
        echo(f"glit: {artifact.path} is not what PyTorch computes: {problem}", error=True)
    return 1 if artifact.agreement is not None and not artifact.agreement.holds else 0


def _untrained(name: str) -> Any:
    """A model with random weights, the same in every call; of a folder or repository, only the configuration."""
    import torch

    from ..weights.loading import create_model, timm_name

    name = timm_name(name)
    torch.manual_seed(0)
    try:
        return create_model(name).eval()
    except GlitError:
        raise
    except Exception as error:  # the model may come from any library
        raise GlitError(f"{name} cannot be created: {first_line(error)}") from None


def _list_formats() -> int:
    from glit_models.errors import pip_install
    from glit_models.export import TARGETS

    rows = []
    for name in TARGETS:
        target = TARGETS[name]
        what = (target.__doc__ or "").partition("\n")[0]
        missing = target.missing_packages()
        rows.append((name, what, f"no: {pip_install(target.extra)}" if missing else "yes"))
    print_table("Formats of glit export", [("format", "left"), ("what", "left"), ("can be made here", "left")], rows)
    return 0


def _export_options(args: argparse.Namespace, target: Any) -> dict[str, Any]:
    """The given options, including those of `--set`, as the target's options."""
    from glit_models.export import ImageSource

    known = target.option_names()
    given: dict[str, Any] = {}
    for name in _OPTIONS:
        value = getattr(args, name)
        if value is None or value is False:
            continue
        if name not in known:
            takes = [Argument(option) if option in _OPTIONS else f"--set {option}=" for option in known]
            listed = [part for option in takes for part in (", ", option)]
            raise GlitError(Argument(name), f" is not an option of --format {target.name}, which takes ", *listed[1:])
        given[name] = value
    readers = {
        "batch": _export_batch,
        "image_size": _export_size,
        "calibration": lambda text: ImageSource(text, args.root, training=True),
        "images": lambda text: ImageSource(text, args.root),
        "providers": lambda text: [text],
        "gpu": lambda text: text == "gpu",
    }
    given = {name: readers[name](value) if name in readers else value for name, value in given.items()}
    return given | dict(map(_key_and_value, args.set))


def _key_and_value(text: str) -> tuple[str, Any]:
    """Parse KEY=VALUE; the value is read as YAML."""
    key, equals, value = text.partition("=")
    if not equals or not key.isidentifier():
        raise GlitError(f"--set must be KEY=VALUE, got {text!r}")
    try:
        return key, parse_yaml(value)
    except ValueError:
        return key, value


def _export_batch(text: str) -> int | None:
    if text == "dynamic":
        return None
    if not re.fullmatch("[0-9]{1,9}", text) or int(text) < 1:
        raise GlitError(f"--batch must be 'dynamic' or a number of images from 1, got {text[:40]!r}")
    return int(text)


def _export_size(text: str) -> Any:
    if text == "dynamic":
        return text
    sides = re.fullmatch(r"(\d{1,9})(?:[,x](\d{1,9}))?", text)
    if sides is None:
        raise GlitError(f"--image-size must be HEIGHT,WIDTH in pixels or 'dynamic', got {text[:40]!r}")
    return int(sides[1]), int(sides[2] or sides[1])


def _print_artifact(artifact: Any) -> None:
    agreement = artifact.agreement
    echo(f"{artifact.path}: {', '.join(artifact.facts)}")
    if agreement is None:
        echo("not compared with PyTorch, so it is marked .unverified")
        return
    of = f"{agreement.num_images} images ({agreement.origin}) by {agreement.provider}"
    rows = [
        ("largest difference of a logit", f"{agreement.max_abs:.2e}"),
        ("over the image's largest logit", f"{agreement.max_rel:.2e}"),
        ("same most probable class", f"{agreement.top1_agreement:.2f} %"),
    ]
    if agreement.levels is not None:
        rows.append(("prepared pixels, 19 in 20 within", f"{agreement.levels:.2f} levels of 255"))
    if agreement.accuracy is not None:
        rows.append(
            ("top-1 of the file and of PyTorch", f"{agreement.accuracy:.2f} %, {agreement.torch_accuracy:.2f} %")
        )
    echo(f"compared with PyTorch on {of}:")
    for text, value in rows:
        echo(f"  {text:<38}{value}")


# ---- glit serve ----


def add_serve(commands: Commands) -> None:
    parser = add_command(
        commands, "serve", _run_serve, "Serve models over HTTP, with the protocol of Triton and KServe, until Ctrl-C."
    )
    parser.add_argument("model", help="a file of `glit export`, a Triton repository, MODEL.TAG or a weight folder")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine)")
    parser.add_argument("--port", type=int, default=8000, metavar="N", help="port (default: 8000); 0 for any free one")
    parser.add_argument(
        "--provider", "--device", dest="provider", help="cpu, cuda or tensorrt (default: the fastest available)"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: all cores)")
    parser.add_argument("--max-batch", type=int, default=16, metavar="N", help="maximum batch size (default: 16)")
    parser.add_argument("--max-delay-ms", type=float, default=2.0, metavar="MS", help="batching delay (default: 2)")
    parser.add_argument("--max-body", default="20MB", metavar="SIZE", help="maximum size of a request (default: 20MB)")
    parser.add_argument("--timeout", type=float, default=30.0, metavar="S", help="request timeout in s (default: 30)")
    parser.add_argument("--name", help="name of a single model (default: the name of its weights)")


def _run_serve(args: argparse.Namespace) -> int:
    from glit_models.export.extras import require

    for package in ("fastapi", "uvicorn"):
        require(package, "serve")
    from glit_models.export.server import ServerOptions, serve

    limits = (args.max_batch, args.max_delay_ms, _num_bytes(args.max_body), args.timeout)
    providers = [args.provider] if args.provider else None
    options = ServerOptions(args.host, args.port, *limits)
    return serve(args.model, options, providers=providers, threads=args.threads, name=args.name)


def _num_bytes(text: str) -> int:
    found = re.fullmatch(r"(\d{1,12})\s*([kMG]?)B?", text, re.ASCII)
    if found is None:
        raise GlitError(f"--max-body must be a size such as 20MB, got {text!r}")
    return int(found[1]) * {"": 1, "k": 10**3, "M": 10**6, "G": 10**9}[found[2]]


# ---- glit bench ----


def add_bench(commands: Commands) -> None:
    parser = add_command(
        commands, "bench", _run_bench, "Measure a model's speed in PyTorch and ONNX Runtime, in one interleaved run."
    )
    parser.add_argument("model", help="MODEL.TAG, a weight folder, or a Hub repository NAMESPACE/NAME")
    parser.add_argument("--onnx", action="append", default=[], metavar="FILE", help="exported file; can be repeated")
    parser.add_argument(
        "--openvino", action="append", default=[], metavar="DIR", help="exported OpenVINO folder; can be repeated"
    )
    parser.add_argument("--batch", default="1,16", metavar="N,...", help="batch sizes (default: 1,16)")
    parser.add_argument("--providers", metavar="P,...", help="cpu, cuda, tensorrt (default: the fastest available)")
    parser.add_argument("--rounds", type=int, default=30, metavar="N", help="number of measurements (default: 30)")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: all cores)")
    parser.add_argument("--device", help="PyTorch device: cpu, cuda, ... (default: the GPU if there is one)")
    parser.add_argument("--no-compile", action="store_true", help="skip torch.compile")
    parser.add_argument("--no-baseline", action="store_true", help="skip deit_tiny_patch16_224, in PyTorch and as ONNX")
    parser.add_argument("--plot", metavar="FILE.png", help="draw the result")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _run_bench(args: argparse.Namespace) -> int:
    from dataclasses import asdict

    from glit_models.export import bench

    from ..predict import pick_device

    batches = [_export_batch(text) for text in args.batch.split(",")]
    if None in batches:
        raise GlitError("--batch must be numbers, separated by commas")
    rows, left_out = bench.bench(
        args.model,
        files=args.onnx,
        openvino=args.openvino,
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
        print_json({"model": args.model, **about, "rounds": args.rounds, "rows": found, "left_out": left_out})
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
        print_table(args.model, columns, cells)
        echo(f"{args.rounds} rounds; {', '.join(f'{key} {value}' for key, value in about.items())}")
    for line in left_out:
        echo(f"glit: left out: {line}", error=True)
    if args.plot:
        bench.draw_bench(rows, args.model, Path(args.plot))
    return 0
