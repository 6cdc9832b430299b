"""The program that trains on corpora of several sizes: its rows are kept, and its table shows them."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import first_day
import first_day_tables


def made(pairs: int, **changes: Any) -> dict[str, Any]:
    plan = {"recipe": "transformer-tiny", "vocabulary": 2000, "steps": 1000, "every": 100}
    plan |= {"seconds_per_step": 0.5, "seconds_per_validation": 10.0}
    scores = {name: {"name": name, "value": 40.04, "signature": name} for name in ("bleu", "chrf")}
    row = {
        "corpus": "some",
        "pairs": pairs,
        "threads": 1,
        "shared": False,
        "plan": plan,
        "training": {"steps": 250, "seconds": 130.0, "validation_seconds": 25.0},
        "best": {"chrf": {"value": 41.5, "step": 200}},
        "scores": scores,
    }
    return row | changes


def test_the_plan_for_the_steps_taken_is_beside_the_measured_time() -> None:
    [row] = first_day_tables.rows({"figures": {"rows": {"some 300": made(300)}}})
    assert len(row) == len(first_day_tables.HEAD)
    shown = dict(zip(first_day_tables.HEAD, row, strict=True))
    assert shown["planned, at most"] == "10 min 00 s", "1,000 steps and 10 validations"
    assert shown["planned for these"] == "2 min 35 s", "250 steps and 3 validations"
    assert shown["measured"] == "2 min 35 s" and shown["steps taken"] == "250 of 1,000"
    assert (shown["best dev chrF"], shown["test BLEU"]) == ("41.5 at step 200", "40.0")


def test_rows_are_kept_beside_those_that_are_there(tmp_path: Path) -> None:
    given = argparse.Namespace(out=tmp_path, name="some")
    for pairs in (3000, 300, 3000):
        first_day.keep(given, pairs, made(pairs))
    found = json.loads((tmp_path / "first-day.json").read_bytes())
    assert list(found["figures"]["rows"]) == ["some 300", "some 3000"]
    assert found["versions"] and found["commit"]
