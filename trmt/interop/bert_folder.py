"""Hugging Face folders of `BertForPreTraining`: config.json, vocab.txt and weights, read and written.

What is read and written are weights under their names there; nothing of transformers is needed. The pieces
of vocab.txt are the tokenizer's, so that a row of the embeddings can be found by what it stands for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from trmt import console
from trmt.bundles import bundles
from trmt.bundles.bundles import write_tensors
from trmt.errors import BundleError, ConfigError
from trmt.lab.masked_encoder import MaskedEncoder, MaskedEncoderConfig
from trmt.storage.files import atomic_folder, write_json
from trmt.text.tokenizer import Side, Tokenizer

CONFIG, VOCABULARY, WEIGHTS, PICKLED = "config.json", "vocab.txt", "model.safetensors", "pytorch_model.bin"
ARCHITECTURE = "masked-encoder"
# What BERT is beside its sizes.
FIXED: Mapping[str, Any] = {
    "norm_place": "post",
    "norm": "layer",
    "embedding_norm": True,
    "embedding_scale": False,
    "activation": "gelu",
    "positions": "learned",
    "position_join": "add",
    "residual": True,
    "score_scale": True,
}
NUMBERS: Mapping[str, str] = {
    "vocab_size": "source_vocabulary",
    "hidden_size": "width",
    "intermediate_size": "feed_forward",
    "num_attention_heads": "heads",
    "num_hidden_layers": "encoder_layers",
    "max_position_embeddings": "longest",
    "type_vocab_size": "segments",
    "layer_norm_eps": "epsilon",
    "hidden_dropout_prob": "dropout",
    "attention_probs_dropout_prob": "attention_dropout",
}
# The special pieces there, and the ids that stand for them here: pad, unk, bos, eos.
SPECIALS = (("[PAD]", 0), ("[UNK]", 1), ("[CLS]", 2), ("[SEP]", 3))
EMBEDDING = "bert.embeddings.word_embeddings.weight"
BIAS = "cls.predictions.bias"
TIED = {"cls.predictions.decoder.weight": EMBEDDING, "cls.predictions.decoder.bias": BIAS}


@dataclass(frozen=True)
class BertFolder:
    """What such a folder holds."""

    config: MaskedEncoderConfig
    weights: dict[str, Tensor]  # under our names
    pieces: tuple[str, ...]  # in the order of ids; empty where there is no vocab.txt


# Names


def _pairs(config: MaskedEncoderConfig) -> dict[str, str]:
    """Our names of tensors -> theirs, without those that are put together from several."""
    names = {
        "source_embedding.weight": EMBEDDING,
        "segments": "bert.embeddings.token_type_embeddings.weight",
        "guess_bias": BIAS,
        **_both("embedding_norms.0", "bert.embeddings.LayerNorm"),
        **_both("guess", "cls.predictions.transform.dense"),
        **_both("guess_norm", "cls.predictions.transform.LayerNorm"),
        **_both("summary", "bert.pooler.dense"),
        **_both("follows", "cls.seq_relationship"),
    }
    for number in range(config.encoder_layers):
        ours, theirs = f"encoder.{number}", f"bert.encoder.layer.{number}"
        names |= _both(f"{ours}.own_out", f"{theirs}.attention.output.dense")
        names |= _both(f"{ours}.own_norm", f"{theirs}.attention.output.LayerNorm")
        names |= _both(f"{ours}.feed.inner", f"{theirs}.intermediate.dense")
        names |= _both(f"{ours}.feed.outer", f"{theirs}.output.dense")
        names |= _both(f"{ours}.feed_norm", f"{theirs}.output.LayerNorm")
    return names


def _both(ours: str, theirs: str) -> dict[str, str]:
    return {f"{ours}.{part}": f"{theirs}.{part}" for part in ("weight", "bias")}


def _products(config: MaskedEncoderConfig) -> dict[str, list[str]]:
    """Our merged product of queries, keys and values -> their three."""
    return {
        f"encoder.{number}.own.{part}": [
            f"bert.encoder.layer.{number}.attention.self.{name}.{part}" for name in ("query", "key", "value")
        ]
        for number in range(config.encoder_layers)
        for part in ("weight", "bias")
    }


POSITIONS = ("positions", "bert.embeddings.position_embeddings.weight")


def to_their_names(config: MaskedEncoderConfig, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights as BertForPreTraining calls them, each tensor once."""
    theirs = {name: ours[mine].detach() for mine, name in _pairs(config).items()}
    for mine, three in _products(config).items():
        theirs |= dict(zip(three, ours[mine].detach().chunk(3), strict=True))
    theirs[POSITIONS[1]] = ours[POSITIONS[0]].detach()[0]
    return theirs


def to_our_names(
    config: MaskedEncoderConfig, theirs: Mapping[str, Tensor], *, where: Path
) -> dict[str, Tensor]:
    """The weights as the masked encoder calls them."""
    # Checkpoints converted from the first release still say gamma and beta.
    renamed = {
        name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias"): x
        for name, x in theirs.items()
    }
    for alias, name in TIED.items():
        if name not in renamed and alias in renamed:
            renamed[name] = renamed[alias]

    def found(name: str) -> Tensor:
        if name not in renamed:
            raise BundleError(f"{where} has no weights {name!r}; name a folder of BertForPreTraining")
        return renamed[name].float()

    ours = {mine: found(name) for mine, name in _pairs(config).items()}
    ours |= {mine: torch.cat([found(name) for name in three]) for mine, three in _products(config).items()}
    ours[POSITIONS[0]] = found(POSITIONS[1])[None]
    return ours


# Reading


def read_bert(folder: Path) -> BertFolder:
    """What is in a folder that `save_pretrained` wrote, or `write_bert`."""
    tree = _json(folder / CONFIG)
    missing = [name for name in NUMBERS if name not in tree]
    if tree.get("model_type") != "bert" or missing:
        raise BundleError(
            f"{folder / CONFIG} does not describe a BERT ({missing[0] if missing else 'model_type'!r}); name "
            "a folder of BertForPreTraining"
        )
    for name, known in (("hidden_act", "gelu"), ("position_embedding_type", "absolute")):
        if tree.get(name, known) != known:
            raise ConfigError(
                f"{folder} is a BERT with {name} = {tree[name]!r}; only {known!r} can be imported"
            )
    config = MaskedEncoderConfig(**{ours: tree[name] for name, ours in NUMBERS.items()}, **FIXED)
    listed = folder / VOCABULARY
    pieces = tuple(listed.read_text(encoding="utf-8").split("\n")[:-1]) if listed.is_file() else ()
    if pieces and len(pieces) != config.source_vocabulary:
        raise BundleError(
            f"{listed} has {len(pieces):,} pieces, {CONFIG} says {config.source_vocabulary:,}; copy it again"
        )
    weights = to_our_names(config, _weights(folder), where=folder)
    return BertFolder(config, weights, pieces)


def _json(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(path.read_bytes())
    except OSError as error:
        raise BundleError(f"cannot read {path}: {error.strerror}; name a folder of a BERT") from error
    except ValueError as error:
        raise BundleError(f"{path} is not valid JSON; copy it again") from error
    if not isinstance(tree, dict):
        raise BundleError(f"{path} is not a configuration; copy it again")
    return tree


def _weights(folder: Path) -> dict[str, Tensor]:
    path = folder / WEIGHTS
    try:
        if path.is_file():
            return load_file(path)
        path = folder / PICKLED
        # Nothing but tensors is unpickled.
        loaded: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
        return loaded
    except FileNotFoundError as error:
        raise BundleError(f"{folder} has neither {WEIGHTS} nor {PICKLED}; copy it again") from error
    except Exception as error:  # torch promises nothing about what it raises
        kind = "damaged" if isinstance(error, SafetensorError) else "not a file of tensors alone"
        raise BundleError(f"{path} is {kind}: {error}; copy it again") from error


def import_bert(folder: Path, out: Path, tokenizer: Tokenizer) -> Path:
    """Make a bundle of such a folder, which trmt train --init-from OUT:encoder begins with.

    Pieces that the tokenizer has and the folder has not begin with the mean of all, which is said.
    """
    found = read_bert(folder)
    rows = _rows(found, tokenizer.source, where=folder)
    weights = dict(found.weights)
    for name in ("source_embedding.weight", "guess_bias"):
        weights[name] = _placed(weights[name], rows)
    sizes = {each.name: getattr(found.config, each.name) for each in fields(found.config)}
    net = MaskedEncoder(MaskedEncoderConfig(**{**sizes, "source_vocabulary": len(rows)}))
    bundles.load_weights(net, weights, where=str(folder))
    longest = {"source": found.config.longest, "target": found.config.longest}
    manifest = bundles.make_manifest(
        net, ARCHITECTURE, tokenizer, longest=longest, training={"imported": folder.resolve().name}
    )
    bundles.save_bundle(out, manifest, net.state_dict(), tokenizer)
    missing = rows.count(-1)
    console.say(f"{folder}: {len(rows) - missing:,} of {len(rows):,} pieces were known -> {out}")
    return out


def _rows(found: BertFolder, side: Side, *, where: Path) -> list[int]:
    """For each of our ids the row that stands for the same piece, or -1."""
    if not found.pieces:
        if found.config.source_vocabulary != side.vocabulary:
            raise BundleError(
                f"{where} has no {VOCABULARY} and {found.config.source_vocabulary:,} pieces, the tokenizer "
                f"{side.vocabulary:,}; add the file, or name the tokenizer that belongs to it"
            )
        return list(range(side.vocabulary))
    places = {piece: number for number, piece in enumerate(found.pieces)}
    # In a list of WordPiece's, a bare piece begins a word; in one of ours it goes on with it.
    marked = any(piece.startswith("##") for piece in found.pieces)
    names = [wordpiece(piece) if marked else piece for piece in side.pieces(range(side.vocabulary))]
    for name, number in SPECIALS:
        names[number] = name
    # What stands for a masked piece here is the unknown one.
    names[side.unk] = "[MASK]" if "[MASK]" in places else "[UNK]"
    rows = [places.get(name, -1) for name in names]
    if rows.count(-1) > len(rows) // 2:
        console.warn(f"fewer than half of the tokenizer's pieces are among those of {where}")
    return rows


def wordpiece(piece: str) -> str:
    """A piece as WordPiece writes it: marked where a word goes on, and not where one begins."""
    return piece[1:] if piece.startswith("\u2581") and len(piece) > 1 else f"##{piece}"


def _placed(tensor: Tensor, rows: Sequence[int]) -> Tensor:
    at = torch.tensor(rows)
    taken = tensor[at.clamp(min=0)]
    taken[at < 0] = tensor.mean(0)
    return taken


# Writing


def export_bert(bundle: Path, out: Path) -> Path:
    """Write a pretrained encoder as a folder that `BertForPreTraining.from_pretrained` loads."""
    manifest = bundles.read_manifest(bundle)
    if manifest.architecture != ARCHITECTURE:
        raise ConfigError(
            f"{bundle} is a network of architecture {manifest.architecture!r}, which is no BERT; name a run "
            "of trmt pretrain"
        )
    net = bundles.build_network(manifest.architecture, manifest.network)
    bundles.load_weights(net, bundles.read_weights(bundle, manifest), where=str(bundle))
    assert isinstance(net, MaskedEncoder), "the architecture says so"
    tokenizer = Tokenizer.load(bundle / bundles.TOKENIZER)
    with atomic_folder(out) as folder:
        write_bert(net, tokenizer.source, folder)
    console.say(f"{bundle} for Hugging Face -> {out}")
    return out


def write_bert(net: MaskedEncoder, side: Side, folder: Path) -> None:
    """Write such a folder; an option that BERT has not is refused."""
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
    tree = {name: getattr(config, ours) for name, ours in NUMBERS.items()}
    write_json(
        folder / CONFIG,
        {
            "architectures": ["BertForPreTraining"],
            "model_type": "bert",
            "hidden_act": "gelu",
            "pad_token_id": side.pad,
            "tie_word_embeddings": True,
            **tree,
        },
    )
    names = side.pieces(range(side.vocabulary))
    for name, number in SPECIALS:
        names[number] = name
    (folder / VOCABULARY).write_text("".join(f"{name}\n" for name in names), encoding="utf-8", newline="\n")
    write_tensors(folder / WEIGHTS, to_their_names(config, net.state_dict()))
