"""Tests of maps over images: mixing of tokens, rollout, Grad-CAM, and the sheets of `glit explain`."""

import copy
import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from timm.utils import AttentionExtract
from torch import Tensor, nn

from glit_models import AutoFormerSpec, BlockSpec, GlitError, GLiTSpec, SpecError
from glit_models.cli import main
from glit_models.explain import attention_map, gradcam, mean_distances, reached_patches, rollout, token_mixing
from glit_models.parts import LocalConvPart
from glit_models.weights.folder import save_folder

ATTENTION = BlockSpec(3, 0, mlp_ratio=2, qkv_ratio=1)
LOCAL = BlockSpec(0, 3, mlp_ratio=2, kernel_size=5, expand_ratio=2)
MIXED = BlockSpec(1, 2, mlp_ratio=2, qkv_ratio=1, kernel_size=3, expand_ratio=2)
CONV2D = BlockSpec(1, 2, mlp_ratio=2, qkv_ratio=1, local_part="local_conv2d", kernel_size=3, expand_ratio=2)
WINDOW = BlockSpec(0, 3, mlp_ratio=2, local_part="window_attention", local_sizes={"window_size": 3})
HEIGHT, WIDTH = 48, 64  # 3 x 4 patches


def make_model(*blocks: BlockSpec, img_size: Any = (HEIGHT, WIDTH), **keywords: Any) -> Any:
    torch.manual_seed(0)
    spec = GLiTSpec(blocks, 48, 3)
    model = timm.create_model("glit_tiny", spec=spec, img_size=img_size, num_classes=4, **keywords).eval()
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.3)  # else attention is all but uniform
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model


def make_images(count: int = 2, height: int = HEIGHT, width: int = WIDTH) -> Tensor:
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(1))


def make_autoformer() -> Any:
    spec = AutoFormerSpec.from_dict({"embed_dim": 64, "blocks": [{"num_heads": 1, "mlp_ratio": 2}] * 2})
    return timm.create_model("autoformer_tiny", spec=spec, img_size=(HEIGHT, WIDTH), num_classes=4).eval()


@pytest.mark.parametrize("keywords", [{}, {"global_pool": "avg"}, {"global_pool": "avg", "class_token": False}])
def test_rows_of_every_mixing_sum_to_one_whatever_the_parts_and_the_pooling(keywords: dict[str, Any]) -> None:
    model = make_model(ATTENTION, LOCAL, MIXED, CONV2D, WINDOW, **keywords)
    images = make_images()
    blocks = token_mixing(model, images)
    num_tokens = 12 + model.num_prefix_tokens
    assert [list(block.heads) for block in blocks] == [
        ["attention"], ["local_conv"], ["attention", "local_conv"], ["attention", "local_conv2d"], ["window_attention"]
    ]  # fmt: skip
    for block in blocks:
        for matrix in (block.matrix, *block.heads.values()):
            assert (matrix >= 0).all()
            torch.testing.assert_close(matrix.sum(-1), torch.ones(matrix.shape[:-1]))
        assert block.matrix.shape == (2, num_tokens, num_tokens)
    maps = attention_map(model, rollout(blocks), images)
    assert maps.shape == (2, 3, 4)
    if model.global_pool == "avg":
        torch.testing.assert_close(maps.sum((1, 2)), torch.ones(2), rtol=0, atol=float(model.num_prefix_tokens) or 1e-5)


def test_autoformer_mixes_as_its_relative_attention_weighs() -> None:
    blocks = token_mixing(make_autoformer(), make_images())
    assert [list(block.heads) for block in blocks] == [["relative_attention"]] * 2
    torch.testing.assert_close(blocks[1].matrix.sum(-1), torch.ones(2, 13))


@pytest.mark.parametrize("hook_type", ["forward", "forward_pre"])
def test_the_mixing_of_attention_is_what_timm_extracts(hook_type: str) -> None:
    original, images = make_model(ATTENTION, MIXED), make_images()
    model = copy.deepcopy(original)
    blocks = token_mixing(model, images)
    found = AttentionExtract(model, method="hook", hook_type=hook_type)(images)
    for index, block in enumerate(blocks):
        torch.testing.assert_close(block.heads["attention"], found[f"blocks.{index}.mixer.attn.attn_drop"])
    assert all(block.mixer["attn"].fused_attn for block in original.blocks)


def test_timm_extracts_the_attention_of_a_traced_model_where_it_was_made_without_fused_attention() -> None:
    timm.layers.set_fused_attn(False)
    try:
        model, images = make_model(ATTENTION, MIXED), make_images()
    finally:
        timm.layers.set_fused_attn(True)
    blocks, found = token_mixing(model, images), AttentionExtract(model)(images)
    for index, block in enumerate(blocks):
        torch.testing.assert_close(block.heads["attention"], found[f"blocks.{index}.mixer.attn.softmax"])


def test_rollout_of_one_block_of_attention_is_its_attention_with_the_residual() -> None:
    model, images = make_model(ATTENTION), make_images()
    (block,) = token_mixing(model, images)
    torch.testing.assert_close(rollout([block]), (block.heads["attention"].mean(1) + torch.eye(13)) / 2)


def test_the_matrix_of_a_local_block_is_banded_and_holds_the_folded_kernel() -> None:
    model = make_model(LOCAL)
    (block,) = token_mixing(model, make_images())
    matrix = block.matrix[0]
    distance = (torch.arange(13) - torch.arange(13)[:, None]).abs()
    assert (matrix[distance > 2] == 0).all()
    assert (matrix[distance <= 2] > 0).all()
    conv = model.fuse().blocks[0].mixer["conv"].dwconv
    kernel = conv.weight.detach().abs().mean(0).flatten()
    torch.testing.assert_close(matrix[6, 4:9], kernel / kernel.sum())
    assert torch.equal(token_mixing(model, make_images())[0].matrix[0], matrix)  # the same once folded


@torch.no_grad()
@pytest.mark.parametrize("block", [LOCAL, CONV2D, WINDOW, MIXED])
def test_a_token_that_is_not_in_a_row_does_not_change_the_result(block: BlockSpec) -> None:
    model, images = make_model(block), make_images(1)
    seen = token_mixing(model, images)[0].matrix[0] > 0
    module = model.blocks[0]
    x = torch.randn(1, 13, 48)
    for token in (0, 1, 6, 12):
        changed = x.clone()
        changed[0, token] += torch.randn(48)
        differs = (module(x) - module(changed)).abs().amax(-1)[0] > 1e-6
        differs[token] = seen[token, token]  # the residual branch
        assert torch.equal(differs, seen[:, token])


def test_distances_of_a_kernel_are_those_of_its_taps() -> None:
    model, images = make_model(BlockSpec(0, 3, mlp_ratio=2, kernel_size=1, expand_ratio=2), CONV2D), make_images()
    point, both = (mean_distances(model, block, images) for block in token_mixing(model, images))
    assert point["local_conv"].tolist() == [0]
    assert both["attention"].shape == (1,)
    assert 0 < float(both["local_conv2d"]) < 2**0.5  # 3 x 3: the diagonal is the farthest


def test_images_of_another_size_have_maps_of_their_own_grid() -> None:
    model = make_model(ATTENTION, CONV2D, dynamic_img_size=True)
    images = make_images(1, 64, 96)
    assert attention_map(model, rollout(token_mixing(model, images)), images).shape == (1, 4, 6)


def test_a_part_without_mixing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(LocalConvPart, "mixing")
    with pytest.raises(SpecError, match="part 'local_conv' does not say how it mixes tokens"):
        token_mixing(make_model(LOCAL), make_images())


# ---- Grad-CAM ----


@pytest.mark.parametrize(
    ("blocks", "keywords", "expected"),
    [
        ((ATTENTION, LOCAL), {}, [12, 2]),  # of a kernel of 5
        ((ATTENTION, LOCAL, LOCAL), {}, [12, 4, 2]),
        ((ATTENTION, WINDOW), {}, [12, 0]),
        ((LOCAL, ATTENTION), {}, [12, 12]),
        ((ATTENTION, LOCAL), {"global_pool": "avg"}, [12, 12]),
    ],
)
def test_the_patches_that_reach_the_prediction_from_a_block_are_those_that_have_gradients(
    blocks: tuple[BlockSpec, ...], keywords: dict[str, str], expected: list[int]
) -> None:
    model, images = make_model(*blocks, **keywords), make_images(1)
    assert reached_patches(model, images) == (expected, 12)
    outputs: list[Tensor] = []
    for block in model.blocks:
        block.norm1.register_forward_hook(lambda _module, _inputs, x: x.retain_grad() or outputs.append(x))
    model(images).amax().backward()
    assert [int((x.grad[0, 1:] != 0).any(-1).sum()) for x in outputs] == expected


def test_gradcam_is_taken_at_the_last_block_that_all_patches_reach_the_prediction_from() -> None:
    pytest.importorskip("pytorch_grad_cam")
    model, images = make_model(MIXED, ATTENTION, LOCAL), make_images(2)
    for parameter in model.parameters():
        parameter.requires_grad_(False)  # as after a training of the head alone
    result = gradcam(model, images)
    assert result.block == 1
    assert result.maps.shape == (2, HEIGHT, WIDTH)
    assert float(result.maps.max()) > 0.9
    assert torch.equal(result.classes, model(images).argmax(-1))
    assert result.note == (
        "at block 2 only 2 of 12 patches reach the prediction: Grad-CAM there says nothing of the others; "
        "it is taken at block 1, the last that all reach it from"
    )
    last = gradcam(model, images, 2)
    assert (
        last.note == "at block 2 only 2 of 12 patches reach the prediction: Grad-CAM there says nothing of the others"
    )
    assert gradcam(make_model(LOCAL, ATTENTION), images).note == ""


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224", "test_swin"])
def test_gradcam_takes_other_models_of_timm(name: str) -> None:
    pytest.importorskip("pytorch_grad_cam")
    if name == "test_swin":
        model = timm.models.swin_transformer.SwinTransformer(
            64, embed_dim=8, depths=(1, 1), num_heads=(1, 1), window_size=2
        )
    else:
        model = timm.create_model(name, **({"img_size": 64} if "vit" in name else {}))
    assert gradcam(model, make_images(1, 64, 64)).maps.shape == (1, 64, 64)


@pytest.mark.parametrize("name", ["xcit_nano_12_p16_224", "mixer_s32_224", "tnt_s_legacy_patch16_224"])
def test_gradcam_of_a_model_without_maps_is_one_line(name: str) -> None:
    pytest.importorskip("pytorch_grad_cam")
    model = timm.create_model(name)
    with pytest.raises(GlitError, match=r"^Grad-CAM (does not work for|knows no layer of) \w+: "):
        gradcam(model, make_images(1, 224, 224))


# ---- the command ----


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and two images, one of which is broken."""
    path = tmp_path_factory.mktemp("explain")
    names = ("a", "b", "c", "d")
    save_folder(
        make_model(MIXED, ATTENTION, LOCAL), path / "model", class_names=names, dtype="float32", name="glit_tiny.small"
    )
    Image.linear_gradient("L").resize((90, 60)).save(path / "good.png")
    (path / "broken.png").write_bytes(b"no image")
    return path


def explain(folder: Path, *arguments: Any) -> int:
    return main(["explain", "--model", str(folder / "model"), "--device", "cpu", *map(str, arguments)])


@pytest.mark.parametrize("method", ["attention", "locality", "gradcam"])
@pytest.mark.parametrize("block", [None, 0])
def test_the_command_draws_a_sheet(
    method: str, block: int | None, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if method == "gradcam":
        pytest.importorskip("pytorch_grad_cam")
    options = [] if block is None else ["--block", block]
    out = tmp_path / "sheet.png"
    assert explain(folder, folder / "good.png", "--method", method, "--out", out, *options) == 0
    with Image.open(out) as image:
        assert image.format == "PNG"
        assert image.width > 200
    printed = capsys.readouterr()
    assert "on 1 image\n" in printed.out
    assert ("it is taken at block 1" in printed.err) == (method == "gradcam" and block is None)


def test_a_broken_image_is_named_and_the_others_are_drawn(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "sheet.png"
    assert explain(folder, folder / "good.png", folder / "broken.png", "--out", out) == 1
    assert capsys.readouterr().err == f"glit: {folder / 'broken.png'}: not an image of a known format\n"
    assert out.is_file()
    assert explain(folder, folder / "broken.png", "--out", tmp_path / "none.png") == 2
    assert not (tmp_path / "none.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "{tmp}/missing/sheet.png"], "its folder is missing"),
        (["--out", "{tmp}/sheet.jpg"], "a sheet is a PNG; give a name that ends in .png"),
        (
            ["--out", "{tmp}/sheet.png", "--method", "guess"],
            "--method must be one of attention, gradcam, locality, got 'guess'",
        ),
        (["--out", "{tmp}/sheet.png", "--block", "3"], "--block must be from 0 to 2, got 3"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(
    arguments: list[str], message: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert explain(folder, folder / "good.png", *(text.format(tmp=tmp_path) for text in arguments)) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_of_timms_models_only_gradcam_is_said_to_work(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    predict = importlib.import_module("glit_models.predict")
    monkeypatch.setattr(predict, "load_model", lambda name: timm.create_model("resnet18", num_classes=2))
    out = str(tmp_path / "sheet.png")
    assert main(["explain", str(folder / "good.png"), "--out", out]) == 2
    expected = "glit: ResNet is not a model of this package; of timm's others only --method gradcam works\n"
    assert capsys.readouterr().err == expected
    monkeypatch.setitem(sys.modules, "pytorch_grad_cam", None)
    assert main(["explain", str(folder / "good.png"), "--method", "gradcam", "--out", out]) == 2
    assert "Grad-CAM needs the package grad-cam: pip install grad-cam" in capsys.readouterr().err
    with pytest.raises(GlitError, match="pip install grad-cam"):
        gradcam(make_model(ATTENTION), make_images())
