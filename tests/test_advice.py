"""Messages give advice that helps: what they propose works and destroys nothing."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests import toy
from tests.commands import Command
from tests.scripted import random_bundle, small_tokenizer


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundles")
    random_bundle(folder / "random", small_tokenizer(folder / "tokenizer"))
    return folder / "random"


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of text in the current folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").mkdir()
    for language in ("en", "de"):
        (tmp_path / "text" / f"train.{language}").write_text("a\nb\n")
    return Path("text")


def error_of(trmt: Command, *arguments: str | Path) -> str:
    code, out, err = trmt(*arguments)
    assert code == 1 and out == b""
    assert err.startswith("error: ") and err.count("\n") == 1
    return err


def test_a_folder_of_text_is_no_set_and_is_not_to_be_written_to(trmt: Command, corpus: Path) -> None:
    err = error_of(trmt, "train", "--data", corpus)
    assert "text is not a prepared set; name a folder that `trmt prepare` wrote" in err
    assert "into a folder of its own" in err and "prepare text" not in err


def test_a_set_that_is_missing_can_be_made(trmt: Command, corpus: Path) -> None:
    err = error_of(trmt, "train", "--data", "data/en-de")
    assert "make one with `trmt prepare -o data/en-de --train CORPUS`" in err


def test_a_run_is_not_mixed_with_other_files(
    trmt: Command, corpus: Path, toy_set: Path, bundle: Path
) -> None:
    recipe = toy.recipe(corpus.parent)
    for folder, words in (
        (corpus, "text holds train.de, which is not of a run; name a folder of its own"),
        (toy_set, f"is a prepared set and not a run folder; train on it with trmt train --data {toy_set}"),
        (bundle, f"start a new run from its weights with trmt train --init-from {bundle}"),
        (
            corpus / "train.en",
            "text/train.en is a file and not a run folder; train on text with trmt new DIR --train",
        ),
    ):
        before = sorted(folder.parent.rglob("*"))
        assert words in error_of(trmt, "-q", "train", folder, "--data", toy_set, "--recipe", recipe)
        assert sorted(folder.parent.rglob("*")) == before


@pytest.mark.parametrize(
    ("named", "advice"),
    [
        ("text/train.en,text/train.de", "trmt new DIR --train text/train.en,text/train.de"),
        ("train.en,train.de", "trmt new DIR --train train.en,train.de"),
        ("pairs.tsv.gz", "trmt new DIR --train pairs.tsv.gz"),
        ("hf:corpus", "trmt new DIR --train hf:corpus"),
        ("text/train.en", "trmt new DIR --train SOURCE,TARGET"),
        ("data", "data holds set, which is not of a run"),
    ],
)
@pytest.mark.parametrize("command", ["train", "pretrain"])
def test_text_in_place_of_a_run_folder_is_refused(
    trmt: Command, corpus: Path, toy_set: Path, command: str, named: str, advice: str
) -> None:
    Path("pairs.tsv.gz").touch()
    Path("data").mkdir()
    Path("data/set").symlink_to(toy_set)
    if command == "pretrain" and named == "data":
        return
    assert advice in error_of(trmt, "-q", command, named, "--data", toy_set)
    assert sorted(each.name for each in Path().iterdir()) == ["data", "pairs.tsv.gz", "text"]


def test_a_run_that_has_more_steps_stays_as_it_is(trmt: Command, tmp_path: Path, toy_set: Path) -> None:
    run = tmp_path / "run"
    start = ("train", run, "--data", toy_set, "--recipe", toy.recipe(tmp_path))
    assert trmt(*start, "--set", "training.steps=4")[0] == 0
    before = (run / "config.toml").read_bytes()
    code, _, err = trmt("-q", "train", run, "--set", "training.steps=2")
    assert code == 0 and err.count("\n") == 1
    assert "has 4 steps already and cannot end at step 2: nothing is trained" in err
    assert (run / "config.toml").read_bytes() == before
    assert trmt("train", run, "--set", "training.steps=4")[0] == 0


def test_one_side_of_a_corpus_is_answered_with_both(trmt: Command, corpus: Path) -> None:
    (corpus / "alone.en.gz").touch()
    (corpus / "notes.txt").touch()
    for command in ("tokenizer", "prepare", "new"):
        more = ("models/new",) if command == "new" else ()
        for languages in ((), ("--from", "en", "--to", "de")):
            err = error_of(trmt, command, *more, "--train", corpus / "train.en", *languages)
            assert (
                "text/train.en is one side of a corpus; name both sides: text/train.en,text/train.de" in err
            )
            for name in ("alone.en.gz", "notes.txt"):
                err = error_of(trmt, command, *more, "--train", corpus / name, *languages)
                assert f"text/{name} is one side of a corpus, or of an unknown format; a corpus is " in err


def test_a_folder_that_is_empty_or_hides_its_files_is_a_run_folder(
    trmt: Command, tmp_path: Path, toy_set: Path
) -> None:
    recipe = toy.recipe(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".gitkeep").touch()
    arguments = (
        "train",
        tmp_path / "run",
        "--data",
        toy_set,
        "--recipe",
        recipe,
        "--set",
        "training.steps=1",
    )
    assert trmt(*arguments)[0] == 0
    assert trmt(*arguments)[0] == 0


def test_a_corpus_that_is_a_folder_is_named_by_its_files(trmt: Command, corpus: Path, toy_set: Path) -> None:
    tokenizer = toy_set.parent / "tokenizer"
    err = error_of(trmt, "prepare", "--train", corpus, "--tokenizer", tokenizer)
    assert "'text' is a folder; name its files, such as text/train for train.x and train.y" in err


def test_a_model_of_trmt_needs_no_import(trmt: Command, bundle: Path, tmp_path: Path) -> None:
    assert "needs no import; use it as it is" in error_of(trmt, "import", bundle)
    options = ("-o", tmp_path / "out", "--tokenizer", bundle / "tokenizer")
    err = error_of(trmt, "bert", "import", bundle, *options)
    assert "needs no import; use it as it is" in err


def test_a_model_of_trmt_is_found_by_its_name_on_import(
    trmt: Command, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("models").mkdir()
    Path("models/known").symlink_to(bundle)
    assert "models/known is a model of trmt already" in error_of(trmt, "import", "known")
    Path("known").mkdir()  # what is here is meant, which models/known may have been imported from
    assert "cannot read known/config.json" in error_of(trmt, "import", "known")


def test_only_a_run_that_goes_on_is_worth_waiting_for(trmt: Command, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "log.jsonl").write_text(json.dumps({"event": "end", "step": 3, "time": 0.0}) + "\n")
    err = error_of(trmt, "plot", run)
    assert "wait" not in err and "train on" not in err
    assert "the run has ended at step 3 with fewer steps than training.log_every" in err
    (run / "log.jsonl").write_text(json.dumps({"event": "begin", "step": 0, "time": 0.0}) + "\n")
    assert "fewer steps than training.log_every, so train on" in error_of(trmt, "plot", run)
    (run / "lock").touch()
    assert "wait for the first train entry" in error_of(trmt, "plot", run)


@pytest.mark.parametrize("command", ["plot", "compare"])
def test_text_has_no_curves(trmt: Command, corpus: Path, command: str) -> None:
    names = [corpus / "train.en", corpus / "train.de"]
    assert "text/train.en is not the log of a run; name a run folder" in error_of(trmt, command, *names)


TAKES_MODEL = [
    "translate",
    "inspect",
    "verify",
    "average",
    "export --to onnx",
    "quantize -o x",
    "attend",
    "align",
]


@pytest.mark.parametrize("command", [*TAKES_MODEL, "check-resume", "train x --init-from"])
def test_text_in_place_of_a_model_is_answered_with_how_to_translate_it(
    trmt: Command, corpus: Path, toy_set: Path, command: str
) -> None:
    words = command.split()
    if words[0] == "train":
        words = ["train", "x", "-q", "--data", str(toy_set), "--init-from"]
    assert "trmt translate < text/train.en" in error_of(trmt, *words, corpus / "train.en")


@pytest.mark.parametrize("command", [each for each in TAKES_MODEL if each != "average"])
def test_a_wrong_default_model_is_named_with_its_variable(
    trmt: Command, corpus: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    for named, words in ("nope", "there is no model in nope"), ("text/train.en", "is a file and not a model"):
        monkeypatch.setenv("TRMT_MODEL", named)
        err = error_of(trmt, *command.split())
        assert f"the environment variable TRMT_MODEL is {named}, but" in err and words in err


def test_a_file_of_a_model_is_answered_with_its_folder(trmt: Command, bundle: Path) -> None:
    err = error_of(trmt, "inspect", bundle / "weights.safetensors")
    assert f"name the model by its folder, {bundle}" in err


def test_a_file_is_no_tokenizer(trmt: Command, corpus: Path) -> None:
    pair = f"{corpus}/train.en,{corpus}/train.de"
    err = error_of(trmt, "prepare", "--train", pair, "--tokenizer", corpus / "train.en")
    assert "text/train.en is a file and not a tokenizer" in err


def test_no_message_names_a_former_option() -> None:
    root = Path(__file__).parent.parent / "trmt"
    named = [path for path in root.rglob("*.py") if re.search(r"--out\b(?!put)", path.read_text("utf-8"))]
    assert [path.name for path in named] == ["framework.py"]
