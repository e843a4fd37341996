"""Run the installed timm version's `tests/test_models.py` on this package's models: `make timm-tests`.

The tests are not in timm's wheel, so pip fetches the source distribution once, into `.cache/`.
"""

import argparse
import os
import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MODELS = "glit_tiny,glit_small,glit_base,autoformer_tiny,vitas_c"


def fetch(cache: Path) -> Path:
    """The folder of the unpacked suite: timm's tests and pyproject.toml, not its code. The installed code is tested."""
    name = f"timm-{version('timm')}"
    folder = cache / name
    if not (folder / "tests" / "test_models.py").is_file():
        cache.mkdir(parents=True, exist_ok=True)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "timm"]
        subprocess.run([*pip, "--dest", str(cache), f"timm=={version('timm')}"], check=True)
        with tarfile.open(cache / f"{name}.tar.gz") as archive:
            wanted = (f"{name}/tests/", f"{name}/pyproject.toml")
            members = [member for member in archive.getmembers() if member.name.startswith(wanted)]
            archive.extractall(cache, members, filter="data")
    return folder


def main() -> int:
    """Fetch the suite, run it on the models asked for, and return pytest's exit status (5 if nothing was collected)."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--models", default="glit_tiny,glit_small,glit_base,autoformer_tiny,vitas_c", help="names, separated by commas"
    )
    parser.add_argument("pytest_args", nargs="*", help="more arguments for pytest, after --")
    args = parser.parse_args()
    folder = fetch(ROOT / ".cache")
    pytest = [sys.executable, "-m", "pytest", "-c", str(folder / "pyproject.toml"), "--rootdir", str(folder)]
    pytest += ["-p", "timm_plugin", "-p", "no:cacheprovider", str(folder / "tests" / "test_models.py")]
    paths = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "GLIT_TIMM_TESTS": args.models,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }
    return subprocess.run([*pytest, "-ra", *args.pytest_args], env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
