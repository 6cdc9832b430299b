"""Attention maps as text for a terminal: columns across the top, rows down the side, shades or blocks."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence

from trmt.insight.heatmaps.maps import AttentionMap
from trmt.training.textplot import Segment

BLOCKS = " ░▒▓█"
# Grey behind black or white numbers, none for the smallest: readable on light and dark terminals, and in
# print.
SHADES = ("", *(f"{'#000000' if grey > 128 else '#ffffff'} on #{grey:02x}{grey:02x}{grey:02x}"
                for grey in (225, 195, 165, 135, 105, 80, 55, 25)))  # fmt: skip
MAX_LABEL = 14  # terminal columns of a word
MIN_CELL = 4  # terminal columns of a number with its gap
# Ends a run of right-to-left text, so that a terminal which reorders such runs reorders each word by itself.
LEFT_TO_RIGHT = "\u200e"


def rows(drawn: AttentionMap, *, width: int, coloured: bool) -> list[list[Segment]]:
    """The map as rows of (text, number of its shade); columns that exceed `width` continue below."""
    margin = min(max(map(display_width, drawn.rows), default=0), max(width // 3, MIN_CELL))
    labels = [truncate(label, MAX_LABEL) for label in drawn.columns]
    widths = [max(display_width(label) + 1, MIN_CELL) for label in labels]
    result: list[list[Segment]] = []
    for band in _bands(widths, width - margin - 1):
        if result:
            result.append([])
        head = "".join(_pad(labels[column], widths[column]) for column in band)
        result.append([(" " * (margin + 1) + head.rstrip(" "), None)])
        for label, weights in zip(drawn.rows, drawn.weights, strict=True):
            row: list[Segment] = [(_pad(truncate(label, margin), margin, right=True) + " ", None)]
            for column in band:
                share = weights[column] / drawn.max_weight if drawn.max_weight else 0.0
                row += _cell(weights[column], share, widths[column], coloured=coloured)
            result.append(row)
    return result


def legend(drawn: AttentionMap, *, coloured: bool) -> list[Segment]:
    """The weights that the shades stand for."""
    if coloured:
        steps = len(SHADES) - 1
        cells = [(f"{100 * drawn.max_weight * step / steps:>3.0f} ", step) for step in range(1, steps + 1)]
        return [("percent of a row  ", None), *cells]
    each = drawn.max_weight / (len(BLOCKS) - 1)
    shown = (f"{block * 2} {each * step:.0%}" for step, block in enumerate(BLOCKS) if step)
    return [("of a row  " + "  ".join(shown), None)]


def _bands(widths: Sequence[int], max_width: int) -> Iterator[range]:
    """The columns in groups that fit into a line of the terminal."""
    begin, taken = 0, 0
    for column, width in enumerate(widths):
        if column > begin and taken + width > max_width:
            yield range(begin, column)
            begin, taken = column, 0
        taken += width
    yield range(begin, len(widths))


def _cell(weight: float, share: float, width: int, *, coloured: bool) -> list[Segment]:
    """A cell of this weight, which is `share` of the maximum."""
    if not coloured:
        return [(BLOCKS[round(share * (len(BLOCKS) - 1))] * (width - 1) + " ", None)]
    number = f"{100 * weight:.0f}" if weight >= 0.005 else ""
    return [(f"{number:>{width - 1}}"[: width - 1], round(share * (len(SHADES) - 1)) or None), (" ", None)]


def _pad(text: str, width: int, *, right: bool = False) -> str:
    gap = " " * (width - display_width(text))
    if any(unicodedata.bidirectional(character) in ("R", "AL", "AN") for character in text):
        text += LEFT_TO_RIGHT
    return gap + text if right else text + gap


def truncate(text: str, width: int) -> str:
    """The text, shortened to `width` columns of a terminal."""
    if display_width(text) <= width:
        return text
    kept, taken = "", 1
    for character in text:
        taken += _character_width(character)
        if taken > width:
            break
        kept += character
    return kept + "…"


def display_width(text: str) -> int:
    """The number of terminal columns that the text takes."""
    return sum(map(_character_width, text))


def _character_width(character: str) -> int:
    if unicodedata.category(character) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1
