"""Tests of specs: no impossible networks, errors that name the place, equality by value, and JSON round trips."""

import dataclasses
import json
import random

import pytest
from specs import SMALL, TINY48, random_spec

from glit_models import GLIT_BASE, GLIT_SMALL, GLIT_TINY, BlockSpec, GLiTSpec, parse_spec
from glit_models.errors import GlitError, SpecError

LOCAL = {"num_global_heads": 0, "num_local_heads": 3, "mlp_ratio": 4, "kernel_size": 31, "expand_ratio": 2}
GLOBAL = {"num_global_heads": 3, "num_local_heads": 0, "mlp_ratio": 4, "qkv_ratio": 1}


def spec_dict(**block: object) -> dict[str, object]:
    """A network of four good blocks, the last with these fields replaced."""
    return {"embed_dim": 48, "num_heads": 3, "blocks": [GLOBAL, LOCAL, GLOBAL, {**LOCAL, **block}]}


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"kernel_size": 30}, "blocks[3].kernel_size must be odd and positive, got 30"),
        ({"kernel_size": -1}, "blocks[3].kernel_size must be odd and positive, got -1"),
        ({"kernel_size": None}, "blocks[3].kernel_size must be odd and positive, got None"),
        ({"kernel_size": 31.0}, "blocks[3].kernel_size must be odd and positive, got 31.0"),
        ({"kernel_size": True}, "blocks[3].kernel_size must be odd and positive, got True"),
        ({"expand_ratio": 0}, "blocks[3].expand_ratio must be an integer of at least 1, got 0"),
        ({"expand_ratio": 1.5}, "blocks[3].expand_ratio must be an integer of at least 1, got 1.5"),
        ({"mlp_ratio": 0}, "blocks[3].mlp_ratio must be a positive finite number, got 0"),
        ({"mlp_ratio": float("nan")}, "blocks[3].mlp_ratio must be a positive finite number, got nan"),
        ({"mlp_ratio": float("inf")}, "blocks[3].mlp_ratio must be a positive finite number, got inf"),
        ({"mlp_ratio": "4"}, "blocks[3].mlp_ratio must be a positive finite number, got '4'"),
        ({"mlp_ratio": 0.3}, "blocks[3].mlp_ratio must give a whole number of channels: 0.3 * 48 is 14.4"),
        ({"num_local_heads": 2}, "blocks[3].num_global_heads + num_local_heads must be num_heads=3, got 2"),
        ({"num_local_heads": -3}, "blocks[3].num_local_heads must be an integer of at least 0, got -3"),
        ({"num_local_heads": 0}, "blocks[3].num_global_heads + num_local_heads must be at least 1, got 0"),
        (
            {"num_global_heads": 1, "num_local_heads": 2},
            "blocks[3].qkv_ratio must be a positive finite number, got None",
        ),
        (
            {"num_global_heads": 1, "num_local_heads": 2, "qkv_ratio": 0.03},
            "blocks[3].qkv_ratio must give a whole number of channels: 0.03 * 16 is 0.48",
        ),
        (
            {"kernel": 3},
            "blocks[3] has an unknown field 'kernel'; known: num_global_heads, num_local_heads, mlp_ratio, "
            "qkv_ratio, kernel_size, expand_ratio, local_part, local_sizes",
        ),
    ],
)
def test_an_impossible_block_is_named_with_field_value_and_bound(block: dict[str, object], message: str) -> None:
    with pytest.raises(SpecError) as error:
        GLiTSpec.from_dict(spec_dict(**block))
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"embed_dim": 50}, "embed_dim must be a multiple of num_heads=3, got 50"),
        ({"embed_dim": 0}, "embed_dim must be an integer of at least 1, got 0"),
        ({"num_heads": 0}, "num_heads must be an integer of at least 1, got 0"),
        ({"patch_size": 0}, "patch_size must be an integer of at least 1, got 0"),
        ({"blocks": []}, "blocks must hold at least one block, got none"),
        ({"blocks": "no"}, "blocks must be a list, got str"),
        ({"blocks": [3]}, "blocks[0] must be an object of named fields, got int"),
        ({"blocks": [{}]}, "blocks[0] lacks the field 'num_global_heads'"),
        ({"depth": 12}, "spec has an unknown field 'depth'; known: blocks, embed_dim, num_heads, patch_size"),
    ],
)
def test_an_impossible_network_is_named_with_field_value_and_bound(change: dict[str, object], message: str) -> None:
    with pytest.raises(SpecError) as error:
        GLiTSpec.from_dict({**spec_dict(), **change})
    assert str(error.value) == message


@pytest.mark.parametrize("size", [[7], {"a": 7}])
def test_a_size_that_is_a_list_or_an_object_is_named(size: object) -> None:
    block = {"num_global_heads": 1, "num_local_heads": 2, "mlp_ratio": 2, "qkv_ratio": 1, "window_size": size}
    data = {**spec_dict(), "blocks": [block | {"local_part": "window_attention"}]}
    with pytest.raises(SpecError) as error:
        parse_spec(data)
    assert str(error.value) == f"blocks[0].window_size must be a number or a text, got {size!r}"


def test_every_spec_error_is_one_line_that_the_command_line_may_print() -> None:
    assert issubclass(SpecError, GlitError)
    assert issubclass(SpecError, ValueError)


def test_a_spec_that_lacks_a_field_names_it() -> None:
    data = spec_dict()
    del data["num_heads"]
    with pytest.raises(SpecError, match=r"^spec lacks the field 'num_heads'$"):
        GLiTSpec.from_dict(data)


def test_a_block_made_of_something_else_is_named() -> None:
    with pytest.raises(SpecError, match=r"^blocks\[0\] must be a BlockSpec, got dict$"):
        GLiTSpec((GLOBAL,), 48, 3)


def test_blocks_that_compute_the_same_are_equal_whatever_their_unused_fields_say() -> None:
    assert BlockSpec(3, 0, 4, qkv_ratio=1, kernel_size=31, expand_ratio=2) == BlockSpec(3, 0, 4, qkv_ratio=1)
    assert BlockSpec(0, 3, 4, qkv_ratio=1, kernel_size=31, expand_ratio=2) == BlockSpec(0, 3, 4, None, 31, 2)
    assert hash(BlockSpec(3, 0, 4, 1, 31, 2)) == hash(BlockSpec(3, 0, 4.0, 1.0))


def test_an_unused_field_may_even_be_impossible() -> None:
    assert BlockSpec(3, 0, 4, qkv_ratio=1, kernel_size=30).kernel_size is None


def test_specs_compare_by_value_and_can_be_keys() -> None:
    assert GLIT_TINY.scaled(192, 3) == GLIT_TINY
    assert len({GLIT_TINY, GLIT_TINY.scaled(192, 3), GLIT_SMALL}) == 2


def test_a_spec_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        GLIT_TINY.embed_dim = 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        GLIT_TINY.blocks[0].mlp_ratio = 1


@pytest.mark.parametrize("spec", [GLIT_TINY, GLIT_SMALL, GLIT_BASE, *map(random_spec, map(random.Random, range(10)))])
def test_a_spec_survives_json(spec: GLiTSpec) -> None:
    assert GLiTSpec.from_json(spec.to_json()) == spec
    assert GLiTSpec.from_dict(spec.to_dict()) == spec
    assert json.loads(spec.to_json(indent=None)) == spec.to_dict()


def test_json_holds_only_the_fields_that_matter() -> None:
    data = TINY48.to_dict()
    assert "kernel_size" not in data["blocks"][0]
    assert "qkv_ratio" not in data["blocks"][1]


def test_the_named_specs_are_the_published_table() -> None:
    table = [
        (b.num_global_heads, b.num_local_heads, b.kernel_size, b.expand_ratio, b.qkv_ratio, b.mlp_ratio)
        for b in GLIT_TINY.blocks
    ]
    assert table == [
        (3, 0, None, None, 0.5, 4),
        (0, 3, 31, 2, None, 4),
        (1, 2, 31, 4, 1, 6),
        (3, 0, None, None, 1, 4),
        (0, 3, 45, 4, None, 4),
        (1, 2, 31, 4, 1, 6),
        (3, 0, None, None, 1, 2),
        (1, 2, 31, 4, 1, 2),
        (0, 3, 45, 4, None, 4),
        (3, 0, None, None, 1, 4),
        (0, 3, 31, 4, None, 4),
        (3, 0, None, None, 2, 6),
    ]


@pytest.mark.parametrize(("spec", "width", "heads"), [(GLIT_TINY, 192, 3), (GLIT_SMALL, 384, 6), (GLIT_BASE, 768, 12)])
def test_scaling_keeps_head_width_and_proportions(spec: GLiTSpec, width: int, heads: int) -> None:
    assert (spec.embed_dim, spec.num_heads, spec.depth, spec.head_width) == (width, heads, 12, 64)
    for block, tiny in zip(spec.blocks, GLIT_TINY.blocks, strict=True):
        assert block.num_global_heads * 3 == tiny.num_global_heads * heads
        assert block.num_local_heads * 3 == tiny.num_local_heads * heads
    assert spec.scaled(192, 3) == GLIT_TINY


def test_scaling_to_heads_that_do_not_divide_names_the_block() -> None:
    with pytest.raises(SpecError, match=r"^num_heads=4 cannot keep blocks\[2\]'s proportion of 1 global heads of 3$"):
        GLIT_TINY.scaled(256, 4)


def test_a_spec_is_parsed_from_spec_dict_or_path(tmp_path) -> None:
    path = tmp_path / "spec.json"
    path.write_text(SMALL.to_json())
    for value in (SMALL, SMALL.to_dict(), path, str(path)):
        assert GLiTSpec.parse(value) == SMALL


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "spec is not valid JSON"),
        (b"\xff\xfe\x00", "is not text"),
        (b"[]", "spec must be an object of named fields, got list"),
        (json.dumps(spec_dict(kernel_size=30)).encode(), "blocks[3].kernel_size must be odd and positive, got 30"),
    ],
)
def test_a_broken_spec_file_is_named_in_one_line(tmp_path, content: bytes, message: str) -> None:
    path = tmp_path / "spec.json"
    path.write_bytes(content)
    with pytest.raises(SpecError) as error:
        GLiTSpec.parse(path)
    assert str(path) in str(error.value)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_spec_file_that_is_not_there_is_named(tmp_path) -> None:
    with pytest.raises(SpecError, match="cannot be read: No such file"):
        GLiTSpec.parse(tmp_path / "none.json")
    with pytest.raises(SpecError, match="cannot be read: Is a directory"):
        GLiTSpec.parse(tmp_path)
    with pytest.raises(SpecError, match=r"must be a GLiTSpec, a dict or the path of a JSON file, got int"):
        GLiTSpec.parse(3)
