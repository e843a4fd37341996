"""The authors' state dict among the fixtures, which is stored compressed. No assertions."""

import gzip
from pathlib import Path

import safetensors.torch
from torch import Tensor

FIXTURES = Path(__file__).parent / "fixtures"


def official_bytes() -> bytes:
    """The content of a safetensors file: the authors' GLiT at C = 48, 64 x 64 pixels and 10 classes, all random."""
    return gzip.decompress((FIXTURES / "official_w48_state.safetensors.gz").read_bytes())


def official_state() -> dict[str, Tensor]:
    """Its tensors."""
    return safetensors.torch.load(official_bytes())
