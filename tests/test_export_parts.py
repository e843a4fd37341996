"""Tests that every part and family exports: the form, ONNX in each opset and precision, and the torch program agree."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, final

import onnx
import pytest
import torch
from exported import difference, exported, randomised
from glit_models.export import OnnxClassifier, export_onnx
from glit_models.export.form import ExportForm
from glit_models.export.program import export_torch
from torch import Tensor, nn

from glit_models import BlockSpec, GLiT, GLiTSpec, Part, SpecTransformer
from glit_models.autoformer.spec import AutoFormerBlock, AutoFormerSpec
from glit_models.errors import ExportError
from glit_models.parts import PARTS, BuildOptions, TokenGrid

pytestmark = pytest.mark.usefixtures("cached_graphs")
TOLERANCE = 1e-4


class AutoFormer(SpecTransformer):
    """A model of AutoFormer's specs."""

    spec_class = AutoFormerSpec
    norm_eps = 1e-5


def autoformer(**kwargs: Any) -> SpecTransformer:
    """Two real blocks with an identity block between them, relative positions that are clipped, no square."""
    blocks = (AutoFormerBlock(2, 2.0), AutoFormerBlock(0), AutoFormerBlock(3, 4.0))
    spec = AutoFormerSpec(blocks, 48, head_dim=16, max_relative_position=2)
    arguments = {"spec": spec, "img_size": (64, 48), "num_classes": 5, "global_pool": "avg", "fc_norm": False}
    return randomised(AutoFormer(**{**arguments, **kwargs}))


def vitas(**kwargs: Any) -> SpecTransformer:
    """Free widths, another scale, no relative positions, an identity block at the end."""
    blocks = (
        AutoFormerBlock(2, mlp_hidden=31), AutoFormerBlock(5, mlp_hidden=77, head_dim=8), AutoFormerBlock(0)
    )  # fmt: skip
    spec = AutoFormerSpec(blocks, 48, head_dim=16, max_relative_position=None, scale_by_embed_dim=True)
    return randomised(AutoFormer(**{"spec": spec, "img_size": 32, "num_classes": 5, **kwargs}))


def with_local_part(kind: str, **kwargs: Any) -> SpecTransformer:
    """A mixed block, and a local one at the end."""
    sizes: dict[str, Any] = {
        "local_conv2d": {"kernel_size": 3, "expand_ratio": 2},
        "window_attention": {"local_sizes": (("window_size", 3),)},
        "shift": {"local_sizes": (("step", 1),)},
    }[kind]
    blocks = (BlockSpec(1, 2, 2, 1, local_part=kind, **sizes), BlockSpec(0, 3, 2, local_part=kind, **sizes))
    spec = GLiTSpec(blocks, 48, 3)
    return randomised(GLiT(**{"spec": spec, "img_size": (64, 48), "num_classes": 5, **kwargs}))


@final
@dataclass(frozen=True)
class ShiftPart(Part):
    """A part of one's own that says nothing of its export: each token sees the one `step` before it."""

    kind: ClassVar[str] = "shift"
    slot: ClassVar[str] = "shift"
    genes: ClassVar[tuple[str, ...]] = ("step",)

    step: int

    @classmethod
    def from_genes(cls, num_heads: int, head_width: int, genes: Any) -> ShiftPart:
        return cls(num_heads * head_width, genes["step"])

    num_params = property(lambda self: self.channels * (self.channels + 1))
    label = "shift"

    def num_macs(self, tokens: TokenGrid) -> int:
        return tokens.num_tokens * self.channels**2

    def build(self, options: BuildOptions) -> nn.Module:
        return _Shift(self)


class _Shift(nn.Module):
    def __init__(self, part: ShiftPart) -> None:
        super().__init__()
        self.step, self.mix = part.step, nn.Linear(part.channels, part.channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(x.roll(self.step, dims=1))


@pytest.fixture(autouse=True)
def _own_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PARTS._entries, "shift", ShiftPart)


NETWORKS: dict[str, Any] = {
    "autoformer": autoformer,
    "autoformer, class token": lambda: autoformer(global_pool="token", fc_norm=None),
    "autoformer, no class token": lambda: autoformer(class_token=False),
    "autoformer, far": lambda: autoformer(spec=AutoFormerSpec((AutoFormerBlock(2, 2.0),), 32, head_dim=16)),
    "vitas": vitas,
    "identity alone": lambda: vitas(spec=AutoFormerSpec((AutoFormerBlock(0),), 48)),
    **{
        f"{kind}, {pool}": lambda kind=kind, pool=pool: with_local_part(kind, global_pool=pool)
        for kind in ("local_conv2d", "window_attention", "shift")
        for pool in ("token", "avg")
    },
}


def spread(model: SpecTransformer) -> float:
    """How far apart the logits of two random images are: what a difference has to be small beside."""
    images = torch.randn(2, model.in_chans, *model.patch_embed.img_size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        return float((model(images)[0] - model(images)[1]).abs().max())


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("attention", ["operator", "products", "fused"])
def test_the_form_of_every_part_gives_the_logits_of_the_model(name: str, attention: Any) -> None:
    model = NETWORKS[name]()
    images = torch.randn(3, 3, *model.patch_embed.img_size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(ExportForm(model, attention)(images), model(images), rtol=1e-5, atol=1e-5)
    assert name == "identity alone" or spread(model) > 1e-3


FILES = ("autoformer", "vitas", "local_conv2d, token", "window_attention, avg", "shift, token")
# Each part in one opset and each opset with two parts; relative attention, the most intricate, with and without the
# operator `Attention`. The rest of the cross is extended.
CHOSEN = {("autoformer", 23), ("autoformer", 18), ("vitas", 20), ("local_conv2d, token", 18),
          ("window_attention, avg", 23), ("shift, token", 20)}  # fmt: skip
CROSS = [
    pytest.param(name, opset, marks=() if (name, opset) in CHOSEN else pytest.mark.extended)
    for name in FILES
    for opset in (23, 20, 18)
]


@pytest.mark.parametrize(("name", "opset"), CROSS)
def test_a_file_of_every_part_and_opset_gives_the_logits_of_pytorch(name: str, opset: int, tmp_path: Path) -> None:
    model = NETWORKS[name]()
    artifact = export_onnx(model, tmp_path / "model.onnx", opset=opset, verify=4)
    assert artifact.agreement is not None
    assert artifact.agreement.holds
    for batch in (1, 5):
        assert difference(artifact, model, batch) < TOLERANCE


def test_relative_attention_is_one_operator_and_the_file_holds_no_vector_for_each_pair_of_tokens(
    tmp_path: Path,
) -> None:
    model = autoformer(img_size=224)
    artifact = export_onnx(model, tmp_path / "model.onnx", opset=23, batch=1, verify=2)
    found = Counter(node.op_type for node in onnx.load(artifact.path).graph.node)
    assert found["Attention"] == 2
    assert found["Softmax"] == 0
    assert found["Gemm"] == 2 * 6 + 1
    weights = 4 * sum(parameter.numel() for parameter in model.parameters())
    assert artifact.num_bytes < weights + 2 * 4 * (14 * 15 + 14 * 14) * 16 * 2 + 200_000


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("autoformer", {"precision": "fp16"}),
        ("autoformer", {"dynamic_int8": True}),
        ("window_attention, avg", {"precision": "fp16", "opset": 18}),
        *(pytest.param(*case, marks=pytest.mark.extended) for case in (
            ("autoformer", {"precision": "fp16", "opset": 18}),
            ("window_attention, avg", {"precision": "fp16"}),
            ("window_attention, avg", {"dynamic_int8": True}),
        )),
    ],
)  # fmt: skip
def test_lower_precisions_of_other_parts_stay_near_pytorch(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = NETWORKS[name]()
    options = {"precision": "int8", **options}
    artifact = export_onnx(model, tmp_path / "model.onnx", verify=8, **options)
    assert artifact.agreement is not None
    assert artifact.agreement.max_rel < (0.3 if options["precision"] == "int8" else 0.01)


def test_a_torch_program_of_an_autoformer_agrees(tmp_path: Path) -> None:
    model = autoformer()
    artifact = export_torch(model, tmp_path / "model.pt2", verify=4)
    assert artifact.agreement is not None
    assert artifact.agreement.max_abs < TOLERANCE


@pytest.mark.parametrize("name", ["autoformer", "local_conv2d, avg", "window_attention, token"])
def test_another_size_has_a_grid_of_its_own(name: str) -> None:
    model = NETWORKS[name]()
    form = ExportForm(model, "fused", image_size=(32, 80))
    model.set_input_size((32, 80))
    images = torch.randn(3, 3, 32, 80, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(form(images), model(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "name",
    [
        "autoformer",
        *(pytest.param(name, marks=pytest.mark.extended) for name in ("local_conv2d, avg", "window_attention, token")),
    ],
)
def test_another_size_is_exported_with_its_grid(name: str, tmp_path: Path) -> None:
    model = NETWORKS[name]()
    artifact = export_onnx(model, tmp_path / "model.onnx", image_size=(32, 80), batch=3, verify=2)
    model.set_input_size((32, 80))
    assert difference(artifact, model, 3) < TOLERANCE


def test_a_dynamic_model_is_exported_at_its_own_size_whatever_it_saw_last() -> None:
    model = autoformer(dynamic_img_size=True)
    images = torch.randn(2, 3, 64, 48, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        model(torch.zeros(1, 3, 32, 32))
        form = ExportForm(model, "fused")
        torch.testing.assert_close(form(images), model(images), rtol=1e-5, atol=1e-5)


def test_a_dynamic_size_is_refused_for_parts_that_depend_on_the_grid(tmp_path: Path) -> None:
    for model, kind in ((autoformer(), "relative_attention"), (with_local_part("local_conv2d"), "local_conv2d")):
        with pytest.raises(ExportError, match=f"image_size cannot be dynamic: {kind} depends on the grid of patches"):
            export_onnx(model, tmp_path / "model.onnx", image_size="dynamic", verify=0)
    ExportForm(vitas(), "fused", image_size="dynamic")  # without relative positions there is no grid
    assert list(tmp_path.iterdir()) == []


def test_layers_of_a_part_of_ones_own_keep_their_names(tmp_path: Path) -> None:
    model = with_local_part("shift")
    artifact = export_onnx(model, tmp_path / "model.onnx", opset=20, verify=2)
    graph = onnx.load(artifact.path).graph
    names = {node.name for node in graph.node}
    assert any(name.startswith("blocks.0.mixer.shift.mix/") for name in names)
    assert "blocks.0.mlp.fc1/Gemm" in names
    assert OnnxClassifier(artifact.path).info.source == "glit"


def test_a_mixed_block_splits_its_channels_once() -> None:
    artifact = exported("one block")
    found = Counter(node.op_type for node in onnx.load(artifact.path).graph.node)
    assert found["Split"] == 1
