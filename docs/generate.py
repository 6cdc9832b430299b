"""Writes the generated parts of README.md and docs from the code: `python docs/generate.py`.

A part stands between `<!-- generated: NAME ARGUMENTS -->` and `<!-- end -->`. Measured results are written by
bench/readme.py. tests/test_docs.py checks that all parts are up to date.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import generate_commands
import generate_python
import generate_recipes

DOCS = Path(__file__).resolve().parent
PAGES = [DOCS.parent / "README.md", *sorted(DOCS.glob("*.md"))]
PART = re.compile(r"<!-- generated: (\w+)((?: [^\s>]+)*) -->\n.*?<!-- end -->", re.DOTALL)

PARTS: Mapping[str, Callable[..., str]] = {
    "command": generate_commands.command,
    "commands": generate_commands.overview,
    "recipes": generate_recipes.recipes,
    "config": generate_recipes.config,
    "networks": generate_recipes.networks,
    "objectives": generate_recipes.objectives,
    "api": generate_python.public_name,
    "types": generate_python.types,
}


def generated(text: str) -> str:
    """A page with all its parts written anew."""

    def fill(match: re.Match[str]) -> str:
        arguments = match[2].split()
        part = PARTS[match[1]](*arguments).strip()
        return f"<!-- generated: {' '.join([match[1], *arguments])} -->\n{part}\n<!-- end -->"

    return PART.sub(fill, text)


def arguments_of(page: Path, name: str) -> list[str]:
    """The arguments of all parts of this name on a page."""
    return [match[2].strip() for match in PART.finditer(page.read_text(encoding="utf-8")) if match[1] == name]


if __name__ == "__main__":
    for page in PAGES:
        before = page.read_text(encoding="utf-8")
        after = generated(before)
        if after != before:
            page.write_text(after, encoding="utf-8")
