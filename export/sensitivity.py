"""Measure the sensitivity of each linear layer and convolution to int8, one at a time, on real images.

It simulates in torch what `quantize.py` does to the graph, and changes no file.

Axes: B images, C channels, H/W height and width, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from glit_models.runs.console import say, track

from .form import name_in_model

__all__ = ["measure_sensitivity"]

_LEVELS = 255
_Hook = Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor] | None]


@torch.inference_mode()
def measure_sensitivity(form: nn.Module, images: Tensor) -> dict[str, float]:
    """The mean squared change of the logits, relative to their mean square, with a single layer in int8.

    Args:
        form: the network in float32. images: preprocessed, [B, C, H, W].

    Returns:
        The layers by their names in the model, most sensitive first.
    """
    layers: dict[str, nn.Module] = {
        name_in_model(name): module
        for name, module in form.named_modules()
        if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)
    }
    ranges = _ranges(form, layers, images)
    expected = form(images)
    power = expected.square().mean().clamp(min=1e-12)
    found = {}
    say(f"int8: measuring how sensitive each of {len(layers)} layers is")
    for name, layer in track(layers.items(), "sensitivity of layers"):
        with _in_eight_bits(layer, *ranges[name]):
            found[name] = float((form(images) - expected).square().mean() / power)
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def _ranges(form: nn.Module, layers: dict[str, nn.Module], images: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Minimum and maximum input of each layer, including zero."""
    found: dict[str, tuple[Tensor, Tensor]] = {}

    def watch(name: str) -> _Hook:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            found[name] = (inputs[0].min().clamp(max=0), inputs[0].max().clamp(min=0))

        return hook

    handles = [layer.register_forward_pre_hook(watch(name)) for name, layer in layers.items()]
    try:
        form(images)
    finally:
        for handle in handles:
            handle.remove()
    return found


@contextmanager
def _in_eight_bits(layer: nn.Module, low: Tensor, high: Tensor) -> Iterator[None]:
    """Round a layer's input to 256 levels from `low` to `high`, and its weight to 255 levels per output."""
    scale = ((high - low) / _LEVELS).clamp(min=1e-12)
    zero = (-low / scale).round()

    def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        return (((inputs[0] / scale + zero).round().clamp(0, _LEVELS) - zero) * scale,)

    weight = layer.weight
    assert isinstance(weight, nn.Parameter)
    step = weight.flatten(1).abs().amax(1).clamp(min=1e-12).div(127).view(-1, *[1] * (weight.ndim - 1))
    handle = layer.register_forward_pre_hook(hook)
    layer.weight = nn.Parameter((weight / step).round() * step, requires_grad=False)
    try:
        yield
    finally:
        layer.weight = weight
        handle.remove()
