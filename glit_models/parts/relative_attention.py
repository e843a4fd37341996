"""Self-attention with learned relative positions in keys and values, as in AutoFormer.

Axes: B batch, N tokens, T = B * N, C channels, H heads, D head width, h/w height and width of the grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import MultiHeadPart
from .flat import FlatAttention, attend, first_token, split_qkv
from .part import BuildOptions, ExportOptions, Slice, TokenGrid, count_linear_params

__all__ = ["RelativeAttention", "RelativeAttentionPart", "RelativePosition"]


@dataclass(frozen=True)
class RelativeAttentionPart(MultiHeadPart):
    """Self-attention whose keys and values depend on the distance between two patches.

    Attributes:
        max_distance: larger distances, in rows or columns, are clamped to this; None for no relative positions.
        scale_width: scores are divided by the square root of this; None for D.

    Source: AutoFormer (arXiv 2107.00651); relative positions of Shaw et al. (arXiv 1803.02155) in two dimensions.
    """

    kind: ClassVar[str] = "relative_attention"
    slot: ClassVar[str] = "attn"
    color: ClassVar[str] = "#2f6db5"

    max_distance: int | None = None
    scale_width: int | None = None

    @property
    def num_rows(self) -> int:
        """Rows of each table: distances from -max_distance to max_distance, and one for prefix tokens."""
        return 0 if self.max_distance is None else 2 * self.max_distance + 2

    @property
    def num_params(self) -> int:
        """Parameters of qkv, output projection and the four tables."""
        return super().num_params + 4 * self.num_rows * self.head_dim

    def num_macs(self, tokens: TokenGrid) -> int:
        """Multiply-adds as without relative positions, plus those of the products with them."""
        products = 0 if self.max_distance is None else 2 * tokens.num_tokens**2 * self.num_heads * self.head_dim
        return super().num_macs(tokens) + products

    def build(self, options: BuildOptions) -> nn.Module:
        """Build a `RelativeAttention`."""
        return RelativeAttention(self, options)

    @classmethod
    def covering(cls, parts: Sequence[RelativeAttentionPart]) -> RelativeAttentionPart:
        """The largest part; parts with relative positions must have the same head width and distance."""
        distance = parts[0].max_distance
        if len({part.max_distance for part in parts}) > 1 or (
            distance is not None and len({part.head_dim for part in parts}) > 1
        ):
            raise NotImplementedError(
                "relative_attention shares weights only at equal distance and, with relative positions, head width"
            )
        widest = max(parts, key=lambda part: part.num_heads * part.head_dim)
        return cls(max(part.channels for part in parts), widest.num_heads, widest.head_dim, distance)

    @classmethod
    def covering_private_qk(cls, parts: Sequence[RelativeAttentionPart]) -> RelativeAttentionPart:
        """See `PrivateQKStore`."""
        whole, heads = cls.covering(parts), tuple(sorted({part.num_heads for part in parts}))
        return PrivateQKStore(whole.channels, whole.num_heads, whole.head_dim, whole.max_distance, None, heads)

    def slices(self, whole: RelativeAttentionPart) -> dict[str, Slice | tuple[Slice, ...]]:
        """The first channels, and the first H * D rows of each of query, key and value.

        With relative positions, the bias of qkv is the first 3 * H * D values of the larger one, split in three, so H
        determines whether a value belongs to query, key or value. AutoFormer's released weights were trained this way.
        """
        C, inner, of_whole = self.channels, self.num_heads * self.head_dim, whole.num_heads * whole.head_dim
        slices: dict[str, Slice | tuple[Slice, ...]] = {
            "qkv.weight": whole.qkv_slices(self, (inner, C), (of_whole, whole.channels)),
            "qkv.bias": whole.qkv_slices(self, (inner,), (of_whole,)),
            "proj.weight": Slice.first((C, inner), (whole.channels, of_whole)),
            "proj.bias": Slice.first((C,), (whole.channels,)),
        }
        if self.max_distance is not None:
            if type(whole) is RelativeAttentionPart:
                slices["qkv.bias"] = Slice.first((3 * inner,), (3 * of_whole,))
            table = Slice.first((self.num_rows, self.head_dim), (whole.num_rows, whole.head_dim))
            slices |= {f"position_{of}.{axis}": table for of in ("k", "v") for axis in ("vertical", "horizontal")}
        return slices

    def qkv_slices(
        self, part: RelativeAttentionPart, shape: tuple[int, ...], whole: tuple[int, ...]
    ) -> Slice | tuple[Slice, ...]:
        """The slices that a smaller part takes of this one's queries, keys and values.

        Args:
            part: the smaller part.
            shape: shape of each of the smaller part's three.
            whole: shape of each of this part's.
        """
        return _rows((0, 3), 3, shape, whole)

    def flatten(self, module: nn.Module, options: ExportOptions) -> nn.Module:
        """The flat form: one attention operator, whose keys and values have more channels for rows and columns."""
        assert isinstance(module, RelativeAttention)
        return FlatAttention(module, options) if self.max_distance is None else _FlatRelative(module, options)

    def mixing(self, module: Any, x: Tensor) -> Tensor:
        """The attention weights of each head."""
        weights, _ = module.weigh(x)
        return weights


@final
@dataclass(frozen=True)
class PrivateQKStore(RelativeAttentionPart):
    """The weights of a supernet's attention with separate queries and keys for each number of heads; in no network.

    Values and output projections are shared (ViTAS, arXiv 2106.13700). The rows of qkv are the queries and keys of the
    fewest heads, then those of the next number, and so on; last the values.

    Attributes:
        private_heads: the numbers of heads, ascending.
    """

    private_heads: tuple[int, ...] = ()

    @property
    def num_params(self) -> int:
        """Parameters of all queries and keys, values, output projection and the four tables."""
        inner, num_more = self.num_heads * self.head_dim, 2 * (len(self.private_heads) - 1)
        return super().num_params + num_more * count_linear_params(self.channels, inner)

    @property
    def key(self) -> str:
        """The sizes as one word."""
        positions = "" if self.max_distance is None else f"-{self.max_distance}"
        return f"{self.num_heads}-{self.head_dim}{positions}-qk-{'-'.join(map(str, self.private_heads))}"

    def build(self, options: BuildOptions) -> nn.Module:
        """Build a module with these weights, which cannot be called."""
        module = RelativeAttention(self, options)
        rows = (2 * len(self.private_heads) + 1) * self.num_heads * self.head_dim
        module.qkv = nn.Linear(self.channels, rows, **options.factory)
        return module

    def qkv_slices(
        self, part: RelativeAttentionPart, shape: tuple[int, ...], whole: tuple[int, ...]
    ) -> tuple[Slice, ...]:
        """See `RelativeAttentionPart`."""
        place, values = 2 * self.private_heads.index(part.num_heads), 2 * len(self.private_heads)
        return tuple(
            _rows(groups, values + 1, shape, whole) for groups in ((place, place + 2), (values, values + 1))
        )  # fmt: skip


def _rows(groups: tuple[int, int], num_groups: int, shape: tuple[int, ...], whole: tuple[int, ...]) -> Slice:
    """The first rows and channels of these groups of rows."""
    box = (groups, *((0, size) for size in shape))
    num_rows = (groups[1] - groups[0]) * shape[0]
    return Slice((num_groups, *whole), box, (num_rows, *shape[1:]), num_fixed=1)


@final
class RelativePosition(nn.Module):
    """Vectors of width D for every pair of tokens: the sum of one for the vertical and one for the horizontal distance.

    Every pair with a prefix token uses row 0 of both tables.
    """

    def __init__(self, part: RelativeAttentionPart, options: BuildOptions) -> None:
        super().__init__()
        assert part.max_distance is not None
        self.max_distance = part.max_distance
        self.vertical = nn.Parameter(torch.empty(part.num_rows, part.head_dim, **options.factory))
        self.horizontal = nn.Parameter(torch.empty(part.num_rows, part.head_dim, **options.factory))
        self.rows: Tensor
        self.columns: Tensor
        self.set_tokens(options.tokens)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise with a truncated normal distribution of standard deviation 0.02."""
        for table in (self.vertical, self.horizontal):
            nn.init.trunc_normal_(table, std=0.02)

    @torch.jit.ignore
    def set_tokens(self, tokens: TokenGrid) -> None:
        """Set the grid of the following images."""
        patches = torch.arange(tokens.num_patches, device=self.vertical.device)
        for name, place in (("rows", patches // tokens.width), ("columns", patches % tokens.width)):
            index = F.pad(_distance(place, self.max_distance), (tokens.num_prefix, 0, tokens.num_prefix, 0))
            self.register_buffer(name, index, persistent=False)  # [N, N]

    def by_axis(self, tokens: TokenGrid) -> tuple[Tensor, Tensor, Tensor]:
        """The vectors of a grid by axis: vertical [h, h, D], horizontal [w, w, D], and that of prefix tokens [D]."""
        vertical, horizontal = (
            table[_distance(torch.arange(length), self.max_distance)]
            for table, length in ((self.vertical, tokens.height), (self.horizontal, tokens.width))
        )
        return vertical, horizontal, self.vertical[0] + self.horizontal[0]

    def forward(self) -> Tensor:
        """[N, N, D]: the vector of token j relative to token i."""
        # An embedding, because its backward pass is faster than that of indexing.
        return F.embedding(self.rows, self.vertical) + F.embedding(self.columns, self.horizontal)


@final
class RelativeAttention(nn.Module):
    """softmax((q k^T + q R_k^T) / sqrt(D)) (v + R_v), then the output projection; R_k, R_v are shared by the heads."""

    def __init__(self, part: RelativeAttentionPart, options: BuildOptions) -> None:
        super().__init__()
        dd, inner = options.factory, part.num_heads * part.head_dim
        self.num_heads, self.head_dim = part.num_heads, part.head_dim
        self.scale = (part.scale_width or part.head_dim) ** -0.5
        self.qkv = nn.Linear(part.channels, 3 * inner, **dd)
        self.proj = nn.Linear(inner, part.channels, **dd)
        has_positions = part.max_distance is not None
        self.position_k = RelativePosition(part, options) if has_positions else None
        self.position_v = RelativePosition(part, options) if has_positions else None
        self.attn_drop = nn.Dropout(options.attn_drop)
        self.proj_drop = nn.Dropout(options.proj_drop)

    def weigh(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[B, N, C] -> attention weights [B, H, N, N], and values [B, H, N, D]."""
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)
        q = q * self.scale  # [B, H, N, D], as k and v
        scores = q @ k.transpose(-2, -1)  # [B, H, N, N]
        if self.position_k is not None:
            scores = scores + _by_query(q, self.position_k().transpose(1, 2))
        return scores.softmax(dim=-1), v

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, C] -> [B, N, C]."""
        weights, v = self.weigh(x)
        weights = self.attn_drop(weights)
        x = weights @ v
        if self.position_v is not None:
            x = x + _by_query(weights, self.position_v())
        return self.proj_drop(self.proj(x.transpose(1, 2).flatten(2)))


def _by_query(x: Tensor, matrices: Tensor) -> Tensor:
    """Multiply each query's row by the matrix of that query: [B, H, N, I], [N, I, J] -> [B, H, N, J]."""
    B, H, _, _ = x.shape
    product = x.flatten(0, 1).transpose(0, 1) @ matrices  # [N, B * H, J]
    return product.transpose(0, 1).unflatten(0, (B, H))


def _distance(place: Tensor, maximum: int) -> Tensor:
    """The row of the table for each pair of positions [L]: [L, L]."""
    return (place - place[:, None]).clamp(-maximum, maximum) + maximum + 1


class _FlatRelative(nn.Module):
    """`RelativeAttention` as attention with wider heads, [T, C] -> [T, C], or [B, C] for the class token only.

    A position vector is the sum of one for the vertical and one for the horizontal distance, so its contribution to a
    score depends only on the key's row and column. Keys and values get h + 1 + w more channels that mark a token's row
    and column (prefix tokens have a separate row); queries get their products with the position vectors of these rows
    and columns. The same channels of the result are the attention that each row and column received, which weights the
    position vectors of the values. This takes (h + w) / N of the work needed with a vector for each pair of tokens, and
    one attention operator.

    For the query of a prefix token all vectors are equal, so they do not change its softmax.
    """

    key_rows: Tensor
    key_columns: Tensor
    value_rows: Tensor
    value_columns: Tensor
    value_prefix: Tensor
    places: Tensor

    def __init__(self, source: RelativeAttention, options: ExportOptions) -> None:
        super().__init__()
        assert source.position_k is not None
        assert source.position_v is not None
        self.num_heads, self.options = source.num_heads, options
        self.q, self.k, self.v = split_qkv(source.qkv, source.scale)
        self.proj = source.proj
        for name, position in (("key", source.position_k), ("value", source.position_v)):
            vertical, columns, prefix = position.by_axis(options.tokens)
            rows = torch.cat([vertical, prefix.expand(len(vertical), 1, -1)], dim=1)
            self.register_buffer(f"{name}_rows", rows)  # [h, h + 1, D]
            self.register_buffer(f"{name}_columns", columns)  # [w, w, D]
        self.register_buffer("value_prefix", prefix)  # [D]
        self.key_rows = self.key_rows.transpose(1, 2).contiguous()  # [h, D, h + 1]
        self.key_columns = self.key_columns.transpose(1, 2).contiguous()  # [w, D, w]
        self.register_buffer("places", _places(options.tokens)[:, None])  # [N, 1, h + 1 + w]

    def forward(self, x: Tensor, num_tokens: int) -> Tensor:
        """[T, C] -> [T, C] or [B, C]."""
        k, v = (layer(x).unflatten(0, (-1, num_tokens)) for layer in (self.k, self.v))  # [B, N, H * D]
        if self.options.first_token_alone:
            q = self.q(first_token(x, num_tokens)).unsqueeze(1)
            x = self._by_head(attend(q, k, v, self.num_heads, self.options)) + self.value_prefix
        else:
            q = self._by_head(self.q(x).unflatten(0, (-1, num_tokens)))  # [B, N, H, D]
            places = self.places.expand(q.shape[0], -1, self.num_heads, -1)
            k, v = (torch.cat([self._by_head(y), places], dim=3).flatten(2) for y in (k, v))
            q = torch.cat([q, self._position_scores(q)], dim=3).flatten(2)
            x = self._with_positions(self._by_head(attend(q, k, v, self.num_heads, self.options)))
        return self.proj(x.flatten(2).flatten(0, 1))

    def _by_head(self, x: Tensor) -> Tensor:
        """[B, N, H * E] -> [B, N, H, E]."""
        return x.unflatten(2, (self.num_heads, -1))

    def _position_scores(self, q: Tensor) -> Tensor:
        """Queries times the position vectors of each row and column: [B, N, H, D] -> [B, N, H, h + 1 + w]."""
        q = self._grid(q)
        rows = _by_row(q, self.key_rows)
        columns = _by_row(q.transpose(1, 2), self.key_columns).transpose(1, 2)
        scores = torch.cat([rows, columns], dim=-1).flatten(1, 2)
        return F.pad(scores, (0, 0, 0, 0, self.options.tokens.num_prefix, 0))

    def _with_positions(self, x: Tensor) -> Tensor:
        """Add the values' position vectors, weighted: [B, N, H, D + h + 1 + w] -> [B, N, H, D]."""
        tokens = self.options.tokens
        x, rows, columns = x.split([self.value_prefix.shape[0], tokens.height + 1, tokens.width], dim=3)
        columns = self._grid(columns).transpose(1, 2)
        positions = _by_row(self._grid(rows), self.value_rows)
        positions = (positions + _by_row(columns, self.value_columns).transpose(1, 2)).flatten(1, 2)
        if tokens.num_prefix:
            prefix = self.value_prefix.expand(x.shape[0], tokens.num_prefix, self.num_heads, -1)
            positions = torch.cat([prefix, positions], dim=1)
        return x + positions

    def _grid(self, x: Tensor) -> Tensor:
        """The patch tokens as a grid: [B, N, H, E] -> [B, h, w, H, E]."""
        tokens = self.options.tokens
        return x[:, tokens.num_prefix :].unflatten(1, (tokens.height, tokens.width))


def _by_row(x: Tensor, matrices: Tensor) -> Tensor:
    """Multiply by the matrix of each row: [B, h, w, H, I], [h, I, J] -> [B, h, w, H, J]."""
    return (x.flatten(2, 3) @ matrices).unflatten(2, (x.shape[2], x.shape[3]))


def _places(tokens: TokenGrid) -> Tensor:
    """Ones for the row of each token (h for prefix tokens) and for its column: [N, h + 1 + w]."""
    places = torch.zeros(tokens.num_tokens, tokens.height + 1 + tokens.width)
    patches = torch.arange(tokens.num_patches)
    places[: tokens.num_prefix, tokens.height] = 1
    places[tokens.num_prefix + patches, patches // tokens.width] = 1
    places[tokens.num_prefix + patches, tokens.height + 1 + patches % tokens.width] = 1
    return places
