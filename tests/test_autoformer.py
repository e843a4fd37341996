"""Tests of the AutoFormer family: outputs of the authors' code, their checkpoint, and exact sizes of the networks."""

import json
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import pytest
import timm
import torch
from reference import FIXTURES, official_state, reference_tensors
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import glit_models
from glit_models import AutoFormer, AutoFormerBlock, AutoFormerSpec, SpecTransformer
from glit_models.autoformer.checkpoint import convert_autoformer_state_dict, to_autoformer
from glit_models.cli import main
from glit_models.errors import SpecError, WeightsError
from glit_models.weights import resolve


def make_spec(embed_dim: int, heads: list[int], ratios: list[float], **sizes: int) -> AutoFormerSpec:
    blocks = tuple(AutoFormerBlock(h, ratio) for h, ratio in zip(heads, ratios, strict=True))
    return AutoFormerSpec(blocks, embed_dim, **sizes)


# The networks that the authors' code was run on, by fixture and name there; the largest one is the whole supernet.
NETWORKS = {
    ("small", "largest"): make_spec(48, [3, 3, 3], [4, 4, 4], head_dim=16),
    ("small", "sub_a"): make_spec(32, [2, 1], [3.5, 3], head_dim=16),
    ("small", "sub_b"): make_spec(40, [1, 3, 2], [3, 4, 3.5], head_dim=16),
    ("small_clip", "largest"): make_spec(48, [3, 3], [4, 4], head_dim=16, max_relative_position=2),
    ("small_clip", "sub_a"): make_spec(32, [2, 1], [3.5, 3], head_dim=16, max_relative_position=2),
}
SMALL = NETWORKS["small", "sub_b"]
TASK = {"img_size": 64, "num_classes": 10}


@pytest.fixture(params=NETWORKS, ids="-".join)
def network(request: pytest.FixtureRequest) -> tuple[str, str]:
    return request.param


def authors_state(name: str) -> dict[str, Tensor]:
    """A state dict of the authors' supernet, or of one network of it, every tensor random."""
    return reference_tensors(f"autoformer_{name}_state")


def reference(name: str, network: str) -> dict[str, Tensor]:
    """The input, and what the authors' code computes from it in eval mode."""
    tensors = reference_tensors(f"autoformer_{name}_io")
    prefix = f"{network}."
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith((prefix, "input"))}


def loaded(name: str, network: str, **task: object) -> AutoFormer:
    """The network with the weights that it has in the supernet."""
    model = AutoFormer(NETWORKS[name, network], **{**TASK, **task}).eval()
    model.load_state_dict(authors_state(name))
    return model


def assert_agrees(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_every_block_gives_the_numbers_of_the_authors_code(network: tuple[str, str]) -> None:
    model, expected = loaded(*network), reference(*network)
    attention: list[Tensor] = []
    for block in model.blocks:
        block.mixer.register_forward_hook(lambda _module, _inputs, output: attention.append(output))
    with torch.no_grad():
        embedded = model.patch_embed(expected["input"])
        tokens = model.forward_intermediates(
            expected["input"], output_fmt="NLC", return_prefix_tokens=True, intermediates_only=True
        )
    assert_agrees(embedded, expected["patch_embed"])
    assert len(tokens) == model.spec.depth
    for index, (patches, class_token) in enumerate(tokens):
        assert_agrees(attention[index], expected[f"blocks.{index}.attn"])
        assert_agrees(torch.cat([class_token, patches], dim=1), expected[f"blocks.{index}"])


def test_features_and_logits_are_those_of_the_authors_code(network: tuple[str, str]) -> None:
    model, expected = loaded(*network), reference(*network)
    with torch.no_grad():
        assert_agrees(model.forward_features(expected["input"]), expected["norm"])
        assert_agrees(model(expected["input"]), expected["logits"])
        model.reset_classifier(10, "token")
        model.head.load_state_dict({key: supernet_head(network)[key] for key in ("weight", "bias")})
        assert_agrees(model(expected["input"]), expected["logits_cls_pool"])


def supernet_head(network: tuple[str, str]) -> dict[str, Tensor]:
    state, dim = authors_state(network[0]), NETWORKS[network].embed_dim
    return {"weight": state["head.weight"][:, :dim], "bias": state["head.bias"]}


def test_the_pooling_may_be_chosen_when_the_model_is_made(network: tuple[str, str]) -> None:
    expected = reference(*network)
    with torch.no_grad():
        assert_agrees(loaded(*network, global_pool="token")(expected["input"]), expected["logits_cls_pool"])


def test_the_state_dict_of_one_network_is_what_is_cut_from_the_supernet() -> None:
    spec = NETWORKS["small", "sub_a"]
    cut = convert_autoformer_state_dict(authors_state("small"), spec)
    hashes = {name: sha256(tensor.contiguous().numpy().tobytes()).hexdigest() for name, tensor in cut.items()}
    # Of the tensors that the authors' code cuts out, converted in the same way.
    assert hashes == json.loads((FIXTURES / "autoformer_small_sub_a_sha256.json").read_text())


@pytest.mark.parametrize("name", ["small", "small_clip"])
def test_conversion_and_its_inverse_change_nothing(name: str) -> None:
    state = authors_state(name)
    back = to_autoformer(convert_autoformer_state_dict({"model": state, "epoch": 499}, NETWORKS[name, "largest"]))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)


def test_timm_s_own_loading_takes_the_authors_file(tmp_path: Path) -> None:
    path, expected = tmp_path / "supernet-tiny.pth", reference("small", "sub_b")
    torch.save({"model": authors_state("small"), "epoch": 499}, path)
    for arguments in (
        {"pretrained": True, "pretrained_cfg_overlay": {"file": str(path), "num_classes": 10}},
        {"checkpoint_path": str(path)},
    ):
        model = timm.create_model("autoformer_tiny", spec=SMALL, **TASK, **arguments).eval()
        with torch.no_grad():
            assert_agrees(model(expected["input"]), expected["logits"])


def test_a_supernet_too_small_for_the_network_names_the_tensor() -> None:
    spec = make_spec(64, [3], [4], head_dim=16)
    with pytest.raises(WeightsError, match=r"'cls_token' is \(1, 1, 48\), of which no \(1, 1, 64\) can be cut"):
        convert_autoformer_state_dict(authors_state("small"), spec)
    spec = make_spec(48, [4], [4], head_dim=16)
    with pytest.raises(WeightsError, match=r"'blocks\.0\.mixer\.attn\.qkv\.weight' is \(144, 48\), of which no"):
        convert_autoformer_state_dict(authors_state("small"), spec)
    spec = make_spec(48, [3], [4], head_dim=16, max_relative_position=7)
    with pytest.raises(WeightsError, match=r"position_k\.vertical' is \(30, 16\), of which no \(16, 16\) can be cut"):
        convert_autoformer_state_dict(authors_state("small"), spec)
    deep = make_spec(48, [3] * 4, [4] * 4, head_dim=16)
    with pytest.raises(RuntimeError, match=r"Missing key.*blocks\.3\.norm1\.weight"):
        AutoFormer(deep, **TASK).load_state_dict(authors_state("small"))


def test_a_key_that_the_authors_do_not_have_is_named() -> None:
    state = {**authors_state("small"), "blocks.0.attn.gate.weight": torch.zeros(1)}
    with pytest.raises(WeightsError, match=r"^'blocks\.0\.attn\.gate\.weight' is not a key of the authors'"):
        convert_autoformer_state_dict(state, SMALL)


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("autoformer_tiny", 5_867_944),
        ("autoformer_small", 22_891_432),
        ("autoformer_base", 53_691_688),
        ("vitas_a", 3_679_478),
        ("vitas_b", 4_400_248),
        ("vitas_c", 6_048_414),
        ("vitas_e", 12_550_598),
        ("vitas_f", 22_540_277),
    ],
)
def test_the_networks_have_the_parameters_of_the_authors_code(name: str, params: int) -> None:
    model: SpecTransformer = timm.create_model(name, device="meta")
    assert sum(parameter.numel() for parameter in model.parameters()) == params
    assert glit_models.count_params(model.spec) == params
    entry = resolve.get_entry(name)
    assert (entry.params, entry.macs) == (params, glit_models.count_macs(model.spec))
    assert glit_models.parse_spec(model.spec.to_dict()) == model.spec


@pytest.mark.parametrize(
    ("name", "macs"),
    [
        ("autoformer_tiny", 1_481_938_432),
        ("autoformer_small", 5_161_400_832),
        ("autoformer_base", 11_691_179_008),
        ("vitas_a", 833_487_568),
        ("vitas_c", 1_265_114_864),
    ],
)
def test_the_multiply_adds_are_half_of_torch_s_flops(name: str, macs: int) -> None:
    model: SpecTransformer = timm.create_model(name, device="meta").eval()
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, 224, 224, device="meta"))
    assert counter.get_total_flops() == 2 * macs
    assert glit_models.count_macs(model.spec) == macs


def test_relative_positions_are_right_in_a_grid_that_is_not_square() -> None:
    """The authors' code knows square grids only; here each pair of patches is looked up one by one."""
    model = AutoFormer(NETWORKS["small_clip", "largest"], img_size=(48, 80), num_classes=10)
    position = model.blocks[0].mixer["attn"].position_k
    vectors = position().detach()
    assert vectors.shape == (16, 16, 16)

    def row(distance: int) -> int:
        return max(-2, min(2, distance)) + 3

    for i, j in pairs(16):
        if i == 0 or j == 0:
            expected = position.vertical[0] + position.horizontal[0]
        else:
            (y, x), (v, u) = divmod(i - 1, 5), divmod(j - 1, 5)
            expected = position.vertical[row(v - y)] + position.horizontal[row(u - x)]
        torch.testing.assert_close(vectors[i, j], expected.detach())


def pairs(count: int) -> Iterator[tuple[int, int]]:
    return ((i, j) for i in range(count) for j in range(count))


@pytest.mark.parametrize("dynamic", [False, True])
def test_relative_positions_follow_the_size_of_the_image(dynamic: bool) -> None:
    model = loaded("small", "sub_b", dynamic_img_size=dynamic)
    images = torch.randn(2, 3, 48, 80)
    expected = loaded("small", "sub_b")
    expected.set_input_size((48, 80))
    if not dynamic:
        model.set_input_size((48, 80))
    with torch.no_grad():
        assert_agrees(model(images), expected(images))
        small = reference("small", "sub_b")
        if dynamic:
            assert_agrees(model(small["input"]), small["logits"])
    made = AutoFormer(SMALL, img_size=(48, 80), num_classes=10).eval()
    made.load_state_dict(expected.state_dict())
    with torch.no_grad():
        assert_agrees(made(images), expected(images))


@pytest.mark.parametrize("road", ["init_weights", "load_state_dict", "assign"])
def test_a_model_made_on_the_meta_device_becomes_a_whole_one(road: str) -> None:
    """The places of the patches are no part of the state dict, and have to be right all the same."""
    expected = reference("small", "sub_b")
    state = loaded("small", "sub_b").state_dict()
    model = AutoFormer(SMALL, **TASK, device="meta").eval()
    if road != "assign":
        model.to_empty(device="cpu")
        for buffer in model.buffers():
            buffer.fill_(2**40)
    if road == "init_weights":
        model.init_weights()
        parameters = dict(model.named_parameters())
        for name, value in state.items():
            assert parameters[name].shape == value.shape
            parameters[name].data.copy_(value)
    else:
        model.load_state_dict(state, assign=road == "assign")
    with torch.no_grad():
        assert_agrees(model(expected["input"]), expected["logits"])


def test_an_identity_block_changes_nothing_and_costs_nothing() -> None:
    spec = AutoFormerSpec((AutoFormerBlock(0), AutoFormerBlock(2, 4)), 32, head_dim=16)
    model = AutoFormer(spec, **TASK).eval()
    alone = AutoFormer(AutoFormerSpec(spec.blocks[1:], 32, head_dim=16), **TASK).eval()
    state = {key.replace("blocks.1.", "blocks.0."): value for key, value in model.state_dict().items()}
    alone.load_state_dict(state)
    images = torch.randn(1, 3, 64, 64)
    assert_agrees(model(images), alone(images))
    assert glit_models.count_params(spec) == glit_models.count_params(alone.spec)
    assert glit_models.count_macs(spec) == glit_models.count_macs(alone.spec)


def test_vitas_scales_attention_by_the_width_of_the_tokens() -> None:
    model = timm.create_model("vitas_c", device="meta")
    assert model.blocks[0].mixer["attn"].scale == pytest.approx(76**-0.5)
    assert model.global_pool == "token"
    assert (model.blocks[0].norm1.eps, model.norm.eps) == (1e-6, 1e-5)


def test_weights_of_another_family_are_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "supernet-tiny.pth"
    torch.save({"model": authors_state("small")}, path)
    overlay = {"file": str(path), "num_classes": 10}
    with pytest.raises(WeightsError, match="they are of the family autoformer, the model is of glit"):
        timm.create_model("glit_tiny", pretrained=True, pretrained_cfg_overlay=overlay)
    torch.save({"model": official_state()}, path)
    with pytest.raises(WeightsError, match="they are of the family glit, the model is of autoformer"):
        timm.create_model("autoformer_tiny", pretrained=True, pretrained_cfg_overlay=overlay)


def test_a_spec_of_another_family_is_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "spec.json"
    path.write_text(SMALL.to_json())
    with pytest.raises(SpecError, match=r"spec\.json: spec must be of the family glit, got one of 'autoformer'$"):
        timm.create_model("glit_tiny", spec=str(path))
    with pytest.raises(SpecError, match="spec must be of the family autoformer, got one of glit$"):
        timm.create_model("autoformer_tiny", spec=glit_models.GLIT_TINY)


def test_the_authors_file_goes_from_conversion_to_a_verified_published_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLIT_HOME", str(tmp_path / "home"))
    checkpoint, spec = tmp_path / "supernet-tiny.pth", tmp_path / "spec.json"
    torch.save({"model": authors_state("small"), "epoch": 499}, checkpoint)
    spec.write_text(SMALL.to_json())
    task = ["--spec", str(spec), "--num-classes", "10", "--img-size", "64"]
    folder, published = str(tmp_path / "folder"), str(tmp_path / "published")
    assert main(["convert", str(checkpoint), "--model", "autoformer_tiny", *task, "--out", folder]) == 0
    facts = ["--dataset", "none", "--license", "mit", "--origin", "random numbers"]
    assert main(["publish", folder, "--to-folder", published, *facts]) == 0
    assert main(["verify", published]) == 0
    assert main(["info", published]) == 0
    assert "3 blocks, width 40" in capsys.readouterr().out
    card = (tmp_path / "published" / "README.md").read_text()
    assert "AutoFormer" in card
    assert "2107.00651" in card
    assert "GLiT" not in card
    expected = reference("small", "sub_b")
    model = timm.create_model(f"local-dir:{published}", pretrained=True).eval()
    with torch.no_grad():
        assert_agrees(model(expected["input"]), expected["logits"])


def test_converting_for_another_family_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = tmp_path / "supernet-tiny.pth"
    torch.save({"model": authors_state("small")}, checkpoint)
    assert main(["convert", str(checkpoint), "--model", "glit_tiny", "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "they are of the family autoformer, the model is of glit" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
