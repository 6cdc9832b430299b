"""Bundles of random networks whose choices are rarely close, for tests of export and import."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests import toy
from trmt.bundles import bundles
from trmt.bundles.bundles import build_network, make_manifest
from trmt.nets.base import Seq2Seq
from trmt.text.tokenizer import Tokenizer

SIZES = {
    "d_model": 32,
    "feed_forward": 64,
    "heads": 4,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "max_positions": 64,
}
PADDING = 3  # rows of the vocabulary that belong to no token
TEXTS = [source for source, _ in toy.pairs(8, seed=9)]


def option_id(options: dict[str, Any]) -> str:
    """The name of a test's parameters."""
    return "-".join(f"{name}={value}" for name, value in options.items()) or "base"


def randomise(net: Seq2Seq, *, seed: int = 5) -> Seq2Seq:
    """The network with larger weights, and with random ones where it is initialised with zeros and ones."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
            else:
                parameter.mul_(2)
    return net.eval()


def bundle(folder: Path, tokenizer: Tokenizer, **options: Any) -> Path:
    """A bundle of a random Transformer for this tokenizer."""
    torch.manual_seed(3)
    vocabularies = {
        "source_vocabulary": tokenizer.source.vocabulary + PADDING,
        "target_vocabulary": tokenizer.target.vocabulary + PADDING,
    }
    net = randomise(build_network("transformer", {**vocabularies, **SIZES, **options}))
    if net.output_bias is not None:
        net.output_bias.data[:3] -= 9  # padding, unknown and beginning: improbable, as if it was trained
    manifest = make_manifest(net, "transformer", tokenizer, longest={"source": 40, "target": 40})
    bundles.save_bundle(folder, manifest, net.state_dict(), tokenizer)
    return folder
