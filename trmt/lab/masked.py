"""Masked language model and next-sentence prediction (BERT, arXiv 1810.04805).

15 % of the tokens are selected and predicted: 80 % of those are masked, 10 % are replaced by a random token,
10 % stay. The mask is the unknown token. With `whole_words`, the tokens of a word are selected together. An
example is `bos A eos B eos`, and half of the time B is from another document.

Axes: S sentence, M all tokens in a row, N selected tokens, D hidden size, V vocabulary.
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

from trmt.devices.transfer import to_device
from trmt.errors import ConfigError
from trmt.lab.masked_encoder import MaskedEncoder
from trmt.nets.ragged import Source
from trmt.objectives.base import Loss, Objective, Specials
from trmt.sets.batches import Batches, BatchShape, RaggedBatch
from trmt.sets.passages import Passages, mix_bits

Ints = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class MaskedConfig:
    """The options of masking; the defaults are the paper's."""

    rate: float = 0.15  # share of the tokens that are selected
    masked: float = 0.8  # share of the selected tokens that are masked
    random: float = 0.1  # share of the selected tokens that are replaced by a random one; the others stay
    whole_words: bool = False  # select words and not single tokens
    next_sentence: bool = True  # whether next sentences are predicted, too
    next_weight: float = 20.0  # weight of a next-sentence prediction, where that of a token is 1

    def __post_init__(self) -> None:
        if not 0 < self.rate < 1:
            raise ConfigError(f"loss.rate = {self.rate} is out of range; set it above 0 and below 1")
        if min(self.masked, self.random) < 0 or self.masked + self.random > 1:
            raise ConfigError(
                f"loss.masked = {self.masked} and loss.random = {self.random} are shares of the same tokens; "
                "set them from 0 and together to 1 at most"
            )
        if self.next_weight < 0:
            raise ConfigError(f"loss.next_weight = {self.next_weight} is below 0; set it to 0 or above")


@dataclass(frozen=True)
class MaskedBatch:
    """A batch for the network, and what it has to predict."""

    source: Source  # with `segments` among its extras
    selected_N: Tensor  # the selected tokens, as positions in the row
    tokens_N: Tensor  # what they were
    starts_S: Tensor  # where examples begin
    next_S: Tensor | None  # 0 where the second segment follows the first
    tokens: int


class Masked(Objective):
    """Predict the selected tokens, and whether the second segment follows the first."""

    config_class = MaskedConfig
    networks = (MaskedEncoder,)

    def __init__(self, config: MaskedConfig, specials: Specials) -> None:
        self.config, self.specials = config, specials

    @classmethod
    def batches(cls, config: MaskedConfig) -> Callable[..., Batches]:
        return partial(Passages, next_sentence=config.next_sentence)

    def tokens(self, examples: RaggedBatch) -> int:
        return int(_select(_join(examples, self.specials), self.config, self.specials).sum())

    def collate(
        self, examples: RaggedBatch, device: torch.device, *, shape: BatchShape | None = None
    ) -> MaskedBatch:
        row = _join(examples, self.specials)
        (selected,) = np.nonzero(_select(row, self.config, self.specials))
        ids = row.ids.copy()
        ids[selected] = self._replacements(row, selected)
        follows = examples.columns["follows"].values
        starts = np.cumsum(row.lengths) - row.lengths

        def moved(array: NDArray[Any]) -> Tensor:
            return to_device(torch.from_numpy(array), device)

        extras = {"segments": moved(row.segments)}
        return MaskedBatch(
            Source(moved(ids), moved(row.lengths), int(row.lengths.max()), extras),
            moved(selected),
            moved(row.ids[selected]),
            moved(starts),
            moved(1 - follows) if self.config.next_sentence else None,
            len(selected),
        )

    def _replacements(self, row: _Row, selected: Ints) -> Ints:
        """What the network gets for the selected tokens: masks, random tokens, or the tokens themselves."""
        config, specials = self.config, self.specials
        keys, positions = row.keys[selected], selected - row.starts[selected]
        choice, other = (_uniform(keys, positions, draw) for draw in (1, 2))
        tokens = specials.first + (other * (specials.vocabulary - specials.first)).astype(np.int64)
        replaced = np.where(choice < config.masked + config.random, tokens, row.ids[selected])
        return np.where(choice < config.masked, specials.unk, replaced)

    def loss(self, net: Any, batch: MaskedBatch) -> Loss:
        hidden_MD = net(batch.source).hidden
        logits_NV = net.readout(hidden_MD[batch.selected_N]).float()
        nll = F.cross_entropy(logits_NV, batch.tokens_N, reduction="sum")
        if batch.next_S is None:
            return Loss(nll, nll.detach(), batch.tokens)
        next_S2 = net.next_sentence_logits(hidden_MD[batch.starts_S]).float()
        total = nll + self.config.next_weight * F.cross_entropy(next_S2, batch.next_S, reduction="sum")
        right = (next_S2.argmax(-1) == batch.next_S).sum()
        return Loss(total, nll.detach(), batch.tokens, right, len(batch.next_S))


@dataclass(frozen=True)
class _Row:
    """The tokens of all examples, one after another."""

    ids: Ints
    lengths: Ints  # of the examples
    segments: Ints  # the segment of each token
    text: NDArray[np.bool_]  # whether a token is one of the text, and not special
    keys: NDArray[np.uint64]  # of the example of each token

    @property
    def starts(self) -> Ints:
        """Where the example of each token begins."""
        return np.repeat(np.cumsum(self.lengths) - self.lengths, self.lengths)


def _join(examples: RaggedBatch, specials: Specials) -> _Row:
    """`bos A eos B eos`, or `bos A eos` where there is no B."""
    first, second = (examples.columns[f"{segment}.ids"] for segment in ("first", "second"))
    two = (second.lengths > 0).astype(np.int64)
    lengths = first.lengths + second.lengths + 2 + two
    starts = np.cumsum(lengths) - lengths
    ids = np.full(int(lengths.sum()), specials.eos, np.int64)
    text, segments = np.zeros(len(ids), bool), np.zeros(len(ids), np.int64)
    ids[starts] = specials.bos
    for segment, begins in ((first, starts + 1), (second, starts + 2 + first.lengths)):
        shift = begins - (np.cumsum(segment.lengths) - segment.lengths)
        positions = np.repeat(shift, segment.lengths) + np.arange(len(segment.values))
        ids[positions], text[positions] = segment.values, True
    position = np.arange(len(ids)) - np.repeat(starts, lengths)
    segments[position >= np.repeat(2 + first.lengths, lengths)] = 1
    keys = np.repeat(examples.columns["key"].values, lengths)
    return _Row(ids, lengths.astype(np.int64), segments, text, keys)


def _select(row: _Row, config: MaskedConfig, specials: Specials) -> NDArray[np.bool_]:
    """Which tokens are selected: of each example a fixed share, and at least one word."""
    example = np.repeat(np.arange(len(row.lengths)), row.lengths)
    begins = row.text & (specials.begins_word[row.ids] if config.whole_words else True)
    # A word also begins where a segment does, whatever its first token.
    begins |= row.text & ~np.concatenate([[False], row.text[:-1]])
    word = np.cumsum(begins) - 1  # of each token of the text
    (firsts,) = np.nonzero(begins)
    sizes = np.bincount(word[row.text], minlength=len(firsts))
    # The words of each example in random order, as many as fit into its share
    draw = _uniform(row.keys[firsts], firsts - row.starts[firsts], 0)
    order = np.lexsort((draw, example[firsts]))
    example_of = example[firsts][order]
    until = np.cumsum(sizes[order])
    before = until - sizes[order]
    first_words = np.searchsorted(example_of, np.arange(len(row.lengths)))
    share = np.maximum(1, np.rint(config.rate * np.bincount(example[row.text], minlength=len(row.lengths))))
    earlier = np.concatenate([before, [0]])[first_words][example_of]  # tokens of earlier examples
    chosen = (until - earlier <= share[example_of]) | (before == earlier)
    selected = np.zeros(len(firsts), bool)
    selected[order[chosen]] = True
    return row.text & selected[np.maximum(word, 0)]


def _uniform(keys: NDArray[np.uint64], positions: Ints, draw: int) -> NDArray[np.float64]:
    """A number from 0 to below 1 that depends on a position of an example alone."""
    number = mix_bits(mix_bits(keys + np.uint64(draw)) + positions.astype(np.uint64))
    return (number >> np.uint64(11)).astype(np.float64) * 2.0**-53
