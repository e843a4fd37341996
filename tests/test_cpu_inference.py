"""A fused model on a CPU: the same numbers in fewer steps where that is possible, and by the layers where not."""

import copy
import random
from collections.abc import Callable
from unittest import mock

import pytest
import timm
import torch
from specs import TINY48, random_spec
from timm.utils import reparameterize_model
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from glit_models import GLiT, GLiTSpec, cpu_inference

needs_bfloat16 = pytest.mark.skipif(
    not cpu_inference._has_bfloat16(), reason="oneDNN does not multiply matrices of bfloat16 on this processor"
)


def make(seed: int = 0, **kwargs) -> GLiT:
    torch.manual_seed(seed)
    model = timm.create_model("glit_tiny", **{"spec": TINY48, "img_size": 64, "num_classes": 10, **kwargs})
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point():
            nn.init.uniform_(tensor.data, 0.5, 1.5) if "var" in name else nn.init.normal_(tensor.data, std=0.1)
    return model.eval()


def images(*size: int) -> Tensor:
    return torch.randn(size or (2, 3, 64, 64), generator=torch.Generator().manual_seed(1))


def operators(run: Callable[[], object]) -> dict[str, int]:
    """How often a call makes use of each."""
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiled:
        run()
    return {event.key: event.count for event in profiled.key_averages()}


def is_short(run: Callable[[], object]) -> bool:
    """Whether a call takes the shorter way."""
    with mock.patch.object(cpu_inference, "linear", wraps=cpu_inference.linear) as linear:
        run()
    return linear.called


def test_a_fused_model_computes_the_same_in_fewer_steps() -> None:
    model, x = make(), images()
    fused = reparameterize_model(model)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), model(x), rtol=1e-5, atol=1e-5)
        assert is_short(lambda: fused(x))
        assert not is_short(lambda: model(x))
        assert sum(operators(lambda: fused(x)).values()) < sum(operators(lambda: model(x)).values())


@pytest.mark.parametrize("seed", range(6))
def test_any_network_computes_the_same_and_so_do_its_intermediates(seed: int) -> None:
    spec = random_spec(random.Random(seed))
    model = make(seed, spec=spec)
    x = images(3, 3, 64, 64)
    fused = copy.deepcopy(model).fuse()
    with torch.inference_mode():
        torch.testing.assert_close(fused(x), model(x), rtol=1e-5, atol=1e-5)
        pairs = zip(fused.forward_intermediates(x)[1], model.forward_intermediates(x)[1], strict=True)
        for actual, expected in pairs:
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@needs_bfloat16
def test_bfloat16_has_no_passes_of_its_own_for_gelu_and_residuals() -> None:
    model, x = make().bfloat16(), images().bfloat16()
    fused = copy.deepcopy(model).fuse()
    with torch.no_grad():
        assert {"aten::gelu", "aten::addmm"} <= operators(lambda: model(x)).keys()
        used = operators(lambda: fused(x))
        assert "mkldnn::_linear_pointwise" in used
        assert "aten::gelu" not in used
        torch.backends.mkldnn.enabled = False
        try:
            assert "mkldnn::_linear_pointwise" not in operators(lambda: fused(x))
        finally:
            torch.backends.mkldnn.enabled = True


def test_bfloat16_is_no_farther_from_float32_than_the_layers_are() -> None:
    model, x = make(), images(8, 3, 64, 64)
    fused = copy.deepcopy(model).fuse().bfloat16()
    with torch.no_grad():
        expected = model(x)
        layers = (copy.deepcopy(model).bfloat16()(x.bfloat16()).float() - expected).square().mean().sqrt()
        ours = (fused(x.bfloat16()).float() - expected).square().mean().sqrt()
    assert 0 < ours < 1.2 * layers


def test_an_empty_batch_of_attention_alone_gives_no_rows() -> None:
    fused = make(spec=GLiTSpec(TINY48.blocks[:1], 48, 3)).fuse().bfloat16()
    with torch.inference_mode():
        assert fused(images()[:0].bfloat16()).shape == (0, 10)


def test_gradients_training_and_autocast_take_the_layers() -> None:
    model, x = make(), images()
    fused = copy.deepcopy(model).fuse()
    assert not is_short(lambda: fused(x))
    leaf = x.clone().requires_grad_()
    fused(leaf).sum().backward()
    assert leaf.grad is not None
    with torch.inference_mode():
        assert is_short(lambda: fused(x))
        assert not is_short(lambda: copy.deepcopy(fused).train()(x))
        with torch.autocast("cpu", torch.bfloat16):
            assert not is_short(lambda: fused(x))
        assert fused.double()(x.double()).dtype == torch.float64


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_tracers_and_counters_see_the_layers() -> None:
    model, x = make(), images()
    fused = copy.deepcopy(model).fuse().requires_grad_(False)
    with torch.no_grad():
        expected = model(x)
        for form in (
            torch.jit.script(fused),
            torch.jit.trace(fused, x),
            torch.fx.symbolic_trace(fused),
            torch.export.export(fused, (x,)).module(),
            torch.compile(fused, fullgraph=True, backend="aot_eager"),
        ):
            torch.testing.assert_close(form(x), expected, rtol=1e-5, atol=1e-5)
            assert not is_short(lambda form=form: form(x))
        counts = []
        for network in (model, fused):
            with FlopCounterMode(display=False) as counter:
                network(x)
            counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


class Scaled(nn.Linear):
    """Stands for an adapter or a quantized layer put in a linear layer's place."""

    def forward(self, x: Tensor) -> Tensor:
        return 8 * super().forward(x)


@pytest.mark.parametrize("place", ["attn.qkv", "attn.proj", "conv.expand", "conv.project", "fc1", "fc2"])
def test_layers_put_in_the_place_of_others_are_used(place: str) -> None:
    model = make(img_size=32)
    fused, x = copy.deepcopy(model).fuse(), images(2, 3, 32, 32)
    for network in (model, fused):
        for name, layer in list(network.named_modules()):
            if name.endswith(place):
                scaled = Scaled(layer.in_features, layer.out_features)
                scaled.load_state_dict(layer.state_dict())
                parent, _, child = name.rpartition(".")
                setattr(network.get_submodule(parent), child, scaled)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-4)
        assert not torch.allclose(fused(x), make(img_size=32).fuse()(x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "place", ["mixer", "attn", "qkv", "proj", "conv", "expand", "dwconv", "project", "mlp", "fc1", "fc2", "norm1"]
)
def test_hooks_on_all_but_activations_and_dropouts_are_called(place: str) -> None:
    fused, seen = make().fuse(), []
    hooked = [name for name, _ in fused.named_modules() if name.startswith("blocks") and name.endswith(f".{place}")]
    for name in hooked:
        fused.get_submodule(name).register_forward_hook(lambda *_, name=name: seen.append(name))
    with torch.no_grad():
        torch.testing.assert_close(fused(images()), make()(images()), rtol=1e-5, atol=1e-5)
    assert sorted(seen) == sorted(hooked) != []


def test_weights_of_another_type_than_the_pictures_are_refused_as_by_the_layers() -> None:
    fused = make().fuse().bfloat16()
    fused.blocks[0].mlp.float()
    with torch.no_grad(), pytest.raises(RuntimeError, match="dtype"):
        fused(images().bfloat16())
