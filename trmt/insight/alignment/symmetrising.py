"""Links found from both sides made one: what both found, what either found, and the usual way between."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from trmt.text.links import Links

Point = tuple[int, int]
# Beside a link, above and below it first, and then at its corners.
BESIDE = ((-1, 0), (0, -1), (1, 0), (0, 1), (-1, -1), (-1, 1), (1, -1), (1, 1))


def intersection(forward: Links, backward: Links) -> Links:
    """What both sides found."""
    return forward & backward


def union(forward: Links, backward: Links) -> Links:
    """What either side found."""
    return forward | backward


def grow_diag(forward: Links, backward: Links) -> Links:
    """The intersection, and step by step links of the union beside it that reach a word without any.

    (Koehn, Och and Marcu 2003, as it is spread by the training scripts of Moses.)
    """
    either = forward | backward
    grown = _Grown(forward & backward)
    while True:
        before = len(grown.points)
        for source, target in sorted(grown.points):
            for down, right in BESIDE:
                point = (source + down, target + right)
                if point in either and not (grown.has_source(point) and grown.has_target(point)):
                    grown.add(point)
        if len(grown.points) == before:
            return frozenset(grown.points)


def grow_diag_final(forward: Links, backward: Links) -> Links:
    """The same, and then links of either side that reach a word without any."""
    grown = _Grown(grow_diag(forward, backward))
    for links in (forward, backward):
        for point in sorted(links):
            if not (grown.has_source(point) and grown.has_target(point)):
                grown.add(point)
    return frozenset(grown.points)


def grow_diag_final_and(forward: Links, backward: Links) -> Links:
    """The same, and then links of either side between two words that have none."""
    grown = _Grown(grow_diag(forward, backward))
    for links in (forward, backward):
        for point in sorted(links):
            if not (grown.has_source(point) or grown.has_target(point)):
                grown.add(point)
    return frozenset(grown.points)


METHODS: Mapping[str, Callable[[Links, Links], Links]] = {
    "intersection": intersection,
    "union": union,
    "grow-diag": grow_diag,
    "grow-diag-final": grow_diag_final,
    "grow-diag-final-and": grow_diag_final_and,
}


class _Grown:
    """Links, and the words they reach."""

    def __init__(self, points: Links) -> None:
        self.points = set(points)
        self._sources = {source for source, _ in points}
        self._targets = {target for _, target in points}

    def has_source(self, point: Point) -> bool:
        return point[0] in self._sources

    def has_target(self, point: Point) -> bool:
        return point[1] in self._targets

    def add(self, point: Point) -> None:
        self.points.add(point)
        self._sources.add(point[0])
        self._targets.add(point[1])
