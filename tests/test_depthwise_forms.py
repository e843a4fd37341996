"""Tests that the benchmark's forms of the depthwise convolution are equivalent, with Triton also without a GPU."""

from __future__ import annotations

import argparse
import dataclasses
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from timm.utils import reparameterize_model
from torch import Tensor

import glit_models

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # `benchmarks` is no part of the package

from benchmarks import depthwise_uses, triton_depthwise  # noqa: E402
from benchmarks.depthwise_forms import FORMS, Form, use_form  # noqa: E402

SIZES = [
    (2, 17, 24, 45),
    (3, 7, 5, 3),
    (1, 1, 1, 1),
    (2, 5, 4, 9),
    (1, 40, 20, 31),
]
TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 5e-2, torch.float16: 1e-2}
RUNS_TRITON = triton_depthwise.triton is not None


def operands(size: tuple[int, int, int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x [B, N, C], weight [C, 1, 1, K] and bias [C], all wanting gradients."""
    B, N, C, K = size
    generator = torch.Generator().manual_seed(N * 100 + K)
    shapes = ((B, N, C), (C, 1, 1, K), (C,))
    x, weight, bias = (torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes)
    return x, weight, bias


def convolve(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    padding = (0, weight.shape[3] // 2)
    out = F.conv2d(x.transpose(1, 2).unsqueeze(2).contiguous(), weight, bias, padding=padding, groups=len(weight))
    return out.squeeze(2).transpose(1, 2)


def output_and_gradients(function, tensors: tuple[Tensor, ...]) -> list[Tensor]:
    output = function(*tensors)
    along = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).view(output.shape).to(output)
    return [output, *torch.autograd.grad(output, tensors, along)]


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", FORMS)
def test_every_form_has_the_output_and_the_gradients_of_conv2d(name: str, size: tuple, dtype: torch.dtype) -> None:
    tensors = operands(size, dtype)
    exact = tuple(tensor.detach().double().requires_grad_() for tensor in tensors)
    actual = output_and_gradients(FORMS[name].convolve, tensors)
    for ours, theirs in zip(actual, output_and_gradients(convolve, exact), strict=True):
        assert ours.dtype == dtype
        scale = max(1.0, theirs.abs().max().item())
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=TOLERANCES[dtype] * scale)


@pytest.mark.parametrize("name", [name for name, form in FORMS.items() if form.convolve_silu is not None])
@pytest.mark.parametrize("wants_gradients", [True, False])
def test_a_fused_silu_is_the_silu_of_the_form(name: str, wants_gradients: bool) -> None:
    tensors = operands(SIZES[0], torch.float32)
    form = FORMS[name]
    with torch.set_grad_enabled(wants_gradients):
        actual, expected = form.convolve_silu(*tensors), F.silu(form.convolve(*tensors))
    torch.testing.assert_close(actual, expected)
    assert actual.requires_grad == wants_gradients


@pytest.mark.parametrize("name", FORMS)
def test_forms_follow_autocast_and_return_gradients_of_the_parameters_type(name: str) -> None:
    tensors = operands(SIZES[0], torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        output = FORMS[name].convolve(*tensors)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), convolve(*tensors), rtol=5e-2, atol=0.2)
    assert [grad.dtype for grad in torch.autograd.grad(output.float().sum(), tensors)] == [torch.float32] * 3


@pytest.mark.parametrize("name", FORMS)
def test_a_model_computes_the_same_with_any_form_trained_or_folded(name: str) -> None:
    model = _small_model()
    images = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    for network in (model.train(), reparameterize_model(model.eval())):
        state = {key: value.clone() for key, value in network.state_dict().items()}
        expected = _logits_and_gradient(network, images)
        network.load_state_dict(state)  # BatchNorm's statistics, too
        with use_form(network, FORMS[name]):
            assert network.state_dict().keys() == state.keys()
            actual = _logits_and_gradient(network, images)
        for ours, theirs in zip(actual, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        network.load_state_dict(state)
        for ours, theirs in zip(_logits_and_gradient(network, images), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def _small_model() -> glit_models.GLiT:
    torch.manual_seed(0)
    return glit_models.GLiT(glit_models.GLIT_TINY.scaled(48, 3), img_size=48, num_classes=5)


def _logits_and_gradient(model: torch.nn.Module, images: Tensor) -> tuple[Tensor, ...]:
    logits = model(images)
    return logits.detach(), *torch.autograd.grad(logits.square().sum(), list(model.blocks[1].parameters()))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # the check's own
@pytest.mark.parametrize("size", SIZES[:2], ids=str)
def test_triton_s_operator_keeps_torch_library_s_rules(size: tuple[int, int, int, int]) -> None:
    x, weight, bias = operands(size, torch.float32)
    taps = weight.detach().flatten(1).t().contiguous().requires_grad_()
    torch.library.opcheck(torch.ops.glit_models.depthwise, (x, taps, bias, False, False, True))
    torch.library.opcheck(torch.ops.glit_models.depthwise, (x.detach(), taps.detach(), None, False, True, False))
    torch.library.opcheck(torch.ops.glit_models.depthwise_gradients, (x.detach(), x.detach(), size[3]))


def test_triton_s_operator_is_compiled_whole_with_its_gradients() -> None:
    tensors = operands(SIZES[0], torch.float32)
    compiled = torch.compile(triton_depthwise.depthwise, fullgraph=True, backend="aot_eager")
    actual = output_and_gradients(compiled, tensors)
    for ours, theirs in zip(actual, output_and_gradients(triton_depthwise.depthwise, tensors), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_triton_s_operator_is_exported_as_one_node_for_any_batch() -> None:
    class Module(torch.nn.Module):
        def forward(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return triton_depthwise.depthwise_silu(x, weight, bias)

    tensors = tuple(tensor.detach() for tensor in operands(SIZES[0], torch.float32))
    batch = {0: torch.export.Dim("batch", min=1, max=64)}
    program = torch.export.export(Module(), tensors, dynamic_shapes=(batch, {}, {}))
    assert [node for node in program.graph.nodes if node.target == torch.ops.glit_models.depthwise.default]
    more = torch.randn(5, *tensors[0].shape[1:])
    actual = program.module()(more, *tensors[1:])
    torch.testing.assert_close(actual, F.silu(convolve(more, *tensors[1:])))


def test_an_even_number_of_taps_is_refused() -> None:
    with pytest.raises(ValueError, match="odd number of taps, got 4"):
        triton_depthwise.depthwise(torch.zeros(1, 3, 2), torch.zeros(2, 1, 1, 4), None)


def test_without_triton_the_twin_is_used() -> None:
    code = """
import sys; sys.modules["triton"] = None
import torch
from benchmarks import triton_depthwise
assert triton_depthwise.triton is None
print(triton_depthwise.depthwise(torch.ones(1, 3, 1), torch.ones(1, 1, 1, 3), torch.ones(1)).flatten().tolist())
"""
    assert _python(code) == "[3.0, 4.0, 3.0]"


CAUSAL = """
import sys, types
import torch, torch.nn.functional as F
def causal_conv1d_nwh(x, weight, bias, activation):  # as its documentation describes it
    y = F.conv1d(F.pad(x.mT, (len(weight) - 1, 0)), weight.t().unsqueeze(1), bias, groups=len(bias)).mT
    return F.silu(y) if activation == "silu" else y
sys.modules["cudnn"] = types.ModuleType("cudnn")
sys.modules["cudnn"].ops = types.SimpleNamespace(causal_conv1d_nwh=causal_conv1d_nwh)
from benchmarks import cudnn_depthwise
from benchmarks.depthwise_forms import FORMS
for N, K in ((17, 9), (7, 45), (1, 3)):
    x, weight, bias = torch.randn(2, N, 24), torch.randn(24, 1, 1, K), torch.randn(24)
    expected = FORMS["conv1d"].convolve(x, weight, bias)
    torch.testing.assert_close(cudnn_depthwise.depthwise(x, weight, bias), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(cudnn_depthwise.depthwise_silu(x, weight, bias), F.silu(expected), rtol=1e-4, atol=1e-4)
print("centred")
"""


def test_a_causal_convolution_is_centred_by_padding_the_end_and_dropping_the_start() -> None:
    assert _python(CAUSAL) == "centred"


# Under Triton's interpreter, which must be asked for before Triton is imported: another process. Few tokens in
# registers, so that there are several chunks; sizes at which channels, tokens and images end within their blocks.
INTERPRETED = """
import torch
from benchmarks import triton_depthwise as td
td.tokens_in_registers = lambda taps: 3
td.DOT_TILES = 2
kinds = ((torch.float32, 1e-6, False), (torch.float16, 1e-3, True), (torch.bfloat16, 8e-3, False))
for dtype, rounding, tensor_cores in kinds:  # the interpreter's matrix product takes bfloat16 for integers
    for B, N, C, K, td.PROGRAMS in ((3, 7, 70, 5, 1), (2, 35, 3, 9, 1584), (1, 1, 1, 1, 9)):
        generator = torch.Generator().manual_seed(K)
        x, grad = (torch.randn(B, N, C, generator=generator).to(dtype) for _ in range(2))
        weight, bias = torch.randn(C, 1, 1, K, generator=generator), torch.randn(C, generator=generator)
        taps = weight.flatten(1).t().contiguous()
        assert td._runs_triton(x)
        leaves = [tensor.requires_grad_() for tensor in (x, weight, bias)]
        both = torch.cat((x, grad), dim=2).detach()
        grad_taps, grad_bias = td.twin_gradients(grad, x.detach(), K)
        out = td.depthwise(*leaves, tensor_cores)
        grads = torch.autograd.grad(out, leaves, grad)
        with torch.no_grad():
            silu = td.depthwise_silu(*leaves, tensor_cores)
            chain = td.glu_depthwise_silu(both, weight, bias) if tensor_cores else silu
            expected_silu = td.twin(x, taps, bias, silu=True)
            expected = (
                td.twin(x, taps, bias), expected_silu,
                td.twin(both, taps, bias, True, True) if tensor_cores else expected_silu,
                td.twin(grad, taps.flip(0), None), grad_taps.t().reshape(weight.shape), grad_bias,
            )
        for ours, theirs in zip((out, silu, chain, *grads), expected, strict=True):
            assert ours.dtype == theirs.dtype
            torch.testing.assert_close(ours, theirs, rtol=rounding, atol=rounding * K)
print("same")
"""


@pytest.mark.skipif(not RUNS_TRITON, reason="Triton is not installed")
def test_the_kernels_compute_what_their_twin_does() -> None:
    assert _python(INTERPRETED, TRITON_INTERPRET="1") == "same"


@pytest.mark.skipif(not (RUNS_TRITON and torch.cuda.is_available()), reason="no GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [*SIZES, (5, 197, 384, 31), (17, 250, 40, 45)], ids=str)
@pytest.mark.parametrize("tensor_cores", [True, False])
def test_the_kernels_compute_on_a_gpu_what_their_twin_does(tensor_cores: bool, size: tuple, dtype: torch.dtype) -> None:
    on_cpu = operands(size, dtype)
    on_gpu = tuple(tensor.detach().cuda().requires_grad_() for tensor in on_cpu)
    actual = output_and_gradients(partial(triton_depthwise.depthwise, tensor_cores=tensor_cores), on_gpu)
    for ours, theirs in zip(actual, output_and_gradients(triton_depthwise.depthwise, on_cpu), strict=True):
        scale = max(1.0, theirs.abs().max().item())
        torch.testing.assert_close(ours.cpu(), theirs, rtol=0, atol=TOLERANCES[dtype] * scale)


def _python(code: str, **environment: str) -> str:
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ | environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


@pytest.mark.skipif(not RUNS_TRITON, reason="Triton is not installed")
@pytest.mark.parametrize("kind", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("kernel", ["_convolve_kernel", "_gradients_kernel"])
def test_the_kernels_compile_for_an_h100_and_load_two_channels_at_once(kernel: str, kind: str) -> None:
    ptx = _compiled(kernel, kind, taps=7, tokens=4)["ptx"]
    assert ".target sm_90" in ptx
    assert {"bf16": "ld.global.b32 ", "fp16": "ld.global.b32 ", "fp32": "ld.global.v2.b32 "}[kind] in ptx
    assert "ld.global.b16" not in ptx


@pytest.mark.skipif(not RUNS_TRITON, reason="Triton is not installed")
@pytest.mark.parametrize("kind", ["bf16", "fp16"])
def test_the_products_are_of_tensor_cores_and_load_eight_channels_at_once(kind: str) -> None:
    ptx = _compiled("_dot_kernel", kind, taps=31, tokens=4)["ptx"]
    assert f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32".replace("fp16", "f16") in ptx
    assert "ld.global.v4.b32 " in ptx
    assert "st.global.v4.b32 " in ptx


@pytest.mark.slow
@pytest.mark.skipif(not RUNS_TRITON, reason="Triton is not installed")
def test_the_most_taps_of_glit_fit_into_registers(tmp_path: Path) -> None:
    import triton

    cubin = _compiled("_convolve_kernel", "bf16", taps=45, tokens=triton_depthwise.tokens_in_registers(45))["cubin"]
    (tmp_path / "kernel.cubin").write_bytes(cubin)
    command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", tmp_path / "kernel.cubin"]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert " STACK:0 " in usage  # where the registers go that there is no room for


def _compiled(kernel: str, kind: str, taps: int, tokens: int) -> dict:
    """A kernel as PTX and as machine code for compute capability 9.0, which needs no GPU."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    function = getattr(triton_depthwise, kernel)
    dot = kernel == "_dot_kernel"
    block = triton_depthwise.DOT_BLOCK_C if dot else triton_depthwise.BLOCK_C
    constants = {
        "C": 768,
        "K": taps,
        "T": tokens,
        "TILES": tokens,
        "HALO": 0,
        "BLOCK": block,
        "GLU": False,
        "SILU": True,
    }
    constants = {name: value for name, value in constants.items() if name in function.arg_names}
    numbers = dict.fromkeys(("B", "N", "chunks", "images"), "i32")
    types = {"partial": "*fp32"} | numbers | dict.fromkeys(constants, "constexpr")
    signature = {name: types.get(name, f"*{kind}") for name in function.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(function.arg_names) if "*" in signature[name]}
    options = triton_depthwise.DOT_OPTIONS if dot else triton_depthwise.OPTIONS
    source = ASTSource(function, signature, constants, aligned)
    return compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm


def test_the_benchmark_says_who_won_and_why_a_form_has_no_time(monkeypatch, capsys) -> None:
    def broken(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        raise MemoryError("no room\nmore of it")

    def wrong(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return convolve(x, weight, bias).flip(1)

    spec = glit_models.GLIT_TINY.scaled(48, 3)
    spec = dataclasses.replace(spec, patch_size=112)
    forms = {"broken": Form(broken), "wrong": Form(wrong), "conv1d": FORMS["conv1d"]}
    monkeypatch.setattr(depthwise_uses, "GLIT_TINY", spec)
    monkeypatch.setattr(depthwise_uses, "FORMS", forms)
    options = argparse.Namespace(
        device="cpu", dtype="float32", batch_size=2, forms=list(forms), uses=list(depthwise_uses.FLOORS),
        ways=["eager"], bandwidth=1.0, seconds=60, rounds=1, threads=1, json=False,
        compile=torch.compile,
    )  # fmt: skip
    depthwise_uses.measure(options)
    shown = capsys.readouterr().out
    assert shown.count("MemoryError: no room") == shown.count("ArithmeticError: wrong by ") == 4
    for use in depthwise_uses.FLOORS:
        assert f"\n{use}: conv1d, eager, " in shown


def test_the_benchmark_returns_each_form_before_it_compiles_the_next_and_triton_last(monkeypatch) -> None:
    ran = []

    def form(name: str) -> Form:
        return Form(lambda *operands: (ran.append(name), convolve(*operands))[1])

    forms = {name: form(name) for name in ("Triton", "conv1d", "Triton, tensor cores", "cuDNN")}
    monkeypatch.setattr(depthwise_uses, "FORMS", forms)
    spec = dataclasses.replace(glit_models.GLIT_TINY.scaled(48, 3), patch_size=112)
    options = argparse.Namespace(
        device="cpu", dtype="float32", batch_size=2, forms=list(forms), uses=["inference"], ways=["eager"],
        bandwidth=1.0, seconds=60, rounds=1,
    )  # fmt: skip
    rows = depthwise_uses.measured(options, spec)
    order = ["conv1d", "cuDNN", "Triton", "Triton, tensor cores"]
    for count, name in enumerate(order, start=1):
        assert next(rows)["form"] == name
        assert set(ran) == set(order[:count])
