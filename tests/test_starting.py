"""Tests of searches that start from weights: the initial weights of supernets and retrained networks."""

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from glit_models.search import SearchRun, Supernet, load_search_recipe
from glit_models.search.recipe import SearchRecipe
from glit_models.search.run.context import RunContext
from glit_models.search.supernets.starting import fill_supernet
from glit_models.search.supernets.supernet import Sharing
from safetensors.torch import load_file, save_file
from torch import Tensor

from glit_models import GLiTSpec, cli
from glit_models.errors import RecipeError, SearchError, WeightsError
from glit_models.weights.folder import save_folder
from glit_models.weights.loading import load_model
from tests.spaces import AUTOFORMER, LOCAL, SMALL_SPACES

FIXTURES = Path(__file__).parent / "fixtures"
RECIPE = str(FIXTURES / "search.yaml")
ROOT = f"train.data.root={FIXTURES / 'fashion-mnist'}"
SMALL = [
    "train.data.limit=60",
    "train.checkpoint_minutes=9",
    "train.optim.epochs=1",
    "supernet.train.optim.epochs=1",
    "retrain.top=1",
    "evolution.population=4",
    "evolution.generations=1",
    "evolution.num_mutation=2",
    "evolution.num_crossover=2",
    "control.networks=1",
]
SPACES = [*SMALL_SPACES.values(), LOCAL, AUTOFORMER]


def _recipe(*overrides: str) -> SearchRecipe:
    return load_search_recipe(RECIPE, [ROOT, *SMALL, "method=spos", *overrides])


def _supernet(space=LOCAL, sharing: Sharing = "entangled", size: int = 4, num_classes: int = 5) -> Supernet:
    return Supernet(space, sharing, img_size=size * space.patch_size, num_classes=num_classes)


@pytest.mark.parametrize("space", SPACES)
def test_a_network_that_fills_a_supernet_is_inherited_from_it_and_no_other_weight_changes(space):
    source, supernet = _supernet(space), _supernet(space)
    spec = space.sample(random.Random(3))
    model = source.extract(spec)
    before = {name: tensor.clone() for name, tensor in supernet.state_dict().items()}
    supernet.fill(model)
    inherited = supernet.state_of(spec)
    assert all(torch.equal(tensor, inherited[name]) for name, tensor in model.state_dict().items())
    # Zeros in the place of what was filled: what is left is what was there before.
    for parameter in model.parameters():
        parameter.data.zero_()
    supernet.fill(model)
    for name, tensor in supernet.state_dict().items():
        left = tensor != 0
        assert torch.equal(tensor[left], before[name][left]), name


@pytest.mark.parametrize("pools", [("token", "avg"), ("avg", "token")])
def test_a_network_fills_a_supernet_of_another_pooling_and_its_final_norm_too(pools: tuple[str, str]):
    source, supernet = (Supernet(LOCAL, img_size=32, num_classes=5, global_pool=pool) for pool in pools)
    spec = next(iter(LOCAL))
    model = source.extract(spec)
    for parameter in model.parameters():
        parameter.data.uniform_()
    supernet.fill(model)
    assert supernet.net.global_pool == supernet.extract(spec).global_pool == pools[1]
    norm = supernet.net.fc_norm if pools[1] == "avg" else supernet.net.norm
    given = model.fc_norm if pools[0] == "avg" else model.norm
    assert torch.equal(norm.weight, given.weight)
    assert torch.equal(norm.bias, given.bias)


def test_a_weight_folder_fills_a_supernet_of_other_images_and_classes(tmp_path: Path):
    source, supernet = _supernet(), _supernet(size=2, num_classes=3)
    spec = next(iter(LOCAL))
    save_folder(source.extract(spec), tmp_path / "model")
    head = supernet.net.head.weight.detach().clone()
    fill_supernet(supernet, str(tmp_path / "model"))
    torch.testing.assert_close(supernet.state_of(spec)["cls_token"], source.net.cls_token, rtol=0, atol=1e-3)
    assert torch.equal(supernet.net.head.weight, head)
    assert supernet.net.pos_embed.shape[1] == 5


def test_a_supernet_fills_another_of_other_images(tmp_path: Path):
    source = _supernet()
    folder = tmp_path / "search/joint/supernet"
    folder.mkdir(parents=True)
    save_file({name: tensor.half() for name, tensor in source.state_dict().items()}, folder / "model.safetensors")
    supernet = _supernet(size=2)
    fill_supernet(supernet, str(tmp_path / "search"))
    for name, tensor in source.named_parameters():
        if not name.endswith("pos_embed"):
            torch.testing.assert_close(supernet.get_parameter(name), tensor, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("source", "error", "complaint"),
    [
        ("glit_tiny.fractal1k", SearchError, "supernet.from: glit_tiny.fractal1k is no network of the space"),
        ("no_such_model", WeightsError, "supernet.from: no_such_model: no such folder"),
        ("vit_tiny_patch16_224", WeightsError, "supernet.from: vit_tiny_patch16_224: no such folder"),
    ],
)
def test_what_cannot_fill_a_supernet_is_refused(source: str, error: type[Exception], complaint: str):
    with pytest.raises(error, match=complaint) as raised:
        fill_supernet(_supernet(), source)
    assert "\n" not in str(raised.value)


def test_a_supernet_of_another_space_is_refused_with_the_tensor_that_differs(tmp_path: Path):
    (tmp_path / "supernet").mkdir()
    save_file(_supernet(AUTOFORMER).state_dict(), tmp_path / "supernet/model.safetensors")
    with pytest.raises(SearchError, match="is no supernet of this space: .*'cls_token' is"):
        fill_supernet(_supernet(), str(tmp_path))
    (tmp_path / "supernet/model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(SearchError, match="is no supernet of this space"):
        fill_supernet(_supernet(), str(tmp_path))


def test_starts_need_a_supernet_and_a_method_with_one_stage():
    for key in ("supernet.from=glit_tiny", "retrain.start=inherited"):
        with pytest.raises(RecipeError, match="needs a method with one stage, such as spos, not hierarchical"):
            _recipe(key, "method=hierarchical")
        with pytest.raises(RecipeError, match="needs a supernet, and fitness macs has none"):
            _recipe(key, "fitness=macs")
    with pytest.raises(RecipeError, match=r"unknown key supernet.from_; did you mean supernet.from\?"):
        _recipe("supernet.from_=glit_tiny")


def test_a_folder_to_start_from_is_the_same_from_another_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "first").mkdir()
    monkeypatch.chdir(tmp_path)
    assert _recipe("supernet.from=first").supernet.from_ == str(tmp_path / "first")
    assert _recipe("supernet.from=glit_tiny").supernet.from_ == "glit_tiny"
    space = _recipe().load_space()
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(space.to_dict()))
    recipe = _recipe("space=mine.yaml")
    monkeypatch.chdir(tmp_path / "first")
    assert recipe.load_space() == space


def test_a_search_whose_start_does_not_fit_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    overrides = [ROOT, *SMALL, "method=spos", "supernet.from=glit_tiny.fractal1k"]
    arguments = ["search", RECIPE, "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert cli.main([*arguments, *(word for text in overrides for word in ("--set", text))]) == 2
    assert "no network of the space" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_search_goes_on_from_the_supernet_and_the_networks_of_another(tmp_path: Path):
    torch.set_num_threads(1)
    pooled = "train.model.global_pool=avg"
    assert SearchRun(_recipe(pooled), tmp_path / "first", device="cpu").run()
    # With rates next to nothing the weights are still those that each training began with.
    frozen = [
        f"{part}.train.optim.{rate}=1e-30" for part in ("supernet", "retrain") for rate in ("lr", "min_lr", "warmup_lr")
    ]
    recipe = _recipe(f"supernet.from={tmp_path / 'first'}", "retrain.start=inherited", pooled, *frozen)
    second = SearchRun(recipe, tmp_path / "second", device="cpu")
    train = second.context.train

    def lose_the_start_afterwards(*args: Any, **keywords: Any) -> Any:
        result = train(*args, **keywords)
        if (tmp_path / "first").exists():
            (tmp_path / "first").rename(tmp_path / "moved")
        return result

    second.context.train = lose_the_start_afterwards  # type: ignore[method-assign]
    assert second.run()
    (tmp_path / "moved").rename(tmp_path / "first")
    assert f"from: {tmp_path / 'first'}" in (tmp_path / "second/recipe.yaml").read_text()
    stores = [load_file(tmp_path / name / "joint/supernet/model.safetensors") for name in ("first", "second")]
    assert_same_parameters(*stores)
    context = RunContext(recipe, tmp_path / "second", "cpu", None)
    supernet = context.load_supernet(recipe.load_space(), tmp_path / "second/joint/supernet/model.safetensors")
    winner = GLiTSpec.from_json((tmp_path / "second/winner.json").read_text())
    assert_same_parameters(supernet.state_of(winner), load_file(tmp_path / "second/model/model.safetensors"))
    assert load_model(tmp_path / "second/model").model.global_pool == "avg"
    (start,) = json.loads((tmp_path / "second/control.json").read_text())["starts"]
    assert (start["name"], start["spec"]) == ("the winner, from random weights", winner.to_dict())
    # The rates are next to nothing, so this training ends with the weights that it began with.
    random_weights = load_file(tmp_path / "second/control/scratch/model/model.safetensors")
    assert not torch.allclose(random_weights["head.weight"], supernet.state_of(winner)["head.weight"])

    recipe = _recipe(f"supernet.from={tmp_path / 'second/model'}", pooled, *frozen)
    assert SearchRun(recipe, tmp_path / "third", device="cpu").run()
    (start,) = json.loads((tmp_path / "third/control.json").read_text())["starts"]
    assert (start["name"], start["spec"]) == (f"{tmp_path / 'second/model'}, fine-tuned", winner.to_dict())
    models = [
        load_file(tmp_path / path / "model.safetensors") for path in ("second/model", "third/control/source/model")
    ]
    assert_same_parameters(*models)


def test_a_supernet_can_be_trained_by_itself_and_the_search_goes_on_from_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.set_num_threads(1)
    overrides = [ROOT, *SMALL, "method=spos", "train.save_dtype=float16"]
    words = [word for text in overrides for word in ("--set", text)]
    arguments = ["search", RECIPE, "--out", str(tmp_path / "out"), "--device", "cpu", *words]
    assert cli.main([*arguments, "--supernet-only"]) == 0
    assert f"next: --set supernet.from={tmp_path / 'out'} in another search; resume" in capsys.readouterr().out
    weights = load_file(tmp_path / "out/joint/supernet/model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16, torch.int64}
    assert not (tmp_path / "out/joint/candidates.jsonl").exists()
    assert cli.main(arguments) == 0
    assert (tmp_path / "out/result.json").is_file()
    arguments[3] = str(tmp_path / "none")
    assert cli.main([*arguments, "--supernet-only", "--set", "fitness=macs"]) == 2
    assert capsys.readouterr().err.endswith("glit: fitness macs has no supernet to train\n")
    arguments[3] = str(tmp_path / "two stages")
    assert cli.main([*arguments, "--supernet-only", "--set", "method=hierarchical"]) == 0
    out = capsys.readouterr().out
    assert out.endswith("next: resume this one without --supernet-only\n")
    assert (tmp_path / "two stages/stage1/supernet/model.safetensors").is_file()


def assert_same_parameters(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> None:
    """But for statistics of BatchNorm, and the rounding to half precision."""
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        if "running" not in name and "num_batches" not in name:
            torch.testing.assert_close(second[name].float(), tensor, rtol=0, atol=1e-3, msg=name)
