"""The command `python -m benchmarks.gpu --out DIR`; see docs/gpu.md."""

from __future__ import annotations

import argparse
import importlib
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from .checkout import ROOT, make_importable
from .driver import Driver, Options
from .plans import MODULES, PLANS
from .summary import summary
from .travel import LIMIT, MIB, size_of_journey

_PLACES = (ROOT / "runs" / "carry" / "fashion-mnist", Path("/usr/share/datasets/fashion-mnist"))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a plan and print the results; returns 1 if a stage failed or ran out of time."""
    options = _parser().parse_args(arguments)
    if options.rehearse:
        _check_journey(options.data)
    if options.out is None:
        options.out = Path(tempfile.mkdtemp(prefix="glit-gpu-"))
    work = options.work or ROOT / "runs" / "gpu" / options.out.resolve().name
    if options.rehearse and options.work is None:
        work = options.out.resolve().with_name(f"{options.out.resolve().name}-work")
    if options.minutes is None:
        options.minutes = 60.0 if options.rehearse else 9.0
    device, margin = ("cpu", 0.0) if options.rehearse else (options.device, 30.0)
    asked = Options(options.out, work, options.data, options.plan, device, options.minutes, options.rehearse, margin)
    driver = Driver(asked)
    problems = driver.run()
    print(summary(driver.record))
    if options.rehearse:
        print("\nA rehearsal on a CPU cannot reach:")
        for planned in PLANS[options.plan]:
            for what in _unreached(planned.stage):
                print(f"  {planned.stage}: {what}")
    return int(problems > 0)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, help="folder of the results (default: a temporary one)")
    parser.add_argument("--work", type=Path, help="folder of checkpoints and caches (default: runs/gpu/NAME-OF-OUT)")
    parser.add_argument("--data", type=Path, default=_find_data(), help="folder of the four Fashion-MNIST files")
    parser.add_argument("--minutes", type=float, help="time limit (default: 9); the command ends half a minute earlier")
    parser.add_argument("--plan", choices=PLANS, default="first", help="stages to run")
    parser.add_argument("--device", default="cuda", help="cuda, or cuda:1")
    parser.add_argument("--rehearse", action="store_true", help="run every stage in miniature, on the CPU")
    return parser


def _find_data() -> Path:
    return next((place for place in _PLACES if place.is_dir()), _PLACES[0])


def _check_journey(data: Path) -> None:
    """Check that the checkout and the data fit into one transfer; print the sizes, and exit if they do not."""
    full = [place for place in _PLACES if place.is_dir()][:1] or [data]
    size = size_of_journey(full)
    print(f"gpu: the checkout and {full[0]} are {size / MIB:.1f} MiB of {LIMIT / MIB:.0f} that may travel", flush=True)
    if size > LIMIT:
        sys.exit("gpu: too much to travel; see what git does not ignore")


def _unreached(stage: str) -> Sequence[str]:
    """The parts of a stage that only run on a GPU."""
    make_importable()
    module = importlib.import_module(f".{MODULES[stage]}", __package__)
    unreached: Sequence[str] = module.CUDA_ONLY.get(stage, ())
    return unreached


if __name__ == "__main__":
    sys.exit(main())
