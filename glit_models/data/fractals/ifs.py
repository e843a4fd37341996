"""Draw iterated function systems (sets of affine maps) as images, with torch, on any device.

Independent of classes and data sets. All operations have results that IEEE 754 defines (products, sums, quotients,
square roots, comparisons, integers), and each runs as a separate kernel, so that devices agree to the bit. After the
first image, nothing is copied to or read from a GPU, so that drawing does not stall its queue.

Axes: B images, F maps, T words (finite sequences of maps), G clouds, M points of a cloud, P colour planes.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "MAX_MAPS",
    "MAX_SIZE",
    "MAX_STRETCH",
    "areas",
    "contract",
    "draw",
    "hash_keys",
    "images_at_once",
    "numbers",
    "stretch",
]

MAX_MAPS = 8
MAX_SIZE = 1024  # pixels per side; a float32 must be able to count the pixels of all planes
MAX_STRETCH = 0.98  # the largest singular value of a map; a contraction has one below 1
_NUM_CLOUDS = 4
_WORD_STEPS, _CLOUD_STEPS = 12, 16
_MARGIN = 2  # pixels around the image: one for patches that reach in, one for points outside
_ANGLES = 4096


# ---- random numbers: a counter-based hash, the same integers on every device ----


def hash_keys(*parts: Tensor | int) -> Tensor:
    """Int64 keys from broadcastable integers, at least one of which is a tensor.

    Applies the finaliser of splitmix64 (Steele et al., OOPSLA 2014) to the running sum after each part.
    """
    device = next(part.device for part in parts if isinstance(part, Tensor))
    key = torch.zeros((), dtype=torch.int64, device=device)
    for part in parts:
        key = key + part + _signed(0x9E3779B97F4A7C15)
        key = (key ^ _shift(key, 30)) * _signed(0xBF58476D1CE4E5B9)
        key = (key ^ _shift(key, 27)) * _signed(0x94D049BB133111EB)
        key = key ^ _shift(key, 31)
    return key


def _uniform(keys: Tensor) -> Tensor:
    """Float32 in [0, 1) from the upper 24 bits of each key."""
    return _shift(keys, 40).to(torch.float32) * 2.0**-24


def numbers(keys: Tensor, purpose: int, count: int) -> Tensor:
    """[B, count] in [0, 1) for keys [B]; purposes below 10 are reserved for `draw`."""
    return _uniform(hash_keys(keys.unsqueeze(-1), purpose, torch.arange(count, device=keys.device)))


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _shift(key: Tensor, bits: int) -> Tensor:
    """Logical right shift; torch's operator extends the sign."""
    return (key >> bits) & ((1 << (64 - bits)) - 1)


# ---- maps ----


def stretch(maps: Tensor) -> Tensor:
    """The largest singular value of each map's linear part, [..., F] from [..., F, 6]; see `contract`."""
    a, b, c, d = maps[..., :4].unbind(-1)
    squares, det = a * a + b * b + (c * c + d * d), a * d - b * c
    gap = (squares * squares - (det * det) * 4).clamp(min=0)
    return ((squares + gap.sqrt()) * 0.5).sqrt()


def contract(maps: Tensor) -> Tensor:
    """Shrink linear parts that stretch by more than `MAX_STRETCH` down to it, so that no orbit diverges.

    Args:
        maps: [..., F, 6] of (a, b, c, d, e, f): x' = a x + b y + e, y' = c x + d y + f.
    """
    found = stretch(maps)
    factor = (MAX_STRETCH / found).masked_fill(found <= MAX_STRETCH, 1.0).unsqueeze(-1)
    return torch.cat((maps[..., :4] * factor, maps[..., 4:]), -1)


def areas(maps: Tensor) -> Tensor:
    """|det|, the factor by which each map scales areas: [..., F] from [..., F, 6]."""
    a, b, c, d = maps[..., :4].unbind(-1)
    return (a * d - b * c).abs()


def _shares(maps: Tensor, num_maps: Tensor) -> Tensor:
    """Each map's share of |det|, [B, F], its probability in FractalDB; zero past an image's `num_maps` [B]."""
    unused = torch.arange(maps.shape[-2], device=maps.device) >= num_maps.unsqueeze(-1)
    weights = areas(maps).clamp(min=1e-6).masked_fill(unused, 0.0)
    total = weights[..., 0]
    for column in weights.unbind(-1)[1:]:  # in the same order on every device, unlike `sum`
        total = total + column
    return weights / total.unsqueeze(-1)


# ---- drawing ----


def draw(
    maps: Tensor, num_maps: Tensor, keys: Tensor, view: Tensor, size: int, density: float, num_planes: int = 1
) -> Tensor:
    """Draw systems: uint8 [B, P, size + 2, size + 2], 1 at each point, with a border of one pixel.

    A point is a word of maps applied to a point of the attractor, so it is on the attractor too. Instead of one random
    walk per point, each of T words is applied to each of M points: T + M walks draw T x M points. Words are drawn from
    evenly spaced numbers, digit by digit, so that each part of the fractal gets its share, and end when their share
    falls below 1 / T. G clouds take turns, so that equal words draw different points.

    Args:
        maps: [B, F, 6], contractive.
        num_maps: [B] int64, number of the F maps in use.
        keys: [B] int64; keys of the remaining random numbers.
        view: [B, 4]: fraction of a full turn, in [0, 1); mirrored if above 0; zoom factor; the point of the fractal
            that the zoom keeps fixed, in [0, 1).
        size: pixels per side, at most `MAX_SIZE`.
        density: points per pixel.
        num_planes: number of parts of equal share; each is drawn into a separate plane.
    """
    num_points, num_words = _plan(size, density)
    table = _table(maps, num_maps)
    words = _words(table, _addresses(keys, num_words, 1), _WORD_STEPS, 1 / num_words)
    orbit = _words(table, _addresses(keys, num_points * _NUM_CLOUDS, 2), _CLOUD_STEPS, 0.0)
    cloud = _apply(orbit, _fixed_point(maps[:, 0]))
    words = _compose(_view(words, cloud, view, size), words)
    width = size + 2 * _MARGIN
    raster = torch.zeros(len(maps), num_planes, width, width, dtype=torch.uint8, device=maps.device)
    _scatter(words, cloud, raster, max(1, _held(maps.device)[1] // (num_words * num_points)))
    return raster[..., 1:-1, 1:-1]


def images_at_once(size: int, density: float, device: torch.device) -> int:
    """The best number of images to draw together: what fits a core's cache on a CPU, a memory bound on a GPU."""
    num_points, num_words = _plan(size, density)
    return max(1, _held(device)[0] // (num_words + _NUM_CLOUDS * num_points))


def _held(device: torch.device) -> tuple[int, int]:
    """Maximum number of words and points in memory: on a GPU, each takes a few hundred megabytes."""
    return (1 << 15, 1 << 17) if device.type == "cpu" else (1 << 19, 1 << 24)


def _plan(size: int, density: float) -> tuple[int, int]:
    """Points per cloud and words, with close to the fewest walks: their product is the points of an image."""
    wanted = density * size * size
    num_points = max(1, round(math.sqrt(wanted / _NUM_CLOUDS)))
    return num_points, _NUM_CLOUDS * max(1, math.ceil(wanted / num_points / _NUM_CLOUDS))


def _addresses(keys: Tensor, count: int, purpose: int) -> Tensor:
    """Evenly spaced numbers in [0, 1), each moved at random within its interval: [B, count]."""
    return (torch.arange(count, device=keys.device) + numbers(keys, purpose, count)) * (1 / count)


def _table(maps: Tensor, num_maps: Tensor) -> tuple[Tensor, Tensor]:
    """The lookup table of `_words`: columns [8, B, F + 1] and bounds [F - 1, B, 1].

    The columns are a, b, e, c, d, f, the map's share and the shares before it; the identity comes last. A bound is
    where the numbers of one map end and those of the next one begin.
    """
    share = _shares(maps, num_maps)
    before = [torch.zeros_like(share[:, 0])]
    for column in share.unbind(-1)[:-1]:
        before.append(before[-1] + column)
    low = torch.stack(before, -1)
    last = torch.arange(1, maps.shape[1], device=maps.device) >= num_maps.unsqueeze(-1)
    bounds = low[:, 1:].masked_fill(last, 2.0).T.unsqueeze(-1)  # rounding must not select a map that does not exist
    a, b, c, d, e, f = maps.unbind(-1)
    columns = torch.stack((a, b, e, c, d, f, share, low))
    identity = columns.new_zeros(8, len(maps), 1)
    identity[0::4] = identity[6] = 1
    return torch.cat((columns, identity), -1), bounds


def _words(table: tuple[Tensor, Tensor], addresses: Tensor, steps: int, least_share: float) -> Tensor:
    """Read `addresses` [B, T] as words, the map of the largest parts first; returns their composition [2, 3, B, T]."""
    columns, bounds = table
    batch, count = addresses.shape
    rows = columns.shape[-1]
    first = torch.arange(batch, device=addresses.device).unsqueeze(-1) * rows
    flat = columns.flatten(1)
    word = torch.eye(2, 3, device=addresses.device)[..., None, None].expand(2, 3, batch, count).contiguous()
    share = torch.ones_like(addresses)
    for _ in range(steps):
        digit = torch.zeros(addresses.shape, dtype=torch.uint8, device=addresses.device)
        for bound in bounds:
            digit += (addresses >= bound).view(torch.uint8)
        row = digit + first
        if least_share:
            share = share * flat[6].take(row)
            row = torch.where(share >= least_share, row, first + (rows - 1))
        chosen = flat.index_select(1, row.flatten()).view(8, batch, count)
        word = _compose(word, chosen[:6].view(2, 3, batch, count))
        addresses = (addresses - chosen[7]) / chosen[6]
    return word


def _compose(outer: Tensor, inner: Tensor) -> Tensor:
    """The map that applies `inner` and then `outer`; both [2, 3, B, T]."""
    result = outer[:, 0:1] * inner[0:1]
    result += outer[:, 1:2] * inner[1:2]
    result[:, 2] += outer[:, 2]
    return result


def _apply(word: Tensor, point: Tensor) -> Tensor:
    """Points [2, B, T]: each word at `point` [2, B, 1 or T]."""
    return word[:, 0] * point[0] + word[:, 1] * point[1] + word[:, 2]


def _fixed_point(maps: Tensor) -> Tensor:
    """The fixed point of the map [B, 6], [2, B, 1]; it is on the attractor."""
    a, b, c, d, e, f = maps.unsqueeze(1).unbind(-1)
    det = (1 - a) * (1 - d) - b * c
    return torch.stack(((e * (1 - d) + b * f) / det, (f * (1 - a) + c * e) / det))


def _view(words: Tensor, cloud: Tensor, view: Tensor, size: int) -> Tensor:
    """Map the plane to pixels, [2, 3, B, 1]: the fractal's box becomes a square, which is turned, flipped and zoomed.

    The zoom keeps a point of the fractal fixed, so that no view is empty.
    """
    low, high = cloud.amin(-1, keepdim=True), cloud.amax(-1, keepdim=True)
    middle, half = (low + high) * 0.5, (high - low) * 0.5  # of the cloud; each word bounds a copy of it
    middles = _apply(words, middle)
    halves = words[:, 0].abs() * half[0] + words[:, 1].abs() * half[1]
    low, high = (middles - halves).amin(-1, keepdim=True), (middles + halves).amax(-1, keepdim=True)
    middle, scale = (low + high) * 0.5, 2 / (high - low).clamp(min=1e-6)
    turn, mirror, zoom, choice = view.unsqueeze(-1).unbind(1)
    cos, sin = _turns(view.device)[:, (turn * _ANGLES).to(torch.int64)]
    sign = 1 - 2 * (mirror > 0).to(torch.float32)
    turned = torch.stack((cos * sign, -sin, sin * sign, cos)).view(2, 2, -1, 1) * scale
    index = (choice * cloud.shape[-1]).to(torch.int64).expand(2, -1, -1)
    anchor = cloud.gather(-1, index) - middle
    anchor = turned[:, 0] * anchor[0] + turned[:, 1] * anchor[1]
    shift = anchor.clamp(-1, 1) - anchor * zoom
    linear = turned * zoom
    shift = shift - (linear[:, 0] * middle[0] + linear[:, 1] * middle[1])
    radius = (size - 1) / 2
    return torch.cat((linear * radius, ((shift * radius) + (size / 2 + _MARGIN)).unsqueeze(1)), 1)


@functools.lru_cache
def _turns(device: torch.device) -> Tensor:
    """Cosine and sine of all possible angles, [2, angles]; one table, because devices round them differently."""
    angles = np.arange(_ANGLES) * (2 * np.pi / _ANGLES)
    return torch.from_numpy(np.stack((np.cos(angles), np.sin(angles))).astype(np.float32)).to(device)


def _scatter(words: Tensor, cloud: Tensor, raster: Tensor, step: int) -> None:
    """Set the pixels of `raster` [B, P, W, W] hit by the words [2, 3, B, T] of the clouds [2, B, G M]."""
    batch, num_planes, width, _ = raster.shape
    words = words.unflatten(-1, (-1, _NUM_CLOUDS)).transpose(-1, -2).unsqueeze(-1)  # [2, 3, B, G, T / G, 1]
    cloud = cloud.unflatten(-1, (_NUM_CLOUDS, -1)).unsqueeze(-2)  # [2, B, G, 1, M]
    plane = torch.arange(words.shape[-2], device=words.device) * num_planes // words.shape[-2]
    offset = (plane * (width * width)).to(torch.float32).unsqueeze(-1)
    for start in range(0, batch, step):
        part = slice(start, start + step)
        x, y = cloud[:, part]
        row, column = (
            (line[0] * x).add_(line[1] * y).add_(line[2]).clamp_(0, width - 1).trunc_()
            for line in (words[1, :, part], words[0, :, part])
        )
        index = row.mul_(width).add_(column)
        if num_planes > 1:
            index.add_(offset)
        raster[part].view(len(index), -1).scatter_(1, index.flatten(1).to(torch.int64), 1)
