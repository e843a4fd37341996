"""Stages pretrain, few_labels, fine_tune, scratch and deit: trainings that use the available time.

The speed is measured first, to fit the schedule to the time. A run that a call did not finish is resumed in the next
one, from its checkpoint if the machine is the same, else from the returned weights.
"""

from __future__ import annotations

import filecmp
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import islice, repeat
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from glit_models.runs.files import whole_file
from glit_models.runs.state import StateFiles, read_tensors
from glit_models.training import Recipe, Trainer, load_recipe, setup
from glit_models.weights.files import write_state_dict
from glit_models.weights.folder import save_folder

from ..depthwise_forms import FORMS, use_form
from ..few_labels import finished_row
from .choice import CURRENT
from .context import Context, Result
from .environment import shared_memory_gib

_ON_GPU = ("images drawn on the GPU beside the training", "torch.compile and bfloat16 in the trainer")
CUDA_ONLY = {
    "pretrain": _ON_GPU,
    "few_labels": ("several trainings at the same time on one GPU",),
    "fine_tune": ("14 processes that load images", "bfloat16"),
    "scratch": ("as fine_tune",),
    "deit": ("as fine_tune",),
}

PRETRAINED = "pretrained.safetensors"
_SAFETY = 0.85  # of the measured rate, for validation, checkpoints and a slower start
_START = "start, s"  # to create a trainer and for its first steps, which compile
_FIRST_BATCH = "first batch, s"  # of every epoch, whose loader starts its processes again
_EXPORT_SECONDS = 15.0  # for writing and scoring the weights
_LOADER_GIB = 10.0  # two batches of 512 images for each of 14 processes are 8 GiB
_TINY = (
    "model.img_size=32", "optim.batch_size=20", "optim.warmup_epochs=0", "optim.ema_decay=0.9", "precision=fp32",
    "model.compile=false", "eval_batch_size=50", "optim.lr_base_batch=null", "optim.lr=1e-3",
)  # fmt: skip


def _tiny(context: Context) -> list[str]:
    """Overrides that make a recipe small enough for a rehearsal; the last is the network."""
    path = context.work / "tiny.json"
    path.write_text(context.spec().to_json(), encoding="utf-8")
    return [*_TINY, f"model.spec={path}"]


# ---- pretraining ----


def run_pretrain(context: Context) -> Result:
    """Run the recipe `fractal_pretrain` with the chosen form of the convolution; returns its weights in float16."""
    overrides = ["checkpoint_minutes=0.5"]
    if context.rehearse:
        overrides += [*_tiny(context), "data.fractals.num_classes=20", "data.fractals.instances=10"]
    start = _carried_weights(context, 1000 if not context.rehearse else 20)
    if start is not None:
        overrides += [f"model.name=local-dir:{start}", "model.pretrained=true"]
    form = context.chosen_form("training")
    result: Result = {"form": form, "started_from": "random weights" if start is None else PRETRAINED}
    folder = context.work / "pretrain"
    rates = measure_rates("fractal_pretrain", overrides, folder, context, form)
    context.save(result := result | rates)
    result |= _train("fractal_pretrain", overrides, folder, context, form, rates)
    return result | {"weights": PRETRAINED}


def _carried_weights(context: Context, num_classes: int) -> Path | None:
    """The weights of an earlier call as a model folder, unless this plan's run has a checkpoint here."""
    if not _has_pretrained(context):
        return None
    if (context.work / "pretrain" / "last.pt").is_file() and not (context.work / "pretrain" / "result.json").is_file():
        return _folder_of_run(context)
    return _model_folder(context, num_classes)


def _has_pretrained(context: Context) -> bool:
    """Whether the results hold pretrained weights; if the folder was emptied since, they are copied from `work`."""
    returned, kept = context.out / PRETRAINED, context.work / PRETRAINED
    if not returned.is_file() and kept.is_file():
        shutil.copyfile(kept, returned)
    return returned.is_file()


def _folder_of_run(context: Context) -> Path | None:
    """The initial weights of the resumed run."""
    name = load_recipe(str(context.work / "pretrain" / "recipe.yaml")).model.name
    return Path(name.removeprefix("local-dir:")) if name.startswith("local-dir:") else None


def _model_folder(context: Context, num_classes: int) -> Path:
    """Create a folder that timm loads from `pretrained.safetensors`."""
    weights = load_file(context.out / PRETRAINED)
    recipe = load_recipe("fractal_pretrain", _tiny(context) if context.rehearse else ())
    model = setup.create_model(recipe.model, num_classes)
    model.load_state_dict(weights)
    folder = context.work / f"carried-{int(time.time())}"
    names = [f"fractal_{number}" for number in range(num_classes)]
    mean_std = {"mean": recipe.data.mean, "std": recipe.data.std}
    save_folder(model.eval(), folder, class_names=names, data_config=mean_std, dtype="float16")
    return folder


def measure_rates(name: str, overrides: list[str], folder: Path, context: Context, form: str) -> dict[str, float]:
    """Measure in a temporary run: images per second of the data, of the model, and of both; seconds until the start."""
    recipe = load_recipe(name, [*overrides, *_data(name, context), "optim.epochs=1", "optim.warmup_epochs=0"])
    scratch = folder.with_name(f"{folder.name}-rates")
    shutil.rmtree(scratch, ignore_errors=True)
    workers = 0 if recipe.data.dataset == "fractals" or recipe.augment.batched else recipe.data.num_workers
    watch = _Stopwatch(2 if context.rehearse else max(20, 2 * workers), workers, context)
    with ExitStack() as stack:
        began = time.perf_counter()
        trainer = Trainer(recipe, scratch, context.device, score_test=False)
        if form != CURRENT:
            stack.enter_context(use_form(trainer.model, FORMS[form]))
        steps = trainer.feed.steps
        built = time.perf_counter() - began
        watch.data(steps(0, 0))
        trainer.feed.steps = lambda epoch, first: watch.training(steps(epoch, first))  # type: ignore[method-assign]
        trainer.run()
    shutil.rmtree(scratch, ignore_errors=True)
    rates = {f"{case}, images/s": recipe.optim.batch_size / took for case, took in watch.seconds.items()}
    return rates | {_START: built + watch.first_steps, _FIRST_BATCH: watch.first_batch}


class _Stopwatch:
    """Seconds per step, from requesting a batch to requesting the next one.

    Args:
        steps: number of timed steps.
        workers: number of processes that load images. The first batches do not count, because two of each process wait
            in a queue.
    """

    def __init__(self, steps: int, workers: int, context: Context) -> None:
        self.steps, self.queued, self.context = steps, 2 * workers + 4 * bool(workers), context
        self.seconds: dict[str, float] = {}
        self.first_batch = self.first_steps = 0.0  # seconds in total

    def data(self, batches: Iterator[Any]) -> None:
        """Seconds per batch, for the batches alone."""
        began = time.perf_counter()
        next(batches)
        self._synchronize()
        self.first_batch = time.perf_counter() - began
        _skip(batches, self.queued)
        with self._timed("data"):
            _skip(batches, self.steps)

    def training(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Batches for warm-up, for timing both together, and one repeated batch for timing the model."""
        began = time.perf_counter()
        yield from islice(batches, 3)  # compiles
        self._synchronize()
        self.first_steps = time.perf_counter() - began
        yield from islice(batches, self.queued)
        with self._timed("both"):
            yield from islice(batches, self.steps)
        fixed = next(batches)
        with self._timed("model"):
            yield from repeat(fixed, self.steps)

    @contextmanager
    def _timed(self, case: str) -> Iterator[None]:
        """Average over several consecutive steps, which a GPU may overlap."""
        self._synchronize()
        began = time.perf_counter()
        yield
        self._synchronize()
        self.seconds[case] = (time.perf_counter() - began) / self.steps

    def _synchronize(self) -> None:
        if self.context.device.startswith("cuda"):
            torch.cuda.synchronize()


def _skip(batches: Iterator[Any], count: int) -> None:
    for _ in islice(batches, count):
        pass


def _data(name: str, context: Context) -> list[str]:
    return [] if name == "fractal_pretrain" else [f"data.root={context.data}"]


def _train(
    name: str, overrides: list[str], folder: Path, context: Context, form: str, rates: dict[str, float]
) -> Result:
    """Train for the remaining time, with a schedule of that length, and write the weights."""
    recipe = _fitted(name, [*overrides, *_data(name, context)], folder, context, rates)
    with ExitStack() as stack:
        stack.enter_context(_kept_weights(folder, context))
        trainer = Trainer(recipe, folder, context.device)
        if form != CURRENT:
            stack.enter_context(use_form(trainer.model, FORMS[form]))
        # Its clock starts with the run, so the time that it took to create the trainer is no longer in it.
        trainer.stop.max_minutes = max(context.seconds_left - _EXPORT_SECONDS, 1) / 60
        result = trainer.run()
    images = trainer.step * recipe.optim.batch_size
    return {
        "finished": result is not None, "steps": trainer.step, "images": images, "epochs": recipe.optim.epochs,
        "scores": result, "recipe": recipe.to_dict(),
    }  # fmt: skip


@contextmanager
def _kept_weights(folder: Path, context: Context) -> Iterator[None]:
    """Write the weights to the results when the training ends, also by an error or SIGTERM outside of its steps."""

    def stop(number: int, frame: object) -> None:
        sys.exit("stopped by SIGTERM")

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        name = PRETRAINED if folder.name == "pretrain" else f"{folder.name}.safetensors"
        _write_weights(folder, [context.work / name, context.out / name])
        signal.signal(signal.SIGTERM, previous)


def _write_weights(run: Path, targets: Sequence[Path]) -> None:
    """Write the best weights of a finished run in float16, else the averaged ones of its last checkpoint, if any."""
    if (run / "result.json").is_file():
        weights = load_file(run / "best.safetensors")
    else:
        state = StateFiles(run / "last.pt", run / "previous.pt").load(read_tensors)
        if state is None or state["step"] == 0:
            return
        weights = state["ema"] or state["model"]
    half = {key: t.half() if t.is_floating_point() else t for key, t in weights.items()}
    for target in targets:
        with whole_file(target) as path:
            write_state_dict(half, path)


def _fitted(name: str, overrides: list[str], folder: Path, context: Context, rates: dict[str, float]) -> Recipe:
    """The recipe with as many epochs as fit; a resumed run keeps its number."""
    if (folder / "last.pt").is_file() and not (folder / "result.json").is_file():
        return load_recipe(str(folder / "recipe.yaml"))
    if (folder / "result.json").is_file():  # a new schedule from the weights of the last one
        shutil.rmtree(folder)
    one = load_recipe(name, overrides)
    fractals = one.data.fractals
    images = fractals.num_classes * fractals.instances if one.data.dataset == "fractals" else 55_000
    seconds = context.seconds_left - rates[_START] - _EXPORT_SECONDS
    epochs = int(_SAFETY * seconds / (images / rates["both, images/s"] + rates[_FIRST_BATCH]))
    epochs = 1 if context.rehearse else min(max(epochs, 1), one.optim.epochs)
    warmup = min(one.optim.warmup_epochs, 0.1 * epochs)
    more = [f"optim.epochs={epochs}", f"optim.warmup_epochs={warmup}", f"eval_every={max(epochs // 3, 1)}"]
    return load_recipe(name, [*overrides, *more])


# ---- evaluation of the weights ----


def run_few_labels(context: Context) -> Result:
    """Run `benchmarks.few_labels` with the new weights, the shipped ones and none, in several processes."""
    starts = ["glit_tiny.fractal1k", *_new_weights(context)]
    budgets, seeds = ([(100, 1)], range(1)) if context.rehearse else ([(600, 10), (600, 40)], range(3))
    command = [
        sys.executable, "-m", "benchmarks.few_labels", "--json", "--threads", "1", "--device", context.device,
        "--out", str(context.work / "few_labels"), "--root", str(context.data), "--weights", *starts,
        "--budgets", ",".join(f"{labels}x{epochs}" for labels, epochs in budgets), "--rounds", str(len(seeds)),
    ]  # fmt: skip
    if context.rehearse:
        command += ["--set", "data.hold_out=100", "--set", "precision=fp32", "--set", "model.img_size=32"]
    count = 1 if context.rehearse else max((os.cpu_count() or 2) - 2, 1)
    processes = [subprocess.Popen(command, stdout=subprocess.DEVNULL) for _ in range(count)]
    running = True
    while running:
        running = any(process.poll() is None for process in processes)
        rows = [finished_row(context.work / "few_labels", *budget, starts, seeds) for budget in budgets]
        context.save(result := {"rows": rows, "new_weights": len(starts) > 1})
        time.sleep(0.5)
    failed = [process.returncode for process in processes if process.returncode]
    if failed:
        raise RuntimeError(f"{len(failed)} of {count} processes of benchmarks.few_labels failed: {failed}")
    return result


def _new_weights(context: Context) -> list[str]:
    """The pretrained weights as a model folder, if there are any. Removes the runs that started from other ones."""
    if not _has_pretrained(context):
        return []
    folder, runs = context.work / "new_weights", context.work / "few_labels"
    weights, used = context.out / PRETRAINED, runs / PRETRAINED
    if not (folder.is_dir() and used.is_file() and filecmp.cmp(weights, used, shallow=False)):
        for outdated in (folder, *runs.glob("*-new_weights-*")):
            shutil.rmtree(outdated, ignore_errors=True)
        _model_folder(context, 20 if context.rehearse else 1000).rename(folder)
        runs.mkdir(exist_ok=True)
        shutil.copyfile(weights, used)
    return [str(folder)]


def run_fine_tune(context: Context) -> Result:
    """Run the recipe `fashion_mnist_gpu` from the new weights if they are better with few labels, else the shipped."""
    name = "glit_tiny.fractal1k"
    better = context.rehearse or new_is_better(context.earlier.get("few_labels", {}))
    if (context.work / "new_weights").is_dir() and better:
        name = f"local-dir:{context.work / 'new_weights'}"
    return _fashion_mnist(context, "fine_tune", [f"model.name={name}"])


def new_is_better(few_labels: Result) -> bool:
    """Whether the new weights gain more over scratch than the shipped ones, on average over the budgets with both."""
    difference = 0.0
    for row in few_labels.get("rows", []):
        gains = {key: float(value) for key, value in row.items() if key.endswith(", gain")}
        shipped = gains.pop("glit_tiny.fractal1k, gain", None)
        if shipped is not None and gains:
            difference += sum(gains.values()) - shipped
    return difference > 0


def run_scratch(context: Context) -> Result:
    """Run the same recipe with GLiT-Tiny from random weights."""
    return _fashion_mnist(context, "scratch", ["model.name=glit_tiny", "model.pretrained=false"])


def run_deit(context: Context) -> Result:
    """Run the same recipe with DeiT-Tiny from random weights."""
    return _fashion_mnist(context, "deit", ["model.name=deit_tiny_patch16_224", "model.pretrained=false"])


def _fashion_mnist(context: Context, stage: str, overrides: list[str]) -> Result:
    overrides = [*overrides, "checkpoint_minutes=0.5"]
    if context.rehearse:
        spec = _tiny(context)[-1:] if stage == "scratch" else ()
        overrides += [*_TINY, *spec, "data.num_workers=0", "data.hold_out=100", "data.limit=200"]
    else:
        overrides += _loading(shared_memory_gib())
    form = context.chosen_form("training") if stage != "deit" else CURRENT
    folder = context.work / stage
    rates = measure_rates("fashion_mnist_gpu", overrides, folder, context, form)
    context.save({"form": form, **rates})
    return {"form": form, **rates} | _train("fashion_mnist_gpu", overrides, folder, context, form, rates)


def _loading(shared_gib: float | None) -> list[str]:
    """Overrides that load images in this process, if the batches of several do not fit into the shared memory."""
    if shared_gib is None or shared_gib > _LOADER_GIB:
        return []
    return ["augment.batched=true", "augment.re_prob=0", "data.num_workers=0"]
