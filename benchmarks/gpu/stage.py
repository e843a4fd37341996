"""The process of one stage: `python -m benchmarks.gpu.stage REQUEST.json`."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import torch

from .checkout import make_importable
from .context import Context
from .plans import MODULES


def main() -> None:
    """Run the stage that the request names and write its result."""
    context = Context.from_json(Path(sys.argv[1]).read_text(encoding="utf-8"))
    make_importable()
    if context.rehearse:
        torch.set_num_threads(1)
    module = importlib.import_module(f".{MODULES[context.stage]}", __package__)
    context.save(getattr(module, f"run_{context.stage}")(context))


if __name__ == "__main__":
    main()
