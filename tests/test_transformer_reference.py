"""The Transformer against torch.nn.Transformer, an independent implementation, with the same weights."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.fakes import random_sentences
from trmt.nets.base import Decoding
from trmt.nets.layers import sinusoids
from trmt.nets.linear import PlainProducts
from trmt.nets.ragged import Ragged, Source
from trmt.nets.transformer import Transformer, TransformerConfig

SOURCES = random_sentences(5, longest=21, seed=1)
TARGETS = [[1, *sentence] for sentence in random_sentences(5, longest=17, seed=2)]


def randomise(net: nn.Module) -> None:
    """Random values for parameters that are zeros and ones at first, which would hide mistakes."""
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


def copy_layer(theirs: Any, ours: Any, cross_kv: tuple[Tensor, Tensor] | None) -> None:
    copy_attention(theirs.self_attn, [ours.self_qkv.weight], [ours.self_qkv.bias], ours.self_out)
    norms = [ours.self_norm, ours.feed_forward_norm]
    if cross_kv is not None:
        weight, bias = cross_kv
        weights, biases = [ours.cross_query.weight, weight], [ours.cross_query.bias, bias]
        copy_attention(theirs.multihead_attn, weights, biases, ours.cross_out)
        norms.insert(1, ours.cross_norm)
    copy(theirs.linear1, ours.feed_forward.inner)
    copy(theirs.linear2, ours.feed_forward.outer)
    for index, norm in enumerate(norms, 1):
        copy(getattr(theirs, f"norm{index}"), norm)


@torch.no_grad()
def reference(net: Transformer, activation: str) -> nn.Transformer:
    """torch's Transformer with the weights of `net`."""
    config = net.config
    pre = config.norm_position == "pre"
    theirs = nn.Transformer(
        config.d_model, config.heads, config.encoder_layers, config.decoder_layers, config.feed_forward,
        dropout=0.0, activation=activation, batch_first=True, norm_first=pre,
    ).eval()  # fmt: skip
    # torch ends both stacks with a norm; the paper's post-norm network has none there.
    if pre:
        copy(theirs.encoder.norm, net.encoder.norm)
        copy(theirs.decoder.norm, net.decoder.norm)
    else:
        theirs.encoder.norm = theirs.decoder.norm = None
    for mine, ours in zip(theirs.encoder.layers, net.encoder.layers, strict=True):
        copy_layer(mine, ours, None)
    cross_kv: Any = net.cross_kv
    weights, biases = (x.chunk(config.decoder_layers) for x in (cross_kv.weight, cross_kv.bias))
    for mine, ours, *both in zip(theirs.decoder.layers, net.decoder.layers, weights, biases, strict=True):
        copy_layer(mine, ours, (both[0], both[1]))
    return theirs


@pytest.mark.filterwarnings("ignore:enable_nested_tensor:UserWarning")
@pytest.mark.parametrize(("norm_position", "activation"), list(product(["post", "pre"], ["relu", "gelu"])))
@torch.no_grad()
def test_it_equals_the_transformer_of_torch(norm_position: Any, activation: Any) -> None:
    torch.manual_seed(3)
    config = TransformerConfig(
        source_vocabulary=23, target_vocabulary=23, d_model=32, feed_forward=64, heads=4, encoder_layers=3,
        decoder_layers=2, norm_position=norm_position, activation=activation, max_positions=64,
    )  # fmt: skip
    net = Transformer(config).eval()
    randomise(net)
    theirs, table, tokens = reference(net, activation), sinusoids(64, 32), net.decoder.embedding.tokens
    stepper = net.frozen(PlainProducts())
    for source, target in zip(SOURCES, TARGETS, strict=True):
        embedded = [
            tokens(torch.tensor([ids])) * math.sqrt(32) + table[: len(ids)] for ids in (source, target)
        ]
        causal = nn.Transformer.generate_square_subsequent_mask(len(target))
        expected = theirs(*embedded, tgt_mask=causal)[0] @ tokens.weight.T
        found = net.readout(net(Source.of([source]), Ragged.of([target])).hidden)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        state = stepper.start(Source.of([source]), Decoding(1, len(target)))
        hidden, _ = stepper.step(torch.tensor([[target]]), state)
        torch.testing.assert_close(stepper.readout(hidden)[0, 0], expected, atol=1e-4, rtol=1e-4)


def test_the_base_model_has_the_size_of_the_paper() -> None:
    with torch.device("meta"):
        net = Transformer(TransformerConfig(source_vocabulary=37_000, target_vocabulary=37_000))
    # 37,000 x 512 embeddings once, 6 encoder layers and 6 decoder layers with all biases and norms.
    d_model, inner = 512, 2048
    attention, norm = 4 * (d_model * d_model + d_model), 2 * d_model
    feed_forward = 2 * d_model * inner + inner + d_model
    layers = 6 * (attention + feed_forward + 2 * norm) + 6 * (2 * attention + feed_forward + 3 * norm)
    assert sum(parameter.numel() for parameter in net.parameters()) == 37_000 * d_model + layers == 63_082_496


@torch.no_grad()
def test_the_output_bias_is_added_wherever_logits_are_computed() -> None:
    torch.manual_seed(3)
    config = TransformerConfig(
        source_vocabulary=23, target_vocabulary=23, d_model=32, heads=4, output_bias=True
    )
    net = Transformer(config).eval()
    randomise(net)
    hidden = torch.randn(18, 32)
    expected = hidden @ net.output.weight.T + net.output_bias
    for readout in (net.readout, net.frozen(PlainProducts()).readout):
        torch.testing.assert_close(readout(hidden), expected, atol=1e-5, rtol=1e-5)
    assert net.readout_matrix() is None, "a loss that gets the matrix alone would leave the bias out"
