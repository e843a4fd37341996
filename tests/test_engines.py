"""Tests of searches with an executor: the same result as in one process, even if workers are lost."""

import importlib.util
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from glit_models.search import EXECUTORS, Executor, SearchRun, load_search_recipe
from glit_models.search.executors import TaskLostError
from glit_models.search.executors.dispatch import dispatch, own_versions
from glit_models.search.executors.slurm import SlurmExecutor
from glit_models.search.executors.tasks import KINDS, Task, task_folder
from glit_models.search.run.context import Interrupted, RunContext
from glit_models.search.run.worker import run_task

from glit_models import cli, extensions
from glit_models.errors import SearchError
from glit_models.runs.lock import lock_folder

FIXTURES = Path(__file__).parent / "fixtures"
RECIPE = str(FIXTURES / "search.yaml")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "RAY_DEDUP_LOGS": "0"}
SETTINGS = (f"train.data.root={FIXTURES / 'fashion-mnist'}", "train.data.limit=150")
SMALL = (  # of seconds
    f"train.data.root={FIXTURES / 'fashion-mnist'}", "train.data.limit=60", "method=evolution", "fixed={}",
    "train.optim.epochs=1", "supernet.train.optim.epochs=1", "evolution.generations=2", "final.all_data=false",
    "train.checkpoint_minutes=10",
)  # fmt: skip
SAME = ("*/candidates.jsonl", "*/references.json", "*/front.json", "*/winner.json", "winner.json", "control.json",
        "model/model.safetensors")  # fmt: skip


def _command(out: Path, settings: Sequence[str], *options: str) -> list[str]:
    words = [word for text in settings for word in ("--set", text)]
    return ["search", RECIPE, *words, "--out", str(out), *options]


def _start(out: Path, *options: str) -> subprocess.Popen[bytes]:
    with (out.parent / "log").open("ab") as log:
        command = [sys.executable, "-m", "glit_models", *_command(out, SETTINGS, *options)]
        return subprocess.Popen(command, env=ENVIRONMENT, stdout=log, stderr=log)


def _same_end(run: Path, reference: Path) -> None:
    for pattern in SAME:
        for path in reference.glob(pattern):
            assert (run / path.relative_to(reference)).read_bytes() == path.read_bytes(), path


def _search(out: Path, settings: Sequence[str]) -> Path:
    torch.set_num_threads(1)
    assert SearchRun(load_search_recipe(RECIPE, settings), out, device="cpu", command="glit search").run() is not None
    return out


# ---- tasks, without processes ----


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A search on one process."""
    return _search(tmp_path_factory.mktemp("small") / "run", SMALL)


class InThisProcess(Executor):
    """Does a task when it is asked for it, the last one first; loses as many as it is told to lose."""

    lose = 0

    def start(self) -> int:
        self.stopped: list[str] = []
        return 3

    def submit(self, name: str) -> str:
        return name

    def poll(self, handle: str) -> dict[str, Any] | None:
        if self.lose:
            self.lose -= 1
            raise TaskLostError("its machine is gone")
        return self.run(handle)

    def stop(self, handles: Sequence[str]) -> None:
        self.stopped += handles


def _dispatch(folder: Path, tasks: Sequence[Task], **settings: Any) -> tuple[list[Any], list[str], InThisProcess]:
    said: list[str] = []
    executor = InThisProcess(settings.pop("run", lambda name: {"result": name}), folder, None, {})
    executor.lose = settings.pop("lose", 0)
    with executor:
        results = dispatch(executor, folder, tasks, {}, settings.pop("check_stop", lambda: None), said.append)
    return results, said, executor


TASKS = [Task("score", {"number": number}, f"task {number}") for number in range(3)]


def test_results_come_in_the_order_of_the_tasks_and_lost_tasks_are_started_again(tmp_path: Path) -> None:
    results, said, _ = _dispatch(tmp_path, TASKS, lose=4)
    assert results == [task.name for task in TASKS]
    assert len(said) == 4
    assert said[0] == "task 0: lost (its machine is gone); it is started again"
    assert {path.name for path in (tmp_path / "tasks").iterdir()} == {task.name for task in TASKS}
    _dispatch(tmp_path, TASKS[:1])
    assert [path.name for path in (tmp_path / "tasks").iterdir()] == [TASKS[0].name]  # the others are done with
    with pytest.raises(SearchError, match="task 0: lost 4 times, the last time because its machine is gone"):
        _dispatch(tmp_path, TASKS, lose=1000)


def test_a_task_that_fails_or_a_stop_ends_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop() -> None:
        raise Interrupted("SIGTERM")

    stopped: list[str] = []
    monkeypatch.setattr(InThisProcess, "stop", lambda self, handles: stopped.extend(handles))
    with pytest.raises(Interrupted):
        _dispatch(tmp_path, TASKS, check_stop=stop)
    assert stopped == [task.name for task in TASKS]
    stopped.clear()
    submit = InThisProcess.submit

    def refuse_the_third(self: InThisProcess, name: str) -> Any:
        if name == TASKS[2].name:
            raise SearchError("no room")
        return submit(self, name)

    monkeypatch.setattr(InThisProcess, "submit", refuse_the_third)
    with pytest.raises(SearchError, match=r"^no room$"):
        _dispatch(tmp_path, TASKS)
    monkeypatch.setattr(InThisProcess, "submit", submit)
    assert stopped == [task.name for task in TASKS[:2]]
    stopped.clear()
    failed = {TASKS[1].name: {"error": "no data"}}
    monkeypatch.setattr(InThisProcess, "poll", lambda self, name: failed.get(name))
    with pytest.raises(SearchError, match=r"^no data$"):
        _dispatch(tmp_path, TASKS)
    assert stopped == [TASKS[0].name, TASKS[2].name]


def _written(folder: Path, task: Task, **origin: Any) -> str:
    known = {"versions": own_versions(), "cwd": str(folder), "path": [], "modules": []}
    task.write(folder, {**known, "device": "cpu", "command": None, **origin})
    return task.name


def test_a_worker_says_in_a_line_what_it_lacks(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    report = run_task(str(tmp_path / "elsewhere"), "score-1")
    assert "is not there; all machines must see the search's folder at the same place" in report["error"]
    shutil.copy(small / "recipe.yaml", tmp_path)
    task = Task("test", {"folder": "model"}, "testing")
    report = run_task(str(tmp_path), _written(tmp_path, task, versions={"torch": "0.1"}))
    assert f"torch is {torch.__version__} here, and 0.1 where the search was started" in report["error"]
    recipe = (tmp_path / "recipe.yaml").read_text()
    (tmp_path / "recipe.yaml").write_text(recipe.replace(str(FIXTURES / "fashion-mnist"), "/not/here"))
    report = run_task(str(tmp_path), _written(tmp_path, task))
    assert "/not/here" in report["error"]
    assert "\n" not in report["error"]


def test_a_task_is_done_once_and_waits_for_another_process_at_it(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(small / "recipe.yaml", tmp_path)
    calls: list[Any] = []
    monkeypatch.setitem(KINDS, "score", lambda context, **arguments: calls.append(arguments) or [0.5])
    name = _written(tmp_path, TASKS[0])
    held = [lock_folder(task_folder(tmp_path, name))]
    monkeypatch.setattr(time, "sleep", lambda seconds: held.pop().close())
    assert run_task(str(tmp_path), name) == {"result": [0.5]}
    assert "waiting for another process that does the task" in capsys.readouterr().err
    assert run_task(str(tmp_path), name) == {"result": [0.5]}
    assert calls == [TASKS[0].arguments]
    monkeypatch.setitem(KINDS, "test", lambda context: 1 / 0)
    bug = run_task(str(tmp_path), _written(tmp_path, Task("test", {}, "a bug")))
    assert "ZeroDivisionError: division by zero" in bug["error"]


@pytest.mark.parametrize("is_large", [False, True])
@pytest.mark.parametrize("fitness", ["inherited", "inherited_loss"])
def test_networks_or_images_are_divided_and_the_scores_are_those_of_one_process(
    is_large: bool, fitness: str, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_search_recipe(RECIPE, [*SMALL, f"fitness={fitness}"])
    shutil.copytree(small / "joint" / "supernet", tmp_path / "joint" / "supernet")
    stage = SearchRun(recipe, tmp_path, "cpu").stages[0]
    specs = stage.search.ask()
    alone = stage._score(specs, None)
    assert alone == stage.fitness().evaluate(specs)
    context, done = stage.context, []

    def run(tasks: list[Task]) -> list[Any]:  # each worker with a supernet of its own
        results = {}
        for task in reversed(tasks):
            stage.release()
            results[task.name] = json.loads(json.dumps(KINDS[task.kind](context, **task.arguments)))
            done.append((task.kind, len(task.arguments["specs"]), task.arguments["batches"]))
        return [results[task.name] for task in tasks]

    context.executor = InThisProcess(lambda name: {}, tmp_path, None, {})
    context.executor.num_workers = 2
    monkeypatch.setattr(context, "run", run)
    monkeypatch.setattr(RunContext, "keeps_images", lambda self, space: not is_large)
    assert stage._score(specs, None) == alone
    by_images = [("score_batches", 6, (2, 3)), ("score_batches", 6, (0, 2))]
    assert done == (by_images if is_large else [("score", 3, None)] * 2)


def test_a_worker_reads_its_own_images_only(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(small / "joint" / "supernet", tmp_path / "joint" / "supernet")
    stage = SearchRun(load_search_recipe(RECIPE, SMALL), tmp_path, "cpu").stages[0]
    evaluator = stage.fitness().evaluator  # type: ignore[attr-defined]
    specs = stage.search.ask()[:2]
    read = []
    batches = evaluator._images["search"].batches
    monkeypatch.setitem(evaluator._images, "search", type(evaluator._images["search"])(
        lambda wanted: read.append(wanted) or batches(wanted), 3
    ))  # fmt: skip
    parts = evaluator.sums(specs, range(1, 3))
    assert parts.shape == (2, 2, 2)
    evaluator.sums(specs, range(1, 3))
    assert torch.equal(evaluator.sums(specs, range(2, 3)), parts[:, 1:])
    assert read == [range(1, 3)]


# ---- the command ----


def test_the_local_engine_finds_the_same_and_leaves_no_process(
    small: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for module in list(extensions.IMPORTED):  # by other tests in this process, from folders that workers do not have
        monkeypatch.delitem(extensions.IMPORTED, module)
    out = tmp_path / "run"
    options = ("--engine", "local", "--workers", "2", "--device", "cpu")
    assert cli.main(_command(out, SMALL, *options)) == 0
    _same_end(out, small)
    err = capfd.readouterr().err
    assert "[worker 1] joint: training the supernet" in err
    assert "done, 2 of 2: joint: retraining network" in err
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
    commands = [Path(f"/proc/{child}/cmdline").read_text() for child in children if Path(f"/proc/{child}").exists()]
    assert not [command for command in commands if "spawn_main" in command]


def test_what_no_engine_can_do_is_said_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    for options, message in (
        (["--engine", "kubernetes"], "unknown engine 'kubernetes'; known: local, ray, slurm, or module:Name"),
        (["--workers", "2"], "--workers, --address and --engine-options need --engine"),
        (["--engine", "local", "--engine-options", "num_gpus=1"], "engine local takes no options, got num_gpus"),
        (["--engine", "local", "--workers", "0"], "workers must be at least 1, got 0"),
        (["--engine", "local", "--set", "budget.latency_ms.high=5"], "budget.latency_ms cannot be used on several"),
    ):
        assert cli.main(_command(out, SMALL, *options)) == 2
        assert message in capsys.readouterr().err
    assert not (out / "recipe.yaml").exists()
    assert list(EXECUTORS) == ["local", "ray", "slurm"]


@pytest.mark.skipif(importlib.util.find_spec("submitit") is None, reason="submitit is not installed")
def test_a_machine_without_slurm_is_said_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options, message in (
        ([], 'engine slurm: Could not detect "srun", are you indeed on a slurm cluster?'),
        (["--engine-options", "cluster=local", "gpus=3"], "engine slurm: "),
    ):
        assert cli.main(_command(tmp_path / "run", SMALL, "--engine", "slurm", *options)) == 2
        assert message in capsys.readouterr().err


@pytest.mark.skipif(importlib.util.find_spec("submitit") is None, reason="submitit is not installed")
def test_a_job_that_slurm_refuses_is_said_in_a_line(tmp_path: Path) -> None:
    from submitit.core.utils import FailedJobError

    def refuse(call: object) -> None:
        raise FailedJobError("exit status 1\nsbatch: error: invalid partition specified: typo\n")

    with SlurmExecutor(lambda name: {}, tmp_path, None, {"cluster": "local"}) as executor:
        executor._executor = SimpleNamespace(submit=refuse)
        with pytest.raises(SearchError, match=r"^engine slurm: sbatch: error: invalid partition specified: typo$"):
            executor.submit("task")


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")
@pytest.mark.slow
def test_a_cluster_that_is_not_there_is_said_in_a_line(tmp_path: Path) -> None:
    for address in ("127.0.0.1:1", "auto"):
        began = time.monotonic()
        command = [sys.executable, "-m", "glit_models", *_command(tmp_path / "run", SMALL, "--engine", "ray")]
        ended = subprocess.run([*command, "--address", address], env=ENVIRONMENT, capture_output=True, text=True)
        assert ended.returncode == 2
        assert ended.stderr.startswith(f"glit: no Ray cluster at {address}: ")
        assert ended.stderr.count("\n") == 1
        assert time.monotonic() - began < 60


# ---- engines that others wrote, and kills ----


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A search in two stages, on one process."""
    return _search(tmp_path_factory.mktemp("search") / "run", SETTINGS)


PHASES = [
    "stage1/supernet/metrics.jsonl", "stage1/supernet/result.json", "stage1/evolution.json",
    "stage1/retrain/1/metrics.jsonl", "stage2/supernet/metrics.jsonl", "stage2/evolution.json",
    "stage2/retrain/2/metrics.jsonl", "final/metrics.jsonl",
]  # fmt: skip


def _in_each_phase(out: Path, process: subprocess.Popen[bytes], chance: random.Random) -> Iterator[str]:
    """The phases of a search, at a random moment of each."""
    for phase in PHASES:
        while not (out / phase).exists() and process.poll() is None:
            time.sleep(0.02)
        time.sleep(chance.uniform(0, 1.5))
        if process.poll() is None:
            yield phase


def _ended(process: subprocess.Popen[bytes], out: Path) -> str:
    assert process.wait(timeout=600) == 0, (out.parent / "log").read_text()[-3000:]
    return (out.parent / "log").read_text()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_ray_cluster_that_loses_a_node_in_every_phase_finds_the_same(finished: Path, tmp_path: Path) -> None:
    cluster_utils = pytest.importorskip("ray.cluster_utils")
    import ray

    cluster = cluster_utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        nodes = [cluster.add_node(num_cpus=1) for _ in range(3)]
        ray.init(address=cluster.address, log_to_driver=False)
        out, chance, lost = tmp_path / "run", random.Random(0), []
        options = ["--engine", "ray", "--address", cluster.address, "--engine-options", "max_retries=-1"]
        process = _start(out, *options)
        for phase in _in_each_phase(out, process, chance):
            free = ray._private.state.available_resources_per_node()
            busy = [node for node in nodes if not free.get(node.node_id, {}).get("CPU")]
            node = chance.choice(busy or nodes)
            nodes.remove(node)
            cluster.remove_node(node, allow_graceful=False)
            lost += [phase] if busy else []
            nodes.append(cluster.add_node(num_cpus=1))
        log = _ended(process, out)
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert len(lost) >= 4, lost  # with a task on it
    assert "resuming from step" in log
    _same_end(out, finished)


def _kill_a_worker(process: subprocess.Popen[bytes], is_worker: Callable[[str], bool], chance: random.Random) -> bool:
    """Kill one of the processes below this one."""
    found, below = [], [process.pid]
    for pid in below:
        try:
            below += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
            if is_worker(Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")):
                found.append(pid)
        except OSError:  # it has ended
            continue
    if found:
        os.kill(chance.choice(found), signal.SIGKILL)
    return bool(found)


@pytest.mark.extended
@pytest.mark.timeout(900)
@pytest.mark.parametrize("engine", ["local", "slurm"])
def test_workers_killed_in_every_phase_find_the_same(engine: str, finished: Path, tmp_path: Path) -> None:
    options = ["--engine", engine, "--workers", "2", "--device", "cpu"]
    if engine == "slurm":
        pytest.importorskip("submitit")
        options += ["--engine-options", "cluster=local"]
    word = {"local": "spawn_main", "slurm": "submitit.core._submit"}[engine]
    out, chance = tmp_path / "run", random.Random(0)
    process = _start(out, *options)
    kills = [
        _kill_a_worker(process, lambda command: word in command, chance)
        for _ in _in_each_phase(out, process, chance)
    ]  # fmt: skip
    log = _ended(process, out)
    assert sum(kills) >= 4
    assert "it is started again" in log
    _same_end(out, finished)


@pytest.mark.extended
@pytest.mark.timeout(900)
def test_the_process_that_asks_is_stopped_and_killed_and_another_engine_goes_on(finished: Path, tmp_path: Path) -> None:
    out, chance = tmp_path / "run", random.Random(1)
    for number, wait in enumerate((PHASES[0], PHASES[2], PHASES[3], PHASES[4])):
        process = _start(out, "--engine", "local", "--workers", "2", "--device", "cpu")
        while not (out / wait).exists() and process.poll() is None:
            time.sleep(0.02)
        time.sleep(chance.uniform(0, 0.5))
        process.send_signal(signal.SIGKILL if number % 2 else signal.SIGTERM)
        assert process.wait(timeout=60) == (-signal.SIGKILL if number % 2 else 128 + signal.SIGTERM)
    log = (tmp_path / "log").read_text()
    assert log.count("the search was stopped by SIGTERM; run the same command to resume") == 2
    _search(out, SETTINGS)  # in this process; it waits for nobody
    _same_end(out, finished)
