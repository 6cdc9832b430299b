"""The sentencepiece models of a tokenizer as other programs need them.

trmt normalises text before sentencepiece gets it; other programs leave that to the sentencepiece model. So
the normalisation is put into the models that are written, as far as sentencepiece can express it.
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
    """Write both sides' sentencepiece models, under the file names that Marian uses."""
    for name, side in ((SOURCE, tokenizer.source), (TARGET, tokenizer.target)):
        with atomic_file(folder / name) as stream:
            stream.write(normalising_model(side))


def normalising_model(side: Side) -> bytes:
    """The side's sentencepiece model with the side's normalisation in it."""
    if isinstance(side, VocabularySide) or side.normalisation == "none":
        return side.model
    # Concatenated protocol buffers are merged; if a field is set twice, the later value counts.
    return side.model + _normaliser_model(side.normalisation)


@cache
def _normaliser_model(name: str) -> bytes:
    """A serialized sentencepiece model that holds nothing but normalisation rules."""
    sentencepiece.set_min_log_level(2)  # otherwise it logs to standard error
    rules = (
        _nfc_rules() if name == "nfc" else sentencepiece.SentencePieceNormalizer(rule_name=name).Decompile()
    )
    merged = {**_white_space(), **{before: _with_spaces(after) for before, after in rules}}
    normaliser = sentencepiece.SentencePieceNormalizer(
        norm_map=sorted(merged.items()),
        add_dummy_prefix=True,
        escape_whitespaces=True,
        remove_extra_whitespaces=True,
    )
    serialized: bytes = normaliser.serialized_model_proto()
    return serialized


def _white_space() -> dict[str, str]:
    return {space: " " for space in map(chr, range(sys.maxunicode + 1)) if space.isspace() and space != " "}


def _with_spaces(text: str) -> str:
    return "".join(" " if character.isspace() else character for character in text)


def _nfc_rules() -> Iterator[tuple[str, str]]:
    """What NFC changes: each spelling of a character that is not its composed form, and that form."""
    for character in map(chr, range(sys.maxunicode + 1)):
        decomposed = unicodedata.normalize("NFD", character)
        composed = unicodedata.normalize("NFC", character)
        for spelling in {character, decomposed, *_partly_composed(decomposed)}:
            if unicodedata.normalize("NFC", spelling) == composed != spelling:
                yield spelling, composed


def _partly_composed(decomposed: str) -> Iterator[str]:
    """A decomposed character with its marks in any order and its beginning composed."""
    for marks in permutations(decomposed[1:]):
        spelling = decomposed[0] + "".join(marks)
        for end in range(1, len(decomposed)):
            yield unicodedata.normalize("NFC", spelling[:end]) + spelling[end:]
