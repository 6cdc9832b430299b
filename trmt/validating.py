"""Validation by really translating: what the dev set scores with today's weights."""

from __future__ import annotations

import torch

from trmt.decoding.request import Batching
from trmt.nets.base import Seq2Seq
from trmt.scoring import ScoreOptions, bleu_tokenizer, score
from trmt.sets.shards import PreparedSet
from trmt.text.tokenizer import Tokenizer
from trmt.training.recipe import Recipe
from trmt.training.validation import Validation
from trmt.translating import TranslateOptions, Translator

METRICS = ("chrf", "bleu")


def validate(net: Seq2Seq, tokenizer: Tokenizer, data: PreparedSet, recipe: Recipe) -> Validation:
    """Translate the dev set, or an even selection of it, and score it for the target language.

    It draws nothing at random, so training goes on as if nobody had looked.
    """
    sources, references = _selection(data, recipe.validation.sentences)
    if not sources:
        return Validation()
    longest = int(data.split("train").lengths("source.ids").max())
    translations = _translated(net, tokenizer, sources, longest=longest, beam=recipe.validation.beam)
    scored = score(
        translations,
        [references],
        options=ScoreOptions(metrics=METRICS, tokenize=bleu_tokenizer(tokenizer.languages[1])),
    )
    scores = tuple(
        {"metric": name, "value": scored[name].value, "signature": scored[name].signature, "set": "dev"}
        for name in METRICS
    )
    shown = range(min(recipe.validation.samples, len(sources)))
    samples = tuple(
        {
            "source": sources[n],
            "translation": translations[n],
            "reference": references[n],
            "beam": recipe.validation.beam,
        }
        for n in shown
    )
    return Validation(scores, samples)


def _translated(
    net: Seq2Seq, tokenizer: Tokenizer, sources: list[str], *, longest: int, beam: int
) -> list[str]:
    """The translations."""
    # Training has filled the memory of a GPU: no room there for what `captured` wants.
    options = TranslateOptions(
        search="beam" if beam > 1 else "greedy", beam=beam, runs="direct", batch=Batching().sentences
    )
    with torch.inference_mode():
        translator = Translator(net, tokenizer, longest=longest, options=options)
        return [translation.text for translation in translator.translate(sources)]


def _selection(data: PreparedSet, count: int) -> tuple[list[str], list[str]]:
    """At most `count` pairs of the dev set, spread evenly over it."""
    sources, references = data.dev_text()
    if count >= len(sources):
        return sources, references
    places = [number * len(sources) // count for number in range(count)]
    return [sources[place] for place in places], [references[place] for place in places]
