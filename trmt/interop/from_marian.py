"""Marian models as Hugging Face stores them, OPUS-MT's for one, made into networks and tokenizers of ours."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from trmt.config import build
from trmt.errors import BundleError, ConfigError
from trmt.interop.marian import halves, layers_from_marian, turns
from trmt.interop.pieces import SOURCE, TARGET
from trmt.nets.layers import sinusoids
from trmt.nets.transformer import Transformer, TransformerConfig
from trmt.text.tokenizer import Tokenizer, TokenizerSettings

Json = dict[str, Any]

ACTIVATIONS: Mapping[str, str] = {
    "relu": "relu",
    "gelu": "gelu",
    "swish": "swish",
    "silu": "swish",
}
# Options that would make it another network, and the only value of each that ours has.
FIXED = {"normalize_before": False, "add_final_layer_norm": False, "normalize_embedding": False}


@dataclass(frozen=True)
class Imported:
    """A model from elsewhere."""

    net: Transformer
    tokenizer: Tokenizer
    longest: int  # pieces of a text, at most


def read(folder: Path) -> Imported:
    """The Marian model in a folder."""
    told = _json(folder / "config.json")
    if told.get("model_type") != "marian":
        raise ConfigError(
            f"{folder} holds a model of type {told.get('model_type')!r}; only Marian models can be imported"
        )
    tokenizer = read_tokenizer(folder)
    weights = read_weights(folder)
    try:
        config = _config(told, weights, tokenizer, folder)
        found = _ours(weights, config, told, tokenizer)
        net = Transformer(config)
        net.load_state_dict(found)
    except (KeyError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise BundleError(f"{folder} does not hold a whole Marian model ({reason}); copy it again") from error
    return Imported(net.eval(), tokenizer, config.longest - 1)


def read_tokenizer(folder: Path) -> Tokenizer:
    """What MarianTokenizer reads, as a tokenizer of ours."""
    settings = _json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").exists() else {}
    lists = [_listed(folder / "vocab.json")]
    if settings.get("separate_vocabs"):
        lists.append(_listed(folder / "target_vocab.json"))
    try:
        models = [(folder / name).read_bytes() for name in (SOURCE, TARGET)]
    except OSError as error:
        raise BundleError(f"cannot read {error.filename}: {error.strerror}; copy the model again") from error
    if models[0] == models[1]:
        del models[1]
    languages = (str(settings.get("source_lang") or ""), str(settings.get("target_lang") or ""))
    tokenizer = Tokenizer(
        # Marian's sentencepiece models normalise by themselves.
        TokenizerSettings(languages, normalise_source="none", normalise_target="none"),
        models,
        lists,
    )
    if tokenizer.source.eos != tokenizer.target.eos:
        raise ConfigError(f"{folder} ends source and target with different ids; trmt has one end for both")
    return tokenizer


def _listed(path: Path) -> tuple[str, ...]:
    """The pieces of a vocab.json in the order of their ids."""
    numbers = _json(path)
    pieces = tuple(sorted(numbers, key=lambda piece: numbers[piece]))
    if [numbers[piece] for piece in pieces] != list(range(len(pieces))):
        raise BundleError(f"the ids in {path} are not 0 to {len(pieces) - 1}; copy the model again")
    return pieces


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of a folder by name; nothing that could run code is unpickled."""
    index, whole, pickled = (
        folder / name for name in ("model.safetensors.index.json", "model.safetensors", "pytorch_model.bin")
    )
    try:
        if index.exists():
            files = sorted(set(_json(index)["weight_map"].values()))
            return {name: tensor for file in files for name, tensor in load_file(folder / file).items()}
        if whole.exists():
            return load_file(whole)
        loaded: dict[str, Tensor] = torch.load(pickled, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise BundleError(
            f"there are no weights in {folder}; it needs model.safetensors or pytorch_model.bin"
        ) from error
    except Exception as error:  # torch.load fails in as many ways as a file can be damaged
        reason = str(error).splitlines()[0]
        raise BundleError(f"cannot read the weights in {folder}: {reason}; copy the model again") from error
    return loaded


def _config(
    told: Json, weights: Mapping[str, Tensor], tokenizer: Tokenizer, folder: Path
) -> TransformerConfig:
    """The network that config.json describes, if ours can be it."""
    for name, value in FIXED.items():
        if told.get(name, value) != value:
            raise ConfigError(f"{folder} has {name} = {told[name]}, which a Marian model here cannot have")
    for name in ("attention_heads", "ffn_dim"):
        if told[f"encoder_{name}"] != told[f"decoder_{name}"]:
            raise ConfigError(f"encoder_{name} and decoder_{name} of {folder} differ; here they are the same")
    activation = ACTIVATIONS.get(told.get("activation_function", "gelu"))
    if activation is None:
        raise ConfigError(
            f"{folder} has activation_function = {told['activation_function']!r}; known are "
            f"{', '.join(ACTIVATIONS)}"
        )
    shared = bool(told.get("share_encoder_decoder_embeddings", True))
    tied = bool(told.get("tie_word_embeddings", True))
    bias = weights.get("final_logits_bias")
    options = {
        "source_vocabulary": tokenizer.source.vocabulary,
        "target_vocabulary": tokenizer.target.vocabulary,
        "width": told["d_model"],
        "feed_forward": told["encoder_ffn_dim"],
        "heads": told["encoder_attention_heads"],
        "encoder_layers": told["encoder_layers"],
        "decoder_layers": told["decoder_layers"],
        "dropout": told.get("dropout", 0.1),
        "attention_dropout": told.get("attention_dropout", 0.0),
        "activation": activation,
        "tied": "none" if not tied else "all" if shared else "target",
        "output_bias": bias is not None and bool(bias.any()),
        "longest": told.get("max_position_embeddings", 512),
    }
    config = build(TransformerConfig, options, where=str(folder / "config.json"))
    _check_positions(weights, config, folder)
    return config


def _check_positions(weights: Mapping[str, Tensor], config: TransformerConfig, folder: Path) -> None:
    if config.width % 2:
        raise ConfigError(f"the width of {folder} is odd, so that its positions cannot be ours")
    usual = sinusoids(config.longest, config.width)[:, halves(config.width)]
    for side in ("encoder", "decoder"):
        stored = weights.get(f"model.{side}.embed_positions.weight")
        if stored is not None and not torch.allclose(stored.float(), usual, atol=1e-3):
            raise ConfigError(f"{folder} has positions of its own, which are not the sinusoids of Marian")


def _ours(
    weights: Mapping[str, Tensor], config: TransformerConfig, told: Json, tokenizer: Tokenizer
) -> dict[str, Tensor]:
    weights = {name: tensor.float() for name, tensor in weights.items()}
    order = turns(config.width)
    found = layers_from_marian(weights, config)
    target = _first(weights, "model.decoder.embed_tokens.weight", "model.shared.weight")
    source = _first(weights, "model.encoder.embed_tokens.weight", "model.shared.weight")
    output = weights["lm_head.weight"] if config.tied == "none" else target
    scale = _embedding_scale(told, config)
    # Rows beyond the vocabulary only fill it up.
    found["target_embedding.weight"] = target[: tokenizer.target.vocabulary, order] * scale
    found["source_embedding.weight"] = source[: tokenizer.source.vocabulary, order] * scale
    found["output.weight"] = output[: tokenizer.target.vocabulary, order]
    if config.output_bias:
        found["output_bias"] = weights["final_logits_bias"].flatten()[: tokenizer.target.vocabulary]
    return found


def _embedding_scale(told: Json, config: TransformerConfig) -> float:
    """What embeddings are multiplied by here, so that the network's own factor is not one too many."""
    if told.get("scale_embedding"):
        return 1.0
    if config.tied != "none":
        raise ConfigError(
            "this model has scale_embedding = false and ties its output to its embeddings, which here are "
            "always scaled; it cannot be imported"
        )
    return float(config.width**-0.5)


def _first(weights: Mapping[str, Tensor], *names: str) -> Tensor:
    for name in names:
        if name in weights:
            return weights[name]
    raise KeyError(names[-1])


def _json(path: Path) -> Json:
    try:
        tree = json.loads(path.read_bytes())
    except OSError as error:
        raise BundleError(
            f"cannot read {path}: {error.strerror}; name a folder with a Marian model of Hugging Face"
        ) from error
    except ValueError as error:
        raise BundleError(f"{path} is not valid JSON; copy the model again") from error
    if not isinstance(tree, dict):
        raise BundleError(f"{path} is not what a Marian model of Hugging Face has there; copy it again")
    return tree
