"""Tensor names end in their axes, and every axis is in the legend of its file."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "trmt"
PARTS = ("nets", "decoding", "native", "native/gpu", "objectives", "lab")
FILES = sorted(file for part in PARTS for file in (PACKAGE / part).glob("*.py"))
SUFFIX = re.compile(r"[a-z0-9]_([A-Z][A-Z0-9]*)$")
LEGEND = re.compile(r"Axes: (.*?)\.(?:\s|$)", re.DOTALL)


def names(tree: ast.AST) -> set[str]:
    """The names of variables, arguments and attributes."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.arg | ast.keyword) and node.arg:
            found.add(node.arg)
    return found


def missing(code: str) -> set[str]:
    """The axes that names end in and the legend lacks."""
    tree = ast.parse(code)
    legend = LEGEND.search(ast.get_docstring(tree) or "")
    listed = set(re.findall(r"\b[A-Z]\b", legend[1])) if legend else set()
    used = {axis for name in names(tree) if (suffix := SUFFIX.search(name)) for axis in suffix[1]}
    return {axis for axis in used if not axis.isdigit()} - listed


def test_every_part_has_files() -> None:
    assert all(any((PACKAGE / part).glob("*.py")) for part in PARTS)


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}/{file.name}")
def test_every_axis_is_in_the_legend(file: Path) -> None:
    assert not missing(file.read_text(encoding="utf-8"))


def test_the_check_sees_what_is_missing() -> None:
    code = '"""Some.\n\nAxes: S sentence, K hypothesis\n(one).\nThe T is no axis.\n"""\n'
    assert missing(code + "x_SK1 = other.y_SV\nMAX_ROWS = 3\ndef f(*, z_T): ...") == {"V", "T"}
    assert not missing(code + "x_SK = 1")
