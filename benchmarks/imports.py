"""Measure the time of `import glit_models` beyond timm's import, and of making a model, in new interpreters."""

import statistics
import subprocess
import sys

from . import report

PROGRAM = """
import time
start = time.perf_counter()
import timm
after_timm = time.perf_counter()
import glit_models
after_glit = time.perf_counter()
timm.create_model("glit_tiny")
after_construction = time.perf_counter()
timm.create_model("deit_tiny_patch16_224")
print(after_timm - start, after_glit - after_timm, after_construction - after_glit,
      time.perf_counter() - after_construction)
"""


def main() -> None:
    """Measure and print."""
    options = report.parser(__doc__, rounds=9).parse_args()
    times = []
    for _ in range(options.rounds + 1):  # the first one may compile bytecode
        output = subprocess.run([sys.executable, "-c", PROGRAM], check=True, capture_output=True, text=True).stdout
        times.append([float(value) for value in output.split()])
    what = (
        "import timm (with torch and torchvision)", "import glit_models, after timm", "make glit_tiny",
        "make deit_tiny_patch16_224",
    )  # fmt: skip
    medians = (statistics.median(column) for column in zip(*times[1:], strict=True))
    rows = [{"what": name, "ms": 1e3 * seconds} for name, seconds in zip(what, medians, strict=True)]
    report.show("imports", options, rows)


if __name__ == "__main__":
    main()
