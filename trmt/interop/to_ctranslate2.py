"""Exports to CTranslate2 with CTranslate2's own specifications.

Nothing is left to its defaults: positional encodings are the network's own table, the epsilon of norms is
written, and tokens that must never be generated get an output bias that rules them out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trmt.bundles.bundles import Bundle
from trmt.errors import ConfigError
from trmt.interop.base import (
    BANNED_BIAS,
    CheckInputs,
    CheckResults,
    Format,
    import_package,
    token_rows,
    transformer_of,
)
from trmt.interop.sentencepiece_files import write_models
from trmt.nets.transformer import Decoder, Encoder, Transformer, TransformerConfig
from trmt.text.tokenizer import Side, Tokenizer

ACTIVATIONS = {"relu": "RELU", "gelu": "GELU", "swish": "SWISH", "swiglu": "SWISH"}


class CTranslate2(Format):
    """A folder for `ctranslate2.Translator`, whose inputs and outputs are sentencepiece tokens."""

    name = "CTranslate2"
    packages = ("ctranslate2",)

    def write(self, bundle: Bundle, folder: Path) -> None:
        net, tokenizer = transformer_of(bundle, self.name), bundle.tokenizer
        spec = _specification(net, tokenizer)
        spec.register_source_vocabulary(_vocabulary(tokenizer.source))
        spec.register_target_vocabulary(_vocabulary(tokenizer.target))
        _configure(spec.config, net, tokenizer)
        spec.validate()
        spec.optimize()
        spec.save(str(folder))
        write_models(folder, tokenizer)

    def run(self, folder: Path, tokenizer: Tokenizer, inputs: CheckInputs) -> CheckResults:
        ctranslate2 = import_package("ctranslate2")
        translator = ctranslate2.Translator(str(folder), compute_type="float32", intra_threads=1)
        sources = [tokenizer.source.pieces(ids) for ids in inputs.sources]
        targets = [tokenizer.target.pieces(ids) for ids in inputs.targets]
        # By default a translation has at least one token; trmt allows empty ones.
        limits = {"min_decoding_length": 0, "max_decoding_length": inputs.max_tokens}
        translated = translator.translate_batch(sources, beam_size=1, **limits)
        scored = translator.score_batch(sources, targets)
        ids = {token: number for number, token in enumerate(_vocabulary(tokenizer.target))}
        return CheckResults(
            tuple(tuple(ids[token] for token in each.hypotheses[0]) for each in translated),
            tuple(tuple(each.log_probs) for each in scored),
        )


def _vocabulary(side: Side) -> list[str]:
    return side.pieces(range(side.vocabulary))


def _configure(config: Any, net: Transformer, tokenizer: Tokenizer) -> None:
    target = tokenizer.target
    config.bos_token, config.eos_token, config.unk_token = target.pieces([target.bos, target.eos, target.unk])
    config.decoder_start_token = config.bos_token
    config.add_source_bos, config.add_source_eos = False, True
    config.layer_norm_epsilon = float(net.get_submodule("encoder.layers.0.self_norm").eps)  # type: ignore[arg-type]
    if tokenizer.source.pieces([tokenizer.source.eos]) != [config.eos_token]:
        raise ConfigError(
            "CTranslate2 needs the same end of sentence on both sides, and the tokenizer has two; "
            "export to another format"
        )


def _specification(net: Transformer, tokenizer: Tokenizer) -> Any:
    config = net.config
    common = import_package("ctranslate2.specs.common_spec")
    transformer_spec = import_package("ctranslate2.specs.transformer_spec")
    options: dict[str, Any] = {
        "pre_norm": config.norm_position == "pre",
        "activation": common.Activation[ACTIVATIONS[config.activation]],
        "ffn_glu": config.activation == "swiglu",
        "rms_norm": config.norm == "rms",
    }
    if config.positions == "rotary":
        options |= {"rotary_dim": config.head_dim, "rotary_interleave": True}
    encoder = transformer_spec.TransformerEncoderSpec(config.encoder_layers, config.heads, **options)
    decoder = transformer_spec.TransformerDecoderSpec(config.decoder_layers, config.heads, **options)
    encoder.embeddings[0].weight = _array(token_rows(net.encoder.embedding.tokens.weight, tokenizer.source))
    decoder.embeddings.weight = _array(token_rows(net.decoder.embedding.tokens.weight, tokenizer.target))
    decoder.projection.weight = _array(token_rows(net.output.weight, tokenizer.target))
    decoder.projection.bias = _array(_output_bias(net, tokenizer.target))
    stacks: list[tuple[Any, Encoder | Decoder]] = [(encoder, net.encoder), (decoder, net.decoder)]
    for spec, module in stacks:
        spec.scale_embeddings = True  # by the square root of d_model
        if module.embedding.positions is None:
            spec.__dict__.pop("position_encodings", None)
        else:
            spec.position_encodings.encodings = _array(module.embedding.positions[0])
        if module.norm is not None:
            _fill_norm(spec.layer_norm, module.norm)
        for layer_spec, layer in zip(spec.layer, module.layers, strict=True):
            _fill_layer(layer_spec, layer, config)
    cross_kv = net.cross_kv
    assert isinstance(cross_kv, nn.Linear)
    weights, biases = (x.chunk(config.decoder_layers) for x in (cross_kv.weight, cross_kv.bias))
    for spec, weight, bias in zip(decoder.layer, weights, biases, strict=True):
        spec.attention.linear[1].weight, spec.attention.linear[1].bias = _array(weight), _array(bias)
    return transformer_spec.TransformerSpec(encoder, decoder)


def _output_bias(net: Transformer, side: Side) -> Tensor:
    bias = torch.zeros(side.vocabulary)
    if net.output_bias is not None:
        bias += token_rows(net.output_bias, side)
    bias[sorted(side.banned_ids)] = BANNED_BIAS
    return bias


def _fill_layer(spec: Any, layer: Any, config: TransformerConfig) -> None:
    _fill_linear(spec.self_attention.linear[0], layer.self_qkv)
    _fill_linear(spec.self_attention.linear[1], layer.self_out)
    _fill_norm(spec.self_attention.layer_norm, layer.self_norm)
    if hasattr(spec, "attention"):
        _fill_linear(spec.attention.linear[0], layer.cross_query)
        _fill_linear(spec.attention.linear[2], layer.cross_out)
        _fill_norm(spec.attention.layer_norm, layer.cross_norm)
    inner = layer.feed_forward.inner
    if config.activation == "swiglu":
        gate, value = zip(inner.weight.chunk(2), inner.bias.chunk(2), strict=True)
        spec.ffn.linear_0.weight, spec.ffn.linear_0.bias = map(_array, gate)
        spec.ffn.linear_0_noact.weight, spec.ffn.linear_0_noact.bias = map(_array, value)
    else:
        _fill_linear(spec.ffn.linear_0, inner)
    _fill_linear(spec.ffn.linear_1, layer.feed_forward.outer)
    _fill_norm(spec.ffn.layer_norm, layer.feed_forward_norm)


def _fill_linear(spec: Any, linear: nn.Linear) -> None:
    spec.weight, spec.bias = _array(linear.weight), _array(linear.bias)


def _fill_norm(spec: Any, norm: Any) -> None:
    spec.gamma = _array(norm.weight)
    if hasattr(spec, "beta"):
        spec.beta = _array(norm.bias)


def _array(tensor: Tensor) -> np.ndarray:
    # A copy, as CTranslate2 writes into the arrays that it is given.
    return tensor.detach().float().cpu().numpy().copy()
