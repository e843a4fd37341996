"""Test which runtimes load which exported files and compute the same: a table of runtime x form.

    python -m benchmarks.runtimes --runtimes onnxruntime==1.17.3,onnxruntime==1.23.2,openvino==2024.6.0

Each runtime is installed by pip into a separate environment under --cache, so the first run needs a network. A cell is
the share of images with the same most probable class as in PyTorch, or "no"; errors are listed below the table.
"""

import argparse
import json
import re
import subprocess
import venv
from pathlib import Path

import numpy as np
import torch
from glit_models.export import ImageSource, export_onnx
from glit_models.export.images import prepare
from glit_models.export.source import open_source

MODEL = "glit_tiny.fashion_mnist"
RUNTIMES = (
    "onnxruntime==1.17.3", "onnxruntime==1.18.1", "onnxruntime==1.19.2", "onnxruntime==1.20.1", "onnxruntime==1.22.1",
    "onnxruntime==1.23.2", "onnxruntime", "openvino==2024.6.0", "openvino==2025.2.0", "openvino",
)  # fmt: skip

# Runs in the runtime's environment: prints the most probable classes, or the error, of each file as JSON.
PROGRAM = """
import json, sys
import numpy as np
images, *files = sys.argv[1:]
images = np.load(images)
found = {}
for file in files:
    try:
        if RUNTIME == "openvino":
            import openvino
            model = openvino.Core().compile_model(file, "CPU")
            classify = lambda batch: model([batch])[0]
        else:
            import onnxruntime
            session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
            classify = lambda batch: session.run(None, {"images": batch})[0]
        batches = [images[start:start + 16].astype(TYPES[file]) for start in range(0, len(images), 16)]
        found[file] = np.concatenate([classify(batch) for batch in batches]).argmax(1).tolist()
    except Exception as error:
        found[file] = (str(error).split("\\n")[0] or type(error).__name__)
print(json.dumps(found))
"""


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--runtimes", default=",".join(RUNTIMES), help="pip requirements, separated by commas")
    options.add_argument("--cache", type=Path, default=Path("runs/runtimes"), help="folder of environments and files")
    options.add_argument("--root", help="folder of Fashion-MNIST's files")
    options.add_argument("--images", type=int, default=200, help="test images to compare on")
    args = options.parse_args()
    files = export_forms(args.cache / "files", args.root)
    expected = save_images(args.cache / "images.npy", args.root, args.images)
    print(f"| {' | '.join(['runtime', *files])} |\n|{'---|' * (len(files) + 1)}")
    errors = []
    for runtime in args.runtimes.split(","):
        version, found = run(runtime, args.cache, list(files.values()))
        print(
            f"| {' | '.join([version, *(cell(found[str(path)], expected) for path in files.values())])} |", flush=True
        )
        errors += [f"{version}, opset {n}: {e}" for n, p in files.items() if isinstance(e := found[str(p)], str)]
    print("", *errors, sep="\n")


def export_forms(folder: Path, root: str | None) -> dict[str, Path]:
    """Export one file of each form, unless it exists."""
    folder.mkdir(parents=True, exist_ok=True)
    forms = {}
    for opset in (18, 20, 23):
        for precision in ("fp32", "fp16", "int8"):
            path = folder / f"opset{opset}-{precision}.onnx"
            if not path.is_file():
                data = ImageSource("fashion-mnist", root, training=True) if precision == "int8" else None
                export_onnx(MODEL, path, opset=opset, precision=precision, calibration=data, verify=8)
            forms[f"{opset}, {precision}"] = path
    return forms


def save_images(path: Path, root: str | None, count: int) -> np.ndarray:
    """Save preprocessed test images [N, C, H, W] in a file; returns PyTorch's most probable class of each."""
    source = open_source(MODEL)
    chosen = ImageSource("fashion-mnist", root).pick(count)
    images = prepare(source.describe(20, "fp32", None, None, False), chosen.images())
    np.save(path, images)
    with torch.inference_mode():
        return source.model(torch.from_numpy(images)).argmax(1).numpy()


def run(runtime: str, cache: Path, files: list[Path]) -> tuple[str, dict[str, list[int] | str]]:
    """The runtime's name and version, and its result for each file."""
    name = re.split(r"[=<>~]", runtime)[0]
    home = cache / re.sub(r"\W+", "_", runtime)
    python = home / "bin" / "python"
    if not (home / "installed").is_file():
        venv.create(home, clear=True, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "-qqq", runtime, "numpy<2"], check=True)
        (home / "installed").touch()
    version = subprocess.run(
        [python, "-c", f"import importlib.metadata as m; print(m.version({name!r}))"], capture_output=True, text=True,
        check=True,
    ).stdout.strip()  # fmt: skip
    types = {str(path): "float16" if "fp16" in path.name else "float32" for path in files}
    program = f"RUNTIME, TYPES = {name!r}, {types!r}\n{PROGRAM}"
    command = [str(python), "-c", program, str(cache / "images.npy"), *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        return f"{name} {version}", {str(path): last for path in files}
    found: dict[str, list[int] | str] = json.loads(done.stdout.splitlines()[-1])
    return f"{name} {version}", found


def cell(found: list[int] | str, expected: np.ndarray) -> str:
    """The table cell of one runtime and file."""
    if isinstance(found, str):
        return "no"
    return f"{100 * float(np.mean(np.array(found) == expected)):.1f} %"


if __name__ == "__main__":
    main()
