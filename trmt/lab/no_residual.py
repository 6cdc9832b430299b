"""A Transformer without residual connections: the output of a sublayer replaces its input."""

from __future__ import annotations

from torch import Tensor, nn

from trmt.nets import layers
from trmt.nets.transformer import Decoder, Encoder, EncoderConfig, TransformerEncoder


class NoResidual(TransformerEncoder):
    """A Transformer without residual connections."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__(config)
        for stack in self.children():
            if isinstance(stack, Encoder | Decoder):
                stack.add_norm = norm_alone


def norm_alone(x: Tensor, y: Tensor, norm: nn.Module, p: float) -> tuple[Tensor, Tensor]:
    """In the place of `layers.add_norm`: y with dropout, and the norm of that."""
    y = layers.dropout(y, p)
    return y, norm(y)
