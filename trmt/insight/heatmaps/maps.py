"""Attention maps: the weights of a pair with labels for rows and columns, and one matrix chosen from them."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

from torch import Tensor

from trmt.insight.heatmaps.weights import (
    SPACE,
    AttentionKind,
    AttentionWeights,
    IdSequence,
    word_weights,
    words,
)
from trmt.text.tokenizer import Side, Tokenizer
from trmt.training.display import remove_controls

# The sequences of the rows (queries) and columns (keys) of each kind; "input" is the decoder's input.
AXES: Mapping[str, tuple[str, str]] = {
    "cross": ("target", "source"),
    "encoder": ("source", "source"),
    "decoder": ("target", "input"),
}
# First words of the Unicode names of characters in scripts that write no space between words.
UNSPACED = ("CJK", "IDEOGRAPHIC", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN")


@dataclass(frozen=True)
class AxisLabels:
    """A sentence along an axis of a map, in pieces and in words."""

    text: str
    pieces: tuple[str, ...]
    words: tuple[str, ...]
    word_pieces: tuple[range, ...] = field(repr=False)  # positions of the pieces of each word
    right_to_left: bool = False

    def labels(self, *, by_words: bool) -> tuple[str, ...]:
        """The label of each row or column."""
        return self.words if by_words else self.pieces


@dataclass(frozen=True)
class AttentionMaps:
    """The weights of a pair for all layers and heads, with labels."""

    axes: Mapping[str, AxisLabels]  # "source", "target", "input"
    weights: Mapping[str, Tensor]  # kind -> [layers, heads, rows, columns]


@dataclass(frozen=True)
class MapChoice:
    """Which map to draw; layers and heads count from 1, and 0 is the mean of all."""

    kind: AttentionKind = "cross"
    layer: int = 0
    head: int = 0
    by_words: bool = False

    def __str__(self) -> str:
        layer = f"layer {self.layer}" if self.layer else "mean of the layers"
        head = f"head {self.head}" if self.head else "mean of the heads"
        return f"{'' if self.kind == 'cross' else self.kind + ', '}{layer}, {head}"


@dataclass(frozen=True)
class AttentionMap:
    """One matrix with its labels, whose columns are in the order in which they are drawn."""

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    weights: tuple[tuple[float, ...], ...]
    right_to_left: bool = False  # whether the columns read from right to left

    @cached_property
    def max_weight(self) -> float:
        """The weight of the darkest shade."""
        return max((weight for row in self.weights for weight in row), default=0.0)


def attention_maps(tokenizer: Tokenizer, attention: AttentionWeights) -> AttentionMaps:
    """The weights of a pair with their labels."""
    axes = {
        "source": axis_labels(tokenizer.source, attention.source),
        "target": axis_labels(tokenizer.target, attention.target),
        "input": axis_labels(tokenizer.target, (tokenizer.target.bos, *attention.target[:-1])),
    }
    return AttentionMaps(axes, attention.weights)


def choose_map(maps: AttentionMaps, choice: MapChoice) -> AttentionMap:
    """The chosen matrix; the columns of a sentence that is written from right to left are reversed."""
    rows, columns = (maps.axes[name] for name in AXES[choice.kind])
    weights = maps.weights[choice.kind]
    layer, head = slice(None), slice(None)
    if choice.layer:
        layer = slice(choice.layer - 1, choice.layer)
    if choice.head:
        head = slice(choice.head - 1, choice.head)
    weights = weights[layer, head].mean((0, 1))
    if choice.by_words:
        weights = word_weights(weights, rows.word_pieces, columns.word_pieces)
    labels = columns.labels(by_words=choice.by_words)
    if columns.right_to_left:
        weights, labels = weights.flip(-1), labels[::-1]
    row_labels = rows.labels(by_words=choice.by_words)
    return AttentionMap(row_labels, labels, tuple(map(tuple, weights.tolist())), columns.right_to_left)


def axis_labels(side: Side, ids: IdSequence) -> AxisLabels:
    """The words and pieces of a sentence."""
    word_pieces = tuple(part for word in words(side, ids) for part in _split_word(side, ids, word))
    pieces = tuple(map(remove_controls, side.pieces(ids)))
    labels = tuple(_word_label(side, ids, positions, pieces) for positions in word_pieces)
    text = remove_controls(side.decode(ids))
    return AxisLabels(text, pieces, labels, word_pieces, is_right_to_left(text))


def _word_label(side: Side, ids: IdSequence, positions: range, pieces: Sequence[str]) -> str:
    text = remove_controls(side.decode([ids[position] for position in positions])).strip()
    return text or "".join(pieces[position] for position in positions)


def _split_word(side: Side, ids: IdSequence, word: range) -> list[range]:
    """Split off punctuation at the ends of a word, and split between characters of scripts without spaces."""
    pieces = _characters(side, [ids[position] for position in word])
    marks = [bool(piece) and all(map(_is_punctuation, piece.lstrip(SPACE))) for piece in pieces]
    first = next((index for index, mark in enumerate(marks) if not mark), 0)
    last = len(marks) - next((index for index, mark in enumerate(reversed(marks)) if not mark), 0)
    cuts = [
        word.start + index
        for index in range(1, len(pieces))
        if pieces[index]
        and pieces[index - 1] != SPACE
        and (
            index <= first
            or index >= last
            or _is_unspaced(pieces[index - 1][-1:])
            or _is_unspaced(pieces[index][:1])
        )
    ]
    return [range(*ends) for ends in pairwise([word.start, *cuts, word.stop])]


def _characters(side: Side, ids: IdSequence) -> list[str]:
    """The pieces; of byte pieces, the first of a character becomes the character and the others are empty."""
    pieces = side.pieces(ids)
    is_byte = [side.is_byte(token) for token in ids]
    continues = [
        byte and 0x80 <= int(piece[1:-1], 16) < 0xC0 for byte, piece in zip(is_byte, pieces, strict=True)
    ]
    for index in range(len(ids)):
        if is_byte[index] and not continues[index]:
            end = next((after for after in range(index + 1, len(ids)) if not continues[after]), len(ids))
            pieces[index] = side.decode(ids[index:end])
        elif is_byte[index]:
            pieces[index] = ""
    return pieces


def _is_punctuation(character: str) -> bool:
    return unicodedata.category(character).startswith("P")


def _is_unspaced(character: str) -> bool:
    return bool(character) and unicodedata.name(character, "").startswith(UNSPACED)


def is_right_to_left(text: str) -> bool:
    """Whether the first letter with a direction is of a script that is written from right to left."""
    directions = (unicodedata.bidirectional(character) for character in text)
    return next((direction for direction in directions if direction in ("L", "R", "AL")), "L") != "L"
