"""Tests of the benchmark of whole networks: its cases, and the counts that the floor is based on."""

import sys
from pathlib import Path

import pytest

from glit_models import GLIT_TINY

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `benchmarks` is no part of the package

from benchmarks import performance


def test_networks_are_shown_beside_each_other_and_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--device", "cpu", "--precisions", "fp32", "--batch-sizes", "1", "--rounds", "1", "--threads", "1"]
    arguments += ["--forms", "conv1d", "--plot", str(tmp_path / "plot.png")]
    monkeypatch.setattr(sys, "argv", ["performance", *arguments])
    performance.main()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| inference | fp32 |")]
    names = [line.split(" | ")[2] for line in lines]
    assert names == ["GLiT-Tiny, plain form", "GLiT-Tiny", "DeiT-Tiny", "GLiT-Tiny, fused", "GLiT-Tiny, conv1d"]
    assert lines[0].split(" | ")[6] == "1.00x"
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_a_device_that_is_not_there_is_said_in_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["performance", "--device", "nowhere"])
    with pytest.raises(SystemExit, match="2"):
        performance.main()
    assert "error: argument --device: device 'nowhere' cannot be used here" in capsys.readouterr().err


def test_the_memory_floor_counts_every_operand_once() -> None:
    one = {"num_heads": 3, "embed_dim": 192, "patch_size": 16}
    attending, convolving = (
        type(GLIT_TINY)(blocks=(block,), **one) for block in (GLIT_TINY.blocks[0], GLIT_TINY.blocks[1])
    )
    assert attending.blocks[0].num_local_heads == 0
    assert convolving.blocks[0].num_global_heads == 0
    hidden = int(192 * attending.blocks[0].mlp_ratio)
    inner = int(192 * attending.blocks[0].qkv_ratio)
    feed_forward = 192 + hidden + hidden + 192 + 192
    assert performance.activations(attending) == 197 * (192 + 3 * inner + 4 * inner + inner + 2 * 192 + feed_forward)
    wide = 192 * convolving.blocks[0].expand_ratio
    hidden = int(192 * convolving.blocks[0].mlp_ratio)
    feed_forward = 192 + hidden + hidden + 192 + 192
    assert performance.activations(convolving) == 197 * (192 + 2 * wide + 3 * wide + wide + 2 * 192 + feed_forward)
