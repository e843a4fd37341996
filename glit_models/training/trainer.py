"""The training loop: a function of the recipe alone, whatever interrupts it.

Batches come from (seed, epoch, position) and every step draws from generators seeded by (seed, step), so a run that
is killed and started again ends where it would have ended. It knows recipes, data and timm's model contract; not
where weights are published.
"""

from __future__ import annotations

import json
import math
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import load_file, save_file
from timm.data import Mixup, create_transform, resolve_data_config
from timm.layers import Attention
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from ..data import open_splits
from ..data.loading import eval_loader, train_loader
from ..errors import GlitError, RecipeError, TrainingError, first_line
from ..folders import load_folder, save_folder
from ..inference import count_correct
from ..model import GLiT
from .checkpoints import load_state, save_state, write_atomically
from .recipe import ModelSection, Recipe

__all__ = ["Trainer"]

_LOG_EVERY = 50  # steps between lines of metrics.jsonl


class Trainer:
    """One run in one folder.

    Args:
        recipe: what to do.
        out: folder of the run; one that holds a run of the same recipe is continued.
        device: 'cpu', 'cuda', ...; None takes the GPU if there is one.
        max_minutes: save and leave after so long.
        command: the command line of this run, for the model's record.

    Raises:
        RecipeError: if `out` holds a run of another recipe (names the key), or the data do not fit the recipe.
        DataError, TrainingError: if the data or the folder cannot be used.
    """

    def __init__(
        self,
        recipe: Recipe,
        out: str | Path,
        device: str | torch.device | None = None,
        max_minutes: float | None = None,
        command: str | None = None,
    ) -> None:
        self.recipe = recipe
        self.out = Path(out)
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.max_minutes = max_minutes
        self.command = command
        self.step = 0
        self.epochs_done = 0  # trained and scored; the last step of an epoch may be done before its score is
        self.loss_sum = 0.0  # over the steps of the epoch under way
        self.best: dict[str, Any] = {"validation_top1": -1.0, "epoch": -1}
        self.minutes = 0.0
        self.stop_signal: str | None = None
        self._refuse_another_recipe()
        data = recipe.data
        self.splits = open_splits(data.dataset, data.root, data.hold_out, data.limit, recipe.seed)
        self.steps_per_epoch = len(self.splits.train) // recipe.optim.batch_size
        if not self.steps_per_epoch:
            size, count = recipe.optim.batch_size, len(self.splits.train)
            raise RecipeError(f"optim.batch_size={size} is more than the {count} pictures to train on")
        self.total_steps = self.steps_per_epoch * recipe.optim.epochs
        self._build()
        self._claim_folder()  # last, so that a mistake above leaves no folder behind

    def run(self) -> dict[str, Any] | None:
        """Train to the end and return the result, or None if stopped before it (by signal or `max_minutes`)."""
        result = self.out / "result.json"
        if result.is_file():
            print(f"glit: {self.out} is finished; its result is in {result}", file=sys.stderr)
            return json.loads(result.read_text())
        self._resume()
        previous = {number: signal.signal(number, self._on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            finished = self._train()
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
        return self._finish() if finished else None

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.stop_signal:
            raise KeyboardInterrupt  # asked twice: leave without saving
        self.stop_signal = signal.Signals(number).name

    def _refuse_another_recipe(self) -> None:
        path = self.out / "recipe.yaml"
        if not path.is_file():
            return
        lines = zip(path.read_text().splitlines(), self.recipe.to_yaml().splitlines(), strict=False)
        changed = [f"{old.strip()} -> {new.strip()}" for old, new in lines if old != new]
        if changed:
            raise RecipeError(
                f"{self.out} holds a run of another recipe ({'; '.join(changed[:3])}); take another --out"
            )

    def _claim_folder(self) -> None:
        try:
            self.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TrainingError(f"{self.out} cannot be made: {error.strerror}") from None
        write_atomically(self.out / "recipe.yaml", lambda aside: aside.write_text(self.recipe.to_yaml()))

    def _build(self) -> None:
        recipe, augment = self.recipe, self.recipe.augment
        num_classes = len(self.splits.class_names)
        torch.manual_seed(recipe.seed)
        self.model = _create_model(recipe.model, num_classes).to(self.device)
        if self.device.type == "cpu":
            for module in self.model.modules():
                if isinstance(module, Attention):
                    module.fused_attn = False  # the fused operator's backward pass is slower on CPU
        optim = recipe.optim
        # One kernel instead of hundreds of small ones, which cost a third of a step on CPU.
        fused: dict[str, Any] = {"fused": True} if optim.opt in ("adam", "adamw") else {}
        self.optimizer = create_optimizer_v2(
            self.model, optim.opt, lr=optim.lr, weight_decay=optim.weight_decay, **fused
        )
        self.schedule = CosineLRScheduler(
            self.optimizer,
            t_initial=self.total_steps,
            lr_min=optim.min_lr,
            warmup_t=int(optim.warmup_epochs * self.steps_per_epoch),
            warmup_lr_init=optim.min_lr,
            warmup_prefix=True,
            t_in_epochs=False,
        )
        self.ema = ModelEmaV3(self.model, decay=optim.ema_decay, use_warmup=True) if optim.ema_decay else None
        self.mixup = None
        if augment.mixup or augment.cutmix:
            self.mixup = Mixup(augment.mixup, augment.cutmix, label_smoothing=augment.label_smoothing,
                               num_classes=num_classes)  # fmt: skip
        self._make_transforms()

    def _make_transforms(self) -> None:
        augment, size = self.recipe.augment, self.recipe.model.img_size
        own = resolve_data_config(model=self.model)
        given = {key: getattr(self.recipe.data, key) for key in ("mean", "std", "interpolation", "crop_pct")}
        self.preprocessing: dict[str, Any] = {key: own[key] if value is None else value for key, value in given.items()}
        color_jitter: Any = augment.color_jitter or None  # timm's types leave out None, which turns it off
        self.train_transform = create_transform(
            size,
            is_training=True,
            scale=augment.scale,
            ratio=augment.ratio,
            hflip=augment.hflip,
            color_jitter=color_jitter,
            auto_augment=augment.auto_augment,
            re_prob=augment.re_prob,
            **{key: value for key, value in self.preprocessing.items() if key != "crop_pct"},
        )
        self.eval_transform = create_transform(size, **self.preprocessing)

    def _resume(self) -> None:
        state = load_state(self.out)
        metrics = self.out / "metrics.jsonl"
        if state is None:
            metrics.unlink(missing_ok=True)
            return
        self.step, self.epochs_done, self.loss_sum = state["step"], state["epochs_done"], state["loss_sum"]
        self.best, self.minutes = state["best"], state["minutes"]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.ema is not None:
            self.ema.module.load_state_dict(state["ema"])
        lines = metrics.read_text().splitlines() if metrics.is_file() else []
        kept = [line for line in lines if line.endswith("}") and self._is_past(json.loads(line))]
        write_atomically(metrics, lambda aside: aside.write_text("".join(f"{line}\n" for line in kept)))
        print(f"glit: going on from step {self.step} of {self.total_steps}", file=sys.stderr)

    def _is_past(self, entry: dict[str, Any]) -> bool:
        return entry["step"] <= self.step and entry.get("epoch", 0) <= self.epochs_done

    def _save(self) -> None:
        state = {
            "step": self.step,
            "epochs_done": self.epochs_done,
            "loss_sum": self.loss_sum,
            "best": self.best,
            "minutes": self.minutes,
            "model": self.model.state_dict(),
            "ema": self.ema.module.state_dict() if self.ema is not None else {},
            "optimizer": self.optimizer.state_dict(),
        }
        save_state(self.out, state)

    def _train(self) -> bool:
        started = saved = time.monotonic()
        minutes_before = self.minutes
        recipe = self.recipe
        with Progress(
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(),
            disable=not sys.stderr.isatty(),
        ) as progress:
            bar = progress.add_task("", total=self.total_steps, completed=self.step, epoch=0, status="")
            while self.epochs_done < recipe.optim.epochs:
                epoch = self.epochs_done
                first = self.step - epoch * self.steps_per_epoch
                loader = train_loader(
                    self.splits.train, self.train_transform, recipe.optim.batch_size, recipe.seed, epoch, first,
                    recipe.data.num_workers,
                )  # fmt: skip
                rate = 0.0
                window = time.monotonic()
                for batch, (images, labels) in enumerate(loader, 1):
                    loss = self._train_step(images, labels)
                    self.loss_sum += loss
                    now = time.monotonic()
                    rate = batch * recipe.optim.batch_size / (now - window)
                    lr = self.optimizer.param_groups[0]["lr"]
                    status = f"loss {loss:.3f}  lr {lr:.1e}  {rate:.0f} img/s"
                    progress.update(bar, completed=self.step, epoch=epoch + 1, status=status)
                    if self.step % _LOG_EVERY == 0:
                        self._log(loss=loss, lr=lr, images_per_second=round(rate, 1))
                    self.minutes = minutes_before + (now - started) / 60
                    late = self.max_minutes is not None and now - started >= 60 * self.max_minutes
                    if late or self.stop_signal or now - saved > 60 * recipe.checkpoint_minutes:
                        self._save()
                        saved = now
                    if late or self.stop_signal:
                        why = self.stop_signal or f"--max-minutes {self.max_minutes:g}"
                        print(
                            f"glit: stopped by {why} at step {self.step} of {self.total_steps}; "
                            "the same command goes on from here",
                            file=sys.stderr,
                        )
                        return False
                self._end_epoch(rate)
                self._save()
        return True

    def _train_step(self, images: Tensor, labels: Tensor) -> float:
        """One optimiser step on images [B, C, H, W] and labels [B]; returns the loss."""
        seeds = np.random.SeedSequence((self.recipe.seed, self.step)).generate_state(2)
        torch.default_generator.manual_seed(int(seeds[0]))
        if self.device.type == "cuda":
            torch.cuda.manual_seed(int(seeds[0]))
        np.random.seed(int(seeds[1]))  # noqa: NPY002  (timm's Mixup draws from it)
        images, targets = images.to(self.device), labels.to(self.device)
        smoothing = self.recipe.augment.label_smoothing
        if self.mixup is not None:
            images, targets = self.mixup(images, targets)
            smoothing = 0.0  # already in the mixed targets
        self.model.train()
        self.schedule.step_update(self.step)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.precision == "bf16"):
            logits = self.model(images)
        loss = F.cross_entropy(logits.float(), targets, label_smoothing=smoothing)
        value = loss.item()
        if not math.isfinite(value):
            raise TrainingError(
                f"the loss is {value} at step {self.step} (epoch {self.step // self.steps_per_epoch}, batch "
                f"{self.step % self.steps_per_epoch}); the last good checkpoint is in {self.out}: try a lower optim.lr"
            )
        loss.backward()
        if self.recipe.optim.clip_grad:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.optim.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        if self.ema is not None:
            self.ema.update(self.model, step=self.step)
        return value

    def _log(self, **values: Any) -> None:
        path = self.out / "metrics.jsonl"
        try:
            with path.open("a") as file:
                file.write(json.dumps({"step": self.step, **values}) + "\n")
        except OSError as error:
            raise TrainingError(f"{path} could not be written: {error.strerror}") from None

    def _score(self, model: nn.Module, dataset: Any) -> float:
        """Top-1 accuracy in percent, in float32."""
        recipe = self.recipe
        loader = eval_loader(dataset, self.eval_transform, recipe.eval_batch_size, recipe.data.num_workers)
        return 100 * count_correct(model.eval(), loader, self.device) / len(dataset)

    def _end_epoch(self, rate: float) -> None:
        """Score the epoch on the validation set, keep the weights if they are the best so far, and say so."""
        scored = self.model if self.ema is None else self.ema.module
        top1 = self._score(scored, self.splits.validation)
        if top1 > self.best["validation_top1"]:
            self.best = {"validation_top1": top1, "epoch": self.epochs_done + 1}
            weights = {key: value.contiguous() for key, value in scored.state_dict().items()}
            write_atomically(self.out / "best.safetensors", lambda aside: save_file(weights, aside))
        loss = self.loss_sum / self.steps_per_epoch
        self.epochs_done += 1
        self.loss_sum = 0.0
        self._log(epoch=self.epochs_done, train_loss=loss, validation_top1=top1)
        print(
            f"epoch {self.epochs_done}/{self.recipe.optim.epochs}: loss {loss:.3f}, validation top-1 {top1:.2f} %, "
            f"{rate:.0f} images/s",
            file=sys.stderr,
            flush=True,
        )

    def _finish(self) -> dict[str, Any]:
        """Leave the best weights as a model folder, and score what was written there on the test set, once."""
        self.model.load_state_dict(load_file(self.out / "best.safetensors"))
        recipe = self.recipe
        save_folder(
            self.model,
            self.out / "model",
            class_names=self.splits.class_names,
            data_config=self.preprocessing,
            dtype=recipe.save_dtype,
            facts={"dataset": recipe.data.dataset, "recipe": self.command},
        )
        result = {**self.best, "epochs": recipe.optim.epochs, "minutes": round(self.minutes, 1)}
        if self.splits.test is not None:
            result["test_top1"] = self._score(load_folder(self.out / "model").to(self.device), self.splits.test)
        text = json.dumps(result, indent=2)
        write_atomically(self.out / "result.json", lambda aside: aside.write_text(text))
        return result


def _create_model(section: ModelSection, num_classes: int) -> GLiT:
    if not timm.is_model(section.name.split(".")[0]):
        raise RecipeError(f"model.name {section.name!r} is no model; `glit list` shows what there is")
    try:
        keywords = asdict(section)
        model = timm.create_model(keywords.pop("name"), num_classes=num_classes, **keywords)
    except (RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, GlitError):
            raise
        raise RecipeError(f"model.name {section.name!r} cannot be built: {first_line(error)}") from None
    if not isinstance(model, GLiT):
        raise RecipeError(f"model.name must be a GLiT, got {section.name!r}")
    return model
