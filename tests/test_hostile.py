"""Tests of hostile input: bombs, damage and nonsense end in a one-line error, in little time and memory."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import fuzz
import pytest
import torch
from glit_models.search import load_search_recipe, load_space
from glit_models.search.executors.tasks import read_json
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from weight_folders import small_folder, small_model

import glit_models
from glit_models import BlockSpec, GLiTSpec, activations, parse_spec
from glit_models.cli import main
from glit_models.errors import GlitError, SpecError, WeightsError
from glit_models.reading import parse_json, parse_yaml
from glit_models.recipes import parse_overrides
from glit_models.runs import files, memory
from glit_models.training import load_recipe, setup
from glit_models.training.recipe import OptimSection
from glit_models.weights.files import read_state_dict

LAUGHS = "\n".join(
    ["a: &a [x, x, x, x, x, x, x, x, x]"]
    + [f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]" for a, b in zip("abcdefgh", "bcdefghi", strict=True)]
)
IMAGE = Path(glit_models.__file__).parent / "data" / "images" / "test-00000.png"
BLOCK = {"num_global_heads": 1, "num_local_heads": 0, "mlp_ratio": 1, "qkv_ratio": 1}


@pytest.fixture(autouse=True)
def bounds() -> Iterator[None]:
    """No test here may take more than seconds, or 200 MB more than the process has had before."""
    start, memory_before = time.thread_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert time.thread_time() - start < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory_before < 200_000


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (LAUGHS, "holds more than 100,000 values"),
        ("a: &a [*a]", "nested more than 50 deep"),
        ("a: " + "[" * 3000, "nested more than 50 deep|not valid YAML"),
        ("a: " + "{a: " * 60 + "1" + "}" * 60, "nested more than 50 deep"),
        ("a: 2001-99-99", "not valid YAML: month must be in 1..12"),
        ("a: " + "9" * 5000, "not valid YAML: Exceeds the limit"),
        ("a: [" + "1, " * 100_000 + "]", "longer than 65,536 characters"),
        ("? [a]\n: b", "not valid YAML: while constructing a mapping"),
        ("a: !!python/object/apply:os.system [true]", "could not determine a constructor"),
    ],
)
def test_a_recipe_or_space_that_is_a_bomb_is_one_line(tmp_path: Path, text: str, complaint: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    for load in (load_recipe, load_search_recipe, load_space):
        with pytest.raises(GlitError, match=complaint) as error:
            load(str(path))
        assert "\n" not in str(error.value)
        assert len(str(error.value)) < 500 + len(str(path))


def test_an_override_that_is_a_bomb_is_text_or_one_line() -> None:
    assert parse_overrides(["a=2001-99-99"]) == {"a": "2001-99-99"}
    with pytest.raises(GlitError, match="is not a YAML value") as error:
        parse_overrides(["a=" + "[" * 60_000])
    assert len(str(error.value)) < 300


@pytest.mark.parametrize("text", ["[" * 100_000, "[" * 60 + "]" * 60, "[" + "0," * 100_001 + "0]", "9" * 5000, '{"a"'])
def test_json_is_bounded_as_well(text: str) -> None:
    with pytest.raises(ValueError, match="nested more than 50 deep|holds more than 100,000 values|not valid JSON"):
        parse_json(text)


def test_a_file_of_a_search_that_is_nested_without_end_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "winner.json").write_text("[" * 100_000)
    with pytest.raises(GlitError, match=r"winner.json is damaged \(maximum recursion depth") as error:
        read_json(tmp_path / "winner.json")
    assert "\n" not in str(error.value)


def test_yaml_that_repeats_itself_a_little_is_read() -> None:
    assert parse_yaml("a: &a {b: 1}\nc: [*a, *a]") == {"a": {"b": 1}, "c": [{"b": 1}, {"b": 1}]}


MANY = {"num_global_heads": [1], "num_local_heads": [0], "mlp_ratios": list(range(1, 60001)), "qkv_ratios": [1]}


@pytest.mark.parametrize(
    ("space", "complaint"),
    [
        ({"space": "glit", "depth": 10**9}, "depth must be at most 1000, got 1000000000"),
        ({"space": "glit", "num_heads": 10**9}, "num_heads must be at most 65536"),
        ({"space": "glit", "embed_dim": 10**30, "num_heads": 1}, "embed_dim must be at most 65536"),
        ({"space": "autoformer_tiny", "depth": [10**9]}, "blocks must describe depth=1000000000 blocks, got 1000"),
        ({"embed_dim": 8, "num_heads": 1, "blocks": [{"repeat": 10**9, "choices": []}]}, "repeat must be .* to 1000"),
        ({"space": "glit", "kernel_sizes": list(range(1, 60001, 2))}, "at most 100,000 combinations, got 3,240,000"),
        ({"embed_dim": 8, "num_heads": 1, "blocks": [{"choices": [MANY, {**MANY, "qkv_ratios": [2]}]}]}, "got 120,000"),
    ],
)
def test_a_space_is_bounded_before_it_is_written_out(space: dict[str, object], complaint: str) -> None:
    with pytest.raises(GlitError, match=complaint):
        load_space(space)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"blocks": [BLOCK] * 100_000}, "blocks must hold at most 1000 blocks, got 100000"),
        ({"embed_dim": 10**30}, "embed_dim must be at most 65536, got 1000000"),
        (
            {"num_heads": 10**4000},
            r"num_heads must be at most 65536, got 1000000000000000000000000000000000000000\.\.\.",
        ),
        ({"blocks": [BLOCK | {"mlp_ratio": 1e300}]}, "mlp_ratio must be at most 65536, got 1e"),
    ],
)
def test_a_spec_is_bounded(change: dict[str, object], complaint: str) -> None:
    with pytest.raises(SpecError, match=complaint):
        parse_spec({"embed_dim": 8, "num_heads": 1, "blocks": [BLOCK]} | change)


def test_a_network_that_does_not_fit_into_memory_is_refused_before_it_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import timm

    spec = GLiTSpec((BlockSpec(1, 0, 4, 1),) * 1000, 65536, 1)
    with pytest.raises(SpecError, match=r"the parameters take 206,\d+ GB, and this machine has"):
        timm.create_model("glit_tiny", spec=spec)
    for keywords in ({"num_classes": 10**12}, {"img_size": 16 * 10**6}):
        with pytest.raises(SpecError, match="take a smaller network, image or number of classes"):
            timm.create_model("glit_tiny", **keywords)
    with torch.device("meta"):
        assert timm.create_model("glit_tiny", num_classes=10**9).head.weight.is_meta
    assert 10**6 < memory.free_memory() < 1 << 62
    for name, text in (("max", "9000\n"), ("current", "8500\n"), ("stat", "anon 1\nactive_file 70\ninactive_file 7\n")):
        (tmp_path / f"memory.{name}").write_text(text)
    monkeypatch.setattr(memory, "_GROUP", tmp_path)
    assert memory.free_memory() == 577


def test_an_archive_that_is_a_bomb_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "bomb.pth"
    torch.save({"model": {"a": torch.zeros(1000)}}, path)
    with zipfile.ZipFile(path) as stored:
        members = {name: stored.read(name) for name in stored.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as compressed:
        for name, content in members.items():
            compressed.writestr(name, content)
    with pytest.raises(WeightsError, match="this archive is compressed, which torch.save never does"):
        read_state_dict(path)


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        (torch.zeros(1).expand(10**12), "'a' has 1,000,000,000,000 numbers, of which the file holds fewer"),
        (torch.eye(3).to_sparse(), "'a' must be a dense tensor, got torch.sparse_coo on cpu"),
        (torch.zeros(3, device="meta"), "'a' must be a dense tensor, got torch.strided on meta"),
        ("text", "no state dict found"),
    ],
)
def test_a_tensor_is_dense_and_of_the_size_of_its_file(tmp_path: Path, value: object, complaint: str) -> None:
    torch.save({"a": value}, tmp_path / "x.pth")
    with pytest.raises(WeightsError, match=complaint):
        read_state_dict(tmp_path / "x.pth")


# ---- weight folders ----


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "small"
    small_folder(path)
    return path


CONFIG_DAMAGE = [
    ("pretrained_cfg.interpolation", "evil"), ("pretrained_cfg.interpolation", ["bicubic"]),
    ("pretrained_cfg.input_size", [3, 64]), ("pretrained_cfg.input_size", "3x64x64"),
    ("pretrained_cfg.input_size", [3, 10**9, 10**9]), ("pretrained_cfg.mean", [0.5, "x", 0.5]),
    ("pretrained_cfg.std", [0.5] * 4), ("pretrained_cfg.std", [0, 0, 0]), ("pretrained_cfg.mean", 3),
    ("pretrained_cfg.crop_pct", -1), ("pretrained_cfg.crop_pct", "1"), ("pretrained_cfg.crop_mode", {}),
    ("pretrained_cfg.crop_pct", 1e-3), ("pretrained_cfg.input_size", [3, 16384, 16384]),
    ("num_classes", "ten"), ("num_classes", -1), ("num_classes", 10**30), ("label_names", 3),
    ("label_names", [1] * 10), ("architecture", ["glit_tiny"]), ("architecture", None), ("pretrained_cfg", []),
    ("model_args", 3), ("model_args.spec", {}), ("model_args.spec.embed_dim", 10**12), ("model_args.img_size", "big"),
    ("model_args.img_size", 10**9), ("model_args.evil", 1), ("model_args.global_pool", "evil"),
    ("model_args.in_chans", -3), ("model_args.drop_rate", "x"), ("model_args.spec.blocks", [[]]),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), CONFIG_DAMAGE)
def test_a_damaged_configuration_is_one_line(
    folder: Path, tmp_path: Path, key: str, value: object, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(folder, tmp_path / "x")
    config = json.loads((folder / "config.json").read_text())
    *parents, last = key.split(".")
    place = config
    for name in parents:
        place = place[name]
    place[last] = value
    (tmp_path / "x" / "config.json").write_text(json.dumps(config))
    assert main(["predict", str(IMAGE), "--model", str(tmp_path / "x"), "--device", "cpu"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("glit: ")
    assert err.count("\n") == 1
    assert len(err) < 1000


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused_by_whatever_reads_them(
    folder: Path, tmp_path: Path, value: float, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(folder, tmp_path / "x")
    weights = load_file(folder / "model.safetensors")
    weights["head.bias"][3] = value
    save_file(weights, tmp_path / "x" / "model.safetensors")
    source = str(tmp_path / "x")
    for command in (
        ["publish", source, "--to-folder", str(tmp_path / "out")],
        ["predict", str(IMAGE), "--model", source],
    ):
        assert main(command) == 2
        assert "'head.bias' holds values that are not finite" in capsys.readouterr().err
    assert main(["verify", source]) == 1
    assert not (tmp_path / "out").exists()
    assert main(["publish", str(folder), "--to-folder", source, "--metric", "top1", str(value), "somewhere"]) == 2
    assert f"--metric 'top1': VALUE must be a number, got '{value}'" in capsys.readouterr().err


def test_what_is_written_is_the_same_byte_for_byte(folder: Path, tmp_path: Path) -> None:
    for number in range(4):
        small_folder(tmp_path / str(number))
        for path in folder.iterdir():
            assert (tmp_path / str(number) / path.name).read_bytes() == path.read_bytes(), path.name
    with safe_open(folder / "golden.safetensors", framework="pt") as file:
        assert set(file.metadata()) == {"format", "weights_sha256"}


# ---- memory ----


def test_memory_is_counted_without_taking_it() -> None:
    import timm

    model, shape = timm.create_model("glit_tiny", spec=fuzz.SPEC, img_size=16, num_classes=3).eval(), (2, 3, 16, 16)
    saved: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.train()(torch.zeros(shape))
    inference, training = (activations.count_bytes(model, shape, training=each) for each in (False, True))
    parameters = sum(4 * each.numel() for each in model.parameters())
    assert sum(saved.values()) - parameters < training < 3 * sum(saved.values())
    assert 4 * 2 * 3 * 16 * 16 < inference < training
    assert 10**9 * 4 * 3 * 16 * 16 < activations.count_bytes(model, (10**9, *shape[1:])) < 10**9 * inference / 2
    assert model.training
    model = timm.create_model("glit_tiny", spec={**fuzz.SPEC, "blocks": 4 * fuzz.SPEC["blocks"]}, img_size=32)
    training = activations.count_bytes(model, (9, 3, 32, 32), training=True)
    model.set_grad_checkpointing()
    assert activations.count_bytes(model, (9, 3, 32, 32), training=True) < 0.8 * training


MEMORY = [
    ["predict", "IMAGES", "--model", "MODEL"], ["eval", "MODEL", "IMAGES"], ["export", "MODEL", "--out", "OUT.onnx"],
    ["finetune", "IMAGES", "--model", "MODEL", "--out", "OUT", "--img-size", "64", "--device", "cpu"],
    ["publish", "MODEL", "--to-folder", "OUT"], ["convert", "WEIGHTS", "--model", "glit_tiny", "--spec", "SPEC",
     "--img-size", "64", "--num-classes", "10", "--out", "OUT"],
]  # fmt: skip


@pytest.mark.parametrize("command", MEMORY, ids=lambda command: command[0])
def test_what_does_not_fit_into_memory_is_refused_before_it_is_made(
    command: list[str],
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for number in range(12):
        path = tmp_path / "images" / f"class {number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(IMAGE, path)
    (tmp_path / "spec.json").write_text(small_model().spec.to_json())
    places = {"IMAGES": tmp_path / "images", "MODEL": folder, "OUT": tmp_path / "out"}
    places |= {"WEIGHTS": folder / "model.safetensors", "SPEC": tmp_path / "spec.json"}
    monkeypatch.setattr(activations, "free_memory", lambda: 40_000)
    words = [str(places[word]) if word in places else word.replace("OUT", str(tmp_path / "out")) for word in command]
    assert main(words) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("glit:")]
    assert len(lines) == 1
    assert re.search(r"glit: [\d,]+ images? of 64 x 64 pixels need 0.\d GB of memory, .* (take|give)", lines[0])
    assert not list(tmp_path.glob("out*"))


def test_a_large_image_and_fused_attention_take_no_matrix_of_all_pairs_of_tokens() -> None:
    import timm

    model = timm.create_model("vit_tiny_patch16_224", img_size=2048, depth=1, embed_dim=48, num_heads=1)
    assert activations.count_bytes(model, (1, 3, 2048, 2048)) < 4 * 16385**2 / 2


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")]
)
def test_memory_that_is_short_nevertheless_is_one_line(
    error: Exception, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def short(*_: object) -> None:
        raise error

    monkeypatch.setattr("glit_models.predict.Classifier.probabilities", short)
    assert main(["predict", str(IMAGE), "--model", str(folder), "--device", "cpu"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("glit: memory is short (")
    assert err.endswith("a smaller batch, image or network takes less\n")


# ---- what killed processes leave ----


def test_a_killed_process_leaves_no_folder_among_the_temporary_files_for_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    child = os.fork()
    if not child:
        with files.temporary_folder() as left:
            (left / "model.safetensors").write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert len(list(tmp_path.rglob("model.safetensors"))) == 1
    files._remove_abandoned.cache_clear()
    with files.temporary_folder() as one, files.temporary_folder() as two:
        assert {one, two} == set(tmp_path.iterdir())
    assert not list(tmp_path.iterdir())


def test_what_killed_processes_left_is_removed_by_the_next_that_writes_there(tmp_path: Path) -> None:
    child = subprocess.Popen(["true"])
    child.wait()
    left, living = (tmp_path / f".model.{files._HOST}.{pid}.tmp" for pid in (child.pid, os.getppid()))
    for path in (left, living):
        path.mkdir()
        (path / "model.safetensors").write_bytes(b"half")
    other = tmp_path / f".model.another.{child.pid}.tmp"
    other.write_bytes(b"of another machine")
    files._remove_abandoned.cache_clear()
    files.write_text(tmp_path / "result.json", "{}")
    assert not left.exists()
    assert living.exists()
    assert other.exists()
    files.write_text(tmp_path / ("x" * 250), "a long name")


# ---- chance ----


def test_damage_drawn_at_random_is_read_or_refused() -> None:
    counts, wrong = fuzz.run(seed=int(os.environ.get("FUZZ_SEED", "0")), cases=160, seconds=15)
    assert not wrong, "\n".join(wrong)
    assert counts.total() > 15


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("model.drop_path_rate=1.5", "model.drop_path_rate must be from 0 to below 1, got 1.5"),
        ("data.std=[1, 1, 1, 1]", "data.std must be one positive value or three, or null, got (1.0, 1.0, 1.0, 1.0)"),
        ("data.std=[0]", "data.std must be one positive value or three, or null, got (0.0,)"),
        ("augment.mixup=-1", "augment.mixup must be at least 0, got -1.0"),
        ("model.img_size_shares={64: .inf}", "model.img_size_shares.64 must be a finite number, got inf"),
        ("seed=-1", "seed must be from 0 to below 2^63, got -1"),
        ("seed=" + "9" * 30, "seed must be from 0 to below 2^63, got 999"),
        ("optim.lr=nan", "optim.lr must be a finite number, got 'nan'"),
        ("optim.lr=" + "9" * 400, "optim.lr must be of type float, got 999"),
    ],
)
def test_a_number_of_a_recipe_that_cannot_be_is_named(override: str, complaint: str) -> None:
    with pytest.raises(GlitError) as error:
        load_recipe("smoke", [override])
    assert str(error.value).startswith(complaint)


@pytest.mark.parametrize("option", ["--batch", "--image-size"])
@pytest.mark.parametrize("number", ["9" * 5000, "9" * 30, "999999999"])
def test_a_number_of_an_export_that_cannot_be_is_one_line(
    folder: Path, tmp_path: Path, option: str, number: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(folder), "--out", str(tmp_path / "x.onnx"), option, number]) == 2
    err = capsys.readouterr().err
    assert err.startswith(("glit: --batch must be", "glit: --image-size must be", "glit: img_size must be"))
    assert err.count("\n") == 1
    assert len(err) < 200


def test_an_empty_name_of_a_model_is_said_to_be_empty(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", str(IMAGE), "--model", ""]) in (0, 2)
    for command in (["eval", "", str(tmp_path)], ["info", ""], ["verify", ""]):
        assert main(command) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_timm_says_nothing_of_a_run_of_one_step(caplog: pytest.LogCaptureFixture) -> None:
    optimizer = torch.optim.SGD(torch.nn.Linear(1, 1).parameters())
    assert setup.create_schedule(optimizer, OptimSection(epochs=1), steps_per_epoch=1).t_initial == 1
    assert not caplog.records
