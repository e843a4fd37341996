"""What is read may be anybody's: bombs, damage and nonsense end in one line, in little time and memory."""

from __future__ import annotations

import resource
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from glit_models.search import load_search_recipe, load_space

from glit_models import BlockSpec, GLiTSpec, parse_spec
from glit_models.errors import GlitError, SpecError, WeightsError
from glit_models.reading import parse_json, parse_yaml
from glit_models.recipes import parse_overrides
from glit_models.runs import memory
from glit_models.training import load_recipe
from glit_models.weights.files import read_state_dict

LAUGHS = "\n".join(
    ["a: &a [x, x, x, x, x, x, x, x, x]"]
    + [f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]" for a, b in zip("abcdefgh", "bcdefghi", strict=True)]
)
BLOCK = {"num_global_heads": 1, "num_local_heads": 0, "mlp_ratio": 1, "qkv_ratio": 1}


@pytest.fixture(autouse=True)
def bounds() -> Iterator[None]:
    """No test here may take more than seconds, or 200 MB more than the process has had before."""
    start, memory_before = time.thread_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert time.thread_time() - start < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory_before < 200_000


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (LAUGHS, "holds more than 100,000 values"),
        ("a: &a [*a]", "nested more than 50 deep"),
        ("a: " + "[" * 3000, "nested more than 50 deep|not valid YAML"),
        ("a: " + "{a: " * 60 + "1" + "}" * 60, "nested more than 50 deep"),
        ("a: 2001-99-99", "not valid YAML: month must be in 1..12"),
        ("a: " + "9" * 5000, "not valid YAML: Exceeds the limit"),
        ("a: [" + "1, " * 100_000 + "]", "longer than 65,536 characters"),
        ("? [a]\n: b", "not valid YAML: while constructing a mapping"),
        ("a: !!python/object/apply:os.system [true]", "could not determine a constructor"),
    ],
)
def test_a_recipe_or_space_that_is_a_bomb_is_one_line(tmp_path: Path, text: str, complaint: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    for load in (load_recipe, load_search_recipe, load_space):
        with pytest.raises(GlitError, match=complaint) as error:
            load(str(path))
        assert "\n" not in str(error.value)
        assert len(str(error.value)) < 500 + len(str(path))


def test_an_override_that_is_a_bomb_is_text_or_one_line() -> None:
    assert parse_overrides(["a=2001-99-99"]) == {"a": "2001-99-99"}
    with pytest.raises(GlitError, match="is not a YAML value"):
        parse_overrides(["a=" + "[" * 3000])


@pytest.mark.parametrize("text", ["[" * 100_000, "[" * 60 + "]" * 60, "[" + "0," * 100_001 + "0]", "9" * 5000, '{"a"'])
def test_json_is_bounded_as_well(text: str) -> None:
    with pytest.raises(ValueError, match="nested more than 50 deep|holds more than 100,000 values|not valid JSON"):
        parse_json(text)


def test_yaml_that_repeats_itself_a_little_is_read() -> None:
    assert parse_yaml("a: &a {b: 1}\nc: [*a, *a]") == {"a": {"b": 1}, "c": [{"b": 1}, {"b": 1}]}


@pytest.mark.parametrize(
    ("space", "complaint"),
    [
        ({"space": "glit", "depth": 10**9}, "depth must be at most 1000, got 1000000000"),
        ({"space": "glit", "num_heads": 10**9}, "num_heads must be at most 65536"),
        ({"space": "glit", "embed_dim": 10**30, "num_heads": 1}, "embed_dim must be at most 65536"),
        ({"space": "autoformer_tiny", "depth": [10**9]}, "blocks must describe depth=1000000000 blocks, got 1000"),
        ({"embed_dim": 8, "num_heads": 1, "blocks": [{"repeat": 10**9, "choices": []}]}, "repeat must be .* to 1000"),
        ({"space": "glit", "kernel_sizes": list(range(1, 60001, 2))}, "at most 100,000 combinations, got 3,240,000"),
    ],
)
def test_a_space_is_bounded_before_it_is_written_out(space: dict[str, object], complaint: str) -> None:
    with pytest.raises(GlitError, match=complaint):
        load_space(space)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"blocks": [BLOCK] * 100_000}, "blocks must hold at most 1000 blocks, got 100000"),
        ({"embed_dim": 10**30}, "embed_dim must be at most 65536, got 1000000"),
        (
            {"num_heads": 10**4000},
            r"num_heads must be at most 65536, got 1000000000000000000000000000000000000000\.\.\.",
        ),
        ({"blocks": [BLOCK | {"mlp_ratio": 1e300}]}, "mlp_ratio must be at most 65536, got 1e"),
    ],
)
def test_a_spec_is_bounded(change: dict[str, object], complaint: str) -> None:
    with pytest.raises(SpecError, match=complaint):
        parse_spec({"embed_dim": 8, "num_heads": 1, "blocks": [BLOCK]} | change)


def test_a_network_that_does_not_fit_into_memory_is_refused_before_it_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import timm

    spec = GLiTSpec((BlockSpec(1, 0, 4, 1),) * 1000, 65536, 1)
    with pytest.raises(SpecError, match=r"the parameters take 206,\d+ GB, and this machine has"):
        timm.create_model("glit_tiny", spec=spec)
    for keywords in ({"num_classes": 10**12}, {"img_size": 16 * 10**6}):
        with pytest.raises(SpecError, match="take a smaller network, image or number of classes"):
            timm.create_model("glit_tiny", **keywords)
    with torch.device("meta"):
        assert timm.create_model("glit_tiny", num_classes=10**9).head.weight.is_meta
    assert 10**6 < memory.free_memory() < 1 << 62


def test_an_archive_that_is_a_bomb_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "bomb.pth"
    torch.save({"model": {"a": torch.zeros(1000)}}, path)
    with zipfile.ZipFile(path) as stored:
        members = {name: stored.read(name) for name in stored.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as compressed:
        for name, content in members.items():
            compressed.writestr(name, content)
    with pytest.raises(WeightsError, match="this archive is compressed, which torch.save never does"):
        read_state_dict(path)


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        (torch.zeros(1).expand(10**12), "'a' has 1,000,000,000,000 numbers, of which the file holds fewer"),
        (torch.eye(3).to_sparse(), "'a' must be a dense tensor, got torch.sparse_coo on cpu"),
        (torch.zeros(3, device="meta"), "'a' must be a dense tensor, got torch.strided on meta"),
        ("text", "no state dict found"),
    ],
)
def test_a_tensor_is_dense_and_of_the_size_of_its_file(tmp_path: Path, value: object, complaint: str) -> None:
    torch.save({"a": value}, tmp_path / "x.pth")
    with pytest.raises(WeightsError, match=complaint):
        read_state_dict(tmp_path / "x.pth")
