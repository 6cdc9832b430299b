"""CTranslate2 models, written with CTranslate2's own specifications.

Nothing is left to its defaults: position encodings are the network's own table, the epsilon of norms is
written, and tokens that may never be generated get a bias in the output that rules them out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trmt.bundles.bundles import Bundle
from trmt.errors import ConfigError
from trmt.interop.base import NEVER, Format, Outcome, Probe, package, refuse, rows, transformer_of
from trmt.interop.pieces import write_models
from trmt.nets.transformer import Transformer, TransformerConfig
from trmt.text.tokenizer import Side, Tokenizer

ACTIVATIONS = {"relu": "RELU", "gelu": "GELU", "swish": "SWISH", "swiglu": "SWISH"}


class CTranslate2(Format):
    """A folder for `ctranslate2.Translator`, which takes pieces and gives pieces."""

    name = "CTranslate2"
    packages = ("ctranslate2",)

    def write(self, bundle: Bundle, folder: Path) -> None:
        net, tokenizer = transformer_of(bundle, self.name), bundle.tokenizer
        refuse(self.name, net.config, activation=tuple(ACTIVATIONS))
        spec = _specification(net, tokenizer)
        spec.register_source_vocabulary(_pieces(tokenizer.source))
        spec.register_target_vocabulary(_pieces(tokenizer.target))
        _configure(spec.config, net, tokenizer)
        spec.validate()
        spec.optimize()
        spec.save(str(folder))
        write_models(folder, tokenizer)

    def outcome(self, folder: Path, tokenizer: Tokenizer, probe: Probe) -> Outcome:
        translator = package("ctranslate2").Translator(str(folder), compute_type="float32", intra_threads=1)
        sources = [tokenizer.source.pieces(ids) for ids in probe.sources]
        targets = [tokenizer.target.pieces(ids) for ids in probe.targets]
        found = translator.translate_batch(sources, beam_size=1, max_decoding_length=probe.limit)
        scored = translator.score_batch(sources, targets)
        number = {piece: place for place, piece in enumerate(_pieces(tokenizer.target))}
        return Outcome(
            tuple(tuple(number[piece] for piece in each.hypotheses[0]) for each in found),
            tuple(tuple(each.log_probs) for each in scored),
        )


def _pieces(side: Side) -> list[str]:
    return side.pieces(range(side.vocabulary))


def _configure(config: Any, net: Transformer, tokenizer: Tokenizer) -> None:
    target = tokenizer.target
    config.bos_token, config.eos_token, config.unk_token = target.pieces([target.bos, target.eos, target.unk])
    config.decoder_start_token = config.bos_token
    config.add_source_bos, config.add_source_eos = False, True
    config.layer_norm_epsilon = _epsilon(net)
    if tokenizer.source.pieces([tokenizer.source.eos]) != [config.eos_token]:
        raise ConfigError("CTranslate2 wants one end of sentence for both sides; the tokenizer has two")


def _specification(net: Transformer, tokenizer: Tokenizer) -> Any:
    config = net.config
    specs, common = package("ctranslate2.specs"), package("ctranslate2.specs.common_spec")
    options: dict[str, Any] = {
        "pre_norm": config.norm_place == "pre",
        "activation": common.Activation[ACTIVATIONS[config.activation]],
        "ffn_glu": config.activation == "swiglu",
        "rms_norm": config.norm == "rms",
    }
    if config.positions == "rotary":
        options |= {"rotary_dim": config.width // config.heads, "rotary_interleave": True}
    transformers = package("ctranslate2.specs.transformer_spec")
    encoder = transformers.TransformerEncoderSpec(config.encoder_layers, config.heads, **options)
    decoder = transformers.TransformerDecoderSpec(config.decoder_layers, config.heads, **options)
    for side, spec in enumerate((encoder, decoder)):
        spec.scale_embeddings = True  # by the square root of the width
        if config.positions == "rotary":
            spec.__dict__.pop("position_encodings", None)
        else:
            spec.position_encodings.encodings = _array(_positions(net, side))
    encoder.embeddings[0].weight = _array(rows(net.source_embedding.weight, tokenizer.source))
    decoder.embeddings.weight = _array(rows(net.target_embedding.weight, tokenizer.target))
    decoder.projection.weight = _array(rows(net.output.weight, tokenizer.target))
    decoder.projection.bias = _array(_output_bias(net, tokenizer.target))
    for index, spec in enumerate(encoder.layer):
        _fill(spec, net.encoder[index], config)
    for index, spec in enumerate(decoder.layer):
        _fill(spec, net.decoder[index], config)
        spec.attention.linear[1].weight, spec.attention.linear[1].bias = _memory(net, index)
    if config.norm_place == "pre":
        _fill_norm(encoder.layer_norm, net.encoder_norm)
        _fill_norm(decoder.layer_norm, net.decoder_norm)
    return specs.TransformerSpec(encoder, decoder)


def _epsilon(net: Any) -> float:
    return float(net.encoder[0].feed_norm.eps)


def _positions(net: Any, side: int) -> Tensor:
    table: Tensor = net.positions[side] if net.config.positions == "learned" else net.table
    return table


def _output_bias(net: Transformer, side: Side) -> Tensor:
    bias = torch.zeros(side.vocabulary)
    if net.output_bias is not None:
        bias += rows(net.output_bias, side)
    bias[sorted(side.banned_ids)] = NEVER
    return bias


def _memory(net: Transformer, index: int) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values of one decoder layer, which the network computes together with all the others'."""
    part = slice(2 * index * net.config.width, 2 * (index + 1) * net.config.width)
    return _array(net.memory.weight[part]), _array(net.memory.bias[part])


def _fill(spec: Any, layer: Any, config: TransformerConfig) -> None:
    _fill_linear(spec.self_attention.linear[0], layer.own)
    _fill_linear(spec.self_attention.linear[1], layer.own_out)
    _fill_norm(spec.self_attention.layer_norm, layer.own_norm)
    if hasattr(spec, "attention"):
        _fill_linear(spec.attention.linear[0], layer.query)
        _fill_linear(spec.attention.linear[2], layer.cross_out)
        _fill_norm(spec.attention.layer_norm, layer.cross_norm)
    inner = layer.feed.inner
    if config.activation == "swiglu":
        gate, value = inner.weight.chunk(2), inner.bias.chunk(2)
        spec.ffn.linear_0.weight, spec.ffn.linear_0.bias = _array(gate[0]), _array(value[0])
        spec.ffn.linear_0_noact.weight, spec.ffn.linear_0_noact.bias = _array(gate[1]), _array(value[1])
    else:
        _fill_linear(spec.ffn.linear_0, inner)
    _fill_linear(spec.ffn.linear_1, layer.feed.outer)
    _fill_norm(spec.ffn.layer_norm, layer.feed_norm)


def _fill_linear(spec: Any, linear: nn.Linear) -> None:
    spec.weight, spec.bias = _array(linear.weight), _array(linear.bias)


def _fill_norm(spec: Any, norm: Any) -> None:
    spec.gamma = _array(norm.weight)
    if hasattr(spec, "beta"):
        spec.beta = _array(norm.bias)


def _array(tensor: Tensor) -> np.ndarray:
    # CTranslate2 changes what it is given: a copy keeps the network's own weights out of its reach.
    return tensor.detach().float().cpu().numpy().copy()
