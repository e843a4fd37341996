"""A search folder as the pipeline writes it, with made-up accuracies, and the start of a real one. No assertions."""

import json
import math
import random
from pathlib import Path

import pytest
import yaml
from glit_models.search import (
    Evolution,
    RandomSearch,
    SearchRun,
    SearchSpace,
    extremes,
    glit,
    load_search_recipe,
    macs_budget,
)
from glit_models.search.evidence.control import Control
from glit_models.search.evidence.ranking import Ranked, compare
from glit_models.search.recipe import SearchRecipe
from glit_models.search.run.context import Interrupted

from glit_models import GLiTSpec, count_macs, count_params

IMG_SIZE, NUM_CLASSES = 32, 10
FIXTURES = Path(__file__).parent / "fixtures"
RECIPE = str(FIXTURES / "search.yaml")
SHORT = (
    f"train.data.root={FIXTURES / 'fashion-mnist'}", "train.data.limit=60", "train.checkpoint_minutes=1",
    "train.optim.epochs=1", "supernet.train.optim.epochs=2", "evolution.generations=2", "retrain.top=1",
)  # fmt: skip


def short_recipe(*overrides: str) -> SearchRecipe:
    """A real search of a few seconds."""
    return load_search_recipe(RECIPE, [*SHORT, *overrides])


def begin_search(folder: Path, *overrides: str) -> Path:
    """A real search that was stopped when the evolution of its first stage was over."""

    def stop(*_: object) -> None:
        raise Interrupted("the test")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("glit_models.search.run.stage.retrain", stop)
        SearchRun(short_recipe(*overrides), folder, "cpu", command="glit search short").run()
    return folder


def describe(spec: GLiTSpec) -> dict:
    """A network's entry in any of the files."""
    macs, params = count_macs(spec, IMG_SIZE, NUM_CLASSES), count_params(spec, NUM_CLASSES, IMG_SIZE)
    return {"spec": spec.to_dict(), "macs": macs, "params": params}


def quality(spec: GLiTSpec) -> float:
    """Percent: local heads early and global ones late are good, and so is size."""
    pairs = list(enumerate(spec.blocks))
    places = sum(b.num_local_heads * (spec.depth - i) + b.num_global_heads * i for i, b in pairs)
    return 60 + 20 * places / spec.num_heads / spec.depth**2 + 1.5 * math.log(count_macs(spec, IMG_SIZE) / 1e6)


def write_search(
    folder: Path,
    method: str = "hierarchical",
    depth: int = 4,
    population: int = 8,
    generations: int = 4,
    num_ranked: int = 10,
) -> Path:
    """A search that is over, with everything in it."""
    space = glit(48, 3, depth, 4)
    middle = sum(describe(spec)["macs"] for spec in extremes(space.stage_one(), count_macs)) / 2
    budget = {"macs": {"low": round(0.8 * middle), "high": round(1.2 * middle)}, "params": {"low": None, "high": None}}
    recipe = {"method": method, "seed": 3, "supernet": {"sharing": "entangled"}, "budget": budget, "evolution": {}}
    write(folder / "recipe.yaml", yaml.safe_dump(recipe))
    settings = {"population": population, "generations": generations, "num_parents": max(population // 5, 2)}
    settings |= {"num_mutation": population // 2, "num_crossover": population // 2}
    times = {}
    if method == "hierarchical":
        winner = write_stage(folder / "stage1", space.stage_one(), budget["macs"], settings)
        times["stage1"] = {"supernet": 5025.4, "evolution": 1210, "retrain": 2700}
        space = space.stage_two(winner)
        winner = write_stage(folder / "stage2", space, budget["macs"], settings)
        times["stage2"] = {"supernet": 5525.4, "evolution": 1410, "retrain": 3210}
    else:
        winner = write_stage(folder / "joint", space, budget["macs"], settings, method)
        times["joint"] = {"supernet": 5025.4, "evolution": 1210, "retrain": 2700}
    write(folder / "winner.json", winner.to_json())
    numbers = {key: value for key, value in describe(winner).items() if key != "spec"}
    accuracies = {"search_accuracy": quality(winner), "test_accuracy": quality(winner) - 0.4}
    accuracies |= {"search_images": 10_000, "test_images": 5_000}
    result = {"method": method, "seed": 3, **numbers, **accuracies, "num_evaluated": 1000, "minutes": 318.5}
    write(folder / "result.json", json.dumps(result))
    drawn = [space.sample(random.Random(seed)) for seed in range(3)]
    control = Control("test", 5_000, quality(winner) - 0.5, tuple((spec, quality(spec) - 0.4) for spec in drawn))
    write(folder / "control.json", json.dumps(control.to_dict()))
    write(folder / "times.json", json.dumps({**times, "test": 12.5}))
    write_rank(folder / ("stage2" if method == "hierarchical" else "joint"), glit(48, 3, depth, 4), num_ranked)
    return folder


def write_stage(folder: Path, space: SearchSpace, bounds: dict, settings: dict, method: str = "spos") -> GLiTSpec:
    """A stage's folder; returns its winner."""
    rng = random.Random(folder.name)
    write(folder / "space.yaml", space.to_yaml())
    losses = [
        {"step": 10 * i, "loss": 2.3 * math.exp(-i / 200) + 0.6 + rng.gauss(0, 0.05), "lr": 1e-3} for i in range(1, 601)
    ]
    epochs = [{"step": 600 * i, "epoch": i, "train_loss": 1.0} for i in range(1, 11)]
    write(folder / "supernet" / "metrics.jsonl", lines(sorted(losses + epochs, key=lambda entry: entry["step"])))
    search = (RandomSearch if method == "random" else Evolution)(
        space, [macs_budget(**bounds, img_size=IMG_SIZE, num_classes=NUM_CLASSES)], seed=1, **settings
    )
    accuracies = {}
    while specs := search.ask():
        for spec in specs:
            accuracies[spec] = (quality(spec) - 6 + rng.gauss(0, 0.4), quality(spec) > 66 or rng.random() < 0.8)
            search.tell(spec, accuracies[spec][0] if accuracies[spec][1] else accuracies[spec][0] - 2)
    candidates = [
        {**describe(c.spec), "fitness": c.fitness, "images": 10_000 if accuracies[c.spec][1] else 2_000}
        | {"generation": c.generation, "origin": c.origin}
        for c in search.candidates
    ]
    write(folder / "candidates.jsonl", lines(candidates))
    names = {"all global (DeiT)": 69.0, "GLiT-Tiny's table": None, "random 1": 62.5, "random 2": 63.5, "random 3": 61.5}
    drawn = [{"name": name, **describe(space.sample(rng)), "fitness": accuracy} for name, accuracy in names.items()]
    write(folder / "references.json", json.dumps(drawn))
    retrained = [
        {**describe(c.spec), "fitness": c.fitness, "accuracy": quality(c.spec) + rng.gauss(0, 0.3), "images": 10_000}
        for c in search.top(5)
    ]
    retrained.sort(key=lambda network: network["accuracy"], reverse=True)
    write(folder / "retrained.json", json.dumps(retrained))
    write(folder / "winner.json", json.dumps(retrained[0]["spec"]))
    return GLiTSpec.from_dict(retrained[0]["spec"])


def write_rank(folder: Path, space: SearchSpace, number: int) -> None:
    """Networks of all qualities, trained from scratch, into a stage's folder."""
    rng = random.Random(5)
    networks = []
    for place in range(number):
        spec = space.sample(rng)
        costs = {name: cost for name, cost in describe(spec).items() if name != "spec"}
        predictions = {
            "inherited loss": quality(spec) / 100 - 2 + rng.gauss(0, 0.01),
            "inherited top-1": quality(spec) - 6 + rng.gauss(0, 0.4),
            "MACs": costs["macs"],
        }
        trained, again = (
            {"loss": quality(spec) / 100 - 1.5 + rng.gauss(0, 0.005), "top-1": quality(spec) + rng.gauss(0, 0.2)}
            for _ in range(2)
        )
        networks.append(Ranked(spec, costs, predictions, trained, None if place % 3 else again))
    write(folder / "rank.json", json.dumps(compare(folder.name, networks).to_dict()))


def lines(entries: list[dict]) -> str:
    return "".join(json.dumps(entry) + "\n" for entry in entries)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
