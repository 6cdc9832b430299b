"""KV caches: the self-attention keys and values of what each hypothesis has decoded so far.

Axes: S sentence, K hypothesis, T target position, Q queries (K * T of them), C columns (target positions that
the cache has space for), J slots (C * K), H heads, P head dimension.

`SharedKVCache` never moves keys when beams are reordered: hypotheses of a sentence share its slots, and a
table says which slots belong to whose ancestors. `HypothesisKVCache` keeps a row for each hypothesis and
moves rows. Both can be static: then their tensors keep their shapes and no step needs a value from the
device, so that a GPU can replay recorded steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from trmt.acceleration import accelerated
from trmt.nets.base import Decoding
from trmt.nets.layers import KEY_MULTIPLE, GridAttention, attend

FIRST_COLUMNS = 32  # of a new cache: few translations come near their limit
SHARED_LIMIT = 16  # measured: with more hypotheses, masking shared slots costs more than moving rows
# On the CPU, torch 2.13 splits sums over more slots than this in two, at a point that depends on their
# number.
UNSPLIT = 384


def padded_columns(columns: int, hypotheses: int) -> int:
    """So many columns that their slots are a multiple of KEY_MULTIPLE."""
    step = KEY_MULTIPLE // math.gcd(KEY_MULTIPLE, hypotheses)
    return -(-columns // step) * step


def same_beside_others(decoding: Decoding) -> bool:
    """Whether attention over a cache gives a sentence the same bits beside sentences of other lengths."""
    hypotheses = decoding.hypotheses
    return hypotheses == 1 or padded_columns(decoding.max_tokens, hypotheses) * hypotheses <= UNSPLIT


@dataclass
class SharedKVCache:
    """Keys and values of all hypotheses in the order they were made, and a table of ancestors.

    Slot c * K + k holds what hypothesis k computed at position c. `ancestors_SKC` names for hypothesis k the
    one whose slot of column c belongs to its history, or -1. The hypotheses of a sentence are queries over
    its shared slots, of which each may attend to its ancestors'. Unless it is static, the cache starts small
    and doubles when it is full. A static one that is full overwrites its last column.
    """

    like: Tensor  # any tensor of the dtype and device of keys
    sizes: tuple[int, int, int]  # layers, heads, head dimension
    ancestors_SKC: Tensor
    static: bool
    columns: int  # that attention covers
    longest: int | None = 0  # tokens of the longest hypothesis; None: to be asked of the positions
    key_values: list[Tensor] = field(default_factory=list)  # [2, S, H, J, P] of each layer; made at first use

    def __post_init__(self) -> None:
        self._position_ST = self.ancestors_SKC.new_zeros(len(self.ancestors_SKC), 1)  # of the newest tokens
        self._mask: Tensor | None = None

    @classmethod
    def empty(
        cls, like: Tensor, sentences: int, decoding: Decoding, sizes: tuple[int, int, int]
    ) -> SharedKVCache:
        """A cache for so many sentences."""
        first = decoding.max_tokens if decoding.static else min(decoding.max_tokens, FIRST_COLUMNS)
        columns = padded_columns(first, decoding.hypotheses)
        shape = (sentences, decoding.hypotheses, columns)
        ancestors_SKC = torch.full(shape, -1, dtype=torch.long, device=like.device)
        return cls(like.new_empty(0), sizes, ancestors_SKC, decoding.static, columns)

    @property
    def hypotheses(self) -> int:
        return self.ancestors_SKC.shape[1]

    def allocate(self) -> None:
        """Make the keys and values, unless they are there."""
        if not self.key_values:
            layers, heads, head_dim = self.sizes
            sentences, hypotheses, columns = self.ancestors_SKC.shape
            shape = (2, sentences, heads, columns * hypotheses, head_dim)
            # Zeros: masked slots are multiplied by zero, and zero times NaN is NaN.
            self.key_values = [self.like.new_zeros(shape) for _ in range(layers)]

    def advance(self, position_S: Tensor, count: int) -> None:
        """Make space for `count` tokens more of hypotheses that have `position_S` tokens."""
        self.allocate()
        if not self.static:
            before = int(position_S.max()) if self.longest is None else self.longest
            self.longest = before + count
            self._grow(self.longest)
            self.columns = padded_columns(self.longest, self.hypotheses)
        step_T = torch.arange(count, device=position_S.device)
        position_ST = position_S[:, None] + step_T
        if self.static:
            position_ST = position_ST.clamp(max=self.ancestors_SKC.shape[2] - 1)
        index_SKT = position_ST[:, None].expand(-1, self.hypotheses, -1)
        own_K = torch.arange(self.hypotheses, device=position_S.device)
        self.ancestors_SKC.scatter_(2, index_SKT, own_K[None, :, None].expand_as(index_SKT))
        self._position_ST, self._mask = position_ST, None

    def _grow(self, columns: int) -> None:
        if columns > self.ancestors_SKC.shape[2]:
            self._resize(padded_columns(max(columns, 2 * self.ancestors_SKC.shape[2]), self.hypotheses))

    def _resize(self, columns: int) -> None:
        more = columns - self.ancestors_SKC.shape[2]
        self.key_values = [F.pad(both, [0, 0, 0, more * self.hypotheses]) for both in self.key_values]
        self.ancestors_SKC = F.pad(self.ancestors_SKC, [0, more], value=-1)

    def mask(self) -> Tensor:
        """The additive mask [S, 1, Q, J]: the newest tokens attend to their ancestors and themselves."""
        if self._mask is None:
            ancestors_SKC = self.ancestors_SKC[:, :, : self.columns]
            own_K = torch.arange(self.hypotheses, device=ancestors_SKC.device)
            column_C = torch.arange(self.columns, device=ancestors_SKC.device)
            ours_SKJ = (ancestors_SKC[..., None] == own_K).flatten(2)
            past_STJ = (column_C <= self._position_ST[:, :, None]).repeat_interleave(self.hypotheses, 2)
            allowed_SQJ = (ours_SKJ[:, :, None] & past_STJ[:, None]).flatten(1, 2)
            self._mask = torch.where(allowed_SQJ, 0.0, -torch.inf)[:, None].to(self.like.dtype)
        return self._mask

    def distances(self) -> Tensor:
        """From each of the newest tokens to each slot, in positions: [S, Q, J]."""
        slot_J = torch.arange(self.columns * self.hypotheses, device=self.like.device) // self.hypotheses
        return slot_J - self._position_ST.repeat(1, self.hypotheses)[..., None]

    def attend(
        self, layer: int, query_SHQP: Tensor, kv_2SHQP: Tensor, attention: GridAttention = attend
    ) -> Tensor:
        """Store the keys and values of the newest tokens, and let these attend to all so far: [S, Q, D]."""
        cached_2SHJP, hypotheses = self.key_values[layer], self.hypotheses
        if self.static and attention is attend and (fast := accelerated("cached_attention")):
            ancestors_SKC = self.ancestors_SKC if hypotheses > 1 else None
            newest = self._position_ST, self.columns
            out = fast(query_SHQP, kv_2SHQP, cached_2SHJP, ancestors_SKC, *newest)
            if out is not None:
                return out
        if kv_2SHQP.shape[3] > hypotheses > 1:  # queries: hypothesis by hypothesis; slots: column by column
            kv_2SHQP = kv_2SHQP.unflatten(3, (hypotheses, -1)).transpose(3, 4).flatten(3, 4)
        own_K = torch.arange(hypotheses, device=cached_2SHJP.device)
        slots_SQ = (self._position_ST[:, :, None] * hypotheses + own_K).flatten(1)
        sentence_S1 = torch.arange(len(slots_SQ), device=cached_2SHJP.device)[:, None]
        cached_2SHJP[:, sentence_S1, :, slots_SQ] = kv_2SHQP.permute(1, 3, 0, 2, 4)
        key_SHJP, value_SHJP = cached_2SHJP.narrow(3, 0, self.columns * hypotheses).unbind(0)
        return attention(query_SHQP, key_SHJP, value_SHJP, self.mask())

    def reorder(self, parents_SK: Tensor) -> SharedKVCache:
        used = self.ancestors_SKC[:, :, : self.columns]
        used.copy_(used.gather(1, parents_SK[:, :, None].expand_as(used)))
        return self

    def keep(self, sentences: Tensor) -> SharedKVCache:
        return replace(
            self,
            ancestors_SKC=self.ancestors_SKC.index_select(0, sentences),
            key_values=[both.index_select(1, sentences) for both in self.key_values],
            longest=None,
        )

    def replace(self, slots: Tensor, other: SharedKVCache) -> SharedKVCache:
        for cache, columns in ((self, other.ancestors_SKC.shape[2]), (other, self.ancestors_SKC.shape[2])):
            if columns > cache.ancestors_SKC.shape[2]:
                cache._resize(columns)
        if other.key_values:  # otherwise it has no tokens, and its table says so
            self.allocate()
        for mine, theirs in zip(self.key_values, other.key_values, strict=False):
            mine.index_copy_(1, slots, theirs)
        self.ancestors_SKC.index_copy_(0, slots, other.ancestors_SKC)
        self.longest, self.columns = None, max(self.columns, other.columns)
        return self

    def view(self, sentences: int, columns: int) -> SharedKVCache:
        self.allocate()
        return replace(
            self,
            ancestors_SKC=self.ancestors_SKC[:sentences],
            key_values=[both[:, :sentences] for both in self.key_values],
            columns=min(padded_columns(columns, self.hypotheses), self.ancestors_SKC.shape[2]),
        )


@dataclass
class HypothesisKVCache:
    """A row of keys and values for each hypothesis: better where nothing is reordered, or K is large.

    It is the shared cache of S * K sentences with one hypothesis each; `reorder` copies rows.
    """

    rows: SharedKVCache
    hypotheses: int

    @classmethod
    def empty(
        cls, like: Tensor, sentences: int, decoding: Decoding, sizes: tuple[int, int, int]
    ) -> HypothesisKVCache:
        """A cache for so many sentences."""
        one = replace(decoding, hypotheses=1)
        return cls(
            SharedKVCache.empty(like, sentences * decoding.hypotheses, one, sizes), decoding.hypotheses
        )

    @property
    def columns(self) -> int:
        return self.rows.columns

    def advance(self, position_S: Tensor, count: int) -> None:
        """Make space for `count` tokens more of hypotheses that have `position_S` tokens."""
        self.rows.advance(position_S.repeat_interleave(self.hypotheses), count)

    def distances(self) -> Tensor:
        """From each of the newest tokens to each column, in positions: [S * K, T, C]."""
        return self.rows.distances()

    def attend(
        self, layer: int, query_SHQP: Tensor, kv_2SHQP: Tensor, attention: GridAttention = attend
    ) -> Tensor:
        """Store the keys and values of the newest tokens, and let these attend to all so far: [S, Q, D]."""
        query = query_SHQP.unflatten(2, (self.hypotheses, -1)).transpose(1, 2).flatten(0, 1)
        kv = kv_2SHQP.unflatten(3, (self.hypotheses, -1)).transpose(2, 3).flatten(1, 2)
        out = self.rows.attend(layer, query, kv, attention)
        return out.unflatten(0, (-1, self.hypotheses)).flatten(1, 2)

    def reorder(self, parents_SK: Tensor) -> HypothesisKVCache:
        first_S1 = torch.arange(parents_SK.shape[0], device=parents_SK.device)[:, None] * self.hypotheses
        # The lengths stay: hypotheses of a sentence have as many tokens.
        rows = replace(self.rows.keep((first_S1 + parents_SK).flatten()), longest=self.rows.longest)
        return replace(self, rows=rows)

    def _rows(self, sentences: Tensor) -> Tensor:
        hypothesis_K = torch.arange(self.hypotheses, device=sentences.device)
        return (sentences[:, None] * self.hypotheses + hypothesis_K).flatten()

    def keep(self, sentences: Tensor) -> HypothesisKVCache:
        return replace(self, rows=self.rows.keep(self._rows(sentences)))

    def replace(self, slots: Tensor, other: HypothesisKVCache) -> HypothesisKVCache:
        return replace(self, rows=self.rows.replace(self._rows(slots), other.rows))

    def view(self, sentences: int, columns: int) -> HypothesisKVCache:
        return replace(self, rows=self.rows.view(sentences * self.hypotheses, columns))


KVCache = SharedKVCache | HypothesisKVCache


def make_cache(like: Tensor, sentences: int, decoding: Decoding, sizes: tuple[int, int, int]) -> KVCache:
    """The cache that suits; `sizes` are the numbers of layers and heads, and the head dimension."""
    shared = decoding.hypotheses == 1 or (decoding.reorders and decoding.hypotheses <= SHARED_LIMIT)
    if decoding.static and decoding.reorders and not shared:
        # The kernel reads only a hypothesis's own ancestors, however many others there are.
        serves = accelerated("serves_cached_attention")
        shared = serves is not None and serves(like, sizes[2])
    cache = SharedKVCache if shared else HypothesisKVCache
    return cache.empty(like, sentences, decoding, sizes)
