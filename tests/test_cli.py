"""Tests of the `glit` command: output, exit statuses, and one-line errors."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
from test_publishing import save_official, trained
from weight_folders import SPEC, small_folder, small_model

import glit_models
from glit_models.cli import main, weights
from glit_models.training import Trainer
from glit_models.weights import resolve
from glit_models.weights.publish import convert

CHECKOUT = Path(glit_models.__file__).parents[1]


@pytest.fixture(autouse=True)
def own_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLIT_HOME", str(tmp_path / "home"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "small"
    small_folder(path)
    return path


def run_python(*args: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, *args],
        cwd=cwd,
        env=environment | env,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["finetune", "--help"]])
def test_help_and_version_load_no_torch(words: list[str], tmp_path: Path) -> None:
    script = (
        "import sys; sys.argv = ['/usr/bin/glit', *sys.argv[1:]]; from glit_models.cli import main; main(); "
        "sys.exit(not {'torch', 'timm', 'numpy', 'PIL'}.isdisjoint(sys.modules))"
    )
    done = run_python("-c", script, *words, cwd=tmp_path, PYTHONPATH=os.pathsep.join(sys.path))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: glit" if "--help" in words else f"glit-models {glit_models.__version__}\n")


@pytest.mark.parametrize(
    ("argv", "is_help"),
    [
        (["/usr/bin/glit", "train", "-h"], True),
        (["/usr/bin/glit", "predict", "--", "--help"], False),
        (["/usr/bin/glit", "list"], False),
        (["glit.py", "--help"], False),
        ([], False),
    ],
)
def test_only_the_command_itself_leaves_out_what_importing_the_package_does(
    argv: list[str], is_help: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", argv)
    assert glit_models._prints_help_alone() is is_help


def test_list_names_every_registered_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    table = capsys.readouterr().out
    assert main(["list", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in listed] == [*resolve.registry(), *resolve.outside_cfgs()]
    assert all(row["name"] in table for row in listed)
    assert "76.4 (as published: the authors' repository)" in table


def test_info_of_a_model_adds_up_to_its_parameters_and_macs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "glit_tiny", "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert (info["params"], info["macs"], len(info["blocks"])) == (7_264_456, 1_472_873_280, 12)
    assert main(["info", "glit_tiny.in1k"]) == 0
    table = capsys.readouterr().out
    for number in ("7,264,456", "1,472.87 M", "531,840", "glit convert FILE"):
        assert number in table


def test_info_reads_folders_and_spec_files(tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = tmp_path / "spec.json"
    spec.write_text(SPEC.to_json())
    for model, num_classes, pixels in ((str(folder), 10, 64), (str(spec), 1000, 224)):
        assert main(["info", model, "--json"]) == 0
        info = json.loads(capsys.readouterr().out)
        assert info["spec"] == SPEC.to_dict()
        assert info["params"] == glit_models.count_params(SPEC, num_classes, pixels)


def test_convert_publish_and_verify_follow_each_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, spec = save_official(tmp_path / "official.pth.tar", small_model()), tmp_path / "spec.json"
    spec.write_text(SPEC.to_json())
    out, card = str(tmp_path / "out"), str(tmp_path / "card")
    options = ["--spec", str(spec), "--num-classes", "10", "--img-size", "64"]
    assert main(["convert", str(source), "--model", "glit_tiny", "--out", out, *options]) == 0
    facts = ["--dataset", "none", "--license", "mit", "--metric", "top-1", "9.5", "glit eval"]
    assert main(["publish", out, "--to-folder", card, *facts]) == 0
    assert "local-dir:" in capsys.readouterr().out
    assert main(["verify", card]) == 0
    assert capsys.readouterr().out.count("agrees") == 3
    with open(tmp_path / "card" / "model.safetensors", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x7f")
    assert main(["verify", card]) == 1
    assert "DIFFERS" in capsys.readouterr().out


class _Malice:
    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return (os.mkdir, ("run-by-the-pickle",))


def test_bad_input_is_one_line_and_status_2(
    tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    weights = (folder / "model.safetensors").read_bytes()
    Path("cut.safetensors").write_bytes(weights[:-10])
    Path("bad.pth").write_bytes(pickle.dumps({"model": _Malice()}))
    Path("text.pth").write_text("hello")
    Path("page.pth").write_text("\n<!DOCTYPE html><html><body>Download anyway</body></html>")
    Path("bad.json").write_text(SPEC.to_json().replace('"kernel_size": 31', '"kernel_size": 30', 1))
    Path("empty").mkdir()
    model = ["--model", "glit_tiny"]
    cases = {
        "gone.pth: no such file": ["convert", "gone.pth", *model, "--install"],
        "cut.safetensors: not a whole safetensors file": ["convert", "cut.safetensors", *model, "--install"],
        "page.pth: a web page and no checkpoint": ["convert", "page.pth", *model, "--install"],
        "bad.pth: refused, this pickle": ["convert", "bad.pth", *model, "--install"],
        "text.pth: neither a safetensors file nor a ": ["convert", "text.pth", *model, "--out", "out"],
        "give --install, --out DIR, or both": ["convert", "gone.pth", *model],
        "glit_huge": ["convert", "gone.pth", "--model", "glit_huge", "--out", "out"],
        "blocks[1].kernel_size must be odd and positive, got 30": ["info", "bad.json"],
        "spec file none.json cannot be read": ["info", "none.json"],
        "glit_tiny.nope: no such weights": ["info", "glit_tiny.nope"],
        "resnet: no such model; known: glit_tiny.in1k": ["info", "resnet"],
        "no config.json in this folder": ["info", "empty"],
        "no model.safetensors in this folder": ["verify", "empty"],
        "no such folder, and no MODEL.TAG": ["verify", "no/such/thing"],
        "cut.safetensors: not a weight folder": ["verify", "cut.safetensors"],
        "glit_tiny.in1k: no weights on this machine": ["verify", "glit_tiny.in1k"],
        "it must be NAMESPACE/NAME": ["publish", str(folder), "--repo", "name"],
        "VALUE must be a number, got 'high'": [
            *("publish", str(folder), "--to-folder", "out", "--metric", "top-1", "high", "x"),
        ],
        "--to-package needs --name": ["publish", str(folder), "--to-package"],
    }
    before = sorted(path.name for path in tmp_path.iterdir())
    for complaint, argv in cases.items():
        assert main(argv) == 2, argv
        out, err = capsys.readouterr()
        assert complaint in err
        assert err.startswith("glit: ")
        assert err.count("\n") == 1, err
        assert out == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_wrong_usage_is_status_2_and_help_is_0(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert main(["dance"]) == 2
    assert main(["convert", "--help"]) == 0
    assert "--install" in capsys.readouterr().out


def test_an_interrupt_is_status_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(args: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(weights, "_run_list", interrupt)
    assert main(["list"]) == 130


def test_python_m_glit_models_is_the_command_and_a_reader_that_leaves_is_no_error(tmp_path: Path) -> None:
    command = f'"{sys.executable}" -m glit_models info glit_tiny | true; echo "${{PIPESTATUS[0]}}"'
    done = subprocess.run(
        ["bash", "-c", command],
        env=os.environ | {"PYTHONPATH": str(CHECKOUT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert done.stderr == ""
    assert done.stdout.strip() in ("0", "141")


def test_torch_hub_loads_from_a_checkout_that_is_not_installed(tmp_path: Path) -> None:
    model = trained(timm.create_model("glit_tiny"))
    convert(save_official(tmp_path / "glit_tiny.pth.tar", model), "glit_tiny", install=True)
    script = (
        "import sys, torch\n"
        "sys.path[:] = [path for path in sys.path if path]\n"
        "load = lambda name, **kwargs: torch.hub.load(sys.argv[1], name, source='local', **kwargs)\n"
        "model = load('glit_tiny', pretrained=True, tag='in1k')\n"
        "default = load('glit_tiny', pretrained=True, num_classes=5)\n"
        "print(load('glit_small').num_features, default.num_classes, model.pos_embed.abs().sum().item())\n"
    )
    done = run_python("-c", script, str(CHECKOUT), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    width, num_classes, total = done.stdout.split()
    assert (width, num_classes) == ("384", "5")
    assert float(total) == pytest.approx(model.pos_embed.abs().sum().item(), rel=1e-5)


def test_publish_and_verify_work_through_hf_endpoint_in_a_process_of_their_own(tmp_path: Path, folder: Path) -> None:
    from hub_server import HubServer

    with HubServer() as server:
        env = {
            "HF_ENDPOINT": server.endpoint,
            "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "PYTHONPATH": str(CHECKOUT),
        }
        script = (
            "import sys\n"
            "from glit_models.cli import main\n"
            "status = main(['publish', sys.argv[1], '--repo', 'somebody/small'])\n"
            "sys.exit(status or main(['verify', 'somebody/small']))\n"
        )
        done = run_python("-c", script, str(folder), cwd=tmp_path, **env)
        assert done.returncode == 0, done.stderr
        assert f"hf-hub:somebody/small@{server.head('somebody/small')}" in done.stdout
        assert done.stdout.count("agrees") == 3


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_training_that_a_signal_stopped_exits_as_the_signal_says(
    number: signal.Signals, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Trainer._train_step
    monkeypatch.setattr(Trainer, "_train_step", lambda *args: [os.kill(os.getpid(), number), step(*args)][1])
    recipe = str(Path(__file__).parent / "fixtures" / "tiny.yaml")
    assert main(["train", recipe, "--out", str(tmp_path), "--device", "cpu"]) == status
    assert (tmp_path / "last.pt").is_file()
    assert not (tmp_path / "result.json").exists()


def test_a_run_that_was_stopped_does_not_exit_as_one_that_is_finished(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = str(Path(__file__).parent / "fixtures" / "tiny.yaml")
    command = ["train", recipe, "--out", str(tmp_path), "--device", "cpu"]
    assert main([*command, "--max-minutes", "0"]) == 3
    assert "stopped by the limit of 0 minutes" in capsys.readouterr().err
    for damaged in ("{", "[" * 100_000, "[]"):
        (tmp_path / "result.json").write_text(damaged)
        assert main(command) == 2
        assert f"glit: {tmp_path / 'result.json'} is damaged (" in capsys.readouterr().err
    for other in (command, ["finetune", "pets", "--model", "glit_tiny.fashion_mnist"]):
        assert main([*other, "--max-minutes", "nan"]) == 2
        assert capsys.readouterr() == ("", "glit: --max-minutes must be a number of minutes from 0, got nan\n")
