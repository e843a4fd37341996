"""Tests of transformations: only to cheaper blocks, and better than random."""

import functools
import random
from pathlib import Path

import pytest
import torch
from glit_models.search import RandomSearch, Search, SearchRun, glit, load_search_recipe, macs_budget
from glit_models.search.methods.transform import LearnedTransformation, Transformation, cheaper_blocks
from glit_models.search.recipe import SearchRecipe

from glit_models import GLIT_TINY, BlockSpec, GLiTSpec, cli, count_macs
from glit_models.errors import RecipeError, SearchError, SpecError
from tests.spaces import AUTOFORMER
from tests.test_evolution import run, separable

FIXTURES = Path(__file__).parent / "fixtures"
RECIPE = str(FIXTURES / "search.yaml")
SMALL = [
    f"train.data.root={FIXTURES / 'fashion-mnist'}",
    "train.data.limit=60",
    "train.checkpoint_minutes=9",
    "train.optim.epochs=1",
    "supernet.train.optim.epochs=1",
    "budget.macs.high=null",
    "retrain.top=1",
    "control.networks=1",
]
GIVEN = GLiTSpec((BlockSpec(3, 0, 2, 1), BlockSpec(1, 2, 2, 0.5, 5, 1)), 24, 3, 8)
SETTINGS = {"population": 20, "generations": 10, "num_parents": 5, "num_mutation": 10, "num_crossover": 10}


@functools.cache
def _narrow() -> tuple[GLiTSpec, Search]:
    given = glit().canonical(glit().sample(random.Random(5)))
    return given, Transformation.narrow(glit(), given, count_macs)


def _recipe(*overrides: str) -> SearchRecipe:
    return load_search_recipe(RECIPE, [*SMALL, "method=transform", *overrides])


def test_a_network_only_becomes_cheaper_block_by_block() -> None:
    given, space = _narrow()
    assert given in space
    rng = random.Random(0)
    for _ in range(40):
        spec = space.sample(rng)
        assert spec in glit()
        assert count_macs(spec) <= count_macs(given)
        for old, new in zip(given.blocks, spec.blocks, strict=True):
            assert new.num_global_heads <= old.num_global_heads
            assert new.mlp_ratio <= old.mlp_ratio
            assert old.kernel_size is None or new.kernel_size is None or new.kernel_size <= old.kernel_size


def test_attention_becomes_convolution_and_convolution_no_attention() -> None:
    space = glit()
    mixed = space.stage_one(kernel_size=17, expand_ratio=1, qkv_ratio=1, mlp_ratio=4).sample(random.Random(1))
    for index, block in enumerate(mixed.blocks):
        heads = {new.num_global_heads for new in cheaper_blocks(space, mixed, index, count_macs)}
        assert heads <= set(range(block.num_global_heads + 1))
        assert block.num_global_heads in heads


def test_other_families_are_transformed_by_their_own_sizes() -> None:
    given = max(AUTOFORMER, key=lambda spec: (spec.depth, spec.embed_dim, count_macs(spec)))
    space = Transformation.narrow(AUTOFORMER, given, count_macs)
    assert (space.embed_dims, space.depths) == ((given.embed_dim,), (given.depth,))
    assert space.size == 4**given.depth


@pytest.mark.parametrize("seed", range(3))
def test_the_policy_and_the_evolution_of_transformations_go_further_than_chance(seed: int) -> None:
    accuracy, _ = separable(glit(), seed)
    _, space = _narrow()

    def best(method: type[Search]) -> float:
        return run(method(space, [macs_budget()], seed=seed, **SETTINGS), accuracy).best.fitness

    drawn = best(RandomSearch)
    assert best(Transformation) > drawn
    assert best(LearnedTransformation) > drawn


def test_a_policy_goes_on_from_its_state_as_if_it_had_never_stopped() -> None:
    accuracy, _ = separable(glit(), 0)
    _, space = _narrow()
    whole = run(LearnedTransformation(space, [macs_budget()], **SETTINGS), accuracy)
    parts = LearnedTransformation(space, [macs_budget()], **SETTINGS)
    for _ in range(4):
        for spec in parts.ask():
            parts.tell(spec, accuracy(spec))
    resumed = run(LearnedTransformation.from_state(parts.state_dict(), space, [macs_budget()]), accuracy)
    assert resumed.candidates == whole.candidates


def test_a_search_transforms_a_given_network_and_compares_with_it(tmp_path: Path) -> None:
    (tmp_path / "given.json").write_text(GIVEN.to_json())
    torch.set_num_threads(1)
    run = SearchRun(_recipe(f"given={tmp_path / 'given.json'}"), tmp_path / "out", device="cpu")
    assert GIVEN in run.space
    result = run.run()
    assert result is not None
    assert result["macs"] <= count_macs(GIVEN, 32, 10)
    references = (tmp_path / "out/joint/references.json").read_text()
    assert "the given network" in references
    assert run.stages[0].candidates.ranked()


def test_a_recipe_holds_the_given_network_and_no_longer_needs_its_file(tmp_path: Path) -> None:
    (tmp_path / "given.json").write_text(GIVEN.to_json())
    recipe = _recipe(f"given={tmp_path / 'given.json'}")
    (tmp_path / "given.json").unlink()
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    assert load_search_recipe(str(tmp_path / "recipe.yaml")).meaning() == recipe.meaning()
    assert recipe.given_spec == GIVEN


def test_what_cannot_be_transformed_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RecipeError, match="^given is missing: set it to a named network, a JSON file or"):
        _recipe()
    with pytest.raises(RecipeError, match="^given cannot be set: method spos starts from no network"):
        _recipe("method=spos", "given=glit_tiny")
    with pytest.raises(SpecError, match="no_such.json"):
        _recipe("given=no_such.json")
    small = glit(24, 3, 1, patch_size=8, kernel_sizes=(3, 5), expand_ratios=(1,), qkv_ratios=(1,), mlp_ratios=(1, 2))
    cheapest = min(small, key=count_macs)
    with pytest.raises(SearchError, match="given is the cheapest network that it can become"):
        Transformation.narrow(small, cheapest, lambda spec: count_macs(spec, 32))
    with pytest.raises(SearchError, match="must be"):
        Transformation.narrow(small, GLIT_TINY, count_macs)
    arguments = ["search", RECIPE, "--out", str(tmp_path / "out"), "--set", "method=transform", "--set", SMALL[0]]
    assert cli.main([*arguments, "--set", "given=glit_tiny"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "out").exists()
