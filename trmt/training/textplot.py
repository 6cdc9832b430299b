"""Curves drawn with characters: sparklines of one line, and plots with axes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

BLOCKS = "▁▂▃▄▅▆▇█"
PLAIN_BLOCKS = "_.-:=+*#"  # where there is no Unicode
MARKS = "ox+*#%@&"  # of curves that no colour tells apart
# The dots of a Braille cell, two across and four down, as bits.
DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))
BRAILLE = 0x2800
BEGINNING = 0.2  # the part of a curve that may leave the picture: where training begins, losses are huge
ROOM = 1.0  # it gets as much as the rest of the curve takes
GAP = " "


@dataclass(frozen=True)
class Line:
    """One curve: finite values, x never falling."""

    x: Sequence[float]
    y: Sequence[float]


Segment = tuple[str, int | None]  # some text, and the number of the line it belongs to


def sparkline(values: Sequence[float], width: int, *, plain: bool = False) -> str:
    """The course of some values in at most `width` characters."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite or width < 1:
        return ""
    blocks = PLAIN_BLOCKS if plain else BLOCKS
    means = _thinned(finite, width)
    if math.isclose(min(means), max(means)):  # rounding is no movement
        means = [means[0]] * len(means)
    low, high = bounds([means])
    steps = len(blocks) - 1
    return "".join(blocks[min(max(round((value - low) / (high - low) * steps), 0), steps)] for value in means)


def bounds(curves: Sequence[Sequence[float]]) -> tuple[float, float]:
    """The values to draw between: of all curves, but a beginning far from the rest may leave the picture."""
    settled = [value for curve in curves for value in curve[int(len(curve) * BEGINNING) :]]
    low, high = min(settled), max(settled)
    if math.isclose(low, high):
        margin = abs(low) / 2 or 0.5
        return low - margin, high + margin
    room = (high - low) * ROOM
    near = [value for curve in curves for value in curve if low - room <= value <= high + room]
    return min(near), max(near)


def _thinned(values: Sequence[float], width: int) -> list[float]:
    """At most `width` means of neighbours."""
    if len(values) <= width:
        return list(values)
    edges = [place * len(values) // width for place in range(width + 1)]
    return [math.fsum(values[begin:end]) / (end - begin) for begin, end in itertools.pairwise(edges)]


def chart(
    lines: Sequence[Line], width: int, height: int, *, unit: str, marked: bool = False
) -> list[list[Segment]]:
    """A plot of `height` rows over an axis; with `marked` each line has a mark of its own, else dots.

    Lines may be empty, but not all of them.
    """
    low, high = bounds([line.y for line in lines if len(line.y)])
    first = min(line.x[0] for line in lines if len(line.x))
    last = max(line.x[-1] for line in lines if len(line.x))
    labels = {0: short(high), height // 2: short(high - (high - low) * (height // 2) / (height - 1))}
    labels[height - 1] = short(low)
    margin = max(map(len, labels.values()))
    across = max(width - margin - 2, 8)
    cells = _cells(lines, (first, last), (low, high), (across, height), marked=marked)
    rows: list[list[Segment]] = []
    for row in range(height):
        axis = "┤" if row in labels else "│"
        rows.append([(f"{labels.get(row, ''):>{margin}} {axis}", None), *_joined(cells[row])])
    begin, end = short(first), f"{short(last)} {unit}"
    rows.append([(" " * (margin + 1) + "└" + "─" * across, None)])
    rows.append([(" " * (margin + 2) + begin + end.rjust(across - len(begin)), None)])
    return rows


Cell = tuple[str, int | None]


def _cells(
    lines: Sequence[Line],
    horizontal: tuple[float, float],
    vertical: tuple[float, float],
    size: tuple[int, int],
    *,
    marked: bool,
) -> list[list[Cell]]:
    across, down = size
    fine = (1, 1) if marked else (2, 4)
    bits: dict[tuple[int, int], tuple[int, int]] = {}
    for number, line in enumerate(lines):
        for column, row in _dots(line, horizontal, vertical, (across * fine[0], down * fine[1])):
            place = (row // fine[1], column // fine[0])
            bits[place] = (
                bits.get(place, (0, 0))[0] | DOTS[column % fine[0]][row % fine[1]],
                number,
            )
    return [
        [_cell(bits.get((row, column)), marked=marked) for column in range(across)] for row in range(down)
    ]


def _cell(found: tuple[int, int] | None, *, marked: bool) -> Cell:
    if found is None:
        return GAP, None
    dots, number = found
    return (MARKS[number % len(MARKS)] if marked else chr(BRAILLE + dots)), number


def _dots(
    line: Line, horizontal: tuple[float, float], vertical: tuple[float, float], size: tuple[int, int]
) -> list[tuple[int, int]]:
    """The dots a line touches, as columns and rows; what lies outside is left out."""
    across, down = size
    (first, last), (low, high) = horizontal, vertical
    span = (last - first) or 1.0
    places = [
        ((x - first) / span * (across - 1), (high - y) / (high - low) * (down - 1))
        for x, y in zip(line.x, line.y, strict=True)
    ]
    dots = {(round(x), round(y)) for x, y in places}
    for (x, y), (next_x, next_y) in itertools.pairwise(places):
        # A beginning far outside must not take a million points to draw.
        pieces = min(math.ceil(max(abs(next_x - x), abs(next_y - y), 1)), 4 * (across + down))
        for piece in range(1, pieces):
            part = piece / pieces
            dots.add((round(x + (next_x - x) * part), round(y + (next_y - y) * part)))
    return [(column, row) for column, row in dots if 0 <= row < down and 0 <= column < across]


def _joined(cells: Sequence[Cell]) -> list[Segment]:
    """Neighbours of one line as one text."""
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
