"""Every engine, with every architecture: the same as searching naively, and the same whatever the batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.fakes import random_sentences, small_network
from trmt.decoding.base import Hypothesis, Search
from trmt.decoding.beam import Beam
from trmt.decoding.engine import Batching, Engine, Request
from trmt.decoding.greedy import Greedy
from trmt.decoding.sampling import Sampling
from trmt.nets.base import Output, Ragged, Seq2Seq, Source, State, Stepper
from trmt.registry import ARCHITECTURES, ENGINES, resolve

BOS, EOS, BANNED = 1, 2, (0, 1, 3)

VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in ARCHITECTURES),
    ("transformer", {"norm_place": "pre", "norm": "rms", "activation": "swiglu", "positions": "rotary"}),
    ("transformer", {"positions": "learned", "activation": "gelu", "tied": "none"}),
    ("transformer", {"positions": "relative", "reach": 3, "norm": "batch", "cross_source": "same"}),
    ("transformer", {"positions": "t5", "cross_focus": "gumbel"}),
    ("transformer", {"positions": "alibi", "norm_place": "pre", "residual": False}),
    ("conv", {"encoder_attention": "after"}),
    ("conv", {"encoder_attention": "pooling"}),
    ("rnn", {"context": "start", "cell": "lstm", "reads": "backward"}),
    ("rnn", {"context": "every", "summary": "mean"}),
    ("rnn", {"score": "dot", "place": "after", "input_feeding": True, "cell": "lstm"}),
    ("rnn", {"score": "cosine", "summary": "attention", "focus": "predictive"}),
    ("rnn", {"score": "location", "focus": "gumbel", "heads": 1}),
    ("rnn", {"score": "general", "static": True}),
    ("hierarchical", {"mark": 7, "score": "dot"}),
]
SEARCHES: list[Search] = [
    Greedy(), Beam(size=4, n_best=2), Beam(size=20), Sampling(samples=2), Sampling(top_k=5, temperature=0.7),
]  # fmt: skip
LARGER = {
    "longest": 200,
    "width": 64,
    "feed_forward": 256,
    "heads": 4,
    "source_vocabulary": 200,
    "target_vocabulary": 200,
}


def named(variant: tuple[str, dict[str, Any]]) -> str:
    return "-".join([variant[0], *map(str, variant[1].values())])


def networks(most: int | None = None, **sizes: Any) -> list[tuple[str, Seq2Seq]]:
    """Random networks of the first `most` variants, with the sizes that their configs have fields for."""
    made = []
    for variant in VARIANTS[:most]:
        known = resolve(ARCHITECTURES, variant[0]).config_class.__dataclass_fields__
        options = {name: value for name, value in sizes.items() if name in known}
        net = small_network(variant[0], **{**options, **variant[1]})
        with torch.no_grad():
            # Sharper than untrained networks are, so that translations differ and some end by themselves.
            for parameter in net.parameters():
                parameter.mul_(1.5)
        made.append((named(variant), net))
    return made


def engine_of(kind: str, net: Seq2Seq, search: Search, *, sentences: int = 64) -> Engine:
    batching = Batching(sentences=sentences)
    return resolve(ENGINES, kind)(net, search, bos=BOS, eos=EOS, banned=BANNED, batching=batching)


def translated(engine: Engine, requests: Sequence[Request]) -> list[list[Hypothesis]]:
    found = dict(engine.translate(requests))
    assert sorted(found) == list(range(len(requests)))
    return [found[index] for index in range(len(requests))]


def requests_of(count: int, *, longest: int, seed: int = 3) -> list[Request]:
    """Random sentences with limits and some prefixes."""
    return [
        Request((*sentence, EOS), limit=3 + len(sentence) * 3 // 2, prefix=(7, 9)[: index % 7 % 3], key=index)
        for index, sentence in enumerate(random_sentences(count, longest=longest, seed=seed))
    ]


# --- the naive decoder: no cache, no batch, the whole prefix again at each step


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
            elif len(ids) >= request.limit:
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


@pytest.mark.parametrize("kind", ENGINES)
@pytest.mark.parametrize("size", [1, 4])
def test_it_equals_naive_decoding(kind: str, size: int) -> None:
    requests = requests_of(10, longest=8)
    search = Beam(size=size, n_best=size) if size > 1 else Greedy()
    for name, net in networks():
        found = translated(engine_of(kind, net, search), requests)
        assert any(each[0].ids for each in found) and len({each[0].ids for each in found}) > 3, name
        for request, hypotheses in zip(requests, found, strict=True):
            expected = naive(net, request, size=size, penalty=0.6)[: len(hypotheses)]
            assert [each.ids for each in hypotheses] == [each.ids for each in expected], name
            for one, other in zip(hypotheses, expected, strict=True):
                assert one.score == pytest.approx(other.score, abs=1e-4), name


@torch.inference_mode()
def test_sampled_scores_are_those_of_the_network() -> None:
    requests = requests_of(6, longest=8)
    for name, net in networks():
        found = translated(engine_of("eager", net, Sampling(temperature=0.7, top_p=0.9)), requests)
        for request, (hypothesis,) in zip(requests, found, strict=True):
            ids = (*hypothesis.ids, EOS)
            hidden = net(Source.of([request.source]), Ragged.of([[BOS, *ids[:-1]]])).hidden
            logits = net.readout(hidden).double()
            logits[:, list(BANNED)] = -torch.inf
            logs = logits.log_softmax(1)[range(len(ids)), list(ids)]
            counted = logs[len(request.prefix) : request.limit]
            assert hypothesis.score == pytest.approx(float(counted.sum()), abs=1e-4), name


# --- the same bits whatever the batch


def unequal(
    kind: str,
    *,
    count: int,
    longest: int,
    batches: Sequence[int],
    searches: int = 5,
    most: int | None = None,
) -> list[str]:
    """Where the batch size changed ids or the last bit of a score, as sentences."""
    differences = []
    requests = requests_of(count, longest=longest)
    for name, net in networks(most, **LARGER):
        for search in SEARCHES[:searches]:
            first, *others = (
                translated(engine_of(kind, net, search, sentences=sentences), requests)
                for sentences in batches
            )
            for sentences, other in zip(batches[1:], others, strict=True):
                ids = sum([h.ids for h in a] != [h.ids for h in b] for a, b in zip(first, other, strict=True))
                scores = sum(a != b for a, b in zip(first, other, strict=True))
                if scores:
                    differences.append(
                        f"{name} {search} batches of {sentences}: {ids} ids, {scores} scores of {count}"
                    )
    return differences


def unequal_with(threads: int, **sizes: Any) -> list[str]:
    """What `unequal` returns in a fresh process with this many threads."""
    code = (
        f"import json, torch; torch.set_num_threads({threads})\n"
        "from tests.contracts.test_engine import unequal\n"
        f"print(json.dumps(unequal('eager', **{sizes!r})))"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "KMP_BLOCKTIME": "0", "GOMP_SPINCOUNT": "0"}
    command = [sys.executable, "-c", code]
    answer = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return json.loads(answer.stdout)


@pytest.mark.parametrize("threads", [1, 2])
def test_the_batch_size_changes_no_bit(threads: int) -> None:
    assert unequal_with(threads, count=10, longest=12, batches=(1, 3, 10)) == []


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2])
def test_the_batch_size_changes_no_bit_of_thousands(threads: int) -> None:
    # One of each architecture, and a Transformer that the kernel of a step does not know.
    sizes = {"most": len(ARCHITECTURES) + 1, "searches": 2}
    assert unequal_with(threads, count=1000, longest=30, batches=(16, 64), **sizes) == []
    assert unequal_with(threads, count=12, longest=90, batches=(1, 3, 12), searches=2) == []


# --- the driver


def test_requests_may_be_none() -> None:
    engine = engine_of("eager", small_network("rnn"), Greedy())
    assert list(engine.translate([])) == []


def test_finished_sentences_come_before_the_batch_ends() -> None:
    requests = [Request((5, EOS), limit=1 if index else 30, prefix=(7,)) for index in range(8)]
    (net,) = (net for name, net in networks() if name == "rnn")
    order = [index for index, _ in engine_of("eager", net, Beam()).translate(requests)]
    assert sorted(order) == list(range(8)) and order[-1] == 0


class Recorder(Stepper):
    """A stepper that notes the lengths of the sentences that were begun together, and how many steps ran."""

    def __init__(self, stepper: Stepper) -> None:
        self.stepper = stepper
        self.begun: list[list[int]] = []
        self.rows: list[int] = []

    def start(self, source: Source, **options: Any) -> State:
        self.begun.append(source.lengths_S.tolist())
        return self.stepper.start(source, **options)

    def step(self, tokens_SKT: Tensor, state: State, **options: Any) -> tuple[Output, State]:
        self.rows.append(len(tokens_SKT))
        return self.stepper.step(tokens_SKT, state, **options)

    def readout(self, hidden: Tensor, only: Tensor | None = None) -> Tensor:
        return self.stepper.readout(hidden, only)


def recorded(batching: Batching, requests: Sequence[Request]) -> Recorder:
    net, search = small_network("rnn"), Greedy()
    engine = resolve(ENGINES, "eager")(net, search, bos=BOS, eos=EOS, banned=[EOS], batching=batching)
    engine.stepper = Recorder(engine.stepper)
    translated(engine, requests)
    return engine.stepper


def test_a_batch_holds_no_more_source_than_it_may() -> None:
    requests = [Request((5,) * length, limit=1) for length in (3, 9, 1, 9, 2, 40, 5)]
    begun = recorded(Batching(sentences=4, tokens=18), requests).begun
    assert begun == [[40], [9, 9], [5, 3, 2], [1]]


def test_sentences_take_the_places_of_finished_ones() -> None:
    # Nothing ends by itself here: each goes on to its limit.
    requests = [Request((5,) * 8, limit=2 if index % 2 else 40) for index in range(40)]
    found = recorded(Batching(sentences=8), requests)
    assert sum(map(len, found.begun)) == 40
    assert len(found.begun) > 5, "in five batches of 8, nobody's place was taken"
    # 20 * 40 and 20 * 2 tokens, nearly all of them in full batches.
    assert max(found.rows) == 8 and sum(found.rows) < 1.5 * (20 * 40 + 20 * 2)


def test_much_shorter_sentences_wait_for_a_batch_of_their_own() -> None:
    requests = [Request((5,) * length, limit=limit) for length, limit in [(30, 9)] * 3 + [(30, 2), (4, 9)]]
    assert recorded(Batching(sentences=4), requests).begun == [[30] * 4, [4]]


def test_training_mode_does_not_matter() -> None:
    requests = requests_of(5, longest=6)
    for name, net in networks(dropout=0.5):
        expected = translated(engine_of("eager", net.eval(), Beam()), requests)
        assert translated(engine_of("eager", net.train(), Beam()), requests) == expected, name


def test_a_network_that_couples_its_batch_in_training_translates_each_sentence_by_itself() -> None:
    requests = requests_of(5, longest=6)
    net = small_network("transformer", norm="batch")
    assert net.couples_batch
    for name in ENGINES:
        expected = translated(engine_of(name, net, Beam()), requests)
        assert translated(engine_of(name, net, Beam(), sentences=1), requests) == expected
