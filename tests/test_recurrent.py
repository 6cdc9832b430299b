"""Recurrent layers and attention give the numbers of torch's own layers and of the formulas, written out."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.fakes import random_sentences, small_network
from trmt.errors import ConfigError
from trmt.lab.hard_attention import draw, reinforce, rewards
from trmt.lab.hierarchical import softmax_within, split_documents
from trmt.lab.rnn_attention import AnyAttention, RNNAttentionConfig
from trmt.nets.base import EncoderMemory, WantedWeights, freeze
from trmt.nets.linear import PlainProducts
from trmt.nets.ragged import Ragged, Source
from trmt.nets.rnn import CELLS, Attended, RecurrentStack, RNNConfig

LENGTHS = torch.tensor([5, 1, 7, 3])
REAL = torch.arange(7) < LENGTHS[:, None]


def inputs(columns: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(4, 7, columns, generator=generator) * REAL[..., None]


def stack_of(cell: Any, count: int, *, d_model: int = 8, direction: Any = "forward", **options: Any) -> Any:
    """Recurrent layers with random parameters, biases too, in eval mode."""
    sizes: dict[str, Any] = {"source_vocabulary": 9, "target_vocabulary": 9, "d_model": d_model}
    config = RNNConfig(cell=cell, decoder_layers=3, **sizes, **options)
    torch.manual_seed(1)
    stack = RecurrentStack(config, 8, count, direction).eval()
    for parameter in stack.parameters():
        parameter.normal_(std=0.4)
    return stack


def reference(cell: str, stack: RecurrentStack, direction: str) -> nn.RNNBase:
    """Torch's own stack of layers with the same weights."""
    module, count = {"rnn": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM}[cell], 2
    size = 4 if direction == "both" else 8
    whole = module(8, size, count, batch_first=True, bidirectional=direction == "both")
    weights = {}
    for layers, suffix in ((stack.layers, ""), (stack.backward_layers, "_reverse" * (direction == "both"))):
        for index, layer in enumerate(layers):
            for name, weight in layer.fused.state_dict().items():
                weights[name.replace("_l0", f"_l{index}") + suffix] = weight
    whole.load_state_dict(weights)
    return whole


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("direction", ["forward", "backward", "both"])
@torch.no_grad()
def test_an_encoder_equals_torchs_layers_sentence_by_sentence(cell: Any, direction: Any) -> None:
    stack = stack_of(cell, 2, direction=direction)
    whole = reference(cell, stack, direction)
    x = inputs()
    fused, stepwise = stack.encode(x, REAL), freeze(stack, PlainProducts()).encode(x, REAL)
    for row, length in enumerate(LENGTHS.tolist()):
        sentence = x[row : row + 1, :length]
        expected, last = whole(sentence.flip(1) if direction == "backward" else sentence)
        if direction == "backward":
            expected = expected.flip(1)
        torch.testing.assert_close(fused[row, :length], expected[0], atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(stepwise[row, :length], expected[0], atol=1e-6, rtol=1e-5)
        hidden = last[0] if cell == "lstm" else last
        ends = torch.cat([*hidden[-2:, 0]]) if direction == "both" else hidden[-1, 0]
        torch.testing.assert_close(stack.last_states(fused, REAL)[row], ends, atol=1e-6, rtol=1e-5)
    assert not fused[~REAL].any() and not stepwise[~REAL].any()


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
@torch.no_grad()
def test_single_steps_equal_a_whole_sequence(cell: Any, residual: bool, frozen: bool) -> None:
    stack = stack_of(cell, 3, d_model=6, residual=residual)
    states = [tuple(torch.randn(4, 6) for _ in range(CELLS[cell][3])) for _ in range(3)]
    x = inputs()
    expected = stack(x, states)
    stack = freeze(stack, PlainProducts()) if frozen else stack
    torch.testing.assert_close(stack(x, states), expected, atol=1e-6, rtol=1e-5)
    for position in range(7):
        output, states = stack.step(x[:, position], states)
        torch.testing.assert_close(output, expected[:, position], atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_residual_connections_go_around_all_layers_but_the_first() -> None:
    stack = stack_of("gru", 2, residual=True)
    x, zeros = inputs(), (torch.zeros(4, 8),)
    first = stack.layers[0](x)
    torch.testing.assert_close(stack(x, [zeros, zeros]), first + stack.layers[1](first))


def attention_of(d_model: int, **options: Any) -> AnyAttention:
    """Attention alone, in eval mode."""
    torch.manual_seed(4)
    sizes: dict[str, Any] = {"source_vocabulary": 9, "target_vocabulary": 9, "d_model": d_model}
    config = RNNAttentionConfig(encoder_direction="forward", max_positions=12, **sizes, **options)
    return AnyAttention(config).eval()


def scores_of(net: AnyAttention, query: Tensor, states: Tensor) -> Tensor:
    memory = net.prepare(states, torch.ones(states.shape[:2], dtype=torch.bool))
    return net.scores(query, memory["keys"])


def by_hand(net: Any, score: str, query: list[float], key: list[float], position: int) -> float:
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
            return times(net.location, query)[position]


@pytest.mark.parametrize("score", ["dot", "scaled", "general", "cosine", "additive", "location"])
@torch.no_grad()
def test_scores_are_their_formulas(score: Any) -> None:
    net = attention_of(6, score=score)
    states, query = torch.randn(2, 5, 6), torch.randn(2, 3, 6)
    found = scores_of(net, query, states)
    for s in range(2):
        for q in range(3):
            expected = [
                by_hand(net, score, query[s, q].tolist(), states[s, position].tolist(), position)
                for position in range(5)
            ]
            torch.testing.assert_close(found[s, 0, q], torch.tensor(expected), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("score", ["dot", "scaled", "cosine", "location"])
@torch.no_grad()
def test_each_head_has_its_own_columns(score: Any) -> None:
    net = attention_of(6, score=score, heads=2)
    states, query = torch.randn(2, 5, 6), torch.randn(2, 3, 6)
    if score == "location":
        expected = net.location(query).unflatten(-1, (2, 12)).transpose(1, 2)[..., :5]
    else:
        one = attention_of(3, score=score)
        halves = [scores_of(one, query[..., at], states[..., at]) for at in (slice(3), slice(3, 6))]
        expected = torch.cat(halves, 1)
    torch.testing.assert_close(scores_of(net, query, states), expected)


def attended(options: dict[str, Any], position: list[list[int]]) -> tuple[Any, Tensor, Tensor, Attended]:
    """Attention of two queries to sources of 7 and 4 tokens: module, queries, scores, and what it returns."""
    net = attention_of(8, score="general", **options)
    real = torch.arange(7) < torch.tensor([[7], [4]])
    states, query = torch.randn(2, 7, 8), torch.randn(2, 2, 8)
    memory = net.prepare(states, real)
    found = net(query, torch.tensor(position), memory)
    score = net.scores(query, memory["keys"])[:, 0]
    torch.testing.assert_close(found.context_SQD, found.weights_SHQL[:, 0] @ states)
    return net, query, score.masked_fill(~real[:, None], -torch.inf), found


@torch.no_grad()
def test_monotonic_attention_has_a_window_around_the_same_position() -> None:
    _, _, score, found = attended({"attention": "monotonic", "window": 1}, [[0, 3], [2, 9]])
    windows = [[(0, 2), (2, 5)], [(1, 4), (2, 4)]]  # beyond the end of the source, the end
    for s in range(2):
        for q, (first, end) in enumerate(windows[s]):
            expected = torch.zeros(7)
            expected[first:end] = score[s, q, first:end].softmax(0)
            torch.testing.assert_close(found.weights_SHQL[s, 0, q], expected)


@torch.no_grad()
def test_predictive_attention_is_a_bell_around_the_predicted_position() -> None:
    net, query, score, found = attended({"attention": "predictive", "window": 2}, [[0, 0], [0, 0]])
    for s, length in enumerate((7, 4)):
        for q in range(2):
            centre = (length - 1) * torch.sigmoid(net.centre_vector @ torch.tanh(net.centre(query[s, q])))
            away = torch.arange(7) - centre
            weight = score[s, q].exp() * torch.exp(-(away**2) / (2 * (2 / 2) ** 2)) * (away.abs() <= 2)
            torch.testing.assert_close(found.weights_SHQL[s, 0, q], weight / weight.sum())


@pytest.mark.parametrize("how", ["sampled", "gumbel"])
@torch.no_grad()
def test_hard_attention_takes_one_position(how: Any) -> None:
    score = torch.tensor([[0.2, 1.7, -0.4, -torch.inf]]).log_softmax(-1).expand(1, 1, 4000, 4)
    likeliest = draw(score, how, 1.0, training=False).weights_SHQL
    assert torch.equal(likeliest, torch.tensor([0.0, 1, 0, 0]).expand_as(likeliest))
    torch.manual_seed(6)
    drawn = draw(score, how, 1.0, training=True)
    weights = drawn.weights_SHQL
    torch.testing.assert_close(weights.amax(-1), torch.ones(1, 1, 4000))
    torch.testing.assert_close(weights.mean((0, 1, 2)), score[0, 0, 0].exp(), atol=0.03, rtol=0)
    if drawn.log_prob_SQ is not None and drawn.entropy_SQ is not None:
        torch.testing.assert_close(drawn.log_prob_SQ, (weights * score.clamp(min=-99)).sum(-1)[:, 0])
        expected = torch.distributions.Categorical(logits=score).entropy()[:, 0]
        torch.testing.assert_close(drawn.entropy_SQ, expected, atol=1e-4, rtol=1e-4)


def test_gumbel_attention_has_the_gradient_of_its_softmax() -> None:
    generator = torch.Generator().manual_seed(7)
    score = torch.randn(1, 1, 3, 5, generator=generator, requires_grad=True)
    worth = torch.randn(5, generator=generator)
    torch.manual_seed(8)
    (draw(score, "gumbel", 0.7, training=True).weights_SHQL @ worth).sum().backward()
    torch.manual_seed(8)
    noise = -torch.empty_like(score).exponential_().log()
    again = score.detach().clone().requires_grad_()
    (((again + noise) / 0.7).softmax(-1) @ worth).sum().backward()
    torch.testing.assert_close(score.grad, again.grad)


def test_reinforce_is_right_on_average() -> None:
    """The mean gradient of many draws is that of the expected log probability, enumerated."""
    generator = torch.Generator().manual_seed(9)
    logits = torch.randn(4, generator=generator, requires_grad=True)
    hidden_of_position = torch.randn(4, 6, generator=generator)
    target = Ragged.of([[1, 3]])  # after token 1 comes token 3, what comes after that is unknown
    log_of_position = hidden_of_position.log_softmax(-1)[:, 3]
    (expected,) = torch.autograd.grad(-(logits.softmax(0) * log_of_position).sum(), logits)
    count = 20_000
    position = logits.detach().softmax(0).multinomial(count, replacement=True, generator=generator)
    log_prob = logits.log_softmax(0)[position]
    many = Ragged(target.ids_N.repeat(count), torch.full((count,), 2), 2)
    hidden = hidden_of_position[position].repeat_interleave(2, 0)
    for baseline in (0.0, float(log_of_position.mean())):
        draws = (log_prob.repeat_interleave(2), torch.zeros(2 * count), torch.full((2 * count,), baseline))
        losses = reinforce(lambda x: x, hidden, many, draws, changes_later=False, entropy_weight=0)
        (found,) = torch.autograd.grad(losses["reinforce"] / count, logits, retain_graph=True)
        torch.testing.assert_close(found, expected, atol=0.03, rtol=0)


def test_draws_that_change_what_comes_later_are_rewarded_for_it() -> None:
    target = Ragged.of([[1, 3, 2, 4], [1, 2]])
    hidden = torch.randn(6, 6, generator=torch.Generator().manual_seed(1))
    logs = hidden.log_softmax(-1)
    own = torch.tensor([logs[0, 3], logs[1, 2], logs[2, 4], 0.0, logs[4, 2], 0.0])
    reward, known = rewards(lambda x: x, hidden, target, changes_later=False)
    torch.testing.assert_close(reward, own)
    assert known.tolist() == [True, True, True, False, True, False]
    reward, _ = rewards(lambda x: x, hidden, target, changes_later=True)
    later = torch.tensor([own[:3].sum(), own[1:3].sum(), own[2], 0.0, own[4], 0.0])
    torch.testing.assert_close(reward, later)


def test_positions_are_drawn_in_training_only() -> None:
    net = small_network("rnn-attention", attention="sampled")
    source, target = Source.of(random_sentences(3)), Ragged.of([[1, 4], [1], [1, 5, 6]])
    with torch.no_grad():
        assert not net(source, target).aux
        losses = net.train()(source, target).aux
    assert set(losses) == {"reinforce", "baseline", "entropy"}


@torch.no_grad()
def test_attention_once_is_the_same_at_every_step() -> None:
    source, target = Source.of([[5, 6, 7, 8]]), Ragged.of([[1, 9, 10]])
    wanted = WantedWeights(cross=True)
    once, anew = (
        small_network("rnn-attention", attend_once=once, heads=1)(source, target, want=wanted).cross_attention
        for once in (True, False)
    )
    assert once is not None and anew is not None
    torch.testing.assert_close(once[..., :1, :].expand_as(once), once)
    assert not torch.allclose(anew[..., 0, :], anew[..., 1, :])


@torch.no_grad()
def test_summaries_are_their_formulas() -> None:
    x = inputs()
    for summary in ("mean", "max", "attention"):
        net: Any = small_network("rnn", d_model=8, summary=summary, context="start", cell="rnn")
        found = net.summarise(x, REAL)
        states, _ = net.begin(x, REAL, EncoderMemory({}, {}))[1]
        torch.testing.assert_close(states[0], torch.tanh(net.initial_state(found).chunk(2, -1)[0]))
        for row, length in enumerate(LENGTHS.tolist()):
            vectors = x[row, :length]
            if summary == "attention":
                expected = (torch.tanh(net.pooling.key(vectors)) @ net.pooling.query).softmax(0) @ vectors
            else:
                expected = vectors.mean(0) if summary == "mean" else vectors.amax(0)
            torch.testing.assert_close(found[row], expected)


def test_documents_are_split_behind_marks() -> None:
    source = Source.of([[5, 7, 6, 6, 7, 9], [7, 8], [5, 5, 7]])
    sentences, documents = split_documents(source, mark=7)
    assert sentences.lengths_S.tolist() == [2, 3, 1, 1, 1, 3] and sentences.longest == 3
    assert documents.lengths_S.tolist() == [3, 2, 1]


@torch.no_grad()
def test_the_weights_of_words_add_up_to_one_within_each_sentence() -> None:
    number = torch.tensor([[0, 0, 1, 1, 1, 2]])
    score = torch.randn(1, 2, 3, 6, generator=torch.Generator().manual_seed(2)) * 30
    found = softmax_within(score, number[:, None, None].expand_as(score), 4)
    for first, end in ((0, 2), (2, 5), (5, 6)):
        torch.testing.assert_close(found[..., first:end], score[..., first:end].softmax(-1))


@pytest.mark.parametrize(
    ("architecture", "options", "both"),
    [
        ("rnn-attention", {"context": "start", "attention": "sampled"}, ("attention", "context")),
        ("rnn-attention", {"context": "every", "attend_once": True}, ("attend_once", "context")),
        ("rnn-attention", {"attend_once": True, "attention": "monotonic"}, ("attend_once", "attention")),
        ("rnn-attention", {"attend_once": True, "attention": "sampled"}, ("attend_once", "attention")),
        ("rnn", {"input_feeding": True}, ("input_feeding", "attention_step")),
        ("rnn", {"context": "every", "input_feeding": True}, ("input_feeding", "context")),
        ("rnn", {"d_model": 10, "heads": 4}, ("d_model", "heads")),
        ("rnn", {"d_model": 9, "heads": 3}, ("encoder_direction", "d_model")),
        ("rnn", {"residual": True, "encoder_layers": 1, "decoder_layers": 1}, ("residual", "decoder_layers")),
        ("hierarchical", {"attention": "gumbel"}, ("attention", "hierarchical")),
        ("hierarchical", {"context": "start"}, ("context", "hierarchical")),
        ("hierarchical", {"mark": 23}, ("mark", "source_vocabulary")),
        (
            "conv-encoder-attention",
            {"encoder_attention": "pooling", "kernel": 1},
            ("encoder_attention", "kernel"),
        ),
    ],
)
def test_options_that_exclude_each_other_are_refused(
    architecture: str, options: dict[str, Any], both: tuple[str, str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        small_network(architecture, **options)
    assert all(name in str(caught.value) for name in both)


def test_a_source_beyond_the_positions_of_location_scores_is_refused() -> None:
    net = small_network("rnn-attention", score="location", max_positions=4)
    with pytest.raises(ConfigError, match="max_positions"):
        net(Source.of([[5] * 5]), Ragged.of([[1]]))
