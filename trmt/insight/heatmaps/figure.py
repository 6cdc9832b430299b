"""Attention maps as figures by matplotlib, with fonts for the scripts of the labels."""

from __future__ import annotations

import unicodedata
import warnings
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from trmt import console
from trmt.errors import TrmtError
from trmt.insight.heatmaps.maps import AttentionMap
from trmt.storage.files import atomic_file

FORMATS = ("png", "svg", "pdf")
TEXT_SHAPING = (3, 11)  # the first matplotlib that joins letters and draws from right to left
VIRAMA = 9  # the Unicode combining class of signs that join consonants
CELL = 0.26  # inches
MAX_SIZE = 50.0  # inches; the cells of longer sentences are smaller
FONT_SIZE = 9.0  # points
DEFAULT_FONT = "DejaVu Sans"  # comes with matplotlib
PREFERRED = ("Sans", "Regular", "-")  # in the names of fonts that look like it, the most important first


def write_figure(out: Path, drawn: AttentionMap, *, title: str) -> None:
    """Write a map in the format of the file name; the file appears complete or not at all."""
    extension = out.suffix.lower().removeprefix(".")
    try:
        import matplotlib
    except ImportError as error:
        raise TrmtError(
            "figures need matplotlib, which is not installed: pip install 'trmt[plot]', "
            "leave --output out, or write a .html page"
        ) from error
    text = "".join((title, *drawn.rows, *drawn.columns))
    fonts, missing = font_families(text)
    if extension != "svg":  # which contains text, drawn with the fonts of the viewer
        version = matplotlib.__version_info__
        _warn_about_text(text, missing, (version.major, version.minor))
    style: dict[Any, Any] = {
        "font.family": [*fonts, *(["sans-serif"] if extension == "svg" else [])],
        "font.size": FONT_SIZE,
        "svg.fonttype": "none",
        "svg.hashsalt": "trmt",
    }
    # No dates, so that the same map gives the same file.
    metadata: dict[str, Any] = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(extension, {})
    with matplotlib.rc_context(style), warnings.catch_warnings(), atomic_file(out) as stream:
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # already reported
        draw_figure(drawn, title=title).savefig(
            stream, format=extension, dpi=150, metadata=metadata, bbox_inches="tight", pad_inches=0.1
        )


def draw_figure(drawn: AttentionMap, *, title: str) -> Any:
    """A map as a matplotlib figure: column labels above, row labels on the left, high weights dark."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    scale = min(1, MAX_SIZE / CELL / max(len(drawn.columns), len(drawn.rows)))
    cell = CELL * scale
    result = Figure(figsize=(cell * len(drawn.columns) + 1.5, cell * len(drawn.rows) + 1.2))
    axes = result.add_axes((0, 0, 1, 1))
    image = axes.imshow(drawn.weights, cmap="Blues", vmin=0, vmax=drawn.max_weight or 1, aspect="equal")
    axes.set_xticks(range(len(drawn.columns)), labels=drawn.columns)
    axes.set_yticks(range(len(drawn.rows)), labels=drawn.rows)
    axes.xaxis.tick_top()
    for spine in axes.spines.values():
        spine.set_color("#999999")
    axes.tick_params(length=0, pad=4 * scale, labelsize=FONT_SIZE * scale)
    for label in axes.get_xticklabels():
        label.set(rotation=60, ha="left", va="bottom", rotation_mode="anchor")
    name = axes.set_xlabel(title, loc="left", labelpad=8)
    for label in (name, *axes.get_xticklabels(), *axes.get_yticklabels()):
        label.set_parse_math(False)  # a dollar sign is no formula
    bar = result.colorbar(
        image, ax=axes, fraction=0.04, pad=0.02, aspect=20, shrink=min(1, 10 / len(drawn.rows))
    )
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0)
    bar.locator = MaxNLocator(5)
    bar.formatter = FuncFormatter(lambda value, _: f"{value:.0%}")
    bar.update_ticks()
    return result


def _warn_about_text(text: str, missing: Sequence[str], version: tuple[int, int]) -> None:
    if missing:
        named = ", ".join(f"{character} (U+{ord(character):04X})" for character in missing[:3])
        console.warn(
            f"no installed font has {named}{' and others' if len(missing) > 3 else ''}, so boxes are drawn "
            "instead; install a font that does (the Noto fonts have nearly all), or write .svg or .html"
        )
    if version < TEXT_SHAPING and any(map(_is_shaped, text)):
        console.warn(
            "this version of matplotlib draws the script of this text incorrectly; "
            f"upgrade it to {'.'.join(map(str, TEXT_SHAPING))}, or write .svg or .html"
        )


def _is_shaped(character: str) -> bool:
    """Whether the character is of a script that joins or reorders letters, or runs from right to left."""
    joins = unicodedata.category(character) == "Mc" or unicodedata.combining(character) == VIRAMA
    return joins or unicodedata.bidirectional(character) in ("R", "AL")


# Fonts


def font_families(text: str) -> tuple[list[str], list[str]]:
    """Fonts that together have these characters, and the characters that no installed font has."""
    from matplotlib import font_manager

    found, missing = [DEFAULT_FONT], _missing(font_manager.findfont(DEFAULT_FONT), _visible(text))
    for path in _candidates():
        if not missing:
            break
        still_missing = _missing(path, missing)
        if len(still_missing) < len(missing):
            font_manager.fontManager.addfont(path)
            found.append(font_manager.get_font(path).family_name)
            missing = still_missing
    return found, missing


def _visible(text: str) -> list[str]:
    """The characters that a font must have, each once: no white space, no format characters."""
    return [
        character
        for character in dict.fromkeys(text)
        if unicodedata.category(character) != "Cf" and not character.isspace()
    ]


def _missing(path: str, characters: Iterable[str]) -> list[str]:
    from matplotlib import font_manager

    font = font_manager.get_font(path)
    return [character for character in characters if not font.get_char_index(ord(character))]


@cache
def _candidates() -> tuple[str, ...]:
    """The readable fonts of this machine, those first that look like the default one."""
    from matplotlib import font_manager

    def unlike(path: str) -> tuple[bool, ...]:
        return tuple(word not in Path(path).name for word in PREFERRED)

    return tuple(_readable(sorted(sorted(font_manager.findSystemFonts()), key=unlike)))


def _readable(paths: Sequence[str]) -> Iterator[str]:
    from matplotlib import font_manager

    for path in paths:
        try:
            font_manager.get_font(path)
        except (OSError, RuntimeError):  # a font that FreeType cannot read
            continue
        yield path
