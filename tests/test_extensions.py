"""Tests of docs/extending.md: a single user file adds a part, family, method, fitness or target."""

import copy
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import timm
import torch
from glit_models.export import export_onnx
from glit_models.export.form import export_form
from glit_models.search import SearchRun, load_search_recipe, write_report
from torch import nn

import glit_models
from glit_models import BlockSpec, GLiTSpec, SpecError, SpecTransformer, cli, count_macs, count_params
from glit_models.errors import ExportError, GlitError, RecipeError, SearchError, WeightsError
from glit_models.figure import network_image
from glit_models.parts import PARTS, BlockParts, BuildOptions, MlpPart, Part, TokenGrid
from glit_models.weights.folder import save_folder

TESTS = Path(__file__).parent
FOLDER = TESTS / "extensions"
DATA = f"train.data.root={TESTS / 'fixtures' / 'fashion-mnist'}"


@pytest.fixture(autouse=True)
def extensions_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))


def pooled(pool_size: int = 3) -> GLiTSpec:
    import pooling_part  # noqa: F401 - registers the part

    block = BlockSpec(1, 2, 2, qkv_ratio=1, local_part="pooling", local_sizes=(("pool_size", pool_size),))
    return GLiTSpec((block, block), embed_dim=24, num_heads=3, patch_size=8)


def search(out: Path, *overrides: str) -> dict[str, Any]:
    torch.set_num_threads(1)
    recipe = load_search_recipe(str(TESTS / "fixtures" / "search.yaml"), [DATA, *overrides])
    result = SearchRun(recipe, out, device="cpu", command="glit search").run()
    assert result is not None
    write_report(out)
    return result


def train_a_step(model: nn.Module) -> None:
    before = [parameter.clone() for parameter in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss = nn.functional.cross_entropy(model(torch.randn(4, 3, 32, 32)), torch.tensor([0, 1, 2, 3]))
    loss.backward()
    optimizer.step()
    assert all(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_an_extension_is_one_short_file_that_the_docs_show(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 90
    assert text in (TESTS.parent / "docs" / "extending.md").read_text()


def test_a_part_of_ones_own_trains_counts_draws_and_exports(tmp_path: Path) -> None:
    spec = pooled()
    assert GLiTSpec.from_json(spec.to_json()) == spec
    model = timm.create_model("glit_tiny", spec=spec, img_size=32, num_classes=4)
    assert sum(parameter.numel() for parameter in model.parameters()) == count_params(spec, 4, 32)
    assert count_macs(spec, 32, 4) > count_macs(replace(spec, blocks=spec.blocks[:1]), 32, 4)
    train_a_step(model)
    assert network_image(spec).width > 100
    artifact = export_onnx(model.eval(), tmp_path / "pooled.onnx", verify=4)
    assert artifact.agreement is not None
    assert artifact.agreement.holds


def test_a_part_and_a_method_of_ones_own_search(tmp_path: Path) -> None:
    pooled()
    space = (
        "space={embed_dim: 24, num_heads: 3, patch_size: 8, blocks: [{repeat: 2, choices: ["
        "{num_global_heads: [0, 1, 3], qkv_ratios: [1], mlp_ratios: [1, 2], local_parts: [pooling], "
        "pool_sizes: [3, 5]}]}]}"
    )
    result = search(
        tmp_path / "run", space, "method=local_search:LocalSearch", "fixed={}", "budget={macs: {high: 1000000}}"
    )
    assert 0 <= result["test_accuracy"] <= 100
    assert "pooling" in (tmp_path / "run" / "joint" / "candidates.jsonl").read_text()
    assert '"origin": "neighbour"' in (tmp_path / "run" / "joint" / "candidates.jsonl").read_text()


def test_a_fitness_of_ones_own_searches_without_a_supernet(tmp_path: Path) -> None:
    search(tmp_path / "run", "method=spos", "fitness=depth_fitness:LateParameters")
    assert not (tmp_path / "run" / "joint" / "supernet").exists()


def test_a_family_of_ones_own_trains_searches_draws_and_exports(tmp_path: Path) -> None:
    import plain_family

    model = timm.create_model("plain_nano", img_size=32, num_classes=4)
    assert model.spec == plain_family.NANO
    assert sum(parameter.numel() for parameter in model.parameters()) == count_params(model.spec, 4, 32)
    train_a_step(model)
    assert network_image(model.spec).width > 100
    artifact = export_onnx(model.eval(), tmp_path / "plain.onnx", verify=4)
    assert artifact.agreement is not None
    assert artifact.agreement.holds
    space = (
        "space={family: plain, embed_dim: [16, 32], depth: [1, 2], patch_size: 8,"
        " blocks: [{repeat: 2, choices: [{num_heads: [1, 2], mlp_ratios: [1, 2]}]}]}"
    )
    settings = ("train.model.name=plain_nano", "method=evolution", "budget={params: {high: 100000}}", "fixed={}")
    search(tmp_path / "run", space, *settings)
    found = timm.create_model(f"local-dir:{tmp_path / 'run' / 'model'}", pretrained=True)
    assert found.spec.family == "plain"


def test_any_part_may_come_after_the_second_norm(tmp_path: Path) -> None:
    import plain_family

    class GridSpec(plain_family.PlainSpec):
        def block_parts(self, index: int) -> BlockParts:
            parts = super().block_parts(index)
            genes = {"kernel_size": 3, "expand_ratio": 1}
            return replace(parts, mlp=PARTS["local_conv2d"].from_genes(3, 16, genes))

    class Grid(SpecTransformer):
        spec_class = GridSpec

    spec = GridSpec(plain_family.NANO.blocks, embed_dim=48)
    assert spec.block_parts(0).has_running_statistics
    torch.manual_seed(0)
    model = Grid(spec, 32, num_classes=4, dynamic_img_size=True)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(0.2 + 0.3 * torch.rand_like(tensor))
    images = torch.randn(2, 3, 48, 32)
    dynamic = model.eval()(images)
    fixed = Grid(spec, 32, num_classes=4).eval()
    fixed.load_state_dict(model.state_dict())
    fixed.set_input_size((48, 32))
    torch.testing.assert_close(dynamic, fixed(images))
    fused = copy.deepcopy(fixed).fuse()
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())
    torch.testing.assert_close(fused(images), fixed(images), rtol=1e-4, atol=1e-4)
    form = export_form(fixed, "products")
    torch.testing.assert_close(form(images), fixed(images), rtol=1e-4, atol=1e-4)
    with pytest.raises(ExportError, match="cannot be dynamic: local_conv2d depends on the grid"):
        export_form(fixed, "products", image_size="dynamic")


def test_weights_of_a_family_of_ones_own_load_from_its_default_cfgs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import plain_family  # noqa: F401 - registers the family
    from timm.models import _registry

    torch.manual_seed(0)
    saved = timm.create_model("plain_nano", num_classes=4, img_size=32)
    torch.save(saved.state_dict(), tmp_path / "mine.pth")
    facts = {"num_classes": 4, "file": str(tmp_path / "mine.pth"), "label_names": list("abcd")}
    cfg = replace(timm.get_pretrained_cfg("plain_nano"), tag="mine", **facts)
    monkeypatch.setitem(_registry._model_pretrained_cfgs, "plain_nano.mine", cfg)
    monkeypatch.setitem(_registry._model_with_tags, "plain_nano", ["plain_nano", "plain_nano.mine"])
    loaded = timm.create_model("plain_nano.mine", pretrained=True, img_size=32)
    assert torch.equal(loaded.head.weight, saved.head.weight)
    assert loaded.pretrained_cfg["label_names"] == list("abcd")
    for name, complaint in (("plain_nano", "names no weights"), ("plain_nano.nope", "no such weights")):
        with pytest.raises(WeightsError, match=complaint):
            timm.create_model(name, pretrained=True, img_size=32)

    assert cli.main(["info", "plain_nano.mine"]) == 0
    assert "Weights: plain_nano.mine, file" in capsys.readouterr().out
    assert cli.main(["info", "plain_nano"]) == 0
    assert "Weights: plain_nano, none" in capsys.readouterr().out
    assert cli.main(["list"]) == 0
    assert re.search(r"plain_nano.mine +file .* 32 ", capsys.readouterr().out)
    benched = ["bench", "--batch", "1", "--rounds", "1", "--no-compile", "--no-baseline"]
    assert cli.main([*benched, "plain_nano.mine"]) == 0
    capsys.readouterr()
    assert cli.main([*benched, "plain_nano"]) == 2
    assert "plain_nano: this pretrained_cfg names no weights; give it a file" in capsys.readouterr().err
    assert cli.main(["publish", "plain_nano.mine", "--to-folder", str(tmp_path / "out")]) == 2
    assert "plain_nano.mine: not in the registry of this package; give the folder" in capsys.readouterr().err


def test_a_target_of_ones_own_exports_from_the_command_line(tmp_path: Path) -> None:
    out = tmp_path / "model.pt"
    target = "torchscript_target:TorchScriptTarget"
    assert cli.main(["export", "glit_tiny.fashion_mnist", "--out", str(out), "--format", target, "--verify", "4"]) == 0
    assert torch.jit.load(out)(torch.zeros(1, 3, 64, 64)).shape == (1, 10)


def test_the_command_line_imports_a_module_that_registers_an_extension(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "spec.json").write_text(pooled().to_json())
    done = subprocess.run(
        [sys.executable, "-m", "glit_models", "--import", "pooling_part", "info", str(tmp_path / "spec.json")],
        cwd=FOLDER, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "pooling" in done.stdout
    assert cli.main(["--import", "no_such_module", "list"]) == 2
    assert "there is no module 'no_such_module'" in capsys.readouterr().err


def test_a_part_may_have_a_linear_layer_without_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = pooled()
    part = type(spec.block_parts(0).mixers[1])
    build = part.build

    def build_without_bias(self: Part, options: BuildOptions) -> nn.Module:
        module: Any = build(self, options)
        module.linear = nn.Linear(self.channels, self.channels, bias=False)
        return module

    monkeypatch.setattr(part, "num_params", property(lambda self: self.channels**2))
    monkeypatch.setattr(part, "build", build_without_bias)
    model = timm.create_model("glit_tiny", spec=spec, img_size=32, num_classes=4)
    model.init_weights()
    assert sum(parameter.numel() for parameter in model.parameters()) == count_params(spec, 4, 32)


@dataclass(frozen=True)
class Wrong(Part):
    """A part that says and does what a test asks it to."""

    kind: ClassVar[str] = "wrong"
    slot: ClassVar[str] = "wrong"
    params: ClassVar[int] = 0
    macs: ClassVar[int] = 0
    width: ClassVar[int] = 8

    @property
    def num_params(self) -> int:
        return self.params

    def num_macs(self, tokens: TokenGrid) -> int:
        return self.macs

    def build(self, options: BuildOptions) -> nn.Module:
        return nn.AdaptiveAvgPool1d(self.width)

    @property
    def label(self) -> str:
        return "wrong"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"params": -1}, "part 'wrong': num_params must not be negative, got -1"),
        ({"macs": -2}, "part 'wrong': num_macs must not be negative, got -2"),
        ({"params": 5}, "part 'wrong': its module has 0 parameters, num_params says 5"),
        ({"width": 4}, r"part 'wrong': its module must return \[1, 17, 8\], got \[1, 17, 4\]"),
    ],
)
def test_a_part_that_is_wrong_is_named_in_one_line(
    values: dict[str, int], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from glit_models.block import build_block

    for name, value in values.items():
        monkeypatch.setattr(Wrong, name, value)
    tokens = TokenGrid(4, 4)

    def use() -> None:
        parts = BlockParts(8, (Wrong(8),), MlpPart(8, 8))
        parts.num_macs(tokens)
        build_block(parts, BuildOptions(tokens))

    with pytest.raises(SpecError, match=message):
        use()


def test_an_extension_that_cannot_be_used_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken.py").write_text("import no_such_package\n")
    (tmp_path / "half.py").write_text(
        "from glit_models.search import Fitness, Search\nclass NoPropose(Search):\n    method = 'x'\n"
        "class NoScore(Fitness):\n    pass\nNotOne = 3\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    cases: Sequence[tuple[str, str]] = (
        ("method=broken:Method", "cannot be imported: No module named 'no_such_package'"),
        ("method=gone:Method", "there is no module 'gone'"),
        ("method=half:Gone", "half has no 'Gone'"),
        ("method=half:NoPropose", "lacks propose"),
        ("method=half:NotOne", "must be a Search, got int"),
        ("fitness=half:NoScore", "lacks score"),
        ("fitness=inheritted", "did you mean 'inherited'?"),
    )
    for override, message in cases:
        with pytest.raises((SearchError, RecipeError), match=message.replace("?", r"\?")):
            load_search_recipe(str(TESTS / "fixtures" / "search.yaml"), [DATA, override])
    with pytest.raises(ExportError, match="unknown export target 'onxx'"):
        glit_models.export.export_model("glit_tiny.fashion_mnist", tmp_path / "x.onnx", "onxx")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda _, y: y[:, :2], "family 'plain': its model must return [2, 10], got [2, 2]"),
        (lambda _, y: [y], "family 'plain': its model must return [2, 10], got list"),
        (
            lambda _, y: y.gone,
            "family 'plain': its model fails on [2, 3, 32, 32]: 'Tensor' object has no attribute 'gone'",
        ),
        (
            lambda model, y: y.gone if model.training else y,
            "family 'plain': its model fails on [2, 3, 32, 32] in training mode: "
            "'Tensor' object has no attribute 'gone'",
        ),
    ],
    ids=["shape", "type", "exception", "training"],
)
def test_a_family_whose_forward_pass_is_wrong_is_named_in_one_line_by_every_command(
    change: Callable[[torch.nn.Module, torch.Tensor], Any],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import plain_family

    class Broken(plain_family.Plain):
        def forward(self, x: torch.Tensor) -> Any:
            return change(self, super().forward(x))

    save_folder(timm.create_model("plain_nano", img_size=32, num_classes=10), tmp_path / "model")
    monkeypatch.setattr(plain_family, "FAMILY", plain_family.FAMILY._replace(model=Broken))
    root = TESTS / "fixtures" / "fashion-mnist"
    model = ("model.name=plain_nano", "model.spec=null", "model.img_size=32", f"data.root={root}")
    choices = "[{num_heads: [1], mlp_ratios: [1]}]"
    space = f"{{family: plain, embed_dim: 16, depth: 1, patch_size: 8, blocks: [{{choices: {choices}}}]}}"
    settings = (DATA, "train.model.name=plain_nano", "method=spos", "fixed={}", "budget={}", f"space={space}")
    train = ["train", "smoke", *(f"--set={setting}" for setting in model)]
    search = ["search", str(TESTS / "fixtures" / "search.yaml"), *(f"--set={setting}" for setting in settings)]
    for command in (train, search, ["export", str(tmp_path / "model"), "--format", "onnx"]):
        assert cli.main([*command, "--out", str(tmp_path / command[0])]) == 2
        assert capsys.readouterr().err.strip().splitlines()[-1] == f"glit: {message}"


def test_what_comes_from_others_never_imports_a_module() -> None:
    for spec in ({"family": "os:system"}, {**pooled().to_dict(), "family": "plain_family:FAMILY"}):
        with pytest.raises(GlitError, match=r"unknown family"):
            glit_models.parse_spec(spec)
    data = pooled().to_dict()
    data["blocks"][0]["local_part"] = "pooling_part:PoolingPart"
    with pytest.raises(SpecError, match=r"unknown part"):
        glit_models.parse_spec(data)
