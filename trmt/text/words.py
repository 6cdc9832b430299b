"""Which word of a text each of its pieces belongs to; words are separated by white space in the given text.

The tokenizer normalises the text first, which may join, divide or drop words; bytes and white space may be
pieces of their own.
"""

from __future__ import annotations

from collections.abc import Sequence

from trmt.text.links import Links
from trmt.text.subwords import WORD_MARK
from trmt.text.tokenizer import Side

NO_WORD = -1  # of a piece whose word is unknown
KEEP_WORDS = ("nfc", "none")  # normalisations that neither join nor divide words


def word_indices(side: Side, text: str, ids: Sequence[int]) -> list[int]:
    """For each piece of `text`, given their ids, the index of its word."""
    spelled = [_bytes(side, token, piece) for token, piece in zip(ids, side.pieces(ids), strict=True)]
    indices = _normalised_word_indices(spelled)
    count = max(indices, default=NO_WORD) + 1
    words = text.split()
    if side.normalisation in KEEP_WORDS and WORD_MARK not in text and count == len(words):
        return indices
    sizes = [len(_normalise(side, word).split()) for word in words]
    if sum(sizes) != count:
        return [NO_WORD] * len(indices)
    origin = [number for number, size in enumerate(sizes) for _ in range(size)]
    return [NO_WORD if index == NO_WORD else origin[index] for index in indices]


def link_pieces(
    links: Links, source_words: Sequence[int], target_words: Sequence[int]
) -> list[tuple[int, int]]:
    """The links of pieces: each piece of a word with each piece of the words that it is linked to."""
    sources, targets = _pieces_by_word(source_words), _pieces_by_word(target_words)
    return [
        (source, target)
        for one, other in sorted(links)
        for target in targets.get(other, ())
        for source in sources.get(one, ())
    ]


def _pieces_by_word(words: Sequence[int]) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for piece, word in enumerate(words):
        found.setdefault(word, []).append(piece)
    return found


def _normalise(side: Side, word: str) -> str:
    return side.normalise(word).replace(WORD_MARK, " ")


def _bytes(side: Side, token: int, piece: str) -> bytes:
    """The UTF-8 of a piece, which may be a single byte of a character."""
    if side.is_byte(token):
        return bytes([int(piece[3:5], 16)])  # <0xE2>
    return piece.replace(WORD_MARK, " ").encode()


def _normalised_word_indices(spelled: Sequence[bytes]) -> list[int]:
    """The word of the normalised text that each piece begins in; white space belongs to the word after it."""
    owner = [number for number, part in enumerate(spelled) for _ in part]
    indices = [NO_WORD] * len(spelled)
    text = b"".join(spelled).decode("utf-8", "surrogateescape")
    at, word, inside = 0, -1, False
    for character in text:
        size = len(character.encode("utf-8", "surrogateescape"))
        if character.isspace():
            inside = False
        else:
            word += not inside
            inside = True
            for piece in owner[at : at + size]:
                if indices[piece] == NO_WORD:
                    indices[piece] = word
        at += size
    following = NO_WORD
    for number in reversed(range(len(indices))):
        if indices[number] == NO_WORD:
            indices[number] = following
        following = indices[number]
    return indices
