"""Splitting of long text into segments that fit the network: at sentence ends, clause marks, or spaces.

Nothing is lost: each segment keeps the white space after it. The caller decides what fits, with a tokenizer.
That is slow, so it is asked a few times for each segment, and never about much more text than fits.
"""

from __future__ import annotations

import re
import unicodedata
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

Fits = Callable[[str], bool]

FIRST_GUESS = 64  # characters; the search doubles from here

# Full stops that need no white space after them: Chinese and Japanese, Devanagari, Arabic, Urdu, Armenian,
# Ethiopic, Khmer, Burmese.
_UNSPACED_STOPS = "。！？｡।॥؟۔։።។။"
_SPACED_STOPS = ".!?…\u037e"
_CLAUSE_MARKS = ";:,،؛、，；：—–…"
_CLAUSE_MARKS_BEFORE_SPACE = ";:,–"  # without a space they are part of 1,200 or 7:45 or an address
_CLOSING = "\"'”’»›)]}」』】》〉）］｝"
_OPENING = "\"'“‘„‚«‹([{「『【《〈（［｛¿¡—–-"
# The quotation mark that opens in English and Chinese closes in German: „Halt!“
_CLOSERS = rf"(?:[{re.escape(_CLOSING)}]|[“‘](?=\s|$))*"

_STOPS = re.compile(f"([{re.escape(_UNSPACED_STOPS + _SPACED_STOPS)}]+)({_CLOSERS})")
_CLAUSES = re.compile(f"([{re.escape(_CLAUSE_MARKS)}]){_CLOSERS}")
_SPACES = re.compile(r"\s+")
_NEXT_WORD = re.compile(rf"\s++[{re.escape(_OPENING)}]*+(.)")
_QUOTED_BEFORE = re.compile("と|って|、|，")  # 「…。」と言った: the quotation ends, the sentence does not
_CHINESE_OR_JAPANESE = re.compile(
    "[\u2e80-\u30ff\u3400-\u9fff\uf900-\ufaff\uff00-\uffef\U00020000-\U0003ffff]"
)

# Thai, Lao, Burmese and Khmer have spaces between sentences, but none between words.
_UNSPACED_LETTER = re.compile(
    f"{_CHINESE_OR_JAPANESE.pattern}|[\u0e00-\u0eff\u0f00-\u0fff\u1000-\u109f\u1780-\u17ff]"
)
# ISO 639 codes, of two letters and of three: Chinese languages and Japanese.
_UNSPACED_LANGUAGES = frozenset(("zh", "zho", "chi", "cmn", "yue", "wuu", "hak", "nan", "lzh", "ja", "jpn"))

_MAX_ABBREVIATION = 24
_ABBREVIATIONS = frozenset(
    word
    for words in (
        "mr mrs ms dr prof st vs etc inc ltd co corp jr sr gen col sgt capt lt rev fig vol pp dept approx",
        "nr bzw usw ca vgl abs hr fr str bd hrsg evtl ggf inkl tel mio mrd jh jan feb aug sept okt nov dez",
        "mme mlle mm av bd sra srta dra ud uds pág núm sig sigg dott ing avv",
        "г гг ул стр им тыс млн млрд руб др пр см напр",
    )
    for word in words.split()
)


@dataclass(frozen=True)
class TextSegment:
    """A part of a text: the `text` to translate, the `space` after it, and the `joiner` to put there instead.

    The texts and spaces of all segments are the original. The joiner suits a language in the script of the
    original: nothing in Chinese and Japanese and inside a word, a space elsewhere.
    """

    text: str
    space: str
    joiner: str


def split_text(text: str, fits: Fits) -> list[TextSegment]:
    """Split `text` into segments that fit, as few as the best split points allow.

    A segment has as many whole sentences as fit. Only a sentence that does not fit by itself is split at
    clause marks, then at white space, then between characters. A single character always fits.
    """
    end = len(text.rstrip())
    points = _SplitPoints.find(text, end)
    segments: list[TextSegment] = []
    start, guess = 0, FIRST_GUESS
    while True:
        cut, marked = _next_cut(text, start, end, guess=guess, points=points, fits=fits)
        after = _SPACES.match(text, cut)
        space = after[0] if after else ""
        segments.append(TextSegment(text[start:cut], space, _joiner(text, cut, space=space, marked=marked)))
        if cut >= end:
            return segments
        guess = max(cut - start, FIRST_GUESS)
        start = cut + len(space)


def joiner_for(segment: TextSegment, language: str) -> str:
    """What to put between the translations of this segment and of the next one into `language`.

    Only Chinese and Japanese have no space between sentences. An unknown language is taken for one in the
    script of the original.
    """
    code = language.lower().replace("_", "-").partition("-")[0]
    if code in _UNSPACED_LANGUAGES:
        return ""
    if code and _UNSPACED_LETTER.match(segment.text[-1:]):
        return " "
    return segment.joiner


@dataclass(frozen=True)
class _SplitPoints:
    """Where a text may be split, as ascending positions."""

    sentences: Sequence[int]
    clauses: Sequence[int]
    spaces: Sequence[int]

    @classmethod
    def find(cls, text: str, end: int) -> _SplitPoints:
        begin = len(text) - len(text.lstrip())
        return cls(
            list(_sentence_ends(text, end)),
            list(_clause_ends(text, end)),
            [match.start() for match in _SPACES.finditer(text, begin, end)],
        )


def _next_cut(
    text: str, start: int, end: int, *, guess: int, points: _SplitPoints, fits: Fits
) -> tuple[int, bool]:
    """Where the segment that begins at `start` ends, and whether it ends in a punctuation mark."""
    failing = _first_failing(text, start, end, guess=guess, fits=fits)
    if failing is None:
        return end, False
    for positions, marked in ((points.sentences, True), (points.clauses, True), (points.spaces, False)):
        window = positions[bisect_right(positions, start) : bisect_left(positions, failing)]
        cut = _last_fitting(text, start, window, fits)
        if cut is not None:
            return cut, marked
    cut = _last_fitting(text, start, range(start + 1, failing), fits)
    if cut is None:
        return start + 1, False
    boundary = _cluster_boundary(text, start, cut)
    return (boundary if fits(text[start:boundary]) else cut), False


def _first_failing(text: str, start: int, end: int, *, guess: int, fits: Fits) -> int | None:
    """A position up to which the text does not fit, or None if all the rest fits."""
    length = guess
    while start + length < end:
        if not fits(text[start : start + length]):
            return start + length
        length *= 2
    return None if fits(text[start:end]) else end


def _last_fitting(text: str, start: int, cuts: Sequence[int], fits: Fits) -> int | None:
    """The last of the ascending `cuts` up to which the text fits, by bisection."""
    fitting, failing = -1, len(cuts)
    while failing - fitting > 1:
        middle = (fitting + failing) // 2
        if fits(text[start : cuts[middle]]):
            fitting = middle
        else:
            failing = middle
    return cuts[fitting] if fitting >= 0 else None


def _joiner(text: str, cut: int, *, space: str, marked: bool) -> str:
    if cut + len(space) >= len(text):
        return ""
    if space:
        return " "
    unspaced = _CHINESE_OR_JAPANESE.search(text, cut - 1, cut + 1) or text[cut - 1] == "—"
    return " " if marked and not unspaced else ""


def _sentence_ends(text: str, end: int) -> Iterator[int]:
    for match in _STOPS.finditer(text, 0, end):
        if _ends_sentence(text, match):
            yield match.end()


def _ends_sentence(text: str, match: re.Match[str]) -> bool:
    stops, closing = match.groups()
    if not set(stops).isdisjoint(_UNSPACED_STOPS):
        return not (closing and _QUOTED_BEFORE.match(text, match.end()))
    following = _NEXT_WORD.match(text, match.end())
    if following is None or following[1].islower():
        return False
    return stops != "." or not _is_abbreviation(_word_before(text, match.start()))


def _word_before(text: str, position: int) -> str:
    # One character more than the longest abbreviation: a word that fills the slice is none.
    near = text[max(position - _MAX_ABBREVIATION - 1, 0) : position]
    return near[-1:].strip() and near.split()[-1].lstrip(_OPENING)


def _is_abbreviation(word: str) -> bool:
    """Whether a full stop after this word hardly ends a sentence: z. B., U.S., J. Smith, am 3. Mai."""
    if len(word) == 1:
        return word.isalnum()
    return "." in word or (len(word) == 2 and word.isdecimal()) or word.casefold() in _ABBREVIATIONS


def _clause_ends(text: str, end: int) -> Iterator[int]:
    for match in _CLAUSES.finditer(text, 0, end):
        position = match.end()
        if match[1] not in _CLAUSE_MARKS_BEFORE_SPACE or text[position : position + 1].isspace():
            yield position


def _cluster_boundary(text: str, start: int, cut: int) -> int:
    """The last position up to `cut` that splits no grapheme cluster; `cut` itself if there is none."""
    for position in range(cut, start, -1):
        if not _inside_cluster(text, start, position):
            return position
    return cut


def _inside_cluster(text: str, start: int, position: int) -> bool:
    """Whether the characters on both sides of `position` probably form one grapheme cluster."""
    before, after = text[position - 1], text[position : position + 1]
    if not after:
        return False
    if unicodedata.category(after).startswith("M") or after in "\u200c\u200d":
        return True
    # A zero-width joiner connects emoji, a virama (combining class 9) connects consonants.
    if before == "\u200d" or unicodedata.combining(before) == 9:
        return True
    if "\U0001f3fb" <= after <= "\U0001f3ff" or "\U000e0020" <= after <= "\U000e007f":  # skin, flag tags
        return True
    if "\ud800" <= before <= "\udbff" and "\udc00" <= after <= "\udfff":
        return True
    if "\u1160" <= after <= "\u11ff":  # vowels and finals of decomposed Hangul
        return True
    return _is_regional(after) and _regionals_before(text, start, position) % 2 == 1


def _is_regional(character: str) -> bool:
    return "\U0001f1e6" <= character <= "\U0001f1ff"


def _regionals_before(text: str, start: int, position: int) -> int:
    """How many regional indicators, which form flags in pairs, come right before `position`."""
    count = 0
    while position - count > start and _is_regional(text[position - count - 1]):
        count += 1
    return count
