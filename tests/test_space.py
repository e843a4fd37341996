"""Tests of search spaces: exact sizes, uniform draws, changes that stay inside, stages, and YAML round trips."""

import itertools
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from glit_models.search import (
    NAMED_SPACES,
    BlockChoices,
    SearchSpace,
    autoformer_base,
    autoformer_small,
    autoformer_tiny,
    extremes,
    glit,
    glit_released,
    global_only,
    load_space,
)
from spaces import AUTOFORMER, LOCAL, PRODUCT, SCATTERED, SMALL_SPACES, TIED, chi_square, random_space
from specs import random_spec

from glit_models import GLIT_BASE, GLIT_SMALL, GLIT_TINY, BlockSpec, GLiTSpec, count_macs, count_params
from glit_models.errors import GlitError, SearchError

RANDOM_SPACES = [random_space(random.Random(seed)) for seed in range(20)]
NAMED = [space() for name, space in NAMED_SPACES.items() if name != "autoformer"]  # which has no defaults
GLIT_SPACES = [*SMALL_SPACES.values(), *RANDOM_SPACES, *(space for space in NAMED if space.family == "glit")]
SPACES = [*GLIT_SPACES, LOCAL, AUTOFORMER, *(space for space in NAMED if space.family != "glit")]


GENES = ("num_global_heads", "kernel_size", "expand_ratio", "qkv_ratio", "mlp_ratio")


def genes(block: BlockSpec) -> dict[str, float]:
    return {gene: value for gene in GENES if (value := getattr(block, gene)) is not None}


def test_the_paper_s_space_has_the_paper_s_size() -> None:
    assert glit().raw_size == (4 * 3 * 3 * 3 * 3) ** 12
    assert glit().size == (9 + 27 + 2 * 81) ** 12  # global, local, two kinds of mixed blocks


def test_the_other_shipped_spaces_count_nothing_twice() -> None:
    assert glit_released().raw_size == glit_released().size == (4 * 9) ** 12
    assert global_only().raw_size == global_only().size == 9**12


@pytest.mark.parametrize("space", SMALL_SPACES.values(), ids=SMALL_SPACES)
def test_sizes_are_what_counting_gives(space: SearchSpace) -> None:
    members = list(space)
    assert len(members) == len(set(members)) == space.size
    combinations = [
        sum(math.prod(max(len(values), 1) for values in p.values.values()) for p in choices) for choices in space.blocks
    ]
    assert space.raw_size == math.prod(combinations)
    assert [sum(space.counts(block)) for block in range(space.depth)] == combinations


def test_the_released_model_lies_in_its_space_and_in_the_paper_s_but_not_among_the_global_ones() -> None:
    assert GLIT_TINY in glit_released()
    assert GLIT_TINY in glit()
    assert GLIT_TINY not in global_only()


@pytest.mark.parametrize(("spec", "width", "heads"), [(GLIT_SMALL, 384, 6), (GLIT_BASE, 768, 12)])
def test_the_shipped_spaces_exist_at_any_width_and_depth(spec: GLiTSpec, width: int, heads: int) -> None:
    assert spec in glit(width, heads)
    assert spec in glit_released(width, heads)
    assert GLiTSpec(spec.blocks[:5], width, heads, 8) in glit_released(width, heads, depth=5, patch_size=8)
    assert len(glit_released(16, 1).options(0)) == 18  # one head is global or local, never both


def test_the_released_space_has_nine_options_for_each_distribution_of_heads() -> None:
    options = glit_released().options(0)
    by_heads = {g: [genes(block) for block in options if block.num_global_heads == g] for g in range(4)}
    assert [len(values) for values in by_heads.values()] == [9, 9, 9, 9]
    assert {(b["kernel_size"], b["expand_ratio"], b["mlp_ratio"]) for b in by_heads[0]} == set(
        itertools.product((17, 31, 45), (1, 2, 4), (4,))
    )
    for mixed in (1, 2):
        assert {tuple(b.values()) for b in by_heads[mixed]} == set(
            itertools.product((mixed,), (31,), (1, 2, 4), (1,), (2, 4, 6))
        )
    assert {(b["qkv_ratio"], b["mlp_ratio"]) for b in by_heads[3]} == set(itertools.product((0.5, 1, 2), (2, 4, 6)))


def test_a_network_of_another_shape_or_with_another_value_is_no_member() -> None:
    space, member = PRODUCT, next(iter(PRODUCT))
    assert member in space
    assert GLiTSpec(member.blocks[:1], 48, 2) not in space
    assert GLiTSpec(member.blocks, 96, 2) not in space
    assert GLiTSpec(member.blocks, 48, 2, 8) not in space
    assert GLiTSpec((member.blocks[0], BlockSpec(2, 0, 3, 1)), 48, 2) not in space
    assert "glit_tiny" not in space
    assert not [spec for spec in map(random_spec, map(random.Random, range(50))) if spec in glit()]


def test_a_network_that_is_no_member_is_refused_with_the_place() -> None:
    rng = random.Random(0)
    with pytest.raises(SearchError, match=r"^depth must be the space's 2, got 12$"):
        PRODUCT.mutate(GLIT_TINY, 0.1, rng)
    with pytest.raises(SearchError, match=r"^embed_dim must be the space's 192, got 384$"):
        glit().crossover(GLIT_TINY, GLIT_SMALL, rng)
    with pytest.raises(SearchError, match=r"^blocks\[1\] must be one of the space's options, got {'num_global_heads'"):
        next(global_only().neighbours(GLIT_TINY))


def test_a_member_written_with_other_numbers_is_the_same_member() -> None:
    data = GLIT_TINY.to_dict()
    data["blocks"][0]["mlp_ratio"] = 4.0
    spec = GLiTSpec.from_dict(data)
    assert spec.to_json() != GLIT_TINY.to_json()
    assert glit().canonical(spec).to_json() == GLIT_TINY.to_json()


@pytest.mark.parametrize("space", SMALL_SPACES.values(), ids=SMALL_SPACES)
def test_each_member_is_drawn_as_often_as_any_other(space: SearchSpace) -> None:
    rng = random.Random(1)
    weights = dict.fromkeys(space, 1)
    assert abs(chi_square(lambda: space.sample(rng, "members"), weights, 20 * space.size)) < 3


@pytest.mark.parametrize("space", SMALL_SPACES.values(), ids=SMALL_SPACES)
def test_each_combination_of_choices_is_drawn_as_often_as_any_other(space: SearchSpace) -> None:
    rng = random.Random(2)
    weights = {
        spec: math.prod(
            sum(block == spec.blocks[i] for product in choices for block in product.expand(GLiTSpec, space.network))
            for i, choices in enumerate(space.blocks)
        )
        for spec in space
    }
    assert abs(chi_square(lambda: space.sample(rng), weights, 20 * space.size)) < 3


def test_uniform_over_choices_takes_every_distribution_of_heads_equally_often() -> None:
    rng = random.Random(3)
    space = glit(depth=1)
    assert abs(chi_square(lambda: space.sample(rng).blocks[0].num_global_heads, dict.fromkeys(range(4), 1), 4000)) < 3


def test_what_a_seed_gives_never_changes() -> None:
    space, rng = glit(depth=2), random.Random(0)
    a, b = space.sample(rng), space.sample(rng, "members")
    drawn = [a, b, space.mutate(a, 0.5, rng), space.crossover(a, b, rng)]
    assert [[tuple(genes(block).values()) for block in spec.blocks] for spec in drawn] == SEED_0


SEED_0 = [
    [(3, 0.5, 4), (3, 0.5, 2)],
    [(1, 17, 4, 0.5, 6), (1, 45, 1, 2, 2)],
    [(3, 2, 6), (3, 2, 6)],
    [(3, 0.5, 4), (3, 0.5, 2)],
]

PROGRAM = """
import random
from glit_models.search.methods.evolution import Evolution
from glit_models.search.spaces.named import glit
space, rng = glit(), random.Random(5)
spec = space.sample(rng)
for _ in range(20):
    spec = space.crossover(space.mutate(spec, 0.1, rng), space.sample(rng), rng)
print(spec.to_json(None), len(list(space.neighbours(spec))), next(space.neighbours(spec)).to_json(None))
search = Evolution(space, population=4, generations=3, num_mutation=2, num_crossover=2)
for accuracy in range(12):
    spec = search.ask()[0]
    search.tell(spec, accuracy % 5)
    print(spec.to_json(None))
"""


def test_searches_are_the_same_in_every_process(capsys: pytest.CaptureFixture[str]) -> None:
    exec(PROGRAM, {})
    here = capsys.readouterr().out
    environment = {**os.environ, "PYTHONHASHSEED": "1"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True)
    assert done.stdout == here, done.stderr


@pytest.mark.parametrize("space", SPACES)
def test_every_draw_mutation_crossover_and_neighbour_is_a_member(space: SearchSpace) -> None:
    rng = random.Random(4)
    for _ in range(5):
        a, b = space.sample(rng), space.sample(rng, "members")
        children = [space.mutate(a, prob, rng) for prob in (0.1, 0.5, 1)]
        children += [space.crossover(a, b, rng)] if a.depth == b.depth else []
        neighbours = list(itertools.islice(space.neighbours(a), 50))
        assert all(spec in space for spec in (a, b, *children, *neighbours))
        assert a not in neighbours


def test_a_mutation_of_probability_nought_changes_nothing_and_one_changes_every_gene() -> None:
    rng, space = random.Random(5), glit()
    for _ in range(20):
        spec = space.sample(rng)
        assert space.mutate(spec, 0, rng) == spec
        for before, after in zip(spec.blocks, space.mutate(spec, 1, rng).blocks, strict=True):
            assert after.num_global_heads != before.num_global_heads
            shared = genes(before).keys() & genes(after).keys()
            assert all(genes(after)[gene] != genes(before)[gene] for gene in shared)


def test_each_gene_mutates_with_the_probability_that_was_given() -> None:
    rng, space = random.Random(6), global_only(depth=100)
    spec = space.sample(rng)
    changed = sum(
        genes(before)[gene] != genes(after)[gene]
        for _ in range(20)
        for before, after in zip(spec.blocks, space.mutate(spec, 0.1, rng).blocks, strict=True)
        for gene in ("qkv_ratio", "mlp_ratio")
    )
    assert abs(changed - 400) < 3 * (4000 * 0.1 * 0.9) ** 0.5


def test_a_child_has_each_block_from_one_of_its_parents() -> None:
    rng, space = random.Random(7), glit(depth=200)
    a, b = space.sample(rng), space.sample(rng)
    child = space.crossover(a, b, rng)
    assert all(block in pair for block, *pair in zip(child.blocks, a.blocks, b.blocks, strict=True))
    assert 70 < sum(block == other for block, other in zip(child.blocks, a.blocks, strict=True)) < 130
    assert space.crossover(a, a, rng) == a


def test_neighbours_in_a_product_are_all_members_that_differ_in_one_gene() -> None:
    def one_gene_away(a: GLiTSpec, b: GLiTSpec) -> bool:
        different = [(genes(x), genes(y)) for x, y in zip(a.blocks, b.blocks, strict=True) if x != y]
        if len(different) != 1:
            return False
        ((x, y),) = different
        return sum(x[gene] != y[gene] for gene in x.keys() & y.keys()) == 1

    members = list(PRODUCT)
    for spec in members[::7]:
        neighbours = list(PRODUCT.neighbours(spec))
        assert len(neighbours) == len(set(neighbours))
        assert set(neighbours) == {other for other in members if one_gene_away(spec, other)}


@pytest.mark.parametrize("space", SMALL_SPACES.values(), ids=SMALL_SPACES)
def test_every_member_can_be_reached_by_single_steps(space: SearchSpace) -> None:
    reached = border = {next(iter(space))}
    while border:
        border = {spec for member in border for spec in space.neighbours(member)} - reached
        reached |= border
    assert reached == set(space)


def test_options_that_are_tied_together_change_together_and_no_more_than_needed() -> None:
    released = glit_released(depth=1)
    local = GLiTSpec((BlockSpec(0, 3, 4, kernel_size=45, expand_ratio=2),), 192, 3)
    mixed = {spec.blocks[0] for spec in released.neighbours(local) if spec.blocks[0].num_global_heads == 1}
    assert mixed == {BlockSpec(1, 2, 4, 1, 31, 2)}  # the ratios stay, the kernel cannot


def test_the_first_stage_searches_only_the_distribution_of_heads() -> None:
    stage = glit().stage_one()
    assert stage.size == stage.raw_size == 4**12
    assert {tuple(genes(block).items())[1:] for block in stage.options(0) if block.num_global_heads == 1} == {
        (("kernel_size", 31), ("expand_ratio", 4), ("qkv_ratio", 1), ("mlp_ratio", 4))
    }
    fixed = {"kernel_size": 17, "expand_ratio": 1, "qkv_ratio": 0.5, "mlp_ratio": 6}
    assert BlockSpec(2, 1, 6, 0.5, 17, 1) in glit().stage_one(**fixed).options(0)
    assert glit_released().stage_one().size == 4**12


def test_the_first_stage_can_meet_the_paper_s_budget_with_its_defaults_and_with_no_other_expansion() -> None:
    reach = {}
    for expand_ratio in (1, 2, 4):
        stage = glit().stage_one(expand_ratio=expand_ratio)
        reach[expand_ratio] = [count_macs(spec) for spec in extremes(stage, count_macs)]
    assert reach[1][1] <= reach[2][1] < 1.3e9
    assert reach[4][0] < 1.3e9 < 1.4e9 < reach[4][1]


def test_the_second_stage_searches_all_else_and_holds_the_first_one_s_winner() -> None:
    rng = random.Random(8)
    for space in (glit(), glit_released(), *RANDOM_SPACES):
        try:
            stage_one = space.stage_one(kernel_size=31, expand_ratio=2, qkv_ratio=1, mlp_ratio=4)
        except SearchError:
            continue
        winner = stage_one.sample(rng)
        stage_two = space.stage_two(winner)
        assert winner in stage_two
        for _ in range(5):
            spec = stage_two.sample(rng)
            assert spec in space
            assert [b.num_global_heads for b in spec.blocks] == [b.num_global_heads for b in winner.blocks]
    assert glit().stage_two(GLIT_TINY).raw_size == 81**12
    assert glit_released().stage_two(GLIT_TINY).size == 9**12
    assert GLIT_TINY in glit_released().stage_two(GLIT_TINY)


def test_a_stage_that_the_space_does_not_allow_is_refused() -> None:
    with pytest.raises(SearchError) as error:
        glit(kernel_sizes=(3, 5)).stage_one()
    assert str(error.value) == (
        "the first stage's fixed values give blocks[0] {'num_global_heads': 0, 'num_local_heads': 3, 'mlp_ratio': 4, "
        "'kernel_size': 31, 'expand_ratio': 4}, which is none of its options"
    )
    with pytest.raises(SearchError, match=r"^blocks\[1\] has no option left with num_global_heads \[0\], local_parts"):
        global_only().stage_two(GLIT_TINY)
    with pytest.raises(SearchError, match=r"^depth must be the space's 2, got 12$"):
        PRODUCT.stage_two(GLIT_TINY)


@pytest.mark.parametrize("space", [*GLIT_SPACES, LOCAL])
def test_restricting_keeps_exactly_the_members_with_the_allowed_values(space: SearchSpace) -> None:
    rng = random.Random(9)
    allowed = {f: rng.sample([1, 2, 4, 31], 3) for f in ("mlp_ratios", "qkv_ratios", "kernel_sizes", "expand_ratios")}
    fields = {"mlp_ratios": "mlp_ratio", "qkv_ratios": "qkv_ratio", "kernel_sizes": "kernel_size"}
    fields["expand_ratios"] = "expand_ratio"
    expected = [
        [b for b in space.options(i) if all(getattr(b, fields[f]) in (None, *values) for f, values in allowed.items())]
        for i in range(space.depth)
    ]
    if all(expected):
        restricted = space.restrict(**allowed)
        assert [set(restricted.options(i)) for i in range(space.depth)] == list(map(set, expected))
    else:
        with pytest.raises(SearchError, match=r"^blocks\[\d+\] has no option left with"):
            space.restrict(**allowed)


def test_restricting_by_an_unknown_field_names_the_nearest() -> None:
    with pytest.raises(SearchError, match=r"^unknown key kernel_size; did you mean kernel_sizes\?$"):
        glit().restrict(kernel_size=(31,))


@pytest.mark.parametrize("space", SPACES)
def test_a_space_survives_yaml(space: SearchSpace, tmp_path: Path) -> None:
    path = tmp_path / "space.yaml"
    path.write_text(space.to_yaml())
    assert load_space(path) == load_space(str(path)) == space
    assert SearchSpace.from_dict(space.to_dict()) == space
    assert yaml.safe_load(space.to_yaml()) == space.to_dict()


def test_a_space_is_named_alone_or_with_what_is_different(tmp_path: Path) -> None:
    assert load_space("glit_released") == glit_released()
    path = tmp_path / "mine.yaml"
    path.write_text("{space: glit, embed_dim: 96, depth: 6, kernel_sizes: [3, 5, 7]}")
    assert load_space(path) == glit(96, 3, 6, kernel_sizes=(3, 5, 7))
    assert load_space({"space": "global_only", "mlp_ratios": [4]}) == global_only(mlp_ratios=(4,))


BLOCK = {"num_global_heads": [0, 3], "mlp_ratios": [4], "qkv_ratios": [1], "kernel_sizes": [3], "expand_ratios": [1]}


def space_dict(**block: object) -> dict[str, object]:
    """A space of four blocks, the last with these fields replaced, or dropped where None."""
    changed = {key: value for key, value in {**BLOCK, **block}.items() if value is not None}
    return {"embed_dim": 48, "num_heads": 3, "blocks": [{"repeat": 3, "choices": [BLOCK]}, {"choices": [changed]}]}


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"kernel_size": [3]}, "unknown key blocks[3].choices[0].kernel_size; did you mean "
                               "blocks[3].choices[0].kernel_sizes?"),
        ({"mlp_ratios": None}, "blocks[3].choices[0].mlp_ratios is missing"),
        ({"mlp_ratios": []}, "blocks[3].choices[0].mlp_ratios must hold at least one value, got none"),
        ({"mlp_ratios": 4}, "blocks[3].choices[0].mlp_ratios must be a list, got 4"),
        ({"mlp_ratios": [4, 4.0]}, "blocks[3].choices[0].mlp_ratios must not repeat a value, got [4, 4.0]"),
        ({"mlp_ratios": [0]}, "blocks[3].choices[0]: mlp_ratio must be a positive finite number, got 0"),
        ({"mlp_ratios": [0.3]}, "blocks[3].choices[0]: mlp_ratio must give a whole number of channels: "
                                "0.3 * 48 is 14.4"),
        ({"kernel_sizes": [3, 4]}, "blocks[3].choices[0]: kernel_size must be odd and positive, got 4"),
        ({"kernel_sizes": None}, "blocks[3].choices[0]: kernel_size must be odd and positive, got None"),
        ({"kernel_sizes": [[3]]}, "blocks[3].choices[0].kernel_sizes must be numbers or names, got [[3]]"),
        ({"num_global_heads": [4]}, "blocks[3].choices[0]: num_global_heads must be an integer from 0 to num_heads=3, "
                                    "got 4"),
        ({"num_global_heads": [True]},
         "blocks[3].choices[0]: num_global_heads must be an integer from 0 to num_heads=3, got True"),
    ],
)  # fmt: skip
def test_an_impossible_choice_is_named_with_place_value_and_bound(block: dict[str, object], message: str) -> None:
    with pytest.raises(SearchError) as error:
        SearchSpace.from_dict(space_dict(**block))
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"embed": 3}, "unknown key embed; did you mean embed_dim?"),
        ({"num_head": 3}, "unknown key num_head; did you mean num_heads?"),
        ({"embed_dim": 50}, "embed_dim must be a multiple of num_heads=3, got 50"),
        ({"embed_dim": "wide"}, "embed_dim must be an integer of at least 1, got 'wide'"),
        ({"num_heads": None}, "num_heads must be an integer of at least 1, got None"),
        ({"patch_size": 0}, "patch_size must be an integer of at least 1, got 0"),
        ({"blocks": []}, "blocks must hold at least one block, got none"),
        ({"blocks": 3}, "blocks must be a list, got 3"),
        ({"blocks": [3]}, "blocks[0] must be a mapping of keys, got 3"),
        ({"blocks": [{"choices": []}]}, "blocks[0].choices must hold at least one product of choices, got none"),
        ({"blocks": [{"choices": [3]}]}, "blocks[0].choices[0] must be a mapping of keys, got 3"),
        ({"blocks": [{}]}, "blocks[0].choices must be a list, got None"),
        ({"blocks": [{"repeat": 0, "choices": [BLOCK]}]}, "blocks[0].repeat must be an integer of at least 1, got 0"),
        ({"blocks": [{"choices": [{1: [2]}]}]}, "blocks[0].choices[0] has the key 1; keys are names"),
        (
            {"blocks": [{"choices": [{"self": [2]}]}]},
            "unknown key blocks[0].choices[0].self; did you mean blocks[0].choices[0].kernel_sizes?",
        ),
        ({"blocks": [{"repeats": 2}]}, "unknown key blocks[0].repeats; did you mean blocks[0].repeat?"),
    ],
)
def test_an_impossible_space_is_named_with_place_value_and_bound(change: dict[str, object], message: str) -> None:
    with pytest.raises(SearchError) as error:
        load_space({**space_dict(), **change})
    assert str(error.value) == message
    assert isinstance(error.value, GlitError)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"space: glitt", "no search space 'glitt': not a file, and the shipped ones are glit, glit_released, glo"),
        (b"{space: glit, kernels: [3]}", "unknown key kernels; did you mean kernel_sizes?"),
        (b"{space: glit, depth: 0}", "depth must be an integer of at least 1, got 0"),
        (b"{space: glit, mlp_ratios: 4}", "mlp_ratios must be a list, got 4"),
        (b"{space: [1]}", "no search space [1]: not a file, and the shipped ones are glit, glit_released, global_only"),
        (b"- 3", "a search space is a mapping of keys, not list"),
        (b"{", "not valid YAML"),
        (b"\xff\xfe\x00", "not text in UTF-8"),
    ],
)  # fmt: skip
def test_a_broken_space_file_is_named_in_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "space.yaml"
    path.write_bytes(content)
    with pytest.raises(SearchError) as error:
        load_space(path)
    assert str(error.value).startswith(f"{path}: {message}")
    assert "\n" not in str(error.value)


def test_a_name_that_is_no_space_lists_those_that_are() -> None:
    with pytest.raises(
        SearchError, match=r"^no search space 'tiny': not a file, and the shipped ones are glit, glit_r"
    ):
        load_space("tiny")


def test_spaces_are_values() -> None:
    assert glit() == glit()
    assert hash(glit()) == hash(glit())
    assert glit(depth=3) != glit(depth=4)
    assert BlockChoices(mlp_ratios=[4], num_heads=[3]) == BlockChoices(num_heads=(3,), mlp_ratios=(4,), head_dims=())
    assert SCATTERED != TIED


# ---- several widths and depths, several local parts ----


def test_spaces_of_autoformer_have_the_published_sizes_and_extremes() -> None:
    assert autoformer_tiny(mlp_ratios=(3.5, 4)).size == autoformer_tiny(mlp_ratios=(3.5, 4)).raw_size
    assert f"{autoformer_tiny(mlp_ratios=(3.5, 4)).size:.3g} {autoformer_tiny().size:.3g}" == "1.06e+09 2.81e+11"
    assert f"{autoformer_small().size:.3g} {autoformer_base().size:.3g}" == "7.71e+13 6.25e+15"
    for space, counts in (
        (autoformer_tiny(mlp_ratios=(3.5, 4)), [5_366_056, 10_517_272]),
        (autoformer_small(), [13_057_320, 34_790_440]),
        (autoformer_base(), [39_792_856, 76_882_264]),
    ):
        assert [count_params(spec) for spec in extremes(space, count_params)] == counts


def test_a_space_of_several_widths_and_depths_holds_each_of_them() -> None:
    members = list(AUTOFORMER)
    assert len(set(members)) == len(members) == AUTOFORMER.size == 2 * (4**2 + 4**3)
    assert {(spec.embed_dim, spec.depth) for spec in members} == {(24, 2), (24, 3), (32, 2), (32, 3)}
    neighbours = list(AUTOFORMER.neighbours(members[0]))
    assert len(set(neighbours)) == len(neighbours) == 2 * 2 + 1 + 4  # a gene of a block, the width, a block more
    assert members[0] not in neighbours


def test_draws_take_each_width_and_depth_equally_often_or_each_member() -> None:
    rng, members = random.Random(0), list(AUTOFORMER)
    by_choice = {spec: 4.0 ** (3 - spec.depth) for spec in members}
    assert abs(chi_square(lambda: AUTOFORMER.sample(rng), by_choice, 4000)) < 3
    assert abs(chi_square(lambda: AUTOFORMER.sample(rng, "members"), dict.fromkeys(members, 1), 4000)) < 3


def test_a_new_depth_cuts_blocks_off_or_adds_random_ones() -> None:
    rng = random.Random(1)
    for _ in range(20):
        spec = AUTOFORMER.sample(rng)
        other = AUTOFORMER.mutate(spec, 0.0, rng, depth_prob=1.0)
        assert other.depth == 5 - spec.depth
        assert other.blocks[:2] == spec.blocks[:2]
        assert other.embed_dim == spec.embed_dim
        assert AUTOFORMER.mutate(spec, 0.0, rng, width_prob=1.0, depth_prob=0.0).embed_dim == 56 - spec.embed_dim
    again = [AUTOFORMER.mutate(spec, 1.0, rng, redraw=True).embed_dim for _ in range(200)]
    assert 60 < again.count(spec.embed_dim) < 140


def test_parents_of_other_depths_have_no_child() -> None:
    short, long = AUTOFORMER.restrict(depth=(2,)), AUTOFORMER.restrict(depth=(3,))
    rng = random.Random(2)
    with pytest.raises(SearchError, match="^parents must be of equal depth, got 2 and 3$"):
        AUTOFORMER.crossover(short.sample(rng), long.sample(rng), rng)


def test_local_parts_are_a_gene_and_only_their_own_sizes_count() -> None:
    by_part = {"local_conv": 2 * 2, "local_conv2d": 2 * 2, "window_attention": 2}
    mixed = sum(by_part.values()) * 2  # times the ratios of the feed-forward network
    assert len(LOCAL.options(0)) == mixed + 2 * mixed + 2
    rng = random.Random(3)
    spec = LOCAL.sample(rng)
    for other in LOCAL.neighbours(spec):
        changed = [i for i in range(2) if other.blocks[i] != spec.blocks[i]]
        assert len(changed) == 1
    kept = LOCAL.restrict(local_parts=("window_attention",))
    assert {block.local_part for block in kept.options(0) if block.num_local_heads} == {"window_attention"}
    without = LOCAL.restrict(window_sizes=())
    assert {block.local_part for block in without.options(0) if block.num_local_heads} == {"local_conv", "local_conv2d"}
    second = LOCAL.stage_two(spec)
    assert spec in second
    assert {(b.num_global_heads, b.local_part) for b in second.options(0)} == {
        (spec.blocks[0].num_global_heads, spec.blocks[0].local_part)
    }


def test_the_first_stage_must_hold_the_sizes_of_all_local_parts() -> None:
    with pytest.raises(SearchError, match=r"^fixed.window_size is missing: the first stage must hold it$"):
        LOCAL.stage_one(kernel_size=3, expand_ratio=1, mlp_ratio=1)
    stage = LOCAL.stage_one(kernel_size=3, expand_ratio=1, mlp_ratio=1, window_size=5)
    assert len(stage.options(0)) == 3 * 3 + 1
    with pytest.raises(SearchError, match=r"^networks of autoformer are searched in one stage; take another method"):
        AUTOFORMER.stage_one()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"family": "resnet"}, "unknown family 'resnet'; known: autoformer, glit"),
        ({"depth": [2, 4]}, "blocks must describe depth=4 blocks, got 3"),
        ({"depth": [3, 3]}, "depth must be one value or several different ones, got [3, 3]"),
        ({"embed_dim": []}, "embed_dim must be one value or several different ones, got []"),
        ({"embed_dim": [24, "32"]}, "embed_dim must be an integer of at least 1, got '32'"),
        ({"head_dims": 3}, "unknown key head_dims; did you mean head_dim?"),
        ({"head_dim": 0}, "head_dim must be an integer of at least 1, got 0"),
        ({"blocks": [{"repeat": 3, "choices": [{"mlp_ratios": [1]}]}]}, "blocks[0].choices[0].num_heads is missing"),
        ({"blocks": [{"repeat": 3, "choices": [{"num_heads": [1]}]}]},
         "blocks[0].choices[0]: mlp_ratio and mlp_hidden: exactly one must be given"),
        ({"blocks": [{"repeat": 3, "choices": [{"num_heads": [1], "mlp_ratios": [0.04]}]}]},
         "blocks[0].choices[0]: mlp_ratio must give at least one channel: 0.04 * 24 (at embed_dim=24)"),
    ],
)  # fmt: skip
def test_an_impossible_space_of_several_widths_is_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(SearchError) as error:
        load_space({**AUTOFORMER.to_dict(), **change})
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)
