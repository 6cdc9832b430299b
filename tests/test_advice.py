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
        (corpus / "train.en", "text/train.en is a file and not a run folder; train on text with trmt new DIR --train"),
    ):
        before = sorted(folder.parent.rglob("*"))
        assert words in error_of(trmt, "-q", "train", folder, "--data", toy_set, "--recipe", recipe)
        assert sorted(folder.parent.rglob("*")) == before


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


def test_only_a_run_that_goes_on_is_worth_waiting_for(trmt: Command, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "log.jsonl").write_text(json.dumps({"event": "end", "step": 3, "time": 0.0}) + "\n")
    err = error_of(trmt, "plot", run)
    assert "wait" not in err and "fewer steps than training.log_every" in err
    (run / "lock").touch()
    assert "wait for the first train entry" in error_of(trmt, "plot", run)


def test_text_in_place_of_a_model_is_answered_with_how_to_translate_it(trmt: Command, corpus: Path) -> None:
    assert "trmt translate < text/train.en" in error_of(trmt, "translate", corpus / "train.en")


def test_no_message_names_a_former_option() -> None:
    root = Path(__file__).parent.parent / "trmt"
    named = [path for path in root.rglob("*.py") if re.search(r"--out\b(?!put)", path.read_text("utf-8"))]
    assert [path.name for path in named] == ["framework.py"]
