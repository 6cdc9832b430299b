"""Validation by translation: the scores of the dev set with the current weights."""

from __future__ import annotations

import torch

from trmt.decoding.request import Batching
from trmt.nets.base import Seq2Seq
from trmt.scoring import ScoreOptions, bleu_tokenizer, score
from trmt.sets.shards import PreparedSet
from trmt.text.tokenizer import Tokenizer
from trmt.training.recipe import Recipe
from trmt.training.validation import ValidationResult
from trmt.translating import TranslateOptions, Translator

METRICS = ("chrf", "bleu")


def validate(
    net: Seq2Seq, tokenizer: Tokenizer, data: PreparedSet, recipe: Recipe, *, forced: bool = False
) -> ValidationResult:
    """Translate the dev set, or an even selection of it, and score it for the target language.

    It draws no random numbers, so that training is not affected. With `forced`, each translation has to be
    its reference, so that it takes as long as a good one.
    """
    sources, references = _select(data, recipe.validation.sentences)
    if not sources:
        return ValidationResult()
    longest = int(data.split("train").lengths("source.ids").max())
    translations = _translate(
        net,
        tokenizer,
        sources,
        prefixes=references if forced else None,
        longest=longest,
        beam=recipe.validation.beam,
    )
    scored = score(
        translations,
        [references],
        options=ScoreOptions(
            metrics=METRICS, tokenize=bleu_tokenizer(tokenizer.languages[1] or data.languages[1])
        ),
    )
    scores = tuple(
        {"metric": name, "value": scored[name].value, "signature": scored[name].signature, "set": "dev"}
        for name in METRICS
    )
    samples = tuple(
        {
            "source": sources[n],
            "translation": translations[n],
            "reference": references[n],
            "beam": recipe.validation.beam,
        }
        for n in range(min(recipe.validation.samples, len(sources)))
    )
    return ValidationResult(scores, samples)


def _translate(
    net: Seq2Seq,
    tokenizer: Tokenizer,
    sources: list[str],
    *,
    prefixes: list[str] | None,
    longest: int,
    beam: int,
) -> list[str]:
    # Training fills the memory of a GPU, and the engine `captured` would need more of it.
    options = TranslateOptions(
        search="beam" if beam > 1 else "greedy",
        beam=beam,
        max_length=0 if prefixes is None else 1,  # beside the prefix
        runs="direct",
        batch=Batching().sentences,
    )
    with torch.inference_mode():
        translator = Translator(net, tokenizer, longest=longest, options=options)
        return [translation.text for translation in translator.translate(sources, prefixes=prefixes)]


def _select(data: PreparedSet, count: int) -> tuple[list[str], list[str]]:
    """At most `count` pairs of the dev set, spread evenly over it."""
    sources, references = data.dev_text()
    if count >= len(sources):
        return sources, references
    indices = [number * len(sources) // count for number in range(count)]
    return [sources[index] for index in indices], [references[index] for index in indices]
