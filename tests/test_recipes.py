"""Tests of recipes: reading overrides, and resuming an unfinished run with a recipe."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from glit_models.search import load_search_recipe
from glit_models.search.recipe import SearchRecipe

from glit_models.errors import RecipeError
from glit_models.recipes import RECIPE_FILE, parse_overrides, read_stored_recipe, refuse_other_recipe
from glit_models.runs.files import write_text
from glit_models.training import Recipe, load_recipe

WRITTEN_BY_0_1 = Path(__file__).parent / "fixtures" / "written_by_0_1"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("0.5", 0.5),
        ("1e-3", "1e-3"),  # text to YAML; a key that takes a number reads it
        ("true", True),
        ("null", None),
        ("", None),
        ("[1, 2]", [1, 2]),
        ("{64: 0.8}", {64: 0.8}),
        ("'3'", "3"),
        ('"a # b"', "a # b"),
        ("runs/run #1/model", "runs/run #1/model"),
        ("C: the disk", "C: the disk"),
        ("a=b", "a=b"),
        ("- dashes", "- dashes"),
        ("*.jpg", "*.jpg"),
        ("2024-01-01", "2024-01-01"),
        ("it's", "it's"),
        ("100% of #2", "100% of #2"),
        ("1 # one", "1 # one"),
    ],
)
def test_an_override_is_a_number_a_constant_or_brackets_and_else_the_text_itself(text: str, value: Any) -> None:
    parsed = parse_overrides([f"data.root={text}"])
    assert parsed == {"data.root": value}
    assert type(parsed["data.root"]) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epochs", "an override must be KEY=VALUE, got 'epochs'"),
        ("model.freeze=[a", r"model.freeze: '\[a' is not a YAML value"),
        ("seed.x=1", "unknown key seed.x|seed must be of type int"),
        ("optim.lr.x=1", "optim.lr.x cannot be set: 'lr' is not a section"),
    ],
)
def test_an_override_that_cannot_be_is_named(text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe("smoke", [text])


def test_overrides_may_be_values_which_no_parser_touches() -> None:
    recipe = load_recipe("smoke", {"data.root": "run #1: 'a'", "optim.lr": 1, "model.freeze": ["a"]})
    assert recipe.data.root == "run #1: 'a'"
    assert recipe.optim.lr == 1.0
    assert recipe.model.freeze == ("a",)


def test_the_same_folder_is_the_same_recipe_however_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = {"data.root": "pets", "model.name": "local-dir:small"}
    monkeypatch.chdir(tmp_path)
    write_text(tmp_path / "run" / "recipe.yaml", load_recipe("finetune", paths).to_yaml(), parents=True)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    same = {"data.root": "../pets", "model.name": f"local-dir:{tmp_path}/small"}
    refuse_other_recipe(load_recipe("finetune", same), tmp_path / "run")
    with pytest.raises(RecipeError, match=r"another recipe \(model.name: .*data.root: "):
        refuse_other_recipe(load_recipe("finetune", paths), tmp_path / "run")
    bucket = load_recipe("finetune", {"data.root": "https://example.com/shards"})
    assert "root: https://example.com/shards" in bucket.to_yaml()


def store(folder: Path, recipe: Recipe | SearchRecipe, **changes: Any) -> None:
    """Write a recipe as a run does, with keys changed, put in, or left out (...)."""
    data = yaml.safe_load(recipe.to_yaml())
    for dotted, value in changes.items():
        *sections, key = dotted.split("__")
        section = data
        for name in sections:
            section = section[name]
        if value is ...:
            del section[key]
        else:
            section[key] = value
    (folder / RECIPE_FILE).write_text(yaml.safe_dump(data, sort_keys=False))


RECIPES = (load_recipe("smoke"), load_search_recipe("smoke"))


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_is_the_same_as_what_it_wrote(recipe: Recipe | SearchRecipe, tmp_path: Path) -> None:
    refuse_other_recipe(recipe, tmp_path)  # no run yet
    store(tmp_path, recipe)
    refuse_other_recipe(recipe, tmp_path)
    assert read_stored_recipe(type(recipe), tmp_path) == recipe


@pytest.mark.parametrize(("recipe", "name"), list(zip(RECIPES, ("train", "search"), strict=True)))
def test_runs_that_release_0_1_began_go_on(recipe: Recipe | SearchRecipe, name: str, tmp_path: Path) -> None:
    (tmp_path / RECIPE_FILE).write_text((WRITTEN_BY_0_1 / f"{name}.yaml").read_text())
    refuse_other_recipe(recipe, tmp_path)


def test_keys_that_came_later_have_their_defaults(tmp_path: Path) -> None:
    recipe = load_recipe("smoke")
    store(tmp_path, recipe, model__compile=..., distill=..., patience=...)
    refuse_other_recipe(recipe, tmp_path)
    message = r"holds a run of another recipe \(patience: None -> 9\); choose another folder$"
    with pytest.raises(RecipeError, match=message):
        refuse_other_recipe(load_recipe("smoke", {"patience": 9}), tmp_path)


@pytest.mark.parametrize("prefix", ["", "train."])
def test_keys_that_suit_a_machine_may_change_before_a_run_is_resumed(prefix: str, tmp_path: Path) -> None:
    load = load_search_recipe if prefix else load_recipe
    store(tmp_path, load("smoke"))
    for key, value in (("data.num_workers", 3), ("retries", 2), ("checkpoint_minutes", 9), ("eval_batch_size", 7)):
        refuse_other_recipe(load("smoke", {prefix + key: value}), tmp_path)
    store(tmp_path, load("smoke", {f"{prefix}data.dataset": "wds/shots"}))
    other = load("smoke", {f"{prefix}data.dataset": "wds/shots", f"{prefix}data.num_workers": 3})
    with pytest.raises(RecipeError, match="num_workers"):
        refuse_other_recipe(other, tmp_path)


def test_values_are_compared_as_they_are_read(tmp_path: Path) -> None:
    recipe = load_recipe("smoke", {"optim.lr": 1e-3, "optim.betas": [0.9, 0.99]})
    store(tmp_path, recipe, optim__lr="1e-3", optim__clip_grad=1)
    refuse_other_recipe(recipe, tmp_path)


@pytest.mark.parametrize("value", [None, False, 0, 0.0, "", [], {}])
def test_an_unknown_key_that_is_off_is_ignored_with_a_note(
    value: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = load_recipe("smoke")
    store(tmp_path, recipe, optim__lookahead=value)
    refuse_other_recipe(recipe, tmp_path)
    assert "recipe.yaml has the key optim.lookahead, which this release does not know" in capsys.readouterr().err


@pytest.mark.parametrize("value", [True, 1, "text", [1], {"a": None}])
def test_an_unknown_key_that_asks_for_something_is_refused(value: Any, tmp_path: Path) -> None:
    recipe = load_recipe("smoke")
    store(tmp_path, recipe, optim__lookahead=value)
    with pytest.raises(RecipeError, match=r"sets optim.lookahead to .*, which this release does not know; resume"):
        refuse_other_recipe(recipe, tmp_path)


def test_searches_are_compared_by_the_training_that_they_ask_for(tmp_path: Path) -> None:
    recipe = load_search_recipe("smoke")
    same = dict(recipe.train) | {"precision": "fp32"}  # the default, said aloud
    store(tmp_path, recipe, train=same)
    refuse_other_recipe(recipe, tmp_path)
    for changes, message in (
        ({"train.optim.momentum": 0.8}, r"\(train.optim.momentum: 0.9 -> 0.8\)"),
        ({"supernet.train.optim.momentum": 0.8}, r"\(supernet.train.optim.momentum: None -> 0.8\)"),
        ({"seed": 3}, r"\(seed: 0 -> 3\)"),
    ):
        with pytest.raises(RecipeError, match=message):
            refuse_other_recipe(load_search_recipe("smoke", changes), tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", r"recipe.yaml: not valid YAML: .*; put the recipe back, or choose another folder$"),
        ("text", r"recipe.yaml: a recipe is a mapping of keys, not str; put the recipe back"),
        ("optim: 3", r"recipe.yaml: optim must be a section of keys, got 3; put the recipe back"),
        ("optim: {lr: -1}", r"recipe.yaml: optim.lr must be positive, got -1.0; put the recipe back"),
    ],
)
def test_a_damaged_recipe_of_a_run_is_named(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / RECIPE_FILE).write_text(text)
    with pytest.raises(RecipeError, match=message):
        refuse_other_recipe(load_recipe("smoke"), tmp_path)


def test_a_front_is_not_thinned_out_by_accuracy_alone() -> None:
    for key in ("evaluation.screen_images=100", "retrain.rungs={8: 1}"):
        with pytest.raises(
            RecipeError, match="cannot be set for method nsga2: cheap networks of the front would be lost"
        ):
            load_search_recipe("smoke", ["method=nsga2", key])
