"""Train the networks of the table stand-alone, one after another, and add their scores to `table.json`.

36 networks: 18 drawn from the joint space, 18 from the second stage's, with the distribution of heads of the showcase's
winner. A third of them are trained with a second seed, to measure the noise. The command can be stopped and resumed:
networks in the table are not trained again. Several processes share the work.
"""

import argparse
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from glit_models.search import load_search_recipe
from glit_models.search.spaces.budget import Budget
from glit_models.search.spaces.budget_sampler import BudgetSampler
from glit_models.search.spaces.space import SearchSpace
from glit_models.search.supernets.scoring import compare_logits

from glit_models import GLiTSpec, count_macs, count_params
from glit_models.errors import RunError
from glit_models.runs.files import write_json, write_text
from glit_models.runs.signals import StopRequest
from glit_models.training import Trainer
from glit_models.weights.loading import load_model

FOLDER = Path(__file__).parent
RECIPE = FOLDER / "recipe.yaml"
TABLE = FOLDER / "table.json"
WINNER = FOLDER.parents[1] / "docs" / "search_fashion_mnist_cpu" / "winner.json"
NETWORKS = 18  # per space
SECOND_SEEDS = 6  # per space


def main() -> None:
    """Train the networks that the table lacks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="runs/ranked", type=Path, help="folder of the runs")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ...")
    parser.add_argument("--max-minutes", type=float, help="time limit, after which it saves and exits")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.stop = StopRequest(options.max_minutes)
    networks = draw_networks()
    for seed, limit in ((0, NETWORKS), (1, SECOND_SEEDS)):
        for place in range(limit):
            for space in ("joint", "stage2"):
                if not _train(options, f"{space}-{place:02d}", networks[space][place], seed):
                    sys.exit("stopped; run the same command to resume")
    collect(options.out)


def draw_networks() -> dict[str, list[GLiTSpec]]:
    """The networks of both spaces, in order; the same at every call."""
    bounds = load_search_recipe(str(RECIPE)).budget.macs
    budget = Budget("macs", lambda spec: count_macs(spec, 28, 10), bounds.low, bounds.high)
    networks = {}
    for name, space in load_spaces().items():
        sampler, rng = BudgetSampler(space, [budget]), random.Random(f"ranked {name}")
        drawn: dict[Any, None] = {}
        while len(drawn) < NETWORKS:
            drawn[sampler.sample(rng)[0]] = None
        networks[name] = list(drawn)
    return networks


def load_spaces() -> dict[str, SearchSpace]:
    """The spaces of the networks, by their names in the table."""
    joint = load_search_recipe(str(RECIPE)).load_space()
    return {"joint": joint, "stage2": joint.stage_two(GLiTSpec.from_dict(json.loads(WINNER.read_text())))}


def read_table() -> list[dict[str, Any]]:
    """The rows of the table: spec, costs and scores of each network and seed."""
    return json.loads(TABLE.read_text()) if TABLE.is_file() else []


def _train(options: argparse.Namespace, name: str, spec: GLiTSpec, seed: int) -> bool:
    """Train and score one network, unless the table has it or another process trains it; returns whether to go on."""
    run = options.out / f"{name}-seed{seed}"
    done = any((row["name"], row["seed"]) == (name, seed) for row in read_table())
    if done or (run / "scores.json").is_file():
        return True
    try:
        scores = train_network(spec, seed, run, options.device, options.stop)
    except RunError:
        return True  # another process has the folder
    if scores is None:
        return False
    row = {"name": name, "space": name.partition("-")[0], "seed": seed, "spec": spec.to_dict()}
    row |= {"macs": count_macs(spec, 28, 10), "params": count_params(spec, 10, 28)}
    write_json(run / "scores.json", row | scores)
    collect(options.out)
    return True


def train_network(
    spec: GLiTSpec, seed: int, run: Path, device: str | None, stop: StopRequest, overrides: Sequence[str] = ()
) -> dict[str, float] | None:
    """Train a network as those of the table are; returns its scores on the search and test images, None if stopped."""
    recipe = load_search_recipe(str(RECIPE), [f"seed={seed}", *overrides])
    trainer = Trainer(recipe.retrain_recipe(spec), run, device, stop.minutes_left, score_test=False)
    if trainer.run() is None:
        return None
    model = load_model(run / "model").model.to(trainer.device)
    scores = {}
    for split, images in (("search", trainer.splits.validation), ("test", trainer.splits.test)):
        scores[f"{split}_top1"], scores[f"{split}_loss"] = _score(model, trainer, images)
    return scores


@torch.no_grad()
def _score(model: Any, trainer: Trainer, images: Any) -> tuple[float, float]:
    """Top-1 accuracy in percent, and mean cross-entropy."""
    batches, count = trainer.feed.scoring(images)
    model.eval()
    sums = sum(compare_logits(model(batch.to(trainer.device)), labels.to(trainer.device)) for batch, labels in batches)
    correct, loss = (sums / count).tolist()
    return round(100 * correct, 2), round(loss, 6)


def collect(out: Path) -> None:
    """Add the scores of the finished runs to the table."""
    rows = {(row["name"], row["seed"]): row for row in read_table()}
    for path in out.glob("*/scores.json"):
        row = json.loads(path.read_text())
        rows[row["name"], row["seed"]] = row
    lines = [json.dumps(rows[key]) for key in sorted(rows)]  # one each: small, and easy to compare
    write_text(TABLE, "[\n" + ",\n".join(lines) + "\n]\n")


if __name__ == "__main__":
    main()
