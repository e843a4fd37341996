"""Compare variants of pretraining for a fixed number of images: the choices of `fractal_pretrain` at a small scale.

Each arm of the study pretrains the same network on the same number of images, once per seed: with the current recipe,
OFDB or 1p-frac as the fractals, with and without a procedural warm-up (`benchmarks.procedural`), and with changing
image sizes. Two scores, both on held-out training images of Fashion-MNIST, never on the test set: accuracy after
fine-tuning on 600 labels, and accuracy of the 20 nearest neighbours by frozen features.

Each arm and seed has a separate folder, so the command can be stopped and resumed; several processes at a time share
the work. For each seed, all arms have the same initial weights and labels, so differences are paired.
"""

import argparse
import json
import math
import shutil
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from scipy.stats import t as student_t
from torch import Tensor

from glit_models import GLiTSpec, count_macs
from glit_models.data import open_splits
from glit_models.data.loading import eval_loader
from glit_models.errors import RunError
from glit_models.runs.files import whole_file, write_json
from glit_models.runs.lock import lock_folder
from glit_models.training import Recipe, Trainer, load_recipe, setup

from . import report
from .procedural import warm_up

PRETRAIN = Path(__file__).with_name("pretraining.yaml")
FEW_LABELS = Path(__file__).with_name("few_labels.yaml")
HELD_OUT = 5000  # training images for scoring, drawn for each seed
LABELS, LABEL_EPOCHS = 600, 10
BANK, NEIGHBOURS, TEMPERATURE = 5000, 20, 0.07  # the last two as in DINO (arXiv 2104.14294)
CONFIDENCE = 0.95
NOISE = 1.0  # points between seeds at 600 labels, at most 1.1 in docs/benchmarks.md
SCORES = ("few labels", "k-NN")
Scores = dict[str, dict[int, dict[str, Any]]]  # results of the run, by arm and seed


@dataclass(frozen=True)
class Arm:
    """One variant of pretraining.

    Attributes:
        overrides: of the recipe `pretraining.yaml`.
        warm_up: steps on k-Dyck strings before the first image, relative to the steps on images.
        small_first: whether the sizes of `model.img_size_shares` come in ascending order, not at random.
        pretrain: False for the initial weights.
    """

    overrides: tuple[str, ...] = ()
    warm_up: float = 0.0
    small_first: bool = False
    pretrain: bool = True


OFDB = ("data.fractals.perturbation=0",)
ONE_FRACTAL = ("data.fractals.perturbation=0", "data.fractals.single=true", "data.fractals.delta=0.1")
SIZES = ("model.img_size_shares={16: 0.5, 24: 0.25, 32: 0.25}",)
SHORT, LONG = 0.05, 0.5
BASELINE, SCRATCH = "today", "scratch"
ARMS = {
    SCRATCH: Arm(pretrain=False),
    BASELINE: Arm(),
    "ofdb": Arm(OFDB),
    "1p-frac": Arm(ONE_FRACTAL),
    "today, warm-up": Arm(warm_up=SHORT),
    "today, small first": Arm(SIZES, small_first=True),
    "today, sizes mixed": Arm(SIZES),
    "ofdb, warm-up": Arm(OFDB, warm_up=SHORT),
    "1p-frac, warm-up": Arm(ONE_FRACTAL, warm_up=SHORT),
    "today, long warm-up": Arm(warm_up=LONG),
    "today, small first, 1.5 x images": Arm((*SIZES, "optim.epochs=9"), small_first=True),
}
WARM_UP_PAIRS = tuple((name, f"{name}, warm-up") for name in (BASELINE, "ofdb", "1p-frac"))


def main() -> None:
    """Run the remaining parts, and print."""
    parser = report.parser(__doc__, rounds=3)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM", help="; ".join(ARMS))
    parser.add_argument("--out", default="runs/pretraining", type=Path, help="folder of the runs")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ...")
    parser.add_argument("--root", help="folder of the Fashion-MNIST files (default: found or downloaded)")
    parser.add_argument("--show", action="store_true", help="only print finished results")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(_resolution_line(len(options.arms) - (SCRATCH in options.arms), options.rounds, NOISE))
    if not options.show:
        _run_all(options)
    scores = {arm: _read_scores(options, arm) for arm in options.arms}
    scores = {arm: runs for arm, runs in scores.items() if runs}
    if not scores:
        raise SystemExit(f"nothing is finished in {options.out}")
    report.show("pretraining", options, _rows(scores), "mean and spread")
    print(*_notes(scores), sep="\n")


# ---- the runs ----


def _run_all(options: argparse.Namespace) -> None:
    """Run all seeds of all arms, seed by seed; runs of other processes are awaited at the end."""
    jobs = [(seed, arm) for seed in range(options.rounds) for arm in options.arms]
    while jobs:
        jobs = [(seed, arm) for seed, arm in jobs if not _run(options, arm, seed)]
        if jobs:
            time.sleep(5)


def _run(options: argparse.Namespace, arm: str, seed: int) -> bool:
    """Run one arm with one seed, to its scores; False if another process is running it."""
    folder = _folder(options.out, arm, seed)
    if _is_finished(options.out, arm, seed):
        return True
    try:
        lock = lock_folder(folder)
    except RunError as error:
        if "in use by another process" not in str(error):
            raise
        return False
    with lock:
        scores = _pretrain(ARMS[arm], folder, seed, options.device)
        recipe = _fine_tune_recipe(seed, options.root)
        scores["few labels"] = _fine_tune(recipe, folder, options.device)
        scores["k-NN"] = _neighbours(recipe, folder, options.device)
        write_json(folder / "scores.json", scores)
    return True


def _folder(out: Path, arm: str, seed: int) -> Path:
    return out / f"{arm.replace(', ', '-').replace(' ', '_')}-{seed}"


def _is_finished(out: Path, arm: str, seed: int) -> bool:
    return (_folder(out, arm, seed) / "scores.json").is_file()


def _read_scores(options: argparse.Namespace, arm: str) -> dict[int, dict[str, Any]]:
    """The results of one arm's finished runs, by seed."""
    seeds = [seed for seed in range(options.rounds) if _is_finished(options.out, arm, seed)]
    return {seed: json.loads((_folder(options.out, arm, seed) / "scores.json").read_text()) for seed in seeds}


class _Started(Trainer):
    """A run with given initial weights, except for the head, and optionally with ascending image sizes."""

    def __init__(self, recipe: Recipe, out: Path, device: str, start: Path, small_first: bool = False) -> None:
        self.start, self.small_first = start, small_first
        super().__init__(recipe, out, device, score_test=False)

    def _build(self) -> None:
        super()._build()
        _load_all_but_head(self.model, self.start)
        if self.ema is not None:
            _load_all_but_head(self.ema.module, self.start)
        if self.small_first:
            self.feed._size_at = self._ascending_size

    def _ascending_size(self, epoch: int, step: int) -> int:
        shares = self.recipe.model.img_size_shares
        assert shares is not None
        position = (epoch * self.steps_per_epoch + step) / self.total_steps
        return ascending_size(shares, position)


def ascending_size(shares: Mapping[int, float], position: float) -> int:
    """The image size at a position, from 0 to below 1, of a run with ascending sizes."""
    total, end = sum(shares.values()), 0.0
    for size in sorted(shares):
        end += shares[size] / total
        if position < end:
            return size
    return max(shares)


def _load_all_but_head(model: Any, path: Path) -> None:
    """Load all weights but the head's: the pretraining's head only fits fractals."""
    state = {key: value for key, value in load_file(path).items() if not key.startswith("head.")}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert set(missing) == {"head.weight", "head.bias"}, missing
    assert not unexpected, unexpected


def _result(trainer: Trainer) -> dict[str, Any]:
    result = trainer.run()
    if result is None:
        raise SystemExit(130)
    return result


def _pretrain(arm: Arm, folder: Path, seed: int, device: str) -> dict[str, Any]:
    """Write the pretrained weights as `start.safetensors`; returns the results of the run."""
    recipe = load_recipe(str(PRETRAIN), [*arm.overrides, f"seed={seed}"])
    known = _initialise(recipe, arm.warm_up, folder)
    start = folder / "start.safetensors"
    if not arm.pretrain:
        _copy(folder / "initial.safetensors", start)
        return known
    run = folder / "pretrain"
    result = _result(_Started(recipe, run, device, folder / "initial.safetensors", arm.small_first))
    _copy(run / "model" / "model.safetensors", start)
    return {**known, "own task": result["validation_top1"]}


def _copy(source: Path, target: Path) -> None:
    with whole_file(target) as temporary:
        shutil.copyfile(source, temporary)


def _initialise(recipe: Recipe, share: float, folder: Path) -> dict[str, Any]:
    """Write the weights before the first image as `initial.safetensors`; returns the results of the warm-up."""
    facts = folder / "warm_up.json"
    if not facts.is_file():
        optim, fractals = recipe.optim, recipe.data.fractals
        torch.manual_seed(recipe.seed)
        model = setup.create_model(recipe.model, fractals.num_classes)
        steps = round(share * optim.epochs * (fractals.num_classes * fractals.instances // optim.batch_size))
        recovered = 100 * warm_up(model, steps, recipe.seed) if steps else None
        with whole_file(folder / "initial.safetensors") as temporary:
            save_file(model.state_dict(), temporary)
        write_json(facts, {"warm-up steps": steps, "symbols recovered": recovered})
    known: dict[str, Any] = json.loads(facts.read_text())
    return known


def _fine_tune_recipe(seed: int, root: str | None) -> Recipe:
    model = load_recipe(str(PRETRAIN)).model
    return load_recipe(
        str(FEW_LABELS),
        [
            f"model.spec={json.dumps(model.spec)}", f"model.img_size={model.img_size}", f"data.hold_out={HELD_OUT}",
            f"data.limit={LABELS}", "optim.batch_size=50", f"optim.epochs={LABEL_EPOCHS}", "optim.lr=1e-3",
            f"eval_every={LABEL_EPOCHS}", "precision=fp32", f"seed={seed}",
            f"data.root={json.dumps(root)}",
        ],
    )  # fmt: skip


def _fine_tune(recipe: Recipe, folder: Path, device: str) -> float:
    """Accuracy of the last weights on the held-out images after fine-tuning on few labels, in percent."""
    result = _result(_Started(recipe, folder / "few_labels", device, folder / "start.safetensors"))
    return float(result["validation_top1"])


def _neighbours(recipe: Recipe, folder: Path, device: str) -> float:
    """Accuracy on the held-out images by their nearest neighbours among other training images, in percent."""
    splits = open_splits("fashion-mnist", recipe.data.root, HELD_OUT, BANK, recipe.seed)
    model = setup.create_model(recipe.model, len(splits.class_names))
    _load_all_but_head(model, folder / "start.safetensors")
    model.to(device).eval()
    transform = setup.create_eval_transform(recipe.model.img_size, setup.resolve_preprocessing(model, recipe.data))
    bank, bank_labels = _features(model, eval_loader(splits.train, transform, 250), device)
    queries, labels = _features(model, eval_loader(splits.validation, transform, 250), device)
    return 100 * neighbour_accuracy(bank, bank_labels, queries, labels)


@torch.inference_mode()
def _features(model: Any, batches: Iterable[tuple[Tensor, Tensor]], device: str) -> tuple[Tensor, Tensor]:
    """The head's input, normalised to unit length [B, C], and the labels [B]."""
    features, labels = [], []
    for images, targets in batches:
        seen = model.forward_head(model.forward_features(images.to(device)), pre_logits=True)
        features.append(F.normalize(seen, dim=1).cpu())
        labels.append(targets)
    return torch.cat(features), torch.cat(labels)


def neighbour_accuracy(bank: Tensor, bank_labels: Tensor, queries: Tensor, labels: Tensor) -> float:
    """The share of queries [Q, C] whose nearest neighbours in the bank [B, C] vote for their label; of unit length."""
    similarity, nearest = (queries @ bank.T).topk(NEIGHBOURS, dim=1)
    weights = (similarity / TEMPERATURE).exp()
    votes = torch.zeros(len(queries), int(bank_labels.max()) + 1)
    votes.scatter_add_(1, bank_labels[nearest], weights)
    return (votes.argmax(1) == labels).float().mean().item()


# ---- the table ----


def residual_noise(values: Mapping[str, Mapping[int, float]]) -> tuple[float, int]:
    """The standard deviation that neither arm nor seed explains, and its degrees of freedom.

    For `values[arm][seed]`, by least squares on the sum of a term per arm and a term per seed: arms share the labels
    and initial weights of a seed, and have the same noise. Seeds may be missing from an arm; without degrees of freedom
    the noise is nan.
    """
    seeds = sorted({seed for runs in values.values() for seed in runs})
    cells = [
        (row, seeds.index(seed), value) for row, runs in enumerate(values.values()) for seed, value in runs.items()
    ]
    design = np.zeros((len(cells), len(values) + len(seeds)))
    for cell, (row, column, _) in enumerate(cells):
        design[cell, row] = design[cell, len(values) + column] = 1
    observed = np.array([value for _, _, value in cells])
    solution, _, rank, _ = np.linalg.lstsq(design, observed, rcond=None)
    freedom = len(cells) - int(rank)
    return math.sqrt(float(((observed - design @ solution) ** 2).sum()) / freedom) if freedom else math.nan, freedom


def half_width(noise: float, freedom: int, pairs: int, comparisons: int = 1) -> float:
    """Half width of the interval of a mean of `pairs` paired differences; wider for several `comparisons`."""
    quantile = student_t.ppf(1 - (1 - CONFIDENCE) / (2 * comparisons), freedom)
    return float(quantile * noise * math.sqrt(2 / pairs))


def _resolution_line(arms: int, seeds: int, noise: float) -> str:
    if seeds < 2 or arms < 2:
        return "One seed or one arm: no interval.\n"
    freedom = (arms - 1) * (seeds - 1)
    alone, together = half_width(noise, freedom, seeds), half_width(noise, freedom, seeds, arms - 1)
    return (
        f"{arms} arms, {seeds} seeds. At a noise of {noise:g} points, a difference shows from {alone:.2f} points on, "
        f"and from {together:.2f} if all {arms - 1} comparisons are to hold together.\n"
    )


def _rows(scores: Scores) -> list[dict[str, str | int | float]]:
    rows = []
    for arm, runs in scores.items():
        row: dict[str, str | int | float] = {"arm": arm, "seeds": len(runs), "cost": f"{cost(ARMS[arm]):.2f}"}
        own = [run["own task"] for run in runs.values() if "own task" in run]
        row["own task, %"] = f"{statistics.mean(own):.1f}" if own else ""
        for key in SCORES:
            row[f"{key}, %"] = _mean_and_spread([run[key] for run in runs.values()])
            row[f"{key}, to {BASELINE}"] = _difference(scores, key, [(BASELINE, arm)]) if arm != BASELINE else ""
        rows.append(row)
    return rows


def cost(arm: Arm) -> float:
    """Multiply-adds of the pretraining relative to the baseline's; a string counts as an image."""
    if not arm.pretrain:
        return 0.0
    base, recipe = load_recipe(str(PRETRAIN)), load_recipe(str(PRETRAIN), arm.overrides)
    spec, size, num_classes = GLiTSpec.parse(recipe.model.spec or {}), recipe.model.img_size, 1
    shares = recipe.model.img_size_shares or {size: 1.0}
    macs = sum(share * count_macs(spec, side, num_classes) for side, share in shares.items()) / sum(shares.values())
    images = recipe.optim.epochs / base.optim.epochs
    return images * (macs / count_macs(spec, size, num_classes) + arm.warm_up)


def _mean_and_spread(values: Sequence[float]) -> str:
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


def _noise(scores: Scores, key: str) -> tuple[float, int]:
    """The noise without scratch, whose features have a different noise."""
    return residual_noise(
        {arm: {seed: run[key] for seed, run in runs.items()} for arm, runs in scores.items() if arm != SCRATCH}
    )


def _difference(scores: Scores, key: str, pairs: Sequence[tuple[str, str]]) -> str:
    """The mean difference of the second from the first of each pair, over the seeds of both, and its interval."""
    differences = [
        scores[second][seed][key] - scores[first][seed][key]
        for first, second in pairs
        for seed in set(scores.get(first, {})) & set(scores.get(second, {}))
    ]
    noise, freedom = _noise(scores, key)
    if not differences:
        return ""
    mean = statistics.mean(differences)
    if not freedom:
        return f"{mean:+.2f}"
    width = half_width(noise, freedom, len(differences))
    return f"{mean:+.2f} ({mean - width:+.2f} to {mean + width:+.2f})"


def _notes(scores: Scores) -> Iterator[str]:
    """Notes below the table: the measured noise, what is significant, and the warm-up over all fractals."""
    comparisons, seeds = len(scores) - (SCRATCH in scores) - 1, len(scores.get(BASELINE, {}))
    for key in SCORES:
        noise, freedom = _noise(scores, key)
        if freedom and seeds:
            alone, together = (half_width(noise, freedom, seeds, number) for number in (1, comparisons))
            yield (
                f"\n{key}: noise {noise:.2f} points ({freedom} degrees of freedom). With {seeds} seeds a difference "
                f"shows from {alone:.2f} on, and from {together:.2f} if all {comparisons} comparisons are to hold."
            )
        if difference := _difference(scores, key, WARM_UP_PAIRS):
            yield f"{key}, short warm-up over all kinds of fractals: {difference}"
    known = [run for runs in scores.values() for run in runs.values() if run["warm-up steps"]]
    for steps in sorted({run["warm-up steps"] for run in known}):
        recovered = [run["symbols recovered"] for run in known if run["warm-up steps"] == steps]
        yield f"\nA warm-up of {steps} steps recovers {statistics.mean(recovered):.1f} % of the hidden symbols."


if __name__ == "__main__":
    main()
