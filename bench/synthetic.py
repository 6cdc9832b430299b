"""A prepared set of made-up pairs: for measuring speed where there is no corpus of the wanted size.

Words are drawn with the frequencies of a language (Zipf's law). Lengths are those of news translation: source
lengths lognormal with a mean of 28 pieces, the target's within some fifteen percent of the source's.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

from trmt.sets.preparing import PrepareOptions, prepare
from trmt.text.tokenizer import Tokenizer, TokenizerSettings

MEAN, SPREAD, LONGEST = 28, 0.6, 200  # of the source's length, in pieces
RATIO_SPREAD = 0.15  # of the logarithm of the target's length over the source's
CHUNK = 50_000


def prepared(folder: Path, *, pairs: int, vocabulary: int, seed: int = 1) -> Path:
    """The set in `folder`, made if it is not there."""
    made = folder / "set"
    if (made / "index.json").is_file():
        return made
    folder.mkdir(parents=True, exist_ok=True)
    word_tokenizer(vocabulary).save(folder / "tokenizer")
    generator = np.random.default_rng(seed)
    for name, count in (("train", pairs), ("dev", 500)):
        with (folder / f"{name}.en").open("w") as source, (folder / f"{name}.de").open("w") as target:
            for begin in range(0, count, CHUNK):
                for file, lengths in zip(
                    (source, target), _lengths(generator, min(CHUNK, count - begin)), strict=True
                ):
                    file.write(_sentences(generator, lengths, vocabulary))
    options = PrepareOptions(
        train=(str(folder / "train"),),
        dev=str(folder / "dev"),
        languages=("en", "de"),
        tokenizer=folder / "tokenizer",
        out=made,
    )
    prepare(options)
    return made


def word_tokenizer(vocabulary: int) -> Tokenizer:
    """A tokenizer whose pieces are the words w0, w1, ...: `vocabulary` ids with the special ones."""
    words = [f"w{number}" for number in range(vocabulary - 4)]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([" ".join(words[begin : begin + 100]) for begin in range(0, len(words), 100)]),
        model_writer=model,
        model_type="word",
        vocab_size=vocabulary,
        pad_id=0,
        unk_id=1,
        bos_id=2,
        eos_id=3,
        minloglevel=2,
    )
    return Tokenizer(TokenizerSettings(languages=("en", "de")), [model.getvalue()])


def _lengths(generator: Any, count: int) -> tuple[Any, Any]:
    centre = np.log(MEAN) - SPREAD**2 / 2
    source = np.exp(generator.normal(centre, SPREAD, count))
    target = source * np.exp(generator.normal(0, RATIO_SPREAD, count))
    source, target = (np.clip(side.round().astype(int), 1, LONGEST) for side in (source, target))
    return source, target


def _sentences(generator: Any, lengths: Any, vocabulary: int) -> str:
    numbers = ((generator.zipf(1.2, int(lengths.sum())) - 1) % (vocabulary - 4)).tolist()
    lines, begin = [], 0
    for length in lengths.tolist():
        lines.append(" ".join(f"w{number}" for number in numbers[begin : begin + length]))
        begin += length
    return "\n".join(lines) + "\n"
