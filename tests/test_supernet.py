"""Promises of the supernet: what a path computes, what a step of training changes, what is handed out."""

import random

import pytest
import timm
import torch
from glit_models.search import SearchSpace, Supernet, glit
from glit_models.search.supernet import SHARINGS, Sharing, keep_outside_path
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from glit_models.errors import SearchError
from glit_models.spec import BlockSpec, GLiTSpec
from tests.spaces import SMALL_SPACES, random_space

SPACE = glit(24, 3, 2, patch_size=8, kernel_sizes=(3, 5), expand_ratios=(1, 2), qkv_ratios=(0.5, 1), mlp_ratios=(1, 2))
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


@pytest.mark.parametrize("sharing", SHARINGS)
@pytest.mark.parametrize("name", SMALL_SPACES)
def test_what_is_extracted_computes_what_the_active_path_does(name: str, sharing: Sharing):
    space = SMALL_SPACES[name]
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


def _step(supernet: Supernet, optimizer: torch.optim.Optimizer, spec: GLiTSpec) -> None:
    supernet.activate(spec)
    cross_entropy(supernet(_images()), torch.arange(4)).backward()
    optimizer.step()
    optimizer.zero_grad()


def _copy(supernet: Supernet) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in supernet.named_parameters()}


@pytest.mark.parametrize("sharing", SHARINGS)
def test_a_step_changes_and_decays_nothing_outside_its_path(sharing: Sharing):
    supernet = _supernet(sharing=sharing)
    optimizer = torch.optim.AdamW(supernet.parameters(), lr=0.1, weight_decay=0.5)
    keep_outside_path(optimizer, supernet)
    rng = random.Random(0)
    for _ in range(4):
        _step(supernet, optimizer, SPACE.sample(rng))  # momentum everywhere
    spec = GLiTSpec((BlockSpec(1, 2, 1, 0.5, 3, 1), BlockSpec(3, 0, 1, 0.5)), 24, 3, 8)
    inside = {name: torch.zeros_like(parameter) for name, parameter in supernet.named_parameters()}
    # The path's own elements are those that its network reads.
    values = _copy(supernet)
    for parameter in supernet.parameters():
        parameter.data.zero_()
    for tensor in supernet.state_of(spec).values():
        if tensor.requires_grad:
            tensor.sum().backward()
    for name, parameter in supernet.named_parameters():
        if parameter.grad is not None:
            inside[name] = parameter.grad.clone()
        parameter.grad = None
        parameter.data.copy_(values[name])
    moments = {
        name: optimizer.state[parameter]["exp_avg"].clone()
        for name, parameter in supernet.named_parameters()
        if parameter in optimizer.state
    }
    _step(supernet, optimizer, spec)
    for name, parameter in supernet.named_parameters():
        outside = inside[name] == 0
        assert torch.equal(parameter.detach()[outside], values[name][outside]), name
        assert not torch.equal(parameter.detach()[~outside], values[name][~outside]) or outside.all(), name
        if name in moments:
            assert torch.equal(optimizer.state[parameter]["exp_avg"][outside], moments[name][outside]), name


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


def test_a_network_of_another_space_and_a_supernet_without_a_path_are_refused():
    supernet = _supernet()
    with pytest.raises(SearchError, match=r"call activate\(spec\) first"):
        supernet(_images())
    with pytest.raises(SearchError, match=r"blocks\[0\] must be one of the space's options"):
        supernet.activate(GLiTSpec((BlockSpec(3, 0, 7, 1),) * 2, 24, 3, 8))
    with pytest.raises(SearchError, match="sharing must be independent or entangled, got 'some'"):
        Supernet(SPACE, "some")  # type: ignore[arg-type]
