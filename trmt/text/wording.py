"""Which word of a text each of its pieces belongs to; words are what white space divides in it as given.

A tokenizer sees the text normalised, where words may have been joined, divided or dropped; bytes and white
space are pieces of their own at times.
"""

from __future__ import annotations

from collections.abc import Sequence

from trmt.text.links import Links
from trmt.text.subwords import MARK
from trmt.text.tokenizer import Side

NO_WORD = -1  # of a piece whose word cannot be told
WHOLE_WORDS = ("nfc", "none")  # normalisations that neither join words nor divide them


def words_of_pieces(side: Side, text: str, ids: Sequence[int]) -> list[int]:
    """For each piece of `text`, whose ids these are, the number of its word, counted from 0."""
    spelled = [_bytes(side, token, piece) for token, piece in zip(ids, side.pieces(ids), strict=True)]
    places = _places(spelled)
    counted = max(places, default=NO_WORD) + 1
    given = text.split()
    if side.normalisation in WHOLE_WORDS and MARK not in text and counted == len(given):
        return places
    sizes = [len(_normalised(side, word).split()) for word in given]
    if sum(sizes) != counted:
        return [NO_WORD] * len(places)
    origin = [number for number, size in enumerate(sizes) for _ in range(size)]
    return [NO_WORD if place == NO_WORD else origin[place] for place in places]


def linked_pieces(
    links: Links, source_words: Sequence[int], target_words: Sequence[int]
) -> list[tuple[int, int]]:
    """The links of pieces: every piece of a word with every piece of each word that it is linked to."""
    sources, targets = _pieces_of(source_words), _pieces_of(target_words)
    return [
        (source, target)
        for one, other in sorted(links)
        for target in targets.get(other, ())
        for source in sources.get(one, ())
    ]


def _pieces_of(words: Sequence[int]) -> dict[int, list[int]]:
    """The places of each word's pieces."""
    found: dict[int, list[int]] = {}
    for place, word in enumerate(words):
        found.setdefault(word, []).append(place)
    return found


def _normalised(side: Side, word: str) -> str:
    return side.normalise(word).replace(MARK, " ")


def _bytes(side: Side, token: int, piece: str) -> bytes:
    """What a piece spells in UTF-8, of which it may be a single byte."""
    if side.is_byte(token):
        return bytes([int(piece[3:5], 16)])  # <0xE2>
    return piece.replace(MARK, " ").encode()


def _places(spelled: Sequence[bytes]) -> list[int]:
    """The word that each piece begins in; white space alone belongs to the word behind it, if any."""
    owner = [number for number, part in enumerate(spelled) for _ in part]
    places = [NO_WORD] * len(spelled)
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
                if places[piece] == NO_WORD:
                    places[piece] = word
        at += size
    following = NO_WORD
    for number in reversed(range(len(places))):
        if places[number] == NO_WORD:
            places[number] = following
        following = places[number]
    return places
