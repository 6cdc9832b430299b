"""Subword sampling compared with enumerations by hand, without a sentencepiece model."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterator, Mapping

import pytest

from trmt.text import subwords
from trmt.text.subwords import MAX_WORD_PIECES, WORD_MARK, Sampler, draw_from_lattice, merge_with_dropout

DRAWS = 20_000
FIXED, OTHER = 0, 1  # ids that are never changed
PIECES = [None, None, f"{WORD_MARK}a", "ab", f"{WORD_MARK}ab", WORD_MARK, "a", "b", "c"]
UNIGRAM_SCORES = [0.0, 0.0, -2.5, -3.5, -4.25, -1.5, -2.0, -3.0, -5.5]
KINDS = {"bpe": [0.0, 0.0, *map(float, range(0, -7, -1))], "unigram": UNIGRAM_SCORES}


def sampler(kind: str, *, alpha: float = 0.3) -> Sampler:
    return Sampler(PIECES, KINDS[kind], alpha=alpha)


def some_sentences(count: int, *, seed: int = 0) -> list[list[int]]:
    chooser = random.Random(seed)
    return [chooser.choices(range(len(PIECES)), k=chooser.randrange(40)) for _ in range(count)]


def spelled(ids: list[int]) -> str:
    return "".join(PIECES[token] or f"<{token}>" for token in ids)


def segmentations(text: str, pieces: Mapping[str, float]) -> Iterator[tuple[str, ...]]:
    if not text:
        yield ()
    for end in range(1, len(text) + 1):
        if text[:end] in pieces:
            yield from ((text[:end], *rest) for rest in segmentations(text[end:], pieces))


def frequencies(drawn: Counter[tuple[str, ...]]) -> dict[tuple[str, ...], float]:
    return {segments: count / drawn.total() for segments, count in drawn.items()}


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_segmentations_are_drawn_by_their_probability(alpha: float) -> None:
    pieces = {"a": -1.0, "b": -2.5, "ab": -2.0, "ba": -4.0, "aba": -3.0, "bab": -5.0}
    text = "abab"
    all_of_them = list(segmentations(text, pieces))
    weights = [math.exp(alpha * sum(pieces[segment] for segment in each)) for each in all_of_them]
    expected = {each: weight / sum(weights) for each, weight in zip(all_of_them, weights, strict=True)}
    generator = random.Random(1)
    drawn = Counter(tuple(draw_from_lattice(text, pieces, alpha, generator)) for _ in range(DRAWS))
    assert frequencies(drawn) == pytest.approx(expected, abs=0.015)


def test_the_lattice_skips_positions_where_no_piece_ends() -> None:
    pieces = {"ab": -1.0, "abc": -1.0, "c": -1.0}
    ways = {tuple(draw_from_lattice("ababc", pieces, 0.5, random.Random(seed))) for seed in range(50)}
    assert ways == {("ab", "ab", "c"), ("ab", "abc")}


def test_long_words_do_not_underflow() -> None:
    pieces = {"a": -30.0, "aa": -60.0}
    assert "".join(draw_from_lattice("a" * 300, pieces, 1.0, random.Random(0))) == "a" * 300


def test_dropout_drops_each_merge_with_probability_alpha_at_each_step() -> None:
    # "ab" is merged first unless it is dropped, then "bc"; nothing is merged if both are dropped.
    alpha, pieces = 0.3, {"a": -3.0, "b": -4.0, "c": -5.0, "ab": 0.0, "bc": -1.0}
    generator = random.Random(1)
    drawn = Counter(tuple(merge_with_dropout("abc", pieces, alpha, generator)) for _ in range(DRAWS))
    expected = {("ab", "c"): 0.7, ("a", "bc"): 0.3 * 0.7, ("a", "b", "c"): 0.3 * 0.3}
    assert frequencies(drawn) == pytest.approx(expected, abs=0.015)


def test_without_dropout_merges_go_by_score_and_then_from_the_left() -> None:
    pieces = {"a": -3.0, "b": -4.0, "aa": -1.0, "ab": 0.0, "aab": -2.0}
    assert merge_with_dropout("aaab", pieces, 0.0, random.Random(0)) == ["aa", "ab"]
    assert merge_with_dropout("aaa", pieces, 0.0, random.Random(0)) == ["aa", "a"]
    assert merge_with_dropout("aab", pieces, 1.0, random.Random(0)) == ["a", "a", "b"]


@pytest.mark.parametrize("kind", KINDS)
def test_text_and_fixed_pieces_are_kept(kind: str) -> None:
    sentences = [[], *some_sentences(200), []]
    drawn = sampler(kind).sample(sentences, seed=3)
    assert [spelled(sentence) for sentence in drawn] == [spelled(sentence) for sentence in sentences]
    assert drawn != sentences
    assert sampler(kind).sample([], seed=3) == []


@pytest.mark.parametrize("kind", KINDS)
def test_results_are_these_in_every_process_and_version(kind: str) -> None:
    """A change of these draws breaks the exact resuming of existing runs."""
    expected = {
        "bpe": [[0, 5, 3, 8, 3, 7, 5, 6, 6, 1, 3, 6, 7, 4, 7], [7, 5, 3, 3, 6, 7, 1, 6, 4, 3, 8, 5, 6, 7, 0]],
        "unigram": [
            [0, 5, 3, 8, 6, 7, 7, 2, 6, 1, 3, 6, 7, 5, 6, 7, 7],
            [7, 2, 7, 3, 3, 1, 6, 5, 3, 3, 8, 4, 0],
        ],
    }
    sentence = [FIXED, 4, 8, 3, 7, 2, 6, OTHER, 3, 3, 4, 7]
    assert sampler(kind).sample([sentence, sentence[::-1]], seed=12345) == expected[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_earlier_draws_change_nothing(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sentences = some_sentences(50)
    fresh = sampler(kind).sample(sentences, seed=1)
    used = sampler(kind)
    assert used.sample(sentences, seed=2) != fresh
    assert used.sample(sentences, seed=1) == fresh
    monkeypatch.setattr(subwords, "CACHED_CANDIDATES", 3)
    assert sampler(kind).sample(sentences, seed=1) == fresh


def test_merges_stay_within_words_and_fixed_pieces() -> None:
    drawn = sampler("bpe", alpha=0.0).sample([[5, 6, 7, FIXED, 6, 7, 6], [7, 5, 6, 7]], seed=0)
    assert drawn == [[4, FIXED, 3, 6], [7, 4]], "merged within words, and not across"


def test_a_long_word_is_split() -> None:
    [drawn] = sampler("bpe", alpha=0.0).sample([[8] * (MAX_WORD_PIECES - 1) + [6, 7]], seed=0)
    assert drawn == [8] * (MAX_WORD_PIECES - 1) + [6, 7], "the split is between the two that would merge"


def test_a_word_with_a_character_without_a_piece_is_not_changed() -> None:
    lacking = Sampler(["xy", "x", f"{WORD_MARK}x"], [-0.0, -1.0, -2.0], alpha=0.9)
    sentence = [0, 1, 2, 0]
    assert all(lacking.sample([sentence], seed=seed) == [sentence] for seed in range(50))


def test_every_candidate_is_drawn() -> None:
    """For one word at alpha 0.3, many seeds give the merged word and its alternatives."""
    found = {tuple(sampler("bpe").sample([[4]], seed=seed)[0]) for seed in range(200)}
    assert {(4,), (5, 3), (2, 7)} <= found
