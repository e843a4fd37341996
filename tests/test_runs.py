"""Tests of the support for long jobs: atomic writes, a state with a spare copy, a lock, and stop requests."""

import errno
import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from glit_models.errors import RunError, WriteError
from glit_models.runs import console
from glit_models.runs.files import scratch_folder, whole_file, whole_folder, write_bytes, write_json, write_text
from glit_models.runs.lock import lock_folder
from glit_models.runs.signals import StopRequest
from glit_models.runs.state import StateFiles, read_tensors, write_tensors

# ---- files ----


def test_a_file_is_written_whole_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "ä\n")
    write_bytes(tmp_path / "b" / "b.bin", b"b", parents=True)
    write_json(tmp_path / "c.json", {"c": [1]})
    assert (tmp_path / "a.txt").read_bytes() == "ä\n".encode()
    assert (tmp_path / "b" / "b.bin").read_bytes() == b"b"
    assert (tmp_path / "c.json").read_text() == '{\n  "c": [\n    1\n  ]\n}\n'
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "b", "c.json"]


def fail_inside(path: Path, error: BaseException) -> None:
    with whole_file(path) as temporary:
        temporary.write_text("half")
        raise error


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (OSError(28, "No space left on device"), WriteError),
        (KeyboardInterrupt(), KeyboardInterrupt),
        (ValueError("no format"), ValueError),
    ],
)
def test_what_fails_inside_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, error: BaseException, raised: type[BaseException]
) -> None:
    path = tmp_path / "file"
    path.write_text("the old one")
    with pytest.raises(raised):
        fail_inside(path, error)
    assert path.read_text() == "the old one"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("place", "reason"),
    [("missing/file", "No such file or directory"), ("text/file", "Not a directory"), ("folder", "Is a directory")],
)
def test_a_file_that_cannot_be_written_is_named_with_the_reason(tmp_path: Path, place: str, reason: str) -> None:
    (tmp_path / "text").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(WriteError) as error:
        write_text(tmp_path / place, "x")
    assert str(error.value) == f"{tmp_path / place} cannot be written: {reason}"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["folder", "text"]


def fill_half(target: Path) -> None:
    with whole_folder(target) as folder:
        (folder / "a").write_text("a")
        raise OSError("disk full")


def test_the_files_of_a_folder_are_written_all_or_none(tmp_path: Path) -> None:
    with pytest.raises(WriteError, match="new cannot be written: disk full$"):
        fill_half(tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_copied_is_one_reason(tmp_path: Path) -> None:
    def full(source: str, target: str, **_: object) -> None:
        raise OSError(28, "No space left on device", target)

    (tmp_path / "source").mkdir()
    for name in "ab":
        (tmp_path / "source" / name).touch()
    with (
        pytest.raises(WriteError, match=r"new cannot be written: \[Errno 28\] No space left on device: '[^']*/[ab]'$"),
        whole_folder(tmp_path / "new") as folder,
    ):
        shutil.copytree(tmp_path / "source", folder, dirs_exist_ok=True, copy_function=full)


def test_new_files_of_a_folder_replace_those_of_the_same_names(tmp_path: Path) -> None:
    target = tmp_path / "folder"
    for content in ("old", "new"):
        with whole_folder(target) as folder:
            (folder / "below").mkdir()
            for name in ("a", "below/b"):
                (folder / name).write_text(content)
            (folder / content).touch()
    assert sorted(path.name for path in target.iterdir()) == ["a", "below", "new", "old"]
    assert (target / "a").read_text() == (target / "below/b").read_text() == "new"
    with whole_folder(target, replace=True) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "b").touch()
    assert [path.name for path in target.iterdir()] == ["sub"]
    assert list(tmp_path.iterdir()) == [target]


def test_a_scratch_folder_lies_beside_and_goes(tmp_path: Path) -> None:
    with scratch_folder(tmp_path / "file") as folder:
        (folder / "left").touch()
        assert folder.parent == tmp_path
    assert list(tmp_path.iterdir()) == []


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
import torch
from glit_models.errors import WriteError
from glit_models.runs.files import whole_file, write_bytes
from glit_models.runs.state import StateFiles, read_tensors, write_tensors
from glit_models.weights.files import write_state_dict

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
folder = Path(sys.argv[1])
tensors = {"a": torch.ones(100_000), "b": torch.ones(100_000)}
files = StateFiles(folder / "last.pt", folder / "previous.pt")
files.save(lambda path: write_tensors({"step": 1, **tensors}, path))
for limit in (10, 100_000, 400_200, 790_000):  # in the archive's head, in each tensor, and at its end
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    def save_safetensors():
        with whole_file(folder / "model.safetensors") as path:
            write_state_dict(tensors, path)
    for write in (
        lambda: files.save(lambda path: write_tensors({"step": 2, **tensors}, path)),
        save_safetensors,
        lambda: write_bytes(folder / "file", bytes(800_000)),
    ):
        try:
            write()
        except WriteError as error:
            print(error)
print(files.load(read_tensors)["step"], sorted(path.name for path in folder.iterdir()))
"""


def test_a_full_disk_is_one_line_whatever_writes_and_the_state_stays(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", FULL_DISK, str(tmp_path)], capture_output=True, text=True)
    *lines, last = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr
    assert len(lines) == 12
    assert all(" cannot be written: " in line and "File too large" in line for line in lines)
    assert last == "1 ['last.pt']"


# ---- the state and the lock ----


def test_the_spare_is_the_state_before_the_newest(tmp_path: Path) -> None:
    files = StateFiles(tmp_path / "new.json", tmp_path / "old.json")
    assert files.load(Path.read_text) is None
    (tmp_path / "left.tmp").touch()
    (tmp_path / "folder.tmp").mkdir()
    for text in ("1", "2", "3"):
        files.save(lambda path, text=text: path.write_text(text))
    assert (files.newest.read_text(), files.spare.read_text()) == ("3", "2")
    assert not (tmp_path / "left.tmp").exists()


def test_a_damaged_state_is_named_and_the_spare_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = StateFiles(tmp_path / "new.json", tmp_path / "old.json")
    for text in ("1", "2", "x"):
        files.save(lambda path, text=text: path.write_text(text))
    assert files.load(lambda path: int(path.read_text())) == 2
    assert "new.json is damaged (invalid literal" in capsys.readouterr().err
    files.spare.write_text("y")
    with pytest.raises(RunError, match="old.json: no readable state is left; delete it to start again"):
        files.load(lambda path: int(path.read_text()))


def test_tensors_come_back_as_they_were_written(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    state = {"tensor": torch.arange(10**6), "nested": {"step": 3, "none": None}, "list": [1.5, True]}
    write_tensors(state, tmp_path / "state.pt")
    again = read_tensors(tmp_path / "state.pt")
    assert torch.equal(again.pop("tensor"), state.pop("tensor"))
    assert again == state


def test_a_locked_folder_is_refused_until_it_is_free(tmp_path: Path) -> None:
    with (
        lock_folder(tmp_path / "run"),
        pytest.raises(RunError, match=r"run is in use by another process; wait for it, or choose another folder$"),
    ):
        lock_folder(tmp_path / "run")
    lock_folder(tmp_path / "run").close()


def test_a_file_system_that_cannot_lock_is_told_from_a_folder_in_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(file: object, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(WriteError, match=r"cannot lock files \(No locks available\); choose a folder on another one$"):
        lock_folder(tmp_path / "run")


# ---- stopping ----


def test_the_first_signal_asks_to_stop_and_the_second_interrupts() -> None:
    before = signal.getsignal(signal.SIGTERM)
    stop = StopRequest()
    with stop:
        assert stop.signal is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal == stop.reason == "SIGTERM"
        assert stop.exit_status == 143
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("minutes", [float("nan"), float("inf"), -1.0])
def test_a_limit_of_time_that_would_be_none_is_refused(minutes: float) -> None:
    with pytest.raises(RunError, match=rf"^max_minutes must be a number of minutes from 0, got {minutes:g}$"):
        StopRequest(minutes)


def test_a_limit_of_time_begins_with_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    stop = StopRequest(max_minutes=2)
    now[0] = 1000.0
    with stop:
        now[0] += 90
        assert stop.minutes_left == 0.5
        assert not stop.is_late
        now[0] += 60
        assert stop.is_late
        assert stop.minutes_left == 0
    assert stop.reason == "the limit of 2 minutes"
    assert stop.exit_status == 3
    assert StopRequest().minutes_left is None


def test_progress_lines_say_how_much_time_is_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console, "_EVERY", 0.0)
    times = iter(range(0, 1000, 30))
    monkeypatch.setattr(console.time, "monotonic", lambda: next(times))
    assert list(console.track("abc", "reading")) == ["a", "b", "c"]
    assert list(console.track(iter("ab"), "reading")) == ["a", "b"]
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "reading: 0 %"
    assert re.fullmatch(r"reading: 33 %, \d min \d+ s left", lines[1])
    assert lines[3:] == ["reading: 0", "reading: 1"]
