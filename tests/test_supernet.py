"""Tests of the supernet: the output of a path, what a training step changes, and extracted networks."""

import random
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import timm
import torch
from glit_models.search import SearchSpace, Supernet, autoformer, glit
from glit_models.search.supernets.supernet import Sharing
from reference import reference_tensors
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from glit_models import BlockSpec, GLiTSpec
from glit_models.autoformer.spec import AutoFormerBlock, AutoFormerSpec
from glit_models.errors import SearchError
from glit_models.parts import BuildOptions, Part, TokenGrid
from tests.spaces import AUTOFORMER, LOCAL, SMALL_SPACES, VITAS, random_space

SPACE = glit(24, 3, 2, patch_size=8, kernel_sizes=(3, 5), expand_ratios=(1, 2), qkv_ratios=(0.5, 1), mlp_ratios=(1, 2))
SHARINGS: tuple[Sharing, ...] = ("independent", "entangled")  # of any space
CASES = [(space, sharing) for space in (*SMALL_SPACES.values(), LOCAL) for sharing in SHARINGS] + [
    (AUTOFORMER, "entangled"), (VITAS, "entangled")
]  # fmt: skip
LARGEST = GLiTSpec((BlockSpec(0, 3, 2, None, 5, 2), BlockSpec(3, 0, 2, 1)), 24, 3, 8)


def _supernet(space: SearchSpace = SPACE, sharing: Sharing = "entangled") -> Supernet:
    """With weights and statistics that differ everywhere."""
    torch.manual_seed(0)
    supernet = Supernet(space, sharing, img_size=4 * space.patch_size, num_classes=5)
    for tensor in [*supernet.parameters(), *supernet.buffers()]:
        if tensor.is_floating_point():
            tensor.data.uniform_(0.2, 0.8)
            tensor.data.mul_(0.3 if tensor.ndim > 1 else 1)
    return supernet


def _images(space: SearchSpace = SPACE, count: int = 4) -> Tensor:
    size = 4 * space.patch_size
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("space", "sharing"), CASES)
def test_what_is_extracted_computes_what_the_active_path_does(space: SearchSpace, sharing: Sharing):
    supernet = _supernet(space, sharing).eval()
    rng = random.Random(0)
    for _ in range(6):
        spec = space.sample(rng)
        supernet.activate(spec)
        with torch.no_grad():
            torch.testing.assert_close(
                supernet.extract(spec)(_images(space)), supernet(_images(space)), rtol=0, atol=1e-6
            )


@pytest.mark.parametrize("sharing", SHARINGS)
def test_any_space_has_a_supernet(sharing: Sharing):
    rng = random.Random(1)
    for _ in range(10):
        space = random_space(rng)
        supernet = _supernet(space, sharing).eval()
        spec = space.sample(rng)
        supernet.activate(spec)
        assert torch.equal(supernet(_images(space)), supernet.extract(spec)(_images(space)))


def test_what_is_extracted_is_a_model_of_its_own():
    supernet = _supernet()
    model = supernet.extract(LARGEST)
    assert model.spec == LARGEST
    before = {name: tensor.clone() for name, tensor in supernet.state_dict().items()}
    for parameter in model.parameters():
        parameter.data.zero_()
    assert all(torch.equal(before[name], tensor) for name, tensor in supernet.state_dict().items())
    assert timm.create_model("glit_tiny", spec=LARGEST, img_size=32, num_classes=5).load_state_dict(model.state_dict())


def test_entangled_options_are_slices_of_the_largest_and_kernels_are_centred():
    supernet = _supernet()
    small = GLiTSpec((BlockSpec(1, 2, 1, 0.5, 3, 1), BlockSpec(3, 0, 1, 0.5)), 24, 3, 8)
    large, part = supernet.state_of(LARGEST), supernet.state_of(small)
    name = "blocks.0.mixer.conv."
    assert torch.equal(part[name + "dwconv.weight"], large[name + "dwconv.weight"][:16, :, :, 1:4])
    assert torch.equal(part[name + "project.weight"], large[name + "project.weight"][8:, :16])  # the last channels
    assert torch.equal(part["blocks.0.mlp.fc2.weight"], large["blocks.0.mlp.fc2.weight"][:, :24])
    qkv = large["blocks.1.mixer.attn.qkv.weight"].view(3, 3, 8, 24)
    assert torch.equal(part["blocks.1.mixer.attn.qkv.weight"].view(3, 3, 4, 24), qkv[:, :, :4])


def test_independent_options_share_nothing_but_norms():
    supernet = _supernet(sharing="independent")
    other = GLiTSpec((BlockSpec(0, 3, 1, None, 3, 2), BlockSpec(3, 0, 1, 0.5)), 24, 3, 8)
    first, second = supernet.state_of(LARGEST), supernet.state_of(other)
    common = {
        name for name in first if name in second and first[name].data_ptr() == second[name].data_ptr()
    }  # fmt: skip
    assert {name.split(".")[2] for name in common if name.startswith("blocks.")} == {"norm1", "norm2"}
    assert supernet.num_params() > _supernet().num_params()


def test_training_a_path_is_training_the_network_by_itself():
    supernet = _supernet(sharing="independent").train()
    model: nn.Module = supernet.extract(LARGEST).train()
    supernet.activate(LARGEST)
    labels = torch.arange(4)
    cross_entropy(supernet(_images()), labels).backward()
    cross_entropy(model(_images()), labels).backward()
    # Its tensors are the stores' own, in other places.
    own = {parameter.data_ptr(): parameter.grad for parameter in supernet.parameters()}
    state = supernet.state_of(LARGEST)
    for name, parameter in model.named_parameters():
        assert torch.equal(own[state[name].data_ptr()], parameter.grad), name  # type: ignore[arg-type]


def test_blocks_with_the_same_option_share_a_module_and_not_their_weights():
    supernet = _supernet().eval()
    spec = SPACE.sample(random.Random(0))
    spec = SPACE.make_spec([spec.blocks[0]] * SPACE.depth, spec.embed_dim)
    supernet.activate(spec)
    logits = supernet(_images())
    first, last = supernet.blocks[0], supernet.blocks[-1]
    parts = supernet.parts_of(0, spec.blocks[0], spec.embed_dim)
    assert first.template(parts) is last.template(parts)
    torch.testing.assert_close(logits, supernet.extract(spec).eval()(_images()))
    assert not torch.equal(first.tensors(parts)["mlp.fc1.weight"], last.tensors(parts)["mlp.fc1.weight"])


def test_a_network_of_another_space_and_a_supernet_without_a_path_are_refused():
    supernet = _supernet()
    with pytest.raises(SearchError, match=r"call activate\(spec\) first"):
        supernet(_images())
    with pytest.raises(SearchError, match=r"blocks\[0\] must be one of the space's options"):
        supernet.activate(GLiTSpec((BlockSpec(3, 0, 7, 1),) * 2, 24, 3, 8))
    with pytest.raises(SearchError, match="sharing must be one of independent, entangled, both_sides, got 'some'"):
        Supernet(SPACE, "some")  # type: ignore[arg-type]


def test_what_cannot_be_shared_is_refused():
    with pytest.raises(SearchError, match=r"^sharing 'independent' needs one embed_dim, got 24, 32; take 'entangled'$"):
        Supernet(AUTOFORMER, "independent")


def test_the_names_of_the_weights_are_those_that_0_1_wrote():
    names = {name for name in _supernet().state_dict() if name.startswith("net.blocks.0.")}
    prefixes = {name.removeprefix("net.blocks.0.").rpartition(".")[0] for name in names}
    assert prefixes == {
        "norm1", "norm2", "attn.3-8.qkv", "attn.3-8.proj", "conv.3-48-5.expand", "conv.3-48-5.dwconv", "conv.3-48-5.bn",
        "conv.3-48-5.project", "mlp.48.fc1", "mlp.48.fc2",
    }  # fmt: skip


@dataclass(frozen=True)
class Sized(Part):
    """A part of any size."""

    size: Any

    num_params: ClassVar[int] = 0
    label: ClassVar[str] = "sized"

    def num_macs(self, tokens: TokenGrid) -> int:
        return 0

    def build(self, options: BuildOptions) -> nn.Module:
        return nn.Identity()


def test_sizes_of_every_type_name_the_weights_of_a_part_and_different_ones_differ():
    sizes = [1, 2.5, 0.25, 1e-7, -1, 10**7, 10**7 + 1, "max", "a.b", "a_b", "a-b", "a_2e_b", "half", "", None]
    modules = nn.ModuleDict({Sized(8, size).key: nn.Identity() for size in sizes})
    assert len(modules) == len(sizes) - 1  # no size is an empty one
    assert not any("." in key for key in modules)
    assert [Sized(8, size).key for size in (3, 3.0, True, 0.5)] == ["3", "3", "1", "0_2e_5"]


# ---- AutoFormer's own networks ----

HEADS = {"largest": (3, 3, 3), "sub_a": (2, 1), "sub_b": (1, 3, 2)}
RATIOS = {"largest": (4.0, 4.0, 4.0), "sub_a": (3.5, 3.0), "sub_b": (3.0, 4.0, 3.5)}
WIDTHS = {"largest": 48, "sub_a": 32, "sub_b": 40}


def _authors_supernet() -> Supernet:
    """Ours with the weights of the authors' supernet; rows of queries, keys and values lie interleaved in theirs."""
    space = autoformer((32, 40, 48), (2, 3), (1, 2, 3), (3.0, 3.5, 4.0), head_dim=16)
    supernet = Supernet(space, img_size=64, num_classes=10)
    state = {}
    for name, tensor in reference_tensors("autoformer_small_state").items():
        for theirs, ours in (
            ("patch_embed_super", "patch_embed"), ("attn_layer_norm", "norm1"), ("ffn_layer_norm", "norm2"),
            ("rel_pos_embed_", "position_"), ("embeddings_table_v", "vertical"), ("embeddings_table_h", "horizontal"),
            ("attn.", "attn.3-16-14."), (".fc", ".mlp.192.fc"),
        ):  # fmt: skip
            name = name.replace(theirs, ours)
        if name.endswith("qkv.weight"):
            tensor = tensor.unflatten(0, (-1, 3)).transpose(0, 1).flatten(0, 1)
        state[f"net.{name}"] = tensor
    supernet.load_state_dict(state)
    return supernet.eval()


@pytest.mark.parametrize("network", HEADS)
@torch.no_grad()
def test_networks_of_the_authors_supernet_compute_the_authors_numbers(network: str):
    expected = reference_tensors("autoformer_small_io")
    blocks = tuple(AutoFormerBlock(*pair) for pair in zip(HEADS[network], RATIOS[network], strict=True))
    spec = AutoFormerSpec(blocks, WIDTHS[network], head_dim=16)
    supernet = _authors_supernet()
    supernet.activate(spec)
    x = supernet.embed(expected["input"], spec.embed_dim)
    for index in range(spec.depth):
        x = supernet.blocks[index](x)
        torch.testing.assert_close(x, expected[f"{network}.blocks.{index}"], rtol=0, atol=1e-5)
    for logits in (supernet(expected["input"]), supernet.extract(spec)(expected["input"])):
        torch.testing.assert_close(logits, expected[f"{network}.logits"], rtol=0, atol=1e-5)
