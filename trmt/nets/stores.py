"""What a Transformer's decoder has seen so far: the keys and values of each hypothesis.

Axes: S sentence, K hypothesis, T target position, Q queries (K * T of them), C columns of the store, J slots
of the store (C * K), H heads, P width of one head, D width.

Each sentence's columns begin at its own first token, so what a sentence computes is the same whatever stands
beside it, older or younger.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from trmt.nets.layers import KEY_MULTIPLE, Look, attend

FIRST_COLUMNS = 32  # of a new store
ANCESTOR_LIMIT = 16  # measured: with more hypotheses, masking common slots costs more than moving rows
# On the CPU, torch 2.13 cuts sums over more slots than this in two, at a place that depends on their number.
WHOLE = 384


def mixes_ages(hypotheses: int, room: int) -> bool:
    """Whether what a sentence computes is the same beside others that have up to `room` columns."""
    return hypotheses == 1 or padded(room, hypotheses) * hypotheses <= WHOLE


def padded(columns: int, hypotheses: int) -> int:
    """So many columns that their slots are a multiple of KEY_MULTIPLE."""
    step = KEY_MULTIPLE // math.gcd(KEY_MULTIPLE, hypotheses)
    return -(-columns // step) * step


def seen(table_SKC: Tensor, column_ST: Tensor) -> Tensor:
    """Which slots the queries that fill these columns may see, by the table of a store: [S, Q, J]."""
    hypotheses, used = table_SKC.shape[1:]
    column_C = torch.arange(used, device=table_SKC.device)
    if hypotheses == 1:
        return column_C <= column_ST[:, :, None]
    slot_K = torch.arange(hypotheses, device=table_SKC.device)
    seen_SKJ = (table_SKC[..., None] == slot_K).flatten(2)
    count = column_ST.shape[1]
    if count == 1:
        return seen_SKJ
    past_STJ = (column_C <= column_ST[:, :, None]).repeat_interleave(hypotheses, 2)
    return (seen_SKJ[:, :, None] & past_STJ[:, None]).flatten(1, 2)


def mask(seen_SQJ: Tensor, like: Tensor) -> Tensor:
    """The additive mask [S, 1, Q, J] of the slots that may be seen."""
    return torch.where(seen_SQJ, 0.0, -torch.inf)[:, None].to(like.dtype)


@dataclass
class AncestorStore:
    """Keys and values of all hypotheses in the order they were made, and a table of who descends from whom.

    Slot `c * K + k` holds what hypothesis k saw in column c. `reorder` moves no keys: it rearranges
    `table_SKC`, whose entry says in which slot of column c the ancestor of hypothesis k lies, or -1
    where there is none. The hypotheses of a sentence are queries over its common slots. The store begins
    small and doubles when it is full: few translations come near their limit.
    """

    like: Tensor  # any tensor of the kind the keys are
    heads: int
    part: int
    layers: int
    table_SKC: Tensor
    filled: list[int]  # columns of each sentence
    both: list[Tensor] = field(default_factory=list)  # of each layer, keys and values [2, S, H, J, P]
    columns: int = 0  # of the fullest
    even: bool = True  # whether all have so many
    slots: Any = 0  # of the open columns: the first one, or where they lie [S, Q]
    column_ST: Any = None  # which columns are open

    @classmethod
    def empty(
        cls, like: Tensor, sizes: tuple[int, int], *, layers: int, heads: int, width: int, room: int
    ) -> AncestorStore:
        """A store for `sizes` = (sentences, hypotheses), which will hardly see more than `room` columns."""
        columns = padded(min(room, FIRST_COLUMNS), sizes[1])
        table_SKC = torch.full((*sizes, columns), -1, dtype=torch.long, device=like.device)
        return cls(like, heads, width // heads, layers, table_SKC, [0] * sizes[0])

    @property
    def hypotheses(self) -> int:
        return self.table_SKC.shape[1]

    def advance(self, count: int) -> Tensor:
        """Open `count` columns; returns the additive mask [S or 1, 1, Q, J] of the queries that fill them."""
        if not self.both:
            sentences, hypotheses, columns = self.table_SKC.shape
            shape = (2, sentences, self.heads, columns * hypotheses, self.part)
            # Zeros and not garbage: masked slots are multiplied by zero, and zero times NaN is NaN.
            self.both = [self.like.new_zeros(shape) for _ in range(self.layers)]
        last = self.columns + count
        if last > self.table_SKC.shape[2]:
            self._resize(padded(max(last, 2 * self.table_SKC.shape[2]), self.hypotheses))
        if self.even:
            column_ST = torch.arange(self.columns, last, device=self.like.device)[None]
        else:
            filled_S1 = torch.tensor(self.filled, device=self.like.device)[:, None]
            column_ST = filled_S1 + torch.arange(count, device=self.like.device)
        self.column_ST = column_ST
        mask = self._open(column_ST, padded(last, self.hypotheses))
        self.columns = last
        self.filled = [columns + count for columns in self.filled]
        return mask

    def _open(self, column_ST: Tensor, used: int) -> Tensor:
        """Note who fills which slots; the mask of what each query may see in the first `used` columns."""
        sentences, hypotheses, _ = self.table_SKC.shape
        count = column_ST.shape[1]
        slot_K = torch.arange(hypotheses, device=self.like.device)
        self.slots = self.columns * hypotheses
        if not self.even:
            self.slots = (column_ST[:, :, None] * hypotheses + slot_K).flatten(1)
        if hypotheses > 1 and self.even:
            self.table_SKC[:, :, self.columns : self.columns + count] = slot_K[:, None]
        elif hypotheses > 1:
            place_SKT = column_ST[:, None].expand(-1, hypotheses, -1)
            self.table_SKC.scatter_(2, place_SKT, slot_K[None, :, None].expand(sentences, -1, count))
        return mask(seen(self.table_SKC[:, :, :used], column_ST), self.like)

    def distances(self, mask: Tensor) -> Tensor:
        """From each query of the open columns to each slot under `mask`, in tokens: [S or 1, Q, J]."""
        slot_J = torch.arange(mask.shape[-1], device=mask.device) // self.hypotheses
        return slot_J - self.column_ST.repeat(1, self.hypotheses)[..., None]

    def attend(
        self, layer: int, query_SHQP: Tensor, both_2SHQP: Tensor, mask: Tensor, look: Look = attend
    ) -> Tensor:
        """Store the keys and values of the open columns, and `look` at all so far: [S, Q, D]."""
        hypotheses, store = self.hypotheses, self.both[layer]
        count = both_2SHQP.shape[3]
        if count > hypotheses > 1:  # queries run over hypotheses first, slots over columns first
            both_2SHQP = both_2SHQP.unflatten(3, (hypotheses, -1)).transpose(3, 4).flatten(3, 4)
        if self.even:
            store.narrow(3, self.slots, count).copy_(both_2SHQP)
        else:
            sentence_S1 = torch.arange(len(self.slots), device=store.device)[:, None]
            store[:, sentence_S1, :, self.slots] = both_2SHQP.permute(1, 3, 0, 2, 4)
        key_SHJP, value_SHJP = store.narrow(3, 0, mask.shape[-1]).unbind(0)
        return look(query_SHQP, key_SHJP, value_SHJP, mask)

    def reorder(self, parents_SK: Tensor) -> AncestorStore:
        used = self.table_SKC[:, :, : self.columns]
        used.copy_(used.gather(1, parents_SK[:, :, None].expand_as(used)))
        return self

    def keep(self, sentences: Tensor) -> AncestorStore:
        self.both = [both.index_select(1, sentences) for both in self.both]
        self.table_SKC = self.table_SKC.index_select(0, sentences)
        return self._filled([self.filled[sentence] for sentence in sentences.tolist()])

    def replace(self, places: Tensor, other: AncestorStore) -> AncestorStore:
        """The sentences of `other` instead of those at `places`."""
        self._fit(other)
        if other.both and self.both:
            for mine, theirs in zip(self.both, other.both, strict=True):
                mine.index_copy_(1, places, theirs)
        self.table_SKC.index_copy_(0, places, other.table_SKC)
        filled = dict(zip(places.tolist(), other.filled, strict=True))
        return self._filled([filled.get(place, columns) for place, columns in enumerate(self.filled)])

    def join(self, other: AncestorStore) -> AncestorStore:
        """The sentences of both stores."""
        self._fit(other)
        self.both = [torch.cat(pair, 1) for pair in zip(self.both, other.both, strict=True)]
        self.table_SKC = torch.cat([self.table_SKC, other.table_SKC])
        return self._filled(self.filled + other.filled)

    def _fit(self, other: AncestorStore) -> None:
        """Make both as large; an empty one has no keys as long as that is enough."""
        columns = max(self.table_SKC.shape[2], other.table_SKC.shape[2])
        for store in (self, other):
            if store.table_SKC.shape[2] < columns:
                store._resize(columns)

    def _filled(self, filled: list[int]) -> AncestorStore:
        self.filled, self.columns = filled, max(filled, default=0)
        self.even = min(filled, default=0) == self.columns
        return self

    def _resize(self, columns: int) -> None:
        """Room for so many columns."""
        more = columns - self.table_SKC.shape[2]
        self.both = [F.pad(both, [0, 0, 0, more * self.hypotheses]) for both in self.both]
        self.table_SKC = F.pad(self.table_SKC, [0, more], value=-1)

    def fork(self) -> AncestorStore:
        copy = AncestorStore(**vars(self))
        copy.both = [both.clone() for both in self.both]
        copy.table_SKC = self.table_SKC.clone()
        return copy


class Store(Protocol):
    """What `RowStore` needs of a store with one hypothesis for each sentence."""

    @property
    def even(self) -> bool: ...
    @property
    def columns(self) -> int: ...
    def advance(self, count: int) -> Tensor | None: ...
    def distances(self, mask: Any) -> Tensor: ...
    def attend(
        self, layer: int, query_SHQP: Tensor, both_2SHQP: Tensor, mask: Any, look: Look = attend
    ) -> Tensor: ...
    def keep(self, sentences: Tensor) -> Store: ...
    def replace(self, places: Tensor, other: Any) -> Store: ...
    def join(self, other: Any) -> Store: ...
    def fork(self) -> Store: ...


@dataclass
class RowStore:
    """Keys and values apart for each hypothesis: better where nothing is reordered, or K is large.

    It is the ancestor store of S * K sentences with one hypothesis each; only `reorder` moves data.
    """

    rows: Store
    hypotheses: int

    @classmethod
    def empty(
        cls, like: Tensor, sizes: tuple[int, int], *, layers: int, heads: int, width: int, room: int
    ) -> RowStore:
        """Room for `room` tokens of `sizes` = (sentences, hypotheses)."""
        flat = (sizes[0] * sizes[1], 1)
        rows = AncestorStore.empty(like, flat, layers=layers, heads=heads, width=width, room=room)
        return cls(rows, sizes[1])

    @property
    def even(self) -> bool:
        return self.rows.even

    @property
    def columns(self) -> int:
        return self.rows.columns

    def advance(self, count: int) -> Tensor | None:
        """Open `count` columns; returns the additive mask of the queries that fill them, if it is needed."""
        return self.rows.advance(count)

    def distances(self, mask: Any) -> Tensor:
        """From each query of the open columns to each column under `mask`: [S * K or 1, T, J]."""
        return self.rows.distances(mask)

    def attend(
        self, layer: int, query_SHQP: Tensor, both_2SHQP: Tensor, mask: Any, look: Look = attend
    ) -> Tensor:
        """Store the keys and values of the open columns, and `look` at all so far: [S, Q, D]."""
        query = query_SHQP.unflatten(2, (self.hypotheses, -1)).transpose(1, 2).flatten(0, 1)
        both = both_2SHQP.unflatten(3, (self.hypotheses, -1)).transpose(2, 3).flatten(1, 2)
        out = self.rows.attend(layer, query, both, mask, look)
        return out.unflatten(0, (-1, self.hypotheses)).flatten(1, 2)

    def reorder(self, parents_SK: Tensor) -> RowStore:
        start_S1 = torch.arange(parents_SK.shape[0], device=parents_SK.device)[:, None] * self.hypotheses
        return replace(self, rows=self.rows.keep((start_S1 + parents_SK).flatten()))

    def _rows(self, sentences: Tensor) -> Tensor:
        hypothesis_K = torch.arange(self.hypotheses, device=sentences.device)
        return (sentences[:, None] * self.hypotheses + hypothesis_K).flatten()

    def keep(self, sentences: Tensor) -> RowStore:
        return replace(self, rows=self.rows.keep(self._rows(sentences)))

    def replace(self, places: Tensor, other: RowStore) -> RowStore:
        return replace(self, rows=self.rows.replace(self._rows(places), other.rows))

    def join(self, other: RowStore) -> RowStore:
        return replace(self, rows=self.rows.join(other.rows))

    def fork(self) -> RowStore:
        return replace(self, rows=self.rows.fork())


def key_value_store(
    like: Tensor, sizes: tuple[int, int], *, reorders: bool, layers: int, heads: int, width: int, room: int
) -> AncestorStore | RowStore:
    """The store that suits the number of hypotheses and whether they are reordered."""
    kind = AncestorStore if shares(sizes[1], reorders=reorders) else RowStore
    return kind.empty(like, sizes, layers=layers, heads=heads, width=width, room=room)


def shares(hypotheses: int, *, reorders: bool) -> bool:
    """Whether hypotheses had better look at common slots than at rows of their own."""
    return hypotheses == 1 or (reorders and hypotheses <= ANCESTOR_LIMIT)
