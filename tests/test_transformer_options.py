"""The Transformer's options against a Transformer written out in plain torch functions."""

from __future__ import annotations

import math
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.contracts.test_seq2seq import TRANSFORMERS
from tests.fakes import random_sentences, small_network
from trmt.bundles import init_from
from trmt.errors import ConfigError
from trmt.interop.base import transformer_of
from trmt.interop.bert_folder import FIXED
from trmt.lab.masked_encoder import MaskedEncoder, MaskedEncoderConfig
from trmt.nets.base import Ragged, Source
from trmt.nets.layers import sinusoids
from trmt.nets.linear import choose
from trmt.nets.transformer import Transformer, TransformerConfig

CLOSE = {"atol": 2e-5, "rtol": 1e-4}
SOURCES = random_sentences(4, seed=1)
TARGETS = [[1, *sentence] for sentence in random_sentences(4, seed=2)]


class Plain:
    """One sentence through the weights of a network, with nothing shared, cached or fused."""

    def __init__(self, net: Any) -> None:
        self.net, self.config = net, net.config

    def logits(self, source: list[int], target: list[int]) -> Tensor:
        net, config = self.net, self.config
        x, seen = self.embedded(net.source_embedding, source), []
        for layer in net.encoder:
            x = self.sublayer(layer.own_norm, x, lambda x, layer=layer: self.own(layer, x, causal=False))
            x = self.sublayer(layer.feed_norm, x, lambda x, layer=layer: self.feed(layer, x))
            seen.append(x)
        y = self.embedded(net.target_embedding, target)
        for index, layer in enumerate(net.decoder):
            look = lambda x, index=index, layer=layer: self.over(index, layer, x, seen)  # noqa: E731
            y = self.sublayer(layer.own_norm, y, lambda x, layer=layer: self.own(layer, x, causal=True))
            y = self.sublayer(layer.cross_norm, y, look)
            y = self.sublayer(layer.feed_norm, y, lambda x, layer=layer: self.feed(layer, x))
        if config.norm_place == "pre":
            y = net.decoder_norm(y)
        return y @ net.output.weight.T

    def embedded(self, table: Any, ids: list[int]) -> Tensor:
        x = table(torch.tensor(ids)) * math.sqrt(self.config.width)
        return x + sinusoids(len(ids), self.config.width)

    def sublayer(self, norm: Any, x: Tensor, inner: Any) -> Tensor:
        kept = x if self.config.residual else torch.zeros_like(x)
        return norm(kept + inner(x)) if self.config.norm_place == "post" else kept + inner(norm(x))

    def feed(self, layer: Any, x: Tensor) -> Tensor:
        return layer.feed.outer(F.relu(F.linear(x, layer.feed.inner.weight, layer.feed.inner.bias)))

    def own(self, layer: Any, x: Tensor, *, causal: bool) -> Tensor:
        return layer.own_out(self.attend(*layer.own(x).chunk(3, -1), causal=causal))

    def over(self, index: int, layer: Any, x: Tensor, seen: list[Tensor]) -> Tensor:
        net, config = self.net, self.config
        if config.cross_source == "last":
            states = net.encoder_norm(seen[-1]) if config.norm_place == "pre" else seen[-1]
            both = net.memory(states).chunk(config.decoder_layers, -1)[index]
        else:
            norms = [*net.lower_norms, net.encoder_norm] if config.norm_place == "pre" else None
            both = net.memories[index](norms[index](seen[index]) if norms else seen[index])
        return layer.cross_out(self.attend(layer.query(x), *both.chunk(2, -1), causal=False))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, *, causal: bool) -> Tensor:
        query, key, value = (
            x.unflatten(-1, (self.config.heads, -1)).transpose(0, 1) for x in (query, key, value)
        )
        scores = query @ key.transpose(-2, -1)
        if self.config.score_scale:
            scores = scores / math.sqrt(query.shape[-1])
        if causal:
            scores = scores + torch.full(scores.shape[-2:], -torch.inf).triu(1)
        if self.config.cross_focus == "soft" or causal or query.shape[1:] == key.shape[1:]:
            weights = scores.softmax(-1)
        else:
            weights = F.one_hot(scores.argmax(-1), scores.shape[-1]).float()
        return (weights @ value).transpose(0, 1).flatten(1)


@pytest.mark.parametrize(
    ("place", "residual", "scale", "source"),
    [*product(["post", "pre"], [True, False], [True, False], ["last", "same"])],
)
@torch.inference_mode()
def test_it_equals_what_is_written_out(place: Any, residual: bool, scale: bool, source: Any) -> None:
    options = {"norm_place": place, "residual": residual, "score_scale": scale, "cross_source": source}
    check(small_network("transformer", **options, heads=4))


@pytest.mark.parametrize("heads", [1, 2, 16])
@pytest.mark.parametrize("focus", ["sampled", "gumbel"])
@torch.inference_mode()
def test_hard_attention_sees_the_likeliest_place(focus: Any, heads: int) -> None:
    check(small_network("transformer", cross_focus=focus, heads=heads))


def check(net: Any) -> None:
    """In a row, and step by step."""
    source, target = Source.of(SOURCES), Ragged.of(TARGETS)
    rows = net.readout(net(source, target).hidden).split([len(each) for each in TARGETS])
    stepper = net.frozen(choose())
    assert not getattr(stepper, "stepwise", False) or net.config.usual
    for number, (ids, sentence) in enumerate(zip(SOURCES, TARGETS, strict=True)):
        # A target as long as the source would make the plain attention take one look for the other.
        want = Plain(net).logits(ids, sentence if len(sentence) != len(ids) else [*sentence, 5])
        want = want[: len(sentence)]
        torch.testing.assert_close(rows[number], want, **CLOSE)
        state = stepper.start(Source.of([ids]), hypotheses=1, room=12)
        for place, token in enumerate(sentence):
            output, state = stepper.step(torch.tensor([[[token]]]), state)
            torch.testing.assert_close(stepper.readout(output.hidden)[0, 0, 0], want[place], **CLOSE)


@pytest.mark.parametrize("focus", ["sampled", "gumbel"])
def test_each_head_of_each_layer_draws_one_place(focus: Any) -> None:
    net = small_network("transformer", cross_focus=focus).train()
    torch.manual_seed(1)
    output = net(Source.of(SOURCES), Ragged.of(TARGETS), want=("attention",))
    weights = output.attention
    assert weights is not None and weights.shape[:3] == (2, 4, 2)
    for row, (source, target) in enumerate(zip(SOURCES, TARGETS, strict=True)):
        drawn = weights[:, row, :, : len(target)]
        assert (drawn.detach().round(decimals=5).amax(-1) == 1).all()
        torch.testing.assert_close(drawn.sum(-1), torch.ones(drawn.shape[:-1]))
        assert not drawn[..., len(source) :].any()
    assert set(output.aux) == ({"reinforce", "baseline", "entropy"} if focus == "sampled" else set())
    if focus == "gumbel":
        net.readout(output.hidden).logsumexp(-1).sum().backward()
        assert net.decoder[0].query.weight.grad.any()


def test_what_was_drawn_is_reinforced_by_what_came_of_it() -> None:
    """The losses, summed up by hand from the probabilities of the places that were drawn."""
    net = small_network("transformer", cross_focus="sampled", decoder_layers=1, encoder_layers=1).train()
    source, target = [5, 9, 7, 4], [1, 8, 6, 11]
    queries: list[Tensor] = []
    net.decoder[0].query.register_forward_hook(lambda *given: queries.append(given[2]))
    output = net(Source.of([source]), Ragged.of([target]), want=("attention",))
    assert output.attention is not None
    key = net.memory(net.read(Source.of([source]))).chunk(2, -1)[0]
    query, key = (x.unflatten(-1, (2, -1)).transpose(0, 1) for x in (queries[0], key))
    log = (query @ key.transpose(-2, -1) / math.sqrt(8)).log_softmax(-1)
    drawn = (log * output.attention[0, 0]).sum(-1).sum(0)
    words = net.readout(output.hidden).log_softmax(-1)
    reward = torch.stack([words[at, token] for at, token in enumerate(target[1:])])
    better = reward - net.baseline(queries[0])[:3, 0]
    wanted = -(better.detach() * drawn[:3]).sum()
    torch.testing.assert_close(output.aux["reinforce"][0], wanted, **CLOSE)
    torch.testing.assert_close(output.aux["baseline"][0], better.detach().square().sum() / 2, **CLOSE)


@pytest.mark.parametrize("options", TRANSFORMERS, ids=lambda options: "-".join(map(str, options.values())))
def test_every_option_learns_in_half_precision_too(options: dict[str, Any]) -> None:
    """With dropout everywhere; the loss of a batch falls."""
    soft = options.get("cross_focus", "soft") == "soft"
    net = small_network("transformer", **options, dropout=0.1, attention_dropout=0.1 if soft else 0.0).train()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    source, target = Source.of(SOURCES), Ragged.of(TARGETS)
    torch.manual_seed(1)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            output = net(source, target)
            loss = F.cross_entropy(net.readout(output.hidden).float(), target.ids_N.roll(-1))
        (loss + sum(weighted for weighted, _ in output.aux.values()) / len(target.ids_N)).backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"cross_source": "same", "decoder_layers": 3}, ("cross_source", "encoder_layers", "decoder_layers")),
        ({"cross_focus": "gumbel", "attention_dropout": 0.1}, ("cross_focus", "attention_dropout")),
        ({"temperature": 0.0}, ("temperature",)),
        ({"tied": "all", "target_vocabulary": 9}, ("tied",)),
    ],
)
def test_what_does_not_go_together_is_refused(options: dict[str, Any], named: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as caught:
        small_network("transformer", **options)
    assert all(name in str(caught.value) for name in named)


@pytest.mark.parametrize(
    "options",
    [
        {"norm": "batch"},
        {"residual": False},
        {"score_scale": False},
        {"cross_source": "same"},
        {"cross_focus": "gumbel"},
        {"position_join": "concatenate", "position_width": 4},
        *({"positions": kind} for kind in ("none", "complex", "relative", "t5", "alibi")),
    ],
    ids=str,
)
def test_other_programs_are_not_told_what_they_do_not_know(options: dict[str, Any]) -> None:
    net = small_network("transformer", **options)
    bundle: Any = SimpleNamespace(net=net, folder="here")
    name, value = next(iter(options.items()))
    with pytest.raises(ConfigError, match=f"Other has no Transformer with {name} = {value!r}"):
        transformer_of(bundle, "Other")


READERS: list[dict[str, Any]] = [
    {"positions": "relative", "reach": 3, "norm": "batch"},
    {"positions": "t5", "buckets": 8, "farthest": 6, "score_scale": False},
    {"positions": "complex", "residual": False},
    {"positions": "alibi", "norm_place": "pre"},
    {"position_join": "concatenate", "position_width": 4},
]


@pytest.mark.parametrize("options", READERS, ids=lambda options: "-".join(map(str, options.values())))
@torch.inference_mode()
def test_an_encoder_that_was_pretrained_with_it_reads_the_same(options: dict[str, Any]) -> None:
    sizes = {"source_vocabulary": 23, "width": 16, "feed_forward": 32, "heads": 2, "encoder_layers": 2}
    known = {"embedding_norm": True, "embedding_scale": False, "activation": "gelu", "segments": 2}
    torch.manual_seed(1)
    reader = MaskedEncoder(MaskedEncoderConfig(**sizes, longest=40, epsilon=1e-5, **options)).eval()
    config = TransformerConfig(
        target_vocabulary=23, longest=40, epsilon=1e-5, **sizes, **known,
        **{"positions": "learned", **options},
    )  # fmt: skip
    net = Transformer(config).eval()
    net.load_state_dict(init_from.with_encoder(net.state_dict(), reader.state_dict(), where="there"))
    assert torch.equal(net.read(Source.of(SOURCES)), reader.read(Source.of(SOURCES)))
    alone = torch.cat([reader.read(Source.of([sentence])) for sentence in SOURCES])
    torch.testing.assert_close(reader.read(Source.of(SOURCES)), alone, **CLOSE)


def test_bundles_of_before_have_the_encoder_they_always_had() -> None:
    network = dict.fromkeys(init_from.ENCODER_FIELDS, 1)
    manifest: Any = SimpleNamespace(network=network, architecture="transformer")
    found = init_from.encoder_fields(manifest, where="there")  # type: ignore[arg-type]
    assert found["residual"] is True and found["position_join"] == "add" and found["width"] == 1


def test_bert_has_none_of_the_options() -> None:
    usual = MaskedEncoderConfig(source_vocabulary=9)
    assert all(getattr(usual, name) == value for name, value in FIXED.items())
    assert {"residual", "score_scale", "position_join"} <= set(FIXED)
