"""What every registered architecture promises; one that is added to the registry is tested here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from tests.fakes import VOCABULARY, random_sentences, small_network
from tests.variants import Variant, parametrised
from trmt.bundles import consistency
from trmt.decoding.engine import frozen
from trmt.nets.base import Decoding, Seq2Seq, State, Stepper, WantedWeights
from trmt.nets.linear import PlainProducts
from trmt.nets.ragged import Ragged, Source
from trmt.registry import ARCHITECTURES, installed

CLOSE = {"atol": 2e-5, "rtol": 1e-4}
SOURCES = random_sentences(4, seed=1)
TARGETS = [[1, *sentence] for sentence in random_sentences(4, seed=2)]
ALL_WEIGHTS = WantedWeights(cross=True, encoder=True, decoder=True)


@dataclass(frozen=True)
class Way:
    """A way to decode: plain PyTorch or the fastest there is, and a state that grows or is static."""

    name: str
    freeze: Callable[[Seq2Seq], Stepper]
    static: bool = False

    def __str__(self) -> str:
        return self.name

    def start(
        self,
        stepper: Stepper,
        sources: Sequence[list[int]],
        max_tokens: int,
        *,
        hypotheses: int = 1,
        reorders: bool = True,
    ) -> State:
        """The state before the first token."""
        return stepper.start(Source.of(sources), Decoding(hypotheses, max_tokens, reorders, self.static))


def plainly(net: Seq2Seq) -> Stepper:
    return net.frozen(PlainProducts())


GROWING = [Way("plain", plainly), Way("fastest", frozen)]
WAYS = [*GROWING, Way("static", plainly, static=True)]
growing = pytest.mark.parametrize("way", GROWING, ids=str)


@pytest.fixture(params=parametrised())
def variant(request: pytest.FixtureRequest) -> Variant:
    return request.param


@pytest.fixture
def net(variant: Variant) -> Seq2Seq:
    return small_network(variant.name, **variant.options)


@pytest.fixture(params=WAYS, ids=str)
def way(request: pytest.FixtureRequest) -> Way:
    return request.param


def teacher_forced(net: Seq2Seq, sources: Sequence[list[int]], targets: Sequence[list[int]]) -> list[Tensor]:
    """The logits [T, V] of each sentence."""
    hidden = net(Source.of(sources), Ragged.of(targets)).hidden
    return list(net.readout(hidden).split([len(sentence) for sentence in targets]))


def assert_same(first: list[Tensor], second: list[Tensor]) -> None:
    for one, other in zip(first, second, strict=True):
        torch.testing.assert_close(one, other, **CLOSE)


# Training


@torch.inference_mode()
def test_a_batch_equals_its_sentences_one_by_one(net: Seq2Seq) -> None:
    together = teacher_forced(net, SOURCES, TARGETS)
    alone = [teacher_forced(net, [s], [t])[0] for s, t in zip(SOURCES, TARGETS, strict=True)]
    assert_same(together, alone)


def test_a_network_gets_all_its_weights_from_a_file(variant: Variant, net: Seq2Seq) -> None:
    weights = net.state_dict()
    empty = consistency.build_empty(lambda: type(net)(net.config))
    assert any(parameter.is_meta for parameter in empty.parameters())
    empty.load_state_dict(weights, assign=True)
    for (name, one), other in zip(net.named_buffers(), empty.buffers(), strict=True):
        assert torch.equal(one, other), name
    assert not any(parameter.is_meta for parameter in empty.parameters())


@torch.inference_mode()
def test_padding_changes_nothing(net: Seq2Seq) -> None:
    longer = [*SOURCES, list(range(4, 22)) * 2]
    wide = teacher_forced(net, longer, [*TARGETS, [1, *range(4, 22)]])
    assert_same(wide[:-1], teacher_forced(net, SOURCES, TARGETS))


@torch.inference_mode()
def test_the_future_does_not_leak(net: Seq2Seq) -> None:
    before = teacher_forced(net, SOURCES, TARGETS)
    changed = [sentence[:-1] + [sentence[-1] % 19 + 4 - 1] for sentence in TARGETS]
    assert changed != TARGETS
    after = teacher_forced(net, SOURCES, changed)
    assert_same([logits[:-1] for logits in before], [logits[:-1] for logits in after])
    assert any(not torch.allclose(b[-1], a[-1], **CLOSE) for b, a in zip(before, after, strict=True))


@torch.inference_mode()
def test_every_source_token_counts(net: Seq2Seq) -> None:
    source, target = [5, 6, 7, 8, 9], [1, 4, 5]
    base = teacher_forced(net, [source], [target])[0]
    for position in range(len(source)):
        other = source[:position] + [11] + source[position + 1 :]
        assert not torch.allclose(teacher_forced(net, [other], [target])[0], base, **CLOSE)


@pytest.mark.parametrize("name", installed(ARCHITECTURES))
def test_the_logits_of_a_fresh_network_differ(name: str) -> None:
    """Logits that hardly differ at first take hundreds of steps to grow."""
    torch.manual_seed(1)
    net = small_network(name, d_model=128)
    net.train(net.couples_batch)  # the running statistics of small networks are not those of fresh ones
    assert torch.cat(teacher_forced(net, SOURCES, TARGETS)).std() > 0.5


def test_every_parameter_gets_a_gradient(net: Seq2Seq) -> None:
    output = net.train()(Source.of(SOURCES), Ragged.of(TARGETS))
    (net.readout(output.hidden).logsumexp(-1).sum() + sum(output.aux.values())).backward()
    assert not [name for name, parameter in net.named_parameters() if parameter.grad is None]


@growing
@torch.inference_mode()
def test_the_readout_has_a_logit_for_each_token(net: Seq2Seq, way: Way) -> None:
    hidden = net(Source.of(SOURCES), Ragged.of(TARGETS)).hidden
    logits = net.readout(hidden)
    assert logits.shape == (sum(map(len, TARGETS)), VOCABULARY)
    torch.testing.assert_close(way.freeze(net).readout(hidden), logits, **CLOSE)
    matrix = net.readout_matrix()
    if matrix is not None:
        torch.testing.assert_close(hidden @ matrix.T, logits, **CLOSE)


# Attention weights


def weights_of(net: Seq2Seq, side: str, sources: list[list[int]], targets: list[list[int]]) -> Tensor | None:
    """The weights of "cross", "encoder" or "decoder", which alone are wanted."""
    output = net(Source.of(sources), Ragged.of(targets), want=WantedWeights(**{side: True}))
    found = {each: getattr(output, f"{each}_attention") for each in ("cross", "encoder", "decoder")}
    assert all(weights is None for each, weights in found.items() if each != side), "only what is wanted"
    return found[side]


@torch.inference_mode()
def test_attention_weights_are_distributions_over_the_sentence(variant: Variant, net: Seq2Seq) -> None:
    plain = net(Source.of(SOURCES), Ragged.of(TARGETS))
    for side in ("cross", "encoder", "decoder"):
        assert getattr(plain, f"{side}_attention") is None
        weights = weights_of(net, side, SOURCES, TARGETS)
        assert variant.weights is None or (weights is not None) == (side in variant.weights)
        if weights is not None:
            assert_distributions(net, side, weights)


def assert_distributions(net: Seq2Seq, side: str, weights: Tensor) -> None:
    layers, sentences, _, queries, keys = weights.shape
    assert sentences == len(SOURCES) and layers >= 1
    for number, (source, target) in enumerate(zip(SOURCES, TARGETS, strict=True)):
        rows = len(source) if side == "encoder" else len(target)
        columns = len(target) if side == "decoder" else len(source)
        assert queries >= rows and keys >= columns
        real = weights[:, number, :, :rows, :columns]
        torch.testing.assert_close(real.sum(-1), torch.ones_like(real[..., 0]))
        if side == "decoder":
            assert not real.triu(1).any()
        alone = weights_of(net, side, [source], [target])
        assert alone is not None
        torch.testing.assert_close(alone[:, 0, :, :rows, :columns], real, **CLOSE)


@torch.inference_mode()
def test_wanting_weights_changes_no_hidden_state(net: Seq2Seq) -> None:
    source, target = Source.of(SOURCES), Ragged.of(TARGETS)
    wanted = net(source, target, want=ALL_WEIGHTS)
    torch.testing.assert_close(wanted.hidden, net(source, target).hidden, **CLOSE)


# Decoding


@torch.inference_mode()
@pytest.mark.parametrize("chunks", [[6], [2, 3, 1]], ids=str)
def test_any_split_into_steps_equals_teacher_forcing(net: Seq2Seq, way: Way, chunks: list[int]) -> None:
    targets = [sentence[:6] for sentence in random_sentences(8, longest=20, seed=3) if len(sentence) >= 6][:4]
    sources = SOURCES[: len(targets)]
    stepper = way.freeze(net)
    state = way.start(stepper, sources, 6)
    logits, begin = [], 0
    for count in chunks:
        tokens = torch.tensor([sentence[begin : begin + count] for sentence in targets])[:, None]
        hidden, state = stepper.step(tokens, state)
        logits.append(stepper.readout(hidden)[:, 0])
        begin += count
    assert_same(list(torch.cat(logits, 1)), teacher_forced(net, sources, targets))


@growing
@torch.inference_mode()
@pytest.mark.parametrize("reorders", [True, False])
def test_long_translations_outgrow_the_first_columns(net: Seq2Seq, way: Way, reorders: bool) -> None:
    target = torch.randint(4, VOCABULARY, (70,), generator=torch.Generator().manual_seed(4)).tolist()
    stepper = way.freeze(net)
    state = way.start(stepper, SOURCES[:1], 70, hypotheses=3, reorders=reorders)
    for token in target:
        hidden, state = stepper.step(torch.tensor([[[5], [token], [6]]]), state)
        if reorders:
            state = state.reorder(torch.tensor([[1, 1, 1]]))
    expected = teacher_forced(net, SOURCES[:1], [target])[0][-1]
    torch.testing.assert_close(stepper.readout(hidden)[0, 1, 0], expected, **CLOSE)


class Decoded:
    """Sentences that are decoded with random tokens, and the prefix of each hypothesis so far."""

    def __init__(self, net: Seq2Seq, way: Way, seed: int) -> None:
        self.net, self.way, self.stepper = net, way, way.freeze(net)
        self.draw = torch.Generator().manual_seed(seed)
        self.sources: list[list[int]] = []
        self.prefixes: list[list[list[int]]] = []

    def begin(self, sources: list[list[int]], length: int, *, hypotheses: int, reorders: bool) -> State:
        """A state with `length` tokens, of which every hypothesis has others."""
        state = self.way.start(self.stepper, sources, 60, hypotheses=hypotheses, reorders=reorders)
        prefixes = torch.randint(4, VOCABULARY, (len(sources), hypotheses, length), generator=self.draw)
        for tokens_SK in prefixes.unbind(2):
            _, state = self.stepper.step(tokens_SK[:, :, None], state)
        self.sources, self.prefixes = list(sources), prefixes.tolist()
        return state

    def step(self, state: State, *, reorders: bool = True) -> tuple[Tensor, State]:
        """Random parents and tokens: the logits [S, K, V]."""
        shape = len(self.prefixes), len(self.prefixes[0])
        parents_SK = torch.arange(shape[1]).expand(shape)
        if reorders:
            parents_SK = torch.randint(0, shape[1], shape, generator=self.draw)
        tokens_SK = torch.randint(4, VOCABULARY, shape, generator=self.draw)
        self.prefixes = [
            [rows[parent] + [token] for parent, token in zip(parents, tokens, strict=True)]
            for rows, parents, tokens in zip(
                self.prefixes, parents_SK.tolist(), tokens_SK.tolist(), strict=True
            )
        ]
        hidden_SKTD, state = self.stepper.step(tokens_SK[:, :, None], state.reorder(parents_SK))
        return self.stepper.readout(hidden_SKTD)[:, :, 0], state

    def assert_recomputed(self, logits_SKV: Tensor) -> None:
        """The logits are those of teacher forcing, of every hypothesis or of some."""
        hypotheses = logits_SKV.shape[1]
        for s, source in enumerate(self.sources):
            for k in range(0, hypotheses, 1 if hypotheses < 8 else 7):
                expected = teacher_forced(self.net, [source], [self.prefixes[s][k]])[0][-1]
                torch.testing.assert_close(logits_SKV[s, k], expected, **CLOSE)


@torch.inference_mode()
@pytest.mark.parametrize("hypotheses", [3, 20])
def test_reorder_and_keep_equal_recomputing(net: Seq2Seq, way: Way, hypotheses: int) -> None:
    decoded = Decoded(net, way, seed=5)
    state = decoded.begin(SOURCES[:3], 3, hypotheses=hypotheses, reorders=True)
    for _ in range(2):  # twice, for ancestors of ancestors
        logits, state = decoded.step(state)
    decoded.assert_recomputed(logits)
    kept = [2, 0]
    state = state.keep(torch.tensor(kept))
    decoded.sources = [decoded.sources[s] for s in kept]
    decoded.prefixes = [decoded.prefixes[s] for s in kept]
    for _ in range(2):
        logits, state = decoded.step(state)
    decoded.assert_recomputed(logits)


@torch.inference_mode()
@pytest.mark.parametrize(
    ("hypotheses", "reorders", "theirs"),
    [(1, True, 12), (3, True, 0), (3, True, 2), (3, False, 40)],
)
def test_replaced_sentences_equal_recomputing(
    net: Seq2Seq, way: Way, hypotheses: int, reorders: bool, theirs: int
) -> None:
    """Sentences with fewer or more tokens, and longer or shorter sources, take the slots of others."""
    layout = {"hypotheses": hypotheses, "reorders": reorders}
    decoded, other = Decoded(net, way, seed=6), Decoded(net, way, seed=7)
    state = decoded.begin([[5, 6, 7], [9] * 20, [4, 8], [7, 7, 4]], 5, **layout)
    joining = [[6] * 18, [10, 11]] if theirs else [[6] * 19]
    slots = [2, 0][: len(joining)]
    state = state.replace(torch.tensor(slots), other.begin(joining, theirs, **layout))
    for slot, source, prefixes in zip(slots, other.sources, other.prefixes, strict=True):
        decoded.sources[slot], decoded.prefixes[slot] = source, prefixes
    for _ in range(2):
        logits, state = decoded.step(state, reorders=reorders)
    decoded.assert_recomputed(logits)


@growing
@torch.inference_mode()
def test_a_consumed_state_raises(net: Seq2Seq, way: Way) -> None:
    stepper = way.freeze(net)
    tokens = torch.full((len(SOURCES), 1, 1), 4)
    everyone = torch.arange(len(SOURCES))
    uses: list[Callable[[State], object]] = [
        lambda state: stepper.step(tokens, state),
        lambda state: state.reorder(torch.zeros(len(SOURCES), 1, dtype=torch.long)),
        lambda state: state.keep(everyone),
        lambda state: state.replace(everyone, way.start(stepper, SOURCES, 4)),
        lambda state: way.start(stepper, SOURCES, 4).replace(everyone, state),
    ]
    for use in uses:
        state = way.start(stepper, SOURCES, 4)
        use(state)
        for again in uses:
            with pytest.raises(RuntimeError, match="consumed"):
                again(state)


@growing
@torch.inference_mode()
def test_freezing_leaves_the_network_as_it_is(net: Seq2Seq, way: Way) -> None:
    """It stays in training mode, and its parameters still get gradients."""
    net.train()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    stepper = way.freeze(net)
    stepper.step(torch.full((len(SOURCES), 1, 1), 4), way.start(stepper, SOURCES, 4))
    assert net.training and all(module.training for module in net.modules())
    assert all(parameter.requires_grad for parameter in net.parameters())
    after = net.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
