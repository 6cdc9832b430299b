from __future__ import annotations

import math
import random

import pytest

from trmt.training.textplot import BLOCKS, MARKS, PLAIN_BLOCKS, Curve, bounds, chart, short, sparkline


def text(rows: list[list[tuple[str, int | None]]]) -> list[str]:
    return ["".join(piece for piece, _ in row) for row in rows]


def test_a_sparkline_goes_from_the_lowest_block_to_the_highest() -> None:
    assert sparkline([1, 2, 3, 4, 5, 6, 7, 8], 8) == BLOCKS
    assert sparkline([8, 7, 6, 5, 4, 3, 2, 1], 8, plain=True) == PLAIN_BLOCKS[::-1]


@pytest.mark.parametrize("count", [1, 2, 7, 10, 11, 99, 1000])
def test_a_sparkline_is_never_wider_than_asked(count: int) -> None:
    values = [random.Random(count).random() for _ in range(count)]
    assert len(sparkline(values, 10)) == min(count, 10)
    assert sparkline(values, 0) == ""


def test_a_sparkline_shows_means_of_neighbouring_values() -> None:
    coarse = [1.0, 5.0, 3.0, 7.0]
    fine = [mean + wiggle for mean in coarse for wiggle in (-2, 2, 0)]
    assert sparkline(fine, 4) == sparkline(coarse, 4)


def test_a_sparkline_accepts_any_logged_values() -> None:
    assert sparkline([], 10) == ""
    assert sparkline([math.nan, math.inf], 10) == ""
    assert sparkline([math.nan, 1, 2], 10) == sparkline([1, 2], 10)
    assert len(set(sparkline([3.0, 3.0, 3.0], 10))) == 1


def test_a_huge_beginning_does_not_flatten_the_rest() -> None:
    values = [1e6, 50.0, *(10 - step / 10 for step in range(48))]
    low, high = bounds([values])
    assert low == values[-1]
    assert 10 <= high <= 20
    assert len(set(sparkline(values, 50))) == len(BLOCKS)


def test_values_that_are_near_the_rest_are_all_shown() -> None:
    assert bounds([[1.0, 2.0, 3.0], [2.5, 4.0]]) == (1.0, 4.0)
    low, high = bounds([[0.0, 0.0]])
    assert low < 0 < high


@pytest.mark.parametrize("width", [24, 40, 79, 200])
@pytest.mark.parametrize("marked", [True, False])
def test_a_plot_keeps_to_its_size(width: int, marked: bool) -> None:
    curves = [Curve(range(50), [math.sin(step / 5) for step in range(50)]), Curve([], [])]
    rows = chart(curves, width, 8, unit="steps", marked=marked)
    assert len(rows) == 8 + 2
    assert all(len(row) <= width for row in text(rows))
    assert {number for row in rows for _, number in row} == {None, 0}


def test_a_rising_curve_rises() -> None:
    rows = text(chart([Curve([0, 10], [0.0, 1.0])], 60, 6, unit="steps", marked=True))
    columns = [row.index(MARKS[0]) for row in rows[:6]]
    assert columns == sorted(columns, reverse=True)
    assert rows[0].startswith("  1 ┤") and rows[5].startswith("  0 ┤")
    assert rows[-1].split() == ["0", "10", "steps"]


def test_curves_have_different_marks() -> None:
    curves = [Curve([0, 10], [0.0, 0.0]), Curve([0, 10], [1.0, 1.0])]
    rows = chart(curves, 40, 5, unit="steps", marked=True)
    assert MARKS[1] in text(rows)[0] and MARKS[0] in text(rows)[4]
    assert not {MARKS[0], MARKS[1]} & set("".join(text(rows)[1:4]))


def test_a_single_point_is_shown() -> None:
    assert MARKS[0] in "".join(text(chart([Curve([5], [2.0])], 30, 5, unit="steps", marked=True)))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0, "0"),
        (3.14159, "3.14"),
        (0.0002, "2.0e-04"),
        (1234, "1,234"),
        (25_000, "25k"),
        (3.2e7, "32M"),
        (5e9, "5G"),
    ],
)
def test_numbers_are_short(value: float, expected: str) -> None:
    assert short(value) == expected


def test_rounding_errors_are_not_shown() -> None:
    """A constant rate is a flat line, though means of equal numbers differ in their last bits."""
    flat = sparkline([0.1] * 7 + [0.1 + 1e-17] + [0.30000000000000004 - 0.2] * 50, 20)
    assert len(set(flat)) == 1
