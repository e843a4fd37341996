"""Tests of weight folders: saved, converted, published to a folder and to a local Hub, shipped, verified."""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hub_server import HubServer
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from test_hub import assert_is_small, point_client_at
from timm.utils import reparameterize_model
from weight_folders import CLASSES, FACTS, SPEC, create_registered, register, small_folder, small_model

import glit_models
import glit_models.weights.card
from glit_models.cli import main
from glit_models.errors import WeightsError, WriteError
from glit_models.glit.checkpoint import to_official
from glit_models.parts import TokenGrid
from glit_models.weights import resolve
from glit_models.weights.files import sha256_of
from glit_models.weights.folder import load_folder, open_folder, save_folder
from glit_models.weights.publish import convert, publish, ship
from glit_models.weights.registry import read_registry
from glit_models.weights.verify import verify


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "small"
    small_folder(path)
    return path


@pytest.fixture(autouse=True)
def own_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLIT_HOME", str(tmp_path / "home"))


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with HubServer() as running:
        point_client_at(running.endpoint, tmp_path, monkeypatch)
        yield running


@contextlib.contextmanager
def full_disk() -> Iterator[None]:
    """Let writes after the first 4 kB of a file fail, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 12, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def agreements(source: str | Path) -> dict[str, bool | None]:
    return {check.name: check.agrees for check in verify(str(source))}


ALL_AGREE = {"sha256": True, "parameters": True, "golden logits": True}


# ---- saving and loading ----


def test_a_saved_folder_loads_with_plain_timm_and_with_its_class_names(folder: Path) -> None:
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert_is_small(model, folder)
    assert tuple(model.pretrained_cfg["label_names"]) == CLASSES
    assert model.spec == SPEC


def test_half_precision_halves_the_file_and_golden_logits_are_those_of_the_rounded_weights(
    tmp_path: Path, folder: Path
) -> None:
    small_folder(tmp_path / "full", dtype="float32")
    sizes = [(path / "model.safetensors").stat().st_size for path in (folder, tmp_path / "full")]
    assert sizes[0] < 0.55 * sizes[1]
    assert_is_small(load_folder(folder), folder)
    assert_is_small(load_folder(tmp_path / "full"), tmp_path / "full")


def test_saving_changes_nothing_of_the_model(tmp_path: Path) -> None:
    model = small_model().train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    save_folder(model, tmp_path / "saved", dtype="float16")
    assert model.training
    after = model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_the_configuration_says_nothing_that_was_true_only_of_other_weights(tmp_path: Path) -> None:
    data_config = {"mean": (0.3,) * 3, "std": (0.4,) * 3, "interpolation": "bilinear", "crop_pct": 1.0}
    entry = save_folder(small_model(), tmp_path / "saved", name="glit_tiny.mine", data_config=data_config)
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    cfg = config["pretrained_cfg"]
    assert "num_classes" not in config["model_args"]
    assert "origin_url" not in cfg
    assert "license" not in cfg
    assert cfg["tag"] == "mine"
    assert (cfg["mean"], cfg["interpolation"], cfg["crop_pct"]) == ([0.3] * 3, "bilinear", 1.0)
    assert (entry["mean"], entry["interpolation"]) == ([0.3] * 3, "bilinear")
    assert timm.create_model(f"local-dir:{tmp_path / 'saved'}", pretrained=True).num_classes == 10


def test_a_model_of_any_image_size_is_saved_with_the_size_of_its_positions(tmp_path: Path) -> None:
    entry = save_folder(small_model(dynamic_img_size=True), tmp_path / "saved")
    assert entry["input_size"] == [3, 64, 64]
    assert entry["macs"] == glit_models.count_macs(SPEC, 64, 10)
    assert agreements(tmp_path / "saved") == ALL_AGREE
    path = tmp_path / "saved" / "config.json"  # as 0.1 wrote it
    path.write_text(path.read_text().replace('"input_size": [3, 64, 64]', '"input_size": [3, 224, 224]'))
    assert '"input_size": [3, 224, 224]' in path.read_text()
    assert agreements(tmp_path / "saved") == ALL_AGREE


def test_a_fused_model_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    for fused in (reparameterize_model(small_model()), small_model().fuse()):
        with pytest.raises(WeightsError, match=r"^a fused model cannot be saved, .*; save it before `fuse\(\)`$"):
            save_folder(fused, tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []


def test_weights_that_overflow_half_precision_are_refused_and_nothing_is_written(tmp_path: Path) -> None:
    model = small_model()
    with torch.no_grad():
        model.head.weight[0, 0] = 1e6
    with pytest.raises(WeightsError, match=r"'head.weight' holds values that are not finite in float16"):
        save_folder(model, tmp_path / "saved", dtype="float16")
    with pytest.raises(WeightsError, match="class_names must be 10 names, got 3"):
        save_folder(small_model(), tmp_path / "saved", class_names=["a", "b", "c"])
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_folder_is_one_line(tmp_path: Path) -> None:
    small_folder(tmp_path / "w")
    config = json.loads((tmp_path / "w" / "config.json").read_text())

    def complaint(text: str) -> str:
        (tmp_path / "w" / "config.json").write_text(text)
        with pytest.raises(WeightsError) as error:
            load_folder(tmp_path / "w")
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "not valid JSON" in complaint("{")
    assert "not the configuration of a model of this package" in complaint(
        json.dumps(config | {"architecture": "resnet18"})
    )
    assert "cannot build" in complaint(json.dumps(config | {"model_args": config["model_args"] | {"colour": 1}}))
    assert "the model needs (7, 48)" in complaint(json.dumps(config | {"num_classes": 7}))
    (tmp_path / "w" / "config.json").unlink()
    with pytest.raises(WeightsError, match=r"no config.json"):
        load_folder(tmp_path / "w")


# ---- converting ----


def trained(model: torch.nn.Module) -> torch.nn.Module:
    """The model with norms other than they are initialised, as those of trained weights are."""
    for name, tensor in model.state_dict().items():
        if name.endswith(("norm.weight", "norm1.weight", "norm2.weight", "bn.weight", "var")):
            tensor += 0.1 * torch.rand_like(tensor)
    return model


def save_official(path: Path, model: torch.nn.Module) -> Path:
    """A checkpoint as the authors' training script writes it."""
    args = argparse.Namespace(model="glit_tiny", lr=5e-4)
    torch.save({"model": to_official(model.state_dict()), "args": args}, path)
    return path


def test_the_authors_checkpoint_converts_to_a_folder_with_the_same_logits(tmp_path: Path) -> None:
    model = small_model()
    (tmp_path / "spec.json").write_text(SPEC.to_json())
    settings: dict[str, Any] = {"spec": str(tmp_path / "spec.json"), "num_classes": 10, "img_size": 64}
    pickled = save_official(tmp_path / "official.pth.tar", model)
    save_file(to_official(model.state_dict()), tmp_path / "official.safetensors")
    image = torch.rand(2, 3, 64, 64)
    for source in (pickled, tmp_path / "official.safetensors"):
        (out,) = convert(source, "glit_tiny", out=tmp_path / source.suffix[1:], **settings)
        with torch.inference_mode():
            torch.testing.assert_close(load_folder(out)(image), model(image), atol=1e-6, rtol=0)
        assert agreements(out) == ALL_AGREE


def test_convert_install_makes_pretrained_in1k_work(tmp_path: Path) -> None:
    model = trained(timm.create_model("glit_tiny").eval())
    file = save_official(tmp_path / "glit_tiny.pth.tar", model)
    with full_disk(), pytest.raises(WriteError, match=r" cannot be written: .*File too large"):
        convert(file, "glit_tiny", install=True, sha256=sha256_of(file))
    assert resolve.where(resolve.get_entry("glit_tiny.in1k")) == "none"
    assert not [path for path in resolve.installed_folder("glit_tiny.in1k").parent.rglob("*") if path.is_file()]
    convert(file, "glit_tiny", install=True, sha256=sha256_of(file))
    assert not resolve.is_unverified(resolve.get_entry("glit_tiny.in1k"))
    image = torch.rand(1, 3, 224, 224)
    loaded = timm.create_model("glit_tiny.in1k", pretrained=True).eval()
    with torch.inference_mode():
        torch.testing.assert_close(loaded(image), model(image), atol=1e-6, rtol=0)
    assert loaded.pretrained_cfg["mean"] == (0.485, 0.456, 0.406)
    assert resolve.get_entry("glit_tiny").tag == "fractal1k"  # what a bare name gives is the same on every machine
    assert resolve.where(resolve.get_entry("glit_tiny.in1k")) == "installed"
    publish("glit_tiny.in1k", folder=tmp_path / "card")
    assert "converted from glit_tiny.pth.tar, unverified" not in (tmp_path / "card" / "README.md").read_text()
    assert "as published: the authors' repository" in (tmp_path / "card" / "README.md").read_text()
    assert agreements("glit_tiny.in1k") == ALL_AGREE
    assert timm.create_model("glit_tiny.in1k", pretrained=True, num_classes=7).num_classes == 7


def test_weights_of_an_unknown_file_are_unverified_wherever_they_are_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = save_official(tmp_path / "some.pth", trained(timm.create_model("glit_tiny")))
    assert main(["convert", str(file), "--model", "glit_tiny", "--install"]) == 0
    assert "unverified: nothing says that this is the published file" in capsys.readouterr().out
    assert main(["list"]) == 0
    listed = capsys.readouterr().out
    assert re.search(r"glit_tiny.in1k +unverified ", listed)
    assert "76.4 (as published: the authors' repository; the installed file is unverified)" in listed
    assert main(["info", "glit_tiny.in1k"]) == 0
    assert "installed, unverified: the hash of the file was not compared" in capsys.readouterr().out
    publish("glit_tiny.in1k", folder=tmp_path / "card")
    card = (tmp_path / "card" / "README.md").read_text()
    assert "converted from some.pth, unverified" in card
    assert "None were measured" in card


def test_weights_as_they_are_initialised_or_of_another_hash_are_not_installed(tmp_path: Path) -> None:
    file = save_official(tmp_path / "random.pth", timm.create_model("glit_tiny"))
    with pytest.raises(WeightsError, match=r"random.pth: these weights were never trained, all norms"):
        convert(file, "glit_tiny", install=True)
    with pytest.raises(WeightsError, match=r"random.pth: refused, its sha256 is [0-9a-f]{64} and not 00"):
        convert(file, "glit_tiny", install=True, sha256="00")
    assert resolve.where(resolve.get_entry("glit_tiny.in1k")) == "none"


def test_published_scores_are_not_claimed_for_other_weights(tmp_path: Path) -> None:
    save_file(timm.create_model("glit_tiny").state_dict(), tmp_path / "mine.safetensors")
    convert(tmp_path / "mine.safetensors", "glit_tiny", out=tmp_path / "out")
    entry = json.loads((tmp_path / "out" / "entry.json").read_text())
    assert entry["origin"] == "converted from mine.safetensors"
    assert "metrics" not in entry


def test_weights_of_an_unregistered_name_take_no_class_names_or_preprocessing_of_the_default(tmp_path: Path) -> None:
    model = timm.create_model("glit_tiny")
    assert "label_names" not in model.pretrained_cfg
    save_file(model.state_dict(), tmp_path / "mine.safetensors")
    for name in ("glit_tiny", "glit_tiny.mine"):
        convert(tmp_path / "mine.safetensors", name, out=tmp_path / name)
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert "label_names" not in config
        assert config["pretrained_cfg"]["mean"] == [0.485, 0.456, 0.406]


def test_class_names_come_only_with_the_weights_that_they_are_of(tmp_path: Path) -> None:
    loaded = timm.create_model("glit_tiny.fashion_mnist", pretrained=True)
    assert len(loaded.pretrained_cfg["label_names"]) == 10
    save_file(loaded.state_dict(), tmp_path / "mine.safetensors")
    overlay: dict[str, Any] = {"file": str(tmp_path / "mine.safetensors")}
    for more in ({}, {"label_names": CLASSES}):
        own = timm.create_model("glit_tiny.fashion_mnist", pretrained=True, pretrained_cfg_overlay=overlay | more)
        assert own.pretrained_cfg.get("label_names") == more.get("label_names")


@pytest.mark.parametrize("name", ["glit_huge", "glit_small", "glit_tiny.mine"])
def test_only_registered_names_can_be_installed(tmp_path: Path, name: str) -> None:
    with pytest.raises(WeightsError, match=f"{name}.* cannot be installed; use out="):
        convert(tmp_path / "none.pth", name, install=True)


def test_a_checkpoint_that_does_not_fit_is_one_line_and_writes_nothing(tmp_path: Path) -> None:
    save_official(tmp_path / "small.pth", small_model())
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({}, "do not fit the model: 'cls_token' is \\(1, 1, 48\\), the model needs \\(1, 1, 192\\)"),
        (
            {"spec": SPEC, "img_size": 64, "num_classes": 12},
            "'head.weight' is \\(10, 48\\), the model needs \\(12, 48\\)",
        ),
    )
    for settings, complaint in cases:
        with pytest.raises(WeightsError, match=complaint) as error:
            convert(tmp_path / "small.pth", "glit_tiny", out=tmp_path / "out", **settings)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_one_line_and_leaves_no_folder(tmp_path: Path) -> None:
    file = save_official(tmp_path / "small.pth", small_model())
    with full_disk(), pytest.raises(WriteError, match=r"out.* cannot be written: .*File too large") as error:
        convert(file, "glit_tiny", out=tmp_path / "out", spec=SPEC, img_size=64, num_classes=10)
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["small.pth"]


# ---- publishing ----


def test_a_published_folder_has_a_card_that_the_hub_can_read(tmp_path: Path, folder: Path) -> None:
    publish(str(folder), folder=tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"model.safetensors", "config.json", "golden.safetensors", "README.md", "architecture.png"}
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert agreements(tmp_path / "out") == ALL_AGREE
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert (card.data.library_name, card.data.license) == ("timm", "apache-2.0")
    assert card.data.pipeline_tag == "image-classification"
    assert card.data.datasets == ["fashion-mnist"]
    for promised in (FACTS["recipe"], "90.5", "`glit eval`", "Limits", "chen2021glit", "class 9", "architecture.png"):
        assert str(promised) in card.text


def test_what_a_card_needs_and_nobody_said_is_asked_for(tmp_path: Path, folder: Path) -> None:
    save_folder(small_model(), tmp_path / "bare")
    with pytest.raises(WeightsError, match="the dataset of these weights is not known; give dataset"):
        publish(str(tmp_path / "bare"), folder=tmp_path / "out")
    with pytest.raises(WeightsError, match="name must begin with the architecture"):
        publish(str(folder), folder=tmp_path / "out", facts={"name": "glit_base.mine"})
    assert not (tmp_path / "out").exists()
    publish(str(tmp_path / "bare"), folder=tmp_path / "out", facts=FACTS)


def test_costs_of_a_model_without_a_class_token_count_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = small_model(class_token=False, global_pool="avg")
    save_folder(model, tmp_path / "saved", facts=FACTS)
    assert main(["info", str(tmp_path / "saved"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["params"] == sum(parameter.numel() for parameter in model.parameters())
    assert found["macs"] == glit_models.count_macs(SPEC, 64, 10, class_token=False)
    assert found["blocks"][0]["macs"] == SPEC.block_parts(0).num_macs(TokenGrid(4, 4, 0)) == 380_928
    publish(str(tmp_path / "saved"), folder=tmp_path / "out")
    assert "| 46,192 | 0.7 M |" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("dataset", "named"),
    [
        ("Fashion-MNIST", ["fashion-mnist"]),
        ("hfds/ylecun/mnist", ["ylecun/mnist"]),
        ("torch/cifar10", None),
        ("1,000 classes of fractals, drawn by formula (no photographs)", None),
    ],
)
def test_a_card_names_only_data_sets_of_the_hub(
    tmp_path: Path, folder: Path, dataset: str, named: list[str] | None
) -> None:
    publish(str(folder), folder=tmp_path / "out", facts={"dataset": dataset})
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.datasets == named
    assert f"Data: {dataset}." in card.text


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
def test_the_reason_of_the_hub_for_refusing_a_card_is_shown(
    server: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(glit_models.weights.card, "_hub_data_sets", lambda name: ["a b", "c d"])
    with pytest.raises(WeightsError) as error:
        publish(str(folder), repo="somebody/glit-small")
    assert str(error.value) == (
        'somebody/glit-small: not published: the Hub refused the request (400): "datasets" must be names, got a b; '
        '"datasets" must be names, got c d'
    )


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # the Hub's client of its HTTP library
def test_publishing_to_the_hub_and_loading_from_there_goes_round(
    server: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.token = "secret"
    with pytest.raises(WeightsError, match=r"not published: the Hub refused access \(401\).*hf auth login"):
        publish(str(folder), repo="somebody/glit-small")
    monkeypatch.setenv("HF_TOKEN", "secret")
    published = publish(str(folder), repo="somebody/glit-small")
    assert published.revision == server.head("somebody/glit-small")
    assert len(server.repos["somebody/glit-small"]) == 1  # one commit, so that the revision holds everything
    assert published.entry is None  # another spec than that of the name: no registry entry can load it

    assert agreements("somebody/glit-small") == ALL_AGREE
    assert agreements(f"somebody/glit-small@{published.revision}") == ALL_AGREE
    assert_is_small(timm.create_model("hf-hub:somebody/glit-small", pretrained=True).eval(), folder)
    saved = json.loads((folder / "entry.json").read_text())
    register(monkeypatch, saved, repo=published.place, revision=published.revision, sha256=published.sha256)
    assert_is_small(create_registered(), folder)

    again = publish(str(folder), repo="somebody/glit-small", facts={"license": "mit"})
    assert again.revision != published.revision


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
def test_all_shipped_weights_are_published_by_one_command(
    server: HubServer, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("glit_tiny.fashion_mnist", "glit_small")  # shipped, and without weights
    entries = {name: resolve.registry()[name] for name in names}
    monkeypatch.setattr(resolve, "registry", lambda: entries)
    assert main(["publish", "--all", "--namespace", "somebody"]) == 0
    said = capsys.readouterr().out
    repo = f"somebody/{names[0]}"
    assert list(server.repos) == [repo]
    assert f"published {repo}@{server.head(repo)}, sha256 {entries[names[0]].sha256}" in said
    assert f'"repo": "{repo}"' in said
    assert main(["publish", "--all", "--to-folder", str(tmp_path / "out")]) == 0
    assert f"local-dir:{tmp_path / 'out' / names[0]}" in capsys.readouterr().out
    assert (tmp_path / "out" / names[0] / "README.md").is_file()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--all", "--repo", "a/b"], "give --namespace NAME or --to-folder DIR"),
        (["--all", "--to-package"], "give --namespace NAME or --to-folder DIR"),
        (["--all", "--namespace", "a", "--metric", "top-1", "1", "me"], "--metric cannot be given with --all"),
        (["--all", "--namespace", "a/b"], "'a/b/glit_tiny.fashion_mnist' is not the name of a Hub repository"),
        (["glit_tiny.fractal1k", "--namespace", "a"], "--namespace goes with --all"),
        (["--namespace", "a"], "one of the arguments source --all is required"),
    ],
)
def test_publishing_all_takes_only_what_fits_all(
    arguments: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status = main(["publish", *arguments])
    except SystemExit as usage:
        status = int(str(usage.code))
    assert status == 2
    assert reason in capsys.readouterr().err


@pytest.mark.parametrize(
    ("fault", "complaint"), [("hang", r"could not be reached \(.*(within 0.5 s|timed out)"), ("500", r"\(500\)")]
)
def test_a_hub_that_fails_while_publishing_is_one_line(
    server: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch, fault: Any, complaint: str
) -> None:
    monkeypatch.setenv("GLIT_HUB_TIMEOUT", "0.5")
    server.fault = fault
    with pytest.raises(WeightsError, match=f"somebody/glit-small: not published: .*{complaint}") as error:
        publish(str(folder), repo="somebody/glit-small")
    assert "\n" not in str(error.value)


def test_shipping_adds_a_verified_entry_of_a_named_architecture_to_the_package(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "weights"
    package.mkdir()
    (package / "registry.json").write_bytes((resolve.SHIPPED / "registry.json").read_bytes())
    with pytest.raises(WeightsError, match="only the named architectures"):
        ship(str(folder), "glit_tiny.small", package=package)
    model = timm.create_model("glit_tiny", num_classes=10, img_size=64)
    save_folder(model, tmp_path / "run", class_names=CLASSES, dtype="float16")
    ship(str(tmp_path / "run"), "glit_tiny.trained", facts=FACTS, package=package)

    entry = read_registry(package / "registry.json")["glit_tiny.trained"]
    assert (entry.file, entry.input_size) == ("glit_tiny.trained/model.safetensors", (3, 64, 64))
    assert entry.params == glit_models.count_params(glit_models.GLIT_TINY, 10, 64)
    monkeypatch.setattr(resolve, "SHIPPED", package)
    monkeypatch.setattr(resolve, "registry", lambda: {entry.name: entry})
    assert agreements("glit_tiny.trained") == ALL_AGREE
    # With the registry entry, publishing these to the Hub would say what to add.
    assert publish("glit_tiny.trained", folder=tmp_path / "out").entry is not None


def test_shipping_weights_again_keeps_them_the_default(tmp_path: Path) -> None:
    package = tmp_path / "weights"
    package.mkdir()
    (package / "registry.json").write_bytes((resolve.SHIPPED / "registry.json").read_bytes())
    before = read_registry(package / "registry.json")
    for name in ("glit_tiny.fractal1k", "glit_tiny.fashion_mnist"):
        ship(name, name, package=package)
    assert read_registry(package / "registry.json") == before


# ---- verifying ----


def test_verify_tells_which_of_hash_parameters_and_logits_differ(tmp_path: Path) -> None:
    small_folder(tmp_path / "w")
    weights = tmp_path / "w" / "model.safetensors"
    state = load_file(weights)
    state["head.bias"] += 0.5
    save_file(state, weights, metadata={"format": "pt"})
    assert agreements(tmp_path / "w") == {"sha256": False, "parameters": True, "golden logits": False}
    del state["head.bias"]
    save_file(state, weights, metadata={"format": "pt"})
    assert agreements(tmp_path / "w") == {"sha256": False, "parameters": False, "golden logits": False}
    weights.write_bytes(weights.read_bytes()[:1000])
    assert agreements(weights) == {"sha256": False, "parameters": False, "golden logits": False}
    (tmp_path / "w" / "golden.safetensors").unlink()
    assert agreements(tmp_path / "w") == {"sha256": None, "parameters": False, "golden logits": None}


@pytest.mark.parametrize("source", ["no/such/folder", "glit_huge", "./nothing"])
def test_a_source_that_is_nothing_is_one_line(source: str) -> None:
    with pytest.raises(WeightsError, match=r"no such folder, and no MODEL\.TAG or Hub repository"):
        open_folder(source)
