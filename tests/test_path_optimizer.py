"""Tests of a supernet's optimiser: it changes only what is on the step's paths, as AdamW would alone."""

import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from glit_models.search import SearchSpace, Supernet, glit, vitas
from glit_models.search.supernets import path_optimizer
from glit_models.search.supernets.path_optimizer import keep_to_paths
from glit_models.search.supernets.supernet import Sharing
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from glit_models import BlockSpec, GLiTSpec, Spec
from glit_models.autoformer.spec import AutoFormerBlock, AutoFormerSpec
from glit_models.training.recipe import OptimSection
from glit_models.training.setup import create_optimizer
from tests.spaces import AUTOFORMER

SPACE = glit(24, 3, 2, patch_size=8, kernel_sizes=(3, 5), expand_ratios=(1, 2), qkv_ratios=(0.5, 1), mlp_ratios=(1, 2))
SMALL = GLiTSpec((BlockSpec(1, 2, 1, 0.5, 3, 1), BlockSpec(3, 0, 1, 0.5)), 24, 3, 8)
NARROW = AutoFormerSpec((AutoFormerBlock(2, 2.0),) * 3, 24, 8, head_dim=8, max_relative_position=2)
WIDE = AutoFormerSpec((AutoFormerBlock(1, 1.0),) * 2, 32, 8, head_dim=8, max_relative_position=2)
IDENTITY = vitas((16, 32), 3, (0, 2, 4), (48, 96), (8, 32), 8)
FEW_HEADS = AutoFormerSpec(
    (AutoFormerBlock(0), *(AutoFormerBlock(2, mlp_hidden=8, head_dim=8),) * 2), 16, 8, max_relative_position=None,
    scale_by_embed_dim=True, block_norm_eps=1e-6,
)  # fmt: skip
STEPS: dict[str, tuple[SearchSpace, Sharing, list[Spec]]] = {
    "independent": (SPACE, "independent", [SMALL]),
    "entangled": (SPACE, "entangled", [SMALL]),
    "narrow and short": (AUTOFORMER, "entangled", [next(iter(AUTOFORMER))]),
    "paths of which none holds the other": (AUTOFORMER, "entangled", [NARROW, WIDE]),
    "both sides, with private queries and keys": (IDENTITY, "both_sides", [FEW_HEADS]),
}
SGD = OptimSection(opt="momentum", lr=0.1, weight_decay=0.5)
ADAMW = OptimSection(lr=0.1, weight_decay=0.5, layer_decay=0.8)


def _supernet(space: SearchSpace, sharing: Sharing = "entangled") -> Supernet:
    torch.manual_seed(0)
    private_qk = space == IDENTITY
    return Supernet(space, sharing, img_size=4 * space.patch_size, num_classes=5, private_qk=private_qk).train()


def _optimizer(supernet: Supernet, section: OptimSection, at_once: bool = False) -> Optimizer:
    optimizer = create_optimizer(supernet, section)
    keep_to_paths(optimizer, supernet)
    for group in optimizer.param_groups:
        group["lr"] *= group.get("lr_scale", 1)  # as schedules do
    for hook in optimizer._optimizer_step_pre_hooks.values():
        hook.at_once = at_once  # type: ignore[attr-defined]
    return optimizer


def _backward(supernet: Supernet, paths: Sequence[Spec]) -> None:
    size = 4 * supernet.space.patch_size
    images = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(1))
    for spec in paths:
        supernet.activate(spec, paths)
        cross_entropy(supernet(images), torch.arange(4)).backward()


def _step(supernet: Supernet, optimizer: Optimizer, paths: Sequence[Spec]) -> None:
    _backward(supernet, paths)
    optimizer.step()
    optimizer.zero_grad()


def _inside(supernet: Supernet, paths: Sequence[Spec]) -> dict[str, Tensor]:
    """Of every parameter, which elements the networks of the paths read."""
    grads = {name: parameter.grad for name, parameter in supernet.named_parameters()}
    supernet.zero_grad()
    states = (supernet.state_of(spec, side) for spec in paths for side in supernet.sides)
    for tensor in (tensor for state in states for tensor in state.values()):
        if tensor.requires_grad:
            tensor.sum().backward()
    inside = {}
    for name, parameter in supernet.named_parameters():
        inside[name] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        parameter.grad = grads[name]
    return {name: tensor != 0 for name, tensor in inside.items()}


def _tensors(supernet: Supernet, optimizer: Optimizer) -> dict[str, dict[str, Tensor]]:
    """Of every parameter a copy of its values and of all that an optimiser knows of each of its elements."""
    return {
        name: {"values": parameter.detach().clone()} | {
            key: value.clone()
            for key, value in optimizer.state.get(parameter, {}).items()
            if isinstance(value, Tensor) and value.shape == parameter.shape
        }
        for name, parameter in supernet.named_parameters()
    }  # fmt: skip


@pytest.mark.parametrize(
    ("section", "at_once"), [(SGD, False), (ADAMW, False), (ADAMW, True)], ids=["SGD", "AdamW", "AdamW at once"]
)
@pytest.mark.parametrize("case", STEPS)
def test_a_step_changes_and_decays_nothing_outside_its_paths(case: str, section: OptimSection, at_once: bool):
    space, sharing, paths = STEPS[case]
    supernet = _supernet(space, sharing)
    optimizer = _optimizer(supernet, section, at_once)
    rng = random.Random(0)
    for _ in range(4):
        _step(supernet, optimizer, [space.sample(rng)])  # momentum everywhere
    inside = _inside(supernet, paths)
    before = _tensors(supernet, optimizer)
    _step(supernet, optimizer, paths)
    for name, tensors in _tensors(supernet, optimizer).items():
        for key, tensor in tensors.items():
            if key in before[name]:
                assert torch.equal(tensor[~inside[name]], before[name][key][~inside[name]]), (name, key)
        changed = tensors["values"] != before[name]["values"]
        assert changed.any() or not inside[name].any(), name
    assert any(used.any() and not used.all() for used in inside.values()) == (sharing != "independent")


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("space", [AUTOFORMER, IDENTITY], ids=["entangled", "both sides"])
def test_every_element_is_moved_as_adamw_moves_it_over_the_steps_that_use_it(space: SearchSpace, at_once: bool):
    supernet = _supernet(space, "both_sides" if space == IDENTITY else "entangled")
    optimizer = _optimizer(supernet, OptimSection(weight_decay=0.5, layer_decay=0.8), at_once)
    groups = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
    assert len({(group["lr"], group["weight_decay"]) for group in groups.values()}) > 4
    expected: dict[str, list[Any]] = {
        name: [parameter.detach().double(), 0.0, 0.0, torch.zeros(parameter.shape)]
        for name, parameter in supernet.named_parameters()
    }
    rng = random.Random(0)
    for step in range(8):
        paths = [space.sample(rng) for _ in range(1 + step % 3)]
        inside = _inside(supernet, paths)
        _backward(supernet, paths)
        for name, parameter in supernet.named_parameters():
            if parameter.grad is None:
                continue
            values, first, second, count = expected[name]
            on, grad, group = inside[name].double(), parameter.grad.double(), groups[parameter]
            first = first + on * 0.1 * (grad - first)
            second = second + on * 0.001 * (grad**2 - second)
            count = count + on
            scale = (second / (1 - 0.999**count)).sqrt() + group["eps"]
            move = group["weight_decay"] * values + first / (1 - 0.9**count) / scale
            values = torch.where(inside[name], values - group["lr"] * move, values)
            expected[name] = [values, first, second, count]
        optimizer.step()
        optimizer.zero_grad()
    for name, parameter in supernet.named_parameters():
        torch.testing.assert_close(parameter.detach().double(), expected[name][0], rtol=1e-5, atol=1e-6)
    counts = [expected[name][3] for name, _ in supernet.named_parameters()]
    assert any(count.min() < count.max() for count in counts)


@pytest.mark.parametrize("at_once", [False, True])
def test_masks_that_are_forgotten_change_no_step(at_once: bool, monkeypatch: pytest.MonkeyPatch):
    trained = []
    for most in (path_optimizer._MOST_MASKED, 2000):
        monkeypatch.setattr(path_optimizer, "_MOST_MASKED", most)
        supernet, rng = _supernet(IDENTITY, "both_sides"), random.Random(0)
        optimizer = _optimizer(supernet, ADAMW, at_once)
        for _ in range(6):
            _step(supernet, optimizer, [IDENTITY.sample(rng)])
        (hook,) = optimizer._optimizer_step_pre_hooks.values()
        masks = hook._masks.values()  # type: ignore[attr-defined]
        assert hook._num_masked == sum(mask.numel() for mask in masks)  # type: ignore[attr-defined]
        trained.append((len(masks), supernet.state_dict()))
    (many, whole), (few, state) = trained
    assert few < many
    assert all(torch.equal(tensor, state[name]) for name, tensor in whole.items())


def test_an_optimiser_of_0_1_goes_on_with_its_own_count_for_every_element():
    supernet = _supernet(SPACE)
    former = create_optimizer(supernet, ADAMW)
    for _ in range(3):
        _step(supernet, former, [SMALL])
    optimizer = _optimizer(supernet, ADAMW)
    optimizer.load_state_dict(former.state_dict())
    _step(supernet, optimizer, [SMALL])
    weight = supernet.get_parameter("net.blocks.0.mlp.48.fc1.weight")
    corrections = optimizer.state[weight]["bias_correction2"]
    torch.testing.assert_close(corrections[:24], torch.full_like(corrections[:24], 1 - 0.999**4))
    torch.testing.assert_close(corrections[24:], torch.full_like(corrections[24:], 1 - 0.999**3))


class _Operators(TorchDispatchMode):
    """Counts operators that compute, which are launches on a GPU: all but views and a profiler's marks."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view and func.namespace == "aten":
            self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


def test_a_step_at_once_is_few_operators_however_many_parameters_there_are():
    supernet = _supernet(SPACE)
    optimizer = _optimizer(supernet, OptimSection(), at_once=True)
    for _ in range(2):  # the masks are made in the first step
        _backward(supernet, [SMALL])
        with _Operators() as operators:
            optimizer.step()
    assert len(supernet.partly_used()) > 10
    assert operators.counts.total() <= 20, operators.counts
