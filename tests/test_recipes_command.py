from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from trmt.cli import app
from trmt.config import build, read_toml, to_tree
from trmt.training.recipe import Recipe, load_recipe, names
from trmt.training.recipe_keys import recipe_keys


def output(*arguments: str, width: int = 60) -> str:
    result = CliRunner().invoke(app, ["recipes", *arguments], env={"COLUMNS": str(width)})
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.parametrize("width", [40, 60, 120])
def test_all_recipes_are_listed_with_their_whole_descriptions(width: int) -> None:
    text = output(width=width)
    assert max(map(len, text.splitlines())) <= width
    for name in names():
        assert f"{name} ({load_recipe(name).architecture})" in text
        assert load_recipe(name).description.split() == [
            word for word in load_recipe(name).description.split() if word in text
        ]


@pytest.mark.parametrize("name", names())
def test_a_printed_recipe_is_the_recipe_with_every_key_and_its_meaning(name: str, tmp_path: Path) -> None:
    text = output(name)
    (tmp_path / "printed.toml").write_text(text, encoding="utf-8")
    printed, recipe = read_toml(tmp_path / "printed.toml"), load_recipe(name)
    for key, value in to_tree(build(Recipe, printed, where="printed")).items():
        if key not in ("network", "loss"):
            assert value == to_tree(recipe)[key]
    for table, keys in recipe_keys(recipe).items():
        given = to_tree(recipe)[table] if table else to_tree(recipe)
        for key in keys:
            tree = printed[table] if table else printed
            expected = given.get(key.name, key.default)
            found = tree.get(key.name)
            assert (tuple(found) if isinstance(found, list) else found) == (
                tuple(expected) if isinstance(expected, list) else expected
            )
            assert key.meaning and f"{key.name} =" in text
    comments = [line for line in text.splitlines() if line.startswith("#")]
    assert max(map(len, comments)) <= 60


def test_an_unknown_recipe_is_refused_with_the_closest_name() -> None:
    result = CliRunner().invoke(app, ["recipes", "transformer-tny"])
    assert "did you mean 'transformer-tiny'" in str(result.exception)
