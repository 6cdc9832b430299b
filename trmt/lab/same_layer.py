"""A Transformer whose decoder layers attend to the output of the encoder layer of the same number.

Axes: D hidden size, A layers; any axes before them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from trmt.errors import ConfigError
from trmt.nets.layers import Linear, module_list
from trmt.nets.transformer import (
    Encoder,
    EncoderConfig,
    EncoderLayer,
    SelfAttention,
    TokenEmbedding,
    Transformer,
    TransformerConfig,
)


@dataclass(frozen=True, kw_only=True)
class SameLayerConfig(TransformerConfig):
    """The sizes and options of a Transformer with as many layers on both sides."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.encoder_layers != self.decoder_layers:
            raise ConfigError(
                "cross-attention to the same layer needs as many layers on both sides, and encoder_layers = "
                f"{self.encoder_layers}, decoder_layers = {self.decoder_layers}; change one"
            )


class LayerwiseEncoder(Encoder):
    """An encoder that returns the outputs of all layers side by side; in pre-norm each has its own norm."""

    def __init__(self, config: EncoderConfig, embedding: TokenEmbedding, layer: type[EncoderLayer]) -> None:
        super().__init__(config, embedding, layer)
        lower = range(config.encoder_layers - 1) if self.norm is not None else ()
        self.lower_norms = module_list(config.make_norm() for _ in lower)

    def forward(self, x: Tensor, self_attention: SelfAttention) -> Tensor:
        p = self.dropout if self.training else 0.0
        outputs: list[Tensor] = []
        for index, layer in enumerate(self.layers):
            attention = layer.self_sublayer(partial(self_attention, index))
            for norm, sublayer in (attention, layer.feed_forward_sublayer()):
                if self.norm is None:
                    _, x = self.add_norm(x, sublayer(x), norm, p)
                else:
                    x, _ = self.add_norm(x, sublayer(norm(x)), nn.Identity(), p)
            outputs.append(x)
        if self.norm is not None:
            norms = [*self.lower_norms, self.norm]
            outputs = [norm(output) for norm, output in zip(norms, outputs, strict=True)]
        return torch.cat(outputs, -1)


class LayerwiseCrossKV(nn.Module):
    """Keys and values of each decoder layer from the output of the encoder layer beside it."""

    def __init__(self, d_model: int, count: int) -> None:
        super().__init__()
        self.layers = module_list(Linear(d_model, 2 * d_model, merged=2) for _ in range(count))

    def forward(self, x_AD: Tensor) -> Tensor:
        outputs = x_AD.chunk(len(self.layers), -1)
        return torch.cat([layer(x) for layer, x in zip(self.layers, outputs, strict=True)], -1)


class SameLayer(Transformer):
    """A Transformer with cross-attention to the same layer."""

    config_class = SameLayerConfig
    encoder_class = LayerwiseEncoder

    def __init__(self, config: SameLayerConfig) -> None:
        super().__init__(config)
        self.cross_kv = LayerwiseCrossKV(config.d_model, config.decoder_layers)
