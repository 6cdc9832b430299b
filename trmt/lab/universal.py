"""The Universal Transformer (Dehghani et al., arXiv 1807.03819): one layer, again and again.

Encoder and decoder have one layer each, whose weights all steps share. Before every step the vectors of its
position and of the step are added to a state. With adaptive computation time (Graves, arXiv 1603.08983) each
position halts after a number of steps of its own: the state of a step counts with the probability of halting
there, and a position that has halted keeps its state while others go on and attend to it.

Axes: S sentence, K hypothesis, L source position, Q queries (K * T of them when decoding), N target tokens of
a batch in a row, M source tokens in a row, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trmt.nets import kv_cache, layers
from trmt.nets.base import (
    NO_WEIGHTS,
    DecoderState,
    Decoding,
    EncoderMemory,
    FrozenLinear,
    Output,
    Products,
    WantedWeights,
    stack_weights,
)
from trmt.nets.layers import Spans, Sublayer
from trmt.nets.ragged import Ragged, Source
from trmt.nets.transformer import (
    CrossAttention,
    Decoder,
    DecoderLayer,
    Encoder,
    EncoderConfig,
    EncoderLayer,
    SelfAttention,
    TokenEmbedding,
    Transformer,
    TransformerConfig,
    Weights,
)

MIN_OUTPUTS = 16  # of a product that torch computes like larger ones
IDENTITY = nn.Identity()


@dataclass(frozen=True, kw_only=True)
class UniversalConfig(TransformerConfig):
    """The sizes and options of a Universal Transformer; the defaults are the paper's base model."""

    # Options of the Transformer that are none here
    encoder_layers: ClassVar[int] = 1  # type: ignore[misc]
    decoder_layers: ClassVar[int] = 1  # type: ignore[misc]
    positions: ClassVar[Literal["sinusoidal"]] = "sinusoidal"  # type: ignore[misc]
    encoder_steps: int = 6  # how often the layer is applied, at most with halting = "adaptive"
    decoder_steps: int = 6  # the same in the decoder
    halting: Literal["adaptive", "fixed"] = "adaptive"  # whether positions halt by themselves
    threshold: float = (
        0.99  # probability of having halted at which a position halts; the last step gets the rest
    )
    ponder: float = 0.01  # the loss of one step of one position


class UniversalEmbedding(TokenEmbedding):
    """Scaled embeddings; positions are added before every step."""

    positions: Tensor

    def embed(self, ids: Tensor, position: Tensor) -> Tensor:
        return F.embedding(ids, self.tokens.weight) * self.scale


class Halt(nn.Linear):
    """The logit of halting at a state; high at first, because many steps are hard to learn."""

    def __init__(self, d_model: int) -> None:
        super().__init__(d_model, 1)
        layers.xavier(self)
        nn.init.ones_(self.bias)

    def frozen_as(self, products: Products) -> FrozenLinear:
        """For inference, with the same bits whatever the number of rows.

        On the CPU, torch computes products with one output in another way than larger ones; outputs of zeros
        make it large enough.
        """
        missing = MIN_OUTPUTS - 1
        weight = F.pad(self.weight.detach(), (0, 0, 0, missing))
        product = products(weight, F.pad(self.bias.detach(), (0, missing)))
        return FrozenLinear(lambda x: product(x)[..., :1])


class Steps(nn.Module):
    """Applies a layer step by step, until all positions have halted."""

    step_table: Tensor
    keeps_fp32 = ("step_table",)

    def __init__(self, config: UniversalConfig, steps: int) -> None:
        super().__init__()
        self.halt = Halt(config.d_model) if config.halting == "adaptive" else None
        self.threshold, self.dropout, self.pre_norm = (
            config.threshold,
            config.dropout,
            config.norm_position == "pre",
        )
        self.register_buffer("step_table", layers.sinusoids(steps, config.d_model), persistent=False)

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        sublayers: Callable[[int], list[Sublayer]],
        *,
        all_steps: bool,
    ) -> tuple[Tensor, Tensor]:
        """The states after the steps, and the number of steps of all positions.

        `sublayers` are those of a step. `all_steps` are taken where even those that change nothing are
        wanted.
        """

        def transition(step: int, x: Tensor) -> Tensor:
            p = self.dropout if self.training else 0.0
            return layers.residual(x, sublayers(step), IDENTITY if self.pre_norm else None, p)

        def inputs(step: int, x: Tensor) -> Tensor:
            return (x + positions + self.step_table[step]).to(x.dtype)

        return ponder(
            x, len(self.step_table), inputs, transition, self.halt, self.threshold, all_steps=all_steps
        )


def ponder(
    x: Tensor,
    steps: int,
    inputs: Callable[[int, Tensor], Tensor],
    transition: Callable[[int, Tensor], Tensor],
    halt: Callable[[Tensor], Tensor] | None,
    threshold: float,
    *,
    all_steps: bool = False,
) -> tuple[Tensor, Tensor]:
    """The states after the steps, and the steps of all positions with their remainders, with a gradient."""
    if halt is None:
        for step in range(steps):
            x = transition(step, inputs(step, x))
        return x, x.new_full((), float(steps * x.shape[:-1].numel()))
    # Probabilities are added up in full precision, whatever the states have.
    out, halted = torch.zeros_like(x), torch.zeros(x.shape[:-1], device=x.device)
    running = torch.ones_like(halted, dtype=torch.bool)
    total = x.new_zeros(())
    for step in range(steps):
        input_ = inputs(step, x)
        probability = halt(input_).float().sigmoid().squeeze(-1)
        ends = halted + probability > threshold if step + 1 < steps else torch.ones_like(running)
        ends = ends & running
        weight = (1 - halted).where(ends, probability).where(running, 0.0)
        new = transition(step, input_)
        out = out + weight[..., None].to(x.dtype) * new
        total = total + running.sum() + weight.where(ends, 0.0).sum()
        halted = halted + weight
        # A position that has halted keeps its state; the others attend to it.
        x = new.where(running[..., None], x)
        running = running & ~ends
        if not all_steps and not bool(running.any()):
            break
    return out, total


class UniversalEncoder(Encoder):
    """An encoder with one layer."""

    embedding: UniversalEmbedding

    def __init__(self, config: EncoderConfig, embedding: TokenEmbedding, layer: type[EncoderLayer]) -> None:
        super().__init__(config, embedding, layer)
        assert isinstance(config, UniversalConfig)
        self.steps = Steps(config, config.encoder_steps)

    def run(
        self, ids: Tensor, position: Tensor, self_attention: SelfAttention, *, all_steps: bool = False
    ) -> tuple[Tensor, Tensor]:
        """The encoder output on any layout, and the number of steps of all positions."""
        [layer] = self.layers

        def sublayers(step: int) -> list[Sublayer]:
            return [layer.self_sublayer(partial(self_attention, step)), layer.feed_forward_sublayer()]

        positions = self.embedding.positions[0, position]
        x, total = self.steps(self.embedding(ids, position), positions, sublayers, all_steps=all_steps)
        return (x if self.norm is None else self.norm(x)), total


class UniversalDecoder(Decoder):
    """A decoder with one layer."""

    embedding: UniversalEmbedding

    def __init__(
        self, config: TransformerConfig, embedding: TokenEmbedding, layer: type[DecoderLayer]
    ) -> None:
        super().__init__(config, embedding, layer)
        assert isinstance(config, UniversalConfig)
        self.steps = Steps(config, config.decoder_steps)

    def run(
        self,
        ids: Tensor,
        position: Tensor,
        self_attention: SelfAttention,
        cross_attention: CrossAttention,
        *,
        all_steps: bool,
    ) -> tuple[Tensor, Tensor]:
        """Hidden states on any layout, and the number of steps of all positions.

        Attention gets the step for a layer; self-attention covers the same step of earlier tokens.
        """
        [layer] = self.layers

        def sublayers(step: int) -> list[Sublayer]:
            return [
                layer.self_sublayer(partial(self_attention, step)),
                layer.cross_sublayer(partial(cross_attention, step)),
                layer.feed_forward_sublayer(),
            ]

        positions = self.embedding.positions[0, position]
        x, total = self.steps(self.embedding(ids, position), positions, sublayers, all_steps=all_steps)
        return (x if self.norm is None else self.norm(x)), total

    def forward(
        self, ids: Tensor, position: Tensor, self_attention: SelfAttention, cross_attention: CrossAttention
    ) -> Tensor:
        # All steps: a later token may take more of them and attend to the keys of this one.
        only_layer = partial(cross_attention, 0)
        hidden, _ = self.run(
            ids, position, self_attention, lambda step, query: only_layer(query), all_steps=True
        )
        return hidden


class Universal(Transformer):
    """The Universal Transformer.

    It computes no padding, but counts the steps of all positions it is given, so batches are not filled up.
    """

    config: UniversalConfig
    config_class = UniversalConfig
    encoder: UniversalEncoder
    encoder_class = UniversalEncoder
    decoder: UniversalDecoder
    takes_encoder = False
    packs_tokens = False
    layers_called_once = False
    pays_to_compile = False

    def __init__(self, config: UniversalConfig) -> None:
        super().__init__(config)
        self.decoder = UniversalDecoder(config, self.decoder.embedding, self.decoder_layer)

    def make_embedding(
        self, config: EncoderConfig, tokens: nn.Embedding, *, decoder: bool
    ) -> UniversalEmbedding:
        return UniversalEmbedding(config, tokens)

    def forward(self, source: Source, target: Ragged, *, want: WantedWeights = NO_WEIGHTS) -> Output:
        self.check_length(source)
        config, spans, source_spans = self.config, Spans.of(target), Spans.of(source)
        position_M, position_N = source.positions_N(), target.positions_N()
        cross: list[Tensor] = []
        encoder: Weights = [] if want.encoder else None
        decoder: Weights = [] if want.decoder else None
        wanted = want.cross_layers(config.decoder_steps)

        def encoder_attention(step: int, qkv_M3D: Tensor) -> Tensor:
            return self.packed_self_attention(
                step, qkv_M3D, position_M, source_spans, causal=False, weights=encoder
            )

        def self_attention(step: int, qkv_N3D: Tensor) -> Tensor:
            return self.packed_self_attention(step, qkv_N3D, position_N, spans, causal=True, weights=decoder)

        def cross_attention(step: int, query_ND: Tensor) -> Tensor:
            dropout = config.attention_dropout if self.training else 0.0
            if step in wanted:
                key_MD = kv_M2D.chunk(2, -1)[0]
                both, only = (spans, source_spans), want.cross_heads(config.heads)
                cross.append(layers.packed_weights(query_ND, key_MD, *both, config.heads, only=only))
            return layers.packed_cross_attention(
                query_ND, kv_M2D, spans, source_spans, config.heads, dropout=dropout
            )

        encoded_MD, encoder_steps = self.encoder.run(
            source.ids_N, position_M, encoder_attention, all_steps=encoder is not None
        )
        kv_M2D = self.cross_kv(encoded_MD)
        hidden_ND, decoder_steps = self.decoder.run(
            target.ids_N,
            position_N,
            self_attention,
            cross_attention,
            all_steps=bool(wanted) or decoder is not None,
        )
        aux = {}
        if config.halting == "adaptive":
            aux["ponder"] = config.ponder * (encoder_steps + decoder_steps)
        weights = (stack_weights(each or ()) for each in (cross, encoder, decoder))
        return Output(hidden_ND, aux, *weights)

    def start(self, source: Source, decoding: Decoding) -> tuple[EncoderMemory, DecoderState]:
        memory = self.encode(source)
        sizes = (self.config.decoder_steps, self.config.heads, self.config.head_dim)
        return memory, kv_cache.make_cache(memory["key0"], len(source), decoding, sizes)

    def grid_cross_kv(self, ids_SL: Tensor, position_L: Tensor, self_attention: SelfAttention) -> Tensor:
        return self.cross_kv(self.encoder.run(ids_SL, position_L, self_attention)[0])
