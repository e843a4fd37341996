"""Tests of timm's model interface for vision transformers, on small networks."""

import copy
import json
import pickle
import re
import shutil
import sysconfig
from pathlib import Path

import pytest
import timm
import timm.layers
import torch
from specs import SMALL, TINY48
from timm.models import save_for_hf
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from timm.utils import reparameterize_model
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import glit_models
from glit_models import GLiT, GLiTSpec
from glit_models.errors import SpecError, WeightsError

needs_compiler = pytest.mark.skipif(
    shutil.which("gcc") is None or not Path(sysconfig.get_path("include"), "Python.h").is_file(),
    reason="torch.compile needs a C compiler and Python's headers",
)


def make(seed: int = 0, randomize: bool = True, **kwargs) -> GLiT:
    """`glit_tiny` with a small spec at 64 pixels and 10 classes, in eval mode, every tensor random."""
    torch.manual_seed(seed)
    model = timm.create_model("glit_tiny", **{"spec": SMALL, "img_size": 64, "num_classes": 10, **kwargs})
    if randomize:
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.is_floating_point():
                nn.init.uniform_(tensor.data, 0.5, 1.5) if "var" in name else nn.init.normal_(tensor.data, std=0.2)
    return model.eval()


def images(*size: int, seed: int = 1) -> Tensor:
    return torch.randn(size or (2, 3, 64, 64), generator=torch.Generator().manual_seed(seed))


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(x).square().sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


# --- Construction ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["glit_tiny", "glit_small", "glit_base"])
def test_importing_the_package_registers_the_model_in_timm(name: str) -> None:
    assert name in timm.list_models("glit_*")
    assert name in timm.list_models(module="glit")
    assert timm.is_model(name)
    assert isinstance(timm.create_model(name, device="meta"), GLiT)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"img_size": (32, 96)},
        {"patch_size": 8},
        {"in_chans": 1},
        {"num_classes": 0},
        {"global_pool": "avg"},
        {"global_pool": "avg", "class_token": False},
        {"global_pool": "avg", "fc_norm": False},
        {"fc_norm": True},
        {"drop_rate": 0.1, "pos_drop_rate": 0.1, "proj_drop_rate": 0.1, "attn_drop_rate": 0.1, "drop_path_rate": 0.1},
        {"dynamic_img_size": True},
        {"dynamic_img_size": True, "dynamic_img_pad": True},
        {"dtype": torch.float64},
        {"device": "cpu"},
    ],
    ids=str,
)
def test_the_constructor_takes_the_keyword(kwargs: dict) -> None:
    model = make(**kwargs)
    height, width = kwargs.get("img_size", (64, 64))
    x = images(2, kwargs.get("in_chans", 3), height, width).to(kwargs.get("dtype", torch.float32))
    assert model(x).shape == (2, kwargs.get("num_classes", 10) or 48)
    gradients(model.train(), x)


def test_an_unknown_keyword_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="qk_norm"):
        timm.create_model("glit_tiny", qk_norm=True)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"img_size": 65}, "img_size must be a multiple of patch_size=16, got 65 x 65; or pass dynamic_img_size=True"),
        ({"img_size": (64, 70)}, "img_size must be a multiple of patch_size=16, got 64 x 70"),
        ({"img_size": 8}, "img_size must be a multiple of patch_size=16, got 8 x 8"),
        ({"patch_size": (8, 16)}, "patch_size must be square, got 8 x 16"),
        ({"global_pool": "max"}, "global_pool must be one of '', 'avg', 'token', got 'max'"),
        ({"class_token": False}, "global_pool='token' needs the class token"),
        ({"spec": 7}, "spec must be a GLiTSpec, a dict or the path of a JSON file, got int"),
    ],
)
def test_an_impossible_keyword_is_refused_in_one_line(kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        make(**kwargs)
    assert "\n" not in str(error.value)


def test_drop_path_rises_linearly_to_the_last_block() -> None:
    model = GLiT(TINY48, 64, drop_path_rate=0.11)
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in model.blocks]
    assert rates == pytest.approx([0.01 * i for i in range(12)])


def test_dropout_works_in_training_and_not_in_eval_mode() -> None:
    model = make(drop_rate=0.5, proj_drop_rate=0.5, drop_path_rate=0.5)
    x = images()
    assert torch.equal(model(x), model(x))
    model.train()
    assert not torch.equal(model(x), model(x))


@pytest.mark.parametrize("form", ["spec", "dict", "path"])
def test_a_searched_network_comes_back_from_a_hub_folder(form: str, tmp_path: Path) -> None:
    path = tmp_path / "spec.json"
    path.write_text(SMALL.to_json())
    model = make(spec={"spec": SMALL, "dict": SMALL.to_dict(), "path": str(path)}[form], global_pool="avg")
    save_for_hf(model, tmp_path / "hub", model_args=model._model_args)
    path.unlink()
    again = timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True).eval()
    assert again.spec == SMALL
    assert again.global_pool == "avg"
    assert torch.equal(again(images()), model(images()))


def test_plain_save_for_hf_needs_no_further_argument(tmp_path: Path) -> None:
    model = make(img_size=(32, 96))
    save_for_hf(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_args"]["spec"] == SMALL.to_dict()
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(again(images(1, 3, 32, 96)), model(images(1, 3, 32, 96)))


def test_a_model_changed_after_construction_comes_back_as_it_is(tmp_path: Path) -> None:
    model = make()
    model.set_input_size((96, 64), patch_size=8)
    model.reset_classifier(5, "avg")
    save_for_hf(model, tmp_path, model_config={"num_classes": 5})
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(again(images(1, 3, 96, 64)), model(images(1, 3, 96, 64)))


def test_meta_device_construction_and_init_weights_give_a_finite_model() -> None:
    model = make(device="meta", randomize=False)
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    model.to_empty(device="cpu")
    for tensor in model.state_dict().values():
        tensor.fill_(7)
    model.init_weights()
    assert not any((tensor == 7).any() for tensor in model.state_dict().values())
    assert model.train()(images()).isfinite().all()


def test_initialisation_depends_on_the_seed_alone() -> None:
    first, second = (make(seed=3, randomize=False).state_dict() for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)
    other = make(seed=4, randomize=False)
    assert not torch.equal(other.pos_embed, first["pos_embed"])


def test_a_model_can_be_copied_and_pickled() -> None:
    model, x = make(), images()
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), model(x))


# --- Forward --------------------------------------------------------------------------------------------------------


def test_forward_is_head_after_features() -> None:
    model, x = make(), images()
    features = model.forward_features(x)
    assert features.shape == (2, 17, 48)
    pre_logits = model.forward_head(features, pre_logits=True)
    assert pre_logits.shape == (2, 48)
    assert torch.equal(pre_logits, features[:, 0])
    assert torch.equal(model.head(pre_logits), model(x))
    assert torch.equal(model.forward_head(features), model(x))


def test_pooling_is_what_its_name_says() -> None:
    x = images()
    average = make(global_pool="avg", fc_norm=False)
    tokens = average.forward_features(x)
    assert torch.allclose(average.forward_head(tokens, pre_logits=True), tokens[:, 1:].mean(1), atol=1e-6)
    assert make(global_pool="").forward(x).shape == (2, 17, 10)
    normed = make(global_pool="avg")
    tokens = normed.forward_features(x)
    assert torch.allclose(normed.forward_head(tokens, True), normed.fc_norm(tokens[:, 1:].mean(1)), atol=1e-5)


@pytest.mark.parametrize("indices", [None, 1, 2, [0], [0, 2], [-1]], ids=str)
@pytest.mark.parametrize("stop_early", [False, True])
def test_forward_intermediates_are_the_blocks_outputs(indices, stop_early: bool) -> None:
    model, x = make(), images()
    outputs: list[Tensor] = []
    hooks = [block.register_forward_hook(lambda *args: outputs.append(args[2])) for block in model.blocks]
    features, intermediates = model.forward_intermediates(x, indices, stop_early=stop_early)
    for hook in hooks:
        hook.remove()
    wanted = {None: [0, 1, 2], 1: [2], 2: [1, 2]}.get(indices if not isinstance(indices, list) else -9, indices)
    wanted = [index % 3 for index in wanted]
    assert len(outputs) == (max(wanted) + 1 if stop_early else 3)
    for index, intermediate in zip(wanted, intermediates, strict=True):
        grid = outputs[index][:, 1:].transpose(1, 2).reshape(2, 48, 4, 4)
        assert torch.equal(intermediate, grid)
        assert intermediate.is_contiguous()
    if not stop_early:
        assert torch.equal(features, model.forward_features(x))


def test_the_flags_of_forward_intermediates_do_what_timm_says() -> None:
    model, x = make(), images()
    plain = model.forward_intermediates(x, output_fmt="NLC", intermediates_only=True)
    assert [y.shape for y in plain] == [(2, 16, 48)] * 3
    pairs = model.forward_intermediates(x, output_fmt="NLC", intermediates_only=True, return_prefix_tokens=True)
    whole = [torch.cat([prefix, patches], 1) for patches, prefix in pairs]
    normed = model.forward_intermediates(x, output_fmt="NLC", intermediates_only=True, norm=True)
    assert all(torch.allclose(model.norm(a)[:, 1:], b) for a, b in zip(whole, normed, strict=True))
    result = model.forward_intermediates(x, output_fmt="NLC", output_dict=True, return_prefix_tokens=True)
    assert result.keys() == {"image_intermediates", "image_intermediates_prefix", "image_features"}
    assert torch.equal(result["image_features"], model.forward_features(x))
    assert model.forward_intermediates(x, output_dict=True, intermediates_only=True).keys() == {"image_intermediates"}
    with pytest.raises(ValueError, match="output_fmt must be 'NCHW' or 'NLC', got 'NHWC'"):
        model.forward_intermediates(x, output_fmt="NHWC")


def test_forward_intermediates_know_rectangles_and_models_without_class_token() -> None:
    model = make(img_size=(32, 96), class_token=False, global_pool="avg")
    features, intermediates = model.forward_intermediates(images(2, 3, 32, 96), return_prefix_tokens=True)
    assert features.shape == (2, 12, 48)
    assert [y.shape for y in intermediates] == [(2, 48, 2, 6)] * 3


def test_pruning_keeps_what_the_chosen_blocks_compute() -> None:
    model, x = make(), images()
    expected = model.forward_intermediates(x, [0, 1], intermediates_only=True)
    assert model.prune_intermediate_layers([0, 1], prune_norm=True) == [0, 1]
    actual = model.forward_intermediates(x, [0, 1], intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    assert len(model.blocks) == model.spec.depth == 2
    assert isinstance(model.norm, nn.Identity)
    assert isinstance(model.head, nn.Identity)


def test_features_only_gives_the_maps_that_feature_info_announces() -> None:
    model = timm.create_model("glit_tiny", spec=TINY48, img_size=64, features_only=True, out_indices=(3, 7, 11))
    assert model.feature_info.channels() == [48, 48, 48]
    assert model.feature_info.reduction() == [16, 16, 16]
    assert model.feature_info.module_name() == ["blocks.3", "blocks.7", "blocks.11"]
    assert [y.shape for y in model(images())] == [(2, 48, 4, 4)] * 3
    assert len(timm.create_model("glit_tiny", spec=TINY48, img_size=64, features_only=True)(images())) == 3


def test_an_image_of_another_size_is_refused_without_dynamic_img_size() -> None:
    with pytest.raises(AssertionError, match="96"):
        make()(images(1, 3, 96, 64))


def test_dynamic_img_size_takes_any_size_that_the_patch_divides() -> None:
    fixed, dynamic = make(), make(dynamic_img_size=True)
    assert torch.allclose(dynamic(images()), fixed(images()), atol=1e-6)
    assert dynamic(images(1, 3, 96, 48)).shape == (1, 10)
    with pytest.raises(AssertionError, match="divisible"):
        dynamic(images(1, 3, 70, 64))
    assert make(dynamic_img_size=True, dynamic_img_pad=True)(images(1, 3, 70, 50)).shape == (1, 10)
    maps = dynamic.forward_intermediates(images(1, 3, 96, 48), intermediates_only=True)
    assert [y.shape for y in maps] == [(1, 48, 6, 3)] * 3


def test_gradient_checkpointing_changes_neither_output_nor_gradients() -> None:
    model, x = make().train(), images()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()  # a block run twice would move the running statistics twice
    output, expected = model(x), gradients(model, x)
    model.set_grad_checkpointing()
    assert torch.equal(model(x), output)
    actual = gradients(model, x)
    assert all(torch.allclose(actual[name], expected[name], atol=1e-6) for name in expected)
    intermediates = model.forward_intermediates(x, intermediates_only=True)
    model.set_grad_checkpointing(False)
    assert torch.equal(model.forward_intermediates(x, intermediates_only=True)[-1], intermediates[-1])


def test_gradient_checkpointing_updates_running_statistics_twice_per_step() -> None:
    model, x = make(spec=GLiTSpec(TINY48.blocks[1:2], 48, 3)).train(), images()  # one local block
    before = model.blocks[0].mixer.conv.bn.running_mean.clone()
    once, twice = copy.deepcopy(model), copy.deepcopy(model)
    twice.set_grad_checkpointing()
    for each in (once, twice):
        gradients(each, x)
    moved = [each.blocks[0].mixer.conv.bn.running_mean - before for each in (once, twice)]
    torch.testing.assert_close(moved[1], moved[0] * 1.9, rtol=1e-4, atol=1e-5)


def test_fused_and_plain_attention_agree() -> None:
    x = images()
    with torch.no_grad():
        try:
            timm.layers.set_fused_attn(True)
            fused = make()(x)
            timm.layers.set_fused_attn(False)
            plain = make()(x)
        finally:
            timm.layers.set_fused_attn(True)
    torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-5)


def test_reparameterizing_folds_every_batch_norm_and_changes_no_output() -> None:
    model, x = make(spec=TINY48), images()
    fused = reparameterize_model(model)
    assert any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())
    with torch.no_grad():
        torch.testing.assert_close(fused(x), model(x), rtol=1e-5, atol=1e-5)
    assert torch.equal(reparameterize_model(fused)(x), fused(x)), "a second time changes nothing"
    trained = copy.deepcopy(model).train()
    assert trained.fuse() is trained
    assert torch.equal(trained(x), fused(x))


def test_bfloat16_stays_bfloat16_and_close() -> None:
    model, x = make(randomize=False), images()
    expected = model(x)
    actual = model.bfloat16()(x.bfloat16())
    assert actual.dtype == torch.bfloat16
    torch.testing.assert_close(actual.float(), expected, rtol=0.1, atol=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        logits = make(randomize=False).train()(x)
    logits.sum().backward()
    assert logits.isfinite().all()


# --- Changing a model -----------------------------------------------------------------------------------------------


def test_the_classifier_can_be_read_and_replaced() -> None:
    model = make()
    assert model.get_classifier() is model.head
    features = model.forward_features(images())
    model.reset_classifier(7)
    assert (model.num_classes, model.global_pool) == (7, "token")
    assert model(images()).shape == (2, 7)
    model.reset_classifier(0, "avg")
    assert torch.allclose(model(images()), features[:, 1:].mean(1), atol=1e-6)
    with pytest.raises(ValueError, match="global_pool"):
        model.reset_classifier(3, "max")


def test_a_new_classifier_keeps_device_dtype_and_mode() -> None:
    model = make(dtype=torch.bfloat16)
    model.reset_classifier(3)
    assert model.head.weight.dtype == torch.bfloat16
    assert not model.head.training


def test_set_input_size_equals_loading_into_a_model_of_that_size() -> None:
    model = make()
    resized = make(seed=5, img_size=(96, 32), patch_size=8)
    resized.load_state_dict(glit_models.model.checkpoint_filter_fn(model.state_dict(), resized))
    model.set_input_size((96, 32), patch_size=8)
    assert (model.spec.patch_size, model.patch_embed.grid_size) == (8, (12, 4))
    assert [info["reduction"] for info in model.feature_info] == [8, 8, 8]
    x = images(1, 3, 96, 32)
    torch.testing.assert_close(model(x), resized(x), rtol=1e-5, atol=1e-5)
    with pytest.raises(SpecError, match="multiple of patch_size=8"):
        model.set_input_size(60)


def test_set_input_size_keeps_frozen_parameters_frozen() -> None:
    model = make().requires_grad_(False)
    model.set_input_size(96)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_layer_decay_groups_every_parameter_by_its_depth() -> None:
    model = make()
    groups = param_groups_layer_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay(), layer_decay=0.5)
    scale_of = {id(parameter): group["lr_scale"] for group in groups for parameter in group["params"]}
    decay_of = {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}
    assert len(scale_of) == len(list(model.parameters()))
    scales = [
        scale_of[id(parameter)]
        for parameter in (
            model.pos_embed,
            model.cls_token,
            model.patch_embed.proj.weight,
            model.blocks[0].mlp.fc1.weight,
            model.blocks[1].mixer.conv.dwconv.weight,
            model.blocks[2].norm1.weight,
            model.norm.weight,
            model.head.weight,
        )
    ]
    assert scales[0] == scales[1] == scales[2]
    assert scales[2] < scales[3] < scales[4] < scales[5] < 1
    assert scales[-1] == 1
    assert decay_of[id(model.pos_embed)] == decay_of[id(model.cls_token)] == 0


def test_no_weight_decay_reaches_timm_s_optimizers() -> None:
    model = make()
    assert model.no_weight_decay() == {"pos_embed", "cls_token"}
    free, decayed = param_groups_weight_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay())
    assert any(parameter is model.pos_embed for parameter in free["params"])
    assert all(parameter.ndim > 1 for parameter in decayed["params"])
    assert timm.optim.create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.7)


# --- Loading --------------------------------------------------------------------------------------------------------


@pytest.fixture
def weights(tmp_path: Path) -> tuple[GLiT, dict]:
    """A model, and the overlay of timm's pretrained configuration that names a file with its weights."""
    model = make()
    path = tmp_path / "weights.pth"
    torch.save(model.state_dict(), path)
    return model, {"file": str(path), "num_classes": 10}


def load(overlay: dict, **kwargs) -> GLiT:
    return make(seed=9, randomize=False, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs)


def test_loading_another_class_count_keeps_all_but_the_head(weights) -> None:
    model, overlay = weights
    other = load(overlay, num_classes=4)
    assert other(images()).shape == (2, 4)
    assert torch.equal(other.forward_features(images()), model.forward_features(images()))


def test_a_files_own_class_count_is_taken_without_being_told(weights) -> None:
    model, overlay = weights
    overlay.pop("num_classes")
    assert torch.equal(load(overlay)(images()), model(images()))
    spec = {"spec": SMALL, "img_size": 64}
    again = timm.create_model("glit_tiny", pretrained=True, pretrained_cfg_overlay=overlay, **spec)
    assert again.num_classes == 10


def test_loading_one_input_channel_sums_the_three(weights) -> None:
    model, overlay = weights
    gray = load(overlay, in_chans=1)
    assert torch.allclose(gray.patch_embed.proj.weight, model.patch_embed.proj.weight.sum(1, keepdim=True), atol=1e-6)
    x = images(2, 1, 64, 64)
    torch.testing.assert_close(gray(x), model(x.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("img_size", [96, (32, 96)])
def test_loading_at_another_size_resamples_the_position_embedding(weights, img_size) -> None:
    model, overlay = weights
    larger = load(overlay, img_size=img_size)
    model.set_input_size(img_size)
    assert torch.allclose(larger.pos_embed, model.pos_embed, atol=1e-6)
    assert torch.equal(larger.blocks[1].mlp.fc1.weight, model.blocks[1].mlp.fc1.weight)


def test_loading_another_patch_size_resamples_the_projection(weights) -> None:
    model, overlay = weights
    finer = load(overlay, patch_size=8)
    model.set_input_size(patch_size=8)
    torch.testing.assert_close(finer(images()), model(images()), rtol=1e-4, atol=1e-4)


def test_loading_for_average_pooling_moves_the_norm_behind_it(weights) -> None:
    model, overlay = weights
    pooled = load(overlay, global_pool="avg")
    assert torch.equal(pooled.fc_norm.weight, model.norm.weight)
    assert torch.equal(pooled.blocks(images(1, 17, 48)), model.blocks(images(1, 17, 48)))


def test_loading_a_class_token_into_a_model_without_one_says_so(weights) -> None:
    for sizes in ({}, {"img_size": 96}):
        with pytest.raises(WeightsError, match="weights do not fit the model: it has no 'cls_token'"):
            load(weights[1], global_pool="avg", class_token=False, **sizes)


def test_loading_weights_without_a_class_token_into_a_model_with_one_says_so(weights) -> None:
    path = Path(weights[1]["file"])
    torch.save(make(global_pool="avg", class_token=False).state_dict(), path)
    for sizes in ({}, {"img_size": 96}):
        with pytest.raises(WeightsError, match="weights do not fit the model: 'cls_token' is missing"):
            load(weights[1], global_pool="avg", **sizes)


def test_loading_other_weights_names_the_first_that_does_not_fit(weights) -> None:
    overlay = weights[1]
    with pytest.raises(WeightsError, match=r"weights do not fit the model: '.+' is \(.+\), the model needs \(.+\)"):
        load(overlay, spec=SMALL.scaled(96, 3))
    with pytest.raises(WeightsError, match=r"'blocks\.3"):
        load(overlay, spec=GLiTSpec(TINY48.blocks[:4], 48, 3))


def test_weights_that_lack_or_add_a_tensor_load_when_timm_is_told_to_be_lenient(weights) -> None:
    model, overlay = weights
    state = model.state_dict()
    del state["blocks.0.norm1.bias"]
    torch.save(state | {"more.weight": torch.zeros(3)}, overlay["file"])
    lenient = load(overlay, pretrained_strict=False)
    assert torch.equal(lenient.blocks[1].mlp.fc1.weight, model.blocks[1].mlp.fc1.weight)
    assert not lenient.blocks[0].norm1.bias.any()
    with pytest.raises(WeightsError, match=r"'blocks\.0\.norm1\.bias' is missing"):
        load(overlay)
    with pytest.raises(WeightsError, match=r"'.+' is \(.+\), the model needs \(.+\)"):
        load(overlay, spec=SMALL.scaled(96, 3), pretrained_strict=False)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "_orig_mod.module.", "module._orig_mod."])
def test_weights_of_a_wrapped_model_load(weights, prefix: str) -> None:
    model, overlay = weights
    wrapped = {f"{prefix}{key}": value for key, value in model.state_dict().items()}
    torch.save(wrapped | {"n_averaged": torch.tensor(7)}, overlay["file"])
    assert torch.equal(load(overlay)(images()), model(images()))


# --- Tracing and compiling ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kwargs", [{}, {"global_pool": "avg"}, {"class_token": False, "global_pool": "avg"}], ids=str)
def test_torchscript_agrees(kwargs: dict) -> None:
    model, x = make(scriptable=True, **kwargs), images()
    scripted = torch.jit.script(model)
    torch.testing.assert_close(scripted(x), model(x), rtol=1e-5, atol=1e-5)


def test_torchscript_trains_as_the_model_does() -> None:
    model, x = make(scriptable=True).train(), images()
    scripted = torch.jit.script(copy.deepcopy(model))
    torch.testing.assert_close(scripted(x), model(x), rtol=1e-4, atol=1e-4)
    expected, actual = gradients(model, x), gradients(scripted, x)
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-3, atol=1e-3)


def test_torchscript_follows_a_dynamic_image_size() -> None:
    model = make(scriptable=True, dynamic_img_size=True)
    x = images(1, 3, 96, 48)
    torch.testing.assert_close(torch.jit.script(model)(x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_traced_model_passes_torch_s_own_check() -> None:
    model, x = make(), images()
    torch.testing.assert_close(torch.jit.trace(model, x)(x), model(x), rtol=1e-5, atol=1e-5)  # traces with gradients


@pytest.mark.parametrize("training", [False, True])
def test_torch_fx_traces_the_model(training: bool) -> None:
    model, x = make().train(training), images()
    traced = torch.fx.symbolic_trace(copy.deepcopy(model))
    torch.testing.assert_close(traced(x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("training", [False, True])
def test_torch_export_gives_one_graph_for_any_batch(training: bool) -> None:
    model = make().train(training)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(copy.deepcopy(model), (images(),), dynamic_shapes=({0: batch},))
    x = images(3, 3, 64, 64)
    torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-4)


def test_an_exportable_model_computes_the_same() -> None:
    x = images()
    torch.testing.assert_close(make(exportable=True)(x), make()(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("dynamic", "training"), [(False, True), (True, False), pytest.param(True, True, marks=pytest.mark.slow)]
)
def test_torch_compile_captures_one_graph(dynamic: bool, training: bool) -> None:
    torch.compiler.reset()
    model = make().train(training)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for batch in (2, 3) if dynamic else (2,):
        x = images(batch, 3, 64, 64)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
    expected, actual = gradients(model, x), gradients(compiled, x)
    for name in expected:
        torch.testing.assert_close(actual[f"_orig_mod.{name}"], expected[name], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("form", ["training", "evaluation", "fused"])
def test_torch_compile_starts_anew_for_the_second_batch_size_and_no_further_one(form: str) -> None:
    torch.compiler.reset()
    counter = CompileCounter()
    model = make(img_size=96).train(form == "training")
    model = model.fuse() if form == "fused" else model
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for batch in (2, 16, 3, 40):
        compiled(images(batch, 3, 96, 96))
    assert counter.frame_count == 2


@needs_compiler
@pytest.mark.parametrize(
    "frozen", [pytest.param(True, marks=pytest.mark.slow), pytest.param(False, marks=pytest.mark.extended)]
)
def test_compiled_as_the_docs_say_it_takes_several_batch_sizes(frozen: bool) -> None:
    torch.compiler.reset()
    model = make(spec=GLiTSpec(TINY48.blocks[1:2], 48, 3)).fuse()  # one local block
    compiled = torch.compile(model, fullgraph=True, dynamic=False)
    with torch.no_grad(), torch._inductor.config.patch(freezing=frozen):
        for batch in (1, 3):
            x = images(batch, 3, 64, 64)
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)


@needs_compiler
@pytest.mark.slow
def test_torch_compile_makes_fast_code_that_computes_the_same() -> None:
    torch.compiler.reset()
    model = make(spec=GLiTSpec(TINY48.blocks[2:3], 48, 3))  # one block with both sub-modules: compiling takes long
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(images()), model(images()), rtol=1e-4, atol=1e-4)
