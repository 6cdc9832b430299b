"""The attention weights of a network for pairs of sentences, by teacher forcing.

Axes: S sentence, A layers, H heads, T target position, L source position, Q rows, J columns.

Rows are queries, columns are keys. The rows of "cross" and "decoder" are the target pieces that the decoder
outputs, </s> last. The columns of "cross" are the source pieces and </s>; those of "decoder" are the
decoder's inputs, <s> first. In "encoder" both are the source pieces and </s>.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

import torch
from torch import Tensor

from trmt.errors import ConfigError, DataError
from trmt.nets.base import Seq2Seq, WantedWeights
from trmt.nets.ragged import Ragged, Source
from trmt.text.tokenizer import Side, Tokenizer

AttentionKind = Literal["cross", "encoder", "decoder"]
KINDS: tuple[AttentionKind, ...] = get_args(AttentionKind)
BATCH_PAIRS = 64
MAX_CELLS = 1 << 20  # of one layer and head of a batch, unless a single pair has more
SPACE = "\u2581"  # sentencepiece's symbol for white space

IdSequence = Sequence[int]
IdPair = tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class AttentionWeights:
    """The weights of a pair by kind of attention: [A, H, Q, J] in fp32 on the CPU."""

    source: tuple[int, ...]  # ids with </s>
    target: tuple[int, ...]  # ids with </s>
    weights: Mapping[str, Tensor]


def attention_weights(
    net: Seq2Seq,
    tokenizer: Tokenizer,
    pairs: Iterable[tuple[IdSequence, IdSequence]],
    *,
    kinds: Sequence[AttentionKind] = ("cross",),
) -> Iterator[AttentionWeights]:
    """The weights of each pair of (source ids, target ids) without special ids; the network is in eval mode.

    Raises a ConfigError for a kind that the network does not have, a DataError for a pair longer than its
    positions.
    """
    longest = max_positions(net)
    eos, bos = tokenizer.target.eos, tokenizer.target.bos
    for batch in _batches(((*source, tokenizer.source.eos), (*target, eos)) for source, target in pairs):
        for source, target in batch:
            if max(len(source), len(target)) > longest:
                raise DataError(
                    f"a pair has {len(source)} and {len(target)} pieces, but the network has {longest} "
                    "positions; leave it out"
                )
        yield from _batch_weights(net, batch, kinds, bos)


def layers_and_heads(net: Seq2Seq, tokenizer: Tokenizer) -> dict[AttentionKind, tuple[int, int]]:
    """The number of layers and heads of each kind of attention that a network has."""
    found: dict[AttentionKind, tuple[int, int]] = {}
    for kind in KINDS:
        try:
            [empty] = attention_weights(net, tokenizer, [((), ())], kinds=(kind,))
        except ConfigError:
            continue
        layers, heads, *_ = empty.weights[kind].shape
        found[kind] = (layers, heads)
    return found


def max_positions(net: Seq2Seq) -> int:
    """The maximum number of pieces of a sentence, including </s>."""
    return net.max_positions


def _batches(pairs: Iterable[IdPair]) -> Iterator[list[IdPair]]:
    batch: list[IdPair] = []
    longest = 0
    for pair in pairs:
        longest = max(longest, *map(len, pair))
        if batch and (len(batch) == BATCH_PAIRS or (len(batch) + 1) * longest**2 > MAX_CELLS):
            yield batch
            batch, longest = [], max(map(len, pair))
        batch.append(pair)
    if batch:
        yield batch


@torch.no_grad()
def _batch_weights(
    net: Seq2Seq, batch: Sequence[IdPair], kinds: Sequence[AttentionKind], bos: int
) -> Iterator[AttentionWeights]:
    device = next(net.parameters()).device
    source = Source.of([source for source, _ in batch], device)
    target = Ragged.of([(bos, *target[:-1]) for _, target in batch], device)
    output = net(source, target, want=WantedWeights(**dict.fromkeys(kinds, True)))
    found = {kind: _check(getattr(output, f"{kind}_attention"), kind) for kind in kinds}
    for index, (source_ids, target_ids) in enumerate(batch):
        rows = {"cross": len(target_ids), "encoder": len(source_ids), "decoder": len(target_ids)}
        columns = {**rows, "cross": len(source_ids)}
        weights: dict[str, Tensor] = {
            kind: weights_ASHQJ[:, index, :, : rows[kind], : columns[kind]].float().cpu().clone()
            for kind, weights_ASHQJ in found.items()
        }
        yield AttentionWeights(source_ids, target_ids, weights)


def _check(weights: Tensor | None, kind: AttentionKind) -> Tensor:
    if weights is not None:
        return weights
    if kind == "cross":
        raise ConfigError(
            "this network has no cross-attention: its decoder uses a fixed vector of the source; "
            "choose another model"
        )
    raise ConfigError(f"this network has no {kind} self-attention; leave out --kind {kind}")


def words(side: Side, ids: IdSequence) -> list[range]:
    """The positions of the pieces of each word; words are separated by white space, special ids are words."""
    pieces = side.pieces(ids)
    special = {side.pad, side.bos, side.eos}
    begins = [
        position
        for position, (token, piece) in enumerate(zip(ids, pieces, strict=True))
        if position == 0 or piece.startswith(SPACE) or token in special or ids[position - 1] in special
    ]
    return [range(*ends) for ends in pairwise([*begins, len(ids)])]


def word_weights(weights_AHQJ: Tensor, rows: Sequence[range], columns: Sequence[range]) -> Tensor:
    """The weights between words: summed over the pieces of a column, averaged over those of a row."""
    summed = torch.stack([weights_AHQJ[..., _slice(word)].sum(-1) for word in columns], -1)
    return torch.stack([summed[..., _slice(word), :].mean(-2) for word in rows], -2)


def _slice(word: range) -> slice:
    return slice(word.start, word.stop)
