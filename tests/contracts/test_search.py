"""What every registered search promises, on tables of logits that plain Python searches too."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.fakes import Table
from trmt.decoding.base import Hypothesis, Search
from trmt.decoding.beam import Beam, BeamState
from trmt.decoding.engine import Engine
from trmt.decoding.greedy import Greedy
from trmt.decoding.request import Batching, Request
from trmt.decoding.sampling import Sampling
from trmt.errors import BundleError, ConfigError
from trmt.registry import SEARCHES, resolve

BOS, EOS, BANNED = 1, 2, (0, 1)

VARIANTS = [
    *((name, {}) for name in SEARCHES),
    ("beam", {"size": 1}),
    ("beam", {"size": 3, "n_best": 3, "length_penalty": 1.0}),
    ("beam", {"size": 20, "n_best": 5, "length_penalty": 0.0}),
    ("sampling", {"samples": 3, "temperature": 0.7, "top_k": 4}),
    ("sampling", {"samples": 2, "temperature": 2.0, "top_p": 0.8}),
    ("sampling", {"temperature": 0.0}),
]


@pytest.fixture(params=VARIANTS, ids=lambda variant: "-".join([variant[0], *map(str, variant[1].values())]))
def search(request: pytest.FixtureRequest) -> Search:
    name, options = request.param
    return resolve(SEARCHES, name)(**options)


def scripted(vocabulary: int, *, seed: int, spread: float = 2.0, favourite: int | None = None) -> Tensor:
    """Random logits of the next token after two tokens; in large vocabularies after one."""
    generator = torch.Generator().manual_seed(seed)
    if vocabulary <= 32:
        logits = torch.randn(vocabulary, vocabulary, vocabulary, generator=generator) * spread
    else:
        logits = torch.randn(1, vocabulary, vocabulary, generator=generator) * spread
        logits[..., EOS] += 2 * spread  # or it would hardly ever be met
    if favourite is not None:
        logits[..., favourite] += 50
    return logits.expand(vocabulary, -1, -1)


def run(
    logits: Tensor, search: Search, requests: Sequence[Request], *, sentences: int = 64
) -> list[list[Hypothesis]]:
    """The hypotheses of each request."""
    engine = Engine(
        Table(logits), search, bos=BOS, eos=EOS, banned=BANNED, batching=Batching(sentences=sentences)
    )
    found = {id(request): hypotheses for request, hypotheses in engine.translate(requests)}
    return [found[id(request)] for request in requests]


def requests_of(count: int, *, most: int = 6) -> list[Request]:
    """Requests of different lengths and limits, some with prefixes."""
    return [
        Request(
            (5,) * (index % 4 + 1),
            max_tokens=index % most + 1,
            prefix=(4, 3)[: min(index % 3, index % most + 1)],
            key=index,
        )
        for index in range(count)
    ]


# The same in plain Python


def log_probabilities(logits: Tensor, request: Request) -> Callable[[tuple[int, ...]], dict[int, float]]:
    """The logarithm of the probability of each token that may follow a prefix."""

    def following(prefix: tuple[int, ...]) -> dict[int, float]:
        if len(prefix) < len(request.prefix):
            return {request.prefix[len(prefix)]: 0.0}
        if len(prefix) >= request.max_tokens:
            return {EOS: 0.0}
        before, last = (0, BOS, *prefix)[-2:]
        row = logits[before, last].double()
        row[list(BANNED)] = -math.inf
        return {token: value for token, value in enumerate(row.log_softmax(0).tolist()) if value > -math.inf}

    return following


def normalised(score: float, length: int, penalty: float) -> float:
    """Equation 14 of Wu et al. without coverage; the end-of-sentence token counts."""
    return score / ((5 + length) / 6) ** penalty


def ranked(ended: list[tuple[float, tuple[int, ...]]], penalty: float) -> list[Hypothesis]:
    """Finished sequences, the best first."""
    made = [Hypothesis(ids[:-1], score, normalised(score, len(ids), penalty)) for score, ids in ended]
    return sorted(made, key=lambda each: -each.normalised)


def all_translations(logits: Tensor, request: Request, penalty: float) -> list[Hypothesis]:
    """Every sequence there is, the best first."""
    following = log_probabilities(logits, request)
    living: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    ended = []
    while living:
        longer = [
            (score + log, (*ids, token)) for score, ids in living for token, log in following(ids).items()
        ]
        ended += [each for each in longer if each[1][-1] == EOS]
        living = [each for each in longer if each[1][-1] != EOS]
    return ranked(ended, penalty)


def slow_beam(logits: Tensor, request: Request, search: Beam) -> list[Hypothesis]:
    """Beam search to the end: a finished hypothesis keeps its slot, so the beam narrows."""
    following = log_probabilities(logits, request)
    living: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    ended: list[tuple[float, tuple[int, ...]]] = []
    while living and len(ended) < search.size:
        longer = [
            (score + log, (*ids, token)) for score, ids in living for token, log in following(ids).items()
        ]
        best = sorted(longer, key=lambda each: -each[0])[: search.size - len(ended)]
        ended += [each for each in best if each[1][-1] == EOS]
        living = [each for each in best if each[1][-1] != EOS]
    return ranked(ended, search.length_penalty)[: search.n_best]


def same(found: list[Hypothesis], expected: list[Hypothesis]) -> None:
    assert [each.ids for each in found] == [each.ids for each in expected]
    for one, other in zip(found, expected, strict=True):
        assert one.score == pytest.approx(other.score, abs=1e-4)
        assert one.normalised == pytest.approx(other.normalised, abs=1e-4)


# Every search


def test_any_batch_size_gives_the_same(search: Search) -> None:
    logits, requests = scripted(9, seed=1), requests_of(23)
    expected = run(logits, search, requests, sentences=1)
    for sentences in (2, 7, 64):
        assert run(logits, search, requests, sentences=sentences) == expected


def test_any_order_of_requests_gives_the_same(search: Search) -> None:
    logits, requests = scripted(9, seed=1), requests_of(23)
    backwards = run(logits, search, requests[::-1], sentences=5)
    assert backwards[::-1] == run(logits, search, requests, sentences=5)


@pytest.mark.parametrize("vocabulary", [7, 9, 700])
def test_bans_limits_and_prefixes_are_respected(search: Search, vocabulary: int) -> None:
    logits = scripted(vocabulary, seed=2, favourite=BANNED[0])
    for request, found in zip(requests := requests_of(30), run(logits, search, requests), strict=True):
        assert found
        for each in found:
            assert not set(each.ids) & {*BANNED, EOS}
            assert len(each.ids) <= request.max_tokens
            # A hypothesis may end before the limit, but not within the prefix.
            assert each.ids[: len(request.prefix)] == request.prefix


def test_scores_are_those_of_the_continuation(search: Search) -> None:
    logits, requests = scripted(9, seed=3), requests_of(30)
    for request, found in zip(requests, run(logits, search, requests), strict=True):
        following = log_probabilities(logits, request)
        for each in found:
            ids = (*each.ids, EOS)
            expected = sum(following(ids[:position])[token] for position, token in enumerate(ids))
            assert each.score == pytest.approx(expected, abs=1e-4)


def test_a_prefix_may_hold_what_is_banned_elsewhere(search: Search) -> None:
    (found,) = run(scripted(9, seed=4), search, [Request((5,), 4, prefix=(0, 4))])
    assert all(each.ids[:2] == (0, 4) and math.isfinite(each.score) for each in found)


def test_without_tokens_the_translation_is_empty(search: Search) -> None:
    (found,) = run(scripted(9, seed=4), search, [Request((5,), 0)])
    assert all(each.ids == () and each.score == 0 for each in found)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_logits_that_are_not_numbers_are_an_error(search: Search, poison: float) -> None:
    logits = scripted(9, seed=4).clone()
    logits[..., 5] = poison
    with pytest.raises(BundleError, match="not numbers"):
        run(logits, search, requests_of(3))


# Greedy search


@pytest.mark.parametrize("vocabulary", [9, 300])
@pytest.mark.parametrize("search", [Beam(size=1), Sampling(temperature=0.0), Sampling(temperature=1e-6)])
def test_searches_for_the_most_probable_token_equal_greedy(vocabulary: int, search: Search) -> None:
    requests = requests_of(20, most=12)
    for seed in range(10):
        logits = scripted(vocabulary, seed=seed)
        greedy, other = run(logits, Greedy(), requests), run(logits, search, requests)
        assert [found[0].ids for found in other] == [found[0].ids for found in greedy]
        assert [found[0].score for found in other] == [found[0].score for found in greedy]


def test_greedy_takes_the_most_probable_token_each_time() -> None:
    logits, requests = scripted(9, seed=5), requests_of(12, most=9)
    for request, (found,) in zip(requests, run(logits, Greedy(), requests), strict=True):
        following, ids = log_probabilities(logits, request), ()
        while not ids or ids[-1] != EOS:
            choices = following(ids)
            ids = (*ids, max(choices, key=choices.__getitem__))
        assert found.ids == ids[:-1]
        assert found.normalised == pytest.approx(found.score / len(ids))


# Beam search


@pytest.mark.parametrize("penalty", [0.0, 0.6, 2.0])
def test_a_wide_beam_finds_every_translation(penalty: float) -> None:
    requests = [
        Request((5,), 3),
        Request((5,), 1),
        Request((5,), 2, prefix=(3,)),
    ]
    for seed in range(5):
        logits = scripted(5, seed=seed, spread=1.0)
        found = run(logits, Beam(size=50, n_best=50, length_penalty=penalty), requests)
        for request, hypotheses in zip(requests, found, strict=True):
            expected = all_translations(logits, request, penalty)
            same(hypotheses, expected)


@pytest.mark.parametrize(
    "search",
    [
        Beam(size=4),
        Beam(size=4, n_best=4, length_penalty=1.0),
        Beam(size=2, n_best=2, length_penalty=0.0),
        Beam(size=5, n_best=3, length_penalty=3.0),
        Beam(size=12, n_best=2),  # more slots than tokens
    ],
)
@pytest.mark.parametrize("vocabulary", [9, 700])
def test_beam_equals_the_slow_beam_that_runs_to_the_end(search: Beam, vocabulary: int) -> None:
    requests = [
        Request((5,), 7),
        Request((5,), 4, prefix=(3, 4)),
        Request((5, 6), 2),
    ]
    for seed in range(3 if vocabulary > 32 else 15):
        logits = scripted(vocabulary, seed=seed, spread=[0.5, 1.0, 3.0][seed % 3])
        for request, found in zip(requests, run(logits, search, requests), strict=True):
            same(found, slow_beam(logits, request, search))


class BeamToTheEnd(Beam):
    """A beam that does not stop early."""

    def advance(self, logits_SKV: Tensor, state: BeamState) -> tuple[Tensor, Tensor, BeamState]:
        parents_SK, tokens_SK, state = super().advance(logits_SKV, state)
        return parents_SK, tokens_SK, replace(state, done_S=state.ended_S >= self.size)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("penalty", [0.0, 0.6, 1.0, 5.0])
def test_stopping_early_never_changes_the_result(tied: bool, penalty: float) -> None:
    requests = requests_of(8, most=10)
    for seed in range(20):
        logits = scripted(9, seed=seed, spread=1.5)
        logits = logits.round() if tied else logits
        for size, n_best in ((2, 1), (4, 1), (4, 3)):
            options: dict[str, Any] = {"size": size, "n_best": n_best, "length_penalty": penalty}
            early = run(logits, Beam(**options), requests)
            assert early == run(logits, BeamToTheEnd(**options), requests)


def test_n_best_lists_are_sorted_and_distinct() -> None:
    for seed, spread in itertools.product(range(5), (0.0, 1.0)):
        logits = scripted(9, seed=seed, spread=spread)
        for found in run(logits, Beam(size=6, n_best=6), requests_of(20)):
            order = [each.normalised for each in found]
            assert order == sorted(order, reverse=True)
            assert len({each.ids for each in found}) == len(found)


def test_a_beam_finds_what_greedy_misses() -> None:
    logits = torch.full((6, 6, 6), -9.0)
    logits[:, BOS, 3], logits[:, BOS, 4] = 1.0, 0.9  # 3 is more probable at first
    logits[:, 3, :] = 0.0
    logits[:, 4, EOS] = 9.0
    request = [Request((5,), 5)]
    assert run(logits, Greedy(), request)[0][0].ids[0] == 3
    assert run(logits, Beam(size=2), request)[0][0].ids == (4,)


# Sampling


def test_a_seed_decides_and_another_decides_otherwise() -> None:
    logits, requests = scripted(9, seed=6), requests_of(30)
    first = run(logits, Sampling(seed=1, samples=2), requests)
    assert run(logits, Sampling(seed=1, samples=2), requests) == first
    assert run(logits, Sampling(seed=2, samples=2), requests) != first
    renamed = [replace(request, key=request.key + 1) for request in requests]
    assert run(logits, Sampling(seed=1, samples=2), renamed) != first


def frequencies(found: list[tuple[int, ...]], choices: Sequence[tuple[int, ...]]) -> Tensor:
    return torch.tensor([found.count(each) for each in choices]) / len(found)


def near(observed: Tensor, expected: Tensor, count: int) -> None:
    """Within 4.5 standard deviations everywhere; a correct sampler fails with one seed in thousands."""
    deviation = (expected * (1 - expected) / count).sqrt()
    assert ((observed - expected).abs() <= 4.5 * deviation + 1e-6).all(), (observed, expected)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_samples_follow_the_distribution(temperature: float) -> None:
    count, logits = 20_000, scripted(5, seed=7, spread=1.0)
    (found,) = run(logits, Sampling(samples=count, temperature=temperature), [Request((5,), 2)])
    sharpened = log_probabilities(logits / temperature, Request((5,), 2))
    expected = {
        (*((first,) if first != EOS else ()), *((second,) if second != EOS else ())): math.exp(one + two)
        for first, one in sharpened(()).items()
        for second, two in (sharpened((first,)) if first != EOS else {EOS: 0.0}).items()
    }
    ids = [each.ids for each in found]
    near(frequencies(ids, list(expected)), torch.tensor(list(expected.values())), count)


def test_sentences_draw_independent_numbers() -> None:
    count, logits = 4_000, scripted(5, seed=8, spread=0.5)
    found = run(logits, Sampling(), [Request((5,), 1, key=key) for key in range(count)], sentences=1000)
    expected = {() if token == EOS else (token,): math.exp(log)
                for token, log in log_probabilities(logits, Request((5,), 1))(()).items()}  # fmt: skip
    firsts = [each.ids for (each,) in found]
    near(frequencies(firsts, list(expected)), torch.tensor(list(expected.values())), count)
    pairs = list(itertools.product(expected, expected))
    # Neighbouring keys must not be alike.
    together = torch.tensor([sum(pair == each for each in itertools.pairwise(firsts)) for pair in pairs])
    chances = torch.tensor([expected[one] * expected[other] for one, other in pairs])
    near(together / (count - 1), chances, count // 2)


def chosen(logits: list[float], search: Sampling) -> Tensor:
    """How often each token comes first, the end of the sentence among them."""
    table = torch.tensor(logits).expand(len(logits), len(logits), -1)
    (found,) = run(table, search, [Request((5,), 1)])
    return torch.tensor([each.ids[0] if each.ids else EOS for each in found]).bincount(
        minlength=len(logits)
    ) / len(found)


LOGS = [9.0, 9.0, *torch.tensor([0.10, 0.45, 0.25, 0.15, 0.05]).log().tolist()]  # tokens 2 to 6


@pytest.mark.parametrize(
    ("options", "allowed"),
    [
        ({"top_k": 1}, {3}),
        ({"top_k": 3}, {3, 4, 5}),
        ({"top_k": 99}, {2, 3, 4, 5, 6}),
        ({"top_p": 0.01}, {3}),
        ({"top_p": 0.44}, {3}),
        ({"top_p": 0.6}, {3, 4}),
        ({"top_p": 0.8}, {3, 4, 5}),
        ({"top_p": 0.97}, {2, 3, 4, 5, 6}),
        ({"top_k": 2, "top_p": 0.9}, {3, 4}),
    ],
)
def test_top_k_and_top_p_keep_what_they_must(options: dict[str, Any], allowed: set[int]) -> None:
    count = 5_000
    share = torch.tensor([0.0, 0.0, 0.10, 0.45, 0.25, 0.15, 0.05])
    share[[token for token in range(7) if token not in allowed]] = 0
    near(chosen(LOGS, Sampling(samples=count, **options)), share / share.sum(), count)


def test_every_random_number_has_a_token() -> None:
    search = Sampling(samples=3)
    logits_SKV = torch.tensor([[[0.0, 1.0, -math.inf, 2.0]]]).expand(1, 3, -1)
    random_SK1 = torch.tensor([0.0, 0.5, 1 - 2**-24])[None, :, None]
    assert search._choose(logits_SKV, random_SK1).tolist() == [[3, 3, 0]]


# Options that cannot work


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (Beam, {"size": 0}),
        (Beam, {"length_penalty": -1.0}),
        (Beam, {"length_penalty": 10.5}),
        (Beam, {"length_penalty": math.nan}),
        (Beam, {"size": 2, "n_best": 3}),
        (Beam, {"n_best": 0}),
        (Sampling, {"temperature": -0.1}),
        (Sampling, {"temperature": math.nan}),
        (Sampling, {"top_p": 0.0}),
        (Sampling, {"top_p": 1.1}),
        (Sampling, {"top_k": -1}),
        (Sampling, {"samples": 0}),
    ],
)
def test_options_that_cannot_work_are_refused(kind: type[Search], options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        kind(**options)
