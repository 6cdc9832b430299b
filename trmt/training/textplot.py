"""Curves drawn with characters: sparklines, and plots with axes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

BLOCKS = "▁▂▃▄▅▆▇█"
PLAIN_BLOCKS = "_.-:=+*#"  # where there is no Unicode
MARKS = "ox+*#%@&"  # of curves, where there are no colours
# The dots of a Braille character, two across and four down, as bits.
DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))
BRAILLE = 0x2800
BEGINNING = 0.2  # share of a curve that may lie outside of the plot: at first, losses are huge
MARGIN = 1.0  # how much of it is shown beyond the range of the rest, in units of that range
GAP = " "


@dataclass(frozen=True)
class Curve:
    """Finite values y at positions x, which never decrease."""

    x: Sequence[float]
    y: Sequence[float]


Segment = tuple[str, int | None]  # some text, and the index of the curve that it belongs to


def sparkline(values: Sequence[float], width: int, *, plain: bool = False) -> str:
    """The values as a curve of at most `width` characters."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite or width < 1:
        return ""
    blocks = PLAIN_BLOCKS if plain else BLOCKS
    means = _downsampled(finite, width)
    if math.isclose(min(means), max(means)):  # differences are rounding errors
        means = [means[0]] * len(means)
    low, high = bounds([means])
    steps = len(blocks) - 1
    return "".join(blocks[min(max(round((value - low) / (high - low) * steps), 0), steps)] for value in means)


def bounds(curves: Sequence[Sequence[float]]) -> tuple[float, float]:
    """The range of values to plot: all, except a beginning of a curve that is far from the rest."""
    later = [value for curve in curves for value in curve[int(len(curve) * BEGINNING) :]]
    low, high = min(later), max(later)
    if math.isclose(low, high):
        margin = abs(low) / 2 or 0.5
        return low - margin, high + margin
    margin = (high - low) * MARGIN
    shown = [value for curve in curves for value in curve if low - margin <= value <= high + margin]
    return min(shown), max(shown)


def _downsampled(values: Sequence[float], width: int) -> list[float]:
    """At most `width` means of neighbouring values."""
    if len(values) <= width:
        return list(values)
    edges = [column * len(values) // width for column in range(width + 1)]
    return [math.fsum(values[begin:end]) / (end - begin) for begin, end in itertools.pairwise(edges)]


def chart(
    curves: Sequence[Curve], width: int, height: int, *, unit: str, marked: bool = False
) -> list[list[Segment]]:
    """A plot of `height` rows above an x axis; each curve has its own mark if `marked`, else dots.

    Curves may be empty, but not all of them.
    """
    low, high = bounds([curve.y for curve in curves if len(curve.y)])
    first = min(curve.x[0] for curve in curves if len(curve.x))
    last = max(curve.x[-1] for curve in curves if len(curve.x))
    labels = {0: short(high), height // 2: short(high - (high - low) * (height // 2) / (height - 1))}
    labels[height - 1] = short(low)
    margin = max(map(len, labels.values()))
    columns = max(width - margin - 2, 8)
    cells = _cells(curves, (first, last), (low, high), (columns, height), marked=marked)
    rows: list[list[Segment]] = []
    for row in range(height):
        axis = "┤" if row in labels else "│"
        rows.append([(f"{labels.get(row, ''):>{margin}} {axis}", None), *_segments(cells[row])])
    begin, end = short(first), f"{short(last)} {unit}"
    rows.append([(" " * (margin + 1) + "└" + "─" * columns, None)])
    rows.append([(" " * (margin + 2) + begin + end.rjust(columns - len(begin)), None)])
    return rows


def _cells(
    curves: Sequence[Curve],
    x_range: tuple[float, float],
    y_range: tuple[float, float],
    size: tuple[int, int],
    *,
    marked: bool,
) -> list[list[Segment]]:
    """The characters of the plot by row and column, each with the index of its curve."""
    columns, rows = size
    x_dots, y_dots = (1, 1) if marked else (2, 4)  # in each character
    found: dict[tuple[int, int], tuple[int, int]] = {}
    for number, curve in enumerate(curves):
        for x, y in _dots(curve, x_range, y_range, (columns * x_dots, rows * y_dots)):
            cell = (y // y_dots, x // x_dots)
            bits, _ = found.get(cell, (0, 0))
            found[cell] = (bits | DOTS[x % x_dots][y % y_dots], number)
    return [
        [_character(found.get((row, column)), marked=marked) for column in range(columns)]
        for row in range(rows)
    ]


def _character(found: tuple[int, int] | None, *, marked: bool) -> Segment:
    if found is None:
        return GAP, None
    bits, number = found
    return (MARKS[number % len(MARKS)] if marked else chr(BRAILLE + bits)), number


def _dots(
    curve: Curve, x_range: tuple[float, float], y_range: tuple[float, float], size: tuple[int, int]
) -> list[tuple[int, int]]:
    """The dots on a curve, as columns and rows of a grid of this size; those outside are left out."""
    columns, rows = size
    (first, last), (low, high) = x_range, y_range
    span = (last - first) or 1.0
    points = [
        ((x - first) / span * (columns - 1), (high - y) / (high - low) * (rows - 1))
        for x, y in zip(curve.x, curve.y, strict=True)
    ]
    dots = {(round(x), round(y)) for x, y in points}
    for (x, y), (next_x, next_y) in itertools.pairwise(points):
        # A beginning far outside must not take a million dots to draw.
        pieces = min(math.ceil(max(abs(next_x - x), abs(next_y - y), 1)), 4 * (columns + rows))
        for piece in range(1, pieces):
            share = piece / pieces
            dots.add((round(x + (next_x - x) * share), round(y + (next_y - y) * share)))
    return [(column, row) for column, row in dots if 0 <= row < rows and 0 <= column < columns]


def _segments(cells: Sequence[Segment]) -> list[Segment]:
    """Neighbouring characters of one curve joined into one text."""
    joined: list[Segment] = []
    for text, owner in cells:
        if joined and joined[-1][1] == owner:
            joined[-1] = (joined[-1][0] + text, owner)
        else:
            joined.append((text, owner))
    return joined


def short(value: float) -> str:
    """A number in few characters: 12.4k, 3.21, 5e-04."""
    size = abs(value)
    if size and size < 0.01:
        return f"{value:.1e}"
    for limit, name in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= limit:
            return f"{value / (1e3 if name == 'k' else limit):.3g}{name}"
    return f"{value:,.0f}" if size >= 1000 else f"{value:.3g}"
