"""The program that measures every recipe: its settings are recipes' settings, and rows are made once."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import recipe_tables
import recipes
import starts
from trmt.training.recipe import load_recipe

SCORES = {
    "bleu": {"name": "BLEU", "value": 61.25, "signature": "one"},
    "chrf": {"name": "chrF2", "value": 80.0, "signature": "two"},
}
FIGURES = {"parameters": 1234567, "steps": 10, "seconds": 61.2, "dev_loss": 1.5, "scores": SCORES}


def made(row: recipes.Row) -> dict[str, Any]:
    start = {"start": {"steps": 5, "seconds": 3.0}} if row.start else {}
    return {**FIGURES, **start, "exact": 3, "sentences": 4, "commit": "abc"}


@pytest.mark.parametrize("row", recipes.ROWS, ids=lambda row: row.name)
def test_every_row_changes_what_its_recipe_has(row: recipes.Row) -> None:
    assert load_recipe(row.recipe, row.settings)
    assert row.start is None or load_recipe(row.start, row.start_settings)


def test_a_start_is_compared_with_chance_in_the_same_network() -> None:
    alike = load_recipe("phrasebook", [*starts.SETTINGS, *starts.SAME[1::2]]).network
    read = load_recipe("bert-tiny", starts.READING).network
    assert {name: alike.get(name) for name in ("heads", "encoder_layers")} == {
        name: read[name] for name in ("heads", "encoder_layers")
    }


def test_rows_are_made_once_and_again_if_they_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def run(self: recipes.Workshop, row: recipes.Row) -> dict[str, Any]:
        asked.append(row.name)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return made(row)

    monkeypatch.setattr(recipes.Workshop, "run", run)
    monkeypatch.setattr(sys, "argv", ["recipes.py", "--out", str(tmp_path)])
    with pytest.raises(KeyboardInterrupt):
        recipes.main()
    recipes.main()
    names = [row.name for row in recipes.ROWS]
    assert asked == [*names[:3], *names[2:]]
    changed = replace(recipes.ROWS[1], steps=7)
    monkeypatch.setattr(recipes, "ROWS", (recipes.ROWS[0], changed, *recipes.ROWS[2:]))
    recipes.main()
    assert asked[len(names) + 1 :] == [changed.name]
    found = json.loads((tmp_path / "recipes.json").read_bytes())["figures"]["rows"]
    assert list(found) == names


def test_the_tables_say_what_was_changed_and_found() -> None:
    row = recipes.ROWS[-1]
    result = {"figures": {"rows": {row.name: {"plan": row.plan, **made(row)}}}}
    [cells] = recipe_tables.recipe_rows(result)
    assert cells[0] == "`phrasebook` from `bert-tiny`"
    assert cells[2:] == ("1,234,567", "5 + 10", "3 + 61", "61.2", "80.0", "75%")
    other = {**FIGURES, "scores": {**SCORES, "bleu": {**SCORES["bleu"], "value": 60.0}}, "dev_loss": 2.0}
    [cells] = recipe_tables.start_rows({"figures": {"starts": {"chance": [FIGURES, other]}}})
    assert cells == ("random", "60.6 (60.0–61.2)", "80.0 (80.0–80.0)", "1.750 (1.500–2.000)")
