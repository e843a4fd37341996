"""Tests of budgets relative to a model: their bounds, how they are stored, and errors."""

import json
from pathlib import Path

import pytest
from glit_models.search import load_search_recipe, macs_budget, params_budget
from glit_models.search.recipe import SearchRecipe
from glit_models.search.relative_budget import read_references, resolve_budgets, write_references
from glit_models.search.report.findings import read_findings
from glit_models.search.run.context import RunContext
from glit_models.search.run.pipeline import SearchRun

from glit_models import cli, count_macs
from glit_models.errors import RecipeError, SearchError
from glit_models.families import named_specs
from glit_models.recipes import refuse_other_recipe

FIXTURES = Path(__file__).parent / "fixtures"
RECIPE = str(FIXTURES / "search.yaml")
ROOT = f"train.data.root={FIXTURES / 'fashion-mnist'}"
GLIT = "budget.macs={like: glit_tiny, within: 5 %}"


def _recipe(*overrides: str) -> SearchRecipe:
    return load_search_recipe(RECIPE, [ROOT, "train.data.limit=150", *overrides])


def _costs(recipe: SearchRecipe, folder: Path, size: int = 224, classes: int = 1000) -> dict[str, tuple[str, float]]:
    budgets = [macs_budget(img_size=size, num_classes=classes), params_budget(img_size=size, num_classes=classes)]
    _, references = resolve_budgets(budgets, recipe.budget, folder, size, classes)
    return {name: (reference.model, reference.cost) for name, reference in references.items()}


def test_a_models_costs_are_those_that_are_published_and_ours_those_of_candidates(tmp_path: Path) -> None:
    of_timm = _recipe("budget={macs: {like: deit_tiny, within: 5 %}, params: {like: deit_tiny, within: 5}}")
    model = "deit_tiny_patch16_224"
    assert _costs(of_timm, tmp_path) == {"macs": (model, 1_253_683_200), "params": (model, 5_717_416)}
    convnet = _recipe("budget.macs={like: resnet18, within: 5 %}")  # its constructor takes no image size
    assert _costs(convnet, tmp_path)["macs"][1] == pytest.approx(1.81e9, rel=0.01)
    assert _costs(_recipe(GLIT), tmp_path, 64, 10)["macs"] == (
        "glit_tiny", count_macs(named_specs()["glit_tiny"], 64, 10)
    )  # fmt: skip


def test_the_bounds_lie_around_the_models_cost_at_the_recipes_size_and_classes(tmp_path: Path) -> None:
    context = RunContext(_recipe(GLIT), tmp_path, "cpu", None)
    cost = count_macs(named_specs()["glit_tiny"], 32, 10)
    assert (context.budgets[0].low, context.budgets[0].high) == (pytest.approx(0.95 * cost), pytest.approx(1.05 * cost))
    assert (context.budgets[1].low, context.budgets[1].high) == (None, None)


def test_a_search_that_goes_on_has_the_bounds_that_it_began_with(tmp_path: Path) -> None:
    recipe = _recipe(GLIT)
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    refuse_other_recipe(_recipe(GLIT.replace("5 %", "5.0")), tmp_path)
    with pytest.raises(RecipeError, match=r"budget.macs.within: 5.0 -> 6.0"):
        refuse_other_recipe(_recipe(GLIT.replace("5 %", "6 %")), tmp_path)
    references = RunContext(recipe, tmp_path, "cpu", None).references
    write_references(references, tmp_path)
    assert read_references(tmp_path) == references
    stored = json.loads((tmp_path / "budget.json").read_text())
    stored["macs"] |= {"low": 1.0, "high": 2.0}  # as another release of timm might have counted
    (tmp_path / "budget.json").write_text(json.dumps(stored))
    assert RunContext(recipe, tmp_path, "cpu", None).budgets[0].high == 2
    assert read_findings(tmp_path).budget == {"macs": (1, 2)}
    for damage in ("", "[]", '{"macs": {}}', json.dumps({"macs": {**stored["macs"], "low": "1"}})):
        (tmp_path / "budget.json").write_text(damage)
        with pytest.raises(SearchError, match=r"budget.json is damaged .*; delete it"):
            read_references(tmp_path)


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ("{like: deit_tiny}", "budget.macs.like and budget.macs.within need each other, got 'deit_tiny' and None"),
        ("{within: 5 %}", "budget.macs.like and budget.macs.within need each other"),
        ("{like: deit_tiny, within: -3 %}", "budget.macs.within must be a percentage above 0 and below 100, got '-3"),
        ("{like: deit_tiny, within: 500 %}", "budget.macs.within must be a percentage above 0 and below 100"),
        ("{like: deit_tiny, within: few}", "budget.macs.within must be a percentage above 0 and below 100, got 'few'"),
        ("{like: deit_tiny, within: 5 %, high: 9}", "budget.macs takes low and high, or like and within, not both"),
        ("{like: deit_tny, within: 5 %}", "budget.macs.like: 'deit_tny' is no model of timm or of this package; did "
         "you mean 'deit_tiny'?"),
        ("{like: efficientformer_l1, within: 5 %}", "budget.macs.like: efficientformer_l1 takes no images of 32"),
        ("{like: glit_tiny, within: 5 %}", "no member of the space has macs from"),
    ],
)  # fmt: skip
def test_a_relative_budget_that_cannot_be_is_one_line_with_status_2(
    bounds: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    arguments = [
        "search",
        RECIPE,
        "--out",
        str(out),
        "--set",
        ROOT,
        "--set",
        f"budget.macs={bounds}",
        "--device",
        "cpu",
    ]
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not out.exists()


def test_milliseconds_may_be_relative_to_a_network_of_this_package(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"budget.latency_ms.like must be a network of this package.*'resnet18'"):
        RunContext(_recipe("budget.latency_ms={like: resnet18, within: 5 %}"), tmp_path, "cpu", None)
    run = SearchRun(_recipe("budget.latency_ms={like: glit_tiny, within: 99.9 %}"), tmp_path, "cpu")
    latency = run.context.budgets[2]
    assert latency.high == pytest.approx(1.999 * latency.cost(named_specs()["glit_tiny"]))
