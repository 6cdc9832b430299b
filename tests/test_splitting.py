from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from tests import texts
from trmt.text.splitting import TextSegment, split_text


def at_most(characters: int) -> Callable[[str], bool]:
    return lambda text: len(text) <= characters


def words_at_most(words: int) -> Callable[[str], bool]:
    return lambda text: len(text.split()) <= words


def split(text: str, fits: Callable[[str], bool]) -> list[str]:
    segments = split_text(text, fits)
    assert joined(segments) == text
    return [segment.text for segment in segments]


def joined(segments: list[TextSegment]) -> str:
    return "".join(segment.text + segment.space for segment in segments)


def hostile(chooser: random.Random) -> str:
    """Punctuation marks, white space, clusters and plain letters in random order."""
    alphabet = [*"abcABC019 \n\t\r\0.!?…,;:—\"'”»)([“", *"。！？、，」』「की्षिتا،؟\u200c\u200d\u0301\u3000"]
    alphabet += ["👩🏽\u200d🚀", "🇩🇪", "각", "\ud83d", "z. B. ", "Dr. ", "3.5", "    ", "wort" * 5, "Satz. "]
    return "".join(chooser.choice(alphabet) for _ in range(chooser.randrange(120)))


@pytest.mark.parametrize("seed", range(40))
def test_nothing_is_lost_and_every_segment_fits(seed: int) -> None:
    chooser = random.Random(seed)
    for _ in range(25):
        text, limit = hostile(chooser), chooser.choice([1, 2, 3, 7, 20, 64, 65, 200])
        segments = split_text(text, at_most(limit))
        assert joined(segments) == text
        assert all(len(segment.text) <= limit for segment in segments)
        assert all(segment.space.isspace() or not segment.space for segment in segments)
        assert segments[-1].joiner == ""
        assert all(segment.text for segment in segments) or not text.strip()


@pytest.mark.parametrize("seed", range(10))
def test_a_fit_that_is_not_monotone_works(seed: int) -> None:
    # Like numbers of tokens: a longer text may have fewer of them, because a word is complete.
    def fits(text: str) -> bool:
        return len(text) <= 1 or len(text) + hash_of(text) % 4 <= 20

    def hash_of(text: str) -> int:
        return sum(map(ord, text)) * 2654435761 >> 7

    text = hostile(random.Random(seed)) * 3
    segments = split_text(text, fits)
    assert joined(segments) == text
    assert all(fits(segment.text) for segment in segments)


def test_a_text_that_fits_is_one_segment() -> None:
    assert split_text("One. Two.", at_most(9)) == [TextSegment("One. Two.", "", "")]
    assert split_text("One. Two. \r", at_most(9)) == [TextSegment("One. Two.", " \r", "")]
    assert split_text("", at_most(9)) == [TextSegment("", "", "")]
    assert split_text("  ", at_most(1)) == [TextSegment("", "  ", "")]


def test_a_segment_has_as_many_sentences_as_fit() -> None:
    text = "One two. Three four! Five six? Seven eight nine. Ten."
    assert split(text, words_at_most(5)) == ["One two. Three four!", "Five six? Seven eight nine.", "Ten."]
    assert split(text, words_at_most(7)) == ["One two. Three four! Five six?", "Seven eight nine. Ten."]


@pytest.mark.parametrize("language", ["en", "de", "zh", "ar", "fa", "hi"])
def test_whole_sentences_are_kept_in_every_script(language: str) -> None:
    sentences = texts.ALL[language][1:]  # the first one ends in a number, which could be an ordinal
    longest = max(map(len, sentences))
    space = "" if language == "zh" else " "
    segments = split_text(space.join(sentences), at_most(longest))
    ends = {sentence[-8:] for sentence in sentences}
    assert all(segment.text[-8:] in ends for segment in segments)
    assert len(segments) <= len(sentences)
    assert {segment.joiner for segment in segments[:-1]} == {space}


@pytest.mark.parametrize(
    "text",
    [
        "Er kennt Dr. Müller, sonst aber wirklich niemanden.",
        "Das gilt z. B. Freitags, sonst aber eigentlich nie.",
        "Es spielt J. Brahms, ein ganz großer alter Meister.",
        "Wir sehen uns am 3. Mai, also schon sehr bald wieder.",
        "Wir sehen uns am 13. Mai, also schon sehr bald wieder.",
        "She left the U.S. Senate, where she had been for years.",
        "Sie zahlen bzw. Wir zahlen, je nachdem wer Zeit hat.",
        '"Stop right there!" she said, then she ran off home.',
        "「もう少し早く行きます。」と彼は言った、それから静かに寝た。",
    ],
)
def test_abbreviations_and_ordinals_do_not_end_a_sentence(text: str) -> None:
    comma = max(text.find(","), text.find("、")) + 1
    assert split(text, at_most(len(text) - 5)) == [text[:comma], text[comma:].strip()]


def test_sentence_ends_after_abbreviations_are_found() -> None:
    text = "Das gilt z. B. Für Dr. Müller am 3. Mai. Danach, sagt er, ist Schluss."
    assert split(text, at_most(60)) == [text[:40], "Danach, sagt er, ist Schluss."]
    text = "Mr. Smith of the U.S. Senate came. He left, and then nothing happened."
    assert split(text, at_most(55)) == [text[:34], "He left, and then nothing happened."]


def test_decimals_times_and_addresses_are_not_split() -> None:
    text = "It rose 3.5 or 1,200.75 at 7:45 says www.example.com/a,b today. Then it fell."
    assert split(text, at_most(70)) == [text[:-14], "Then it fell."]
    assert split("pay 1,200.75 now", at_most(12)) == ["pay 1,200.75", "now"]


def test_closing_quotes_stay_with_their_sentence() -> None:
    assert split('He said "Stop!" She stopped.', at_most(20)) == ['He said "Stop!"', "She stopped."]
    assert split("„Halt!“, rief er. „Nein.“ Sie lief.", at_most(26)) == [
        "„Halt!“, rief er. „Nein.“",
        "Sie lief.",
    ]
    assert split('"Stop!" she said. Then.', at_most(18)) == ['"Stop!" she said.', "Then."]


def test_chinese_and_japanese() -> None:
    segments = split_text("他说：“你好！”然后走了。我们也走了。", at_most(13))
    assert [segment.text for segment in segments] == ["他说：“你好！”然后走了。", "我们也走了。"]
    assert [segment.joiner for segment in segments] == ["", ""]
    assert split("「行きます。」と彼は言った。雨だ。", at_most(15)) == [
        "「行きます。」と彼は言った。",
        "雨だ。",
    ]
    assert split("「もう行くの？」彼女は聞いた。", at_most(12)) == ["「もう行くの？」", "彼女は聞いた。"]
    assert split("春が来て、花が咲いて、鳥が鳴いた。", at_most(12)) == [
        "春が来て、花が咲いて、",
        "鳥が鳴いた。",
    ]
    assert [segment.joiner for segment in split_text("这是第一句。This is second. Third.", at_most(16))] == [
        "",
        " ",
        "",
    ]


def test_a_long_sentence_is_split_at_clause_marks_then_at_white_space() -> None:
    text = "When it rains, the river rises; when it snows the lake freezes over and people skate"
    assert split(text, at_most(40)) == [
        "When it rains, the river rises;",
        "when it snows the lake freezes over and",
        "people skate",
    ]
    assert [segment.joiner for segment in split_text("wait—what", at_most(6))] == ["", ""]


def test_words_are_split_last_and_never_inside_a_grapheme_cluster() -> None:
    assert split("ab cdefghij", at_most(4)) == ["ab", "cdef", "ghij"]
    clusters = ["e\u0301", "👩🏽\u200d🚀", "🇩🇪", "क्षि", "각", "❤\ufe0f"]
    for cluster in clusters:
        for extra in range(len(cluster)):
            segments = split(cluster * 40, at_most(2 * len(cluster) + extra))
            assert segments == [cluster * 2] * 20
    assert split("e" + "\u0301" * 5, at_most(2)) == ["e\u0301", "\u0301\u0301", "\u0301\u0301"]


def test_joiners_follow_the_script_of_the_text() -> None:
    def joiners(text: str, limit: int) -> list[str]:
        return [segment.joiner for segment in split_text(text, at_most(limit))]

    assert joiners("One.\nTwo.", 5) == [" ", ""]
    assert joiners("यह एक है।वह दो है।", 10) == [" ", ""]
    assert joiners("一。二。", 3) == ["", ""]
    assert joiners("abcdef", 3) == ["", ""]


@pytest.mark.parametrize(
    "unit", ["a", "a ", "A. ", "。", ".", '"', " ", "，", "🇩", "\u0301", "Ab, ", "\u200d", "z. B. "]
)
def test_the_work_grows_with_the_text_and_not_with_its_square(unit: str) -> None:
    asked = characters = 0

    def fits(text: str) -> bool:
        nonlocal asked, characters
        asked += 1
        characters += len(text)
        return len(text) <= 250

    text = unit * (100_000 // len(unit))
    segments = split_text(text, fits)
    assert joined(segments) == text
    assert asked <= 40 * len(segments) + 40
    assert characters <= 20 * 2 * len(text) + 1000
