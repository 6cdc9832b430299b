"""What there is to draw of a pair: its weights, and the words that stand beside rows and above columns."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

from torch import Tensor

from trmt.insight.heatmaps.attending import SPACE, Attended, Ids, Kind, joined, words
from trmt.text.tokenizer import Side, Tokenizer
from trmt.training.display import remove_controls

# The axes of each kind: rows, columns. What the decoder looks back at begins one piece before its target.
AXES: Mapping[str, tuple[str, str]] = {
    "cross": ("target", "source"),
    "encoder": ("source", "source"),
    "decoder": ("target", "before"),
}
# Of the scripts that put no space between words, as the names of their characters begin.
UNSPACED = ("CJK", "IDEOGRAPHIC", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN")


@dataclass(frozen=True)
class Axis:
    """A sentence beside a matrix, in pieces and in words."""

    text: str
    pieces: tuple[str, ...]
    words: tuple[str, ...]
    places: tuple[range, ...] = field(repr=False)  # of the pieces of each word
    leftward: bool = False  # whether its script runs from right to left

    def labels(self, *, by_words: bool) -> tuple[str, ...]:
        """What stands beside each row or column."""
        return self.words if by_words else self.pieces


@dataclass(frozen=True)
class Looks:
    """All that a network's attention did with a pair."""

    axes: Mapping[str, Axis]  # "source", "target", "before"
    weights: Mapping[str, Tensor]  # [layers, heads, rows, columns] by kind


@dataclass(frozen=True)
class Choice:
    """Which matrix to draw; layers and heads count from 1, and 0 is the mean of all."""

    kind: Kind = "cross"
    layer: int = 0
    head: int = 0
    by_words: bool = False

    def __str__(self) -> str:
        layer = f"layer {self.layer}" if self.layer else "mean of the layers"
        head = f"head {self.head}" if self.head else "mean of the heads"
        return f"{'' if self.kind == 'cross' else self.kind + ', '}{layer}, {head}"


@dataclass(frozen=True)
class Matrix:
    """One matrix with its labels: columns in the order in which they stand, from left to right."""

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    weights: tuple[tuple[float, ...], ...]
    leftward: bool = False  # whether the columns read from right to left

    @cached_property
    def greatest(self) -> float:
        """What the darkest shade stands for."""
        return max((weight for row in self.weights for weight in row), default=0.0)


def looks(tokenizer: Tokenizer, attended: Attended) -> Looks:
    """What can be drawn of these weights."""
    source, target = attended.source, attended.target
    before = (tokenizer.target.bos, *target[:-1])
    axes = {
        "source": axis(tokenizer.source, source),
        "target": axis(tokenizer.target, target),
        "before": axis(tokenizer.target, before),
    }
    return Looks(axes, attended.weights)


def matrix(looks: Looks, choice: Choice) -> Matrix:
    """The chosen matrix; a sentence from right to left has its columns in that order too."""
    rows, columns = (looks.axes[name] for name in AXES[choice.kind])
    weights = looks.weights[choice.kind]
    layer, head = slice(None), slice(None)
    if choice.layer:
        layer = slice(choice.layer - 1, choice.layer)
    if choice.head:
        head = slice(choice.head - 1, choice.head)
    weights = weights[layer, head].mean((0, 1))
    if choice.by_words:
        weights = joined(weights, rows.places, columns.places)
    labels = columns.labels(by_words=choice.by_words)
    if columns.leftward:
        weights, labels = weights.flip(-1), labels[::-1]
    return Matrix(
        rows.labels(by_words=choice.by_words), labels, tuple(map(tuple, weights.tolist())), columns.leftward
    )


def axis(side: Side, ids: Ids) -> Axis:
    """The words and pieces of a sentence."""
    places = tuple(part for word in words(side, ids) for part in _parts(side, ids, word))
    pieces = tuple(map(remove_controls, side.pieces(ids)))
    spelled = tuple(_spelled(side, ids, place, pieces) for place in places)
    text = remove_controls(side.decode(ids))
    return Axis(text, pieces, spelled, places, leftward(text))


def _spelled(side: Side, ids: Ids, places: range, pieces: Sequence[str]) -> str:
    text = remove_controls(side.decode([ids[place] for place in places])).strip()
    return text or "".join(pieces[place] for place in places)


def _parts(side: Side, ids: Ids, word: range) -> list[range]:
    """A word cut where its script would not put a space anyhow, and at punctuation on its ends."""
    pieces = _letters(side, [ids[place] for place in word])
    marks = [bool(piece) and all(map(_is_mark, piece.lstrip(SPACE))) for piece in pieces]
    first = next((at for at, mark in enumerate(marks) if not mark), 0)
    last = len(marks) - next((at for at, mark in enumerate(reversed(marks)) if not mark), 0)
    cuts = [
        word.start + at
        for at in range(1, len(pieces))
        if pieces[at]
        and pieces[at - 1] != SPACE
        and (at <= first or at >= last or _is_unspaced(pieces[at - 1][-1:]) or _is_unspaced(pieces[at][:1]))
    ]
    return [range(*ends) for ends in pairwise([word.start, *cuts, word.stop])]


def _letters(side: Side, ids: Ids) -> list[str]:
    """The pieces, but for bytes: the first one of a character is the character, the others are nothing."""
    pieces = side.pieces(ids)
    is_byte = [side.is_byte(token) for token in ids]
    goes_on = [
        byte and 0x80 <= int(piece[1:-1], 16) < 0xC0 for byte, piece in zip(is_byte, pieces, strict=True)
    ]
    for at in range(len(ids)):
        if is_byte[at] and not goes_on[at]:
            end = next((after for after in range(at + 1, len(ids)) if not goes_on[after]), len(ids))
            pieces[at] = side.decode(ids[at:end])
        elif is_byte[at]:
            pieces[at] = ""
    return pieces


def _is_mark(character: str) -> bool:
    return unicodedata.category(character).startswith("P")


def _is_unspaced(character: str) -> bool:
    return bool(character) and unicodedata.name(character, "").startswith(UNSPACED)


def leftward(text: str) -> bool:
    """Whether the text runs from right to left, as its first letter that has a direction does."""
    kinds = (unicodedata.bidirectional(character) for character in text)
    return next((kind for kind in kinds if kind in ("L", "R", "AL")), "L") != "L"
