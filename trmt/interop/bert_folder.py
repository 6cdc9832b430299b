"""Hugging Face folders of `BertForPreTraining`: config.json, vocab.txt and weights, read and written.

Nothing of transformers is needed: weights are renamed, and the rows of the embeddings are matched by token,
as vocab.txt and the tokenizer order tokens differently.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trmt import console
from trmt.bundles import bundles, consistency
from trmt.bundles.bundles import write_tensors
from trmt.config import build, to_tree
from trmt.errors import BundleError, ConfigError
from trmt.interop.huggingface_folder import (
    WEIGHTS,
    read_object,
    read_weights,
    refuse_bundle,
)
from trmt.nets.base import Network
from trmt.registry import NETWORKS, resolve
from trmt.storage.files import atomic_folder, write_json
from trmt.text.tokenizer import Side, Tokenizer
from trmt.trees import TreeError, read_bytes

CONFIG, VOCABULARY = "config.json", "vocab.txt"
ARCHITECTURE = "masked-encoder"
# The options of a masked encoder that is a BERT.
FIXED: Mapping[str, Any] = {
    "norm_position": "post",
    "norm": "layer",
    "embedding_norm": True,
    "embedding_scale": False,
    "activation": "gelu",
    "positions": "learned",
}
# Their option -> ours.
OPTIONS: Mapping[str, str] = {
    "vocab_size": "source_vocabulary",
    "hidden_size": "d_model",
    "intermediate_size": "feed_forward",
    "num_attention_heads": "heads",
    "num_hidden_layers": "encoder_layers",
    "max_position_embeddings": "max_positions",
    "type_vocab_size": "segments",
    "layer_norm_eps": "norm_epsilon",
    "hidden_dropout_prob": "dropout",
    "attention_probs_dropout_prob": "attention_dropout",
}
# Their special tokens, and the ids of ours with the same role: padding, unknown, beginning and end.
SPECIAL_TOKENS = (("[PAD]", 0), ("[UNK]", 1), ("[CLS]", 2), ("[SEP]", 3))
# Tensors and modules outside the layers: our name and theirs.
EMBEDDING, THEIR_EMBEDDING = "encoder.embedding.tokens.weight", "bert.embeddings.word_embeddings.weight"
POSITIONS, THEIR_POSITIONS = "encoder.embedding.positions", "bert.embeddings.position_embeddings.weight"
SEGMENTS, THEIR_SEGMENTS = "segments", "bert.embeddings.token_type_embeddings.weight"
BIAS, THEIR_BIAS = "prediction_bias", "cls.predictions.bias"
TIED = {"cls.predictions.decoder.weight": THEIR_EMBEDDING, "cls.predictions.decoder.bias": THEIR_BIAS}
MODULES: Mapping[str, str] = {
    "encoder.embedding.norm": "bert.embeddings.LayerNorm",
    "prediction": "cls.predictions.transform.dense",
    "prediction_norm": "cls.predictions.transform.LayerNorm",
    "pooler": "bert.pooler.dense",
    "next_sentence": "cls.seq_relationship",
}
# Modules of a layer: our name -> theirs.
LAYER_MODULES: Mapping[str, str] = {
    "self_out": "attention.output.dense",
    "self_norm": "attention.output.LayerNorm",
    "feed_forward.inner": "intermediate.dense",
    "feed_forward.outer": "output.dense",
    "feed_forward_norm": "output.LayerNorm",
}


@dataclass(frozen=True)
class BertFolder:
    """The contents of such a folder."""

    config: Any  # a MaskedEncoderConfig
    weights: dict[str, Tensor]  # under our names
    tokens: tuple[str, ...]  # in the order of ids; empty if there is no vocab.txt


def masked_encoder() -> Any:
    """The class MaskedEncoder, which is imported only here: it belongs to trmt.lab."""
    return resolve(NETWORKS, ARCHITECTURE)


# Names of weights


def _renamed(layers: int) -> dict[str, str]:
    """Our names of tensors -> theirs, without those that are stored in another shape."""
    modules = dict(MODULES)
    for index in range(layers):
        for ours, theirs in LAYER_MODULES.items():
            modules[f"encoder.layers.{index}.{ours}"] = f"bert.encoder.layer.{index}.{theirs}"
    names = {EMBEDDING: THEIR_EMBEDDING, BIAS: THEIR_BIAS, SEGMENTS: THEIR_SEGMENTS}
    for ours, theirs in modules.items():
        names |= {f"{ours}.{name}": f"{theirs}.{name}" for name in ("weight", "bias")}
    return names


def _merged(layers: int) -> dict[str, list[str]]:
    """Our tensors of queries, keys and values side by side -> their three."""
    return {
        f"encoder.layers.{index}.self_qkv.{name}": [
            f"bert.encoder.layer.{index}.attention.self.{each}.{name}" for each in ("query", "key", "value")
        ]
        for index in range(layers)
        for name in ("weight", "bias")
    }


def to_their_names(layers: int, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights as BertForPreTraining names them, each tensor once."""
    theirs = {their_name: ours[name].detach() for name, their_name in _renamed(layers).items()}
    for name, three in _merged(layers).items():
        theirs |= dict(zip(three, ours[name].detach().chunk(3), strict=True))
    theirs[THEIR_POSITIONS] = ours[POSITIONS].detach()[0]  # ours has an axis more
    return theirs


def to_our_names(layers: int, theirs: Mapping[str, Tensor], *, where: Path) -> dict[str, Tensor]:
    """The weights as the masked encoder names them."""
    # Checkpoints converted from the first release have gamma and beta.
    stored = {
        name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias"): x
        for name, x in theirs.items()
    }
    for alias, name in TIED.items():
        if name not in stored and alias in stored:
            stored[name] = stored[alias]

    def take(name: str) -> Tensor:
        if name not in stored:
            raise BundleError(f"{where} has no weights {name!r}; name a folder of BertForPreTraining")
        return stored[name].float()

    ours = {name: take(their_name) for name, their_name in _renamed(layers).items()}
    ours |= {name: torch.cat([take(each) for each in three]) for name, three in _merged(layers).items()}
    ours[POSITIONS] = take(THEIR_POSITIONS)[None]
    return ours


# Reading


def read_bert(folder: Path) -> BertFolder:
    """The contents of a folder that `save_pretrained` or `write_bert` wrote."""
    options = read_object(folder / CONFIG, model="BERT")
    missing = [name for name in OPTIONS if name not in options]
    if options.get("model_type") != "bert" or missing:
        raise BundleError(
            f"{folder / CONFIG} does not describe a BERT ({missing[0] if missing else 'model_type'!r}); name "
            "a folder of BertForPreTraining"
        )
    for name, supported in (("hidden_act", "gelu"), ("position_embedding_type", "absolute")):
        if options.get(name, supported) != supported:
            raise ConfigError(
                f"{folder} is a BERT with {name} = {options[name]!r}; only {supported!r} can be imported"
            )
    network = {**{ours: options[name] for name, ours in OPTIONS.items()}, **FIXED}
    config = build(masked_encoder().config_class, network, where=str(folder / CONFIG))
    path = folder / VOCABULARY
    try:
        tokens = tuple(read_bytes(path).decode().split("\n")[:-1]) if path.is_file() else ()
    except (TreeError, UnicodeDecodeError) as error:
        reason = error if isinstance(error, TreeError) else "is not valid UTF-8"
        raise BundleError(f"{path} {reason}; copy it again") from error
    if tokens and len(tokens) != config.source_vocabulary:
        raise BundleError(
            f"{path} has {len(tokens):,} tokens, {CONFIG} says {config.source_vocabulary:,}; copy it again"
        )
    theirs = read_weights(folder)
    consistency.check_options(to_tree(config), theirs, where=str(folder))
    weights = to_our_names(config.encoder_layers, theirs, where=folder)
    empty = consistency.build_empty(lambda: masked_encoder()(config))
    consistency.check_weights(empty, weights, where=str(folder))
    return BertFolder(config, weights, tokens)


def import_bert(folder: Path, out: Path, tokenizer: Tokenizer) -> Path:
    """Make a bundle of such a folder, for trmt train --init-from OUT:encoder.

    Tokens of the tokenizer that the folder lacks get the mean of all rows; a message says how many it has.
    """
    refuse_bundle(folder)
    bert = read_bert(folder)
    rows = _matching_rows(bert, tokenizer.source, where=folder)
    weights = {
        name: _take_rows(tensor, rows) if name in (EMBEDDING, BIAS) else tensor
        for name, tensor in bert.weights.items()
    }
    net = masked_encoder()(replace(bert.config, source_vocabulary=len(rows)))
    bundles.load_weights(net, weights, where=str(folder))
    longest = {"source": bert.config.max_positions, "target": bert.config.max_positions}
    manifest = bundles.make_manifest(
        net, ARCHITECTURE, tokenizer, longest=longest, training={"imported": folder.resolve().name}
    )
    bundles.save_bundle(out, manifest, net.state_dict(), tokenizer)
    found = len(rows) - rows.count(-1)
    console.say(f"{folder} has {found:,} of the tokenizer's {len(rows):,} tokens -> {out}")
    return out


def _matching_rows(bert: BertFolder, side: Side, *, where: Path) -> list[int]:
    """For each of our ids the row of the same token there, or -1."""
    if not bert.tokens:
        if bert.config.source_vocabulary != side.vocabulary:
            raise BundleError(
                f"{where} has no {VOCABULARY} and {bert.config.source_vocabulary:,} tokens, the tokenizer "
                f"has {side.vocabulary:,}; add the file, or name the tokenizer that belongs to it"
            )
        return list(range(side.vocabulary))
    row_of = {token: row for row, token in enumerate(bert.tokens)}
    # In WordPiece, a token without a mark begins a word; in sentencepiece, it continues one.
    marked = any(token.startswith("##") for token in bert.tokens)
    tokens = [wordpiece(piece) if marked else piece for piece in side.pieces(range(side.vocabulary))]
    for token, number in SPECIAL_TOKENS:
        tokens[number] = token
    # Our pretraining masks tokens with the unknown token.
    tokens[side.unk] = "[MASK]" if "[MASK]" in row_of else "[UNK]"
    rows = [row_of.get(token, -1) for token in tokens]
    if rows.count(-1) > len(rows) // 2:
        console.warn(f"fewer than half of the tokenizer's tokens are in the vocabulary of {where}")
    return rows


def wordpiece(piece: str) -> str:
    """A sentencepiece token as WordPiece writes it: marked if it continues a word, not if it begins one."""
    return piece[1:] if piece.startswith("\u2581") and len(piece) > 1 else f"##{piece}"


def _take_rows(tensor: Tensor, rows: Sequence[int]) -> Tensor:
    index = torch.tensor(rows)
    taken = tensor[index.clamp(min=0)]
    taken[index < 0] = tensor.mean(0)
    return taken


# Writing


def export_bert(bundle: Path, out: Path) -> Path:
    """Write a pretrained encoder as a folder that `BertForPreTraining.from_pretrained` loads."""
    manifest = bundles.read_manifest(bundle)
    if manifest.architecture != ARCHITECTURE:
        raise ConfigError(
            f"{bundle} is a network of architecture {manifest.architecture!r}, which is not a BERT; name a "
            "run of trmt pretrain"
        )
    net = bundles.build_network(manifest.architecture, manifest.network)
    bundles.load_weights(net, bundles.read_weights(bundle, manifest), where=str(bundle))
    tokenizer = Tokenizer.load(bundle / bundles.TOKENIZER)
    with atomic_folder(out) as folder:
        write_bert(net, tokenizer.source, folder)
    console.say(f"{bundle} for Hugging Face -> {out}")
    return out


def write_bert(net: Network, side: Side, folder: Path) -> None:
    """Write a masked encoder as such a folder; refuse options that BERT lacks."""
    config = net.config
    for name, value in FIXED.items():
        if getattr(config, name) != value:
            raise ConfigError(
                f"BERT has no network with {name} = {getattr(config, name)!r}, only with {value!r}; "
                "pretrain such a network"
            )
    if config.segments < 2:
        raise ConfigError(
            "BERT has several segments, and this network one; pretrain one with network.segments = 2"
        )
    options = {name: getattr(config, ours) for name, ours in OPTIONS.items()}
    write_json(
        folder / CONFIG,
        {
            "architectures": ["BertForPreTraining"],
            "model_type": "bert",
            "hidden_act": "gelu",
            "pad_token_id": side.pad,
            "tie_word_embeddings": True,
            **options,
        },
    )
    tokens = side.pieces(range(side.vocabulary))
    for token, number in SPECIAL_TOKENS:
        tokens[number] = token
    text = "".join(f"{token}\n" for token in tokens)
    (folder / VOCABULARY).write_text(text, encoding="utf-8", newline="\n")
    write_tensors(folder / WEIGHTS, to_their_names(config.encoder_layers, net.state_dict()))
