"""Tests of fitness measures: one finite number per network, independent of other networks; the built-in ones."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from glit_models.search import FITNESSES, Fitness, SearchRun, Setting, load_search_recipe, write_report
from glit_models.search.supernets.scoring import Evaluator
from specs import SMALL
from torch import nn

import glit_models
from glit_models import BlockSpec, GLiTSpec, Spec, count_macs
from glit_models.errors import SearchError
from tests.spaces import TIED

FIXTURES = Path(__file__).parent / "fixtures"
QUICK = {
    "method": "evolution",
    "evolution": {"population": 3, "generations": 2, "num_parents": 1, "num_mutation": 2, "num_crossover": 0},
    "retrain.top": 1,
    "fixed": {},
}
WIDE = GLiTSpec((BlockSpec(1, 2, 6, 1, 5, 2),) * 2, 48, 3, 16)
SPECS = (SMALL, WIDE, GLiTSpec(SMALL.blocks[:1], 48, 3))


def create_model(spec: Spec) -> nn.Module:
    return glit_models.glit_tiny(spec=spec, img_size=32, num_classes=5)


def no_supernet() -> Evaluator:
    raise AssertionError("a fitness that needs no supernet has opened one")


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    def train(spec: Spec, out: Path, epochs: int | None) -> float:
        assert epochs is None
        out.mkdir(parents=True)  # fails where a network is trained twice
        return 50.0 + spec.depth

    return Setting(TIED, 3, tmp_path, torch.device("cpu"), 32, 5, create_model, train, no_supernet)


def search(out: Path, **changes: Any) -> list[dict[str, Any]]:
    """The candidates of a search of seconds."""
    torch.set_num_threads(1)
    values = {"train.data.root": str(FIXTURES / "fashion-mnist"), **QUICK, **changes}
    recipe = load_search_recipe(str(FIXTURES / "search.yaml"), values)
    assert SearchRun(recipe, out, device="cpu").run() is not None
    return [json.loads(line) for line in (out / "joint" / "candidates.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", ["standalone", "synflow", "macs"])
def test_a_score_is_the_same_whatever_else_is_scored(name: str, setting: Setting) -> None:
    together = FITNESSES[name](setting).evaluate(SPECS)
    alone = {}
    for index, spec in enumerate(SPECS):
        own = Setting(**{**vars(setting), "folder": setting.folder / str(index)})
        alone |= FITNESSES[name](own).evaluate([spec])
    assert together == alone
    assert not FITNESSES[name].needs_supernet


def test_macs_are_counted_at_the_size_of_the_search_s_images(setting: Setting) -> None:
    scores = FITNESSES["macs"](setting).evaluate(SPECS)
    assert [scores[spec] for spec in SPECS] == [count_macs(spec, 32, 5) / 1e6 for spec in SPECS]


def test_synflow_is_the_sum_of_parameters_times_gradients_of_the_absolute_network(setting: Setting) -> None:
    state = torch.random.get_rng_state()
    score = FITNESSES["synflow"](setting).evaluate([SMALL])[SMALL]
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(setting.seed)
    model = create_model(SMALL).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.abs())
    total = model(torch.ones(1, 3, 32, 32, dtype=torch.float64)).sum()
    gradients = torch.autograd.grad(total, list(model.parameters()))
    pairs = zip(model.parameters(), gradients, strict=True)
    flow = sum((parameter * gradient).abs().sum().item() for parameter, gradient in pairs)
    assert score == pytest.approx(math.log10(flow), rel=1e-12)


def test_a_short_training_scores_each_network_in_a_folder_of_its_own(setting: Setting) -> None:
    scores = FITNESSES["standalone"](setting).evaluate(SPECS)
    assert [scores[spec] for spec in SPECS] == [53, 52, 51]
    assert len(list((setting.folder / "standalone").iterdir())) == len(SPECS)


def test_a_search_by_short_trainings_keeps_them_and_trains_no_supernet(tmp_path: Path) -> None:
    candidates = search(tmp_path, fitness="standalone")
    runs = [json.loads(path.read_text()) for path in (tmp_path / "joint" / "standalone").glob("*/result.json")]
    assert sorted(run["validation_top1"] for run in runs) == sorted(entry["fitness"] for entry in candidates)
    assert {run["epochs"] for run in runs} == {1}
    assert not (tmp_path / "joint" / "supernet").exists()
    assert FITNESSES["standalone"].label in write_report(tmp_path).read_text()


def test_a_search_by_multiply_adds_finds_the_largest_network(tmp_path: Path) -> None:
    candidates = search(tmp_path, fitness="macs")
    assert [entry["fitness"] for entry in candidates] == [entry["macs"] / 1e6 for entry in candidates]
    best = max(candidates, key=lambda entry: entry["macs"])
    assert json.loads((tmp_path / "winner.json").read_text()) == best["spec"]


def own(score: Callable[[Sequence[Spec]], Any]) -> type[Fitness]:
    """A fitness of one's own whose `score` is this function."""
    return type("Own", (Fitness,), {"score": lambda self, specs: score(specs)})


@pytest.mark.parametrize(
    ("score", "message"),
    [
        (lambda specs: [1.0], "fitness Own must return a number for each of 3 networks, got 1"),
        (lambda specs: None, "fitness Own must return numbers, got None"),
        (lambda specs: ["high"] * 3, "fitness Own must return numbers, got ['high', 'high', 'high']"),
        (lambda specs: [1.0, float("nan"), 2.0], "fitness Own must return finite numbers, got nan for {"),
        (lambda specs: [1.0, 2.0, -math.inf], "fitness Own must return finite numbers, got -inf for {"),
    ],
)
def test_what_is_no_finite_number_for_each_network_is_refused(
    score: Callable[[Sequence[Spec]], Any], message: str, setting: Setting
) -> None:
    with pytest.raises(SearchError) as error:
        own(score)(setting).evaluate(SPECS)
    assert str(error.value).startswith(message)


def test_an_error_inside_a_fitness_of_ones_own_is_shown_as_it_is(setting: Setting) -> None:
    with pytest.raises(TypeError, match="unsupported operand"):
        own(lambda specs: [1 + "1" for _ in specs])(setting).evaluate(SPECS)


def test_a_fitness_that_screens_is_compared_by_its_mean_over_images(setting: Setting) -> None:
    fitness = type("Own", (Fitness,), {"can_screen": True, "score": lambda self, specs: [0.0] * len(specs)})(setting)
    with pytest.raises(SearchError, match=r"^fitness Own has can_screen, but lacks screen$"):
        fitness.evaluate(SPECS, 1)
    type(fitness).screen = lambda self, specs, num_batches: [[spec.depth, num_batches] for spec in specs]
    assert fitness.evaluate(SPECS, 4) == {spec: (spec.depth + 4) / 2 for spec in SPECS}
    type(fitness).screen = lambda self, specs, num_batches: [math.nan, "few", 1]
    with pytest.raises(SearchError, match=r"^fitness Own must return numbers, got \[nan, 'few', 1\]$"):
        fitness.evaluate(SPECS, 4)
