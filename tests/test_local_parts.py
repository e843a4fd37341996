"""Tests of the local parts `local_conv2d` and `window_attention`: their outputs, costs and sizes."""

import copy
import json
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from glit_models import BlockSpec, GLiT, GLiTSpec, count_macs, count_params
from glit_models.errors import SpecError
from glit_models.parts import BuildOptions, LocalConv2dPart, TokenGrid, WindowAttentionPart
from glit_models.parts.part import try_module

BLOCKS: dict[str, dict[str, Any]] = {
    "local_conv2d": {"local_part": "local_conv2d", "kernel_size": 3, "expand_ratio": 2},
    "window_attention": {"local_part": "window_attention", "window_size": 3},
}
TOKENS = TokenGrid(4, 5)


def make_spec(sizes: dict[str, Any]) -> GLiTSpec:
    """A local block, then a mixed one."""
    local = {"num_global_heads": 0, "num_local_heads": 3, "mlp_ratio": 2, **sizes}
    mixed = {"num_global_heads": 1, "num_local_heads": 2, "mlp_ratio": 4, "qkv_ratio": 1, **sizes}
    return GLiTSpec(tuple(BlockSpec.from_dict(block) for block in (local, mixed)), 48, 3)


@pytest.fixture(params=BLOCKS)
def spec(request: pytest.FixtureRequest) -> GLiTSpec:
    return make_spec(BLOCKS[request.param])


def make_model(spec: GLiTSpec, img_size: Any = 64, **keywords: Any) -> GLiT:
    """A model in evaluation mode, its running statistics not those of a new one."""
    torch.manual_seed(0)
    model: GLiT = timm.create_model("glit_tiny", spec=spec, img_size=img_size, num_classes=10, **keywords).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.normal_(module.bias, std=0.1)
    return model


def assert_agrees(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kernel_size", [1, 3, 5])
def test_the_convolution_is_over_the_grid_of_patches_and_the_class_token_passes_by(kernel_size: int) -> None:
    torch.manual_seed(0)
    conv = LocalConv2dPart(6, 2, 12, kernel_size).build(BuildOptions(TOKENS)).eval()
    nn.init.normal_(conv.bn.running_mean)
    nn.init.uniform_(conv.bn.running_var, 0.5, 2)
    x = torch.randn(2, TOKENS.num_tokens, 6)
    hidden = nn.functional.glu(conv.expand(x), dim=-1)
    expected, reach = hidden.clone(), kernel_size // 2
    for y in range(4):
        for x_ in range(5):
            total = conv.dwconv.bias.expand(2, -1).clone()
            for v in range(max(0, y - reach), min(4, y + reach + 1)):
                for u in range(max(0, x_ - reach), min(5, x_ + reach + 1)):
                    tap = conv.dwconv.weight[:, 0, v - y + reach, u - x_ + reach]
                    total += tap * hidden[:, 1 + v * 5 + u]
            normalised = (total - conv.bn.running_mean) / (conv.bn.running_var + conv.bn.eps).sqrt()
            expected[:, 1 + y * 5 + x_] = normalised * conv.bn.weight + conv.bn.bias
    assert_agrees(conv(x), conv.project(nn.functional.silu(expected)))


@torch.no_grad()
@pytest.mark.parametrize("window_size", [1, 3, 5, 9])
def test_each_patch_attends_to_its_window_and_the_class_token_to_itself(window_size: int) -> None:
    torch.manual_seed(0)
    attention = WindowAttentionPart(6, 2, 3, window_size).build(BuildOptions(TOKENS)).eval()
    nn.init.normal_(attention.qkv.weight)
    x = torch.randn(2, TOKENS.num_tokens, 6)
    q, k, v = attention.qkv(x).unflatten(2, (3, 2, 3)).unbind(2)  # [B, N, H, D]
    outputs = []
    for i in range(TOKENS.num_tokens):
        seen = [j for j in range(TOKENS.num_tokens) if sees(i, j, window_size // 2)]
        scores = torch.einsum("bhd,bnhd->bhn", q[:, i], k[:, seen]) / 3**0.5
        outputs.append(torch.einsum("bhn,bnhd->bhd", scores.softmax(-1), v[:, seen]).flatten(1))
    assert_agrees(attention(x), attention.proj(torch.stack(outputs, dim=1)))


def sees(i: int, j: int, reach: int) -> bool:
    if i == 0 or j == 0:
        return i == j
    (y, x), (v, u) = divmod(i - 1, 5), divmod(j - 1, 5)
    return abs(y - v) <= reach and abs(x - u) <= reach


@torch.no_grad()
def test_the_class_token_takes_nothing_from_patches_in_a_local_block(spec: GLiTSpec) -> None:
    model = make_model(spec)
    mixer = model.blocks[0].mixer
    x = torch.randn(2, 17, 48)
    changed = torch.cat([x[:, :1], torch.randn(2, 16, 48)], dim=1)
    assert_agrees(mixer(changed)[:, 0], mixer(x)[:, 0])


def test_parameters_and_multiply_adds_are_those_of_torch(spec: GLiTSpec) -> None:
    for img_size, class_token in ((64, True), ((48, 80), True), (64, False)):
        pool = "token" if class_token else "avg"
        model = make_model(spec, img_size, class_token=class_token, global_pool=pool)
        size = (img_size, img_size) if isinstance(img_size, int) else img_size
        # The counter does not know the operators that a CPU has for fused attention.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, 3, *size))
        assert counter.get_total_flops() == 2 * count_macs(spec, img_size, 10, class_token=class_token)
        found = sum(parameter.numel() for parameter in model.parameters())
        assert found == count_params(spec, 10, img_size, class_token=class_token)


@torch.no_grad()
def test_the_grid_follows_the_size_of_the_image(spec: GLiTSpec) -> None:
    images, small = torch.randn(2, 3, 48, 80), torch.randn(2, 3, 64, 64)
    resized, dynamic = make_model(spec), make_model(spec, dynamic_img_size=True)
    resized.set_input_size((48, 80))
    made = make_model(spec, (48, 80))
    made.load_state_dict(resized.state_dict())
    assert_agrees(made(images), resized(images))
    assert_agrees(dynamic(images), resized(images))
    assert_agrees(dynamic(small), make_model(spec)(small))


@torch.no_grad()
def test_fused_scripted_compiled_and_copied_models_give_the_same_logits(spec: GLiTSpec) -> None:
    model, images = make_model(spec), torch.randn(2, 3, 64, 64)
    expected = model(images)
    assert_agrees(torch.jit.script(model)(images), expected)
    assert_agrees(torch.compile(model, fullgraph=True, backend="aot_eager")(images), expected)
    assert_agrees(timm.utils.reparameterize_model(model)(images), expected)
    fused = copy.deepcopy(model).fuse()
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())
    assert_agrees(fused(images), expected)


@torch.no_grad()
def test_a_model_made_on_the_meta_device_becomes_a_whole_one(spec: GLiTSpec) -> None:
    images, source = torch.randn(2, 3, 64, 64), make_model(spec)
    model = GLiT(spec, img_size=64, num_classes=10, device="meta").eval()
    model.load_state_dict(source.state_dict(), assign=True)
    assert_agrees(model(images), source(images))
    emptied = GLiT(spec, img_size=64, num_classes=10, device="meta").eval().to_empty(device="cpu")
    emptied.init_weights()
    emptied.load_state_dict(source.state_dict())
    assert_agrees(emptied(images), source(images))


def test_a_block_round_trips_as_json() -> None:
    text = (
        '{"num_global_heads":1,"num_local_heads":2,"mlp_ratio":4,"qkv_ratio":1,"local_part":"window_attention",'
        '"window_size":7}'
    )
    block = BlockSpec.from_dict(json.loads(text))
    assert block.local_sizes == (("window_size", 7),)
    assert json.loads(json.dumps(block.to_dict())) == json.loads(text)
    spec = make_spec(BLOCKS["window_attention"])
    assert GLiTSpec.from_json(spec.to_json()) == spec
    assert hash(GLiTSpec.from_json(spec.to_json())) == hash(spec)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"local_part": "window_attention", "window_size": 4}, r"blocks\[0\].*window_size must be odd and positive"),
        ({"local_part": "window_attention"}, "lacks 'window_size'"),
        ({"local_part": "local_conv2d", "kernel_size": 3}, "expand_ratio must be an integer of at least 1, got None"),
        ({"local_part": "local_conv2d", "kernel_size": 2, "expand_ratio": 2}, "kernel_size must be odd and positive"),
        ({"local_part": "mlp"}, "local_part must be a part that takes local heads, got 'mlp'"),
        ({"local_part": "convolution"}, "unknown part 'convolution'"),
    ],
)
def test_impossible_sizes_are_named(sizes: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        make_spec(sizes)


def test_trying_a_module_leaves_it_and_the_random_numbers_as_they_were() -> None:
    module = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.BatchNorm1d(3)).train()
    module[0].eval()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    try_module("this", module, torch.ones(4, 3), (4, 3))
    torch.testing.assert_close(torch.rand(3), expected)
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert [child.training for child in module.modules()] == [True, False, True]
