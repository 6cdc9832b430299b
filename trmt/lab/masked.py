"""Masked language model and next-sentence prediction (BERT, arXiv 1810.04805): learning to read.

Of the pieces, 15 % are to be told from what stands around them: 80 % of those are masked, 10 % are another
piece, 10 % are left as they are. The mask is the unknown piece. With `whole_words`, the pieces of a word are
chosen together. An example is `bos A eos B eos`, and half of the time B is from another document.

Axes: S sentence, M all tokens in a row, N those that are asked for, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from trmt.errors import ConfigError
from trmt.lab.masked_encoder import MaskedEncoder
from trmt.nets.base import Source
from trmt.objectives.base import Loss, Objective, Specials
from trmt.sets.batches import Batches, BatchShape, RaggedBatch
from trmt.sets.passages import Passages, mix_bits

Ints = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class MaskedConfig:
    """The options of masking; the defaults are the paper's."""

    rate: float = 0.15  # of the pieces that are asked for
    masked: float = 0.8  # of these, that are masked
    random: float = 0.1  # of these, that are another piece; the rest is left as it is
    whole_words: bool = False  # choose words and not pieces
    next_sentence: bool = True
    next_weight: float = 20.0  # the question for the next sentence counts as much as so many pieces

    def __post_init__(self) -> None:
        if not 0 < self.rate < 1:
            raise ConfigError(f"loss.rate = {self.rate} is out of range; set it above 0 and below 1")
        if min(self.masked, self.random) < 0 or self.masked + self.random > 1:
            raise ConfigError(
                f"loss.masked = {self.masked} and loss.random = {self.random} are shares of the same pieces; "
                "set them from 0 and together to 1 at most"
            )
        if self.next_weight < 0:
            raise ConfigError(f"loss.next_weight = {self.next_weight} is below 0; set it to 0 or above")


@dataclass(frozen=True)
class MaskedBatch:
    """A batch as the network wants it, and what it is asked."""

    source: Source  # with `segments` among its extras
    places_N: Tensor  # of the pieces that are asked for, in the row
    pieces_N: Tensor  # what stood there
    starts_S: Tensor  # where examples begin
    next_S: Tensor | None  # 0 where the second part follows the first
    tokens: int


class Masked(Objective):
    """Guess the pieces that were masked, and whether what follows really did."""

    config_class = MaskedConfig
    networks = (MaskedEncoder,)

    def __init__(self, config: MaskedConfig, specials: Specials) -> None:
        self.config, self.specials = config, specials

    @classmethod
    def batches(cls, config: MaskedConfig) -> Callable[..., Batches]:
        return partial(Passages, next_sentence=config.next_sentence)

    def tokens(self, examples: RaggedBatch) -> int:
        return int(self._row(examples).asked.sum())

    def _row(self, examples: RaggedBatch) -> _Row:
        row = _joined(examples, self.specials)
        asked = _asked(row, self.config, self.specials)
        return _Row(row.ids, row.lengths, row.segments, row.text, row.keys, asked)

    def collate(
        self, examples: RaggedBatch, device: torch.device, *, shape: BatchShape | None = None
    ) -> MaskedBatch:
        row = self._row(examples)
        (places,) = np.nonzero(row.asked)
        ids = row.ids.copy()
        ids[places] = self._shown(row, places)
        extras = {"segments": torch.from_numpy(row.segments).to(device)}
        lengths = torch.from_numpy(row.lengths)
        follows = examples.columns["follows"].values
        return MaskedBatch(
            Source(torch.from_numpy(ids).to(device), lengths.to(device), int(row.lengths.max()), extras),
            torch.from_numpy(places).to(device),
            torch.from_numpy(row.ids[places]).to(device),
            (lengths.cumsum(0) - lengths).to(device),
            torch.from_numpy(1 - follows).to(device) if self.config.next_sentence else None,
            len(places),
        )

    def _shown(self, row: _Row, places: Ints) -> Ints:
        """What stands at the places that are asked for."""
        config, specials = self.config, self.specials
        fate, other = (_uniform(row.keys[places], places - row.begins[places], n) for n in (1, 2))
        pieces = specials.first + (other * (specials.vocabulary - specials.first)).astype(np.int64)
        shown = np.where(fate < config.masked + config.random, pieces, row.ids[places])
        return np.where(fate < config.masked, specials.unk, shown)

    def loss(self, net: Any, batch: MaskedBatch) -> Loss:
        hidden_MD = net(batch.source).hidden
        logits_NV = net.readout(hidden_MD[batch.places_N]).float()
        nll = F.cross_entropy(logits_NV, batch.pieces_N, reduction="sum")
        if batch.next_S is None:
            return Loss(nll, nll.detach(), batch.tokens)
        judged_S2 = net.judge(hidden_MD[batch.starts_S]).float()
        total = nll + self.config.next_weight * F.cross_entropy(judged_S2, batch.next_S, reduction="sum")
        right = (judged_S2.argmax(-1) == batch.next_S).sum()
        return Loss(total, nll.detach(), batch.tokens, right, len(batch.next_S))


@dataclass(frozen=True)
class _Row:
    """Examples one after the other, token by token."""

    ids: Ints
    lengths: Ints  # of the examples
    segments: Ints
    text: NDArray[np.bool_]  # whether a token is one of the text, and no mark
    keys: NDArray[np.uint64]  # of the example that a token is of
    asked: NDArray[np.bool_]

    @property
    def begins(self) -> Ints:
        """Where the example begins that a token is of."""
        return np.repeat(np.cumsum(self.lengths) - self.lengths, self.lengths)


def _joined(examples: RaggedBatch, specials: Specials) -> _Row:
    """`bos A eos B eos`, or `bos A eos` where there is no B."""
    first, second = (examples.columns[f"{part}.ids"] for part in ("first", "second"))
    two = (second.lengths > 0).astype(np.int64)
    lengths = first.lengths + second.lengths + 2 + two
    begins = np.cumsum(lengths) - lengths
    ids = np.full(int(lengths.sum()), specials.eos, np.int64)
    text, segments = np.zeros(len(ids), bool), np.zeros(len(ids), np.int64)
    ids[begins] = specials.bos
    for part, starts in ((first, begins + 1), (second, begins + 2 + first.lengths)):
        shift = starts - (np.cumsum(part.lengths) - part.lengths)
        places = np.repeat(shift, part.lengths) + np.arange(len(part.values))
        ids[places], text[places] = part.values, True
    within = np.arange(len(ids)) - np.repeat(begins, lengths)
    segments[within >= np.repeat(2 + first.lengths, lengths)] = 1
    keys = np.repeat(examples.columns["key"].values, lengths)
    return _Row(ids, lengths.astype(np.int64), segments, text, keys, np.zeros(len(ids), bool))


def _asked(row: _Row, config: MaskedConfig, specials: Specials) -> NDArray[np.bool_]:
    """Which tokens are asked for: of each example a fixed share, and always something."""
    example = np.repeat(np.arange(len(row.lengths)), row.lengths)
    starts = row.text & (specials.begins_word[row.ids] if config.whole_words else True)
    # A word also begins where the text does, whatever its first piece.
    starts |= row.text & ~np.concatenate([[False], row.text[:-1]])
    word = np.cumsum(starts) - 1  # of each token of the text
    (firsts,) = np.nonzero(starts)
    sizes = np.bincount(word[row.text], minlength=len(firsts))
    lot = _uniform(row.keys[firsts], firsts - row.begins[firsts], 0)
    order = np.lexsort((lot, example[firsts]))
    of = example[firsts][order]
    taken = np.cumsum(sizes[order])
    before = taken - sizes[order]
    begins = np.searchsorted(of, np.arange(len(row.lengths)))
    wanted = np.maximum(1, np.rint(config.rate * np.bincount(example[row.text], minlength=len(row.lengths))))
    earlier = np.concatenate([before, [0]])[begins][of]
    chosen = (taken - earlier <= wanted[of]) | (before == earlier)
    picked = np.zeros(len(firsts), bool)
    picked[order[chosen]] = True
    return row.text & picked[np.maximum(word, 0)]


def _uniform(keys: NDArray[np.uint64], places: Ints, draw: int) -> NDArray[np.float64]:
    """A number from 0 to below 1 that belongs to a place of an example alone."""
    number = mix_bits(mix_bits(keys + np.uint64(draw)) + places.astype(np.uint64))
    return (number >> np.uint64(11)).astype(np.float64) * 2.0**-53
