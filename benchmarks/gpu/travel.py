"""Transfer files to a machine without a network: check their size, and split files that are too large.

python -m benchmarks.gpu.travel check runs/carry              # does the checkout with this folder fit?
python -m benchmarks.gpu.travel split WHEEL runs/parts        # here: runs/parts/0/, runs/parts/1/, ...
python -m benchmarks.gpu.travel join runs/parts/0 /tmp/wheel  # there, once for each part, in order
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

__all__ = ["LIMIT", "join", "size_of_journey", "split"]

MIB = 2**20
LIMIT = 64 * MIB
_ROOT = Path(__file__).resolve().parents[2]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser("check", help="compare the size of the checkout and these paths with the limit")
    check.add_argument("paths", nargs="*", type=Path)
    cut = commands.add_parser("split", help="split a file into parts, each in a separate folder")
    cut.add_argument("file", type=Path)
    cut.add_argument("folder", type=Path)
    cut.add_argument("--mib", type=float, default=30, help="size of a part; the checkout is sent with each")
    put = commands.add_parser("join", help="append a part to its file")
    put.add_argument("part", type=Path)
    put.add_argument("folder", type=Path)
    options = parser.parse_args(arguments)
    if options.command == "check":
        total = size_of_journey(options.paths)
        print(f"{total / MIB:.1f} MiB of {LIMIT / MIB:.0f}")
        sys.exit(total > LIMIT)
    if options.command == "split":
        print("\n".join(map(str, split(options.file, options.folder, int(options.mib * MIB)))))
    else:
        done = join(options.part, options.folder)
        print(done or "more parts are to come")


def size_of_journey(paths: Sequence[Path]) -> int:
    """Bytes of the checkout's files, without those that git ignores, and of these files and folders.

    Raises:
        FileNotFoundError: a path does not exist.
    """
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=_ROOT, capture_output=True, check=True).stdout.decode().split("\0")
    files = {(_ROOT / name).resolve() for name in listed if name and (_ROOT / name).is_file()}
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist")
        files |= {file.resolve() for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file()}
    return sum(file.stat().st_size for file in files)


def split(file: Path, folder: Path, size: int) -> list[Path]:
    """Split `file` into parts of at most `size` bytes, `folder/NUMBER/part`, each with a description.

    Returns:
        The folders of the parts, in order.
    """
    content = file.read_bytes()
    about = {"name": file.name, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    folders = []
    for number, start in enumerate(range(0, len(content), size)):
        part = content[start : start + size]
        place = folder / str(number)
        place.mkdir(parents=True, exist_ok=True)
        (place / "part").write_bytes(part)
        own = {"start": start, "part_sha256": hashlib.sha256(part).hexdigest()}
        (place / "part.json").write_text(json.dumps(about | own))
        folders.append(place)
    return folders


def join(part: Path, folder: Path) -> Path | None:
    """Append a part in a folder of `split` to its file in `folder`; a part that is already there is skipped.

    Returns:
        The complete file, else None.

    Raises:
        ValueError: the part is damaged, an earlier one is missing, or the complete file differs from the original.
    """
    about = json.loads((part / "part.json").read_text())
    content = (part / "part").read_bytes()
    if hashlib.sha256(content).hexdigest() != about["part_sha256"]:
        raise ValueError(f"{part / 'part'} is damaged: its SHA-256 is not {about['part_sha256']}")
    folder.mkdir(parents=True, exist_ok=True)
    unfinished, whole = folder / f"{about['name']}.unfinished", folder / about["name"]
    if whole.is_file():
        return whole
    done = unfinished.stat().st_size if unfinished.is_file() else 0
    if done < about["start"]:
        raise ValueError(f"{part} begins at byte {about['start']}, but {unfinished} ends at byte {done}: join in order")
    with unfinished.open("ab") as file:
        file.truncate(about["start"])
        file.write(content)
    if about["start"] + len(content) < about["bytes"]:
        return None
    if hashlib.sha256(unfinished.read_bytes()).hexdigest() != about["sha256"]:
        raise ValueError(f"{unfinished} is not the file that was split: its SHA-256 is not {about['sha256']}")
    unfinished.rename(whole)
    return whole


if __name__ == "__main__":
    main()
