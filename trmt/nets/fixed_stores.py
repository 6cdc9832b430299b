"""A store of keys and values whose tensors keep their shapes, for steps that are recorded once and replayed.

Axes: S sentence, K hypothesis, T target position, Q queries (K * T of them), C columns of the
store, J slots of the store (C * K), H heads, P width of one head.

An accelerator that replays a recorded step runs the same kernels over the same memory again. So nothing here
depends on numbers that the host would have to know: how many tokens each sentence has is a tensor, and every
column there is room for is there from the beginning. Only `columns`, so many of which attention looks at, is
the host's, and recorded with the step.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trmt.nets import looking_back, stores
from trmt.nets.layers import Look, attend
from trmt.nets.stores import RowStore


@dataclass
class FixedStore:
    """Does what `AncestorStore` does, without ever asking the device for a value.

    What stands beyond the tokens that a sentence has is masked; it may be left from a sentence that stood
    there before. A sentence that goes on beyond the store writes over its last column.
    """

    like: Tensor  # any tensor of the kind the keys are
    sizes: tuple[int, int, int]  # layers, heads, width of a head
    table_SKC: Tensor  # as in `AncestorStore`
    filled_S: Tensor  # columns of each sentence
    columns: int  # so many are looked at: at least those of the fullest sentence, after its next token
    both: list[Tensor]  # of each layer, keys and values [2, S, H, J, P]; none before they are needed

    even = False  # whether all sentences are known to have as many columns

    def __post_init__(self) -> None:
        self._column_ST = self.filled_S  # those of `advance`
        self._mask: Tensor | None = None

    @classmethod
    def empty(
        cls, like: Tensor, sizes: tuple[int, int], *, layers: int, heads: int, width: int, room: int
    ) -> FixedStore:
        """A store for `room` tokens of `sizes` = (sentences, hypotheses)."""
        columns = stores.padded(room, sizes[1])
        table_SKC = torch.full((*sizes, columns), -1, dtype=torch.long, device=like.device)
        filled_S = torch.zeros(sizes[0], dtype=torch.long, device=like.device)
        return cls(like.new_empty(0), (layers, heads, width // heads), table_SKC, filled_S, columns, [])

    def _take_up_space(self) -> None:
        """Keys and values, which a store does without until somebody writes to it."""
        if not self.both:
            layers, heads, part = self.sizes
            sentences, hypotheses, columns = self.table_SKC.shape
            shape = (2, sentences, heads, columns * hypotheses, part)
            # Zeros and not garbage: masked slots are multiplied by zero, and zero times NaN is NaN.
            self.both = [self.like.new_zeros(shape) for _ in range(layers)]

    @property
    def hypotheses(self) -> int:
        return self.table_SKC.shape[1]

    def front(self, sentences: int, columns: int) -> FixedStore:
        """The first sentences, of which so many columns are looked at: a view, which steps write to."""
        self._take_up_space()
        columns = min(stores.padded(columns, self.hypotheses), self.table_SKC.shape[2])
        return replace(
            self,
            table_SKC=self.table_SKC[:sentences],
            filled_S=self.filled_S[:sentences],
            columns=columns,
            both=[both[:, :sentences] for both in self.both],
        )

    def advance(self, count: int) -> Tensor | None:
        """Open `count` columns; the additive mask [S, 1, Q, J] of who fills them, unless a kernel knows."""
        self._take_up_space()
        last = self.table_SKC.shape[2] - 1
        step_T = torch.arange(count, device=self.filled_S.device)
        self._column_ST = (self.filled_S[:, None] + step_T).clamp(max=last)
        slot_K = torch.arange(self.hypotheses, device=step_T.device)
        place_SKT = self._column_ST[:, None].expand(-1, self.hypotheses, -1)
        own_SKT = slot_K[None, :, None].expand_as(place_SKT)
        self.table_SKC.scatter_(2, place_SKT, own_SKT)
        self.filled_S += count
        self._mask = None
        return None if self._by_kernel() else self._masked()

    def _by_kernel(self) -> bool:
        return self._column_ST.shape[1] == 1 and looking_back.suits(self.like, self.sizes[2])

    def _masked(self) -> Tensor:
        if self._mask is None:
            seen_SQJ = stores.seen(self.table_SKC[:, :, : self.columns], self._column_ST)
            self._mask = stores.mask(seen_SQJ, self.like)
        return self._mask

    def distances(self, mask: Tensor | None) -> Tensor:
        """From each query of the open columns to each slot that is looked at, in tokens: [S, Q, J]."""
        slot_J = torch.arange(self.columns * self.hypotheses, device=self.filled_S.device) // self.hypotheses
        return slot_J - self._column_ST.repeat(1, self.hypotheses)[..., None]

    def attend(
        self, layer: int, query_SHQP: Tensor, both_2SHQP: Tensor, mask: Tensor | None, look: Look = attend
    ) -> Tensor:
        """Store the keys and values of the open columns, and `look` at all so far: [S, Q, D]."""
        store = self.both[layer]
        if look is attend and self._by_kernel():
            return looking_back.look_back(
                query_SHQP,
                both_2SHQP,
                store,
                table_SKC=self.table_SKC if self.hypotheses > 1 else None,
                position_S=self._column_ST[:, 0],
                columns=self.columns,
            )
        if both_2SHQP.shape[3] > self.hypotheses > 1:  # queries run over hypotheses first, slots over columns
            both_2SHQP = both_2SHQP.unflatten(3, (self.hypotheses, -1)).transpose(3, 4).flatten(3, 4)
        slot_K = torch.arange(self.hypotheses, device=store.device)
        slots_SQ = (self._column_ST[:, :, None] * self.hypotheses + slot_K).flatten(1)
        store.scatter_(3, slots_SQ[None, :, None, :, None].expand(both_2SHQP.shape), both_2SHQP)
        mask = self._masked() if mask is None else mask
        key_SHJP, value_SHJP = store.narrow(3, 0, mask.shape[-1]).unbind(0)
        return look(query_SHQP, key_SHJP, value_SHJP, mask)

    def reorder(self, parents_SK: Tensor) -> FixedStore:
        used = self.table_SKC[:, :, : self.columns]
        used.copy_(used.gather(1, parents_SK[:, :, None].expand_as(used)))
        return self

    def keep(self, sentences: Tensor) -> FixedStore:
        return replace(
            self,
            table_SKC=self.table_SKC.index_select(0, sentences),
            filled_S=self.filled_S.index_select(0, sentences),
            both=[both.index_select(1, sentences) for both in self.both],
        )

    def replace(self, places: Tensor, other: FixedStore) -> FixedStore:
        """The sentences of `other`, which has as much room, instead of those at `places`."""
        if other.both:  # otherwise it has seen nothing, and its table says so
            self._take_up_space()
        for mine, theirs in zip(self.both, other.both, strict=False):
            mine.index_copy_(1, places, theirs)
        self.table_SKC.index_copy_(0, places, other.table_SKC)
        self.filled_S.index_copy_(0, places, other.filled_S)
        return self

    def join(self, other: FixedStore) -> FixedStore:
        """The sentences of both stores, which have as much room."""
        for store in (self, other):
            store._take_up_space()
        return replace(
            self,
            table_SKC=torch.cat([self.table_SKC, other.table_SKC]),
            filled_S=torch.cat([self.filled_S, other.filled_S]),
            both=[torch.cat(pair, 1) for pair in zip(self.both, other.both, strict=True)],
        )

    def fork(self) -> FixedStore:
        return replace(
            self,
            table_SKC=self.table_SKC.clone(),
            filled_S=self.filled_S.clone(),
            both=[both.clone() for both in self.both],
        )


@dataclass
class FixedRows(RowStore):
    """Rows of their own for each hypothesis, in a store that keeps its shapes."""

    @classmethod
    def empty(
        cls, like: Tensor, sizes: tuple[int, int], *, layers: int, heads: int, width: int, room: int
    ) -> FixedRows:
        """A store for `room` tokens of `sizes` = (sentences, hypotheses)."""
        flat = (sizes[0] * sizes[1], 1)
        rows = FixedStore.empty(like, flat, layers=layers, heads=heads, width=width, room=room)
        return cls(rows, sizes[1])

    def front(self, sentences: int, columns: int) -> FixedRows:
        """The first sentences, of which so many columns are looked at."""
        assert isinstance(self.rows, FixedStore)
        return FixedRows(self.rows.front(sentences * self.hypotheses, columns), self.hypotheses)


def key_value_store(
    like: Tensor, sizes: tuple[int, int], *, reorders: bool, layers: int, heads: int, width: int, room: int
) -> FixedStore | FixedRows:
    """The store that suits the number of hypotheses and whether they are reordered."""
    # The kernel looks at no more than the ancestors of a hypothesis, however many others there are.
    by_kernel = reorders and looking_back.suits(like, width // heads)
    kind = FixedStore if by_kernel or stores.shares(sizes[1], reorders=reorders) else FixedRows
    return kind.empty(like, sizes, layers=layers, heads=heads, width=width, room=room)
