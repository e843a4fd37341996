"""GLiT, the vision transformer found by architecture search, for timm: importing this registers the models.

The zoo. Needs torch and timm only; `glit_models.search` and `glit_models.export` build on it, never the reverse.
"""

from .checkpoint import convert_official_state_dict
from .cost import count_macs, count_params
from .glit import GLIT_BASE, GLIT_SMALL, GLIT_TINY, glit_base, glit_small, glit_tiny
from .model import GLiT
from .spec import BlockSpec, GLiTSpec

__version__ = "0.1.0"

__all__ = [
    "GLIT_BASE",
    "GLIT_SMALL",
    "GLIT_TINY",
    "BlockSpec",
    "GLiT",
    "GLiTSpec",
    "convert_official_state_dict",
    "count_macs",
    "count_params",
    "glit_base",
    "glit_small",
    "glit_tiny",
]
