"""`trmt compare`: runs side by side, and whether one is better than another."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trmt.cli.options import Device
from trmt.cli.plot import Across
from trmt.cli.score import aligned, shown

if TYPE_CHECKING:
    from trmt.insight.comparing import Comparison, Scores

WIDEST = 40  # columns of a cell


def command(
    runs: Annotated[list[Path], typer.Argument(help="Run folders, the baseline first.")],
    test: Annotated[
        str | None,
        typer.Option("--test", metavar="CORPUS", help="Pairs to translate and score besides the dev set."),
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option("--metric", "-m", help="bleu, chrf, chrf++ or ter; repeatable.  [default: bleu chrf]"),
    ] = None,
    beam: Annotated[int, typer.Option("--beam", min=1, help="Size of the beam; 1 is greedy search.")] = 4,
    resamples: Annotated[int, typer.Option(min=2, help="Of the paired bootstrap.")] = 1000,
    log_only: Annotated[
        bool, typer.Option("--log-only", help="Translate nothing: only what folders and logs say.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Picture of the curves: .png, .svg or .pdf. [default: text]"),
    ] = None,
    across: Annotated[Across, typer.Option("--x", help="What the curves are drawn over.")] = Across.steps,
    device: Device = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Everything, as JSON; no curves.")] = False,
) -> None:
    """Compare runs: curves, data, settings that differ, speed, scores and whether they differ by chance."""
    import json

    from trmt.insight.comparing import CompareOptions, as_tree, compare

    options = CompareOptions(
        runs=tuple(runs),
        test=test,
        metrics=tuple(metric or ("bleu", "chrf")),
        beam=beam,
        resamples=resamples,
        log_only=log_only,
        device=device,
    )
    found = compare(options)
    if as_json and not out:
        typer.echo(json.dumps(as_tree(found, options), indent=2, ensure_ascii=False))
        return
    _draw(options.runs, out, across)
    if as_json:
        typer.echo(json.dumps(as_tree(found, options), indent=2, ensure_ascii=False))
        return
    typer.echo(_table(found))
    for title, scores in (("dev set", found.dev), (f"test set {test}", found.test)):
        if scores:
            typer.echo(f"\n{title}, beam {beam}\n{_scores(scores)}")
    if found.dev or found.test:
        from trmt import console

        base = next(iter(found.runs))
        console.say(
            f"in brackets: mean and 95% interval; p: paired bootstrap against {base}; * differs at p < 0.05"
        )


def _draw(runs: tuple[Path, ...], out: Path | None, across: Across) -> None:
    """The curves, as `trmt plot` draws them."""
    import os
    import shutil
    import sys

    from trmt.insight.plotting import ON_DARK, PlotOptions, plot, rows
    from trmt.training import display

    histories, drawn = plot(PlotOptions(runs=runs, out=out, axis=across.value))
    if out is None:
        coloured = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        width = shutil.get_terminal_size().columns
        pictured = rows(drawn, list(histories), width=width, axis=across.value, marked=not coloured)
        display.draw(pictured, ON_DARK)


def _table(found: Comparison) -> str:
    """A column for each run: what it is, how far it came, and the settings that differ."""
    from trmt import console

    runs = found.runs.values()
    lines: list[list[str]] = [["", *found.runs]]

    def add(name: str, cells: list[str]) -> None:
        if any(cells):
            lines.append([name, *(_cut(cell) for cell in cells)])

    add("languages", [" -> ".join(run.languages) if any(run.languages) else "" for run in runs])
    add("data", [str(run.data.get("set", "")) for run in runs])
    add("pairs", [_number(run.data.get("train")) for run in runs])
    add("dev pairs", [_number(run.data.get("dev")) for run in runs])
    add("parameters", [_number(run.parameters) for run in runs])
    add("steps", [_number(run.progress["step"]) for run in runs])
    add("target tokens", [_number(run.progress.get("target_tokens")) for run in runs])
    add(
        "training",
        [console.duration(run.progress["seconds"]) if "seconds" in run.progress else "" for run in runs],
    )
    add("target tokens/s", [_number(run.progress.get("tokens_per_second")) for run in runs])
    metrics = dict.fromkeys(score["metric"] for run in runs for score in run.best)
    for metric in metrics:
        add(f"best {metric}", [_best(run.best, metric) for run in runs])
    for setting, values in found.differences.items():
        lines.append([setting, *(_cut(_plain(value)) for value in values)])
    for name, why in found.left_out.items():
        lines.append([f"not compared: {name}", why])
    return aligned([[*line, *[""] * (len(lines[0]) - len(line))] for line in lines])


def _best(scores: list[dict[str, Any]], metric: str) -> str:
    found = next((score for score in scores if score["metric"] == metric), None)
    return f"{found['value']:.4g} at {found['step']:,}" if found else ""


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}"


def _plain(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _cut(cell: str) -> str:
    return cell if len(cell) <= WIDEST else f"…{cell[1 - WIDEST :]}"


def _scores(table: Scores) -> str:
    """As `trmt score` shows several systems."""
    first = next(iter(table.values()))
    rows = [["run", *(found.name for found in first.values())]]
    rows += [[name, *(shown(found) for found in scores.values())] for name, scores in table.items()]
    signatures = [[found.name, found.signature] for found in first.values()]
    return f"{aligned(rows)}\n\n{aligned(signatures)}"
