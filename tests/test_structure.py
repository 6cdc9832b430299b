"""How the package is arranged: unique type names, one place for C, files and functions of a readable size."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "trmt"
FILES = sorted(PACKAGE.rglob("*.py"))
TREES = {file: ast.parse(file.read_text(encoding="utf-8")) for file in FILES}

FILE_LINES = 450
FUNCTION_LINES = 60
# Where functions have long signatures: the options of commands, the pointers and strides of kernels.
LONG_SIGNATURES = ("trmt/cli/", "trmt/native/gpu/")
CORE = ("transformer.py", "layers.py", "kv_cache.py")
CORE_LINES = 1200
ANYS = 20  # in all of trmt/nets


def name_of(file: Path) -> str:
    return file.relative_to(PACKAGE.parent).as_posix()


def lines_of(file: Path) -> int:
    return len(file.read_text(encoding="utf-8").splitlines())


def classes() -> Iterator[tuple[str, str]]:
    """The name of each class in the package, and its file."""
    for file, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                yield node.name, name_of(file)


def test_no_type_name_is_defined_twice() -> None:
    """A reader who meets a name knows which type it is."""
    files = defaultdict(list)
    for name, file in classes():
        files[name].append(file)
    assert not {name: where for name, where in files.items() if len(where) > 1}


def imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module


@pytest.mark.parametrize("module", ["ctypes", "triton"])
def test_only_native_reaches_beyond_python(module: str) -> None:
    users = {
        name_of(file)
        for file, tree in TREES.items()
        if any(name.split(".")[0] == module for name in imports(tree))
    }
    assert users and all(user.startswith("trmt/native/") for user in users)


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_files_are_short(file: Path) -> None:
    assert lines_of(file) <= FILE_LINES


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def length(function: ast.FunctionDef | ast.AsyncFunctionDef, *, signature: bool) -> int:
    """Lines from `def`, or without the signature from the first statement, to the end."""
    begin = function.lineno if signature else function.body[0].lineno
    return (function.end_lineno or begin) - begin + 1


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_functions_are_short(file: Path) -> None:
    signature = not name_of(file).startswith(LONG_SIGNATURES)
    lengths = {each.name: length(each, signature=signature) for each in functions(TREES[file])}
    assert not {name: lines for name, lines in lengths.items() if lines > FUNCTION_LINES}


def test_the_transformer_can_be_read_in_one_sitting() -> None:
    assert sum(lines_of(PACKAGE / "nets" / name) for name in CORE) <= CORE_LINES


def test_networks_have_types() -> None:
    """Each `Any` is a promise that nothing checks."""
    anys = [
        name_of(file)
        for file, tree in TREES.items()
        if file.parent.name == "nets"
        for node in ast.walk(tree)
        if isinstance(node, ast.Name) and node.id == "Any"
    ]
    assert len(anys) <= ANYS, anys
