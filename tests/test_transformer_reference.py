"""The Transformer against torch.nn.Transformer, an independent implementation, with the same weights."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from trmt.nets.transformer_layers import Layer

from tests.fakes import random_sentences
from trmt.nets.base import Ragged, Source
from trmt.nets.layers import sinusoids
from trmt.nets.linear import eager
from trmt.nets.transformer import Transformer, TransformerConfig

SOURCES = random_sentences(5, longest=21, seed=1)
TARGETS = [[1, *sentence] for sentence in random_sentences(5, longest=17, seed=2)]


def shaken(net: nn.Module) -> None:
    """Random values for what begins as zeros and ones, or mistakes there would not be seen."""
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)


def copy(theirs: Any, ours: Any) -> None:
    theirs.load_state_dict(ours.state_dict())


def copy_attention(
    theirs: nn.MultiheadAttention, weights: list[Tensor], biases: list[Tensor], out: Any
) -> None:
    theirs.in_proj_weight.copy_(torch.cat(weights))
    theirs.in_proj_bias.copy_(torch.cat(biases))
    copy(theirs.out_proj, out)


def copy_layer(theirs: Any, ours: Layer, memory: tuple[Tensor, Tensor] | None) -> None:
    copy_attention(theirs.self_attn, [ours.own.weight], [ours.own.bias], ours.own_out)
    norms = [ours.own_norm, ours.feed_norm]
    if memory is not None:
        weight, bias = memory  # of keys and values
        copy_attention(
            theirs.multihead_attn, [ours.query.weight, weight], [ours.query.bias, bias], ours.cross_out
        )
        norms.insert(1, ours.cross_norm)
    copy(theirs.linear1, ours.feed.inner)
    copy(theirs.linear2, ours.feed.outer)
    for index, norm in enumerate(norms, 1):
        copy(getattr(theirs, f"norm{index}"), norm)


@torch.no_grad()
def reference(net: Transformer, activation: str) -> nn.Transformer:
    """torch's Transformer with the weights of `net`."""
    config = net.config
    pre = config.norm_place == "pre"
    theirs = nn.Transformer(
        config.width, config.heads, config.encoder_layers, config.decoder_layers, config.feed_forward,
        dropout=0.0, activation=activation, batch_first=True, norm_first=pre,
    ).eval()  # fmt: skip
    # torch ends both stacks with a norm; the paper's post-norm network has none there.
    theirs.encoder.norm, theirs.decoder.norm = (
        (theirs.encoder.norm, theirs.decoder.norm) if pre else (None, None)
    )
    if pre:
        copy(theirs.encoder.norm, net.encoder_norm)
        copy(theirs.decoder.norm, net.decoder_norm)
    for mine, ours in zip(theirs.encoder.layers, net.encoder, strict=True):
        copy_layer(mine, ours, None)
    memories = zip(
        net.memory.weight.chunk(config.decoder_layers),
        net.memory.bias.chunk(config.decoder_layers),
        strict=True,
    )
    for mine, ours, memory in zip(theirs.decoder.layers, net.decoder, memories, strict=True):
        copy_layer(mine, ours, memory)
    return theirs


@pytest.mark.filterwarnings("ignore:enable_nested_tensor:UserWarning")
@pytest.mark.parametrize(("place", "activation"), list(product(["post", "pre"], ["relu", "gelu"])))
@torch.no_grad()
def test_it_equals_torchs_transformer(place: Any, activation: Any) -> None:
    torch.manual_seed(3)
    config = TransformerConfig(
        source_vocabulary=23, target_vocabulary=23, width=32, feed_forward=64, heads=4,
        encoder_layers=3, decoder_layers=2, norm_place=place, activation=activation, longest=64,
    )  # fmt: skip
    net = Transformer(config).eval()
    shaken(net)
    theirs, table = reference(net, activation), sinusoids(64, 32)
    frozen = net.frozen(eager)
    for source, target in zip(SOURCES, TARGETS, strict=True):
        embedded = [
            net.target_embedding(torch.tensor([ids])) * math.sqrt(32) + table[: len(ids)]
            for ids in (source, target)
        ]
        causal = nn.Transformer.generate_square_subsequent_mask(len(target))
        expected = theirs(*embedded, tgt_mask=causal)[0] @ net.target_embedding.weight.T
        found = net.readout(net(Source.of([source]), Ragged.of([target])).hidden)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        state = frozen.start(Source.of([source]), hypotheses=1, room=len(target))
        output, _ = frozen.step(torch.tensor([[target]]), state)
        torch.testing.assert_close(frozen.readout(output.hidden)[0, 0], expected, atol=1e-4, rtol=1e-4)


def test_the_base_model_has_the_papers_size() -> None:
    with torch.device("meta"):
        net = Transformer(TransformerConfig(source_vocabulary=37_000, target_vocabulary=37_000))
    # 37,000 x 512 embeddings once, 6 encoder layers and 6 decoder layers with all biases and norms.
    width, inner = 512, 2048
    attention, feed, norm = 4 * (width * width + width), 2 * width * inner + inner + width, 2 * width
    layers = 6 * (attention + feed + 2 * norm) + 6 * (2 * attention + feed + 3 * norm)
    assert sum(parameter.numel() for parameter in net.parameters()) == 37_000 * width + layers == 63_082_496


@torch.no_grad()
def test_a_bias_of_the_output_is_part_of_every_way_to_read_out() -> None:
    torch.manual_seed(3)
    config = TransformerConfig(
        source_vocabulary=23, target_vocabulary=23, width=32, heads=4, output_bias=True
    )
    net = Transformer(config).eval()
    shaken(net)
    frozen, hidden, only = net.frozen(eager), torch.randn(18, 32), torch.tensor([4, 22, 7])
    expected = hidden @ net.target_embedding.weight.T + net.output_bias
    for found in (net, frozen):
        torch.testing.assert_close(found.readout(hidden), expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found.readout(hidden, only), expected[:, only], atol=1e-5, rtol=1e-5)
    assert net.readout_matrix() is None, "a loss that knows of the matrix alone would leave the bias out"
