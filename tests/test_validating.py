from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import sacrebleu
import torch

from tests import texts
from tests.scripted import Scripted, small_tokenizer
from trmt.sets.preparing import PrepareOptions, prepare
from trmt.sets.shards import PreparedSet
from trmt.text.tokenizer import Tokenizer
from trmt.training.recipe import Recipe, TrainingConfig, ValidationConfig
from trmt.training.validation import ValidationResult
from trmt.validating import validate

PAIRS = list(zip(texts.ENGLISH, texts.CHINESE, strict=True))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer = small_tokenizer(folder, languages=("en", "zh"))
    tokenizer.save(folder / "saved")
    return tokenizer


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> PreparedSet:
    folder = tmp_path_factory.mktemp("data")
    tokenizer.save(folder / "tokenizer")
    for name, pairs in (("train", [(f"{s} {s}", t + t) for s, t in PAIRS]), ("dev", PAIRS)):
        text = "".join(f"{source}\t{target}\n" for source, target in pairs)
        (folder / f"{name}.tsv").write_text(text, encoding="utf-8")
    options = PrepareOptions(
        train=(str(folder / "train.tsv"),),
        dev=str(folder / "dev.tsv"),
        out=folder / "prepared",
        tokenizer=folder / "tokenizer",
        workers=1,
    )
    return prepare(options)


def half_right(tokenizer: Tokenizer) -> Scripted:
    """A network that outputs the translations without their last piece, every third without the last two."""
    known = {}
    for number, (source, target) in enumerate(PAIRS):
        [ids], [answer] = tokenizer.source.encode([source]), tokenizer.target.encode([target])
        known[tuple(ids)] = answer[: -1 - (number % 3 == 0)]
    eos, vocabulary = tokenizer.target.eos, tokenizer.target.vocabulary
    return Scripted(lambda ids: known[tuple(ids)], vocabulary=vocabulary, eos=eos)


def found(tokenizer: Tokenizer, data: PreparedSet, **options: int) -> ValidationResult:
    recipe = Recipe(training=TrainingConfig(steps=1), validation=ValidationConfig(**options))  # type: ignore[arg-type]
    return validate(half_right(tokenizer), tokenizer, data, recipe)


@pytest.mark.parametrize("beam", [1, 3])
def test_scores_are_those_of_sacrebleu_for_the_target_language(
    tokenizer: Tokenizer, data: PreparedSet, beam: int
) -> None:
    validation = found(tokenizer, data, sentences=500, samples=len(PAIRS), beam=beam)
    translations = [sample["translation"] for sample in validation.samples]
    assert [sample["source"] for sample in validation.samples] == texts.ENGLISH
    assert [sample["reference"] for sample in validation.samples] == texts.CHINESE
    chrf = sacrebleu.corpus_chrf(translations, [texts.CHINESE]).score
    bleu = sacrebleu.corpus_bleu(translations, [texts.CHINESE], tokenize="zh").score
    scores = {score["metric"]: score for score in validation.scores}
    assert {name: score["value"] for name, score in scores.items()} == {"chrf": chrf, "bleu": bleu}
    assert 50 < bleu < 100, "neither all right nor all wrong"
    assert "tok:zh" in scores["bleu"]["signature"] and scores["chrf"]["signature"].startswith("nrefs:1|")
    assert all(score["set"] == "dev" for score in validation.scores)


@pytest.mark.parametrize("count", [1, 2, 7, 10, 29])
def test_a_selection_is_spread_evenly_and_always_the_same(
    tokenizer: Tokenizer, data: PreparedSet, count: int
) -> None:
    validation = found(tokenizer, data, sentences=count, samples=count)
    indices = [texts.ENGLISH.index(sample["source"]) for sample in validation.samples]
    assert len(indices) == count and indices == sorted(set(indices))
    gaps = [after - before for before, after in zip(indices, [*indices[1:], len(PAIRS)], strict=True)]
    assert max(gaps) - min(gaps) <= 1
    assert [sample["reference"] for sample in validation.samples] == [texts.CHINESE[n] for n in indices]
    assert found(tokenizer, data, sentences=count, samples=count) == validation


@pytest.mark.parametrize("beam", [1, 3])
def test_forced_translations_are_the_references(tokenizer: Tokenizer, data: PreparedSet, beam: int) -> None:
    recipe = Recipe(
        training=TrainingConfig(steps=1), validation=ValidationConfig(samples=len(PAIRS), beam=beam)
    )
    net = half_right(tokenizer)
    forced = validate(net, tokenizer, data, recipe, forced=True)
    assert [sample["translation"] for sample in forced.samples] == texts.CHINESE


def test_scores_are_of_the_selection_and_not_of_the_samples(tokenizer: Tokenizer, data: PreparedSet) -> None:
    few = found(tokenizer, data, sentences=10, samples=2)
    all_shown = found(tokenizer, data, sentences=10, samples=100)
    assert few.scores == all_shown.scores
    assert few.samples == all_shown.samples[:2] and len(all_shown.samples) == 10
    assert few.scores != found(tokenizer, data, sentences=30).scores


def test_validating_draws_no_random_numbers(tokenizer: Tokenizer, data: PreparedSet) -> None:
    for seed in (torch.manual_seed, random.seed, np.random.seed):
        seed(5)
    expected = torch.rand(3), random.random(), np.random.rand()
    for seed in (torch.manual_seed, random.seed, np.random.seed):
        seed(5)
    found(tokenizer, data, beam=3)
    assert torch.equal(torch.rand(3), expected[0])
    assert (random.random(), np.random.rand()) == expected[1:]


def test_without_a_dev_set_the_result_is_empty(
    tmp_path: Path, tokenizer: Tokenizer, data: PreparedSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PreparedSet, "dev_text", lambda self: ([], []))
    assert found(tokenizer, data) == ValidationResult()
