"""What several networks use word for word: attention, positions, norms, freezing, the key/value store.

Axes: S sentence, K hypothesis, L source position, T target position, Q queries (K * T of them when
decoding), C columns of the store, J slots of the store (C * K), H heads, D width, P width of one
head, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from types import SimpleNamespace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trmt.arch.base import Linear
from trmt.errors import ConfigError

# On the CPU, attention gives the same bits for any padding when the number of keys is a multiple of this.
KEY_MULTIPLE = 16
FIRST_COLUMNS = 32  # of a new store


def check_sizes(config: Any) -> None:
    """Refuse a config whose whole numbers, all sizes, or fractions, all dropouts, are out of range."""
    for name, value in ((field.name, getattr(config, field.name)) for field in fields(config)):
        if isinstance(value, int) and not isinstance(value, bool) and value < 1:
            raise ConfigError(f"network.{name} = {value} is too small; set it to at least 1")
        if isinstance(value, float) and not 0 <= value < 1:
            raise ConfigError(f"network.{name} = {value} is out of range; set it from 0 to below 1")


def key_multiple(net: Any) -> int:
    """To what multiple the source is padded: in training nobody needs equal bits, and padding costs time."""
    return 1 if getattr(net, "training", False) else KEY_MULTIPLE


def heads(x_SQD: Tensor, count: int) -> Tensor:
    """[S, Q, D] -> [S, H, Q, P]."""
    return x_SQD.unflatten(-1, (count, -1)).transpose(1, 2)


def attend(
    query_SHQP: Tensor,
    key_SHJP: Tensor,
    value_SHJP: Tensor,
    mask: Tensor | None = None,
    *,
    causal: bool = False,
    dropout: float = 0.0,
) -> Tensor:
    """Scaled dot-product attention, heads joined again: [S, Q, D]."""
    out_SHQP = F.scaled_dot_product_attention(
        query_SHQP, key_SHJP, value_SHJP, attn_mask=mask, is_causal=causal, dropout_p=dropout
    )
    return out_SHQP.transpose(1, 2).flatten(2)


def attention_weights(query_SHQP: Tensor, key_SHJP: Tensor, mask: Tensor | None) -> Tensor:
    """The weights that `attend` uses inside, for those who want to look: [S, H, Q, J]."""
    scores = query_SHQP @ key_SHJP.transpose(-2, -1) / math.sqrt(query_SHQP.shape[-1])
    return (scores if mask is None else scores + mask).softmax(-1)


def blocked(real: Tensor) -> Tensor:
    """An additive mask: 0 where attention may look, minus infinity elsewhere."""
    return torch.zeros(real.shape, device=real.device).masked_fill_(~real, -torch.inf)


def sinusoids(positions: int, width: int) -> Tensor:
    """The table of "Attention Is All You Need" 3.5: sine in even columns, cosine in odd ones."""
    rate = torch.exp(torch.arange(0, width, 2) * (-math.log(10000.0) / width))
    angle = torch.arange(positions)[:, None] * rate
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(1)[:, :width]


def rotated(x: Tensor, angle: Tensor) -> Tensor:
    """Rotary positions (arXiv 2104.09864): each pair of columns turned by its position's angle.

    `angle` holds the rows of `sinusoids` of the head's width that belong to the positions of `x`.
    """
    sin, cos = angle.unflatten(-1, (-1, 2)).unbind(-1)
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)


def norm(kind: Literal["layer", "rms"], width: int) -> nn.Module:
    """The normalisation layer of this kind."""
    return nn.LayerNorm(width) if kind == "layer" else nn.RMSNorm(width, eps=1e-6)


def xavier(linear: nn.Linear, parts: int = 1) -> nn.Linear:
    """Glorot initialisation; a product that merges several is treated as the separate ones it stands for."""
    for part in linear.weight.chunk(parts):
        nn.init.xavier_uniform_(part)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)
    return linear


def freeze(module: nn.Module, linear: Linear) -> Any:
    """A tree of plain functions with the names of `module`'s children, free of module calls.

    The networks write their arithmetic once, against these names: in training they stand for modules,
    in decoding for what this returns.
    """
    if isinstance(module, nn.Linear):
        bias = None if module.bias is None else module.bias.detach()
        product = linear(module.weight.detach(), bias)
        return _with_relu(product) if getattr(module, "relu", False) else product
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return _frozen_norm(module)
    if isinstance(module, nn.Dropout):
        return _same
    if isinstance(module, nn.ModuleList):
        return [freeze(child, linear) for child in module]
    return SimpleNamespace(**{name: freeze(child, linear) for name, child in module.named_children()})


def _with_relu(product: Any) -> Any:
    """The product followed by relu; some do it in the same pass."""
    return product.with_relu() if hasattr(product, "with_relu") else lambda x: F.relu(product(x))


def readout(
    product: Any, weight_VD: Tensor, hidden: Tensor, only: Tensor | None, bias_V: Tensor | None = None
) -> Tensor:
    """The logits of the whole vocabulary, or of the ids in `only`; where products can, with the same bits."""
    if only is None:
        return product(hidden)
    if hasattr(product, "only"):
        return product.only(only)(hidden)
    return F.linear(hidden, weight_VD[only], None if bias_V is None else bias_V[only])


def _same(x: Tensor) -> Tensor:
    return x


def _frozen_norm(module: nn.LayerNorm | nn.RMSNorm) -> Any:
    shape, weight, eps = module.normalized_shape, module.weight.detach(), module.eps
    if isinstance(module, nn.RMSNorm):
        return lambda x: F.rms_norm(x, shape, weight, eps)
    bias = module.bias.detach()
    layer_eps = module.eps
    return lambda x: F.layer_norm(x, shape, weight, bias, layer_eps)


def _padded(columns: int, hypotheses: int) -> int:
    """So many columns that their slots are a multiple of KEY_MULTIPLE."""
    step = KEY_MULTIPLE // math.gcd(KEY_MULTIPLE, hypotheses)
    return -(-columns // step) * step


@dataclass
class AncestorStore:
    """Keys and values of all hypotheses in the order they were made, and a table of who descends from whom.

    Slot `c * K + k` holds what hypothesis k saw in column c. `reorder` moves no keys: it rearranges
    `table_SKC`, whose entry says in which slot of column c the ancestor of hypothesis k lies, or -1
    where there is none. The hypotheses of a sentence are queries over its common slots. The store begins
    small and doubles when it is full: few translations come near their limit.
    """

    keys: list[Tensor]  # of each layer, [S, H, J, P]
    values: list[Tensor]
    table_SKC: Tensor
    columns: int = 0

    @classmethod
    def empty(
        cls, like: Tensor, sizes: tuple[int, int], *, layers: int, heads: int, width: int, room: int
    ) -> AncestorStore:
        """A store for `sizes` = (sentences, hypotheses), which will hardly see more than `room` columns."""
        sentences, hypotheses = sizes
        columns = _padded(min(room, FIRST_COLUMNS), hypotheses)
        shape = (sentences, heads, columns * hypotheses, width // heads)
        # Zeros and not garbage: masked slots are multiplied by zero, and zero times NaN is NaN.
        return cls(
            [like.new_zeros(shape) for _ in range(layers)],
            [like.new_zeros(shape) for _ in range(layers)],
            torch.full((sentences, hypotheses, columns), -1, dtype=torch.long, device=like.device),
        )

    @property
    def hypotheses(self) -> int:
        return self.table_SKC.shape[1]

    def advance(self, count: int) -> Tensor:
        """Open `count` columns; returns the additive mask [S, 1, Q, J] of the queries that fill them."""
        first, last = self.columns, self.columns + count
        hypotheses = self.hypotheses
        if last > self.table_SKC.shape[2]:
            self._grow(last)
        self.columns = last
        slot_K = torch.arange(hypotheses, device=self.table_SKC.device)
        self.table_SKC[:, :, first:last] = slot_K[:, None]
        used = _padded(last, hypotheses)
        seen = (self.table_SKC[:, :, :used, None] == slot_K).flatten(2)  # [S, K, J]
        if count > 1:
            column_J = torch.arange(used, device=seen.device).repeat_interleave(hypotheses)
            past = column_J <= torch.arange(first, last, device=seen.device)[:, None]
            seen = (seen[:, :, None] & past).flatten(1, 2)
        return blocked(seen)[:, None]

    def attend(self, layer: int, query_SHQP: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        """Store the keys and values of the open columns, and attend to all so far: [S, Q, D]."""
        hypotheses = self.hypotheses
        count = key.shape[2] // hypotheses
        first, last = (self.columns - count) * hypotheses, self.columns * hypotheses
        used = _padded(self.columns, hypotheses) * hypotheses
        for store_SHJP, new_SHQP in ((self.keys[layer], key), (self.values[layer], value)):
            if count > 1:  # queries run over hypotheses first, slots over columns first
                new_SHQP = new_SHQP.unflatten(2, (hypotheses, count)).transpose(2, 3).flatten(2, 3)
            store_SHJP[:, :, first:last] = new_SHQP
        return attend(query_SHQP, self.keys[layer][:, :, :used], self.values[layer][:, :, :used], mask)

    def reorder(self, parents_SK: Tensor) -> AncestorStore:
        used = self.table_SKC[:, :, : self.columns]
        used.copy_(used.gather(1, parents_SK[:, :, None].expand_as(used)))
        return self

    def keep(self, sentences: Tensor) -> AncestorStore:
        self.keys = [key.index_select(0, sentences) for key in self.keys]
        self.values = [value.index_select(0, sentences) for value in self.values]
        self.table_SKC = self.table_SKC.index_select(0, sentences)
        return self

    def join(self, other: AncestorStore) -> AncestorStore:
        """Both stores, aligned at their newest column; the younger sentences have empty columns before."""
        columns = max(self.columns, other.columns)
        width = _padded(columns + FIRST_COLUMNS, self.hypotheses)
        both = [store._shifted(columns - store.columns, width) for store in (self, other)]
        return AncestorStore(
            [torch.cat(pair) for pair in zip(both[0].keys, both[1].keys, strict=True)],
            [torch.cat(pair) for pair in zip(both[0].values, both[1].values, strict=True)],
            torch.cat([both[0].table_SKC, both[1].table_SKC]),
            columns,
        )

    def _grow(self, columns: int) -> None:
        larger = self._shifted(0, _padded(max(columns, 2 * self.table_SKC.shape[2]), self.hypotheses))
        self.keys, self.values, self.table_SKC = larger.keys, larger.values, larger.table_SKC

    def _shifted(self, by: int, width: int) -> AncestorStore:
        """The same store with `by` empty columns in front and room for `width` columns."""
        K, used = self.hypotheses, self.columns
        tail = width - by - used
        pad = [0, 0, by * K, tail * K]
        return AncestorStore(
            [F.pad(key[:, :, : used * K], pad) for key in self.keys],
            [F.pad(value[:, :, : used * K], pad) for value in self.values],
            F.pad(self.table_SKC[:, :, :used], [by, tail], value=-1),
            used + by,
        )

    def fork(self) -> AncestorStore:
        return AncestorStore(
            [key.clone() for key in self.keys],
            [value.clone() for value in self.values],
            self.table_SKC.clone(),
            self.columns,
        )


@dataclass
class RowStore:
    """Keys and values apart for each hypothesis: better where nothing is reordered, or K is large.

    It is the ancestor store of S * K sentences with one hypothesis each; only `reorder` moves data.
    """

    rows: AncestorStore
    hypotheses: int

    @classmethod
    def empty(
        cls, like: Tensor, sizes: tuple[int, int], *, layers: int, heads: int, width: int, room: int
    ) -> RowStore:
        """Room for `room` tokens of `sizes` = (sentences, hypotheses)."""
        flat = (sizes[0] * sizes[1], 1)
        rows = AncestorStore.empty(like, flat, layers=layers, heads=heads, width=width, room=room)
        return cls(rows, sizes[1])

    def advance(self, count: int) -> Tensor:
        """Open `count` columns; returns the additive mask of the queries that fill them."""
        return self.rows.advance(count)

    def attend(self, layer: int, query_SHQP: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        """Store the keys and values of the open columns, and attend to all so far: [S, Q, D]."""
        query, key, value = (
            x.unflatten(2, (self.hypotheses, -1)).transpose(1, 2).flatten(0, 1)
            for x in (query_SHQP, key, value)
        )
        out = self.rows.attend(layer, query, key, value, mask)
        return out.unflatten(0, (-1, self.hypotheses)).flatten(1, 2)

    def reorder(self, parents_SK: Tensor) -> RowStore:
        start_S1 = torch.arange(parents_SK.shape[0], device=parents_SK.device)[:, None] * self.hypotheses
        self.rows.keep((start_S1 + parents_SK).flatten())
        return self

    def keep(self, sentences: Tensor) -> RowStore:
        hypothesis_K = torch.arange(self.hypotheses, device=sentences.device)
        self.rows.keep((sentences[:, None] * self.hypotheses + hypothesis_K).flatten())
        return self

    def join(self, other: RowStore) -> RowStore:
        return RowStore(self.rows.join(other.rows), self.hypotheses)

    def fork(self) -> RowStore:
        return RowStore(self.rows.fork(), self.hypotheses)


ANCESTOR_LIMIT = 16  # measured: with more hypotheses, masking common slots costs more than moving rows


def key_value_store(
    like: Tensor, sizes: tuple[int, int], *, reorders: bool, layers: int, heads: int, width: int, room: int
) -> AncestorStore | RowStore:
    """The store that suits the number of hypotheses and whether they are reordered."""
    shared = sizes[1] == 1 or (reorders and sizes[1] <= ANCESTOR_LIMIT)
    kind = AncestorStore if shared else RowStore
    return kind.empty(like, sizes, layers=layers, heads=heads, width=width, room=room)
