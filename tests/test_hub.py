"""Tests of the weight registry, installed weights, and downloads from a local Hub with all kinds of faults."""

from __future__ import annotations

import json
import os
import re
import socket
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hub_server import HubServer
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import load_file, save_file
from weight_folders import SPEC, create_registered, register, small_folder, small_model

import glit_models
from glit_models.cli import main
from glit_models.errors import WeightsError
from glit_models.families import named_specs
from glit_models.weights import download, files, resolve
from glit_models.weights.folder import open_folder
from glit_models.weights.loading import load_model
from glit_models.weights.registry import WeightEntry, read_registry
from glit_models.weights.verify import verify

REPO = "somebody/glit-small"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "small"
    small_folder(path)
    return path


@pytest.fixture
def saved(folder: Path) -> dict[str, Any]:
    entry: dict[str, Any] = json.loads((folder / "entry.json").read_text())
    return entry


@pytest.fixture(autouse=True)
def own_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GLIT_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with HubServer() as running:
        point_client_at(running.endpoint, tmp_path, monkeypatch)
        yield running


def point_client_at(endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What HF_ENDPOINT and HF_HOME do when the client is imported after they are set."""
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN", raising=False)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def on_hub(server: HubServer, folder: Path, saved: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> WeightEntry:
    revision = server.add(REPO, files_of(folder))
    return register(monkeypatch, saved, repo=REPO, revision=revision)


def assert_is_small(model: torch.nn.Module, folder: Path) -> None:
    golden = load_file(folder / "golden.safetensors")
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    with torch.inference_mode():
        torch.testing.assert_close(model(golden["input"].float()), golden["logits"], atol=1e-5, rtol=0)


def one_line(error: pytest.ExceptionInfo[WeightsError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


# ---- the registry ----


def test_the_registry_that_ships_is_valid_and_names_no_hub_repository() -> None:
    assert resolve.registry()["glit_tiny.in1k"].params == 7_264_456
    assert all(entry.repo is None for entry in resolve.registry().values())


def test_registered_parameters_and_macs_are_those_of_the_named_specs() -> None:
    for entry in resolve.registry().values():
        spec, (channels, height, width) = named_specs()[entry.architecture], entry.input_size
        assert entry.params == glit_models.count_params(spec, entry.num_classes, (height, width), channels)
        assert entry.macs == glit_models.count_macs(spec, (height, width), entry.num_classes, channels)


@pytest.mark.parametrize("name", [entry.name for entry in resolve.registry().values() if entry.file])
def test_weights_that_ship_are_what_the_registry_says(name: str) -> None:
    assert [check.agrees for check in verify(name)] == [True, True, True]
    entry = resolve.get_entry(name)
    model = timm.create_model(name, pretrained=True)
    assert model.num_classes == entry.num_classes
    assert model.pretrained_cfg["mean"] == entry.mean
    assert resolve.find(entry).stat().st_size < 16 * 2**20


def test_the_default_of_glit_tiny_has_1000_classes_and_224_pixels() -> None:
    cfg = timm.get_pretrained_cfg("glit_tiny")
    assert (cfg.tag, cfg.num_classes, cfg.input_size, cfg.crop_pct) == ("fractal1k", 1000, (3, 224, 224), 0.875)
    assert timm.get_pretrained_cfg("glit_base").num_classes == 1000


def test_weights_of_another_tag_do_not_become_the_default(
    saved: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = {key: value for key, value in saved.items() if key != "name"}
    located = [small | {"file": "x"}, small | {"repo": "a/b", "revision": "0" * 40}]
    names = ["glit_tiny.small", "glit_base.small"]
    added = {name: WeightEntry.from_dict(name, data) for name, data in zip(names, located, strict=True)}
    for entries in (resolve.registry() | added, added | resolve.registry()):
        monkeypatch.setattr(resolve, "registry", lambda entries=entries: entries)
        cfgs = timm.models.generate_default_cfgs(resolve.default_cfgs(glit_models.glit.FAMILY))
        assert cfgs["glit_tiny"].default.num_classes == cfgs["glit_base"].default.num_classes == 1000
        assert "small" in cfgs["glit_tiny"].tags


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"repo": "a/b", "revision": "main", "sha256": "0" * 64}, "revision must be a commit of 40 hex digits"),
        ({"repo": "a/b", "revision": "0" * 40}, "sha256 must be 64 hex digits"),
        ({"file": "x", "sha256": "short"}, "sha256 must be 64 hex digits"),
        ({"params": 0}, "params must be a positive integer, got 0"),
        ({"class_names": ["one"]}, "class_names must be 10 names"),
        ({"colour": "red"}, "unknown field 'colour'"),
        ({"license": None}, "lacks the field 'license'"),
        ({"metrics": [{"name": "top-1"}]}, "metrics must be a list of objects"),
        ({"default": "yes"}, "default must be true or false, got 'yes'"),
        ({"notice": " "}, "notice must be a text, or absent, got ' '"),
    ],
)
def test_an_impossible_registry_entry_is_refused_by_field(
    saved: dict[str, Any], change: dict[str, Any], complaint: str
) -> None:
    saved.pop("name")
    saved.pop("sha256")
    with pytest.raises(WeightsError, match=complaint) as error:
        WeightEntry.from_dict("glit_tiny.small", saved | change)
    assert "glit_tiny.small" in one_line(error)


def test_the_default_weights_of_a_model_are_marked_in_the_registry(
    saved: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_glit = (entry for entry in resolve.registry().values() if entry.architecture.startswith("glit_"))
    assert {entry.name for entry in of_glit if entry.default} == {"glit_tiny.fractal1k", "glit_small", "glit_base"}
    small = {key: value for key, value in saved.items() if key not in ("name", "sha256")}
    names = ["glit_tiny.first", "glit_tiny.marked"]
    entries = {name: WeightEntry.from_dict(name, small | {"default": name.endswith("marked")}) for name in names}
    monkeypatch.setattr(resolve, "registry", lambda: entries)
    assert resolve.get_entry("glit_tiny").tag == "marked"
    cfgs = timm.models.generate_default_cfgs(resolve.default_cfgs(glit_models.glit.FAMILY))
    assert cfgs["glit_tiny"].tags[0] == "marked"
    both = {name: small | {"default": True} for name in names}
    (tmp_path / "registry.json").write_text(json.dumps(both))
    with pytest.raises(WeightsError, match=r"glit_tiny.first and glit_tiny.marked are both the default$"):
        read_registry(tmp_path / "registry.json")


def test_what_timm_is_told_of_weights_stands_in_their_entry(
    saved: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = {key: value for key, value in saved.items() if key not in ("name", "sha256")}
    more = {"origin_url": "https://example.org"}
    entries = {"glit_tiny.a": WeightEntry.from_dict("glit_tiny.a", small | more)}
    monkeypatch.setattr(resolve, "registry", lambda: entries)
    cfg = resolve.default_cfgs(glit_models.glit.FAMILY)["glit_tiny.a*"]
    assert {key: cfg[key] for key in more} == more
    assert resolve.default_cfgs(glit_models.glit.FAMILY)["glit_tiny.a*"]["label_names"] == tuple(saved["class_names"])


def test_loading_the_default_weights_says_once_that_their_classes_are_fractals(
    caplog: pytest.LogCaptureFixture,
) -> None:
    resolve._warn_once.cache_clear()
    for num_classes in (1000, 5):
        timm.create_model("glit_tiny", pretrained=True, num_classes=num_classes)
    lines = [record.getMessage() for record in caplog.records if record.name == "glit_models.weights.resolve"]
    assert len(lines) == 1
    assert "glit_tiny.fractal1k: pretrained on fractals" in lines[0]
    assert "not ImageNet's" in lines[0]
    timm.create_model("glit_tiny.fashion_mnist", pretrained=True)
    assert len([record for record in caplog.records if record.name == "glit_models.weights.resolve"]) == 1


# ---- weights that are not there ----


def test_asking_for_in1k_before_it_is_installed_says_where_the_file_is_and_the_command() -> None:
    with pytest.raises(WeightsError, match=r"github.com/bychen515/GLiT") as error:
        timm.create_model("glit_tiny.in1k", pretrained=True)
    assert "`glit convert FILE --model glit_tiny --install`" in one_line(error)


def test_an_unknown_tag_lists_those_that_exist() -> None:
    with pytest.raises(WeightsError, match=r"glit_tiny.nope: no such weights; glit_tiny has glit_tiny.in1k") as error:
        timm.create_model("glit_tiny.nope", pretrained=True)
    one_line(error)


def test_a_model_without_weights_says_so() -> None:
    with pytest.raises(WeightsError, match=r"glit_base: no weights.*82.3.*pretrained=False") as error:
        timm.create_model("glit_base", pretrained=True)
    one_line(error)


# ---- a source of the user's own ----


def test_a_file_of_the_users_own_is_checked_before_timm_reads_it(tmp_path: Path, folder: Path) -> None:
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes((folder / "model.safetensors").read_bytes()[:-100])
    for file, complaint in ((tmp_path / "none.pth", "no such file"), (cut, "cut short")):
        with pytest.raises(WeightsError, match=complaint) as error:
            timm.create_model("glit_tiny", pretrained=True, pretrained_cfg_overlay={"file": str(file)})
        assert str(file) in one_line(error)


def test_a_folder_of_the_users_own_is_checked_before_timm_reads_it(tmp_path: Path, folder: Path) -> None:
    assert_is_small(timm.create_model(f"local-dir:{folder}", pretrained=True).eval(), folder)
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(WeightsError, match="no weights in this folder") as error:
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    one_line(error)


def test_a_state_dict_of_the_users_own_is_used_as_it_is() -> None:
    state = small_model().state_dict()
    overlay = {"state_dict": state, "num_classes": 10, "input_size": (3, 64, 64)}
    model = timm.create_model("glit_tiny", pretrained=True, spec=SPEC, pretrained_cfg_overlay=overlay)
    torch.testing.assert_close(model.state_dict()["pos_embed"], state["pos_embed"])


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # the Hub's client of its HTTP library
def test_a_source_in_the_overlay_comes_before_the_weights_that_ship(
    server: HubServer, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    server.add(REPO, files_of(folder))
    sizes = {"num_classes": 10, "input_size": (3, 64, 64)}
    overlay = {"hf_hub_id": REPO, **sizes}
    model = timm.create_model("glit_tiny", pretrained=True, spec=SPEC, pretrained_cfg_overlay=overlay)
    assert_is_small(model.eval(), folder)
    overlay = {"url": (folder / "model.safetensors").as_uri(), **sizes}
    model = timm.create_model("glit_tiny", pretrained=True, spec=SPEC, pretrained_cfg_overlay=overlay)
    assert_is_small(model.eval(), folder)


def test_a_configuration_that_names_no_weights_is_refused() -> None:
    with pytest.raises(WeightsError, match="names no weights") as error:
        timm.create_model("glit_tiny", pretrained=True, pretrained_cfg={"num_classes": 10})
    one_line(error)


def test_timms_own_copy_of_a_registered_configuration_finds_the_registered_weights() -> None:
    cfg = timm.get_pretrained_cfg("glit_tiny.in1k").to_dict()
    with pytest.raises(WeightsError, match="glit convert"):
        timm.create_model("glit_tiny", pretrained=True, pretrained_cfg=cfg)


# ---- the installed store ----


def install(folder: Path) -> Path:
    target = files.installed_folder("glit_tiny.in1k")
    target.mkdir(parents=True)
    for name, content in files_of(folder).items():
        (target / name).write_bytes(content)
    return target


def test_installed_weights_are_found_and_load_in_float32(folder: Path) -> None:
    install(folder)
    assert_is_small(create_registered(), folder)


def test_an_installed_file_that_changed_is_refused_by_name_and_hash(folder: Path, saved: dict[str, Any]) -> None:
    weights = install(folder) / "model.safetensors"
    create_registered()
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    os.utime(weights, ns=(0, 0))
    with pytest.raises(WeightsError, match="refused") as error:
        create_registered()
    text = one_line(error)
    assert str(weights) in text
    assert saved["sha256"][:12] in text
    assert "install it again" in text


def test_an_installed_file_without_its_recorded_hash_is_refused(folder: Path) -> None:
    (install(folder) / "entry.json").unlink()
    with pytest.raises(WeightsError, match="recorded nowhere") as error:
        create_registered()
    one_line(error)


def test_a_file_is_hashed_again_only_when_its_size_or_time_changed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = install(folder) / "model.safetensors"
    first = files.sha256_checked_before(weights)
    with monkeypatch.context() as patch:
        patch.setattr("hashlib.file_digest", lambda *_: pytest.fail("the file was read again"))
        assert files.sha256_checked_before(weights) == first
    os.utime(weights, ns=(1, 1))
    (files.home() / "hashes.json").write_text("damaged")
    assert files.sha256_checked_before(weights) == first


def test_a_store_that_cannot_be_written_only_costs_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLIT_HOME", "/dev/null/store")
    assert len(files.sha256_checked_before(folder / "model.safetensors")) == 64


def test_the_store_follows_glit_home_then_xdg_cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert files.home() == tmp_path / "home"
    monkeypatch.delenv("GLIT_HOME")
    assert files.home() == tmp_path / "cache" / "glit"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert files.home() == Path.home() / ".cache" / "glit"


# ---- shipped ----


def test_shipped_weights_are_verified_and_come_before_installed_ones(
    folder: Path, saved: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resolve, "SHIPPED", folder.parent)
    entry = register(monkeypatch, saved, file=f"{folder.name}/model.safetensors")
    assert resolve.where(entry) == "shipped"
    assert_is_small(create_registered(), folder)
    register(monkeypatch, saved, file=f"{folder.name}/model.safetensors", sha256="0" * 64)
    with pytest.raises(WeightsError, match=r"refused.*000000000000.*reinstall glit-models") as error:
        create_registered()
    one_line(error)
    register(monkeypatch, saved, file="gone/model.safetensors")
    with pytest.raises(WeightsError, match=r"gone/model.safetensors is missing; reinstall") as error:
        create_registered()


# ---- the Hub ----


def test_weights_are_fetched_from_the_hub_once_then_read_from_the_cache(
    server: HubServer, folder: Path, saved: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    on_hub(server, folder, saved, monkeypatch)
    assert_is_small(create_registered(), folder)
    asked = len(server.requests)
    assert asked > 0
    assert_is_small(create_registered(), folder)
    assert len(server.requests) == asked


def test_offline_the_cache_is_used_and_what_it_lacks_is_said(
    server: HubServer, folder: Path, saved: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    on_hub(server, folder, saved, monkeypatch)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(WeightsError, match="HF_HUB_OFFLINE is set") as error:
        create_registered()
    assert REPO in one_line(error)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    create_registered()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert_is_small(create_registered(), folder)


@pytest.mark.parametrize(
    ("fault", "complaint"),
    [
        ("401", "refused access \\(401\\).*hf auth login"),
        ("403", "refused access \\(403\\)"),
        ("500", "answered with an error \\(500\\); try again later"),
        ("truncate", "cut short"),
        ("corrupt", "refused .*sha256 is .* delete .* and try again"),
    ],
)
def test_a_fault_of_the_hub_is_one_line(
    server: HubServer,
    folder: Path,
    saved: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    fault: Any,
    complaint: str,
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the client waits between its attempts
    on_hub(server, folder, saved, monkeypatch)
    server.fault = fault
    with pytest.raises(WeightsError, match=complaint) as error:
        create_registered()
    one_line(error)


def test_a_repository_revision_or_file_that_is_not_there_is_one_line(server: HubServer) -> None:
    commit = server.add(REPO, {"README.md": b"hello"})
    for repo, revision, filename in (
        ("nobody/nothing", commit, "model.safetensors"),
        (REPO, "0" * 40, "model.safetensors"),
        (REPO, commit, "model.safetensors"),
    ):
        with pytest.raises(WeightsError, match=r"\(404\)") as error:
            download.fetch(repo, filename, revision)
        assert repo in one_line(error)
    with pytest.raises(WeightsError, match="not the name of a Hub repository") as error:
        download.fetch("a//b", "model.safetensors")


@pytest.mark.parametrize("offline", [False, True])
@pytest.mark.parametrize("load", [load_model, open_folder, partial(load_model, any_timm=True)])
def test_a_folder_that_is_not_there_is_not_only_looked_for_on_the_hub(
    server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, load: Callable[[str], Any], offline: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    Path("cats").mkdir()
    for name in ("cats/best", "run1/model"):
        with pytest.raises(WeightsError) as error:
            load(name)
        assert one_line(error).startswith(f"{name}: no such folder here; as NAMESPACE/NAME on the Hub: n")
    for name in ("./model", "runs/", "runs/pets/model", "~/model"):
        with pytest.raises(WeightsError) as error:
            load(name)
        assert one_line(error) == f"{name}: no such folder, and no MODEL.TAG or Hub repository NAMESPACE/NAME either"
    with pytest.raises(WeightsError, match=r"^timm/model_of_cats/\w+\.\w+: not? "):
        load("timm/model_of_cats")


def test_a_server_that_never_answers_is_given_up_in_time(
    server: HubServer, folder: Path, saved: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert download.hub_timeout() < 15
    monkeypatch.setenv("GLIT_HUB_TIMEOUT", "0.5")
    on_hub(server, folder, saved, monkeypatch)
    server.fault = "hang"
    start = time.monotonic()
    with pytest.raises(WeightsError, match=r"could not be reached \(.*(within 0.5 s|timed out)") as error:
        create_registered()
    assert time.monotonic() - start < 5
    assert "HF_ENDPOINT" in one_line(error)


SLOW = [
    ("hang", r"could not be reached \(no answer within 0.5 s\)|timed out"),
    ("slow", r"cut short \(less than 16,384 bytes within 0.5 s\); run it again"),
    ("stall", r"cut short \((less than 16,384 bytes within 0.5 s|.*timed out)"),
    ("429", r"too many requests \(429\); try again in 3600 seconds"),
    ("500", r"answered with an error \(500\); try again later"),
    ("loop", r"could not be reached \(.*redirects"),
    ("reset", r"could not be reached \("),
    ("truncate", "cut short"),
    ("long", "cut short"),
    ("elsewhere", "is not answered by a Hub; check HF_ENDPOINT"),
]


@pytest.mark.parametrize(("fault", "complaint"), SLOW)
def test_every_command_gives_a_faulty_hub_up_in_time_with_one_line(
    server: HubServer, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Any, complaint: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    server.add(REPO, files_of(folder))
    monkeypatch.setenv("GLIT_HUB_TIMEOUT", "0.5" if fault in ("hang", "slow", "stall") else "10")
    server.fault = fault
    for label in ("cat", "dog"):
        for number in range(3):
            path = tmp_path / "images" / label / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8)).save(path)
    images, run = str(tmp_path / "images"), str(tmp_path / "run")
    start = time.monotonic()
    for command in (
        ["predict", images, "--model", REPO],
        ["eval", REPO, images],
        ["finetune", images, "--model", REPO, "--out", run, "--device", "cpu"],
        ["predict", images, "--model", f"hf-hub:{REPO}"],
        ["verify", REPO],
    ):
        assert main(command) == 2
        printed = capsys.readouterr()
        lines = [line for line in (printed.err).splitlines() if line]
        assert len(lines) == 1, printed.err
        assert re.search(complaint, lines[0]), lines[0]
        assert lines[0].startswith(f"glit: {REPO}/")
    assert time.monotonic() - start < 10
    assert not list(tmp_path.rglob("outside*"))


def test_a_model_of_timm_on_the_hub_is_fetched_by_the_same_way(
    server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", lambda *_: pytest.fail("fetched by timm"))
    model = timm.create_model("test_vit", num_classes=1000)
    save_file(model.state_dict(), tmp_path / "weights")
    cfg = timm.get_pretrained_cfg("test_vit")
    server.add(cfg.hf_hub_id, {cfg.hf_hub_filename or "model.safetensors": (tmp_path / "weights").read_bytes()})
    loaded = load_model("test_vit", any_timm=True).model
    torch.testing.assert_close(loaded.state_dict(), model.state_dict())
    timm.models.save_for_hf(model, tmp_path / "saved", safe_serialization=True)
    server.add("somebody/vit", files_of(tmp_path / "saved"))
    torch.testing.assert_close(load_model("hf-hub:somebody/vit", any_timm=True).model.state_dict(), model.state_dict())


def test_a_repository_is_exported_untrained_by_its_configuration_alone(
    server: HubServer, folder: Path, tmp_path: Path
) -> None:
    server.add(REPO, {"config.json": (folder / "config.json").read_bytes()})
    out = tmp_path / "model.onnx"
    assert main(["export", REPO, "--random-weights", "--out", str(out), "--verify", "1", "--provider", "cpu"]) == 0
    assert out.is_file()
    assert not any("safetensors" in path for _, path in server.requests)


def test_a_closed_port_is_reported_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        point_client_at(f"http://127.0.0.1:{taken.getsockname()[1]}", tmp_path, monkeypatch)
        start = time.monotonic()
        with pytest.raises(WeightsError, match="could not be reached") as error:
            download.fetch(REPO, "model.safetensors", "0" * 40)
        assert time.monotonic() - start < 5
    one_line(error)


def test_an_impossible_timeout_is_refused(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLIT_HUB_TIMEOUT", "soon")
    with pytest.raises(WeightsError, match="GLIT_HUB_TIMEOUT must be a positive number of seconds, got 'soon'"):
        download.fetch(REPO, "model.safetensors")
