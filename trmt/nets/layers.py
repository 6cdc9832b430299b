"""What the networks share: linear layers, norms, positions, and attention over packed tokens and over grids.

Axes: S sentence, L source position, T target position, Q queries, J keys, N tokens in a row, M tokens of the
other side in a row, H heads, P head dimension, D hidden size.

In training, the tokens of a batch stand in a row without padding, [N, D] ("packed"); `Spans` say where
sentences begin. In decoding they stand in a grid [S, Q, D].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trmt.acceleration import accelerated
from trmt.devices import varlen
from trmt.errors import ConfigError
from trmt.nets.base import FrozenLinear, Products, frozen_copy
from trmt.nets.ragged import Ragged, grid_cells

M = TypeVar("M", bound=nn.Module)
GridAttention = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # (query, key, value, mask) -> [S, Q, D]

# On the CPU, attention gives the same bits for any padding when the number of keys is a multiple of this.
KEY_MULTIPLE = 16
GROUP = 32  # sentences of similar length that are padded together


def check_sizes(config: Any, *, except_for: Collection[str] = (), from_zero: Collection[str] = ()) -> None:
    """Refuse a config whose integers, all sizes, or floats, all dropout rates, are out of range."""
    for name in (field.name for field in fields(config) if field.name not in except_for):
        value = getattr(config, name)
        least = 0 if name in from_zero else 1
        if isinstance(value, int) and not isinstance(value, bool) and value < least:
            raise ConfigError(f"network.{name} = {value} is too small; set it to at least {least}")
        if isinstance(value, float) and not 0 <= value < 1:
            raise ConfigError(f"network.{name} = {value} is out of range; set it from 0 to below 1")


def module_list(modules: Iterable[M]) -> Sequence[M]:
    """An nn.ModuleList that type checkers know the modules of."""
    return cast(Sequence[M], nn.ModuleList(modules))


# Linear layers, dropout, norms


def xavier(linear: nn.Linear, merged: int = 1) -> nn.Linear:
    """Glorot initialisation; the matrix of `merged` products side by side is initialised as that many."""
    for matrix in linear.weight.chunk(merged):
        nn.init.xavier_uniform_(matrix)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)
    return linear


class Linear(nn.Linear):
    """A linear layer with Glorot initialisation, followed by a relu if wanted."""

    def __init__(self, inputs: int, outputs: int, *, relu: bool = False, merged: int = 1) -> None:
        super().__init__(inputs, outputs)
        self.relu = relu
        xavier(self, merged)

    def forward(self, x: Tensor) -> Tensor:
        if fast := accelerated("linear"):
            out = fast(x, self.weight, self.bias, self.relu)
            if out is not None:
                return out
        out = F.linear(x, self.weight, self.bias)
        return F.relu(out) if self.relu else out

    def frozen_as(self, products: Products) -> FrozenLinear:
        return FrozenLinear(products(self.weight.detach(), self.bias.detach(), relu=self.relu))


def embedding(vocabulary: int, d_model: int) -> nn.Embedding:
    """Embeddings that have unit variance once they are scaled by the square root of the hidden size."""
    table = nn.Embedding(vocabulary, d_model)
    nn.init.normal_(table.weight, std=d_model**-0.5)
    return table


def dropout(x: Tensor, p: float) -> Tensor:
    """Each element set to 0 with probability p, the others scaled by 1 / (1 - p)."""
    if not p:
        return x
    if fast := accelerated("dropout"):
        out = fast(x, p)
        if out is not None:
            return out
    return F.dropout(x, p)


def add_norm(x: Tensor, y: Tensor, norm: nn.Module, p: float) -> tuple[Tensor, Tensor]:
    """x + dropout(y), and the norm of that."""
    if fast := accelerated("add_norm"):
        both = fast(x, y, norm, p)
        if both is not None:
            return both
    added = x + F.dropout(y, p) if p else x + y
    return added, norm(added)


class ExactNorm(nn.Module):
    """A norm computed in double precision and rounded once."""

    def __init__(self, norm: LayerNorm | RMSNorm) -> None:
        super().__init__()
        self.shape, self.epsilon = norm.normalized_shape, float(norm.eps or 0)
        self.weight = norm.weight.detach().double()
        self.bias = norm.bias.detach().double() if isinstance(norm, LayerNorm) else None

    def forward(self, x: Tensor) -> Tensor:
        x = x.double()
        if self.bias is None:
            return F.rms_norm(x, self.shape, self.weight, self.epsilon).float()
        return F.layer_norm(x, self.shape, self.weight, self.bias, self.epsilon).float()


class LayerNorm(nn.LayerNorm):
    """Layer normalisation (arXiv 1607.06450)."""

    def frozen_as(self, products: Products) -> nn.Module:
        return ExactNorm(self) if products.precision == "int8" else frozen_copy(self, products)


class RMSNorm(nn.RMSNorm):
    """Root mean square normalisation (arXiv 1910.07467)."""

    def frozen_as(self, products: Products) -> nn.Module:
        return ExactNorm(self) if products.precision == "int8" else frozen_copy(self, products)


def norm_layer(name: Literal["layer", "rms"], d_model: int, epsilon: float = 0.0) -> nn.Module:
    """The norm of this name; an epsilon of 0 stands for the usual one."""
    if name == "layer":
        return LayerNorm(d_model, eps=epsilon or 1e-5)
    return RMSNorm(d_model, eps=epsilon or 1e-6)


Sublayer = tuple[nn.Module, Callable[[Tensor], Tensor]]  # the norm that belongs to it, and its function
AddNorm = Callable[[Tensor, Tensor, nn.Module, float], tuple[Tensor, Tensor]]


def residual(
    x: Tensor,
    sublayers: Sequence[Sublayer],
    last_norm: nn.Module | None,
    p: float,
    add_norm: AddNorm = add_norm,
) -> Tensor:
    """The sublayers f one after another, each with dropout, a residual connection and its norm.

    Post-norm, without a `last_norm`:  x = norm(x + f(x)).
    Pre-norm, with one:                x = x + f(norm(x)), and in the end last_norm(x).
    Both are chains of the same step, a sum and the norm of it, which a kernel makes in one pass: in pre-norm
    the norm is the next sublayer's.
    """
    norms = [norm for norm, _ in sublayers]
    if last_norm is None:
        for norm, sublayer in sublayers:
            _, x = add_norm(x, sublayer(x), norm, p)
        return x
    normed = norms[0](x)
    for (_, sublayer), next_norm in zip(sublayers, [*norms[1:], last_norm], strict=True):
        x, normed = add_norm(x, sublayer(normed), next_norm, p)
    return normed


class FeedForward(nn.Module):
    """The position-wise feed-forward layer; SwiGLU (arXiv 2002.05202) has a gate beside the inner product."""

    def __init__(self, d_model: int, inner: int, activation: str) -> None:
        super().__init__()
        self.activation = activation
        gated = activation == "swiglu"
        self.inner = Linear(d_model, inner * (1 + gated), relu=activation == "relu", merged=1 + gated)
        self.outer = Linear(inner, d_model)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.inner(x)
        if self.activation == "swiglu":
            gate, value = inner.chunk(2, -1)
            inner = F.silu(gate) * value
        elif self.activation == "gelu":
            inner = F.gelu(inner)
        elif self.activation == "swish":
            inner = F.silu(inner)
        return self.outer(inner)


# Positions


def sinusoids(positions: int, columns: int, *, offset: int = 0) -> Tensor:
    """The table of "Attention Is All You Need" 3.5: sine in even columns, cosine in odd ones."""
    return sinusoids_at(torch.arange(offset, offset + positions), columns)


def sinusoids_at(position: Tensor, columns: int) -> Tensor:
    """The rows of that table for these positions."""
    angle = position[..., None] * frequencies(columns, position.device)
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(-2)[..., :columns]


def frequencies(columns: int, device: torch.device | None = None) -> Tensor:
    """The angle by which each pair of columns of that table turns from one position to the next."""
    return torch.exp(torch.arange(0, columns, 2, device=device) * (-math.log(10000.0) / columns))


def rotate(x: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
    """Each pair of columns rotated by the angle of which these are sine and cosine."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    # In the precision of the angles, and back: attention needs queries, keys and values of one precision.
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2).to(x.dtype)


def rotary(x: Tensor, rows: Tensor) -> Tensor:
    """Rotary positions (arXiv 2104.09864); `rows` are those of `sinusoids` of the head dimension."""
    sin, cos = rows.unflatten(-1, (-1, 2)).unbind(-1)
    return rotate(x, sin, cos)


# Attention in a grid


def split_heads(x_SQD: Tensor, heads: int) -> Tensor:
    """[S, Q, D] -> [S, H, Q, P]."""
    return x_SQD.unflatten(-1, (heads, -1)).transpose(1, 2)


def additive_mask(allowed: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """0 where attention is allowed, minus infinity elsewhere."""
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill_(~allowed, -torch.inf)


def attend(query_SHQP: Tensor, key_SHJP: Tensor, value_SHJP: Tensor, mask: Tensor | None) -> Tensor:
    """Scaled dot-product attention, heads joined again: [S, Q, D]."""
    out_SHQP = F.scaled_dot_product_attention(query_SHQP, key_SHJP, value_SHJP, attn_mask=mask)
    return out_SHQP.transpose(1, 2).flatten(2)


def attend_exactly(query_SHQP: Tensor, key_SHJP: Tensor, value_SHJP: Tensor, mask: Tensor) -> Tensor:
    """The same in double precision, rounded once."""
    double = (x.double() for x in (query_SHQP, key_SHJP, value_SHJP, mask))
    return attend(*double).float()


def attention_weights(query_SHQP: Tensor, key_SHJP: Tensor, mask: Tensor | None) -> Tensor:
    """The weights that `attend` has inside: [S, H, Q, J]."""
    scores = query_SHQP @ key_SHJP.transpose(-2, -1) / math.sqrt(query_SHQP.shape[-1])
    return (scores if mask is None else scores + mask).softmax(-1)


# Attention over packed tokens


@dataclass(frozen=True)
class Spans:
    """Where sentences begin and end that stand in a row."""

    starts_S: Tensor  # S + 1 of them: the last is where the last sentence ends
    starts32_S: Tensor  # the same in 32 bits, as GPU kernels want them
    longest: int

    @classmethod
    def of(cls, sentences: Ragged) -> Spans:
        """The spans of these sentences."""
        starts_S = sentences.packed()[1]
        return cls(starts_S, starts_S.int(), sentences.longest)


def packed_self_attention(
    qkv_N3D: Tensor, spans: Spans, heads: int, *, causal: bool, dropout: float = 0.0
) -> Tensor:
    """Self-attention within each sentence; queries, keys and values stand side by side: [N, D]."""
    if not dropout and (fast := accelerated("self_attention")):
        out = fast(qkv_N3D, spans, heads, causal)
        if out is not None:
            return out
    query_NHP, key_NHP, value_NHP = qkv_N3D.unflatten(-1, (3, heads, -1)).unbind(1)
    return attend_packed(query_NHP, key_NHP, value_NHP, spans, spans, causal=causal, dropout=dropout)


def packed_cross_attention(
    query_ND: Tensor, kv_M2D: Tensor, spans: Spans, source: Spans, heads: int, *, dropout: float = 0.0
) -> Tensor:
    """Attention of each target sentence to its source; keys and values stand side by side: [N, D]."""
    if not dropout and (fast := accelerated("cross_attention")):
        out = fast(query_ND, kv_M2D, spans, source, heads)
        if out is not None:
            return out
    query_NHP = query_ND.unflatten(-1, (heads, -1))
    key_MHP, value_MHP = kv_M2D.unflatten(-1, (2, heads, -1)).unbind(1)
    return attend_packed(query_NHP, key_MHP, value_MHP, spans, source, causal=False, dropout=dropout)


def attend_packed(
    query_NHP: Tensor,
    key_MHP: Tensor,
    value_MHP: Tensor,
    spans: Spans,
    keys: Spans,
    *,
    causal: bool,
    dropout: float = 0.0,
    grid: GridAttention | None = None,
) -> Tensor:
    """Attention in PyTorch: [N, D]; on GPUs that have a kernel for it without padding, elsewhere in grids.

    On the CPU, sentences of similar length share a grid; a GPU would have to be asked for the lengths first.
    `grid` replaces scaled dot-product attention in a grid.
    """
    qkv = query_NHP, key_MHP, value_MHP
    if not dropout and grid is None and varlen.serves(query_NHP.device, query_NHP.dtype, query_NHP.shape[-1]):
        starts, longest = (spans.starts32_S, keys.starts32_S), (spans.longest, keys.longest)
        out_NHP = varlen.attend(*qkv, starts, longest, causal=causal)
        if out_NHP is not None:
            return out_NHP.flatten(1)
    lengths_2S = torch.stack([spans.starts_S.diff(), keys.starts_S.diff()])
    if lengths_2S.shape[1] <= GROUP or lengths_2S.device.type != "cpu" or torch.compiler.is_compiling():
        return attend_padded(*qkv, spans, keys, causal=causal, dropout=dropout, grid=grid)
    rows, outs = [], []
    for group in lengths_2S.amax(0).argsort().split(GROUP):
        (rows_N, some), (rows_M, others) = _picked(spans, group), _picked(keys, group)
        picked = query_NHP[rows_N], key_MHP[rows_M], value_MHP[rows_M]
        outs.append(attend_padded(*picked, some, others, causal=causal, dropout=dropout, grid=grid))
        rows.append(rows_N)
    return torch.cat(outs)[torch.cat(rows).argsort()]


def _picked(spans: Spans, sentences: Tensor) -> tuple[Tensor, Spans]:
    """The rows of these sentences, and their spans once they stand in a row by themselves."""
    lengths_S = spans.starts_S.diff()[sentences]
    starts_S = F.pad(lengths_S.cumsum(0), (1, 0))
    shift_N = torch.repeat_interleave(spans.starts_S[sentences] - starts_S[:-1], lengths_S)
    rows_N = torch.arange(len(shift_N)) + shift_N
    return rows_N, Spans(starts_S, starts_S.int(), int(lengths_S.max()))


def attend_padded(
    query_NHP: Tensor,
    key_MHP: Tensor,
    value_MHP: Tensor,
    spans: Spans,
    keys: Spans,
    *,
    causal: bool,
    dropout: float = 0.0,
    grid: GridAttention | None = None,
) -> Tensor:
    """The same with all sentences in one padded grid."""
    query_SHTP, cells_N, _ = to_grid(query_NHP, spans)
    (key_SHLP, _, real_SL), (value_SHLP, _, _) = to_grid(key_MHP, keys), to_grid(value_MHP, keys)
    # A sentence without a key would be a row of nothing but minus infinities.
    allowed = None if causal else (real_SL | ~real_SL.any(1, keepdim=True))[:, None, None]
    if grid:
        if allowed is None:
            allowed = real_SL.new_ones(query_SHTP.shape[2], key_SHLP.shape[2]).tril()
        out_STD = grid(query_SHTP, key_SHLP, value_SHLP, additive_mask(allowed))
        return out_STD.flatten(0, 1)[cells_N]
    out_SHTP = F.scaled_dot_product_attention(
        query_SHTP, key_SHLP, value_SHLP, attn_mask=allowed, is_causal=causal, dropout_p=dropout
    )
    return out_SHTP.transpose(1, 2).flatten(2).flatten(0, 1)[cells_N]


def to_grid(x_NHP: Tensor, spans: Spans) -> tuple[Tensor, Tensor, Tensor]:
    """Packed tokens in a grid [S, H, T, P]; the cell of each token, and the mask of real cells."""
    width = max(spans.longest, 1)
    lengths_S = spans.starts_S.diff()
    cells_N = grid_cells(lengths_S, width, count=x_NHP.shape[0])
    real_ST = torch.arange(width, device=lengths_S.device) < lengths_S[:, None]
    grid = x_NHP.new_zeros(real_ST.numel(), *x_NHP.shape[1:]).index_copy(0, cells_N, x_NHP)
    return grid.unflatten(0, real_ST.shape).transpose(1, 2), cells_N, real_ST


def packed_weights(
    query_ND: Tensor,
    key_MD: Tensor,
    spans: Spans,
    keys: Spans,
    heads: int,
    *,
    causal: bool = False,
    only: slice = slice(None),
) -> Tensor:
    """Attention weights of packed queries and keys [S, H, T, L], zero beyond sentences; `only` some heads."""
    query_SHTP, _, _ = to_grid(query_ND.unflatten(-1, (heads, -1))[:, only], spans)
    key_SHLP, _, real_SL = to_grid(key_MD.unflatten(-1, (heads, -1))[:, only], keys)
    mask = additive_mask(real_SL)[:, None, None]
    if causal:
        count = query_SHTP.shape[2]
        mask = mask + additive_mask(mask.new_ones(count, count, dtype=torch.bool).tril())
    return attention_weights(query_SHTP, key_SHLP, mask)
