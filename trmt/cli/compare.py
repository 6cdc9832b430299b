"""`trmt compare`: runs side by side, and whether their scores differ significantly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trmt.cli import completion
from trmt.cli.common import Device, Threads, format_table, print_report, set_threads
from trmt.cli.plot import CurvesAxis, CurvesOut, XAxis, draw_curves
from trmt.cli.score import format_systems

if TYPE_CHECKING:
    from trmt.insight.comparing import Comparison

MAX_CELL = 40  # characters


def command(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN", help="Run folders, the baseline first.", autocompletion=completion.models
        ),
    ],
    test: Annotated[
        str | None,
        typer.Option(
            "--test", metavar="CORPUS", help="Test set to translate and score, besides the dev set."
        ),
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(
            "--metric",
            "-m",
            metavar="NAME",
            help="bleu, chrf, chrf++ or ter; repeatable. [default: bleu chrf]",
            autocompletion=completion.metrics,
        ),
    ] = None,
    beam: Annotated[int, typer.Option("--beam", min=1, help="Beam size; 1 is greedy search.")] = 4,
    resamples: Annotated[int, typer.Option(min=2, help="Resamples of the paired bootstrap.")] = 1000,
    log_only: Annotated[
        bool, typer.Option("--log-only", help="Translate nothing: compare only run folders and logs.")
    ] = False,
    out: CurvesOut = None,
    x_axis: CurvesAxis = XAxis.steps,
    device: Device = "auto",
    threads: Threads = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything but the curves as JSON.")] = False,
) -> None:
    """Compare runs. Curves, data, settings that differ, speed, scores, and whether they differ by chance."""
    from trmt.insight.comparing import CompareOptions, as_tree, compare

    set_threads(threads)
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
    if out or not as_json:
        draw_curves(options.runs, out, x_axis)
    if as_json:
        print_report(json.dumps(as_tree(found, options), indent=2, ensure_ascii=False))
    else:
        _print(found, options.test, beam)


def _print(found: Comparison, test: str | None, beam: int) -> None:
    from trmt import console

    print_report(_format_runs(found))
    for title, scores in (("dev set", found.dev), (f"test set {test}", found.test)):
        if scores:
            print_report(f"\n{title}, beam {beam}\n{format_systems('run', scores)}")
    if found.dev or found.test:
        base = next(iter(found.runs))
        console.say(
            f"in brackets: mean and 95% interval; p: paired bootstrap against {base}; * differs at p < 0.05"
        )


def _format_runs(found: Comparison) -> str:
    """A column for each run: data, size, progress, and the settings that differ."""
    from trmt import console

    runs = found.runs.values()
    lines: list[list[str]] = [["", *found.runs]]

    def add(name: str, cells: list[str]) -> None:
        if any(cells):
            lines.append([name, *map(_truncate, cells)])

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
    for metric in dict.fromkeys(score["metric"] for run in runs for score in run.best):
        add(f"best {metric}", [_best(run.best, metric) for run in runs])
    for setting, values in found.differences.items():
        add(setting, [str(value).lower() if isinstance(value, bool) else str(value) for value in values])
    for name, why in found.left_out.items():
        lines.append([f"not compared: {name}", why])
    return format_table([[*line, *[""] * (len(lines[0]) - len(line))] for line in lines])


def _best(scores: list[dict[str, Any]], metric: str) -> str:
    found = next((score for score in scores if score["metric"] == metric), None)
    return f"{found['value']:.4g} at {found['step']:,}" if found else ""


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}"


def _truncate(cell: str) -> str:
    return cell if len(cell) <= MAX_CELL else f"…{cell[1 - MAX_CELL :]}"
