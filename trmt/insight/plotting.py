"""Curves of runs side by side: as a picture with matplotlib, or as text for a terminal."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from trmt import console
from trmt.errors import ConfigError, DataError, TrmtError
from trmt.storage.files import atomic_file
from trmt.training.display import remove_controls
from trmt.training.history import LABELS, LOG, TRAIN, VALIDATE, History, Point, best
from trmt.training.textplot import MARKS, Curve, Segment, bounds, chart, short

Axis = Literal["steps", "tokens", "hours"]
AXES: tuple[str, ...] = get_args(Axis)
FORMATS = ("png", "svg", "pdf")
# Distinct for colour-blind eyes: Okabe and Ito, "Color Universal Design" (2008), the dark ones first.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
ON_DARK = ("#56B4E9", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#0072B2", "#999999")  # and on light
DASHES = ("-", "--", ":", "-.")  # for the runs after those that have a colour of their own
UNITS = {"steps": "steps", "tokens": "target tokens", "hours": "hours of training"}
ROWS = 8  # of a plot in a terminal
WIDE = 100  # columns from which two plots stand side by side
NARROW = 24


@dataclass(frozen=True, kw_only=True)
class PlotOptions:
    """What `trmt plot` takes."""

    runs: tuple[Path, ...] = ()  # run folders or their logs; none: the newest run
    out: Path | None = None
    axis: Axis = "steps"


@dataclass(frozen=True)
class Panel:
    """One quantity of all runs: places and values of each; a run that lacks it has none."""

    title: str
    lines: tuple[Curve, ...]
    few: bool = False  # few enough points to be marked


def plot(options: PlotOptions) -> tuple[dict[str, History], list[Panel]]:
    """Read the runs, write the picture if one is wanted; return what was read and what there is to draw."""
    kind = options.out.suffix.lower().removeprefix(".") if options.out else ""
    if options.out and kind not in FORMATS:
        raise ConfigError(f"{options.out} says no known format; end it in .{', .'.join(FORMATS)}")
    histories = read_runs(options.runs or (_newest_run(),))
    drawn = panels(histories, options.axis)
    if options.out:
        _write(options.out, kind, drawn, list(histories), axis=options.axis)
        console.say(f"{len(drawn)} curves of {len(histories)} runs -> {options.out}")
    return histories, drawn


def read_runs(places: Sequence[Path]) -> dict[str, History]:
    """The histories of runs, by the shortest name that tells them apart."""
    logs = [place if place.is_file() else place / LOG for place in places]
    names = [log.resolve().parent.name if log.name == LOG else log.stem for log in logs]
    if len(set(names)) < len(names):
        names = [str(place) for place in places]
    if len(set(names)) < len(names):
        raise ConfigError("a run is named twice; name each once")
    histories = {}
    for name, log in zip(names, logs, strict=True):
        histories[name] = history = History.read(log)
        if history.damaged:
            console.warn(f"{history.damaged} lines of {log} cannot be read and are left out")
        if not history.entries:
            raise DataError(f"{log} has no curves yet; wait for the first {TRAIN} entry, or name another run")
    return histories


def _newest_run() -> Path:
    from trmt.bundles.checkpoints import MODELS  # loads torch, which drawing does not need

    logs = [log for log in MODELS.glob(f"*/{LOG}") if log.is_file()]
    if not logs:
        raise DataError(f"there is no run in {MODELS}/; name one, or run trmt train first")
    newest = max(logs, key=lambda log: log.stat().st_mtime).parent
    console.say(f"run: {newest}")
    return newest


def panels(histories: dict[str, History], axis: Axis) -> list[Panel]:
    """What can be drawn of these runs: losses, scores, learning rate, speed."""
    metrics = dict.fromkeys(metric for history in histories.values() for metric in history.metrics())
    wanted = [("training loss (nats per token)", TRAIN, "loss")]
    wanted += [("dev loss (nats per token)", VALIDATE, "loss")]
    wanted += [(f"dev {LABELS.get(name, name)}", VALIDATE, name) for name in metrics if name != "loss"]
    wanted += [("learning rate", TRAIN, "lr"), ("target tokens/s", TRAIN, "tokens_per_second")]
    found = []
    for title, event, name in wanted:
        curves = [_line(history.curve(event, name), axis, run=run) for run, history in histories.items()]
        if any(len(line.x) for line in curves):
            found.append(Panel(title, tuple(curves), few=event == VALIDATE))
    return found


def _line(points: Sequence[Point], axis: Axis, *, run: str) -> Curve:
    places = [{"steps": point.step, "tokens": point.tokens, "hours": point.hours}[axis] for point in points]
    known = [place for place in places if place is not None]
    if len(known) < len(places):
        raise DataError(f"the log of {run} does not say {axis}, it is of an older trmt; use --x steps")
    return Curve(known, [point.value for point in points])


def summary(histories: dict[str, History]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of a table: how far each run came, its best scores, and at which step."""
    metrics = list(dict.fromkeys(metric for history in histories.values() for metric in history.metrics()))
    columns = ["run", "steps", "training", *(f"best {LABELS.get(name, name)}" for name in metrics)]
    rows = []
    for run, history in histories.items():
        last = history.entries[-1]
        trained = console.duration(last["elapsed"]) if "elapsed" in last else ""
        found = [best(history.curve(VALIDATE, metric), metric) for metric in metrics]
        cells = [f"{point.value:.4g} at {short(point.step)}" if point else "" for point in found]
        rows.append([run, f"{last['step']:,}", trained, *cells])
    return columns, rows


# As text


def rows(
    drawn: Sequence[Panel], names: Sequence[str], *, width: int, axis: Axis, marked: bool
) -> list[list[Segment]]:
    """The panels as rows of text with the number of the run each piece belongs to; two abreast if wide."""
    abreast = 2 if width >= WIDE else 1
    across = max(width // abreast - 2, NARROW)
    rows: list[list[Segment]] = []
    for number, name in enumerate(names):
        rows.append([(f"{MARKS[number % len(MARKS)] if marked else '━━'} {remove_controls(name)}", number)])
    for place in range(0, len(drawn), abreast):
        blocks = [
            [[(panel.title, None)], *chart(panel.lines, across, ROWS, unit=axis, marked=marked), []]
            for panel in drawn[place : place + abreast]
        ]
        for side_by_side in zip(*blocks, strict=True):
            row: list[Segment] = []
            for number, part in enumerate(side_by_side):
                gap = number * (across + 4) - sum(len(text) for text, _ in row)
                row += [(" " * gap, None), *part] if number else part
            rows.append(row)
    return rows


# As a picture


def _write(out: Path, kind: str, drawn: Sequence[Panel], names: Sequence[str], *, axis: Axis) -> None:
    try:
        from matplotlib import rc_context
    except ImportError as error:
        raise TrmtError(
            "pictures need matplotlib, which is not installed: pip install 'trmt[plot]', "
            "or leave out --out and see the curves as text"
        ) from error
    # The same curves give the same file, so that it can be kept under version control.
    stamp: dict[str, Any] = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(kind, {})
    style: dict[Any, Any] = {
        "svg.hashsalt": "trmt",
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with rc_context(style), warnings.catch_warnings(), atomic_file(out) as stream:
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # a run may be named in any script
        picture(drawn, names, axis=axis).savefig(stream, format=kind, dpi=150, metadata=stamp)


def picture(drawn: Sequence[Panel], names: Sequence[str], *, axis: Axis) -> Any:
    """The panels as a matplotlib figure; a run has the same colour in each."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    columns = min(len(drawn), 3 if len(drawn) > 4 else 2)
    down = -(-len(drawn) // columns)
    figure = Figure(figsize=(3.9 * columns + 0.3, 2.6 * down + 0.5), layout="constrained")
    grid = figure.subplots(down, columns, squeeze=False)
    places = [place for row in grid for place in row]
    for number, (place, panel) in enumerate(zip(places, drawn, strict=False)):
        _draw(place, panel)
        place.set_xlim(0, 1.02 * max(line.x[-1] for panel in drawn for line in panel.lines if len(line.x)))
        place.xaxis.set_major_formatter(FuncFormatter(_tick))
        place.yaxis.set_major_formatter(FuncFormatter(_tick))
        if number + columns >= len(drawn):
            place.set_xlabel(UNITS[axis])
    for place in places[len(drawn) :]:
        place.set_axis_off()
    _name_runs(figure, places[0], names)
    return figure


def _tick(value: float, _: int | None) -> str:
    return short(value) if abs(value) >= 10_000 else f"{value:g}"


def _draw(place: Any, panel: Panel) -> None:
    for number, line in enumerate(panel.lines):
        # A run without this quantity keeps its colour and draws nothing.
        place.plot(
            line.x,
            line.y,
            color=COLOURS[number % len(COLOURS)],
            linestyle=DASHES[number // len(COLOURS) % len(DASHES)],
            linewidth=1.5 if panel.few else 1.1,
            marker="o" if panel.few and len(line.x) <= 40 else None,
            markersize=3.5,
        )
    low, high = bounds([line.y for line in panel.lines if len(line.y)])
    margin = (high - low) * 0.06
    place.set_ylim(low - margin, high + margin)
    place.set_title(panel.title, loc="left", fontsize=9, fontweight="bold")
    place.grid(color="#dddddd", linewidth=0.6)
    place.set_axisbelow(True)


def _name_runs(figure: Any, place: Any, names: Sequence[str]) -> None:
    """Who has which colour; names are put in afterwards, because some characters mean something in labels."""
    legend = figure.legend(
        place.get_lines(),
        ["run"] * len(names),
        loc="outside upper left",
        ncols=min(len(names), 4),
        frameon=False,
    )
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set_parse_math(False)
        text.set_text(name)
