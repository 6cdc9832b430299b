"""The tasks that are no translation: their answers follow from their texts, and the commands learn them."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.test_pipeline import ROOT, trmt

SCRIPT = ROOT / "data" / "beyond.py"


@pytest.fixture(scope="module")
def beyond() -> ModuleType:
    specification = importlib.util.spec_from_file_location("beyond", SCRIPT)
    assert specification and specification.loader
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def summarised(text: str, names: list[str], goods: list[str]) -> str:
    """The summary of a report, by another way than its generator's: from the text alone."""
    sales = []
    for sentence in text.split(" ¶ "):
        words = re.findall(r"\w+", sentence)
        if number := [word for word in words if word.isdigit()]:
            [name] = set(words) & set(names)
            [good] = set(words) & set(goods)
            sales.append((int(number[0]), name, good))
    (least, last, poor), *_, (most, best, what) = [*sorted(sales)[:1], *sorted(sales)]
    return f"{best} sold the most: {most} {what}. {last} sold the least: {least} {poor}."


def test_summaries_follow_from_their_reports(beyond: ModuleType) -> None:
    pairs = [pair for part in beyond.generate("summaries", 1).values() for pair in part]
    assert all(summarised(text, beyond.NAMES, beyond.GOODS) == answer for text, answer in pairs)
    assert {text.count("¶") for text, _ in pairs} == {1, 2, 3, 4}


def test_topics_are_those_of_what_is_recommended(beyond: ModuleType) -> None:
    kind_of = {word: kind for kind, words in beyond.KINDS.items() for word in words}
    parts = beyond.generate("topics", 1)
    first_is_wrong = 0
    for text, answer in (pair for part in parts.values() for pair in part):
        kinds = [kind_of[word] for word in re.findall(r"\w+", text) if word in kind_of]
        assert len(kinds) == 2 and answer in kinds
        first_is_wrong += kinds[0] != answer
    total = sum(map(len, parts.values()))
    assert 0.3 < first_is_wrong / total < 0.7  # where a word stands does not give the answer away


def test_a_document_keeps_to_one_kind_of_thing(beyond: ModuleType) -> None:
    kind_of = {word: kind for kind, words in beyond.KINDS.items() for word in words}
    parts = beyond.generate_documents(1)
    assert {part: len(documents) for part, documents in parts.items()} == beyond.DOCUMENTS
    met = set()
    for document in parts["dev"]:
        kinds = {kind_of[word] for word in re.findall(r"\w+", document) if word in kind_of}
        assert len(kinds) == 1 and 4 <= document.count("\n") <= 8
        met |= kinds
    assert met == set(beyond.KINDS)
    assert beyond.generate_documents(1) == parts != beyond.generate_documents(2)


@pytest.mark.parametrize("task", ["summaries", "topics"])
def test_no_text_is_in_two_parts_and_a_seed_says_it_all(beyond: ModuleType, task: str) -> None:
    parts = beyond.generate(task, 1)
    texts = [text for part in parts.values() for text, _ in part]
    assert len(set(texts)) == len(texts)
    assert beyond.generate(task, 1) == parts != beyond.generate(task, 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "settings", "right"),
    [
        ("topics", ["validation.every=200"], 0.95),
        ("summaries", ["training.steps=500", "validation.every=500"], 0.9),
    ],
)
def test_the_commands_learn_them(tmp_path: Path, task: str, settings: list[str], right: float) -> None:
    subprocess.run([sys.executable, str(SCRIPT), task, "texts"], cwd=tmp_path, check=True)
    learn = ("--train", "texts/train", "--from", "text", "--to", "answer", "--size", "600")
    trmt("tokenizer", *learn, "--placeholder", "¶", cwd=tmp_path)
    trmt("prepare", "--train", "texts/train", "--dev", "texts/dev", "--max-ratio", "0", cwd=tmp_path)
    changes = [word for setting in settings for word in ("--set", setting)]
    trmt("train", "--recipe", task, *changes, cwd=tmp_path)
    answers = (tmp_path / "texts" / "test.answer").read_text("utf-8").splitlines()
    given = trmt("translate", cwd=tmp_path, stdin=(tmp_path / "texts" / "test.text").read_bytes())
    found = given.decode().splitlines()
    assert len(found) == len(answers)
    assert sum(map(str.__eq__, found, answers)) > right * len(answers)
