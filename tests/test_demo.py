"""Promises of the page to play with, and of the Space that runs it. gradio itself is played by a few lines."""

import ast
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from PIL import Image

import glit_models
from glit_models import demo
from glit_models.cli import main
from glit_models.weights.files import MULTILABEL


class _Component:
    def __init__(self, *args: Any, **keywords: Any) -> None:
        self.args, self.keywords = args, keywords

    def __enter__(self) -> "_Component":
        return self

    def __exit__(self, *_: object) -> None:
        pass


class _Error(Exception):
    def __init__(self, message: str, print_exception: bool = True) -> None:
        super().__init__(message)


class _Gradio(types.SimpleNamespace):
    """Notes what the page asks for."""

    def __init__(self) -> None:
        super().__init__(made=[], Error=_Error)
        for kind in ("Blocks", "Row", "Textbox", "Markdown", "Label", "Image"):
            setattr(self, kind, self._maker(kind))

    def _maker(self, kind: str) -> Any:
        def make(*args: Any, **keywords: Any) -> Any:
            component = _Component(*args, **keywords)
            component.change = lambda answer, *_, **__: setattr(self, "answer", answer)  # type: ignore[attr-defined]
            component.launch = lambda **options: self._launch(options)  # type: ignore[attr-defined]
            self.made.append((kind, component))
            return component

        return make

    def _launch(self, options: dict[str, Any]) -> Any:
        self.options = options
        raise OSError("Cannot find empty port in range: 1-1")


@pytest.fixture
def gradio(monkeypatch: pytest.MonkeyPatch) -> _Gradio:
    fake = _Gradio()
    monkeypatch.setitem(sys.modules, "gradio", fake)
    return fake


def test_an_image_gets_its_classes_and_what_the_model_looks_at(gradio: _Gradio, model: str, tmp_path: Path):
    demo.make_demo(model, "cpu")
    Image.new("RGB", (60, 40), "red").save(tmp_path / "a.png")
    classes, sheet = gradio.answer(str(tmp_path / "a.png"))
    assert sum(classes.values()) == pytest.approx(1, abs=1e-4)
    assert len(classes) == 10
    assert sheet.width > sheet.height > 50
    assert gradio.answer(None) == (None, None)
    (tmp_path / "b.png").write_bytes(b"<script>no image</script>")
    with pytest.raises(_Error, match="the image: not an image"):
        gradio.answer(str(tmp_path / "b.png"))
    images = [component for kind, component in gradio.made if kind == "Image"]
    assert len(images) == 3  # what is dropped, what is looked at, the blocks
    assert images[0].keywords["image_mode"] is None  # else gradio converts the file, other than the reader does


def test_a_model_of_timm_that_nothing_explains_shows_its_classes_only(
    gradio: _Gradio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(demo, "load_model", lambda name: timm.create_model("mixer_s32_224", num_classes=3))
    demo.make_demo("mixer", "cpu")
    Image.new("RGB", (60, 40), "red").save(tmp_path / "a.png")
    classes, sheet = gradio.answer(str(tmp_path / "a.png"))
    assert (len(classes), sheet) == (3, None)


def test_a_model_of_several_labels_has_probabilities_of_each(
    gradio: _Gradio, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    loaded = demo.load_model(model)
    loaded.problem_type = MULTILABEL
    monkeypatch.setattr(demo, "load_model", lambda name: loaded)
    monkeypatch.setattr(demo, "explain_image", lambda *_: None)
    demo.make_demo(model, "cpu")
    Image.new("RGB", (60, 40), "red").save(tmp_path / "a.png")
    classes, _ = gradio.answer(str(tmp_path / "a.png"))
    assert abs(sum(classes.values()) - 1) > 0.1


def test_what_cannot_be_served_is_one_line(
    gradio: _Gradio, model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    assert main(["demo", "--serve", "--model", model, "--port", "1", "--device", "cpu"]) == 2
    line = "glit: cannot listen on 127.0.0.1: Cannot find empty port in range: 1-1; --port N takes another\n"
    assert capsys.readouterr().err == line
    assert gradio.options["share"] is False
    assert main(["demo", "--port", "1"]) == 2
    assert "--port needs --serve" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["demo", "--serve"]) == 2
    assert "the page needs gradio: pip install" in capsys.readouterr().err


def test_a_space_holds_the_page_the_weights_and_the_package(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    facts = ["--license", "CC0-1.0", "--dataset", "noise", "--origin", "a test"]
    assert main(["publish", model, "--space", "--to-folder", str(tmp_path / "space"), *facts]) == 0
    space = tmp_path / "space"
    _, front, text = (space / "README.md").read_text().split("---\n")
    values = yaml.safe_load(front)
    assert (values["sdk"], values["app_file"], values["license"]) == ("gradio", "app.py", "cc0-1.0")
    assert "(model/README.md)" in text
    ast.parse((space / "app.py").read_text())
    assert json.loads((space / "model" / "config.json").read_text())["architecture"] == "glit_tiny"
    assert any(line.startswith("torch>=") for line in (space / "requirements.txt").read_text().splitlines())
    package = Path(glit_models.__file__).parent
    sources = {path.relative_to(package) for path in package.rglob("*.py")}
    copied = {path.relative_to(space / "glit_models") for path in (space / "glit_models").rglob("*.py")}
    assert {path for path in sources if path.parts[0] not in ("search", "export")} == copied
    assert not list((space / "glit_models").rglob("*.safetensors"))
    torch.testing.assert_close(demo.load_model(str(space / "model")).pos_embed, demo.load_model(model).pos_embed)


def test_a_space_is_uploaded_as_one(model: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    asked: list[tuple[str, dict[str, Any]]] = []

    class Api:
        def create_repo(self, repo: str, **options: Any) -> None:
            asked.append((repo, options))

        def create_commit(self, repo: str, operations: Any, **options: Any) -> Any:
            asked.append((repo, {**options, "paths": [operation.path_in_repo for operation in operations]}))
            return types.SimpleNamespace(oid="0" * 40)

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    facts = ["--license", "CC0-1.0", "--dataset", "noise", "--origin", "a test"]
    assert main(["publish", model, "--space", "--repo", "somebody/small", *facts]) == 0
    (_, made), (_, committed) = asked
    assert (made["repo_type"], made["space_sdk"], committed["repo_type"]) == ("space", "gradio", "space")
    assert {"app.py", "model/model.safetensors", "glit_models/demo.py"} <= set(committed["paths"])
