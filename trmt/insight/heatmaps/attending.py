"""Where a network looks while it writes: the weights of its attention, for pairs of sentences.

Axes: S sentence, A layers, H heads, T target position, L source position, Q rows, J columns.

A row belongs to the target piece that was being written, the end of the sentence last; the columns of
"cross" are the source's pieces and its end, those of "decoder" what had been written before, the beginning
of the sentence first. In "encoder" the source's pieces look at each other.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

import torch
from torch import Tensor

from trmt.errors import ConfigError, DataError
from trmt.nets.base import Ragged, Seq2Seq, Source, WantedWeights
from trmt.text.tokenizer import Side, Tokenizer

Kind = Literal["cross", "encoder", "decoder"]
KINDS: tuple[Kind, ...] = get_args(Kind)
TOGETHER = 64  # pairs in a batch
CELLS = 1 << 20  # of the matrices of one head and layer in a batch, unless a single pair has more
SPACE = "\u2581"  # how sentencepiece writes white space

Ids = Sequence[int]


@dataclass(frozen=True)
class Attended:
    """The weights of a pair: of each kind that was asked for, [A, H, Q, J] in fp32 on the CPU."""

    source: tuple[int, ...]  # ids, the end of the sentence last
    target: tuple[int, ...]
    weights: Mapping[str, Tensor]


def attend(
    net: Seq2Seq,
    tokenizer: Tokenizer,
    pairs: Iterable[tuple[Ids, Ids]],
    *,
    kinds: Sequence[Kind] = ("cross",),
) -> Iterator[Attended]:
    """The weights of each pair in turn; pairs are ids without special ones, the network is in eval mode.

    What a network does not have is a ConfigError, a pair that is longer than its positions a DataError.
    """
    longest = positions(net)
    eos, bos = tokenizer.target.eos, tokenizer.target.bos
    for batch in _batches(((*source, tokenizer.source.eos), (*target, eos)) for source, target in pairs):
        for source, target in batch:
            if max(len(source), len(target)) > longest:
                raise DataError(
                    f"a pair has {len(source)} and {len(target)} pieces, the network positions for "
                    f"{longest}; leave it out"
                )
        yield from _attended(net, batch, kinds, bos)


def sizes(net: Seq2Seq, tokenizer: Tokenizer) -> dict[Kind, tuple[int, int]]:
    """The kinds of attention that a network has, with their layers and heads."""
    found: dict[Kind, tuple[int, int]] = {}
    for kind in KINDS:
        try:
            [nothing] = attend(net, tokenizer, [((), ())], kinds=(kind,))
        except ConfigError:
            continue
        layers, heads, *_ = nothing.weights[kind].shape
        found[kind] = (layers, heads)
    return found


def positions(net: Seq2Seq) -> int:
    """How many pieces a sentence can have, its end among them."""
    return net.max_positions


Pair = tuple[tuple[int, ...], tuple[int, ...]]


def _batches(pairs: Iterable[Pair]) -> Iterator[list[Pair]]:
    batch: list[Pair] = []
    longest = 0
    for pair in pairs:
        longest = max(longest, *map(len, pair))
        if batch and (len(batch) == TOGETHER or (len(batch) + 1) * longest**2 > CELLS):
            yield batch
            batch, longest = [], max(map(len, pair))
        batch.append(pair)
    if batch:
        yield batch


@torch.no_grad()
def _attended(net: Seq2Seq, batch: Sequence[Pair], kinds: Sequence[Kind], bos: int) -> Iterator[Attended]:
    device = next(net.parameters()).device
    source = Source.of([source for source, _ in batch], device)
    target = Ragged.of([(bos, *target[:-1]) for _, target in batch], device)
    output = net(source, target, want=WantedWeights(**dict.fromkeys(kinds, True)))
    found = {kind: _checked(getattr(output, f"{kind}_attention"), kind) for kind in kinds}
    for number, (pieces, written) in enumerate(batch):
        rows = {"cross": len(written), "encoder": len(pieces), "decoder": len(written)}
        columns = {**rows, "cross": len(pieces)}
        weights: dict[str, Tensor] = {
            kind: weights_ASHQJ[:, number, :, : rows[kind], : columns[kind]].float().cpu().clone()
            for kind, weights_ASHQJ in found.items()
        }
        yield Attended(pieces, written, weights)


def _checked(weights: Tensor | None, kind: Kind) -> Tensor:
    if weights is not None:
        return weights
    if kind == "cross":
        raise ConfigError(
            "this network has no attention: it writes from a summary of the source; choose another model"
        )
    raise ConfigError(f"this network has no attention of its {kind} to itself; leave out --kind {kind}")


def words(side: Side, ids: Ids) -> list[range]:
    """The places of each word's pieces, words being what white space divides; special ids stand alone."""
    pieces = side.pieces(ids)
    special = {side.pad, side.bos, side.eos}
    begins = [
        place
        for place, (token, piece) in enumerate(zip(ids, pieces, strict=True))
        if place == 0 or piece.startswith(SPACE) or token in special or ids[place - 1] in special
    ]
    return [range(*ends) for ends in pairwise([*begins, len(ids)])]


def joined(weights_AHQJ: Tensor, rows: Sequence[range], columns: Sequence[range]) -> Tensor:
    """The weights between words: what the pieces of a word get is added up, what they give is averaged."""
    over = torch.stack([weights_AHQJ[..., _places(word)].sum(-1) for word in columns], -1)
    return torch.stack([over[..., _places(word), :].mean(-2) for word in rows], -2)


def _places(word: range) -> slice:
    return slice(word.start, word.stop)
