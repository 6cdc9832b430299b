"""Every registered architecture answers to these; adding one to the registry adds its tests."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.fakes import VOCABULARY, random_sentences, small_network
from trmt.nets.base import Ragged, Seq2Seq, Source, Decoding, WantedWeights
from trmt.nets.conv import ConvS2S
from trmt.nets.linear import PlainProducts
from trmt.nets.rnn import RNN
from trmt.registry import ARCHITECTURES


RNNS = [
    ("rnn", {"decoder_layers": 1, "encoder_layers": 1, "heads": 1, "tied": "none"}),
    ("rnn", {"context": "start", "cell": "lstm", "encoder_direction": "backward"}),
    ("rnn", {"context": "start", "cell": "rnn", "encoder_direction": "forward", "summary": "mean"}),
    ("rnn", {"context": "every", "cell": "gru", "summary": "max", "residual": True}),
    ("rnn", {"context": "every", "cell": "lstm", "summary": "attention", "decoder_layers": 3}),
    ("rnn", {"score": "dot", "attention_step": "after", "cell": "lstm", "residual": True}),
    ("rnn", {"score": "scaled", "cell": "rnn"}),
    ("rnn", {"score": "general", "attention_step": "after", "input_feeding": True, "cell": "lstm"}),
    ("rnn", {"decoder_layers": 1, "encoder_layers": 1, "tied": "none"}),
    ("rnn-attention", {"score": "cosine", "attention_step": "after", "heads": 1}),
    ("rnn-attention", {"score": "location", "encoder_direction": "forward"}),
    ("rnn-attention", {"score": "general", "attention": "monotonic", "attention_step": "after", "window": 2}),
    ("rnn-attention", {"score": "general", "attention": "predictive", "window": 2, "input_feeding": True, "attention_step": "after"}),
    ("rnn-attention", {"score": "location", "attention": "predictive", "window": 3, "attention_step": "after"}),
    ("rnn-attention", {"attention": "sampled", "summary": "mean"}),
    ("rnn-attention", {"attention": "sampled", "attention_step": "after", "score": "dot"}),
    ("rnn-attention", {"attention": "gumbel", "heads": 1}),
    ("rnn-attention", {"attend_once": True}),
    ("rnn-attention", {"attend_once": True, "attention_step": "after", "input_feeding": True, "score": "dot"}),
    ("rnn-attention", {"attend_once": True, "attention": "gumbel", "attention_step": "after"}),
    ("rnn-attention", {"attend_once": True, "attention": "predictive", "window": 4, "summary": "max"}),
]
TRANSFORMERS = [
    ("transformer", {"norm_position": "pre", "norm": "rms", "activation": "swiglu", "positions": "rotary"}),
    ("transformer", {"positions": "learned", "activation": "gelu", "tied": "none", "decoder_layers": 1}),
    ("transformer-no-positions+no-residual+same-layer", {}),
    ("transformer-complex+hard", {"heads": 1}),
    ("transformer-complex+no-residual", {"tied": "target", "norm_position": "pre"}),
    ("transformer-relative+same-layer", {"max_distance": 3, "norm_position": "pre", "heads": 4}),
    ("transformer-relative+unscaled+batch-norm", {"max_distance": 1}),
    ("transformer-t5+unscaled", {"buckets": 8, "max_distance": 6, "norm_position": "pre"}),
    ("transformer-alibi+batch-norm", {"heads": 16, "tied": "none"}),
    ("transformer-concatenated+hard", {"position_columns": 6, "cross_attention": "sampled", "tied": "none"}),
    ("transformer-concatenated+batch-norm+same-layer+hard+unscaled",
        {"position_columns": 4, "positions": "learned", "norm_position": "pre", "cross_attention": "sampled"}),
]
DEFAULTS = {"transformer-concatenated": {"position_columns": 6}}
VARIANTS = [
    *((name, DEFAULTS.get(name, {})) for name in ARCHITECTURES), *TRANSFORMERS, *RNNS,
    *(("conv-encoder-attention", {"encoder_attention": place}) for place in ("before", "after", "pooling")),
    ("hierarchical", {"mark": 7, "score": "dot", "attention_step": "after", "input_feeding": True}),
    ("hierarchical", {"mark": 7, "score": "location", "summary": "mean", "sentence_layers": 2}),
    ("hierarchical", {"mark": 7, "attend_once": True}),
    ("universal", {"halting": "fixed", "norm_position": "pre", "norm": "rms", "activation": "swiglu"}),
]

CLOSE = {"atol": 2e-5, "rtol": 1e-4}


@pytest.fixture(params=VARIANTS, ids=lambda variant: "-".join([variant[0], *map(str, variant[1].values())]))
def net(request: pytest.FixtureRequest) -> Seq2Seq:
    name, options = request.param
    return small_network(name, **options)


eager = linear = PlainProducts()


from trmt.native.products import PackedProducts, best_processor
@pytest.fixture(params=[eager, PackedProducts("fp32")], ids=["plain", "best"], autouse=True)
def _products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every contract with plain products, and with the best there are here."""
    monkeypatch.setattr(f"{__name__}.linear", request.param)


SOURCES = random_sentences(4, seed=1)
TARGETS = [[1, *sentence] for sentence in random_sentences(4, seed=2)]


def teacher_forced(net: Seq2Seq, sources: list[list[int]], targets: list[list[int]]) -> list[Tensor]:
    """The logits [T, V] of each sentence."""
    target = Ragged.of(targets)
    hidden = net(Source.of(sources), target).hidden
    return list(net.readout(hidden).split([len(sentence) for sentence in targets]))


def same(first: list[Tensor], second: list[Tensor]) -> None:
    for one, other in zip(first, second, strict=True):
        torch.testing.assert_close(one, other, **CLOSE)


@torch.inference_mode()
@pytest.mark.parametrize("chunks", [[1] * 6, [6], [2, 3, 1], [1, 4, 1]])
def test_any_split_into_steps_equals_teacher_forcing(net: Seq2Seq, chunks: list[int]) -> None:
    targets = [sentence[:6] for sentence in random_sentences(8, longest=20, seed=3) if len(sentence) >= 6][:4]
    sources = SOURCES[: len(targets)]
    stepper = net.frozen(linear)
    state = stepper.start(Source.of(sources), Decoding(1, 6))
    parts, at = [], 0
    for size in chunks:
        tokens = torch.tensor([sentence[at : at + size] for sentence in targets])[:, None]
        hidden, state = stepper.step(tokens, state)
        parts.append(stepper.readout(hidden)[:, 0])
        at += size
    same(list(torch.cat(parts, 1)), teacher_forced(net, sources, targets))


@torch.inference_mode()
@pytest.mark.parametrize("reorders", [True, False])
def test_long_translations_outgrow_the_first_room(net: Seq2Seq, reorders: bool) -> None:
    target = torch.randint(4, VOCABULARY, (70,), generator=torch.Generator().manual_seed(4)).tolist()
    stepper = net.frozen(linear)
    state = stepper.start(Source.of(SOURCES[:1]), Decoding(3, 70, reorders=reorders))
    for token in target:
        hidden, state = stepper.step(torch.tensor([[[5], [token], [6]]]), state)
        if reorders:
            state = state.reorder(torch.tensor([[1, 1, 1]]))
    want = teacher_forced(net, SOURCES[:1], [target])[0][-1]
    torch.testing.assert_close(stepper.readout(hidden)[0, 1, 0], want, **CLOSE)


@torch.inference_mode()
def test_a_batch_equals_its_sentences_one_by_one(net: Seq2Seq) -> None:
    together = teacher_forced(net, SOURCES, TARGETS)
    alone = [teacher_forced(net, [s], [t])[0] for s, t in zip(SOURCES, TARGETS, strict=True)]
    same(together, alone)


@torch.inference_mode()
def test_padding_changes_nothing(net: Seq2Seq) -> None:
    longer = [*SOURCES, list(range(4, 22)) * 2]
    wide = teacher_forced(net, longer, [*TARGETS, [1, *range(4, 22)]])
    same(wide[:-1], teacher_forced(net, SOURCES, TARGETS))


@torch.inference_mode()
def test_the_future_does_not_leak(net: Seq2Seq) -> None:
    before = teacher_forced(net, SOURCES, TARGETS)
    changed = [sentence[:-1] + [sentence[-1] % 19 + 4 - 1] for sentence in TARGETS]
    assert changed != TARGETS
    after = teacher_forced(net, SOURCES, changed)
    same([logits[:-1] for logits in before], [logits[:-1] for logits in after])
    assert any(not torch.allclose(b[-1], a[-1], **CLOSE) for b, a in zip(before, after, strict=True))


@torch.inference_mode()
def test_every_source_word_counts(net: Seq2Seq) -> None:
    source, target = [5, 6, 7, 8, 9], [1, 4, 5]
    base = teacher_forced(net, [source], [target])[0]
    for place in range(len(source)):
        other = source[:place] + [11] + source[place + 1 :]
        assert not torch.allclose(teacher_forced(net, [other], [target])[0], base, **CLOSE)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_fresh_network_is_not_all_but_silent(name: str) -> None:
    """Logits that hardly differ at first take hundreds of steps to grow."""
    torch.manual_seed(1)
    net = small_network(name, d_model=128).eval()
    assert torch.cat(teacher_forced(net, SOURCES, TARGETS)).std() > 0.5


def test_every_parameter_gets_a_gradient(net: Seq2Seq) -> None:
    output = net.train()(Source.of(SOURCES), Ragged.of(TARGETS))
    own = sum(output.aux.values())
    (net.readout(output.hidden).logsumexp(-1).sum() + own).backward()
    assert not [name for name, parameter in net.named_parameters() if parameter.grad is None]


@torch.inference_mode()
def test_attention_is_a_distribution_over_the_real_source(net: Seq2Seq) -> None:
    source, target = Source.of(SOURCES), Ragged.of(TARGETS)
    assert net(source, target).cross_attention is None
    weights = net(source, target, want=WantedWeights(cross=True)).cross_attention
    if getattr(net.config, "context", "attention") != "attention":
        assert weights is None
        return
    assert weights is not None
    layers, sentences, _, queries, _width = weights.shape
    assert (sentences, queries) == (len(SOURCES), target.longest) and layers >= 1
    for row, sentence in enumerate(SOURCES):
        real = weights[:, row, :, :, : len(sentence)].sum(-1)
        torch.testing.assert_close(real, torch.ones_like(real))



@torch.inference_mode()
@pytest.mark.parametrize("side", ["encoder", "decoder"])
def test_attention_of_a_side_to_itself_is_a_distribution_over_what_it_may_see(
    net: Seq2Seq, side: str
) -> None:
    source, target, name = Source.of(SOURCES), Ragged.of(TARGETS), f"{side}_attention"
    assert getattr(net(source, target), name) is None
    weights = getattr(net(source, target, want=WantedWeights(**{side: True})), name)
    if not looks_at_itself(net, side):
        assert weights is None
        return
    layers, sentences, _, rows, columns = weights.shape
    assert sentences == len(SOURCES) and layers >= 1
    for number, sentence in enumerate(SOURCES if side == "encoder" else TARGETS):
        length = len(sentence)
        assert rows >= length and columns >= length
        real = weights[:, number, :, :length, :length]
        torch.testing.assert_close(real.sum(-1), torch.ones_like(real[..., 0]))
        if side == "decoder":
            assert not real.triu(1).any()
        alone = net(
            Source.of(SOURCES[number : number + 1]), Ragged.of(TARGETS[number : number + 1]), want=WantedWeights(**{side: True})
        )
        torch.testing.assert_close(getattr(alone, name)[:, 0, :, :length, :length], real, **CLOSE)


def looks_at_itself(net: Seq2Seq, side: str) -> bool:
    """Transformers on both sides, convolutions where they were told to."""
    if isinstance(net, ConvS2S):
        return side == "encoder" and getattr(net.config, "encoder_attention", "") in ("before", "after")
    return not isinstance(net, RNN)


def beam_of(net: Seq2Seq, prefixes: list[list[list[int]]], *, hypotheses: int, reorders: bool = True):
    """A state in which hypothesis k of sentence s has seen `prefixes[s][k]`, all equally long."""
    stepper = net.frozen(linear)
    sources = SOURCES[: len(prefixes)]
    state = stepper.start(Source.of(sources), Decoding(hypotheses, 12, reorders=reorders))
    for token in torch.tensor(prefixes).unbind(2):
        _, state = stepper.step(token[:, :, None], state)
    return stepper, state


def expected(net: Seq2Seq, sentence: int, prefix: list[int]) -> Tensor:
    """The logits after `prefix`, recomputed from nothing."""
    return teacher_forced(net, [SOURCES[sentence]], [prefix])[0][-1]


@torch.inference_mode()
@pytest.mark.parametrize(("hypotheses", "reorders"), [(3, True), (3, False), (20, True)])
def test_reorder_keep_and_fork_equal_recomputing(net: Seq2Seq, hypotheses: int, reorders: bool) -> None:
    draw = torch.Generator().manual_seed(5)
    prefixes = torch.randint(4, VOCABULARY, (3, hypotheses, 3), generator=draw).tolist()
    stepper, state = beam_of(net, prefixes, hypotheses=hypotheses, reorders=reorders)
    for _ in range(2):  # twice, so that ancestors of ancestors are met
        parents = torch.randint(0, hypotheses, (3, hypotheses), generator=draw)
        tokens = torch.randint(4, VOCABULARY, (3, hypotheses), generator=draw)
        prefixes = [
            [prefixes[s][parents[s, k]] + [int(tokens[s, k])] for k in range(hypotheses)] for s in range(3)
        ]
        hidden, state = stepper.step(tokens[:, :, None], state.reorder(parents))
    kept = torch.tensor([2, 0])
    hidden, _ = stepper.step(tokens[kept][:, :, None], state.keep(kept))
    logits = stepper.readout(hidden)[:, :, 0]
    for row, s in enumerate(kept.tolist()):
        for k in range(0, hypotheses, 1 if hypotheses < 8 else 7):
            want = expected(net, s, prefixes[s][k] + [int(tokens[s, k])])
            torch.testing.assert_close(logits[row, k], want, **CLOSE)


@torch.inference_mode()
@pytest.mark.parametrize(("hypotheses", "reorders"), [(1, True), (3, True), (3, False), (20, True)])
@pytest.mark.parametrize("young", [0, 2, 40])
def test_replaced_sentences_equal_recomputing(
    net: Seq2Seq, hypotheses: int, reorders: bool, young: int
) -> None:
    """Sentences that are younger or older, with longer or shorter sources, take the places of others."""
    draw = torch.Generator().manual_seed(6)
    stepper = net.frozen(eager)

    def begun(sources: list[list[int]], length: int) -> tuple[Any, list[Any]]:
        state = stepper.start(Source.of(sources), Decoding(hypotheses, 60, reorders=reorders))
        prefixes = torch.randint(4, VOCABULARY, (len(sources), hypotheses, length), generator=draw)
        for token in prefixes.unbind(2):
            _, state = stepper.step(token[:, :, None], state)
        return state, prefixes.tolist()

    sources = [[5, 6, 7], [9] * 20, [4, 8], [7, 7, 4]]
    state, prefixes = begun(sources, 5)
    others = [[6] * 18, [10, 11]] if young else [[6] * 19]
    fresh, their_prefixes = begun(others, young)
    places = [2, 0][: len(others)]
    state = state.replace(torch.tensor(places), fresh)
    for place, source, prefix in zip(places, others, their_prefixes, strict=True):
        sources[place], prefixes[place] = source, prefix
    for token in (14, 15):
        parents = torch.randint(0, hypotheses, (4, hypotheses), generator=draw)
        if not reorders:
            parents = torch.arange(hypotheses).expand(4, -1)
        hidden, state = stepper.step(torch.full((4, hypotheses, 1), token), state.reorder(parents))
        prefixes = [
            [rows[parent] + [token] for parent in row] for rows, row in zip(prefixes, parents, strict=True)
        ]
    logits = stepper.readout(hidden)[:, :, 0]
    for s, source in enumerate(sources):
        for k in range(0, hypotheses, 1 if hypotheses < 8 else 7):
            want = teacher_forced(net, [source], [prefixes[s][k]])[0][-1]
            torch.testing.assert_close(logits[s, k], want, **CLOSE)
