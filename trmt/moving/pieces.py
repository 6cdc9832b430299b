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
from typing import Any

import sentencepiece

from trmt.files import atomic_file
from trmt.tokenizer import ListedSide, Side, Tokenizer

SOURCE, TARGET = "source.spm", "target.spm"


def write_models(folder: Path, tokenizer: Tokenizer) -> None:
    """Write both sides' sentencepiece models, under the names that Marian's users know."""
    for name, side in ((SOURCE, tokenizer.source), (TARGET, tokenizer.target)):
        with atomic_file(folder / name) as stream:
            stream.write(normalising_model(side))


def normalising_model(side: Side) -> bytes:
    """The side's sentencepiece model, made to normalise as the side does."""
    if isinstance(side, ListedSide) or side.normalisation == "none":
        return side.model
    # Of a message that is there twice, the later fields count: this is how protocol buffers are merged.
    return side.model + _rules(side.normalisation)


@cache
def _rules(name: str) -> bytes:
    """A model that holds nothing but how to normalise."""
    settings: dict[str, Any] = {
        "add_dummy_prefix": True,
        "escape_whitespaces": True,
        "remove_extra_whitespaces": True,
    }
    if name != "nfc":
        return _serialized(rule_name=name, **settings)
    return _serialized(norm_map=sorted(_compositions()), **settings)


def _serialized(**settings: Any) -> bytes:
    sentencepiece.set_min_log_level(2)  # or it tells what it does on standard error
    rules: bytes = sentencepiece.SentencePieceNormalizer(**settings).serialized_model_proto()
    return rules


def _compositions() -> Iterator[tuple[str, str]]:
    """What NFC changes, character by character and sequence by sequence, and white space to spaces."""
    seen = set()
    for character in map(chr, range(sys.maxunicode + 1)):
        if character.isspace():
            if character != " ":
                seen.add((character, " "))
            continue
        parts = unicodedata.normalize("NFD", character)
        composed = unicodedata.normalize("NFC", character)
        for spelled in {character, parts, *_partly(parts)}:
            if unicodedata.normalize("NFC", spelled) == composed != spelled:
                seen.add((spelled, composed))
    yield from seen


def _partly(parts: str) -> Iterator[str]:
    """A decomposed character with its marks in any order, and with its beginning composed."""
    for marks in permutations(parts[1:]):
        spelled = parts[0] + "".join(marks)
        for end in range(1, len(parts)):
            yield unicodedata.normalize("NFC", spelled[:end]) + spelled[end:]
