"""A depthwise convolution over tokens in Triton, channels-last, with its gradients, as an operator of torch.

If Triton is missing or the tensors are not on a GPU, an equivalent in plain PyTorch is used.

How the kernels work. A program is one warp that handles 64 channels (two per thread, 128 bytes of every token: one full
memory transaction) of one image, and slides over its tokens. It keeps the K taps in registers, and the results of T
neighbouring tokens; each token of the window of T + K - 1 is loaded and converted to float32 once, and then added to
all results that depend on it, in straight-line code of independent multiply-adds. So T * K multiply-adds need
T + K - 1 loads: about 0.07 loads each. A kernel whose threads handle one token each would load the input for every tap:
one load each and a conversion, which costs more than the multiply-add itself. The H100 cannot index registers by a
variable, hence the unrolling; T and K are constants of a kernel.

Limits of an H100: 4 x 32 multiply-adds per cycle on 132 multiprocessors at 1.755 GHz are 29.6 T/s; GLiT-Tiny's seven
layers have 7.69 G of them for 256 images, 0.26 ms, and 0.85 GB of traffic in bfloat16, 0.28 ms at 3.0 TB/s. They
overlap. Compiled for it, 84 per cent of the loop are multiply-adds, with 168 registers per thread for 31 taps and 224
for 45, none spilled: 12 and 9 warps fit on a multiprocessor, and two on each of its four schedulers, with 2 * T
independent sums each, hide the four cycles of a multiply-add.

A GLU before the convolution is not fused: each token is loaded (T + K - 1) / T times, about three, and the sigmoid's
two special-function instructions, at an eighth of the rate of a multiply-add, would cost as much again as the taps.
Folded BatchNorm is part of taps and bias; the SiLU after it is one exponential per result, and saves a read and a
write of all activations.

Tensor cores, for 16-bit types: for one channel, 16 tokens of 16 images are the sum of three or five (K = 31, 45)
products of 16 x 16 matrices, blocks of the banded matrix of the taps times neighbouring tiles of tokens. The blocks are
the same for all tokens and stay in registers, as do the tiles, so that each token is loaded once, 16 bytes at a time,
and transposed once in shared memory. This takes a fifth to a seventh of the instructions of the kernel above, so only
memory should limit it; and because each token is loaded once, a GLU before it costs one sigmoid, and saves a write and
a read. Eight warps with 128 registers per thread: two programs per multiprocessor; a few values spilled at 45 taps.

Axes: B batch, N tokens, C channels, K taps, T tokens in registers.
"""

# ruff: noqa: RUF005 - Triton's language has no unpacking within a tuple

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

__all__ = ["depthwise", "depthwise_silu", "glu_depthwise_silu", "twin", "twin_gradients"]

BLOCK_C = 64  # channels per warp
PROGRAMS = 1584  # three warps per scheduler of an H100, which has 528
DOT_BLOCK_C = 16  # channels per program on tensor cores: 32 bytes, the minimum memory transaction
DOT_TILES = 13  # of 16 tokens: all 197; more tokens are divided among programs
DOT_OPTIONS = {"num_warps": 8, "maxnreg": 128, "enable_fp_fusion": True}
OPTIONS = {"num_warps": 1, "enable_fp_fusion": True}  # a multiply and an add become one instruction


def tokens_in_registers(taps: int) -> int:
    """T for K taps: few wasted results for 197 tokens (200 = 8 * 25 = 10 * 20), and no spilled registers."""
    return 25 if taps <= 33 else 20


def _jit(kernel: Callable) -> Any:
    return kernel if triton is None else triton.jit(kernel)


@_jit
def _load(chunk, start, s: tl.constexpr, c, N, C: tl.constexpr):
    """Token start + s, in float32, given the pointers to token start; zero outside the image."""
    return tl.load(chunk + s * C, mask=_inside(start + s, c, N, C), other=0.0).to(tl.float32)


@_jit
def _inside(n, c, N, C: tl.constexpr):
    """Whether token n and channel c exist: with unsigned numbers, one comparison checks both ends of the tokens."""
    n = tl.full(c.shape, tl.cast(n, tl.uint32), tl.uint32)  # a block, because Triton's interpreter requires it for `&`
    return (c < C) & (n < tl.cast(N, tl.uint32))


@_jit
def _convolve_kernel(
    x, taps, bias, out, N, chunks,
    C: tl.constexpr, K: tl.constexpr, T: tl.constexpr, BLOCK: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """out[b, n, c] = bias[c] + the sum over k of x[b, n + k - K // 2, c] * taps[k, c], for `chunks` times T tokens."""
    tiles, parts = tl.cdiv(C, BLOCK), tl.cdiv(N, T * chunks)
    program = tl.program_id(0)  # neighbours share an image and its rows, so whole memory pages are read together
    c = program % tiles * BLOCK + tl.arange(0, BLOCK)
    begin = program // tiles % parts * chunks * T
    image = tl.cast(program // (tiles * parts), tl.int64) * N * C + c
    w = ()
    for k in tl.static_range(K):
        w = w + (tl.load(taps + k * C + c, mask=c < C, other=0.0).to(tl.float32),)
    offset = tl.zeros((BLOCK,), tl.float32)
    if bias is not None:
        offset += tl.load(bias + c, mask=c < C, other=0.0)
    for start in range(begin, min(begin + chunks * T, N), T):
        sums = (offset,) * T
        chunk = x + image + start * C  # what the compiler adds to it is a constant, as C is one
        for s in tl.static_range(T + K - 1):
            value = _load(chunk, start, s - K // 2, c, N, C)
            for t in tl.static_range(T):
                if s >= t and s < t + K:
                    sums = sums[:t] + (sums[t] + value * w[s - t],) + sums[t + 1 :]
        for t in tl.static_range(T):
            result = sums[t]
            if SILU:
                result = result * tl.sigmoid(result)
            pointer = out + image + start * C + t * C
            tl.store(pointer, result.to(out.dtype.element_ty), mask=_inside(start + t, c, N, C))


@_jit
def _dot_kernel(
    x, taps, bias, out, N, B, C: tl.constexpr, K: tl.constexpr, TILES: tl.constexpr, HALO: tl.constexpr,
    BLOCK: tl.constexpr, GLU: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """Computes the same as `_convolve_kernel`, on tensor cores: TILES tiles of 16 tokens, 16 images, BLOCK channels.

    x has 2 C channels with GLU. HALO: tiles on both sides that belong to another program.
    """
    blocks, parts = tl.cdiv(C, BLOCK), tl.cdiv(N, TILES * 16)
    program = tl.program_id(0)
    c = (program % blocks * BLOCK + tl.arange(0, BLOCK))[:, None, None]
    begin = program // blocks % parts * TILES * 16
    i = tl.arange(0, 16)[None, :, None]
    first = program // (blocks * parts) * 16  # image; offsets within 16 of them are of 32 bits, which saves registers
    x += tl.cast(first, tl.int64) * N * (2 * C if GLU else C)
    out += tl.cast(first, tl.int64) * N * C
    b = tl.arange(0, 16)[None, None, :]
    row = b * N + begin + i
    inside = (c < C) & (b < B - first)
    reach: tl.constexpr = (K // 2 + 15) // 16
    band = ()  # the 16 x 16 blocks of the banded matrix, which are the same in all its rows
    for d in tl.static_range(2 * reach + 1):
        k = 16 * (d - reach) + tl.arange(0, 16)[None, None, :] - i + K // 2
        block = tl.load(taps + k * C + c, mask=(c < C) & (k >= 0) & (k < K), other=0.0)
        band = band + (block.to(x.dtype.element_ty),)
    offset = tl.zeros((BLOCK, 16, 16), tl.float32)
    if bias is not None:
        offset += tl.load(bias + c, mask=c < C, other=0.0)
    tiles = ()
    # Tile t + reach is the last one that t needs; the next one is loaded before the products of t are computed.
    for t in tl.static_range(-reach - 1, TILES + HALO):
        if t + reach + 1 < TILES + 2 * HALO:
            n = begin + i + 16 * (t + reach + 1 - HALO)
            rows = row + 16 * (t + reach + 1 - HALO)
            tiles = tiles + (_load_tile(x, rows, c, inside & (n >= 0) & (n < N), C, GLU),)
        if t >= HALO:
            sums = offset
            for d in tl.static_range(2 * reach + 1):
                if t + d >= reach and t + d - reach < TILES + 2 * HALO:
                    sums = tl.dot(band[d], tiles[t + d - reach], sums)
            if SILU:
                sums = sums * tl.sigmoid(sums)
            mask = inside & (begin + i + 16 * (t - HALO) < N)
            tl.store(out + (row + 16 * (t - HALO)) * C + c, sums.to(out.dtype.element_ty), mask=mask)


@_jit
def _load_tile(x, rows, c, mask, C: tl.constexpr, GLU: tl.constexpr):
    """Rows and channels of x [rows, C], or the GLU of x [rows, 2 C]."""
    if GLU:
        tile = tl.load(x + rows * (2 * C) + c, mask=mask, other=0.0).to(tl.float32)
        gate = tl.load(x + rows * (2 * C) + C + c, mask=mask, other=0.0).to(tl.float32)
        tile = (tile * tl.sigmoid(gate)).to(x.dtype.element_ty)
    else:
        tile = tl.load(x + rows * C + c, mask=mask, other=0.0)
    return tile


@_jit
def _gradients_kernel(
    grad, x, partial, B, N, images, C: tl.constexpr, K: tl.constexpr, T: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """For `images` images, row k of partial [programs, K + 1, C]: the sum of grad[b, n] * x[b, n + k - K // 2].

    Row K: the sum of grad. Like `_convolve_kernel`, but T gradients stay in registers, and the sums are for the taps.
    """
    tiles = tl.cdiv(C, BLOCK)
    c = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)
    part = tl.program_id(0) // tiles
    sums = (tl.zeros((BLOCK,), tl.float32),) * K
    total = tl.zeros((BLOCK,), tl.float32)
    for b in range(part * images, min(part * images + images, B)):
        image = tl.cast(b, tl.int64) * N * C + c
        for start in range(0, N, T):
            grads = ()
            for t in tl.static_range(T):
                grads = grads + (_load(grad + image + start * C, start, t, c, N, C),)
                total += grads[t]
            for s in tl.static_range(T + K - 1):
                value = _load(x + image + start * C, start, s - K // 2, c, N, C)
                for t in tl.static_range(T):
                    if s >= t and s < t + K:
                        sums = sums[: s - t] + (sums[s - t] + value * grads[t],) + sums[s - t + 1 :]
    row = partial + tl.cast(part, tl.int64) * (K + 1) * C + c
    for k in tl.static_range(K):
        tl.store(row + k * C, sums[k], mask=c < C)
    tl.store(row + K * C, total, mask=c < C)


def depthwise(x: Tensor, weight: Tensor, bias: Tensor | None, tensor_cores: bool = False) -> Tensor:
    """The convolution with zero padding of K // 2: x [B, N, C], weight [C, 1, 1, K], bias [C] -> [B, N, C].

    Sums are in float32 and rounded once, to the type of x, or autocast's. Weight and bias may have another type: under
    autocast they stay in float32 (tensor cores round the weight to the type of x) and get gradients in float32. Tensor
    cores support 16-bit types; for other types the argument has no effect.

    Raises:
        ValueError: K is even.
    """
    return _depthwise(_autocast(x), _taps(weight), bias, False, False, tensor_cores)


def depthwise_silu(x: Tensor, weight: Tensor, bias: Tensor | None, tensor_cores: bool = False) -> Tensor:
    """`silu(depthwise(...))`, in one kernel if no gradient is needed."""
    if _wants_gradient(x, weight, bias):
        return F.silu(depthwise(x, weight, bias, tensor_cores))
    return _depthwise(_autocast(x), _taps(weight), bias, False, True, tensor_cores)


def glu_depthwise_silu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`silu(depthwise(glu(x), ...))` on tensor cores, x [B, N, 2 C]; in one kernel if no gradient is needed."""
    if _wants_gradient(x, weight, bias):
        return F.silu(depthwise(F.glu(x, dim=-1), weight, bias, True))
    return _depthwise(_autocast(x), _taps(weight), bias, True, True, True)


def _wants_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _taps(weight: Tensor) -> Tensor:
    """[C, 1, 1, K] -> [K, C]: a copy of a few kilobytes, so that the kernels read whole memory lines."""
    if weight.shape[3] % 2 == 0:
        raise ValueError(f"the convolution must have an odd number of taps, got {weight.shape[3]}")
    return weight.flatten(1).t().contiguous()


def _autocast(x: Tensor) -> Tensor:
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


@torch.library.custom_op("glit_models::depthwise", mutates_args=())
def _depthwise(
    x: Tensor, taps: Tensor, bias: Tensor | None, glu: bool, silu: bool, tensor_cores: bool
) -> Tensor:  # fmt: skip
    if not _runs_triton(x):
        return twin(x, taps, bias, glu, silu)
    if glu and not (tensor_cores and x.itemsize == 2):
        x, glu = F.glu(x, dim=-1), False
    x, taps, bias = x.contiguous(), taps.contiguous(), None if bias is None else bias.contiguous()
    out = x.new_empty(*x.shape[:2], taps.shape[1])
    with torch.cuda.device_of(x):
        if tensor_cores and x.itemsize == 2:
            _launch_dot(x, taps, bias, out, glu, silu)
        else:
            _launch_convolve(x, taps, bias, out, silu)
    return out


def _launch_convolve(x: Tensor, taps: Tensor, bias: Tensor | None, out: Tensor, silu: bool) -> None:
    (B, N, C), K = out.shape, len(taps)
    T = tokens_in_registers(K)
    # As many tokens per program as leave enough programs to fill the GPU, because each reads all taps.
    tiles, chunks = triton.cdiv(C, BLOCK_C), triton.cdiv(N, T)
    chunks = min(chunks, max(1, chunks * B * tiles // PROGRAMS))
    grid = (B * tiles * triton.cdiv(N, T * chunks),)
    _convolve_kernel[grid](x, taps, bias, out, N, chunks, C, K, T, BLOCK_C, silu, **OPTIONS)


def _launch_dot(x: Tensor, taps: Tensor, bias: Tensor | None, out: Tensor, glu: bool, silu: bool) -> None:
    (B, N, C), K = out.shape, len(taps)
    tiles = min(triton.cdiv(N, 16), DOT_TILES)
    parts = triton.cdiv(N, 16 * tiles)
    halo = triton.cdiv(K // 2, 16) if parts > 1 else 0
    grid = (triton.cdiv(C, DOT_BLOCK_C) * parts * triton.cdiv(B, 16),)
    _dot_kernel[grid](x, taps, bias, out, N, B, C, K, tiles, halo, DOT_BLOCK_C, glu, silu, **DOT_OPTIONS)


@torch.library.custom_op("glit_models::depthwise_gradients", mutates_args=())
def _gradients(grad: Tensor, x: Tensor, num_taps: int) -> tuple[Tensor, Tensor]:
    """Gradients of taps [K, C] and bias [C], in float32 (or 64). A second kernel adds the parts, deterministically."""
    if not _runs_triton(x):
        return twin_gradients(grad, x, num_taps)
    B, N, C = x.shape
    tiles = triton.cdiv(C, BLOCK_C)
    images = max(1, B * tiles // PROGRAMS)
    parts = triton.cdiv(B, images)
    partial = x.new_empty(parts, num_taps + 1, C, dtype=torch.float32)
    with torch.cuda.device_of(x):
        _gradients_kernel[(parts * tiles,)](
            grad.contiguous(), x.contiguous(), partial, B, N, images,
            C, num_taps, tokens_in_registers(num_taps), BLOCK_C, **OPTIONS,
        )  # fmt: skip
    sums = partial.sum(0)
    return sums[:-1].clone(), sums[-1].clone()  # an operator's results may not share memory


@_depthwise.register_fake
def _(x: Tensor, taps: Tensor, bias: Tensor | None, glu: bool, silu: bool, tensor_cores: bool) -> Tensor:
    return x.new_empty(*x.shape[:2], taps.shape[1])


@_gradients.register_fake
def _(grad: Tensor, x: Tensor, num_taps: int) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(num_taps, x.shape[2], dtype=dtype), x.new_empty(x.shape[2], dtype=dtype)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, taps, bias, glu, silu, ctx.tensor_cores = inputs
    if glu or silu:
        raise RuntimeError("fused GLU and SiLU have no gradient: call depthwise_silu, which then does without them")
    ctx.save_for_backward(x, taps)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, taps = ctx.saved_tensors
    grad_x = grad_taps = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = _depthwise(grad, taps.flip(0), None, False, False, ctx.tensor_cores)
    if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
        grad_taps, grad_bias = _gradients(grad, x, len(taps))
        grad_taps = grad_taps.to(taps.dtype)
        grad_bias = None if ctx.bias_dtype is None else grad_bias.to(ctx.bias_dtype)
    return grad_x, grad_taps, grad_bias, None, None, None


_depthwise.register_autograd(_backward, setup_context=_setup_context)


def twin(x: Tensor, taps: Tensor, bias: Tensor | None, glu: bool = False, silu: bool = False) -> Tensor:
    """The kernels' computation in plain PyTorch: x [B, N, C] (2 C with GLU), taps [K, C], bias [C] -> [B, N, C]."""
    x = F.glu(x, dim=-1) if glu else x
    dtype, N, reach = torch.promote_types(x.dtype, torch.float32), x.shape[1], len(taps) // 2
    padded = F.pad(x.to(dtype), (0, 0, reach, reach))
    out = torch.zeros_like(x, dtype=dtype, memory_format=torch.contiguous_format)
    for k, tap in enumerate(taps.to(dtype)):
        out.addcmul_(padded[:, k : k + N], tap)
    out = out if bias is None else out + bias.to(dtype)
    return (F.silu(out) if silu else out).to(x.dtype)


def twin_gradients(grad: Tensor, x: Tensor, num_taps: int) -> tuple[Tensor, Tensor]:
    """The computation of `_gradients_kernel` and the sum after it: the gradients of taps [K, C] and bias [C]."""
    dtype, N, reach = torch.promote_types(x.dtype, torch.float32), x.shape[1], num_taps // 2
    padded, grad = F.pad(x.to(dtype), (0, 0, reach, reach)), grad.to(dtype)
    taps = torch.stack([(grad * padded[:, k : k + N]).sum((0, 1)) for k in range(num_taps)])
    return taps, grad.sum((0, 1))


def _runs_triton(x: Tensor) -> bool:
    if triton is None or x.numel() == 0 or x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False
    return x.is_cuda or triton.knobs.runtime.interpret
