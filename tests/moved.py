"""Bundles of random networks that answer with conviction, for tests of moving models in and out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests import toy
from trmt.bundles import bundles
from trmt.bundles.bundles import build_network, make_manifest
from trmt.nets.base import Seq2Seq
from trmt.text.tokenizer import Tokenizer

SIZES = {"width": 32, "feed_forward": 64, "heads": 4, "encoder_layers": 2, "decoder_layers": 3, "longest": 64}
PADDED = 3  # rows of the vocabulary that stand for no piece
TEXTS = [source for source, _ in toy.pairs(8, seed=9)]


def shaken(net: Seq2Seq, *, seed: int = 5) -> Seq2Seq:
    """The network with larger weights, and with random ones where it begins with zeros and ones."""
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
        "source_vocabulary": tokenizer.source.vocabulary + PADDED,
        "target_vocabulary": tokenizer.target.vocabulary + PADDED,
    }
    net = shaken(build_network("transformer", {**vocabularies, **SIZES, **options}))
    manifest = make_manifest(net, "transformer", tokenizer, longest={"source": 40, "target": 40})
    bundles.save_bundle(folder, manifest, net.state_dict(), tokenizer)
    return folder
