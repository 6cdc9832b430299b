"""`trmt recipes`: the recipes, and every key of one with its value, default and meaning."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trmt.cli import completion

if TYPE_CHECKING:
    from trmt.training.recipe import Recipe
    from trmt.training.recipe_keys import Key


def command(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="NAME",
            help="Recipe by name or path, or a run folder. [default: list all]",
            autocompletion=completion.recipes_and_runs,
        ),
    ] = None,
) -> None:
    """List recipes, or print one with all keys. The output is a recipe: trmt recipes NAME > my.toml"""
    from pathlib import Path

    from trmt.bundles.checkpoints import CONFIG
    from trmt.cli.common import output_style
    from trmt.training.recipe import load_recipe, names

    width = output_style()[0]
    if name is not None:
        known = Path(name, CONFIG)
        recipe = load_recipe(str(known) if known.is_file() else name)
        typer.echo("\n".join(_lines_of_recipe(recipe, width)))
        return
    for each in names():
        recipe = load_recipe(each)
        typer.echo(f"{each} ({recipe.architecture})")
        typer.echo(textwrap.fill(recipe.description, width, initial_indent="  ", subsequent_indent="  "))


def _lines_of_recipe(recipe: Recipe, width: int) -> Iterator[str]:
    """A recipe in TOML, with a comment above each key."""
    from trmt.config import to_tree
    from trmt.training.recipe_keys import recipe_keys

    tree = to_tree(recipe)
    for table, keys in recipe_keys(recipe).items():
        if table:
            yield from ("", f"[{table}]")
        if table == "network":
            yield "# the sizes of the vocabularies are those of the tokenizer"
        for key in keys:
            yield from _lines_of_key(key, (tree[table] if table else tree).get(key.name, key.default), width)


def _lines_of_key(key: Key, value: Any, width: int) -> Iterator[str]:
    from trmt.config import toml_value
    from trmt.training.recipe_keys import values

    default = "not set" if key.default is None else toml_value(key.default)
    about = f"{key.meaning} ({values(key.hint)}; default {default})"
    yield from textwrap.wrap(
        about, width, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False
    )
    yield f"# {key.name} =" if value is None else f"{key.name} = {toml_value(value)}"
