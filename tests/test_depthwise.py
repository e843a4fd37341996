"""Tests that the depthwise convolution for training equals torch's: outputs and gradients, for all arguments."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils import prune

from glit_models.depthwise import depthwise_conv
from glit_models.parts import BuildOptions, LocalConvPart, TokenGrid

SIZES = [
    (2, 3, 17, 45),
    (1, 1, 1, 1),
    (3, 2, 1, 5),
    (2, 5, 4, 31),
    (2, 4, 16, 3),
    (1, 8, 17, 33),
    (2, 2, 32, 7),
    (2, 3, 33, 45),
    (1, 2, 48, 5),
    (3, 2, 50, 101),
    (2, 3, 197, 31),
]


def operands(
    batch: int, channels: int, tokens: int, taps: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    """Input (channels-last in memory, as in the model), weight and bias, all wanting gradients."""
    generator = torch.Generator().manual_seed(tokens * 100 + taps)
    x = torch.randn(1, batch, tokens, channels, generator=generator).to(dtype).permute(0, 3, 1, 2)
    weight = torch.randn(channels, 1, 1, taps, generator=generator).to(dtype)
    bias = torch.randn(channels, generator=generator).to(dtype)
    return x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()


def stock(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.conv2d(x, weight, bias, padding=(0, weight.shape[3] // 2), groups=weight.shape[0])


def output_and_gradients(function, *tensors: Tensor | None) -> list[Tensor | None]:
    for tensor in tensors:
        if tensor is not None:
            tensor.grad = None
    output = function(*tensors)
    (output * torch.linspace(-1, 1, output.numel()).view(output.shape)).sum().backward()
    return [output, *(None if tensor is None else tensor.grad for tensor in tensors)]


def assert_same(tensors: tuple, **tolerance: float) -> None:
    actual = output_and_gradients(depthwise_conv, *tensors)
    expected = output_and_gradients(stock, *tensors)
    for ours, theirs in zip(actual, expected, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert ours.dtype == theirs.dtype
            torch.testing.assert_close(ours, theirs, **tolerance)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_output_and_gradients_are_torch_s_own(size: tuple[int, int, int, int]) -> None:
    assert_same(operands(*size))


@pytest.mark.parametrize("size", SIZES[:4], ids=str)
def test_gradients_are_the_numerical_ones(size: tuple[int, int, int, int]) -> None:
    batch, channels, tokens, _ = size
    assert torch.autograd.gradcheck(depthwise_conv, operands(batch, channels, min(tokens, 6), 5))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 5e-2)])
@pytest.mark.parametrize("tokens", [17, 64])
def test_other_precisions_differ_by_their_rounding(tokens: int, dtype: torch.dtype, tolerance: float) -> None:
    assert_same(operands(4, 24, tokens, 45, dtype), rtol=tolerance, atol=tolerance)


def test_autocast_computes_in_bfloat16_and_returns_gradients_of_the_parameters_type() -> None:
    tensors = operands(4, 24, 17, 45, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        output = depthwise_conv(*tensors)
        expected = stock(*tensors)
    assert output.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(output, expected)
    output.float().sum().backward()
    assert [tensor.grad.dtype for tensor in tensors] == [torch.float32] * 3
    ours = tensors[1].grad.clone()
    tensors[1].grad = None
    expected.float().sum().backward()
    torch.testing.assert_close(ours, tensors[1].grad, rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (0, 1), (1, 2), (0, 2)], ids=str)
def test_what_is_frozen_gets_no_gradient_and_the_rest_the_same(frozen: tuple[int, ...]) -> None:
    tensors = operands(2, 3, 17, 45)
    for index in frozen:
        tensors[index].requires_grad_(False)
    assert_same(tensors)


def test_a_convolution_without_bias_works() -> None:
    x, weight, _ = operands(2, 3, 17, 45)
    assert_same((x, weight, None))


def test_a_contiguous_input_works() -> None:
    x, weight, bias = operands(2, 3, 17, 45)
    assert_same((x.detach().contiguous().requires_grad_(), weight, bias))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("autocast", [True, False])
def test_few_channels_and_many_taps_do_not_hang_in_bfloat16(training: bool, autocast: bool):
    dtype = None if autocast else torch.bfloat16
    conv = LocalConvPart(16, 1, 16, 15).build(BuildOptions(TokenGrid(4, 4), dtype=dtype)).train(training)
    x = torch.randn(4, 17, 16, dtype=dtype, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = conv(x)
    out.float().sum().backward()
    assert out.isfinite().all()
    assert conv.dwconv.weight.grad is not None


@pytest.mark.parametrize("tokens", [17, 64])
def test_gradients_of_single_images_are_those_of_torch_s_own(tokens: int) -> None:
    x, weight, bias = (tensor.detach() for tensor in operands(3, 4, tokens, 5))

    def loss(function: Callable[..., Tensor], weight: Tensor, row: Tensor) -> Tensor:
        return function(row[None, :, None].contiguous(), weight, bias).square().sum()

    images = x[0].transpose(0, 1)  # [B, C, N]
    ours, theirs = (
        torch.func.vmap(torch.func.grad(partial(loss, function)), in_dims=(None, 0))(weight, images)
        for function in (depthwise_conv, stock)
    )
    torch.testing.assert_close(ours, theirs)


def test_hooks_and_pruning_see_the_convolution_in_training() -> None:
    conv = LocalConvPart(16, 1, 16, 15).build(BuildOptions(TokenGrid(4, 4)))
    called: list[bool] = []
    conv.dwconv.register_forward_hook(lambda *_: called.append(torch.is_grad_enabled()))
    prune.l1_unstructured(conv.dwconv, "weight", 0.5)
    for _ in range(2):
        conv(torch.randn(2, 17, 16)).sum().backward()
    with torch.no_grad():
        conv(torch.randn(2, 17, 16))
    assert called == [True, True, False]
    assert (conv.dwconv.weight == 0).sum() == conv.dwconv.weight.numel() // 2
