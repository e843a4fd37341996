"""Promises of how a run fits its machine: memory, threads, time."""

import itertools
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from glit_models.activations import count_bytes
from glit_models.errors import TrainingError
from glit_models.training import Trainer, load_recipe, machine
from glit_models.training.machine import Pace, accumulation_for_memory, choose_threads, even_accumulation
from glit_models.training.recipe import Recipe

FIXTURES = Path(__file__).parent / "fixtures"


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def _tiny(*overrides: str) -> Recipe:
    return load_recipe(str(FIXTURES / "tiny.yaml"), [f"data.root={FIXTURES / 'fashion-mnist'}", *overrides])


def _limit(trainer: Trainer, most: int) -> None:
    """Let the model fail on more images than this, as torch does where memory is short."""

    def refuse(module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        if len(inputs[0]) > most:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes")

    trainer.model.register_forward_pre_hook(refuse)


def test_a_batch_that_does_not_fit_is_cut_and_the_run_goes_on_exactly_after_a_stop(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    recipe = _tiny("optim.epochs=2", "data.limit=60")
    size = recipe.optim.batch_size
    first = Trainer(recipe, tmp_path / "whole", "cpu")
    _limit(first, size // 3)
    result = first.run()
    assert result is not None
    assert result["micro_batch"] == size // 3  # halves would be odd, which mixup does not take
    said = capsys.readouterr().err
    assert f"each batch of {size} images is trained on in 3 parts one by one" in said

    second = Trainer(recipe, tmp_path / "stopped", "cpu", max_minutes=0.0)
    _limit(second, size // 3)
    while second.run() is None:
        second = Trainer(recipe, tmp_path / "stopped", "cpu")  # which does not fail: the parts are in the checkpoint
        assert not second.progress.accumulation
    assert second.progress.accumulation == 3
    whole, stopped = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "stopped"))
    for key, value in whole.items():
        assert torch.equal(value, stopped[key]), key


def test_where_one_image_is_too_much_it_is_one_line_and_other_errors_are_not_hidden(tmp_path: Path):
    trainer = Trainer(_tiny("augment.cutmix=0.5"), tmp_path / "none", "cpu")
    _limit(trainer, 0)
    with pytest.raises(TrainingError, match="too short for 2 images at a time; a smaller model.img_size or model"):
        trainer.run()
    trainer = Trainer(_tiny(), tmp_path / "other", "cpu")
    trainer.model.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("shapes differ")))
    with pytest.raises(RuntimeError, match="shapes differ"):
        trainer.run()


def test_scoring_takes_fewer_images_at_a_time_where_memory_is_short(tmp_path: Path):
    trainer = Trainer(_tiny("data.hold_out=50"), tmp_path, "cpu")
    whole = trainer.selection.score(trainer.model, trainer.feed, trainer.splits.validation)
    _limit(trainer, 40)
    assert trainer.selection.score(trainer.model, trainer.feed, trainer.splits.validation) == whole
    assert trainer.feed.eval_batch_size <= 40


def test_the_parts_of_a_batch_are_chosen_by_the_memory_that_is_free(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    recipe = _tiny("optim.batch_size=60")
    trainer = Trainer(recipe, tmp_path, "cpu")
    before = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    model, cpu = trainer.model, torch.device("cpu")
    assert accumulation_for_memory(recipe, model, cpu) == 1
    shape = model.in_chans, recipe.model.img_size, recipe.model.img_size
    assert 50_000 < count_bytes(model, (1, *shape), training=True) < count_bytes(model, (2, *shape), training=True)
    moments = 2 * sum(4 * parameter.numel() for parameter in model.parameters())
    monkeypatch.setattr(machine, "free_memory", lambda: moments)
    assert accumulation_for_memory(_tiny("optim.batch_size=60", "augment.cutmix=1"), model, cpu) == 30
    for images, parts in ((60, 1), (31, 2), (14, 5), (1, 30)):
        free = (moments + 1.01 * count_bytes(model, (images, *shape), training=True)) / 0.8
        monkeypatch.setattr(machine, "free_memory", lambda free=free: int(free))
        assert accumulation_for_memory(_tiny("optim.batch_size=60", "augment.cutmix=1"), model, cpu) == parts
    free = (moments + 0.6 * 1.01 * count_bytes(model, (60, *shape), training=True)) / 0.8
    monkeypatch.setattr(machine, "free_memory", lambda: int(free))
    for precision, parts in (("bf16", 1), ("fp32", 2)):
        keys = "optim.batch_size=60", "augment.cutmix=1", f"precision={precision}"
        assert accumulation_for_memory(_tiny(*keys), model, cpu) == parts
    monkeypatch.setattr(machine, "count_bytes", lambda *_, **__: None)  # a model that cannot run without data
    assert accumulation_for_memory(_tiny("optim.batch_size=60", "optim.grad_accumulation=2"), model, cpu) == 2
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert even_accumulation(_tiny("optim.batch_size=25", "augment.mixup=0"), 2) == 5


def test_threads_leave_busy_cores_alone_unless_a_number_is_given(monkeypatch: pytest.MonkeyPatch):
    chosen: list[int] = []
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(os, "getloadavg", lambda: (6.0, 6.0, 6.0))
    seconds, idle = itertools.count(), itertools.count()
    monkeypatch.setattr(machine, "time", SimpleNamespace(sleep=lambda _: None, monotonic=lambda: float(next(seconds))))
    monkeypatch.setattr(machine, "_idle_seconds", lambda: 2.0 * next(idle))  # of 2 cores
    line = choose_threads()
    assert line is not None
    assert "as other programs keep 6.0 cores busy" in line
    assert chosen == [2]
    assert "1 thread as before" in str(choose_threads(before=1))
    monkeypatch.setattr(machine, "_idle_seconds", lambda: 8.0 * next(idle))  # all of them: the load has just ended
    assert choose_threads() is None
    monkeypatch.setattr(os, "getloadavg", lambda: (0.1, 9.0, 9.0))
    assert choose_threads() is None
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    assert choose_threads(before=1) is None
    assert len(chosen) == 2


def test_the_whole_time_is_told_once_from_the_first_steps(monkeypatch: pytest.MonkeyPatch):
    now = [0.0]
    monkeypatch.setattr(machine.time, "monotonic", lambda: now[0])

    def told(steps_per_epoch: int, seconds: float, epochs: int = 10) -> list[str]:
        recipe = _tiny(f"optim.epochs={epochs}", "optim.batch_size=100")
        pace, lines = Pace(recipe, steps_per_epoch, num_scored=300), []
        for step in range(1, 40):
            now[0] += seconds
            lines.append(pace.after(step))
        return [line for line in lines if line is not None]

    assert told(steps_per_epoch=100, seconds=1.0) == ["about 17 minutes"]  # 989 steps, 10 scorings of one each
    assert told(steps_per_epoch=1000, seconds=3.0) == ["about 8.3 hours"]
    assert told(steps_per_epoch=4, seconds=0.1) == ["about 2 seconds"]


def test_a_recipe_may_say_how_many_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    chosen: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    trainer = Trainer(_tiny("threads=3", "optim.epochs=1"), tmp_path, "cpu", max_minutes=0.0, fits_threads=True)
    assert trainer.run() is None
    assert chosen == [3]
