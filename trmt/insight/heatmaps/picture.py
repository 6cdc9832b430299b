"""Attention as a picture, by matplotlib, with fonts for whatever script the labels are in."""

from __future__ import annotations

import unicodedata
import warnings
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from trmt import console
from trmt.errors import TrmtError
from trmt.insight.heatmaps.matrix import Matrix
from trmt.storage.files import atomic_file

FORMATS = ("png", "svg", "pdf")
SHAPING = (3, 11)  # the first matplotlib that joins letters, and sets them from right to left
VIRAMA = 9  # the combining class of signs that join consonants
CELL = 0.26  # inches
LARGEST = 50.0  # inches; in a longer sentence all is smaller
FONT_SIZE = 9.0  # points
ALWAYS = "DejaVu Sans"  # comes with matplotlib
BESIDES = ("Sans", "Regular", "-")  # in the name of a font that goes with it, best first


def write(out: Path, matrix: Matrix, *, title: str) -> None:
    """Write the matrix in the format that the name of the file says; it appears whole or not at all."""
    kind = out.suffix.lower().removeprefix(".")
    try:
        import matplotlib
    except ImportError as error:
        raise TrmtError(
            "pictures need matplotlib, which is not installed: pip install 'trmt[plot]', "
            "or leave out --out, or let it end in .html"
        ) from error
    text = "".join((title, *matrix.rows, *matrix.columns))
    fonts, missing = families(text)
    if kind != "svg":  # in which letters are letters, and whoever shows it has to have the fonts
        version = matplotlib.__version_info__
        _complain(text, missing, (version.major, version.minor))
    style: dict[Any, Any] = {
        "font.family": [*fonts, *(["sans-serif"] if kind == "svg" else [])],
        "font.size": FONT_SIZE,
        "svg.fonttype": "none",
        "svg.hashsalt": "trmt",
    }
    # The same matrix gives the same file, so that it can be kept under version control.
    stamp: dict[str, Any] = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(kind, {})
    with matplotlib.rc_context(style), warnings.catch_warnings(), atomic_file(out) as stream:
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # which was said already
        figure(matrix, title=title).savefig(
            stream, format=kind, dpi=150, metadata=stamp, bbox_inches="tight", pad_inches=0.1
        )


def figure(matrix: Matrix, *, title: str) -> Any:
    """The matrix as a matplotlib figure: columns named above, rows on the left, dark is much."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    scale = min(1, LARGEST / CELL / max(len(matrix.columns), len(matrix.rows)))
    cell = CELL * scale
    drawn = Figure(figsize=(cell * len(matrix.columns) + 1.5, cell * len(matrix.rows) + 1.2))
    place = drawn.add_axes((0, 0, 1, 1))
    image = place.imshow(matrix.weights, cmap="Blues", vmin=0, vmax=matrix.greatest or 1, aspect="equal")
    place.set_xticks(range(len(matrix.columns)), labels=matrix.columns)
    place.set_yticks(range(len(matrix.rows)), labels=matrix.rows)
    place.xaxis.tick_top()
    for spine in place.spines.values():
        spine.set_color("#999999")
    place.tick_params(length=0, pad=4 * scale, labelsize=FONT_SIZE * scale)
    for label in place.get_xticklabels():
        label.set(rotation=60, ha="left", va="bottom", rotation_mode="anchor")
    name = place.set_xlabel(title, loc="left", labelpad=8)
    for label in (name, *place.get_xticklabels(), *place.get_yticklabels()):
        label.set_parse_math(False)  # a dollar is a dollar
    bar = drawn.colorbar(
        image, ax=place, fraction=0.04, pad=0.02, aspect=20, shrink=min(1, 10 / len(matrix.rows))
    )
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0)
    bar.locator = MaxNLocator(5)
    bar.formatter = FuncFormatter(lambda value, _: f"{value:.0%}")
    bar.update_ticks()
    return drawn


def _complain(text: str, missing: Sequence[str], version: tuple[int, int]) -> None:
    if missing:
        named = ", ".join(f"{character} (U+{ord(character):04X})" for character in missing[:3])
        console.warn(
            f"no font here has {named}{' and others' if len(missing) > 3 else ''}, and boxes stand for what "
            "is missing; install a font that has it (the Noto fonts have nearly all), or write .svg or .html"
        )
    if version < SHAPING and any(map(_is_shaped, text)):
        console.warn(
            "this matplotlib puts one letter after the other from left to right, which is wrong for the "
            f"script of this text; upgrade it to {'.'.join(map(str, SHAPING))}, or write .svg or .html"
        )


def _is_shaped(character: str) -> bool:
    """Whether the character is of a script whose letters are joined, reordered, or go from right to left."""
    joins = unicodedata.category(character) == "Mc" or unicodedata.combining(character) == VIRAMA
    return joins or unicodedata.bidirectional(character) in ("R", "AL")


# Fonts


def families(text: str) -> tuple[list[str], list[str]]:
    """Fonts that together have these characters, and those characters that no font here has."""
    from matplotlib import font_manager

    found, missing = [ALWAYS], _lacking(font_manager.findfont(ALWAYS), _visible(text))
    for path in _candidates():
        if not missing:
            break
        still = _lacking(path, missing)
        if len(still) < len(missing):
            font_manager.fontManager.addfont(path)
            found.append(font_manager.get_font(path).family_name)
            missing = still
    return found, missing


def _visible(text: str) -> list[str]:
    """The characters that a font must have, each once; those that only join or turn others are none."""
    return [
        character
        for character in dict.fromkeys(text)
        if unicodedata.category(character) != "Cf" and not character.isspace()
    ]


def _lacking(path: str, characters: Iterable[str]) -> list[str]:
    from matplotlib import font_manager

    font = font_manager.get_font(path)
    return [character for character in characters if not font.get_char_index(ord(character))]


@cache
def _candidates() -> tuple[str, ...]:
    """The fonts of this machine that can be read, those first that look like the one we have."""
    from matplotlib import font_manager

    def unlike(path: str) -> tuple[bool, ...]:
        return tuple(word not in Path(path).name for word in BESIDES)

    return tuple(_readable(sorted(sorted(font_manager.findSystemFonts()), key=unlike)))


def _readable(paths: Sequence[str]) -> Iterator[str]:
    from matplotlib import font_manager

    for path in paths:
        try:
            font_manager.get_font(path)
        except (OSError, RuntimeError):  # of a kind, or in a state, that FreeType does not read
            continue
        yield path
