"""Variants of the Transformer against a Transformer written out in plain torch functions."""

from __future__ import annotations

import math
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.fakes import random_sentences, small_network
from tests.variants import TABLE, Variant
from trmt.bundles import init_from
from trmt.bundles.upgrade import upgrade_network
from trmt.errors import ConfigError
from trmt.interop.base import transformer_of
from trmt.lab.masked_encoder import MaskedEncoderConfig
from trmt.nets.base import Decoding, WantedWeights
from trmt.nets.layers import sinusoids
from trmt.nets.linear import PlainProducts
from trmt.nets.ragged import Ragged, Source
from trmt.registry import NETWORKS, VARIANTS, join_variants, resolve, split_variants

THERE = Path("there")
CLOSE = {"atol": 2e-5, "rtol": 1e-4}
SOURCES = random_sentences(4, seed=1)
TARGETS = [[1, *sentence] for sentence in random_sentences(4, seed=2)]


class Plain:
    """One sentence through the weights of a network, with nothing shared, cached or fused."""

    def __init__(self, net: Any, name: str) -> None:
        self.net, self.config = net, net.config
        self.variants = split_variants(name)[1]

    def logits(self, source: list[int], target: list[int]) -> Tensor:
        net = self.net
        x, outputs = self.embedded(net.encoder, source), []
        for layer in net.encoder.layers:
            x = self.sublayer(
                layer.self_norm, x, lambda x, layer=layer: self.self_attend(layer, x, causal=False)
            )
            x = self.sublayer(layer.feed_forward_norm, x, lambda x, layer=layer: self.feed_forward(layer, x))
            outputs.append(x)
        y = self.embedded(net.decoder, target)
        for index, layer in enumerate(net.decoder.layers):
            cross = lambda y, index=index, layer=layer: self.cross_attend(index, layer, y, outputs)  # noqa: E731
            y = self.sublayer(
                layer.self_norm, y, lambda y, layer=layer: self.self_attend(layer, y, causal=True)
            )
            y = self.sublayer(layer.cross_norm, y, cross)
            y = self.sublayer(layer.feed_forward_norm, y, lambda y, layer=layer: self.feed_forward(layer, y))
        if self.config.norm_position == "pre":
            y = net.decoder.norm(y)
        return y @ net.output.weight.T

    def embedded(self, stack: Any, ids: list[int]) -> Tensor:
        x = stack.embedding.tokens(torch.tensor(ids)) * math.sqrt(self.config.d_model)
        return x + sinusoids(len(ids), self.config.d_model)

    def sublayer(self, norm: Any, x: Tensor, function: Any) -> Tensor:
        kept = torch.zeros_like(x) if "no-residual" in self.variants else x
        if self.config.norm_position == "post":
            return norm(kept + function(x))
        return kept + function(norm(x))

    def feed_forward(self, layer: Any, x: Tensor) -> Tensor:
        inner = layer.feed_forward.inner
        return layer.feed_forward.outer(F.relu(F.linear(x, inner.weight, inner.bias)))

    def self_attend(self, layer: Any, x: Tensor, *, causal: bool) -> Tensor:
        return layer.self_out(self.attend(*layer.self_qkv(x).chunk(3, -1), causal=causal))

    def cross_attend(self, index: int, layer: Any, y: Tensor, outputs: list[Tensor]) -> Tensor:
        net, pre = self.net, self.config.norm_position == "pre"
        if "same-layer" in self.variants:
            norms = [*net.encoder.lower_norms, net.encoder.norm]
            output = norms[index](outputs[index]) if pre else outputs[index]
            kv = net.cross_kv.layers[index](output)
        else:
            output = net.encoder.norm(outputs[-1]) if pre else outputs[-1]
            kv = net.cross_kv(output).chunk(self.config.decoder_layers, -1)[index]
        hard = "hard" in self.variants
        return layer.cross_out(self.attend(layer.cross_query(y), *kv.chunk(2, -1), causal=False, hard=hard))

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, *, causal: bool, hard: bool = False
    ) -> Tensor:
        query, key, value = (
            x.unflatten(-1, (self.config.heads, -1)).transpose(0, 1) for x in (query, key, value)
        )
        scores = query @ key.transpose(-2, -1)
        if "unscaled" not in self.variants:
            scores = scores / math.sqrt(query.shape[-1])
        if causal:
            scores = scores + torch.full(scores.shape[-2:], -torch.inf).triu(1)
        weights = F.one_hot(scores.argmax(-1), scores.shape[-1]).float() if hard else scores.softmax(-1)
        return (weights @ value).transpose(0, 1).flatten(1)


COMBINATIONS = [
    [name for name, wanted in zip(("no-residual", "unscaled", "same-layer"), which, strict=True) if wanted]
    for which in product([False, True], repeat=3)
]


@pytest.mark.parametrize("norm_position", ["post", "pre"])
@pytest.mark.parametrize("variants", COMBINATIONS, ids="+".join)
@torch.inference_mode()
def test_a_variant_equals_what_is_written_out(variants: list[str], norm_position: Any) -> None:
    check(join_variants("transformer", variants), norm_position=norm_position, heads=4)


@pytest.mark.parametrize("heads", [1, 2, 16])
@pytest.mark.parametrize("how", ["sampled", "gumbel"])
@torch.inference_mode()
def test_hard_attention_takes_the_likeliest_position(how: Any, heads: int) -> None:
    check("transformer-hard", cross_attention=how, heads=heads)


def check(name: str, **options: Any) -> None:
    """Packed and step by step."""
    net = small_network(name, **options)
    hidden = net(Source.of(SOURCES), Ragged.of(TARGETS)).hidden
    packed = net.readout(hidden).split([len(each) for each in TARGETS])
    stepper = net.frozen(PlainProducts())
    for number, (source, target) in enumerate(zip(SOURCES, TARGETS, strict=True)):
        expected = Plain(net, name).logits(source, target)
        torch.testing.assert_close(packed[number], expected, **CLOSE)
        state = stepper.start(Source.of([source]), Decoding(hypotheses=1, max_tokens=12))
        for position, token in enumerate(target):
            step, state = stepper.step(torch.tensor([[[token]]]), state)
            torch.testing.assert_close(stepper.readout(step)[0, 0, 0], expected[position], **CLOSE)


@pytest.mark.parametrize("how", ["sampled", "gumbel"])
def test_each_head_of_each_layer_draws_one_position(how: Any) -> None:
    net: Any = small_network("transformer-hard", cross_attention=how).train()
    torch.manual_seed(1)
    output = net(Source.of(SOURCES), Ragged.of(TARGETS), want=WantedWeights(cross=True))
    weights = output.cross_attention
    assert weights is not None and weights.shape[:3] == (2, 4, 2)
    for row, (source, target) in enumerate(zip(SOURCES, TARGETS, strict=True)):
        drawn = weights[:, row, :, : len(target)]
        assert (drawn.detach().round(decimals=5).amax(-1) == 1).all()
        torch.testing.assert_close(drawn.sum(-1), torch.ones(drawn.shape[:-1]))
        assert not drawn[..., len(source) :].any()
    assert set(output.aux) == ({"reinforce", "baseline", "entropy"} if how == "sampled" else set())
    if how == "gumbel":
        net.readout(output.hidden).logsumexp(-1).sum().backward()
        assert net.decoder.layers[0].cross_query.weight.grad.any()


def test_draws_are_reinforced_by_the_tokens_that_follow() -> None:
    """The losses, summed up by hand from the probabilities of the positions that were drawn."""
    options = {"cross_attention": "sampled", "decoder_layers": 1, "encoder_layers": 1}
    net: Any = small_network("transformer-hard", **options).train()
    source, target = [5, 9, 7, 4], [1, 8, 6, 11]
    queries: list[Tensor] = []
    net.decoder.layers[0].cross_query.register_forward_hook(lambda *given: queries.append(given[2]))
    output = net(Source.of([source]), Ragged.of([target]), want=WantedWeights(cross=True))
    assert output.cross_attention is not None
    key = net.cross_kv(net.encode_packed(Source.of([source]))).chunk(2, -1)[0]
    query, key = (x.unflatten(-1, (2, -1)).transpose(0, 1) for x in (queries[0], key))
    log_probs = (query @ key.transpose(-2, -1) / math.sqrt(8)).log_softmax(-1)
    drawn = (log_probs * output.cross_attention[0, 0]).sum(-1).sum(0)
    tokens = net.readout(output.hidden).log_softmax(-1)
    reward = torch.stack([tokens[position, token] for position, token in enumerate(target[1:])])
    advantage = reward - net.baseline(queries[0])[:3, 0]
    expected = -(advantage.detach() * drawn[:3]).sum()
    torch.testing.assert_close(output.aux["reinforce"], expected, **CLOSE)
    torch.testing.assert_close(output.aux["baseline"], advantage.detach().square().sum() / 2, **CLOSE)


ALL_VARIANTS = [
    variant for name, table in TABLE.items() if name.startswith("transformer-") for variant in table
]


@pytest.mark.parametrize("variant", ALL_VARIANTS, ids=str)
def test_every_variant_learns_in_half_precision_too(variant: Variant) -> None:
    """With dropout everywhere; the loss of a batch falls."""
    dropout = {"dropout": 0.1, "attention_dropout": 0.0 if "hard" in variant.name else 0.1}
    net = small_network(variant.name, **{**variant.options, **dropout}).train()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    source, target = Source.of(SOURCES), Ragged.of(TARGETS)
    torch.manual_seed(1)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            output = net(source, target)
            loss = F.cross_entropy(net.readout(output.hidden).float(), target.ids_N.roll(-1))
        (loss + sum(output.aux.values()) / len(target.ids_N)).backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("transformer-same-layer", {"decoder_layers": 3}, ("encoder_layers", "decoder_layers")),
        ("transformer-hard", {"attention_dropout": 0.1}, ("cross_attention", "attention_dropout")),
        ("transformer-hard", {"temperature": 0.0}, ("temperature",)),
        ("transformer", {"tied": "all", "target_vocabulary": 9}, ("tied",)),
        ("transformer-alibi+relative", {}, ("ALiBi", "RelativePositions", "positions")),
        ("transformer-t5+concatenated", {}, ("T5Positions", "ConcatenatedPositions", "positions")),
        ("transformer-alibi+encoder", {}, ("transformer-alibi+encoder",)),
    ],
)
def test_options_that_exclude_each_other_are_refused(
    name: str, options: dict[str, Any], words: tuple[str, ...]
) -> None:
    with pytest.raises(ConfigError) as caught:
        small_network(name, **options)
    assert all(word in str(caught.value) for word in words)


ENCODERS: list[tuple[list[str], dict[str, Any]]] = [
    ([], {}),
    (["relative", "batch-norm"], {"max_distance": 3}),
    (["t5", "unscaled"], {"buckets": 8, "max_distance": 6}),
    (["complex", "no-residual"], {}),
    (["alibi"], {"norm_position": "pre"}),
    (["concatenated"], {"position_columns": 4}),
    (["no-positions"], {}),
]


@pytest.mark.parametrize(("variants", "options"), ENCODERS, ids=lambda value: "+".join(value))
@torch.inference_mode()
def test_a_network_with_a_pretrained_encoder_encodes_the_same(
    variants: list[str], options: dict[str, Any]
) -> None:
    def made(base: str, **more: Any) -> Any:
        torch.manual_seed(1)
        network = resolve(NETWORKS, join_variants(base, variants))
        sizes = {"source_vocabulary": 23, "d_model": 16, "feed_forward": 32, "heads": 2, "encoder_layers": 2}
        shared = {"embedding_norm": True, "embedding_scale": False, "activation": "gelu"}
        common = {**sizes, **shared, "max_positions": 40, "norm_epsilon": 1e-5}
        return network(network.config_class(**common, **options, **more)).eval()

    segments = 1 if variants else 2  # which only a table of positions can take over
    encoder = made("masked-encoder", segments=segments)
    net = made("transformer", target_vocabulary=23, **({} if variants else {"positions": "learned"}))
    net.load_state_dict(init_from.with_encoder(net.state_dict(), encoder.state_dict(), where="there"))
    ours, theirs = (each.encode_packed(Source.of(SOURCES)) for each in (net, encoder))
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)
    alone = torch.cat([encoder.encode_packed(Source.of([sentence])) for sentence in SOURCES])
    torch.testing.assert_close(encoder.encode_packed(Source.of(SOURCES)), alone, **CLOSE)


def encoder_of(architecture: str, network: dict[str, Any]) -> init_from.EncoderOptions:
    """What a network must have to take over an encoder that an earlier trmt described so."""
    old = {
        "width": 16, "feed_forward": 32, "heads": 2, "encoder_layers": 2, "norm_place": "post",
        "norm": "layer", "epsilon": 0.0, "embedding_norm": True, "embedding_scale": False,
        "activation": "gelu", "positions": "learned", "longest": 40,
    }  # fmt: skip
    name, options = upgrade_network(architecture, {**old, **network})
    manifest: Any = SimpleNamespace(network=options, architecture=name)
    return init_from.encoder_options(manifest, where=THERE)


def test_the_options_of_an_encoder_are_those_of_its_variants_too() -> None:
    plain = encoder_of("masked-encoder", {"segments": 2})
    assert plain.variants == [] and plain.network["positions"] == "learned" and plain.network["d_model"] == 16
    relative = encoder_of("masked-encoder", {"positions": "relative", "reach": 3, "score_scale": False})
    assert relative.variants == ["relative", "unscaled"] and relative.network["max_distance"] == 3
    init_from.check_options("transformer-relative+unscaled+hard", relative.network, relative, where=THERE)
    with pytest.raises(ConfigError, match="batch-norm"):
        name = "transformer-relative+unscaled+batch-norm"
        init_from.check_options(name, relative.network, relative, where=THERE)
    with pytest.raises(ConfigError, match="max_distance"):
        network = {**relative.network, "max_distance": 4}
        init_from.check_options("transformer-relative", network, relative, where=THERE)


def test_sinusoidal_positions_become_learned_with_the_vector_of_a_segment() -> None:
    encoder = encoder_of("masked-encoder", {"positions": "sinusoidal", "segments": 2})
    assert encoder.network["positions"] == "learned"
    with pytest.raises(ConfigError, match=r"segments = 2 with positions = 'rotary'"):
        encoder_of("masked-encoder", {"positions": "rotary", "segments": 2})


@pytest.mark.parametrize("variant", VARIANTS)
def test_other_programs_have_none_of_the_variants(variant: str) -> None:
    name = f"transformer-{variant}"
    manifest = SimpleNamespace(architecture=name)
    bundle: Any = SimpleNamespace(net=small_network(name), manifest=manifest, folder="here")
    with pytest.raises(ConfigError, match=f"Other has no networks like '{name}'"):
        transformer_of(bundle, "Other")


def test_bert_has_none_of_the_variants() -> None:
    usual = MaskedEncoderConfig(source_vocabulary=9)
    assert (usual.norm_position, usual.norm, usual.activation) == ("post", "layer", "gelu")
    assert (usual.positions, usual.embedding_norm, usual.embedding_scale) == ("learned", True, False)
