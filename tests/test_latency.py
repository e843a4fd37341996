"""Tests of latency budgets: repeatable numbers, also in a later process, and no side effects."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from glit_models.search import Budget, BudgetSampler, glit_released, latency_budget
from glit_models.search.spaces import latency
from specs import SMALL

from glit_models import GLiT, GLiTSpec
from glit_models.errors import SearchError

OTHER = GLiTSpec(SMALL.blocks[::-1], 48, 3)
CONDITIONS = {"img_size": 32, "num_classes": 10, "rounds": 2}


@pytest.fixture
def budget(tmp_path: Path) -> Callable[..., Budget]:
    def make(**changes: object) -> Budget:
        return latency_budget(**{**CONDITIONS, "cache": tmp_path / "latency.json", **changes})

    return make


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], object]]:
    """What is measured, in a time that is never the same twice."""
    runs: list[Callable[[], object]] = []

    def milliseconds(run: Callable[[], object], rounds: int) -> float:
        runs.append(run)
        return float(len(runs))

    monkeypatch.setattr(latency, "_milliseconds", milliseconds)
    return runs


def test_a_network_takes_milliseconds_that_are_recorded(budget, tmp_path: Path) -> None:
    cost = budget().cost(SMALL)
    ((conditions, times),) = json.loads((tmp_path / "latency.json").read_text()).items()
    assert times == {SMALL.to_json(indent=None): cost}
    assert 0.01 < cost < 10_000
    assert json.loads(conditions)["torch"] == torch.__version__
    assert json.loads(conditions)["device"].startswith("cpu, ")


def test_a_network_is_measured_once_also_by_a_search_that_is_resumed(budget, measured: list) -> None:
    first = budget()
    assert [first.cost(SMALL), first.cost(OTHER), first.cost(SMALL)] == [1, 2, 1]
    assert [budget().cost(spec) for spec in (OTHER, SMALL)] == [2, 1]
    assert len(measured) == 2


def test_equal_networks_have_equal_costs_however_their_numbers_are_written(budget, measured: list) -> None:
    fields = SMALL.to_dict()
    blocks = [{**block, "mlp_ratio": float(block["mlp_ratio"])} for block in fields["blocks"]]
    floats = GLiTSpec.from_dict({**fields, "blocks": blocks})
    assert floats == SMALL
    assert budget().cost(floats) == budget().cost(SMALL)


def test_two_searches_may_share_the_file(budget, measured: list) -> None:
    one, other = budget(), budget()
    assert [one.cost(SMALL), other.cost(OTHER), one.cost(OTHER), other.cost(SMALL)] == [1, 2, 2, 1]
    assert len(measured) == 2


@pytest.mark.parametrize("change", [{"img_size": 48}, {"batch_size": 2}, {"threads": 2}, {"num_classes": 3}], ids=str)
def test_other_conditions_are_measured_anew(budget, measured: list, change: dict) -> None:
    assert [budget().cost(SMALL), budget(**change).cost(SMALL), budget().cost(SMALL)] == [1, 2, 1]


def test_the_network_that_is_timed_is_the_one_that_would_be_used(budget, measured: list) -> None:
    budget(img_size=(32, 48), batch_size=2).cost(SMALL)
    called: list[tuple[torch.nn.Module, torch.Size]] = []
    hook = torch.nn.modules.module.register_module_forward_hook(
        lambda module, inputs, output: called.append((module, inputs[0].shape))
    )
    with hook:
        measured[0]()
    model, shape = called[-1]  # the outermost ends last
    assert isinstance(model, GLiT)
    assert shape == (2, 3, 32, 48)
    assert not model.training
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules())


def test_another_runtime_is_timed_and_remembered_by_its_name(budget, tmp_path: Path) -> None:
    asked, ran = [], []

    def prepare(model: GLiT, batch_size: int, threads: int, device: str) -> Callable[[], object]:
        asked.append((model.spec, batch_size, threads, device))
        return lambda: ran.append(1)

    budget().cost(SMALL)
    cost = budget(runtime="other", prepare=prepare, batch_size=2, threads=3).cost(SMALL)
    assert cost < budget().cost(SMALL)  # it does nothing
    assert asked == [(SMALL, 2, 3, "cpu")]
    assert len(ran) > CONDITIONS["rounds"]
    conditions = [json.loads(text)["runtime"] for text in json.loads((tmp_path / "latency.json").read_text())]
    assert conditions == ["torch", "other"]


def test_threads_and_random_numbers_of_the_search_stay_as_they_were(budget) -> None:
    threads = torch.get_num_threads()
    state = torch.random.get_rng_state()
    budget(threads=threads + 1).cost(SMALL)
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.random.get_rng_state(), state)


def test_threads_come_back_after_a_failure_too(budget, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(run: Callable[[], object], rounds: int) -> float:
        raise MemoryError

    threads = torch.get_num_threads()
    monkeypatch.setattr(latency, "_milliseconds", fail)
    with pytest.raises(MemoryError):
        budget(threads=threads + 1).cost(SMALL)
    assert torch.get_num_threads() == threads


def test_random_networks_are_drawn_within_it(budget, measured: list) -> None:
    space = glit_released(48, 3, 2)
    sampler = BudgetSampler(space, [budget(low=2)])
    specs = {sampler.sample(random.Random(seed))[0] for seed in range(5)}
    assert specs
    assert all(budget().cost(spec) >= 2 for spec in specs)


@pytest.mark.parametrize(
    "content",
    [b"{", b"[]", b"3", b'{"a": 3}', b'{"a": {"b": "c"}}', b'{"a": {"b": -1}}', b'{"a": {"b": NaN}}', b"\xff"],
)
def test_a_damaged_file_is_named_in_one_line_and_left_alone(budget, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "latency.json"
    path.write_bytes(content)
    with pytest.raises(SearchError) as error:
        budget().cost(SMALL)
    assert str(error.value).startswith(f"{path} is damaged, remove it to measure again: ")
    assert "\n" not in str(error.value)
    assert path.read_bytes() == content


def test_a_file_that_cannot_be_written_is_named(budget, measured: list, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SearchError, match=r"latency.json cannot be (read|written): Not a directory$"):
        budget(cache=tmp_path / "file" / "latency.json").cost(SMALL)
    with pytest.raises(SearchError, match=r"cannot be read: Is a directory$"):
        budget(cache=tmp_path).cost(SMALL)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, "batch_size must be an integer of at least 1, got 0"),
        ({"threads": 1.5}, "threads must be an integer of at least 1, got 1.5"),
        ({"rounds": 0}, "rounds must be an integer of at least 1, got 0"),
        ({"device": "abacus"}, "device abacus cannot be used: "),
        ({"device": "cuda:99"}, "device cuda:99 cannot be used: "),
        ({"low": 3, "high": 2}, "budget latency_ms.low must be at most high=2, got 3"),
    ],
)
def test_what_cannot_be_measured_is_named_before_anything_is(budget, change: dict, message: str) -> None:
    with pytest.raises(SearchError) as error:
        budget(**change)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)
