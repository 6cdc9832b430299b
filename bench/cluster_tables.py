"""The tables of docs/scale.md: speed of workers, and an estimate for a billion sentences."""

from __future__ import annotations

import json
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"
BILLION = 1_000_000_000
# A point of translate.json: a network of a common size.
BASE = "base/int8/16/greedy/1"
LINES_IN_PART = 10_000
KINDS = {
    "processes": "in parts, local processes",
    "ray": "in parts, Ray",
    "alone": "not in parts",
    "sentencepiece": "sentencepiece alone",
}
RATES_HEAD = (
    "command",
    "workers",
    "lines/s per worker",
    "lines per CPU second",
    "lines/s in all",
    "overhead in s",
)
CLOCK = ("lines_per_second_of_a_worker", "clock_seconds", "beside_the_parts_seconds")
PREPARE_HEAD = (*RATES_HEAD, "share of sentencepiece's rate")
PLAN_HEAD = ("step", "run by", "measured rate", "a billion sentences")
Row = tuple[str, ...]


def prepare_rates() -> list[Row]:
    """The rows of `prepare`, with the share of sentencepiece's own rate per CPU second."""
    found = result("prepare")
    if found is None:
        return [(*row, "") for row in rates("prepare")]
    alone = _rows(found)["sentencepiece/1"]["lines_per_cpu_second"]
    return [(*row, f"{int(row[3].replace(',', '')) / alone:.0%}") for row in rates("prepare")]


def result(what: str) -> dict | None:
    path = RESULTS / f"cluster-{what}.json"
    return json.loads(path.read_bytes()) if path.exists() else None


def rates(what: str) -> list[Row]:
    """One for each kind and number of workers that was measured."""
    found = result(what)
    if found is None:
        return [("pending", *("" for _ in RATES_HEAD[1:]))]
    rows = _rows(found)
    # In the order of the kinds, whatever was measured last.
    return [
        _rates(rows[name], KINDS[kind], workers)
        for kind in KINDS
        for workers in ("1", "2")
        if (name := f"{kind}/{workers}") in rows
    ]


def _rates(row: dict, kind: str, workers: str) -> Row:
    if row.get("busy"):  # other programs ran at the same time: wall clock times mean little
        row = {key: row[key] for key in row if key not in CLOCK}
    own = row.get("lines_per_second_of_a_worker")
    busy = row.get("lines_per_cpu_second_of_a_worker", row.get("lines_per_cpu_second"))
    clock = row.get("clock_seconds")
    return (
        kind,
        workers,
        f"{own:,.0f}" if own else "",
        f"{busy:,.0f}",
        f"{row['lines'] / clock:,.0f}" if clock else "",
        f"{row['beside_the_parts_seconds']:.1f}" if "beside_the_parts_seconds" in row else "",
    )


def plan() -> list[Row]:
    """The cost of a billion sentences, step by step, at the measured rates."""
    translated, prepared, large = result("translate"), result("prepare"), result("main")
    if translated is None or prepared is None or large is None:
        return [("pending", *("" for _ in PLAN_HEAD[1:]))]
    rows = _rows(translated)
    pairs = _rows(prepared)
    text = _figures("prepare-1000000")
    sides = text["source_bytes"] + text["target_bytes"]
    per_pair = sides / text["pairs"]
    cut = rows["cutting/1"]["mb_per_cpu_second"]
    [many] = large["figures"]["rows"]
    main = many["main_cpu_seconds"] / many["lines"]
    encoding = pairs["processes/1"]["lines_per_cpu_second_of_a_worker"]
    tiny = rows["processes/1"]["lines_per_cpu_second_of_a_worker"]
    base = _figures("translate")["points"][BASE]["engines"]["trmt"]["sentences_per_second"]
    handed = rows["handing/2"]["parts_per_cpu_second"]
    return [
        (
            "translate: divide the text into parts",
            "main process",
            f"{cut:,} MB/s",
            _hours(BILLION * 100 / (cut * 1e6)),
        ),
        (
            "translate: assign parts to workers",
            "main process",
            f"{handed:,} parts/s",
            _hours(BILLION / LINES_IN_PART / handed),
        ),
        ("translate with a tiny network", "each worker", f"{tiny:,.0f} lines/s", _core_hours(BILLION / tiny)),
        (
            "translate with a base network in int8",
            "each worker",
            f"{base:,.0f} lines/s",
            _core_hours(BILLION / base),
        ),
        (
            "prepare: read, encode, filter",
            "each worker",
            f"{encoding:,.0f} pairs/s",
            _core_hours(BILLION / encoding),
        ),
        (
            "prepare: work of the main process",
            "main process",
            f"{1 / main:,.0f} pairs/s",
            _hours(BILLION * main),
        ),
        ("prepare: workers that keep the main process busy", "", f"{1 / main / encoding:,.0f}", ""),
        (
            "prepare: text read by the main process",
            "storage",
            f"{per_pair:,.0f} bytes per pair",
            f"{2 * per_pair:,.0f} GB",
        ),
    ]


def _rows(found: dict) -> dict[str, dict]:
    return {row["row"]: row for row in found["figures"]["rows"]}


def _figures(name: str) -> dict:
    found: dict = json.loads((RESULTS / f"{name}.json").read_bytes())["figures"]
    return found


def _hours(seconds: float) -> str:
    return f"{seconds / 60:,.0f} min" if seconds < 2 * 3600 else f"{seconds / 3600:,.1f} h"


def _core_hours(seconds: float) -> str:
    return f"{seconds / 3600:,.0f} core hours"
