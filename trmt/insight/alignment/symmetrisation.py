"""Symmetrisation: the word alignments of both directions combined into one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import product

from trmt.text.links import Links

AlignmentPoint = tuple[int, int]  # (source word, target word)
# The horizontal and vertical neighbours of a point, then the diagonal ones.
NEIGHBOURS = ((-1, 0), (0, -1), (1, 0), (0, 1), (-1, -1), (-1, 1), (1, -1), (1, 1))


def intersection(forward: Links, backward: Links) -> Links:
    """The points found in both directions."""
    return forward & backward


def union(forward: Links, backward: Links) -> Links:
    """The points found in either direction."""
    return forward | backward


def grow_diag(forward: Links, backward: Links) -> Links:
    """The intersection, grown by neighbouring points of the union that align an unaligned word.

    Koehn, Och and Marcu (2003), as implemented in the training scripts of Moses.
    """
    either = forward | backward
    grown = _GrowingAlignment(forward & backward)
    while True:
        size = len(grown.points)
        for (source, target), (down, right) in product(sorted(grown.points), NEIGHBOURS):
            point = (source + down, target + right)
            if point in either and not (grown.has_source(point) and grown.has_target(point)):
                grown.add(point)
        if len(grown.points) == size:
            return frozenset(grown.points)


def grow_diag_final(forward: Links, backward: Links) -> Links:
    """grow-diag, and then points of either direction of which at least one word is unaligned."""
    return _add_unaligned(forward, backward, any)


def grow_diag_final_and(forward: Links, backward: Links) -> Links:
    """grow-diag, and then points of either direction of which both words are unaligned."""
    return _add_unaligned(forward, backward, all)


def _add_unaligned(forward: Links, backward: Links, condition: Callable[[tuple[bool, bool]], bool]) -> Links:
    grown = _GrowingAlignment(grow_diag(forward, backward))
    for links in (forward, backward):
        for point in sorted(links):
            if condition((not grown.has_source(point), not grown.has_target(point))):
                grown.add(point)
    return frozenset(grown.points)


METHODS: Mapping[str, Callable[[Links, Links], Links]] = {
    "intersection": intersection,
    "union": union,
    "grow-diag": grow_diag,
    "grow-diag-final": grow_diag_final,
    "grow-diag-final-and": grow_diag_final_and,
}


class _GrowingAlignment:
    """Alignment points, and the words they align."""

    def __init__(self, points: Links) -> None:
        self.points = set(points)
        self._sources = {source for source, _ in points}
        self._targets = {target for _, target in points}

    def has_source(self, point: AlignmentPoint) -> bool:
        return point[0] in self._sources

    def has_target(self, point: AlignmentPoint) -> bool:
        return point[1] in self._targets

    def add(self, point: AlignmentPoint) -> None:
        self.points.add(point)
        self._sources.add(point[0])
        self._targets.add(point[1])
