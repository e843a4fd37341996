"""The family `autoformer`, whichever way it is there; until the zoo registers it, a stand-in with one network."""

from typing import Any

from glit_models.families import FAMILIES

__all__ = ["autoformer_tiny"]


def autoformer_tiny(pretrained: bool = False, **kwargs: Any) -> Any:
    """AutoFormer-T, for as long as the zoo has no entry point for it."""
    return create("autoformer_tiny", FAMILIES["autoformer"], pretrained, **kwargs)


if "autoformer" not in FAMILIES:
    from timm.models import generate_default_cfgs, register_model

    from glit_models.autoformer.spec import AutoFormerBlock, AutoFormerSpec
    from glit_models.families import Family, create, register_family
    from glit_models.model import SpecTransformer

    class AutoFormer(SpecTransformer):
        """Mean of the patches after the final norm."""

        spec_class = AutoFormerSpec
        norm_eps = 1e-5

        def __init__(self, spec: Any, global_pool: str = "avg", fc_norm: bool = False, **kwargs: Any) -> None:
            super().__init__(spec, global_pool=global_pool, fc_norm=fc_norm, **kwargs)

    _HEADS = (3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 4, 3, 3)
    _RATIOS = (3.5, 3.5, 3.0, 3.5, 3.0, 3.0, 4.0, 4.0, 3.5, 4.0, 3.5, 4.0, 3.5)
    _blocks = tuple(AutoFormerBlock(heads, ratio) for heads, ratio in zip(_HEADS, _RATIOS, strict=True))
    register_family(
        Family("autoformer", AutoFormerSpec, AutoFormer, {"autoformer_tiny": AutoFormerSpec(_blocks, embed_dim=192)})
    )
    default_cfgs = generate_default_cfgs(
        {"autoformer_tiny": {"input_size": (3, 224, 224), "num_classes": 1000, "pool_size": None,
                             "first_conv": "patch_embed.proj", "classifier": "head",
                             "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}}
    )  # fmt: skip
    register_model(autoformer_tiny)
