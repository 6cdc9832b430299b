"""Which ids the scores of a batch are about: the whole vocabulary, or for each sentence a list of its own.

Axes: S sentence, K hypothesis, D width of the hidden states, V vocabulary, C columns of a list, U ids of all
lists.

A search sees scores and chooses columns. With lists these are not ids, but in the same order, and that of the
end of sentence has the same number. Lists are all of one width, filled up with columns that cannot be chosen:
so the place of a score depends on its sentence alone, and with it every bit of every sum.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trmt.arch.base import Stepper
from trmt.decode.base import Hypothesis
from trmt.engines.base import Request
from trmt.saved.lexicon import Lexicon

WORTH = 0.6  # of the vocabulary: with more ids in all lists, choosing them takes longer than it saves


class Whole:
    """Columns are ids."""

    def __init__(self, stepper: Stepper, banned: Tensor, block: slice | None = None) -> None:
        """`block` are the banned ids, if they follow one another."""
        self.stepper, self.banned, self.block = stepper, banned, block

    def seen(self, requests: Sequence[Request]) -> Sequence[Request]:
        """The requests with columns in their prefixes."""
        return requests

    def scores(self, hidden_SKD: Tensor) -> Tensor:
        """A score for each column."""
        return self.stepper.readout(hidden_SKD)

    @property
    def product(self) -> Any:
        """The matrix product in `scores`."""
        return self.stepper.product

    @property
    def lists(self) -> tuple[Tensor, ...]:
        """[S, C]: which of the product's outputs each column is, its id, and whether it is impossible."""
        return ()

    def ids(self, columns_SK: Tensor) -> Tensor:
        """The ids that these columns stand for."""
        return columns_SK

    def named(self, place: int, hypotheses: list[Hypothesis]) -> list[Hypothesis]:
        """The hypotheses of the sentence at `place` with ids for columns."""
        return hypotheses

    def keep(self, sentences: Tensor) -> None:
        """Those of these sentences only."""

    def replace(self, places: Tensor, other: Whole) -> None:
        """Those of the sentences of `other` instead of those at `places`."""


class Listed(Whole):
    """Columns are places in the sentence's list."""

    def __init__(
        self, requests: Sequence[Request], lexicon: Lexicon, *, stepper: Stepper, banned: Tensor
    ) -> None:
        super().__init__(stepper, banned[:0])  # what is banned is closed here
        self.vocabulary = lexicon.vocabulary
        ids = np.zeros((len(requests), lexicon.width), np.int64)
        closed = np.ones(ids.shape, np.bool_)
        is_banned = np.zeros(lexicon.vocabulary, np.bool_)
        is_banned[[token for token in banned.tolist() if token < lexicon.vocabulary]] = True
        for row, shut, request in zip(ids, closed, requests, strict=True):
            listed = lexicon.listed(request.source, request.prefix)
            row[: len(listed)] = listed
            shut[: len(listed)] = is_banned[listed]
        self.ids_SC = torch.from_numpy(ids).to(banned.device)
        self.closed_SC = torch.from_numpy(closed).to(banned.device)
        self._chosen: Tensor | None = None  # the ids that are read out
        self._columns_SC: Tensor | None = None  # where among these each column is
        self._narrowed: Any = None  # what reads these out; None: all are

    def seen(self, requests: Sequence[Request]) -> Sequence[Request]:
        lists = [sorted(set(row)) for row in self.ids_SC.tolist()]  # without what they are filled up with
        return [
            replace(request, prefix=tuple(bisect_left(listed, token) for token in request.prefix))
            for request, listed in zip(requests, lists, strict=True)
        ]

    def scores(self, hidden_SKD: Tensor) -> Tensor:
        columns_SC = self._chosen_columns()
        read_SKU = (self._narrowed or self.stepper.readout)(hidden_SKD)
        columns_SKC = columns_SC[:, None].expand(-1, read_SKU.shape[1], -1)
        scores_SKC = read_SKU.gather(2, columns_SKC)
        return scores_SKC.masked_fill_(self.closed_SC[:, None], -torch.inf)

    @property
    def product(self) -> Any:
        self._chosen_columns()
        return self._narrowed or self.stepper.product

    @property
    def lists(self) -> tuple[Tensor, ...]:
        return self._chosen_columns(), self.ids_SC, self.closed_SC

    def _chosen_columns(self) -> Tensor:
        if self._columns_SC is None:
            self._columns_SC = self._choose()
        return self._columns_SC

    def _choose(self) -> Tensor:
        """Have the ids of all lists read out, which takes preparation, unless they are already."""
        wanted = torch.unique(self.ids_SC)
        if len(wanted) > WORTH * self.vocabulary:
            self._chosen = self._narrowed = None
            return self.ids_SC
        if self._chosen is None or not torch.isin(wanted, self._chosen).all():
            self._chosen, self._narrowed = wanted, self.stepper.narrowed(wanted)
        return torch.searchsorted(self._chosen, self.ids_SC)

    def ids(self, columns_SK: Tensor) -> Tensor:
        return self.ids_SC.gather(1, columns_SK)

    def named(self, place: int, hypotheses: list[Hypothesis]) -> list[Hypothesis]:
        row = self.ids_SC[place].tolist()
        return [replace(each, ids=tuple(row[column] for column in each.ids)) for each in hypotheses]

    def keep(self, sentences: Tensor) -> None:
        self.ids_SC, self.closed_SC = self.ids_SC[sentences], self.closed_SC[sentences]
        if self._columns_SC is not None:
            self._columns_SC = self._columns_SC[sentences]

    def replace(self, places: Tensor, other: Whole) -> None:
        assert isinstance(other, Listed), "one batch has one kind of columns"
        self.ids_SC = self.ids_SC.index_copy(0, places, other.ids_SC)
        self.closed_SC = self.closed_SC.index_copy(0, places, other.closed_SC)
        self._columns_SC = None
