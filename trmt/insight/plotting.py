"""Training curves of runs, as a figure with matplotlib or as text for a terminal."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from trmt import console
from trmt.config import Options
from trmt.errors import ConfigError, DataError, TrmtError
from trmt.storage.files import atomic_file
from trmt.storage.locks import LOCK
from trmt.training.display import remove_controls
from trmt.training.history import LABELS, LOG, TRAIN, VALIDATE, History, Point, best, read_times
from trmt.training.textplot import MARKS, Curve, Segment, bounds, chart, short

XAxisName = Literal["steps", "tokens", "hours"]
FORMATS = ("png", "svg", "pdf")
# Distinguishable by colour-blind readers (Okabe and Ito, "Color Universal Design", 2008), the dark ones
# first.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
# The colours of lines on a terminal, readable on dark and light backgrounds.
LINE_COLOURS = ("#56B4E9", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#0072B2", "#999999")
LINE_STYLES = ("-", "--", ":", "-.")  # the next one each time the colours repeat
X_LABELS = {"steps": "steps", "tokens": "target tokens", "hours": "hours of training"}
PLOT_ROWS = 8  # of a plot on a terminal
TWO_PLOTS_WIDTH = 100  # terminal columns from which two plots are side by side
MIN_PLOT_WIDTH = 24
MAX_ENTRY = 1 << 20  # bytes of a line in a log


@dataclass(frozen=True, kw_only=True)
class PlotOptions(Options):
    """The options of `trmt plot`."""

    runs: tuple[Path, ...] = ()  # run folders or log files; none: the newest run
    out: Path | None = None
    axis: XAxisName = "steps"


@dataclass(frozen=True)
class Panel:
    """The curves of one quantity, one for each run; that of a run without the quantity is empty."""

    title: str
    lines: tuple[Curve, ...]
    marked: bool = False  # whether each point is marked: validations, which are few


def plot(options: PlotOptions) -> tuple[dict[str, History], list[Panel]]:
    """Read the runs and write the figure, if there is an output file; returns histories and panels."""
    extension = options.out.suffix.lower().removeprefix(".") if options.out else ""
    if options.out and extension not in FORMATS:
        raise ConfigError(f"{options.out} has no known file format; end it in .{', .'.join(FORMATS)}")
    histories = read_runs(options.runs or (_newest_run(),))
    drawn = panels(histories, options.axis)
    if options.out:
        _write(options.out, extension, drawn, list(histories), axis=options.axis)
        console.say(f"{len(drawn)} curves of {len(histories)} runs -> {options.out}")
    return histories, drawn


def read_runs(paths: Sequence[Path]) -> dict[str, History]:
    """The histories of runs, by folder name, or by path if folder names are not unique."""
    logs = [path if path.is_file() else _folder(path) / LOG for path in paths]
    names = [log.resolve().parent.name if log.name == LOG else log.stem for log in logs]
    if len(set(names)) < len(names):
        names = [str(path) for path in paths]
    if len(set(names)) < len(names):
        raise ConfigError("a run is given twice; name each run once")
    histories = {}
    for name, log in zip(names, logs, strict=True):
        _refuse_text(log)
        histories[name] = history = History.read(log)
        if not history.entries:
            raise DataError(f"{log} has no curves; {_advice(log)}, or name another run")
    return histories


def _refuse_text(log: Path) -> None:
    """Refuse a file that is no log."""
    if log.name == LOG or not log.is_file():
        return
    with log.open("rb") as stream:
        head = stream.readline(MAX_ENTRY)
    if b'"event"' not in head:
        raise DataError(f"{log} is not the log of a run; name a run folder, or the {LOG} in one")


def _advice(log: Path) -> str:
    """What to do about a log without curves, which depends on whether its run has ended."""
    if log.with_name(LOCK).exists():
        return f"wait for the first {TRAIN} entry"
    ended = read_times(log).end_step
    if ended is not None:
        return f"the run has ended at step {ended:,} with fewer steps than training.log_every"
    return "the run has fewer steps than training.log_every, so train on"


def _folder(path: Path) -> Path:
    """A run folder by its path, or by its name in models/."""
    if path.is_absolute() or (path / LOG).exists():
        return path
    from trmt.bundles.checkpoints import MODELS  # loads torch, which plotting does not need

    return MODELS / path if (MODELS / path / LOG).is_file() else path


def _newest_run() -> Path:
    from trmt.bundles.checkpoints import MODELS  # loads torch, which plotting does not need

    logs = [log for log in MODELS.glob(f"*/{LOG}") if log.is_file()]
    if not logs:
        raise DataError(f"there is no run in {MODELS}/; name one, or run trmt train first")
    newest = max(logs, key=lambda log: (read_times(log).last, log)).parent
    console.say(f"run: {newest}")
    return newest


def panels(histories: dict[str, History], axis: XAxisName) -> list[Panel]:
    """The panels of the quantities that at least one run has: losses, scores, learning rate, speed."""
    metrics = dict.fromkeys(metric for history in histories.values() for metric in history.metrics())
    quantities = [("training loss (nats per token)", TRAIN, "loss")]
    quantities += [("dev loss (nats per token)", VALIDATE, "loss")]
    quantities += [(f"dev {LABELS.get(name, name)}", VALIDATE, name) for name in metrics if name != "loss"]
    quantities += [("learning rate", TRAIN, "lr"), ("target tokens/s", TRAIN, "tokens_per_second")]
    found = []
    for title, event, name in quantities:
        curves = [_line(history.curve(event, name), axis, run=run) for run, history in histories.items()]
        if any(len(line.x) for line in curves):
            found.append(Panel(title, tuple(curves), marked=event == VALIDATE))
    return found


def _line(points: Sequence[Point], axis: XAxisName, *, run: str) -> Curve:
    x_values = [{"steps": point.step, "tokens": point.tokens, "hours": point.hours}[axis] for point in points]
    known = [x for x in x_values if x is not None]
    if len(known) < len(x_values):
        raise DataError(
            f"the log of {run} has no {axis}, because its version of trmt is older; use --x steps"
        )
    return Curve(known, [point.value for point in points])


def summary(histories: dict[str, History]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of a table: steps and time of each run, its best scores and their steps."""
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
    drawn: Sequence[Panel], names: Sequence[str], *, width: int, axis: XAxisName, marked: bool
) -> list[list[Segment]]:
    """The panels as rows of (text, number of its run), two side by side if the width allows it."""
    per_row = 2 if width >= TWO_PLOTS_WIDTH else 1
    plot_width = max(width // per_row - 2, MIN_PLOT_WIDTH)
    rows: list[list[Segment]] = []
    for number, name in enumerate(names):
        rows.append([(f"{MARKS[number % len(MARKS)] if marked else '━━'} {remove_controls(name)}", number)])
    for first in range(0, len(drawn), per_row):
        blocks = [
            [[(panel.title, None)], *chart(panel.lines, plot_width, PLOT_ROWS, unit=axis, marked=marked), []]
            for panel in drawn[first : first + per_row]
        ]
        for side_by_side in zip(*blocks, strict=True):
            row: list[Segment] = []
            for number, segments in enumerate(side_by_side):
                gap = number * (plot_width + 4) - sum(len(text) for text, _ in row)
                row += [(" " * gap, None), *segments] if number else segments
            rows.append(row)
    return rows


# As a figure


def _write(
    out: Path, extension: str, drawn: Sequence[Panel], names: Sequence[str], *, axis: XAxisName
) -> None:
    try:
        from matplotlib import rc_context
    except ImportError as error:
        raise TrmtError(
            "figures need matplotlib, which is not installed: pip install 'trmt[plot]', "
            "or leave --output out to see the curves as text"
        ) from error
    # No dates, so that the same curves give the same file.
    metadata: dict[str, Any] = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(extension, {})
    style: dict[Any, Any] = {
        "svg.hashsalt": "trmt",
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with rc_context(style), warnings.catch_warnings(), atomic_file(out) as stream:
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # run names can be in any script
        draw_figure(drawn, names, axis=axis).savefig(stream, format=extension, dpi=150, metadata=metadata)


def draw_figure(drawn: Sequence[Panel], names: Sequence[str], *, axis: XAxisName) -> Any:
    """The panels as a matplotlib figure; a run has the same colour in each."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    columns = min(len(drawn), 3 if len(drawn) > 4 else 2)
    down = -(-len(drawn) // columns)
    figure = Figure(figsize=(3.9 * columns + 0.3, 2.6 * down + 0.5), layout="constrained")
    grid = figure.subplots(down, columns, squeeze=False)
    all_axes = [axes for row in grid for axes in row]
    for number, (axes, panel) in enumerate(zip(all_axes, drawn, strict=False)):
        _draw(axes, panel)
        axes.set_xlim(0, 1.02 * max(line.x[-1] for panel in drawn for line in panel.lines if len(line.x)))
        axes.xaxis.set_major_formatter(FuncFormatter(_tick))
        axes.yaxis.set_major_formatter(FuncFormatter(_tick))
        if number + columns >= len(drawn):
            axes.set_xlabel(X_LABELS[axis])
    for axes in all_axes[len(drawn) :]:
        axes.set_axis_off()
    _add_legend(figure, all_axes[0], names)
    return figure


def _tick(value: float, _: int | None) -> str:
    return short(value) if abs(value) >= 10_000 else f"{value:g}"


def _draw(axes: Any, panel: Panel) -> None:
    for number, line in enumerate(panel.lines):
        # An empty line keeps the colours of the other runs the same in all panels.
        axes.plot(
            line.x,
            line.y,
            color=COLOURS[number % len(COLOURS)],
            linestyle=LINE_STYLES[number // len(COLOURS) % len(LINE_STYLES)],
            linewidth=1.5 if panel.marked else 1.1,
            marker="o" if panel.marked and len(line.x) <= 40 else None,
            markersize=3.5,
        )
    low, high = bounds([line.y for line in panel.lines if len(line.y)])
    margin = (high - low) * 0.06
    axes.set_ylim(low - margin, high + margin)
    axes.set_title(panel.title, loc="left", fontsize=9, fontweight="bold")
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)


def _add_legend(figure: Any, axes: Any, names: Sequence[str]) -> None:
    """Add a legend of the runs; their names are set afterwards, because labels interpret some characters."""
    legend = figure.legend(
        axes.get_lines(),
        ["run"] * len(names),
        loc="outside upper left",
        ncols=min(len(names), 4),
        frameon=False,
    )
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set_parse_math(False)
        text.set_text(name)
