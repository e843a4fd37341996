"""Find the classes of `fractals`: random systems of maps whose images have enough structure to learn from.

As in FractalDB (Kataoka et al., ACCV 2020), a system is drawn at random and kept if it covers enough of its image. As
in its sequel PC-FractalDB (Yamada et al., CVPR 2022), its variance must also be large enough, which excludes thin
shapes. Unlike in these papers, every map must be a contraction.

Axes: B systems, F maps.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ...errors import DataError
from .config import FractalConfig
from .ifs import MAX_STRETCH, areas, draw, hash_keys, numbers, stretch

__all__ = ["find_classes", "measure"]

_SIZE = 128
_DENSITY = 100_000 / 512**2  # points per pixel in FractalDB's search
_BATCH = 128
_PATIENCE = 4096, 64  # candidates that may fail: initially, and more per class found
_DRAWS = 24  # attempts per map to find a contraction
_LEAST_COVERAGE = 3  # sum of the maps' |det| per unit of filling rate; with less, images hardly ever pass
_COUNT, _MAPS = range(20, 22)  # purposes of random numbers; `fractals` and `ifs` use the ones below


def measure(maps: Tensor, num_maps: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Filling rate and variance of systems [B, F, 6], [B] each, measured on a plain image of 128 pixels.

    It has as many points per pixel as in FractalDB's search, which draws 100,000 on 512 x 512. The variance is that of
    the axis where it is smaller, over the covered pixels, in coordinates from -1 to 1.
    """
    view = torch.tensor([0.0, 0.0, 1.0, 0.0]).expand(len(maps), 4)
    image = draw(maps, num_maps, keys, view, _SIZE, _DENSITY)[:, 0, 1:-1, 1:-1].to(torch.float64)
    position = torch.linspace(-1, 1, _SIZE, dtype=torch.float64)
    total = image.sum((1, 2))
    variances = []
    for axis in (1, 2):
        share = image.sum(axis) / total.unsqueeze(-1)
        mean = (share * position).sum(-1, keepdim=True)
        variances.append((share * (position - mean) ** 2).sum(-1))
    return total / _SIZE**2, torch.minimum(*variances)


def find_classes(config: FractalConfig, seed: int) -> tuple[Tensor, Tensor]:
    """The first candidates, in the order of their numbers, that pass both thresholds."""
    center = next(_passing(config, seed)) if config.single else None
    found = []
    for system in _passing(config, seed, center):
        found.append(system)
        if len(found) == config.num_classes:
            break
    maps, num_maps = zip(*found, strict=True)
    return torch.stack(maps), torch.stack(num_maps)


def _passing(
    config: FractalConfig, seed: int, center: tuple[Tensor, Tensor] | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield systems, (maps [F, 6], count []), that pass both thresholds, until too few of them do."""
    found = tried = 0
    while tried < _PATIENCE[0] + _PATIENCE[1] * found:
        keys = hash_keys(seed, torch.arange(tried, tried + _BATCH))
        maps, num_maps, fit = _candidates(keys, config, center)
        maps, num_maps = maps[fit], num_maps[fit]
        filling_rate, variance = measure(maps, num_maps, keys[fit])
        passed = (filling_rate >= config.filling_rate) & (variance >= config.variance)
        yield from zip(maps[passed], num_maps[passed], strict=True)
        found, tried = found + int(passed.sum()), tried + _BATCH
    raise DataError(
        f"fractals.filling_rate={config.filling_rate} and fractals.variance={config.variance} leave "
        f"{found} classes of {tried} candidates, where fractals.num_classes={config.num_classes}; lower them"
    )


def _candidates(
    keys: Tensor, config: FractalConfig, center: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Candidate systems by number: maps [B, F, 6], counts [B], and a mask of the ones worth drawing.

    Coefficients are uniform in [-1, 1], or within delta of `center`; each map is the first contraction among its draws.
    """
    num_maps = (numbers(keys, _COUNT, 1)[:, 0] * (config.max_maps - 1)).to(torch.int64) + 2
    draws = 2 * numbers(keys, _MAPS, _DRAWS * config.max_maps * 6).view(-1, _DRAWS, config.max_maps, 6) - 1
    if center is not None:
        draws, num_maps = center[0] + config.delta * draws, center[1].expand(len(keys))
    fits = stretch(draws) <= MAX_STRETCH  # [B, draws, F]
    first = fits.to(torch.uint8).argmax(1)
    maps = draws.gather(1, first[:, None, :, None].expand(-1, 1, -1, 6)).squeeze(1)
    used = torch.arange(config.max_maps) < num_maps.unsqueeze(-1)
    coverage = (areas(maps) * used).to(torch.float64).sum(-1)
    return maps, num_maps, (fits.any(1) | ~used).all(-1) & (coverage >= _LEAST_COVERAGE * config.filling_rate)
