"""Reference tensors of the authors' code among the fixtures, which are stored compressed. No assertions."""

import gzip
from pathlib import Path

import safetensors.torch
from torch import Tensor

FIXTURES = Path(__file__).parent / "fixtures"


def reference_bytes(name: str) -> bytes:
    """The content of a safetensors file."""
    return gzip.decompress((FIXTURES / f"{name}.safetensors.gz").read_bytes())


def reference_tensors(name: str) -> dict[str, Tensor]:
    """Its tensors."""
    return safetensors.torch.load(reference_bytes(name))


def official_bytes() -> bytes:
    """The state dict of the authors' GLiT at C = 48, 64 x 64 pixels and 10 classes, all random, as a file."""
    return reference_bytes("official_w48_state")


def official_state() -> dict[str, Tensor]:
    """Its tensors."""
    return reference_tensors("official_w48_state")
