"""GLiT, AutoFormer and other vision transformers found by architecture search. Importing this registers them with timm.

Needs only torch and timm; `glit_models.search` and `glit_models.export` build on it, never the reverse.
"""

import sys
from typing import TYPE_CHECKING

__version__ = "0.2.0"


def _prints_help_alone() -> bool:
    """Whether this process is the `glit` command and only prints its help, which should not wait for torch to load."""
    program, *words = getattr(sys, "argv", None) or [""]
    is_glit = program.endswith("/glit") or (program == "-m" and "glit_models" in sys.orig_argv)
    options = words[: words.index("--")] if "--" in words else words
    return is_glit and not {"-h", "--help", "--version"}.isdisjoint(options)


if TYPE_CHECKING or not _prints_help_alone():
    from .autoformer import (
        AUTOFORMER_BASE,
        AUTOFORMER_SMALL,
        AUTOFORMER_TINY,
        VITAS_A,
        VITAS_B,
        VITAS_C,
        VITAS_E,
        VITAS_F,
        AutoFormer,
        AutoFormerBlock,
        AutoFormerSpec,
        autoformer_base,
        autoformer_small,
        autoformer_tiny,
        vitas_a,
        vitas_b,
        vitas_c,
        vitas_e,
        vitas_f,
    )
    from .cost import count_macs, count_params
    from .entry import create
    from .errors import GlitError, SpecError
    from .families import Family, parse_spec, register_family
    from .glit import (
        GLIT_BASE,
        GLIT_SMALL,
        GLIT_TINY,
        BlockSpec,
        GLiT,
        GLiTSpec,
        convert_official_state_dict,
        glit_base,
        glit_small,
        glit_tiny,
    )
    from .model import SpecTransformer
    from .parts import Part, register_part
    from .spec import Spec

__all__ = [
    "AUTOFORMER_BASE",
    "AUTOFORMER_SMALL",
    "AUTOFORMER_TINY",
    "GLIT_BASE",
    "GLIT_SMALL",
    "GLIT_TINY",
    "VITAS_A",
    "VITAS_B",
    "VITAS_C",
    "VITAS_E",
    "VITAS_F",
    "AutoFormer",
    "AutoFormerBlock",
    "AutoFormerSpec",
    "BlockSpec",
    "Family",
    "GLiT",
    "GLiTSpec",
    "GlitError",
    "Part",
    "Spec",
    "SpecError",
    "SpecTransformer",
    "autoformer_base",
    "autoformer_small",
    "autoformer_tiny",
    "convert_official_state_dict",
    "count_macs",
    "count_params",
    "create",
    "glit_base",
    "glit_small",
    "glit_tiny",
    "parse_spec",
    "register_family",
    "register_part",
    "vitas_a",
    "vitas_b",
    "vitas_c",
    "vitas_e",
    "vitas_f",
]
