"""How long `import glit_models` takes beyond timm's own import, in fresh interpreters."""

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
print(after_timm - start, time.perf_counter() - after_timm)
"""


def main() -> None:
    """Measure and print."""
    options = report.parser(__doc__, rounds=9).parse_args()
    times = []
    for _ in range(options.rounds + 1):  # the first one may compile bytecode
        output = subprocess.run([sys.executable, "-c", PROGRAM], check=True, capture_output=True, text=True).stdout
        times.append([float(value) for value in output.split()])
    timm_seconds, glit_seconds = (statistics.median(column) for column in zip(*times[1:], strict=True))
    rows: list[dict[str, str | int | float]] = [
        {"import": "timm (with torch and torchvision)", "ms": timm_seconds * 1e3},
        {"import": "glit_models, after timm", "ms": glit_seconds * 1e3},
    ]
    report.show("imports", options, rows)


if __name__ == "__main__":
    main()
