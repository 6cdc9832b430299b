"""The figures of the claims, as SVG that follows the light or dark theme of the reader.

    python bench/claims/figures.py [bench/results/lineage.json]

Colours are variables with a value for each theme (those of Okabe and Ito, which colour-blind people can
distinguish, lighter on dark). Text stays text. Each file contains the digest of its data, by which tests
check that it is up to date.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from types import MappingProxyType
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from claims import sayings, systems
from claims.asking import score
from claims.scale import Scale
from claims.speed import MEMORY
from claims.verdicts import Evidence
from provenance import RESULTS, ROOT

DOCS = ROOT / "docs" / "claims"
# By name: the colour that matplotlib draws with, and its replacements in a light and a dark theme.
COLOURS = {
    "paper": ("#fefefe", "#ffffff", "#0d1117"),
    "ink": ("#010203", "#1f2328", "#e6edf3"),
    "faint": ("#8a8b8c", "#59636e", "#9198a1"),
    "grid": ("#dadbdc", "#e4e7eb", "#2a313c"),
    "blue": ("#0072b2", "#0072b2", "#56b4e9"),
    "orange": ("#d55e00", "#d55e00", "#ff9c4a"),
    "green": ("#009e73", "#00835f", "#2fc79b"),
    "pink": ("#cc79a7", "#b3548a", "#e59cc5"),
    "yellow": ("#b58900", "#946f00", "#e6b93c"),
}
DRAWN = {name: drawn for name, (drawn, _, _) in COLOURS.items()}
LINES = {
    "transformer": "orange",
    "additive": "blue",
    "fixed": "pink",
    "fixed-every": "green",
    "rnnsearch": "green",
    "static": "yellow",
    "conv": "yellow",
    "as written": "green",
}
SIZE = (7.2, 3.3)  # inches, of a figure with curves
Draw = Callable[[Any, Evidence, Scale], None]
Curve = tuple[str, str, Sequence[int], Sequence[float | None]]  # system, label, x values, y values


def by_length(figure: Any, evidence: Evidence, scale: Scale) -> None:
    """BLEU by the number of concatenated sentences."""
    counts, ended = (*scale.shorter, *scale.longer), scale.shorter[-1]
    shown = {"additive": "attention", "transformer": "Transformer", "fixed": "one vector"}
    shown |= {"fixed-every": "one vector at every step", "static": "attention once"}
    axes = figure.subplots()
    axes.axvspan(ended + 0.5, counts[-1] + 0.2, color=DRAWN["grid"], alpha=0.5, lw=0)
    axes.text(ended + 0.6, 101, "longer than in training", color=DRAWN["faint"], va="top", fontsize=8)
    axes.set(xlim=(counts[0] - 0.2, counts[-1] + 0.2), ylim=(0, 103), xticks=counts)
    for name in shown:
        for count in counts:
            for value in evidence.get(score(name, str(count)), {}).values():
                axes.plot(count, value, ".", ms=4, alpha=0.7, mew=0, color=DRAWN[LINES[name]])
    _curves(
        axes,
        [
            (name, label, counts, [_mean(evidence, score(name, str(count))) for count in counts])
            for name, label in shown.items()
        ],
    )
    _frame(axes, title="BLEU (dots: seeds, line: mean)", x="concatenated sentences")


def positions(figure: Any, evidence: Evidence, scale: Scale) -> None:
    """Scores at lengths of training and beyond, for every kind of positions."""
    shown = [(system.name, system.title) for system in systems.POSITIONS]
    sides = figure.subplots(1, 2, sharey=True)
    _dots(sides[0], evidence, shown, what="all", title="lengths of training")
    longer = str(scale.longer[0])
    _dots(sides[1], evidence, shown, what=longer, title=f"{longer} concatenated sentences", names=False)


def dots(*shown: str, names: Mapping[str, str] = MappingProxyType({})) -> Draw:
    """A row for each system, a dot for each seed."""

    def draw(figure: Any, evidence: Evidence, scale: Scale) -> None:
        rows = [(name, names.get(name, systems.BY_NAME[name].title)) for name in shown]
        _dots(figure.subplots(), evidence, rows, what="all")

    return draw


def speed(figure: Any, evidence: Evidence, scale: Scale) -> None:
    """Tokens per second by length, in training and in translation."""
    titles = {"fixed": "one vector", "rnnsearch": "attention before", "additive": "attention after"}
    titles |= {"conv": "convolutions", "transformer": "Transformer"}
    kinds = (("train", "training"), ("translate", "translation"))
    for axes, (kind, title) in zip(figure.subplots(1, 2), kinds, strict=True):
        curves = [
            (name, label, scale.lengths, [_mean(evidence, f"{kind}/{name}/{n}") for n in scale.lengths])
            for name, label in titles.items()
        ]
        _logarithmic(axes, curves)
        _curves(axes, curves)
        _frame(axes, title=f"{title}: target tokens per second", x="tokens per sentence")


def memory(figure: Any, evidence: Evidence, scale: Scale) -> None:
    """Memory saved for the backward pass of a sentence, by its length."""
    titles = {"transformer": "Transformer", "conv": "convolutions", "fixed": "one vector"}
    titles |= {"additive": "additive attention", "as written": "one attention with stored weights"}
    curves: list[Curve] = []
    for name, label in titles.items():
        found = [_mean(evidence, f"memory/{name}/{length}") for length in MEMORY]
        curves.append((name, label, MEMORY, [value and value / 2**20 for value in found]))
    axes = figure.subplots()
    _logarithmic(axes, curves)
    _curves(axes, curves)
    _frame(axes, title="MiB saved for the backward pass of one sentence", x="tokens of the sentence")


@dataclass(frozen=True)
class Picture:
    """A figure and how it is drawn."""

    title: str
    says: str  # alternative text
    draw: Draw
    rows: int = 0  # of dots


TRANSFORMER = {"transformer": "Transformer", "additive": "attention after the step"}
PICTURES = {
    "length": Picture("Length of sentences", "BLEU of five systems by length", by_length),
    "systems": Picture(
        "From a context vector to attention",
        "BLEU of recurrent, convolutional and Transformer networks",
        dots(
            *("fixed", "fixed-every", "static", "additive", "rnnsearch", "conv", "transformer"),
            names=TRANSFORMER,
        ),
        rows=7,
    ),
    "similarity": Picture(
        "Attention scores",
        "BLEU of six attention scores",
        dots("additive", "dot", "scaled", "general", "cosine", "location"),
        rows=6,
    ),
    "focus": Picture(
        "Soft, local and hard attention",
        "BLEU of soft, local and hard attention",
        dots(
            *("additive", "monotonic", "predictive", "sampled", "gumbel", "transformer", "hard-cross"),
            names={
                "additive": "soft",
                "transformer": "Transformer, soft",
                "hard-cross": "Transformer, hard",
            },
        ),
        rows=7,
    ),
    "speed": Picture("Speed", "Tokens per second of five networks by length", speed),
    "memory": Picture("Memory", "Memory of five networks by length", memory),
    "positions": Picture(
        "Positions", "BLEU of nine kinds of positions, at lengths of training and beyond", positions, rows=9
    ),
    "heads": Picture(
        "Heads and scaling",
        "BLEU with 1 to 16 heads, with and without scaling",
        dots(
            *("heads-1", "heads-2", "transformer", "heads-8", "heads-16", "unscaled-1", "unscaled-16"),
            names={"transformer": "4 heads"},
        ),
        rows=7,
    ),
    "training": Picture(
        "Training a Transformer",
        "BLEU with and without residual connections, warm-up, LayerNorm and label smoothing",
        dots(
            *("transformer", "pre-norm-cold", "post-norm", "post-norm-cold", "batch-norm", "unsmoothed"),
            *("plain", "deep", "deep-post", "deep-plain"),
            names={"transformer": "pre-norm, warm-up"},
        ),
        rows=10,
    ),
    "start": Picture(
        "Small data",
        "BLEU on small data from random weights, word vectors and BERT",
        dots(
            *("little", "little-vectors", "little-bert"),
            names={"little": "random weights", "little-vectors": "word vectors", "little-bert": "BERT"},
        ),
        rows=3,
    ),
}


# ---------------------------------------------------------------------------------- drawing


def _mean(evidence: Evidence, name: str) -> float | None:
    values = evidence.get(name)
    return fmean(values.values()) if values else None


def _logarithmic(axes: Any, curves: Sequence[Curve]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    axes.set(xscale="log", yscale="log", xticks=curves[0][2])
    known = [value for *_, values in curves for value in values if value]
    if known:
        axes.set(ylim=(min(known) / 1.3, max(known) * 1.3))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
        axis.set_minor_formatter(NullFormatter())
        axis.set_minor_locator(NullLocator())


def _curves(axes: Any, curves: Sequence[Curve]) -> None:
    """Curves with labels at their ends, which are moved apart where they would overlap."""
    ends = []
    for name, label, places, values in curves:
        known = [(x, y) for x, y in zip(places, values, strict=True) if y is not None]
        colour = DRAWN[LINES[name]]
        if known:
            axes.plot(*zip(*known, strict=True), color=colour, lw=1.8, solid_capstyle="round")
            ends.append((known[-1][1], known[-1][0], label, colour))
    axes.figure.canvas.draw()  # computes the positions of values
    point, below = axes.figure.dpi / 72, -math.inf
    for value, place, label, colour in sorted(ends):
        at = axes.transData.transform((place, value))[1] / point
        height = below = max(at, below + 10)
        offset = (6, height - at)
        axes.annotate(
            *(label, (place, value), offset),
            textcoords="offset points",
            color=colour,
            va="center",
            fontsize=8,
        )


def _dots(
    axes: Any,
    evidence: Evidence,
    shown: Sequence[tuple[str, str]],
    *,
    what: str,
    title: str = "",
    names: bool = True,
) -> None:
    for row, (name, _) in enumerate(shown):
        values = [*evidence.get(score(name, what), {}).values()]
        if values:
            axes.plot([0, fmean(values)], [row, row], color=DRAWN["grid"], lw=5, solid_capstyle="butt")
            axes.plot(values, [row] * len(values), "o", ms=4.5, color=DRAWN["blue"], alpha=0.75, mew=0)
            axes.text(
                max(values) + 2, row, f"{fmean(values):.1f}", va="center", fontsize=8, color=DRAWN["ink"]
            )
        else:
            axes.text(2, row, "pending", va="center", fontsize=8, color=DRAWN["faint"])
    axes.set_yticks(range(len(shown)), [title for _, title in shown])
    axes.tick_params(axis="y", length=0, labelleft=names)
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.set_xlim(0, 112)
    axes.set_xticks(range(0, 101, 25))
    _frame(
        axes,
        title=title,
        x="BLEU (dots: seeds, bar: mean)" if names else "BLEU",
        rows=True,
    )


def _frame(axes: Any, *, title: str, x: str, rows: bool = False) -> None:
    axes.set_title(title, loc="left", fontsize=9, color=DRAWN["ink"])
    axes.set_xlabel(x, fontsize=8, color=DRAWN["faint"])
    axes.grid(axis="x" if rows else "y", color=DRAWN["grid"], lw=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right", *(("left",) if rows else ())):
        axes.spines[side].set_visible(False)


# ---------------------------------------------------------------------------------- writing


def digest(figures: dict[str, Any]) -> str:
    """Identifies the data of a figure."""
    drawn = {name: figures[name] for name in ("scale", "seeds", "runs", "speed")}
    return hashlib.sha256(json.dumps(drawn, sort_keys=True).encode()).hexdigest()[:16]


def draw(figures: dict[str, Any], folder: Path = DOCS) -> None:
    """Write every figure."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    evidence, scale = sayings.evidence(figures), sayings.scale_of(figures)
    folder.mkdir(parents=True, exist_ok=True)
    style: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": "claims",
        "font.size": 9,
        "font.family": "sans-serif",
        "text.color": DRAWN["ink"],
        "axes.edgecolor": DRAWN["faint"],
        "xtick.color": DRAWN["faint"],
        "ytick.color": DRAWN["ink"],
        "figure.facecolor": DRAWN["paper"],
        "axes.facecolor": DRAWN["paper"],
        "savefig.facecolor": DRAWN["paper"],
    }
    for name, picture in PICTURES.items():
        with rc_context(style):
            size = (SIZE[0], 0.27 * picture.rows + 0.75) if picture.rows else SIZE
            figure = Figure(figsize=size, layout="constrained")
            picture.draw(figure, evidence, scale)
            stream = io.StringIO()
            figure.savefig(stream, format="svg", metadata={"Date": None})
        text = themed(stream.getvalue(), picture.says, digest(figures))
        (folder / f"{name}.svg").write_text(text, encoding="utf-8")


def themed(svg: str, says: str, stamp: str) -> str:
    """The figure with variables for colours, a title, and the digest of its data."""
    for name, (drawn, _, _) in COLOURS.items():
        svg = re.sub(drawn, f"var(--{name})", svg, flags=re.IGNORECASE)
    light, dark = (
        " ".join(f"--{name}: {values[page]};" for name, values in COLOURS.items()) for page in (1, 2)
    )
    rules = f":root {{ {light} }}\n@media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}"
    fonts = "text { font-family: system-ui, 'Segoe UI', 'DejaVu Sans', sans-serif !important; }"
    svg = re.sub(
        r"<metadata>.*?</metadata>\s*",
        f"<title>{says}</title>\n <desc>{stamp}</desc>\n ",
        svg,
        count=1,
        flags=re.DOTALL,
    )
    return svg.replace('<style type="text/css">', f'<style type="text/css">\n{rules}\n{fonts}\n', 1)


def main() -> None:
    [path] = map(Path, sys.argv[1:] or [RESULTS / "lineage.json"])
    draw(json.loads(path.read_bytes())["figures"])


if __name__ == "__main__":
    main()
