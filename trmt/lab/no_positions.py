"""A Transformer that is not told positions; its decoder can tell them by what causal attention covers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from trmt.nets.transformer import EncoderConfig, TransformerEncoder


@dataclass(frozen=True, kw_only=True)
class NoPositionsConfig(EncoderConfig):
    """The sizes and options of a Transformer without positions."""

    positions: Literal["none"] = "none"  # type: ignore[assignment]


class NoPositions(TransformerEncoder):
    """A Transformer without positions."""

    config_class = NoPositionsConfig
