"""The sentencepiece models of a tokenizer as other programs read them.

Ours normalise text before sentencepiece sees it; others leave that to the model. So the rule goes into the
models that are written, as far as sentencepiece can express it.
"""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Iterator
from functools import cache
from itertools import permutations
from pathlib import Path

import sentencepiece

from trmt.storage.files import atomic_file
from trmt.text.tokenizer import Side, Tokenizer, VocabularySide

SOURCE, TARGET = "source.spm", "target.spm"


def write_models(folder: Path, tokenizer: Tokenizer) -> None:
    """Write both sides' sentencepiece models, under the names that Marian's users know."""
    for name, side in ((SOURCE, tokenizer.source), (TARGET, tokenizer.target)):
        with atomic_file(folder / name) as stream:
            stream.write(normalising_model(side))


def normalising_model(side: Side) -> bytes:
    """The side's sentencepiece model, made to normalise as the side does."""
    if isinstance(side, VocabularySide) or side.normalisation == "none":
        return side.model
    # Of a message that is there twice, the later fields count: this is how protocol buffers are merged.
    return side.model + _rules(side.normalisation)


@cache
def _rules(name: str) -> bytes:
    """A model that holds nothing but how to normalise."""
    sentencepiece.set_min_log_level(2)  # or it tells what it does on standard error
    known = (
        _compositions()
        if name == "nfc"
        else sentencepiece.SentencePieceNormalizer(rule_name=name).Decompile()
    )
    rules = {**_white_space(), **{before: _spaced(after) for before, after in known}}
    made = sentencepiece.SentencePieceNormalizer(
        norm_map=sorted(rules.items()),
        add_dummy_prefix=True,
        escape_whitespaces=True,
        remove_extra_whitespaces=True,
    )
    serialized: bytes = made.serialized_model_proto()
    return serialized


def _white_space() -> dict[str, str]:
    return {space: " " for space in map(chr, range(sys.maxunicode + 1)) if space.isspace() and space != " "}


def _spaced(text: str) -> str:
    return "".join(" " if character.isspace() else character for character in text)


def _compositions() -> Iterator[tuple[str, str]]:
    """What NFC changes, character by character and sequence by sequence."""
    for character in map(chr, range(sys.maxunicode + 1)):
        parts = unicodedata.normalize("NFD", character)
        composed = unicodedata.normalize("NFC", character)
        for spelled in {character, parts, *_partly(parts)}:
            if unicodedata.normalize("NFC", spelled) == composed != spelled:
                yield spelled, composed


def _partly(parts: str) -> Iterator[str]:
    """A decomposed character with its marks in any order, and with its beginning composed."""
    for marks in permutations(parts[1:]):
        spelled = parts[0] + "".join(marks)
        for end in range(1, len(parts)):
            yield unicodedata.normalize("NFC", spelled[:end]) + spelled[end:]
