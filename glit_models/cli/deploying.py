"""Commands about deployment: export, bench."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

from ..errors import GlitError
from .common import Commands, add_command, print_json, print_table

__all__ = ["add_bench", "add_export"]


# ---- glit export ----


def add_export(commands: Commands) -> None:
    parser = add_command(
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

        print_json({**asdict(artifact), "path": str(artifact.path)})
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


def add_bench(commands: Commands) -> None:
    parser = add_command(
        commands, "bench", _run_bench, "Measure a model in PyTorch and ONNX Runtime, in one interleaved run."
    )
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

    from ..inference import pick_device

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
        print(f"{args.rounds} rounds; {', '.join(f'{key} {value}' for key, value in about.items())}")
    for line in left_out:
        print(f"glit: left out: {line}", file=sys.stderr)
    if args.plot:
        bench.draw_bench(rows, args.model, Path(args.plot))
    return 0
