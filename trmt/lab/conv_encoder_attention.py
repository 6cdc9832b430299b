"""ConvS2S with attention in the encoder, as Yin et al. (arXiv 1512.05193) add it to a convolutional network.

    before     x' = (x + attention(x)) / sqrt 2, then the convolution of x'
    after      h = convolution of x, then (h + attention(h)) / sqrt 2
    pooling    h = convolution of x, then in each window the sum of softmax(v . tanh(W h)) h

where `attention` is scaled dot-product self-attention of the sentence.

Axes: S sentence, L source position, W positions of a window, D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trmt.errors import ConfigError
from trmt.nets import layers
from trmt.nets.conv import HALF, ConvLayer, ConvS2S, ConvS2SConfig
from trmt.nets.layers import Linear


@dataclass(frozen=True, kw_only=True)
class ConvEncoderAttentionConfig(ConvS2SConfig):
    """The sizes of a convolutional network with attention in the encoder."""

    # self-attention before or after the convolution, or pooling of each window behind it
    encoder_attention: Literal["before", "after", "pooling"] = "before"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.encoder_attention == "pooling" and self.kernel == 1:
            raise ConfigError(
                'encoder_attention = "pooling" weighs the positions of a window, which with kernel = 1 has '
                "one; set network.kernel to 3 or more"
            )


class AttentiveConvLayer(ConvLayer):
    """A gated convolution with self-attention or with pooling by attention."""

    def __init__(self, config: ConvEncoderAttentionConfig) -> None:
        super().__init__(config)
        d_model, self.attention = config.d_model, config.encoder_attention
        if config.encoder_attention == "pooling":
            self.pooling_key = Linear(d_model, d_model)
            self.pooling_query = nn.Parameter(torch.randn(d_model) * d_model**-0.5)
        else:
            self.self_qkv = Linear(d_model, 3 * d_model, merged=3)
            self.self_out = Linear(d_model, d_model)

    def encode_attending(
        self, x_SLD: Tensor, real_SL: Tensor, mask: Tensor, weights: list[Tensor] | None
    ) -> Tensor:
        """The layer of an encoder; attention weights are appended to `weights`."""
        inputs_SLD = self.attend(x_SLD, mask, weights) if self.attention == "before" else x_SLD
        padding = [0, 0, self.kernel // 2, self.kernel // 2]
        h_SLD = self.convolve(F.pad(inputs_SLD * real_SL[..., None], padding))
        if self.attention == "after":
            h_SLD = self.attend(h_SLD, mask, weights)
        elif self.attention == "pooling":
            h_SLD = self.pool(h_SLD, real_SL)
        return (x_SLD + h_SLD) * HALF

    def attend(self, x_SLD: Tensor, mask: Tensor, weights: list[Tensor] | None) -> Tensor:
        """The inputs with self-attention added."""
        query, key, value = (part_SLD[:, None] for part_SLD in self.self_qkv(x_SLD).chunk(3, -1))
        if weights is not None:
            weights.append(layers.attention_weights(query, key, mask))
        return (x_SLD + self.self_out(layers.attend(query, key, value, mask))) * HALF

    def pool(self, h_SLD: Tensor, real_SL: Tensor) -> Tensor:
        """Each position replaced by the weighted sum of its window."""
        score_SL = (torch.tanh(self.pooling_key(h_SLD)) * self.pooling_query).sum(-1)
        # Not minus infinity: behind a sentence there are windows without any token.
        low = torch.finfo(score_SL.dtype).min / 2
        sides = [self.kernel // 2, self.kernel // 2]
        score_SL = F.pad(score_SL.masked_fill(~real_SL, low), sides, value=low)
        weights_SLW = score_SL.unfold(1, self.kernel, 1).softmax(-1)
        windows_SLDW = F.pad(h_SLD * real_SL[..., None], [0, 0, *sides]).unfold(1, self.kernel, 1)
        return (windows_SLDW * weights_SLW[:, :, None]).sum(-1)


class ConvEncoderAttention(ConvS2S):
    """A convolutional encoder-decoder with attention in the encoder."""

    config: ConvEncoderAttentionConfig
    config_class = ConvEncoderAttentionConfig
    encoder_layer = AttentiveConvLayer

    def encode_layers(
        self, x_SLD: Tensor, real_SL: Tensor, mask: Tensor, weights: list[Tensor] | None
    ) -> Tensor:
        for layer in self.encoder:
            assert isinstance(layer, AttentiveConvLayer)
            x_SLD = layer.encode_attending(x_SLD, real_SL, mask, weights)
        return x_SLD
