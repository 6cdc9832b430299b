"""Attention as text: source across the top, target down the side, shades or blocks between."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence

from trmt.insight.heatmaps.matrix import Matrix
from trmt.training.textplot import Segment

BLOCKS = " ░▒▓█"
PLAIN_BLOCKS = " .+#@"  # where there is no Unicode
# Grey behind black or white numbers, none for the least: readable on light and dark terminals, and in print.
SHADES = ("", *(f"{'#000000' if grey > 128 else '#ffffff'} on #{grey:02x}{grey:02x}{grey:02x}"
                for grey in (225, 195, 165, 135, 105, 80, 55, 25)))  # fmt: skip
LABEL = 14  # columns that a word has at most
LEAST = 4  # columns of a number with its gap
# Ends a run of text from right to left, so that a terminal which turns such runs turns each word by itself.
LEFT_TO_RIGHT = "\u200e"


def rows(matrix: Matrix, *, width: int, coloured: bool, plain: bool = False) -> list[list[Segment]]:
    """The matrix as rows of text with the number of the shade that each piece has; folded to `width`."""
    margin = min(max(map(columns_of, matrix.rows), default=0), max(width // 3, LEAST))
    labels = [fitted(label, LABEL) for label in matrix.columns]
    wide = [max(columns_of(label) + 1, LEAST) for label in labels]
    drawn: list[list[Segment]] = []
    for band in _bands(wide, width - margin - 1):
        if drawn:
            drawn.append([])
        head = "".join(_padded(labels[at], wide[at]) for at in band)
        drawn.append([(" " * (margin + 1) + head.rstrip(" "), None)])
        for label, weights in zip(matrix.rows, matrix.weights, strict=True):
            row: list[Segment] = [(_padded(fitted(label, margin), margin, right=True) + " ", None)]
            for at in band:
                row += _cell(weights[at], matrix.greatest, wide[at], coloured=coloured, plain=plain)
            drawn.append(row)
    return drawn


def legend(matrix: Matrix, *, coloured: bool, plain: bool = False) -> list[Segment]:
    """What the shades stand for."""
    if coloured:
        steps = len(SHADES) - 1
        cells = [(f"{100 * matrix.greatest * step / steps:>3.0f} ", step) for step in range(1, steps + 1)]
        return [("percent of a row  ", None), *cells]
    blocks = PLAIN_BLOCKS if plain else BLOCKS
    each = matrix.greatest / (len(blocks) - 1)
    shown = (f"{block * 2} {each * step:.0%}" for step, block in enumerate(blocks) if step)
    return [("of a row  " + "  ".join(shown), None)]


def _bands(wide: Sequence[int], room: int) -> Iterator[range]:
    """The columns that stand side by side, and those for which there is no room under them."""
    begin, taken = 0, 0
    for at, columns in enumerate(wide):
        if at > begin and taken + columns > room:
            yield range(begin, at)
            begin, taken = at, 0
        taken += columns
    yield range(begin, len(wide))


def _cell(weight: float, greatest: float, width: int, *, coloured: bool, plain: bool) -> list[Segment]:
    share = weight / greatest if greatest else 0.0
    if not coloured:
        blocks = PLAIN_BLOCKS if plain else BLOCKS
        return [(blocks[round(share * (len(blocks) - 1))] * (width - 1) + " ", None)]
    number = f"{100 * weight:.0f}" if weight >= 0.005 else ""
    return [(f"{number:>{width - 1}}"[: width - 1], round(share * (len(SHADES) - 1)) or None), (" ", None)]


def _padded(text: str, width: int, *, right: bool = False) -> str:
    gap = " " * (width - columns_of(text))
    if any(unicodedata.bidirectional(character) in ("R", "AL", "AN") for character in text):
        text += LEFT_TO_RIGHT
    return gap + text if right else text + gap


def fitted(text: str, width: int) -> str:
    """The text in at most so many columns of a terminal."""
    if columns_of(text) <= width:
        return text
    kept, taken = "", 1
    for character in text:
        taken += columns_of(character)
        if taken > width:
            break
        kept += character
    return kept + "…"


def columns_of(text: str) -> int:
    """How many columns of a terminal the text takes."""
    return sum(map(_columns, text))


def _columns(character: str) -> int:
    if unicodedata.category(character) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1
