"""Convert a network to a form that exports to a clean graph: the same outputs from fewer and larger operators.

`export_form` does it for any model. A model that is not from this package keeps its layers; for others, `ExportForm`
rebuilds a copy from the model's layers. The changes, and their reasons:

* BatchNorm is folded into convolutions (`timm.utils.reparameterize_model`).
* Tokens are in two dimensions, so that a linear layer is one `Gemm` with its bias.
* Each part converts its module (`Part.flatten`): queries, keys and values come from separate linear layers, as do the
  two halves of a GLU, because splitting one product would copy it.
* A block with several parts splits its channels once instead of slicing them for each part.
* If the head uses only the class token, the last block computes only that token, because the queries and feed-forward
  results of the other tokens would be discarded.

Axes: B batch, N tokens, T = B * N, C channels, K classes.
"""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
from timm.layers import Format
from timm.utils import reparameterize_model
from torch import Tensor, nn

from glit_models import SpecTransformer
from glit_models.block import Block, Mixer
from glit_models.errors import ExportError
from glit_models.parts import ExportOptions, MlpPart, Part

__all__ = ["AttentionKind", "ExportForm", "export_form", "name_in_model", "resize"]

AttentionKind = Literal["operator", "products", "fused"]


class ExportForm(nn.Module):
    """A model for inference on the CPU that returns the same logits and exports to a clean graph. Final.

    Args:
        model: the model; it is not changed.
        attention: 'operator' for ONNX's `Attention` (opset 23), 'products' for two matrix products and a softmax,
            'fused' for torch's operator.
        dtype: of parameters and activations; the logits are float32.
        image_size: height and width, to which the position embedding is resampled; 'dynamic' resamples it in the
            graph; None keeps the model's.

    Raises:
        SpecError: if the image size is not a multiple of the patch size.
        ExportError: if the size is dynamic and a part depends on the grid of tokens.
    """

    def __init__(
        self,
        model: SpecTransformer,
        attention: AttentionKind,
        dtype: torch.dtype = torch.float32,
        image_size: tuple[int, int] | Literal["dynamic"] | None = None,
    ) -> None:
        super().__init__()
        # Folded in float32, because the product of two rounded factors would be rounded again.
        form: SpecTransformer = reparameterize_model(copy.deepcopy(model).cpu().float().eval())
        form.requires_grad_(False)
        form.set_grad_checkpointing(False)
        _set_image_size(form, image_size)
        options = ExportOptions(form.token_grid, attention, dtype)
        real = [index for index, block in enumerate(form.blocks) if isinstance(block, Block)]
        alone = real[-1] if real and form.global_pool == "token" and _ends_in_mlp(form.blocks[real[-1]]) else None
        for index in real:
            block = form.blocks[index]
            assert isinstance(block, Block)
            form.blocks[index] = _FlatBlock(block, options._replace(first_token_alone=index == alone))
        self.has_all_tokens = alone is None  # until the head
        self.form = form.to(dtype)
        self.dtype = dtype

    def forward(self, images: Tensor) -> Tensor:
        """[B, C, H, W] -> logits [B, K]."""
        form = self.form
        x = form._embed(images.to(self.dtype))
        num_tokens = x.shape[1]
        x = x.flatten(0, 1)  # [T, C]
        for block in form.blocks:
            if isinstance(block, _FlatBlock):  # an identity block does nothing
                x = block(x, num_tokens)
        x = form.norm(x)
        if self.has_all_tokens:
            x = form.pool(x.unflatten(0, (-1, num_tokens)))
        return form.head(form.fc_norm(x)).float()


class _OtherForm(nn.Module):
    """A timm model that is not from this package, with BatchNorm folded; takes and returns what `ExportForm` does."""

    def __init__(self, model: nn.Module, dtype: torch.dtype, image_size: tuple[int, int] | None) -> None:
        super().__init__()
        form = reparameterize_model(copy.deepcopy(model).cpu().float().eval()).requires_grad_(False)
        resize(form, image_size)
        self.form, self.dtype = form.to(dtype), dtype

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.form(images.to(self.dtype))
        return logits.float()


def export_form(
    model: nn.Module,
    attention: AttentionKind,
    dtype: torch.dtype = torch.float32,
    image_size: tuple[int, int] | Literal["dynamic"] | None = None,
) -> nn.Module:
    """The form of any timm model; see `ExportForm`.

    Raises:
        ExportError: also if the size is dynamic and the model is not from this package.
    """
    if isinstance(model, SpecTransformer):
        return ExportForm(model, attention, dtype, image_size)
    if image_size == "dynamic":
        raise ExportError("image_size cannot be dynamic for a model of another library; give a height and width")
    return _OtherForm(model, dtype, image_size)


def resize(model: Any, image_size: tuple[int, int] | None) -> None:
    """Adapt a timm model to another height and width, in place; None keeps it. Raises SpecError or ExportError."""
    embed = getattr(model, "patch_embed", None)
    own = getattr(embed, "img_size", None)
    if image_size is None or own is None or tuple(image_size) == tuple(own):
        return  # a network without position embedding takes any size
    try:
        model.set_input_size(image_size)
    except (AttributeError, AssertionError, RuntimeError) as error:
        raise ExportError(f"the model cannot be resized to {image_size[0]} x {image_size[1]}: {error}") from None


def name_in_model(name: str) -> str:
    """The model's name of a module that is called `name` in its `ExportForm`."""
    return f"{name}.".removeprefix("form.").replace(".module.", ".").removesuffix(".")


def _set_image_size(form: SpecTransformer, image_size: tuple[int, int] | Literal["dynamic"] | None) -> None:
    if image_size == "dynamic":
        if form.depends_on_grid:
            raise ExportError(
                f"image_size cannot be dynamic: {', '.join(_kinds_on_grid(form))} depends on the grid of patches; "
                "give a height and width"
            )
        # The settings that `SpecTransformer(dynamic_img_size=True)` makes.
        form.dynamic_img_size = True  # type: ignore[misc]
        form.patch_embed.flatten = False
        form.patch_embed.output_fmt = Format.NHWC
        form.patch_embed.strict_img_size = False
        return
    resize(form, image_size)
    if form.dynamic_img_size:  # fix the size
        form.dynamic_img_size = False  # type: ignore[misc]
        form.patch_embed.flatten = True
        form.patch_embed.output_fmt = Format.NCHW
        form.patch_embed.strict_img_size = True
        form._set_tokens(form.token_grid)  # not the grid of the last images


def _kinds_on_grid(form: SpecTransformer) -> list[str]:
    """The kinds of parts whose modules depend on the grid of patches."""
    kinds: dict[str, None] = {}
    for block in form.blocks:
        if isinstance(block, Block):
            for part, module in block.part_modules():
                if any(hasattr(child, "set_tokens") for child in module.modules()):
                    kinds[part.kind] = None
    return list(kinds)


def _ends_in_mlp(block: nn.Module) -> bool:
    """Whether the part after the second norm treats each token alone, so that the class token needs no other there."""
    return isinstance(block, Block) and isinstance(block.parts.mlp, MlpPart)


class _FlatBlock(nn.Module):
    """A block over [T, C]; with `first_token_alone` it returns the class token of each image, [B, C]."""

    def __init__(self, source: Block, options: ExportOptions) -> None:
        super().__init__()
        parts = source.parts
        assert parts.mlp is not None  # only identity blocks have none
        self.norm1, self.norm2 = source.norm1, source.norm2
        self.mixer = _FlatMixer(source.mixer, parts.mixers, options)
        # After the mixer, all remaining tokens are needed.
        self.mlp = parts.mlp.flatten(source.mlp, options._replace(first_token_alone=False))
        self.alone = options.first_token_alone

    def forward(self, x: Tensor, num_tokens: int) -> Tensor:
        mixed = self.mixer(self.norm1(x), num_tokens)
        if self.alone:
            x = x.unflatten(0, (-1, num_tokens))[:, 0]
            num_tokens = 1
        x = x + mixed
        return x + self.mlp(self.norm2(x), num_tokens)


class _FlatMixer(nn.ModuleDict):
    """The parts of a block over [T, C], each on separate channels."""

    def __init__(self, source: Mixer, parts: tuple[Part, ...], options: ExportOptions) -> None:
        super().__init__({part.slot: part.flatten(source[part.slot], options) for part in parts})
        self.widths = [part.channels for part in parts]

    def forward(self, x: Tensor, num_tokens: int) -> Tensor:
        pieces = x.split(self.widths, dim=-1) if len(self) > 1 else (x,)
        outputs = [module(piece, num_tokens) for module, piece in zip(self.values(), pieces, strict=True)]
        return torch.cat(outputs, dim=-1) if len(outputs) > 1 else outputs[0]
