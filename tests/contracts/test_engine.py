"""The decode loop with every architecture and every way to run steps: it is naive decoding, in any batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from tests.fakes import VOCABULARY, Table, random_sentences, small_network
from tests.variants import Variant, parametrised, variants
from trmt.decoding.base import Hypothesis, Search
from trmt.decoding.batch import Batch, BatchDecoder
from trmt.decoding.beam import Beam
from trmt.decoding.engine import Engine, Runs
from trmt.decoding.greedy import Greedy
from trmt.decoding.request import Batching, Request
from trmt.decoding.sampling import Sampling
from trmt.nets.base import Decoding, Precision, Seq2Seq, State, Stepper
from trmt.nets.ragged import Ragged, Source
from trmt.registry import ARCHITECTURES, resolve

BOS, EOS, BANNED = 1, 2, (0, 1, 3)
RUNS: tuple[Runs, ...] = ("direct", "graphs")
SEARCHES: list[Search] = [
    Greedy(), Beam(size=4, n_best=2), Beam(size=20), Sampling(samples=2), Sampling(top_k=5, temperature=0.7),
]  # fmt: skip
LARGER = {
    "max_positions": 200,
    "d_model": 64,
    "feed_forward": 256,
    "heads": 4,
    "source_vocabulary": 200,
    "target_vocabulary": 200,
}
CLOSE = 1e-4  # of scores


def sharp_network(variant: Variant, **sizes: Any) -> Seq2Seq:
    """A random network, with the sizes that its config has fields for."""
    known = resolve(ARCHITECTURES, variant.name).config_class.__dataclass_fields__
    options = {name: value for name, value in sizes.items() if name in known}
    net = small_network(variant.name, **{**options, **variant.options})
    with torch.no_grad():
        # Sharper than untrained networks are, so that translations differ and some end by themselves.
        for parameter in net.parameters():
            parameter.mul_(1.5)
    return net


@pytest.fixture(params=parametrised())
def net(request: pytest.FixtureRequest) -> Seq2Seq:
    return sharp_network(request.param)


def engine_of(runs: Runs, net: Seq2Seq, search: Search, **options: Any) -> Engine:
    batching = Batching(sentences=options.pop("sentences", 64))
    options = {"bos": BOS, "eos": EOS, "banned": BANNED, "batching": batching, **options}
    return Engine(net, search, runs=runs, **options)


def translated(engine: Engine, requests: Sequence[Request]) -> list[list[Hypothesis]]:
    """The hypotheses of each request; their keys must be different."""
    found = {request.key: hypotheses for request, hypotheses in engine.translate(requests)}
    assert sorted(found) == sorted(request.key for request in requests)
    return [found[request.key] for request in requests]


def requests_of(count: int, *, longest: int, seed: int = 3) -> list[Request]:
    """Random sentences with limits and some prefixes."""
    return [
        Request((*sentence, EOS), 3 + len(sentence) * 3 // 2, prefix=(7, 9)[: index % 7 % 3], key=index)
        for index, sentence in enumerate(random_sentences(count, longest=longest, seed=seed))
    ]


# Naive decoding: no cache, no batch, the whole prefix again at each step


@torch.inference_mode()
def naive(net: Seq2Seq, request: Request, *, size: int, penalty: float) -> list[Hypothesis]:
    """Beam search by hand; with a size of 1 it is greedy."""
    living: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    ended: list[tuple[float, tuple[int, ...]]] = []
    while living and len(ended) < size:
        longer = []
        for score, ids in living:
            if len(ids) < len(request.prefix):
                following = [(0.0, request.prefix[len(ids)])]
            elif len(ids) >= request.max_tokens:
                following = [(0.0, EOS)]
            else:
                hidden = net(Source.of([request.source]), Ragged.of([[BOS, *ids]])).hidden[-1]
                logits = net.readout(hidden).double()
                logits[list(BANNED)] = -torch.inf
                logs = logits.log_softmax(0)
                following = [(float(logs[token]), token) for token in range(len(logs)) if token not in BANNED]
            longer += [(score + log, (*ids, token)) for log, token in following]
        best = sorted(longer, key=lambda each: -each[0])[: size - len(ended)]
        ended += [each for each in best if each[1][-1] == EOS]
        living = [each for each in best if each[1][-1] != EOS]
    made = [Hypothesis(ids[:-1], score, score / ((5 + len(ids)) / 6) ** penalty) for score, ids in ended]
    return sorted(made, key=lambda each: -each.normalised)


def assert_close(found: Sequence[Hypothesis], expected: Sequence[Hypothesis]) -> None:
    """The same hypotheses in the same order, but for those whose scores are all but equal."""
    for one, other in zip(found, expected, strict=False):
        assert one.score == pytest.approx(other.score, abs=CLOSE)
        tied = [each.ids for each in expected if abs(each.score - one.score) < CLOSE]
        assert one.ids in tied or expected[-1].ids in tied  # if that is tied, so may be what comes next
    assert len(found) <= len(expected)
    if len({each.ids for each in expected}) == len(expected):  # samples may be equal
        assert len({each.ids for each in found}) == len(found)


@pytest.mark.parametrize("size", [1, 4])
def test_it_equals_naive_decoding(net: Seq2Seq, size: int) -> None:
    requests = requests_of(10, longest=8)
    search = Beam(size=size, n_best=size) if size > 1 else Greedy()
    expected = [naive(net, request, size=size, penalty=0.6) for request in requests]
    for runs in RUNS:
        found = translated(engine_of(runs, net, search), requests)
        assert any(each[0].ids for each in found) and len({each[0].ids for each in found}) > 3
        for one, other in zip(found, expected, strict=True):
            assert_close(one, other)


@torch.inference_mode()
def test_sampled_scores_are_those_of_the_network(net: Seq2Seq) -> None:
    requests = requests_of(6, longest=8)
    found = translated(engine_of("direct", net, Sampling(temperature=0.7, top_p=0.9)), requests)
    for request, (hypothesis,) in zip(requests, found, strict=True):
        ids = (*hypothesis.ids, EOS)
        hidden = net(Source.of([request.source]), Ragged.of([[BOS, *ids[:-1]]])).hidden
        logits = net.readout(hidden).double()
        logits[:, list(BANNED)] = -torch.inf
        logs = logits.log_softmax(1)[range(len(ids)), list(ids)]
        counted = logs[len(request.prefix) : request.max_tokens]
        assert hypothesis.score == pytest.approx(float(counted.sum()), abs=CLOSE)


# The same bits whatever the batch

# Kernels of trmt.native compute each row by itself. On AMD processors, what MKL returns with several threads
# depends on where a row lies in memory: there, plain PyTorch is only close.
ENVIRONMENT = {"KMP_BLOCKTIME": "0", "GOMP_SPINCOUNT": "0"}
CPU = Path("/proc/cpuinfo")
INTEL = not CPU.exists() or "GenuineIntel" in CPU.read_text(encoding="utf-8")


def unequal(
    *,
    count: int,
    longest: int,
    batches: Sequence[int],
    searches: int = 5,
    defaults: bool = True,
    precision: Precision = "fp32",
) -> list[str]:
    """Where the batch size changed ids or the last bit of a score, as sentences."""
    differences = []
    requests = requests_of(count, longest=longest)
    for variant in variants(defaults=defaults):
        net = sharp_network(variant, **LARGER)
        plain = engine_of("direct", net, Greedy()).decoder.stepper.static
        exactly = INTEL or not plain or torch.get_num_threads() == 1
        for search in SEARCHES[:searches]:
            first, *others = (
                translated(
                    engine_of("direct", net, search, sentences=sentences, precision=precision), requests
                )
                for sentences in batches
            )
            for sentences, other in zip(batches[1:], others, strict=True):
                ids = sum([h.ids for h in a] != [h.ids for h in b] for a, b in zip(first, other, strict=True))
                scores = sum(not alike(a, b, exactly) for a, b in zip(first, other, strict=True))
                if ids or scores:
                    differences.append(
                        f"{variant} {search} batches of {sentences}: {ids} ids, {scores} scores of {count}"
                    )
    return differences


def alike(some: list[Hypothesis], others: list[Hypothesis], exactly: bool) -> bool:
    """Whether the scores of two lists are the same bits, or close."""
    pairs = zip(some, others, strict=True)
    return (
        some == others if exactly else all(abs(one.score - other.score) < 10 * CLOSE for one, other in pairs)
    )


def unequal_with(threads: int, **sizes: Any) -> list[str]:
    """What `unequal` returns in a fresh process with this many threads."""
    code = (
        f"import json, torch; torch.set_num_threads({threads})\n"
        "from tests.contracts.test_engine import unequal\n"
        f"print(json.dumps(unequal(**{sizes!r})))"
    )
    environment = {**os.environ, **ENVIRONMENT, "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-c", code]
    answer = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return json.loads(answer.stdout)


@pytest.mark.parametrize("threads", [1, 2])
def test_the_batch_size_changes_no_bit(threads: int) -> None:
    assert unequal_with(threads, count=10, longest=12, batches=(1, 3, 10), searches=3) == []


def test_the_batch_size_changes_no_bit_in_int8() -> None:
    assert unequal_with(1, count=10, longest=12, batches=(1, 10), searches=2, precision="int8") == []


@pytest.mark.slow
def test_the_batch_size_changes_no_bit_of_any_variant() -> None:
    assert unequal_with(1, count=10, longest=12, batches=(1, 3, 10), defaults=False) == []


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2])
def test_large_batches_and_long_sentences_change_no_bit(threads: int) -> None:
    assert unequal_with(threads, count=130, longest=30, batches=(16, 64), searches=2) == []
    assert unequal_with(threads, count=8, longest=90, batches=(1, 3, 8), searches=2) == []


# The loop itself


def random_table() -> Table:
    return Table(torch.randn(VOCABULARY, VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("runs", RUNS)
def test_there_may_be_no_requests(runs: Runs) -> None:
    assert list(engine_of(runs, random_table(), Greedy()).translate([])) == []


def test_equal_requests_are_answered_one_by_one() -> None:
    requests = [Request((5, 6, EOS), 9)] * 3
    found = list(engine_of("direct", random_table(), Greedy()).translate(requests))
    assert [request for request, _ in found] == requests
    assert len({hypotheses[0] for _, hypotheses in found}) == 1


def test_finished_sentences_come_before_the_batch_ends() -> None:
    requests = [Request((5, EOS), 1 if index else 30, prefix=(7,), key=index) for index in range(8)]
    engine = engine_of("direct", random_table(), Beam(), banned=(*BANNED, EOS))
    order = [request.key for request, _ in engine.translate(requests)]
    assert sorted(order) == list(range(8)) and order[-1] == 0


class RecordedStepper(Stepper):
    """Records the lengths of the sources that were started together, and the rows of each step."""

    def __init__(self, stepper: Stepper) -> None:
        self.stepper, self.readout = stepper, stepper.readout
        self.started: list[list[int]] = []
        self.rows: list[int] = []

    def start(self, source: Source, decoding: Decoding) -> State:
        self.started.append(source.lengths_S.tolist())
        return self.stepper.start(source, decoding)

    def step(self, tokens_SKT: Tensor, state: State) -> tuple[Tensor, State]:
        self.rows.append(len(tokens_SKT))
        return self.stepper.step(tokens_SKT, state)

    def same_beside_others(self, decoding: Decoding) -> bool:
        return self.stepper.same_beside_others(decoding)


def recorded(batching: Batching, sizes: Sequence[tuple[int, int]]) -> RecordedStepper:
    """Decode sentences of (source tokens, limit), of which none ends before its limit."""
    requests = [Request((5,) * length, limit, key=key) for key, (length, limit) in enumerate(sizes)]
    engine = engine_of("direct", random_table(), Greedy(), banned=[EOS], batching=batching)
    recording = engine.decoder.stepper = RecordedStepper(engine.decoder.stepper)
    assert [len(found[0].ids) for found in translated(engine, requests)] == [limit for _, limit in sizes]
    return recording


def test_a_batch_holds_no_more_source_tokens_than_it_may() -> None:
    sizes = [(length, 1) for length in (3, 9, 1, 9, 2, 40, 5)]
    started = recorded(Batching(sentences=4, tokens=18), sizes).started
    assert started == [[40], [9, 9], [5, 3, 2], [1]]


def test_sentences_take_the_slots_of_finished_ones() -> None:
    found = recorded(Batching(sentences=8), [(8, 2 if index % 2 else 40) for index in range(40)])
    assert sum(map(len, found.started)) == 40
    assert len(found.started) > 5, "in five batches of 8, no slot was taken again"
    # 20 * 40 and 20 * 2 tokens, nearly all of them in full batches.
    assert max(found.rows) == 8 and sum(found.rows) < 1.5 * (20 * 40 + 20 * 2)


def test_much_shorter_sentences_wait_for_the_next_batch() -> None:
    sizes = [*[(30, 9)] * 3, (30, 2), (4, 9)]
    assert recorded(Batching(sentences=4), sizes).started == [[30] * 4, [4]]


def test_where_neighbours_could_change_bits_no_sentence_joins_a_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Table, "same_beside_others", lambda self, decoding: False)
    sizes = [(8, 2 if index % 2 else 9) for index in range(12)]
    assert recorded(Batching(sentences=4), sizes).started == [[8] * 4] * 3


@pytest.mark.parametrize("sentences", [1, 3, 64])
@pytest.mark.parametrize("runs", RUNS)
def test_an_engine_that_was_left_in_the_middle_starts_anew(runs: Runs, sentences: int) -> None:
    requests = requests_of(9, longest=8)
    engine = engine_of(runs, random_table(), Beam(), sentences=sentences)
    expected = translated(engine, requests)
    next(engine.translate(requests))
    assert translated(engine, requests) == expected
    assert engine.shrink() == (sentences > 1)
    assert translated(engine, requests) == expected


class RecordedDecoder(BatchDecoder):
    """Remembers which batches there were, without keeping them."""

    started: ClassVar[list[weakref.ref[Batch]]] = []

    def start(self, requests: Sequence[Request], max_tokens: int, *, static: bool = False) -> Batch:
        batch = super().start(requests, max_tokens, static=static)
        if len(self.started) == 3:
            raise torch.OutOfMemoryError("no memory for another batch")
        self.started.append(weakref.ref(batch))
        return batch


@pytest.mark.parametrize("runs", RUNS)
def test_batches_are_freed_when_all_is_decoded_or_memory_is_short(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(runs, random_table(), Greedy(), sentences=2)
    monkeypatch.setattr(RecordedDecoder, "started", [])
    engine.decoder.__class__ = RecordedDecoder
    translated(engine, requests_of(1, longest=8))
    assert RecordedDecoder.started and not any(batch() for batch in RecordedDecoder.started)
    RecordedDecoder.started.clear()
    with pytest.raises(torch.OutOfMemoryError):
        translated(engine, requests_of(9, longest=8))
    engine.shrink()
    assert not any(batch() for batch in RecordedDecoder.started)


@pytest.mark.parametrize("dropout", [0.5])
@pytest.mark.parametrize("variant", variants(), ids=str)
def test_training_mode_does_not_matter(variant: Variant, dropout: float) -> None:
    requests = requests_of(5, longest=6)
    net = sharp_network(variant, dropout=dropout)
    expected = translated(engine_of("direct", net.eval(), Beam()), requests)
    assert translated(engine_of("direct", net.train(), Beam()), requests) == expected


@pytest.mark.parametrize("runs", RUNS)
def test_a_sentence_is_translated_by_itself(net: Seq2Seq, runs: Runs) -> None:
    """Whatever is computed from whole batches in training."""
    requests = requests_of(5, longest=6)
    expected = translated(engine_of(runs, net, Beam()), requests)
    for one, other in zip(
        translated(engine_of(runs, net, Beam(), sentences=1), requests), expected, strict=True
    ):
        assert_close(one, other)
