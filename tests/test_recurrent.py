"""Recurrent layers and attention give the numbers of torch's own layers and of the formulas, written out."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.fakes import random_sentences, small_network
from trmt.errors import ConfigError
from trmt.lab import hierarchical, reinforce
from trmt.nets import focus, recurrent, scores
from trmt.nets.base import Memory, Ragged, Source
from trmt.nets.focus import AttentionConfig
from trmt.nets.linear import eager
from trmt.nets.recurrent import Recurrent, plain
from trmt.nets.rnn import begin

KINDS = ("rnn", "gru", "lstm")
LENGTHS = torch.tensor([5, 1, 7, 3])
REAL = torch.arange(7) < LENGTHS[:, None]


def inputs(width: int = 8) -> Tensor:
    draw = torch.Generator().manual_seed(3)
    return torch.randn(4, 7, width, generator=draw) * REAL[..., None]


def reference(kind: str, stack: Recurrent, *, both: bool) -> nn.RNNBase:
    """Torch's own stack of layers with the same weights."""
    layers = len(stack.layers)
    whole = {"rnn": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM}[kind](
        8, stack.width, layers, batch_first=True, bidirectional=both
    )
    weights = {
        name.replace("_l0", f"_l{index}"): weight
        for index, layer in enumerate(stack.layers)
        for name, weight in layer.state_dict().items()
    }
    whole.load_state_dict(weights)
    return whole


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reads", ["forward", "backward", "both"])
@torch.no_grad()
def test_reading_equals_torchs_layers_sentence_by_sentence(kind: Any, reads: Any) -> None:
    torch.manual_seed(1)
    stack = Recurrent(kind, (8, 8, 2), reads=reads).eval()
    for parameter in stack.parameters():
        parameter.normal_(std=0.4)  # biases too, which begin at zero
    whole = reference(kind, stack, both=reads == "both")
    x = inputs()
    fused, stepped = stack.read(x, REAL), stack.steps(eager).read(x, REAL)
    for row, length in enumerate(LENGTHS.tolist()):
        sentence = x[row : row + 1, :length]
        turned = sentence.flip(1) if reads == "backward" else sentence
        want, last = whole(turned)
        if reads == "backward":
            want = want.flip(1)
        torch.testing.assert_close(fused[row, :length], want[0], atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(stepped[row, :length], want[0], atol=1e-6, rtol=1e-5)
        hidden = last[0] if kind == "lstm" else last
        ends = torch.cat([*hidden[-2:, 0]]) if reads == "both" else hidden[-1, 0]
        found = recurrent.last(fused, LENGTHS, reads)[row]
        torch.testing.assert_close(found, ends, atol=1e-6, rtol=1e-5)
    assert not fused[~REAL].any() and not stepped[~REAL].any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("known", [None, 5, 8])
@torch.no_grad()
def test_steps_equal_the_whole(kind: Any, residual: bool, known: int | None) -> None:
    torch.manual_seed(2)
    stack = Recurrent(kind, (8, 6, 3), residual=residual).eval()
    cells = [tuple(torch.randn(4, 6) for _ in range(recurrent.STATES[kind])) for _ in range(3)]
    x = inputs()
    want = stack.whole(x, cells)
    steps = stack.steps(plain, known=known)
    first, found = (x, None) if known in (None, 8) else (x[..., :known], x[..., known:])
    ready = steps.known(first)
    for place in range(7):
        more = None if found is None else found[:, place]
        out, cells = steps.step(ready[:, place], more, cells, lambda x: x)
        torch.testing.assert_close(out, want[:, place], atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_residual_connections_go_around_all_layers_but_the_first() -> None:
    torch.manual_seed(2)
    stack = Recurrent("gru", (8, 8, 2), residual=True)
    x = inputs()
    first = stack.layers[0](x)[0]
    torch.testing.assert_close(stack.whole(x), first + stack.layers[1](first)[0])


def by_hand(net: Any, score: str, query: list[float], key: list[float], place: int) -> float:
    """The score of one query and one key, in words."""

    def times(linear: nn.Linear, x: list[float]) -> list[float]:
        bias = [0.0] * len(linear.weight) if linear.bias is None else linear.bias.tolist()
        rows = linear.weight.tolist()
        return [sum(map(float.__mul__, row, x)) + b for row, b in zip(rows, bias, strict=True)]

    def dot(x: list[float], y: list[float]) -> float:
        return sum(map(float.__mul__, x, y))

    match score:
        case "dot":
            return dot(query, key)
        case "scaled":
            return dot(query, key) / math.sqrt(len(query))
        case "general":
            return dot(query, times(net.key, key))
        case "cosine":
            return net.sharpness.item() * dot(query, key) / math.sqrt(dot(query, query) * dot(key, key))
        case "additive":
            sums = map(float.__add__, times(net.query, query), times(net.key, key))
            return dot(net.vector.flatten().tolist(), [math.tanh(x) for x in sums])
        case _:
            return times(net.places, query)[place]


@pytest.mark.parametrize("score", ["dot", "scaled", "general", "cosine", "additive", "location"])
@torch.no_grad()
def test_scores_are_their_formulas(score: Any) -> None:
    torch.manual_seed(4)
    net = scores.Similarity(score, 6, 1, 9)
    states, query = torch.randn(2, 5, 6), torch.randn(2, 3, 6)
    found = scores.scores(net, score, query, scores.keys(net, score, states, 1))
    for s in range(2):
        for q in range(3):
            want = [
                by_hand(net, score, query[s, q].tolist(), states[s, place].tolist(), place)
                for place in range(5)
            ]
            torch.testing.assert_close(found[s, 0, q], torch.tensor(want), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("score", ["dot", "scaled", "cosine", "location"])
@torch.no_grad()
def test_heads_look_at_parts_of_the_states(score: Any) -> None:
    torch.manual_seed(4)
    whole = scores.Similarity(score, 6, 2, 9)
    states, query = torch.randn(2, 5, 6), torch.randn(2, 3, 6)
    found = scores.scores(whole, score, query, scores.keys(whole, score, states, 2))
    if score == "location":
        want = whole.places(query).unflatten(-1, (2, 9)).transpose(1, 2)[..., :5]
    else:
        part = scores.Similarity(score, 3, 1, 9)
        halves = [
            scores.scores(part, score, query[..., at], scores.keys(part, score, states[..., at], 1))
            for at in (slice(3), slice(3, 6))
        ]
        want = torch.cat(halves, 1)
    torch.testing.assert_close(found, want)


def looked(options: dict[str, Any], position: list[list[int]]) -> tuple[Any, Tensor, Tensor, focus.Glance]:
    """A look of two queries at sources of 7 and 4 places: attention, queries, its scores, what was found."""
    torch.manual_seed(5)
    config = AttentionConfig(width=8, longest=12, score="general", **options)
    net = nn.Module()
    net.attention = focus.Attention(config)
    real = torch.arange(7) < torch.tensor([[7], [4]])
    states, query = torch.randn(2, 7, 8), torch.randn(2, 2, 8)
    memory = Memory(*focus.prepared(net.attention, config, states, real))
    glance = focus.look(net, config, query, torch.tensor(position), memory)
    score = scores.scores(net.attention.similarity, "general", query, memory["keys"])[:, 0]
    torch.testing.assert_close(glance.context_SQD, glance.weights_SHQL[:, 0] @ states)
    return net.attention, query, score.masked_fill(~real[:, None], -torch.inf), glance


@torch.no_grad()
def test_monotonic_attention_sees_a_window_around_the_same_position() -> None:
    _, _, score, glance = looked({"focus": "monotonic", "reach": 1}, [[0, 3], [2, 9]])
    windows = [[(0, 2), (2, 5)], [(1, 4), (2, 4)]]  # beyond the source's end, the end
    for s in range(2):
        for q, (first, end) in enumerate(windows[s]):
            want = torch.zeros(7)
            want[first:end] = score[s, q, first:end].softmax(0)
            torch.testing.assert_close(glance.weights_SHQL[s, 0, q], want)


@torch.no_grad()
def test_predictive_attention_is_a_bell_around_the_predicted_place() -> None:
    net, query, score, glance = looked({"focus": "predictive", "reach": 2}, [[0, 0], [0, 0]])
    for s, length in enumerate((7, 4)):
        for q in range(2):
            pointed = net.pointer @ torch.tanh(net.place(query[s, q]))
            centre = (length - 1) * torch.sigmoid(pointed)
            away = torch.arange(7) - centre
            weight = score[s, q].exp() * torch.exp(-(away**2) / (2 * (2 / 2) ** 2)) * (away.abs() <= 2)
            torch.testing.assert_close(glance.weights_SHQL[s, 0, q], weight / weight.sum())


@pytest.mark.parametrize("kind", ["sampled", "gumbel"])
@torch.no_grad()
def test_hard_attention_takes_one_place(kind: str) -> None:
    config = AttentionConfig(focus=kind)  # type: ignore[arg-type]
    score = torch.tensor([[0.2, 1.7, -0.4, -torch.inf]]).log_softmax(-1).expand(1, 1, 4000, 4)
    sure, _, _ = focus.weigh(config, score, training=False)
    assert torch.equal(sure, torch.tensor([0.0, 1, 0, 0]).expand_as(sure))
    torch.manual_seed(6)
    drawn, log_drawn, entropy = focus.weigh(config, score, training=True)
    torch.testing.assert_close(drawn.amax(-1), torch.ones(1, 1, 4000))
    torch.testing.assert_close(drawn.mean((0, 1, 2)), score[0, 0, 0].exp(), atol=0.03, rtol=0)
    if log_drawn is not None and entropy is not None:
        torch.testing.assert_close(log_drawn, (drawn * score.clamp(min=-99)).sum(-1)[:, 0])
        want = torch.distributions.Categorical(logits=score).entropy()[:, 0]
        torch.testing.assert_close(entropy, want, atol=1e-4, rtol=1e-4)


def test_gumbel_attention_has_the_gradient_of_its_softmax() -> None:
    config = AttentionConfig(focus="gumbel", temperature=0.7)
    draw = torch.Generator().manual_seed(7)
    score = torch.randn(1, 1, 3, 5, generator=draw, requires_grad=True)
    worth = torch.randn(5, generator=draw)
    torch.manual_seed(8)
    (focus.weigh(config, score, training=True)[0] @ worth).sum().backward()
    torch.manual_seed(8)
    noise = -torch.empty_like(score).exponential_().log()
    again = score.detach().clone().requires_grad_()
    (((again + noise) / 0.7).softmax(-1) @ worth).sum().backward()
    torch.testing.assert_close(score.grad, again.grad)


def test_reinforce_is_right_on_average() -> None:
    """The mean gradient of many draws is that of the expected log probability, enumerated."""
    draw = torch.Generator().manual_seed(9)
    logits = torch.randn(4, generator=draw, requires_grad=True)
    hidden_of_place = torch.randn(4, 6, generator=draw)
    target = Ragged.of([[1, 3]])  # after id 1 comes id 3, after that nobody knows
    log_of_place = hidden_of_place.log_softmax(-1)[:, 3]
    (want,) = torch.autograd.grad(-(logits.softmax(0) * log_of_place).sum(), logits)
    count = 20_000
    place = logits.detach().softmax(0).multinomial(count, replacement=True, generator=draw)
    log_drawn = logits.log_softmax(0)[place]
    total = torch.zeros(())
    many = Ragged(target.ids_N.repeat(count), torch.full((count,), 2), 2)
    hidden = hidden_of_place[place].repeat_interleave(2, 0)
    for baseline in (0.0, float(log_of_place.mean())):
        parts = (log_drawn.repeat_interleave(2), torch.zeros(2 * count), torch.full((2 * count,), baseline))
        aux = reinforce.reinforced(
            lambda x: x, hidden, many, reinforce.Draw(*parts), lasting=False, entropy=0
        )
        total, known = aux["reinforce"]
        assert int(known) == count
        (found,) = torch.autograd.grad(total / count, logits, retain_graph=True)
        torch.testing.assert_close(found, want, atol=0.03, rtol=0)


def test_lasting_draws_answer_for_all_that_follows() -> None:
    target = Ragged.of([[1, 3, 2, 4], [1, 2]])
    hidden = torch.randn(6, 6, generator=torch.Generator().manual_seed(1))
    logs = hidden.log_softmax(-1)
    own = torch.tensor([logs[0, 3], logs[1, 2], logs[2, 4], 0.0, logs[4, 2], 0.0])
    reward, known = reinforce.rewards(lambda x: x, hidden, target, lasting=False)
    torch.testing.assert_close(reward, own)
    assert known.tolist() == [True, True, True, False, True, False]
    reward, _ = reinforce.rewards(lambda x: x, hidden, target, lasting=True)
    later = torch.tensor([own[:3].sum(), own[1:3].sum(), own[2], 0.0, own[4], 0.0])
    torch.testing.assert_close(reward, later)


def test_drawing_is_for_training_only() -> None:
    net = small_network("rnn", focus="sampled")
    source, target = Source.of(random_sentences(3)), Ragged.of([[1, 4], [1], [1, 5, 6]])
    with torch.no_grad():
        assert not net(source, target).aux
        aux = net.train()(source, target).aux
    assert set(aux) == {"reinforce", "baseline", "entropy"} and int(aux["baseline"][1]) == 3


@torch.no_grad()
def test_a_static_look_is_the_same_at_every_step() -> None:
    net = small_network("rnn", static=True, heads=1)
    source, target = Source.of([[5, 6, 7, 8]]), Ragged.of([[1, 9, 10]])
    weights = net(source, target, want=("attention",)).attention
    assert weights is not None
    torch.testing.assert_close(weights[..., :1, :].expand_as(weights), weights)
    moving = small_network("rnn", heads=1)(source, target, want=("attention",)).attention
    assert moving is not None and not torch.allclose(moving[..., 0, :], moving[..., 1, :])


@torch.no_grad()
def test_summaries_are_what_they_say() -> None:
    x = inputs()
    for summary in ("mean", "max", "attention"):
        net = small_network("rnn", width=8, summary=summary, context="start", cell="rnn", decoder_layers=1)
        seen: list[Tensor] = []
        net.first.register_forward_hook(lambda _, given, __, seen=seen: seen.append(given[0]))
        begin(net, net.config, focus.look, x, REAL, Memory({}, {}))
        for row, length in enumerate(LENGTHS.tolist()):
            states = x[row, :length]
            if summary == "attention":
                weights = (torch.tanh(net.pooling.key(states)) @ net.pooling.query).softmax(0)
                want = weights @ states
            else:
                want = states.mean(0) if summary == "mean" else states.amax(0)
            torch.testing.assert_close(seen[0][row], want)


def test_documents_are_divided_after_marks() -> None:
    source = Source.of([[5, 7, 6, 6, 7, 9], [7, 8], [5, 5, 7]])
    sentences, documents = hierarchical.divided(source, mark=7)
    assert sentences.lengths_S.tolist() == [2, 3, 1, 1, 1, 3] and sentences.longest == 3
    assert documents.lengths_S.tolist() == [3, 2, 1]


@torch.no_grad()
def test_weights_of_words_are_those_of_sentences_times_those_within() -> None:
    number = torch.tensor([[0, 0, 1, 1, 1, 2]])
    score = torch.randn(1, 2, 3, 6, generator=torch.Generator().manual_seed(2)) * 30
    found = hierarchical.within(score, number[:, None, None].expand_as(score), 4)
    for first, end in ((0, 2), (2, 5), (5, 6)):
        torch.testing.assert_close(found[..., first:end], score[..., first:end].softmax(-1))


@pytest.mark.parametrize(
    ("architecture", "options", "both"),
    [
        ("rnn", {"context": "start", "focus": "sampled"}, ("focus", "context")),
        ("rnn", {"context": "every", "static": True}, ("static", "context")),
        ("rnn", {"input_feeding": True}, ("input_feeding", "place")),
        ("rnn", {"static": True, "focus": "monotonic"}, ("static", "focus")),
        ("rnn", {"static": True, "focus": "sampled"}, ("static", "focus")),
        ("rnn", {"width": 10, "heads": 4}, ("width", "heads")),
        ("rnn", {"width": 9, "heads": 3}, ("reads", "width")),
        ("rnn", {"residual": True, "encoder_layers": 1, "decoder_layers": 1}, ("residual", "decoder_layers")),
        ("hierarchical", {"focus": "gumbel"}, ("focus", "hierarchical")),
        ("hierarchical", {"context": "start"}, ("context", "hierarchical")),
        ("hierarchical", {"mark": 23}, ("mark", "source_vocabulary")),
        ("conv", {"encoder_attention": "pooling", "kernel": 1}, ("encoder_attention", "kernel")),
    ],
)
def test_what_does_not_go_together_is_refused(
    architecture: str, options: dict[str, Any], both: tuple[str, str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        small_network(architecture, **options)
    assert all(name in str(caught.value) for name in both)


def test_a_source_beyond_the_places_of_location_scores_is_refused() -> None:
    net = small_network("rnn", score="location", longest=4)
    with pytest.raises(ConfigError, match="longest"):
        net(Source.of([[5] * 5]), Ragged.of([[1]]))
