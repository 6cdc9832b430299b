"""The pages in docs are up to date, complete, and name only what exists."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.test_readme import ROOT, load
from trmt.registry import NETWORKS, OBJECTIVES, resolve

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted(ROOT.glob("[dm]*/README.md")), *DOCS.glob("*.md")]
MAX_COLUMNS = 115
FILES = ("md", "py", "json", "svg", "toml", "txt")  # endings of file names, which look like keys
GENERATED = re.compile(r"<!-- (?:results|generated): .*?<!-- end -->", re.DOTALL)
CODE = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)

generate = load("docs/generate.py")
commands = generate.generate_commands
recipes = generate.generate_recipes


def by_page() -> pytest.MarkDecorator:
    return pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


# ------------------------------------------------------------------------------ generated pages


def test_generated_parts_are_up_to_date() -> None:
    for page in generate.PAGES:
        text = page.read_text(encoding="utf-8")
        assert generate.generated(text) == text, f"{page.name} is out of date; run: python docs/generate.py"


def test_every_command_has_a_section() -> None:
    assert generate.arguments_of(DOCS / "commands.md", "command") == commands.names()


def test_every_table_of_a_recipe_has_a_section() -> None:
    assert set(generate.arguments_of(DOCS / "recipes.md", "config")) == {"recipe", *recipes.tables()}


def test_every_public_name_has_a_section() -> None:
    named = generate.arguments_of(DOCS / "python.md", "api")
    assert sorted(named) == sorted(generate.generate_python.names())


def test_every_key_of_a_recipe_is_explained() -> None:
    assert recipes.fields_without_meaning() == [], "add a comment `# meaning` behind these fields"


# ------------------------------------------------------------------------------ what pages name


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    text = CODE.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(page: Path) -> Iterator[tuple[str, str]]:
    """The (path, anchor) of each link to a file."""
    text = CODE.sub("", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        yield path, anchor


@by_page()
def test_every_link_has_a_target(page: Path) -> None:
    for path, anchor in links(page):
        target = page.parent / path if path else page
        assert target.exists(), f"{page.name} links to {path}"
        assert not anchor or anchor in anchors(target), f"{page.name} links to {path}#{anchor}"


def test_every_page_can_be_reached_from_readme() -> None:
    reached, queue = set[Path](), [ROOT / "README.md"]
    while queue:
        page = queue.pop()
        reached.add(page.resolve())
        targets = {(page.parent / path).resolve() for path, _ in links(page) if path.endswith(".md")}
        queue += targets - reached
    assert not {page.resolve() for page in DOCS.glob("*.md")} - reached


@by_page()
def test_every_file_in_backticks_exists(page: Path) -> None:
    named = re.findall(
        r"`((?:tests|bench|docs|data|trmt)/[\w/.-]+\.(?:py|json|md|sh))`", page.read_text("utf-8")
    )
    assert not [name for name in named if not (ROOT / name).exists()]


def keys() -> set[str]:
    """All keys that a recipe can have."""
    known = {
        f"{table}.{field.name}"
        for table in recipes.tables()
        for field in dataclasses.fields(recipes.table_class(table))
    }
    for registered, table in ((NETWORKS, "network"), (OBJECTIVES, "loss")):
        for name in registered:
            known |= {
                f"{table}.{field.name}"
                for field in dataclasses.fields(resolve(registered, name).config_class)
            }
    return known


@by_page()
def test_every_key_that_a_page_names_exists(page: Path) -> None:
    if page.name == "CHANGELOG.md":  # it names former keys
        return
    tables = "|".join([*recipes.tables(), "network", "loss"])
    text = GENERATED.sub("", page.read_text(encoding="utf-8"))
    named = set(re.findall(rf"(?<![\w/.])((?:{tables})\.\w+)", text))
    named = {name for name in named if name.rpartition(".")[2] not in FILES}
    assert not named - keys()


@by_page()
def test_every_command_and_option_that_a_page_names_exists(page: Path) -> None:
    known = {
        name: {flag for each in commands.parameters(function) for flag in re.findall(r"--[\w-]+", each.shown)}
        for name, function in commands.commands()
    }
    for block in CODE.findall(page.read_text(encoding="utf-8")):
        for line in block.replace("\\\n", " ").splitlines():
            for words in re.findall(r"(?:^|\| |-m )trmt ([a-z].*?)(?=$| [|<>])", line):
                name = next((name for name in known if f"{words} ".startswith(f"{name} ")), None)
                assert name, f"{page.name} names a command that does not exist: trmt {words}"
                missing = set(re.findall(r"(?<= )--[\w-]+", words)) - known[name]
                assert not missing, f"{page.name}: trmt {name} has no {', '.join(missing)}"


@by_page()
def test_lines_are_not_too_long(page: Path) -> None:
    text = CODE.sub("", GENERATED.sub("", page.read_text(encoding="utf-8")))
    long = [line for line in text.splitlines() if len(line) > MAX_COLUMNS and not line.startswith("|")]
    assert not [line for line in long if " " in line.strip("- ")]
