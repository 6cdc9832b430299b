"""The functions of `import trmt`: strings for paths, errors for strings in place of lists, and types."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest

import trmt
from tests import toy
from tests.scripted import random_bundle, small_tokenizer
from tests.test_readme import ROOT, blocks, prepare_workspace, shorter
from trmt.config import Options
from trmt.errors import ConfigError
from trmt.sets.shards import PreparedSet
from trmt.training.history import History

untyped: Any = trmt  # for what type checkers refuse
STUB = Path(str(trmt.__file__)).with_suffix(".pyi")


def test_type_checkers_see_the_names_that_there_are() -> None:
    body = ast.parse(STUB.read_text()).body
    named = {
        alias.asname: node.module
        for node in body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.asname and alias.asname[0] != "_"
    }
    classes = {node.name: node for node in body if isinstance(node, ast.ClassDef)}
    assert named | {name: untyped._PUBLIC[name] for name in classes} == untyped._PUBLIC
    assert not named.keys() & classes.keys()
    for name, node in classes.items():
        [function] = (each for each in node.body if isinstance(each, ast.FunctionDef))
        positional = [each.arg for each in function.args.args][1:]
        keywords = [each.arg for each in function.args.kwonlyargs]
        defaults = [each is not None for each in function.args.kw_defaults]
        real = list(inspect.signature(getattr(trmt, name)).parameters.values())
        assert [each.name for each in real if each.kind is not each.KEYWORD_ONLY] == positional, name
        assert [each.name for each in real if each.kind is each.KEYWORD_ONLY] == keywords, name
        required = len(positional) - len(function.args.defaults)
        optional = [number >= required for number in range(len(positional))] + defaults
        assert [each.default is not each.empty for each in real] == optional, name
    for name in untyped._PUBLIC:
        assert getattr(trmt, str(name)).__name__ == name


def checked(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """What mypy says of program.py."""
    command = [sys.executable, "-m", "mypy", *options, "--no-incremental", "--follow-imports=silent"]
    return subprocess.run(
        [*command, "--config-file=", "program.py"],
        cwd=folder,
        env={"MYPYPATH": str(ROOT), "PATH": ""},
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_no_public_name_is_any(tmp_path: Path) -> None:
    names = list(untyped._PUBLIC)
    lines = [f"from trmt import {', '.join(names)}", *(f"reveal_type({name})" for name in names)]
    lines += ["reveal_type(Translator.load('models/demo').translate(['a'])[0].text)"]
    (tmp_path / "program.py").write_text("\n".join(lines))
    done = checked(tmp_path)
    revealed = re.findall(r'Revealed type is "(.*)"', done.stdout)
    assert len(revealed) == len(names) + 1, done.stdout
    assert not [found for found in revealed if found == "Any"], done.stdout
    assert revealed[-1] == "str"
    assert any("-> trmt.translating.Translator" in found for found in revealed), revealed


@pytest.mark.slow
def test_a_program_with_strings_and_lists_passes_strict_mypy(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    done = checked(tmp_path, "--strict")
    assert done.returncode == 0, done.stdout


PROGRAM = """
from pathlib import Path
from trmt import AverageOptions, PrepareOptions, TokenizerOptions, TrainOptions, Translator
from trmt import average, prepare, train, train_tokenizer

train_tokenizer(TokenizerOptions(["a.en,a.de"], languages=("en", "de")), out="t")
options = PrepareOptions(["a.en,a.de"], tokenizer="t", out="d")
prepared = prepare(options)
folder: Path | None = options.out
run: Path = train(prepared, recipe="transformer-tiny")
run = train("d", run="r", settings=["training.steps=1"])
run = train(TrainOptions(run="r", data=Path("d"), settings=["training.steps=2"], init_from="m"))
bundle: Path = average(run, out="y")
bundle = average(["x", Path("y")], last=2)
bundle = average(AverageOptions(paths=("x",), out="y", data="d"))
texts: list[str] = [each.text for each in Translator.load(bundle).translate(["a"])]
"""


# Strings


def test_strings_are_paths_in_all_functions(toy_set: Path, tmp_path: Path) -> None:
    recipe = toy.recipe(tmp_path, {"validation": {"metric": "chrf", "sentences": 4}})
    folder = str(tmp_path / "run")
    prepared = PreparedSet.open(toy_set)
    assert trmt.train(prepared, run=folder, recipe=recipe, device="cpu") == Path(folder)
    run = trmt.train(str(toy_set), run=folder, recipe=recipe, device="cpu")
    assert run == Path(folder)
    metrics = History.read(run / "log.jsonl").metrics()
    assert "chrf" in metrics and "bleu" in metrics, "the dev set is translated"
    averaged = trmt.average(folder, best=2, out=str(tmp_path / "average"))
    assert averaged == tmp_path / "average"
    translator = trmt.Translator.load(str(averaged))
    assert len(translator.translate(["ka lomo", ""])) == 2
    translator.tokenizer.save(str(tmp_path / "tokenizer"))
    assert trmt.Tokenizer.load(str(tmp_path / "tokenizer")).languages == translator.tokenizer.languages


def test_options_take_strings_and_lists() -> None:
    options = untyped.PrepareOptions(train=["a", "b"], out="out", tokenizer="tokenizer")
    assert options.train == ("a", "b") and options.out == Path("out")
    assert options.tokenizer == Path("tokenizer")
    assert untyped.PrepareOptions([Path("a"), "b"]).train == ("a", "b")
    assert untyped.TranslateOptions(length_penalty=1, beam=numpy.int64(2)).beam == 2
    averaged = untyped.AverageOptions(paths=["one", Path("two")], out="x")
    assert averaged.paths == (Path("one"), Path("two")) and averaged.out == Path("x")
    trained = untyped.TrainOptions(run="run", data="set", init_from="model")
    assert (trained.run, trained.data, trained.init_from) == (Path("run"), Path("set"), Path("model"))
    assert trained.settings == [] and trmt.TrainOptions().run is None


def test_all_options_of_commands_take_strings() -> None:
    named = {name for name in untyped.__all__ if name.endswith("Options")}
    known = {cls.__name__ for cls in Options.__subclasses__()}
    assert named <= known


@pytest.fixture(scope="module")
def translator(tmp_path_factory: pytest.TempPathFactory) -> trmt.Translator:
    folder = tmp_path_factory.mktemp("bundles")
    random_bundle(folder / "random", small_tokenizer(folder / "tokenizer"))
    return trmt.Translator.load(str(folder / "random"))


untyped_list: Any = ["a", 1]
nothing: Any = None
MISTAKES: list[tuple[Callable[[trmt.Translator], Any], str]] = [
    (lambda _: untyped.PrepareOptions(train="data/train"), r"train is a list .* write \['data/train'\]"),
    (lambda _: untyped.PrepareOptions(("a",), alignments="b"), r"alignments is a list"),
    (lambda _: untyped.TokenizerOptions("data/train"), r"corpora is a list"),
    (lambda _: untyped.TokenizerOptions(("a",), languages="en"), r"languages is a list"),
    (lambda _: untyped.AverageOptions(paths="models/run"), r"paths is a list .* write \['models/run'\]"),
    (lambda _: untyped.AverageOptions(paths=Path("models/run")), r"paths is a list"),
    (lambda _: untyped.TrainOptions(settings="optim.lr=1"), r"settings is a list .* write \['optim.lr=1'\]"),
    (lambda _: untyped.train("data", settings="optim.lr=1"), r"settings is a list"),
    (lambda _: untyped.train(trmt.TrainOptions(), run="x"), r"TrainOptions hold all options"),
    (lambda _: untyped.average(trmt.AverageOptions(), best=1), r"AverageOptions hold all options"),
    (lambda _: untyped.ScoreOptions(metrics="bleu"), r"metrics is a list .* write \['bleu'\]"),
    (lambda _: untyped.score("one text", [["a"]]), r"hypotheses is a list"),
    (lambda _: untyped.score(["a"], "a"), r"references is a list .* write \['a'\]"),
    (lambda _: untyped.score(["a"], ["a"]), r"references is a list of whole reference translations"),
    (lambda it: it.translate("It rains."), r"texts is a list .* write \['It rains\.'\]"),
    (lambda it: it.translate(["It rains."], prefixes="Es"), r"prefixes is a list"),
    (lambda it: it.translate(["It rains."], prefixes=["Es", "Er"]), r"there are 2 prefixes for 1 texts"),
    (lambda it: it.translate(["It rains."], prefixes=[]), r"there are 0 prefixes for 1 texts"),
    (lambda it: it.translate(untyped_list), r"texts is a list of strings, but texts\[1\] is 1"),
    (lambda it: it.translate(nothing), r"texts is a list of strings and not None"),
    (lambda _: trmt.Translator.load("x", options=untyped.ScoreOptions()), r"type TranslateOptions"),
    (lambda _: untyped.PrepareOptions(["x"], dev=["a,b"]), r"dev is text and not \['a,b'\]"),
    (lambda _: untyped.PrepareOptions(["x", 1]), r"train\[1\] is text and not 1"),
    (lambda _: untyped.PrepareOptions(5), r"train is a list and not 5"),
    (lambda _: untyped.PrepareOptions(None), r"train is a list and not None"),
    (lambda _: untyped.PrepareOptions(["x"], out=["a"]), r"out is a path and not \['a'\]"),
    (lambda _: untyped.PrepareOptions(["x"], languages=("en",)), r"languages has 2 values and not 1"),
    (lambda _: untyped.PrepareOptions(["x"], limits=3), r"limits is a value of type LengthLimits and not 3"),
    (lambda _: untyped.TranslateOptions(beam="4"), r"beam is a whole number and not '4'"),
    (lambda _: untyped.TranslateOptions(beam=None), r"beam is a whole number and not None"),
    (lambda _: untyped.TranslateOptions(beam=True), r"beam is a whole number and not True"),
    (lambda _: untyped.TranslateOptions(top_p="1"), r"top_p is a number and not '1'"),
    (lambda _: untyped.TokenizerOptions(["x"], joint=1), r"joint is true or false and not 1"),
    (lambda _: untyped.score([1], [["a"]]), r"hypotheses\[0\] is 1"),
    (lambda _: untyped.score(["a"], [[1]]), r"references\[0\]\[0\] is 1"),
    (lambda _: untyped.train(["x"]), r"data is a path and not \['x'\]"),
    (lambda _: untyped.train("x", settings=[3]), r"settings\[0\] is text and not 3"),
    (lambda _: untyped.average(5), r"paths is a list and not 5"),
    (lambda _: untyped.prepare("x"), r"options is a value of type PrepareOptions and not 'x'"),
    (lambda _: untyped.train_tokenizer("x"), r"options is a value of type TokenizerOptions and not 'x'"),
]


@pytest.mark.parametrize("number", range(len(MISTAKES)))
def test_a_value_of_another_type_is_one_sentence(translator: trmt.Translator, number: int) -> None:
    call, message = MISTAKES[number]
    with pytest.raises(ConfigError, match=message) as caught:
        call(translator)
    assert str(caught.value).count("\n") == 0


@pytest.mark.slow
def test_the_programs_of_the_page_run_in_their_order(tmp_path: Path) -> None:
    environment = prepare_workspace(tmp_path)
    for number, code in enumerate(blocks("docs/python.md", "python")):
        (tmp_path / f"program{number}.py").write_text(shorter(code), encoding="utf-8")
        done = subprocess.run(
            ["python", f"program{number}.py"],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=900,
        )
        assert done.returncode == 0, done.stderr
