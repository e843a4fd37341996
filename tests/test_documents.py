"""README and tutorials run as they stand; what documents say of the package holds."""

from pathlib import Path

import numpy as np
import pytest
import timm
from documents import run_document
from PIL import Image
from test_publishing import save_official, trained

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
DOCUMENTS = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]


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


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    ("document", "leaves"),
    [
        ("docs/tutorials/part.md", "runs/shift/model/model.safetensors"),
        ("docs/tutorials/search.md", "runs/found/report/index.html"),
        pytest.param("docs/tutorials/pets.md", "pets.onnx", marks=pytest.mark.slow),
    ],
)
def test_a_document_runs_as_it_stands(
    document: str, leaves: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_document(ROOT / document, monkeypatch) >= 4
    assert (folder / leaves).is_file()
    assert capfd.readouterr().out


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_the_tutorial_about_the_authors_checkpoint_runs_as_it_stands(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_official(folder / "glit_tiny.pth.tar", trained(timm.create_model("glit_tiny")))
    assert run_document(ROOT / "docs/tutorials/onnx.md", monkeypatch) >= 4
