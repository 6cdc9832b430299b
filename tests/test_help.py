"""Help, examples, spellings of options, --quiet, and completion, over all commands."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, get_args

import pytest
import typer

from tests.commands import Command
from trmt import cli, console
from trmt.cli import app, completion
from trmt.cli.examples import EXAMPLES
from trmt.cli.framework import RENAMED
from trmt.registry import FORMATS, is_installed
from trmt.text.tokenizer import NORMALISATIONS
from trmt.translating import Precision

ROOT: Any = typer.main.get_command(app)


def commands(group: Any = ROOT, prefix: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, found in group.commands.items():
        if hasattr(found, "commands"):
            yield from commands(found, (*prefix, name))
        else:
            yield (*prefix, name), found


ALL = dict(commands())
by_command = pytest.mark.parametrize("words", ALL, ids=" ".join)


def options(words: tuple[str, ...], *, hidden: bool = False) -> dict[str, Any]:
    return {
        spelling: each
        for each in ALL[words].params
        if each.param_type_name == "option" and (hidden or not each.hidden)
        for spelling in each.opts
    }


# Help


def help_of(trmt: Command, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], columns: int) -> str:
    monkeypatch.setenv("COLUMNS", str(columns))
    code, out, err = trmt(*words, "-h")
    assert code == 0 and err == ""
    return out.decode()


@pytest.mark.parametrize("columns", [60, 100, 160])
@pytest.mark.parametrize("words", [(), ("bert",), *ALL], ids=" ".join)
def test_help_uses_the_width_of_the_terminal(
    trmt: Command, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], columns: int
) -> None:
    lines = help_of(trmt, monkeypatch, words, columns).splitlines()
    prose = [line for line in lines if not line.strip().startswith("trmt ")]  # examples are not wrapped
    assert all(len(line) < columns for line in prose)
    assert columns < 160 or max(map(len, prose)) > 80 or words in (("env",), ("bert",))
    assert not [line for line in lines if re.search(r"[a-z ]\.\.\.$", line)]


@by_command
def test_parameters_are_written_alike(
    trmt: Command, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    text = help_of(trmt, monkeypatch, words, 1000).partition("\nExamples:")[0]
    assert not re.search(
        r"[<{]\w+[>}]|\[x[<>]=|\bNone\b|: \(|\d{5}", text.replace("<2de>", "").replace("12345", "")
    )
    usage, *lines = text.splitlines()
    assert re.fullmatch(r"Usage: [\w. -]+( \[OPTIONS\])?( \[?[A-Z]+\]?(\.\.\.)?)?", usage), usage
    for line in lines:
        assert line.count("[default") + line.count("[required") <= 1, line
        assert "[" not in line.replace("trmt[vectors]", "") or line.endswith("]"), line
        if option := re.match(r"  (-\w, )?--[\w-]+(/--[\w-]+)?( (\S+))?  ", line):
            assert option[4] is None or re.fullmatch(r"[A-Z,=]+|[a-z|]+", option[4]), line


def test_a_number_has_separators_and_a_seed_has_none(trmt: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    text = help_of(trmt, monkeypatch, ("tokenizer",), 1000)
    assert "--sample N " in text and "[default: 2,000,000]" in text
    assert "[default: 12345]" in help_of(trmt, monkeypatch, ("score",), 1000)


@pytest.mark.parametrize(
    ("line", "advice"),
    [
        ("translate s s.en", "trmt translate s -i s.en"),
        ("translate s s.en out.de", "trmt translate s -i s.en -o out.de"),
        ("new x --train t.en t.de", "name both sides of a corpus in one word: --train t.en,t.de"),
        ("tokenizer out --train t.en t.de", "name both sides of a corpus in one word: --train t.en,t.de"),
        ("train a b", "unexpected argument b; trmt train -h shows what it takes"),
        ("models a b", "unexpected arguments a b; trmt models -h shows what it takes"),
        ("bert import a b c", "trmt bert import -h shows what it takes"),
    ],
)
def test_unexpected_arguments_are_answered_with_what_to_write(trmt: Command, line: str, advice: str) -> None:
    code, out, err = trmt(*line.split())
    assert (code, out) == (2, b"")
    assert err.splitlines()[-1].endswith(advice), err


def test_every_summary_is_a_whole_sentence(trmt: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    for words in ((), ("bert",)):
        _, _, listed = help_of(trmt, monkeypatch, words, 60).partition("Commands:\n")
        entries = re.split(r"\n  (?=\S)", listed.rstrip())
        assert len(entries) == len((ROOT if not words else ROOT.commands["bert"]).commands)
        assert all(entry.endswith(".") and not entry.endswith("..") for entry in entries)


# Examples


@by_command
def test_every_command_has_two_examples_that_it_understands(
    trmt: Command, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    examples = EXAMPLES[" ".join(words)]
    text = help_of(trmt, monkeypatch, words, 100)
    for line, meaning in examples:
        assert f"  {line}\n" in text
        assert meaning.split()[0] in text
        arguments = shlex.split(re.split(r" [<>|] ", line)[0])
        assert arguments[: len(words) + 1] == ["trmt", *words]
        ALL[words].make_context(words[-1], arguments[len(words) + 1 :])  # which parses them
    assert len(examples) == 2


# Spellings


def test_the_same_thing_has_the_same_name_everywhere() -> None:
    for words in ALL:
        known = options(words)
        assert not {"--out", "--gpu", "--num-threads", "--cpus"} & known.keys(), words
        if "--output" in known:
            assert "-o" in known["--output"].opts, words
        if "--device" in known:
            assert known["--device"].metavar == "DEVICE" and known["--device"].help.startswith("cpu, cuda")
        if "--threads" in known:
            assert known["--threads"].help == "CPU threads. [default: all]"
            assert known["--threads"].min == 0


WRITES = {
    "tokenizer", "prepare", "vectors", "average", "translate", "quantize", "export", "import", "attend",
    "plot", "compare", "bert import", "bert export",
}  # fmt: skip
COMPUTES = {"average", "new", "train", "pretrain", "translate", "verify", "align", "attend", "compare"}


def test_what_writes_has_output_and_what_computes_has_device_and_threads() -> None:
    assert {" ".join(words) for words in ALL if "--output" in options(words)} == WRITES
    assert {" ".join(words) for words in ALL if "--device" in options(words)} == COMPUTES
    assert {" ".join(words) for words in ALL if "--threads" in options(words)} == COMPUTES | {"check-resume"}


@pytest.mark.parametrize(
    "words", [tuple(name.split()) for name in sorted(WRITES - {"translate"})], ids=" ".join
)
@pytest.mark.parametrize("spelling", ["--out x", "--out=x", "-o x", "--output x"])
def test_former_spellings_still_work(words: tuple[str, ...], spelling: str) -> None:
    assert RENAMED["--out"] == "--output"
    required = {
        "export": ["--to", "onnx"],
        "vectors": ["--text", "t"],
        "import": ["f"],
        "compare": ["a", "b"],
    }
    more = required.get(words[-1] if len(words) == 1 else "", ["f"] if len(words) == 2 else [])
    context = ALL[words].make_context(words[-1], [*more, *spelling.split()])
    found = {name: value for name, value in context.params.items() if str(value) == "x"}
    assert set(found) <= {"output", "out"} and len(found) == 1


@pytest.mark.parametrize("name", ["tokenizer", "prepare", "vectors"])
def test_what_to_write_may_still_be_an_argument(name: str) -> None:
    more = ["--text", "t"] if name == "vectors" else []
    context = ALL[(name,)].make_context(name, ["x", *more])
    assert "x" in map(str, context.params.values())


def test_two_outputs_are_one_too_many(trmt: Command) -> None:
    code, _, err = trmt("tokenizer", "one", "-o", "two", "--train", "x.en,x.de")
    assert code == 1 and "one and --output two are two places to write to" in err


# Quiet


@pytest.mark.parametrize("place", [0, 1, 2, 6])
def test_quiet_works_before_and_behind_the_command(
    trmt: Command, place: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "a").write_text("one two three\n" * 3)
    (tmp_path / "b").write_text("one two four\n" * 3)
    words = ["score", str(tmp_path / "a"), "--ref", str(tmp_path / "b"), "--resamples", "5"]
    assert "in brackets" in trmt(*words, str(tmp_path / "b"))[2]
    for flag in ("-q", "--quiet"):
        code, out, err = trmt(*words[:place], flag, *words[place:], str(tmp_path / "b"))
        assert (code, err) == (0, "") and out
    console.set_quiet(False)


@by_command
def test_every_command_can_be_quiet(
    trmt: Command, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    assert re.search(r"-q, --quiet +Print only", help_of(trmt, monkeypatch, words, 100))


# Completion


def completions(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], line: str) -> list[str]:
    words = line.split(" ")
    monkeypatch.setenv("_TRMT_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", line)
    monkeypatch.setenv("COMP_CWORD", str(len(words) - 1))
    monkeypatch.setattr(sys, "argv", ["trmt"])
    with pytest.raises(SystemExit):
        cli.app(prog_name="trmt")
    return capsys.readouterr().out.split()


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in (
        "models/demo",
        "models/demo-int8",
        "models/.partial-x",
        "models/other/average",
        "data/en-de",
    ):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "models/other/config.toml").touch()
    (tmp_path / "my.toml").touch()
    (tmp_path / "text.de").touch()
    return tmp_path


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("trmt translate de", ["demo", "demo-int8"]),
        ("trmt translate mod", ["models"]),
        ("trmt translate models/demo", ["models/demo", "models/demo-int8"]),
        ("trmt translate models/other/", ["models/other/average"]),
        ("trmt inspect oth", ["other"]),
        ("trmt average oth", ["other"]),
        ("trmt compare demo oth", ["other"]),
        (
            "trmt train --recipe transformer-",
            [f"transformer-{size}" for size in ("base", "big", "low-resource", "small", "tiny")],
        ),
        ("trmt train --recipe my", ["my.toml"]),
        ("trmt train --data data/", ["data/en-de"]),
        ("trmt train --init-from de", ["demo", "demo-int8"]),
        ("trmt score --metric ch", ["chrf", "chrf++"]),
        ("trmt compare -m ter", ["ter"]),
        ("trmt translate --device cp", ["cpu"]),
        ("trmt train --device a", ["auto"]),
        ("trmt average --device a", ["auto"]),
        ("trmt translate --device a", ["auto", "all"]),
        ("trmt recipes transformer-b", ["transformer-base", "transformer-big"]),
        ("trmt recipes models/", ["models/demo", "models/demo-int8", "models/other"]),
        ("trmt export --to o", ["onnx"]),
        ("trmt translate --precision b", ["bf16"]),
        ("trmt tokenizer --kind u", ["unigram"]),
        ("trmt tokenizer --normalise-source nf", ["nfc", "nfkc"]),
        ("trmt attend --kind e", ["encoder"]),
        ("trmt align --reverse oth", ["other"]),
        ("trmt align --symmetrise i", ["intersection"]),
        ("trmt import da", ["data"]),
        ("trmt bert export oth", ["other"]),
        ("trmt prepare --tokenizer da", ["data"]),
        ("trmt transl", ["translate"]),
        ("trmt translate --outp", ["--output"]),
    ],
)
def test_shells_complete_models_recipes_metrics_and_devices(
    models: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    line: str,
    expected: list[str],
) -> None:
    assert completions(monkeypatch, capsys, line) == expected


COMPLETED = ("--recipe", "--metric", "--device", "--precision", "--kind", "MODEL", "RUN", "FORMAT")


@pytest.mark.parametrize("parameter", COMPLETED)
def test_every_such_parameter_is_completed(parameter: str) -> None:
    for words, command in ALL.items():
        for each in command.params:
            if parameter in (*each.opts, each.metavar):
                assert each._custom_shell_complete is not None, (words, each.name)


def insight(module: str, name: str) -> Any:
    """What the optional package trmt.insight has under this name, if it is there."""
    if not is_installed("trmt.insight"):
        return ()
    return getattr(import_module(f"trmt.insight.{module}"), name)


def test_what_is_completed_exists() -> None:
    from trmt.bundles.checkpoints import MODELS
    from trmt.training.recipe import names

    assert completion.MODELS == MODELS
    assert set(completion.recipes("")) >= set(names())
    assert completion.formats("") == list(FORMATS)
    for words, name, known in (
        (("tokenizer",), "normalise_source", NORMALISATIONS),
        (("align",), "symmetrise", insight("alignment.symmetrisation", "METHODS")),
        (("attend",), "kinds", get_args(insight("heatmaps.weights", "AttentionKind"))),
        (("translate",), "precision", get_args(Precision)),
    ):
        if words not in ALL:
            continue
        [parameter] = (each for each in ALL[words].params if each.name == name)
        found = parameter._custom_shell_complete(ALL[words].make_context("x", []), parameter, "")
        assert {getattr(each, "value", each) for each in found} == set(known), words
