"""Reads Marian models as Hugging Face stores them, such as OPUS-MT's, into a Transformer and a tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from trmt.config import build
from trmt.errors import BundleError, ConfigError, first_line
from trmt.interop.huggingface_folder import Json, check_shapes, check_size, read_object, read_weights
from trmt.interop.marian import columns_from_marian, columns_to_marian, layers_from_marian
from trmt.interop.sentencepiece_files import SOURCE, TARGET
from trmt.nets.layers import sinusoids
from trmt.nets.transformer import Transformer, TransformerConfig
from trmt.text.tokenizer import Tokenizer, TokenizerSettings
from trmt.trees import TreeError, read_bytes

ACTIVATIONS: Mapping[str, str] = {
    "relu": "relu",
    "gelu": "gelu",
    "swish": "swish",
    "silu": "swish",
}
# Options with the only value for which our Transformer computes the same.
REQUIRED = {"normalize_before": False, "add_final_layer_norm": False, "normalize_embedding": False}


@dataclass(frozen=True)
class MarianModel:
    """A Marian model as ours."""

    net: Transformer
    tokenizer: Tokenizer
    max_length: int  # of a text, in tokens


def read_marian(folder: Path) -> MarianModel:
    """The Marian model in a folder."""
    options = _read_json(folder / "config.json")
    if options.get("model_type") != "marian":
        model_type = options.get("model_type")
        raise ConfigError(
            f"{folder} holds a model of type {model_type!r}; only Marian models can be imported"
        )
    tokenizer = read_tokenizer(folder)
    weights = read_weights(folder)
    try:
        config = _config(options, weights, tokenizer, folder)
        ours = _our_weights(weights, config, options, tokenizer)
        check_shapes(lambda: Transformer(config), ours, where=str(folder))
        net = Transformer(config)
        net.load_state_dict(ours)
    except (LookupError, RuntimeError, TypeError, ValueError) as error:
        raise BundleError(
            f"{folder} does not hold a complete Marian model ({first_line(error)}); copy it again"
        ) from error
    return MarianModel(net.eval(), tokenizer, config.max_positions - 1)


def _read_json(path: Path) -> Json:
    return read_object(path, model="Marian")


def read_tokenizer(folder: Path) -> Tokenizer:
    """The files of a MarianTokenizer as a tokenizer of ours."""
    path = folder / "tokenizer_config.json"
    settings = _read_json(path) if path.exists() else {}
    lists = [_vocabulary(folder / "vocab.json")]
    if settings.get("separate_vocabs"):
        lists.append(_vocabulary(folder / "target_vocab.json"))
    try:
        models = [read_bytes(folder / name) for name in (SOURCE, TARGET)]
    except TreeError as error:
        raise BundleError(f"a sentencepiece model in {folder} {error}; copy the model again") from error
    except OSError as error:
        raise BundleError(f"cannot read {error.filename}: {error.strerror}; copy the model again") from error
    if models[0] == models[1]:
        del models[1]
    languages = (str(settings.get("source_lang") or ""), str(settings.get("target_lang") or ""))
    tokenizer = Tokenizer(
        # Marian's sentencepiece models contain their normalisation.
        TokenizerSettings(languages, normalise_source="none", normalise_target="none"),
        models,
        lists,
    )
    if tokenizer.source.eos != tokenizer.target.eos:
        raise ConfigError(
            f"{folder} has different ids for the end of sentence in source and target; trmt needs the same"
        )
    return tokenizer


def _vocabulary(path: Path) -> tuple[str, ...]:
    """The tokens of a vocab.json in the order of their ids."""
    ids = _read_json(path)
    if not all(type(number) is int for number in ids.values()):
        raise BundleError(f"{path} does not have a number for each token; copy the model again")
    tokens = tuple(sorted(ids, key=lambda token: ids[token]))
    if [ids[token] for token in tokens] != list(range(len(tokens))):
        raise BundleError(f"the ids in {path} are not 0 to {len(tokens) - 1}; copy the model again")
    return tokens


def _config(
    options: Json, weights: Mapping[str, Tensor], tokenizer: Tokenizer, folder: Path
) -> TransformerConfig:
    """The configuration of the Transformer that config.json describes, if ours can be it."""
    for name, value in REQUIRED.items():
        if options.get(name, value) != value:
            raise ConfigError(
                f"{folder} has {name} = {options[name]}; only Marian models with {value} can be imported"
            )
    for name in ("attention_heads", "ffn_dim"):
        if options[f"encoder_{name}"] != options[f"decoder_{name}"]:
            raise ConfigError(
                f"encoder_{name} and decoder_{name} of {folder} differ; they have to be the same"
            )
    activation = ACTIVATIONS.get(str(options.get("activation_function", "gelu")))
    if activation is None:
        raise ConfigError(
            f"{folder} has activation_function = {options['activation_function']!r}; known are "
            f"{', '.join(ACTIVATIONS)}"
        )
    shared = bool(options.get("share_encoder_decoder_embeddings", True))
    tied = bool(options.get("tie_word_embeddings", True))
    bias = weights.get("final_logits_bias")
    network = {
        "source_vocabulary": tokenizer.source.vocabulary,
        "target_vocabulary": tokenizer.target.vocabulary,
        "d_model": options["d_model"],
        "feed_forward": options["encoder_ffn_dim"],
        "heads": options["encoder_attention_heads"],
        "encoder_layers": options["encoder_layers"],
        "decoder_layers": options["decoder_layers"],
        "dropout": options.get("dropout", 0.1),
        "attention_dropout": options.get("attention_dropout", 0.0),
        "activation": activation,
        "tied": "none" if not tied else "all" if shared else "target",
        "output_bias": bias is not None and bool(bias.any()),
        "max_positions": options.get("max_position_embeddings", 512),
    }
    config = build(TransformerConfig, network, where=str(folder / "config.json"))
    layers = max(config.encoder_layers, config.decoder_layers)
    check_size(folder, weights, layers=layers, positions=config.max_positions)
    _check_positions(weights, config, folder)
    return config


def _check_positions(weights: Mapping[str, Tensor], config: TransformerConfig, folder: Path) -> None:
    if config.d_model % 2:
        raise ConfigError(
            f"{folder} has an odd d_model, with which positions differ from ours; it cannot be imported"
        )
    for side in ("encoder", "decoder"):
        stored = weights.get(f"model.{side}.embed_positions.weight")
        if stored is not None and stored.shape != (config.max_positions, config.d_model):
            raise BundleError(f"{folder} has positions of a shape it does not declare; copy the model again")
    if config.d_model > max(map(torch.numel, weights.values())):
        raise BundleError(f"{folder} declares a d_model larger than its tensors; copy the model again")
    expected = sinusoids(config.max_positions, config.d_model)[:, columns_to_marian(config.d_model)]
    for side in ("encoder", "decoder"):
        stored = weights.get(f"model.{side}.embed_positions.weight")
        if stored is not None and not torch.allclose(stored.float(), expected, atol=1e-3):
            raise ConfigError(
                f"{folder} has positional encodings other than Marian's sinusoids; it cannot be imported"
            )


def _our_weights(
    weights: Mapping[str, Tensor], config: TransformerConfig, options: Json, tokenizer: Tokenizer
) -> dict[str, Tensor]:
    """The weights under our names."""
    weights = {name: tensor.float() for name, tensor in weights.items()}
    order = columns_from_marian(config.d_model)
    ours = layers_from_marian(weights, config)
    target = _first(weights, "model.decoder.embed_tokens.weight", "model.shared.weight")
    source = _first(weights, "model.encoder.embed_tokens.weight", "model.shared.weight")
    output = weights["lm_head.weight"] if config.tied == "none" else target
    scale = _embedding_scale(options, config)
    # Rows beyond the vocabulary are padding.
    ours["decoder.embedding.tokens.weight"] = target[: tokenizer.target.vocabulary, order] * scale
    ours["encoder.embedding.tokens.weight"] = source[: tokenizer.source.vocabulary, order] * scale
    ours["output.weight"] = output[: tokenizer.target.vocabulary, order]
    if config.output_bias:
        ours["output_bias"] = weights["final_logits_bias"].flatten()[: tokenizer.target.vocabulary]
    return ours


def _embedding_scale(options: Json, config: TransformerConfig) -> float:
    """The factor of stored embeddings that undoes our scaling in models that do not scale."""
    if options.get("scale_embedding"):
        return 1.0
    if config.tied != "none":
        raise ConfigError(
            "this model has scale_embedding = false and ties its output to its embeddings, which trmt "
            "always scales; it cannot be imported"
        )
    return float(config.d_model**-0.5)


def _first(weights: Mapping[str, Tensor], *names: str) -> Tensor:
    """The first of these tensors that exists."""
    for name in names:
        if name in weights:
            return weights[name]
    raise KeyError(names[-1])
