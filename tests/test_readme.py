"""The README's Python runs as it stands."""

import re
from pathlib import Path

import pytest

from glit_models.weights import resolve

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_readme_has_its_blocks():
    assert len(BLOCKS) == 3


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("number", range(3))
def test_a_block_of_the_readme_runs_as_it_stands(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    exec(compile(BLOCKS[number], f"README block {number + 1}", "exec"), {})
    assert capsys.readouterr().out


def test_the_readme_states_the_registrys_own_figures():
    entry = resolve.registry()["glit_tiny.fashion_mnist"]
    score = next(metric.value for metric in entry.metrics if metric.source.startswith("glit eval"))
    assert f"{entry.params:,}" in README
    assert f"{score:.2f} % on Fashion-MNIST" in README
