"""Tests that README and tutorials run, and that statements of the documents about the package hold."""

import importlib.util
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import timm
from documents import blocks_of, run_blocks
from PIL import Image
from test_publishing import save_official, trained

from glit_models.weights import resolve

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DOCS = ROOT / "docs"
DOCUMENTS = [*ROOT.glob("*.md"), *DOCS.rglob("*.md"), *ROOT.glob(".github/**/*.md")]

pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A scratch folder with what a reader has at hand: a few photographs of two kinds."""
    rng = np.random.default_rng(0)
    for name, color in (("cat", (200, 120, 60)), ("dog", (60, 90, 160))):
        (tmp_path / "pets" / name).mkdir(parents=True)
        for number in range(1, 11):
            pixels = np.clip(rng.normal(color, 40, (40, 48, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "pets" / name / f"{number}.jpg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GLIT_HOME", str(tmp_path / "home"))
    return tmp_path


def test_the_readme_shows_its_four_uses() -> None:
    assert [language for language, _, _ in blocks_of(README)] == ["python", "sh", "python", "sh"]
    assert len(README.read_text().split("\n")) <= 130


@pytest.mark.parametrize(
    "number", [0, pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow)]
)
def test_a_block_of_the_readme_runs_as_it_stands(
    number: int, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_blocks([blocks_of(README)[number]], monkeypatch)
    assert capsys.readouterr().out


@pytest.mark.parametrize(
    ("page", "leaves"),
    [
        ("getting-started.md", "pets"),
        ("how-glit-works.md", "pets"),
        ("how-the-search-works.md", "pets"),
        ("tutorials/part.md", "runs/shift/model/model.safetensors"),
        ("tutorials/search.md", "runs/found/report/index.html"),
        pytest.param("tutorials/pets.md", "pets.onnx", marks=pytest.mark.slow),
    ],
)
def test_a_page_runs_as_it_stands(
    page: str, leaves: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    run_blocks(blocks_of(DOCS / page), monkeypatch)
    assert (folder / leaves).exists()
    assert capfd.readouterr().out


@pytest.mark.slow
def test_the_tutorial_about_the_authors_checkpoint_runs_as_it_stands(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_official(folder / "glit_tiny.pth.tar", trained(timm.create_model("glit_tiny")))
    run_blocks(blocks_of(DOCS / "tutorials" / "onnx.md"), monkeypatch)


def test_the_readme_states_the_registrys_own_figures() -> None:
    text = README.read_text()
    entry = resolve.registry()["glit_tiny.fashion_mnist"]
    score = next(metric.value for metric in entry.metrics if metric.source.startswith("glit eval"))
    assert f"{entry.params:,}" in text
    assert f"{score:.2f} % on Fashion-MNIST" in text


@pytest.fixture(scope="module")
def draw() -> Any:
    """The script that draws the figures, as a module."""
    spec = importlib.util.spec_from_file_location("draw", DOCS / "figures" / "draw.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_figures_are_those_that_the_package_draws(draw: Any) -> None:
    for name, figure in draw.FIGURES.items():
        assert ElementTree.fromstring(figure()).tag.endswith("svg")
        assert (DOCS / "figures" / name).read_text() == figure(), f"run python docs/figures/draw.py: {name} is old"


def test_a_chart_shows_the_numbers_of_the_table_below_it(draw: Any) -> None:
    rows = draw.table("search-benchmarks.md", "python -m benchmarks.ablation --threads 1")
    assert len(rows) == 7
    shown = [text.text for text in ElementTree.fromstring(draw.ablation_svg()).iter() if text.text]
    assert all(row["mean"] in shown for row in rows if "±" in row["mean"])


def test_links_between_files_lead_to_files() -> None:
    """Anchors within docs/ are checked by `make docs`."""
    made = {"docs/reference/cli.md"}  # when the site is built
    dead = [
        f"{path.relative_to(ROOT)}: {target}"
        for path in DOCUMENTS
        for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)\s]*)?\)", path.read_text(encoding="utf-8"))
        if not (path.parent / target).exists()
        if str((path.parent / target).resolve().relative_to(ROOT)) not in made
    ]
    assert dead == []
