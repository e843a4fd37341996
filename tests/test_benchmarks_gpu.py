"""Tests of the GPU command: its decisions, failing stages, and a rehearsal of all stages on the CPU."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file

from glit_models.runs.state import write_tensors
from glit_models.training import load_recipe

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # `benchmarks` is no part of the package

from benchmarks.depthwise_forms import FORMS  # noqa: E402
from benchmarks.few_labels import finished_row  # noqa: E402
from benchmarks.gpu import __main__ as command  # noqa: E402
from benchmarks.gpu import (  # noqa: E402
    compiling,
    correct,
    depthwise,
    driver,
    environment,
    full_search,
    plans,
    training,
    travel,
)
from benchmarks.gpu.choice import choose, finalists  # noqa: E402
from benchmarks.gpu.context import Context  # noqa: E402
from benchmarks.gpu.files import MAX_BYTES, MAX_FILES, over_limits, tail  # noqa: E402
from benchmarks.gpu.throughput import form_rates  # noqa: E402
from benchmarks.gpu.training import new_is_better  # noqa: E402

DATA = ROOT / "tests" / "fixtures" / "fashion-mnist"

# ---- the rule ----


@pytest.mark.parametrize(
    ("rates", "expected"),
    [
        ({"conv2d, rows": 100.0, "Triton": 104.9}, "conv2d, rows"),
        ({"conv2d, rows": 100.0, "Triton": 105.0}, "Triton"),
        ({"conv2d, rows": 100.0, "Triton": 106.0, "Triton, tensor cores": 107.0}, "Triton, tensor cores"),
        ({"conv2d, rows": 100.0, "conv1d": 103.0, "Triton": 106.0}, "conv1d"),
        ({"Triton": 50.0}, "Triton"),
        ({}, "conv2d, rows"),
    ],
)
def test_a_custom_kernel_must_make_the_whole_model_five_percent_faster(rates: dict[str, float], expected: str) -> None:
    assert choose(rates) == expected


def test_only_forms_that_ran_in_every_use_can_be_finalists() -> None:
    def row(use: str, form: str, ms: float | str) -> dict[str, object]:
        return {"use": use, "form": form, "way": "compiled", "ms": ms}

    rows = [
        row("training in chain", "conv2d, rows", 1.0), row("inference in chain", "conv2d, rows", 1.0),
        row("training in chain", "Triton", 2.0), row("inference in chain", "Triton", 1.0),
        row("training in chain", "conv1d", 1.0), row("inference in chain", "conv1d", 3.0),
        row("training in chain", "Toeplitz", 0.1), row("inference in chain", "Toeplitz", "ArithmeticError: wrong"),
        row("training in chain", "memory traffic", 0.1), row("training", "shifted sum", 0.1),
    ]  # fmt: skip
    assert finalists(rows) == ["Triton", "conv1d"]
    assert finalists([]) == []


def test_a_form_is_judged_by_the_compiled_network_at_the_largest_batch() -> None:
    def row(network: str, how: str, batch: int, rate: float) -> dict[str, object]:
        return {"use": "training", "network": network, "how": how, "batch": batch, "images/s": rate}

    rows = [
        row("GLiT-Tiny", "compiled", 256, 10.0), row("GLiT-Tiny", "compiled", 32, 99.0),
        row("GLiT-Tiny, Triton", "compiled", 256, 11.0), row("GLiT-Tiny, Triton", "eager", 256, 99.0),
        row("DeiT-Tiny", "compiled", 256, 99.0),
    ]  # fmt: skip
    assert form_rates(rows, "training") == {"conv2d, rows": 10.0, "Triton": 11.0}
    assert form_rates(rows, "inference") == {}


def test_new_weights_are_taken_only_if_they_gain_more_than_the_shipped_ones() -> None:
    shipped, new = "glit_tiny.fractal1k, gain", "/data/new_weights, gain"
    assert new_is_better({"rows": [{shipped: "+1.00", new: "+2.00"}, {shipped: "+3.00", new: "+2.50"}]})
    assert not new_is_better({"rows": [{shipped: "+1.00", new: "+0.50"}]})
    assert not new_is_better({"rows": [{shipped: "+1.00"}, {new: "+2.00"}]})  # nothing to compare with
    assert not new_is_better({})


def test_few_labels_are_scored_from_the_runs_that_are_finished(tmp_path: Path) -> None:
    scores = {"scratch-0": 70.0, "scratch-1": 72.0, "fractal1k-1": 75.0, "fractal1k-2": 80.0}
    for name, score in scores.items():
        (tmp_path / f"600x10-{name}").mkdir()
        (tmp_path / f"600x10-{name}" / "result.json").write_text(json.dumps({"test_top1": score}))
    weights = ["glit_tiny.fractal1k", "/data/new_weights"]
    assert finished_row(tmp_path, 600, 10, weights, range(3)) == {
        "labels": 600, "epochs": 10, "scratch, %": "71.00 ± 1.41", "glit_tiny.fractal1k, %": "77.50 ± 3.54",
        "glit_tiny.fractal1k, gain": "+3.00",
    }  # fmt: skip
    assert finished_row(tmp_path, 600, 40, weights, range(3)) == {"labels": 600, "epochs": 40}


def test_compilations_at_the_same_time_fit_into_the_gpu_s_memory() -> None:
    training, form = "network|training|GLiT-Tiny|compiled|256", "form|conv1d"
    assert compiling._next(["pretrain", training], [], 62) == "pretrain"
    assert compiling._next([training, form], ["pretrain", training, training], 62) == training
    assert compiling._next([training, form], ["pretrain", training, training, form], 62) is None
    assert compiling._next([training, form], ["pretrain", training, training, form], 123) == training
    assert compiling._next(["pretrain"], [], 8) == "pretrain"  # rather than to wait for ever


# ---- the driver ----


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """A plan of four small stages in a module of their own, which the processes of the driver import."""
    (tmp_path / "fake_stage.py").write_text(
        "import json, pathlib, sys, time\n"
        "request = json.loads(pathlib.Path(sys.argv[1]).read_text())\n"
        "result = pathlib.Path(request['work']) / 'results' / (request['stage'] + '.json')\n"
        "result.parent.mkdir(exist_ok=True)\n"
        "stage = request['stage']\n"
        "print('this is', stage, flush=True)\n"
        "if stage == 'slow':\n"
        "    result.write_text(json.dumps({'partial': 1}))\n"
        "    time.sleep(60)\n"
        "if stage == 'broken':\n"
        "    raise SystemExit('it broke')\n"
        "result.write_text(json.dumps({'earlier': sorted(request['earlier']), 'finished': stage != 'long'}))\n"
    )
    monkeypatch.setitem(
        plans.PLANS, "fake",
        (plans.Planned("broken", 20), plans.Planned("slow", 9), plans.Planned("good", 20), plans.Planned("long")),
    )  # fmt: skip
    popen = subprocess.Popen

    def start(arguments: list[str], **keywords: object) -> subprocess.Popen[bytes]:
        return popen([sys.executable, str(tmp_path / "fake_stage.py"), arguments[-1]], **keywords)

    monkeypatch.setattr(driver.subprocess, "Popen", start)
    return driver


def make_driver(tmp_path: Path, **keywords: object) -> driver.Driver:
    options = driver.Options(tmp_path / "out", tmp_path / "work", DATA, "fake", "cpu", **keywords)
    return driver.Driver(options)


def test_a_stage_that_fails_or_takes_too_long_is_recorded_and_the_next_one_begins(stages, tmp_path: Path) -> None:
    assert make_driver(tmp_path, minutes=2.0).run() == 2
    entries = json.loads((tmp_path / "out" / "gpu.json").read_text())["plans"]["fake"]
    assert {name: entry["status"] for name, entry in entries.items()} == {
        "broken": "failed", "slow": "overran", "good": "done", "long": "unfinished",
    }  # fmt: skip
    assert "it broke" in entries["broken"]["log"]
    assert entries["slow"]["result"] == {"partial": 1}
    assert entries["good"]["result"]["earlier"] == ["broken", "slow"]
    assert "this is good" in (tmp_path / "out" / "gpu.log").read_text()


def test_a_second_call_skips_what_is_done_and_goes_on_with_the_rest(stages, tmp_path: Path) -> None:
    for folder in ("out", "work"):
        (tmp_path / folder).mkdir()
    done = {"status": "done", "seconds": 1, "result": {}}
    record = {
        "version": 1,
        "calls": [],
        "plans": {"fake": {"broken": done, "slow": done, "long": done | {"status": "unfinished"}}},
    }
    (tmp_path / "work" / "gpu.json").write_text(json.dumps(record))  # as on a machine that has emptied `out`
    assert make_driver(tmp_path, minutes=2.0).run() == 0
    logs = (tmp_path / "out" / "gpu.log").read_text()
    assert [f"this is {name}" in logs for name in ("broken", "slow", "good", "long")] == [False, False, True, True]


def test_a_stage_that_may_not_run_beside_a_measurement_is_not_repeated_when_its_partner_is_finished(
    stages, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    plan = (plans.Planned("broken", 20, beside=True), plans.Planned("slow", 9), plans.Planned("good", 20))
    monkeypatch.setitem(plans.PLANS, "fake", plan)
    (tmp_path / "work").mkdir()
    entries = {"broken": {"status": "overran", "result": None}, "slow": {"status": "done", "result": {}}}
    record = {"version": 1, "calls": [], "plans": {"fake": entries}}
    (tmp_path / "work" / "gpu.json").write_text(json.dumps(record))
    one = make_driver(tmp_path, minutes=2.0)
    one.run()
    assert one.fresh == {"good"}


@pytest.mark.parametrize(
    ("result", "expected"), [(None, {"environment"}), ({"device": "H200"}, {"environment", "good"})]
)
def test_only_a_device_that_does_not_work_ends_the_plan(
    result: dict[str, str] | None, expected: set[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(plans.PLANS, "fake", (plans.Planned("environment", 20), plans.Planned("good", 20)))
    one = make_driver(tmp_path, minutes=2.0)
    popen = subprocess.Popen

    def start(arguments: list[str], **keywords: object) -> subprocess.Popen[bytes]:
        stage = Path(arguments[-1]).stem
        if stage == "environment" and result is not None:
            (tmp_path / "work" / "results").mkdir(exist_ok=True)
            (tmp_path / "work" / "results" / "environment.json").write_text(json.dumps(result))
        return popen(["false" if stage == "environment" else "true"], **keywords)

    monkeypatch.setattr(driver.subprocess, "Popen", start)
    one.run()
    assert one.fresh == expected


def test_a_hanging_nvidia_smi_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(*arguments: object, **keywords: object) -> None:
        raise subprocess.TimeoutExpired("nvidia-smi", 5)

    monkeypatch.setattr(environment.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(environment.subprocess, "run", hang)
    assert "timed out after 5 seconds" in environment._nvidia_smi()


def test_it_leaves_what_there_is_no_time_for_and_ends_in_time(stages, tmp_path: Path) -> None:
    began = time.monotonic()
    make_driver(tmp_path, minutes=0.5, margin=30.0).run()
    assert time.monotonic() - began < 10
    entries = json.loads((tmp_path / "out" / "gpu.json").read_text())["plans"]["fake"]
    assert {entry["status"] for entry in entries.values()} == {"skipped"}


def test_a_signal_ends_the_stage_and_writes_what_there_is(stages, tmp_path: Path) -> None:
    one = make_driver(tmp_path, minutes=2.0)
    begin = one._start

    def start_and_signal(planned: plans.Planned, box: float) -> object:
        running = begin(planned, box)
        if planned.stage == "slow":
            time.sleep(1)
            os.kill(os.getpid(), signal.SIGTERM)
        return running

    one._start = start_and_signal  # type: ignore[assignment]
    one.run()
    entries = json.loads((tmp_path / "out" / "gpu.json").read_text())["plans"]["fake"]
    assert {name: entry["status"] for name, entry in entries.items()} == {"broken": "failed", "slow": "stopped"}
    assert entries["slow"]["result"] == {"partial": 1}


def test_the_trainings_share_what_the_other_stages_leave(tmp_path: Path) -> None:
    one = driver.Driver(driver.Options(tmp_path / "out", tmp_path / "work", DATA, "first"))
    plan = plans.PLANS["first"]
    fixed = sum(planned.seconds or 0 for planned in plan if not planned.beside)
    boxes = {planned.stage: one._box(plan, index) for index, planned in enumerate(plan)}
    assert fixed < 400
    assert boxes["pretrain"] == pytest.approx((9 * 60 - 30 - 50) / 1.6, abs=5)  # as if nothing came before it
    assert boxes["environment"] == 25


# ---- correctness ----


def test_only_a_form_that_passed_every_case_can_be_a_finalist(tmp_path: Path) -> None:
    context = make_context(tmp_path, "correct")
    cases = len(correct._form_cases(context))
    rows = [{"form": "conv1d", "ok": True}] * cases
    rows += [{"form": "shifted sum", "ok": True}] * (cases - 1)  # then the time was up
    rows += [{"form": "Toeplitz", "ok": True}] * (cases - 1) + [{"form": "Toeplitz", "ok": False}]
    checked = correct._result(rows, context)
    assert (checked["right_forms"], checked["wrong_forms"]) == (["conv1d"], ["Toeplitz"])

    timed = [
        {"layers": "GLiT-Tiny", "form": name, "use": use, "ms": 1.0}
        for name in FORMS for use in ("training in chain", "inference in chain")
    ]  # fmt: skip
    assert depthwise._result(timed, make_context(tmp_path, "depthwise", correct=checked))["finalists"] == ["conv1d"]
    assert depthwise._result(timed, make_context(tmp_path, "depthwise"))["finalists"] == []


# ---- files and the journey ----


def test_too_many_or_too_large_files_are_named(tmp_path: Path) -> None:
    for number in range(MAX_FILES + 1):
        (tmp_path / f"{number}").write_bytes(b"")
    with (tmp_path / "0").open("wb") as file:
        file.truncate(MAX_BYTES)
    assert over_limits(tmp_path) == [f"0 has {MAX_BYTES} bytes", "9 files, 8 are allowed"]
    for number in range(1, 5):
        with (tmp_path / f"{number}").open("wb") as file:
            file.truncate(MAX_BYTES - 1)
    assert over_limits(tmp_path)[-1] == f"{5 * MAX_BYTES - 4} bytes in all, {4 * MAX_BYTES} are allowed"


def test_the_end_of_a_log_begins_with_a_whole_line(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("first line\nsecond line\nthird line\n")
    assert tail(tmp_path / "log", 25) == "second line\nthird line\n" or tail(tmp_path / "log", 25) == "third line\n"
    assert tail(tmp_path / "none") == ""


def test_a_file_is_split_and_joined_part_by_part(tmp_path: Path) -> None:
    whole = tmp_path / "wheel.whl"
    whole.write_bytes(bytes(range(256)) * 10)
    parts = travel.split(whole, tmp_path / "parts", 1000)
    assert len(parts) == 3
    with pytest.raises(ValueError, match="join in order"):
        travel.join(parts[1], tmp_path / "there")
    assert travel.join(parts[0], tmp_path / "there") is None
    assert travel.join(parts[0], tmp_path / "there") is None  # sent twice
    assert travel.join(parts[1], tmp_path / "there") is None
    joined = travel.join(parts[2], tmp_path / "there")
    assert joined is not None
    assert joined.read_bytes() == whole.read_bytes()


def test_a_damaged_part_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    (part,) = travel.split(tmp_path / "file", tmp_path / "parts", 1000)
    (part / "part").write_bytes(b"c0ntent")
    with pytest.raises(ValueError, match="is damaged"):
        travel.join(part, tmp_path / "there")


def test_a_search_s_folder_comes_back_without_checkpoints(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    folder, out = tmp_path / "search", tmp_path / "out"
    (folder / "stage1").mkdir(parents=True)
    out.mkdir()
    (folder / "recipe.yaml").write_text("seed: 0\n")
    (folder / "stage1" / "last.pt").write_bytes(b"large")
    save_file({"weight": torch.ones(3), "count": torch.tensor(2)}, folder / "stage1" / "model.safetensors")
    assert full_search.pack(folder, out) == (1, [])
    full_search.unpack(out, tmp_path / "again")
    again = tmp_path / "again"
    assert sorted(path.name for path in again.rglob("*") if path.is_file()) == ["model.safetensors", "recipe.yaml"]
    weights = load_file(again / "stage1" / "model.safetensors")
    assert (weights["weight"].dtype, weights["count"].item()) == (torch.float16, 2)


def test_a_search_s_weights_are_left_out_where_there_is_no_room_but_never_its_records(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    folder, out = tmp_path / "search", tmp_path / "out"
    out.mkdir()
    # In the order of their times; of the first stage only the best network is needed to go on.
    scores = {
        "stage1/supernet": 0,
        "stage1/retrain/1": 90,
        "stage1/retrain/2": 80,
        "stage2/supernet": 0,
        "control/1": 70,
    }
    for number, (name, score) in enumerate(scores.items()):
        weights = folder / name / ("" if "supernet" in name else "model") / "model.safetensors"
        weights.parent.mkdir(parents=True)
        save_file({"weight": torch.randn(1000)}, weights)
        os.utime(weights, (number, number))
        (folder / name / "result.json").write_text(json.dumps({"validation_top1": score}))
        (folder / name / "best.safetensors").write_bytes(b"large")
    (folder / "stage1" / "retrained.json").write_text("[]")
    monkeypatch.setattr(full_search, "MAX_TOTAL_BYTES", full_search._OTHER_BYTES + 6800)  # for three
    parts, left_out = full_search.pack(folder, out)
    assert (parts, sorted(left_out)) == (
        1, ["stage1/retrain/2/model/model.safetensors", "stage1/supernet/model.safetensors"]
    )  # fmt: skip
    monkeypatch.setattr(full_search, "MAX_TOTAL_BYTES", full_search._OTHER_BYTES + 4800)  # for two
    parts, left_out = full_search.pack(folder, out)
    assert len(left_out) == 3
    full_search.unpack(out, tmp_path / "again")
    again = {str(path.relative_to(tmp_path / "again")) for path in (tmp_path / "again").rglob("*") if path.is_file()}
    assert again == {
        "stage1/retrained.json", "stage1/retrain/1/result.json", "stage1/retrain/1/model/model.safetensors",
        "stage1/retrain/2/result.json", "stage2/supernet/result.json", "stage2/supernet/model.safetensors",
    }  # fmt: skip


# ---- trainings ----


def make_context(tmp_path: Path, stage: str = "pretrain", **earlier: dict[str, object]) -> Context:
    for folder in ("out", "work"):
        (tmp_path / folder).mkdir(exist_ok=True)
    return Context(stage, tmp_path / "out", tmp_path / "work", DATA, "cpu", True, time.time() + 60, earlier)


@pytest.mark.parametrize(("step", "files"), [(3, ["pretrained.safetensors"]), (0, [])])
def test_a_training_that_is_killed_between_steps_still_returns_its_weights(
    step: int, files: list[str], tmp_path: Path
) -> None:
    context = make_context(tmp_path)
    (context.work / "pretrain").mkdir()
    state = {"step": step, "model": {"weight": torch.zeros(2)}, "ema": {"weight": torch.ones(2)}}
    write_tensors(state, context.work / "pretrain" / "last.pt")
    with pytest.raises(SystemExit, match="SIGTERM"), training._kept_weights(context.work / "pretrain", context):
        signal.raise_signal(signal.SIGTERM)
    assert sorted(path.name for path in context.out.iterdir()) == files
    for name in files:
        assert load_file(context.out / name)["weight"].tolist() == [1, 1]
        (context.out / name).unlink()
    assert training._has_pretrained(context) == bool(files)  # as in a second call, on a machine that has emptied `out`
    assert sorted(path.name for path in context.out.iterdir()) == files
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_images_that_waited_in_a_loader_s_queue_are_not_timed(tmp_path: Path) -> None:
    def batches() -> Iterator[int]:
        for number in range(30):
            time.sleep(0 if number < 12 else 0.02)
            yield number

    watch = training._Stopwatch(4, 6, make_context(tmp_path))
    watch.data(batches())
    assert watch.seconds["data"] >= 0.02
    assert len(list(watch.training(batches()))) == 3 + 16 + 4 + 4
    assert watch.seconds["both"] >= 0.02 > watch.seconds["model"]


def test_a_schedule_leaves_time_for_the_start_and_for_each_epoch_s_loader(tmp_path: Path) -> None:
    context = dataclasses.replace(make_context(tmp_path), rehearse=False, deadline=time.time() + 15 + 40 + 100)
    rates = {"both, images/s": 55_000 / 8, "start, s": 40.0, "first batch, s": 2.0}
    recipe = training._fitted("fashion_mnist_gpu", [], tmp_path / "run", context, rates)
    assert recipe.optim.epochs == 8  # of 10 s each, in 85 % of 100 s


def test_images_are_loaded_in_one_process_where_the_shared_memory_is_small() -> None:
    assert training._loading(64.0) == training._loading(None) == []
    recipe = load_recipe("fashion_mnist_gpu", training._loading(0.06))
    assert recipe.augment.batched
    assert recipe.data.num_workers == 0


# ---- a checkout ----


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a checkout")
def test_the_checkout_and_fashion_mnist_fit_into_one_journey() -> None:
    fashion_mnist = 30_900_000  # bytes of the four files
    assert travel.size_of_journey([]) + fashion_mnist < travel.LIMIT


def test_every_stage_of_every_plan_exists_and_says_what_only_a_gpu_runs() -> None:
    for plan in plans.PLANS.values():
        for planned in plan:
            if planned.stage in plans.MODULES:
                assert command._unreached(planned.stage)


# ---- a rehearsal ----


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("plan", ["first", "train", "search", "onnx"])
def test_a_plan_is_rehearsed_on_the_cpu_without_an_error(plan: str, tmp_path: Path) -> None:
    arguments = ["--rehearse", "--plan", plan, "--out", str(tmp_path / "out"), "--data", str(DATA)]
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", *arguments], cwd=ROOT, capture_output=True, text=True, check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    record = json.loads((tmp_path / "out" / "gpu.json").read_text())
    entries = record["plans"][plan]
    assert {entry["status"] for entry in entries.values()} == {"done"}, run.stdout
    assert record["over_limits"] == []
    assert "A rehearsal on a CPU cannot reach:" in run.stdout
    if plan == "first":
        assert entries["correct"]["result"]["failed"] == []
        assert entries["correct"]["result"]["right_forms"] == list(FORMS)
        assert entries["depthwise"]["result"]["finalists"]
        parts = [entries["search"]["result"][name] for name in ("evaluation", "step", "launches")]
        assert all(parts)
        assert all("error" not in row for part in parts for row in part)
        assert all("error" not in row for row in entries["throughput"]["result"]["rows"])
    if plan == "onnx":
        rows = entries["onnx"]["result"]["rows"]
        assert {(row["precision"], row["how"]) for row in rows} == {
            ("fp32", "CPUExecutionProvider"), ("int8", "CPUExecutionProvider"),
            ("fp32", "PyTorch, eager"), ("fp32", "PyTorch, compiled"),
        }  # fmt: skip
        assert all("error" not in row for row in rows), rows
