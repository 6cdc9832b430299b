"""Hugging Face folders with a Marian model and its tokenizer, written by transformers itself.

Marian is the Transformer of the paper with norms after sublayers and sinusoidal positions, so only such
networks can be one. A translation begins with the padding token there: its embedding is that of our
beginning of sentence.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trmt.bundles.bundles import Bundle
from trmt.errors import ConfigError
from trmt.interop.base import Format, Outcome, Probe, package, refuse, rows, transformer_of
from trmt.interop.marian import halves, layers_to_marian
from trmt.interop.pieces import write_models
from trmt.nets.transformer import Transformer
from trmt.storage.files import write_json
from trmt.text.tokenizer import Side, Tokenizer


class HuggingFace(Format):
    """A folder for `MarianMTModel` and `MarianTokenizer`, or for what picks them by itself."""

    name = "Hugging Face"
    packages = ("transformers",)

    def write(self, bundle: Bundle, folder: Path) -> None:
        net, tokenizer = transformer_of(bundle, self.name), bundle.tokenizer
        refuse(
            "Marian",
            net.config,
            norm_place=("post",),
            norm=("layer",),
            positions=("sinusoidal",),
            activation=("relu", "gelu", "swish"),
        )
        if net.config.width % 2:
            raise ConfigError(f"Marian has no network of the odd width {net.config.width}; train another")
        write_model(net, tokenizer, folder)
        write_tokenizer(tokenizer, folder, longest=net.config.longest)

    def outcome(self, folder: Path, tokenizer: Tokenizer, probe: Probe) -> Outcome:
        transformers = package("transformers")
        model = transformers.MarianMTModel.from_pretrained(folder).eval()
        cut = transformers.MarianTokenizer.from_pretrained(folder)
        sources = tuple(tuple(cut(text).input_ids[:-1]) for text in probe.texts)
        return hugging_outcome(model, tokenizer, probe, sources)


def write_model(net: Transformer, tokenizer: Tokenizer, folder: Path) -> None:
    """Write the network's weights and configuration."""
    marian, state = package("transformers"), marian_weights(net, tokenizer)
    config = marian_config(net, tokenizer)
    model = marian.MarianMTModel(config)
    tables = {name: table for name, table in model.state_dict().items() if "embed_positions" in name}
    model.load_state_dict(state | tables)  # the tables of positions it computes itself
    model.generation_config = marian.GenerationConfig(**generation(tokenizer, net.config.longest))
    model.save_pretrained(folder)


def marian_config(net: Transformer, tokenizer: Tokenizer) -> Any:
    """The network as a MarianConfig."""
    ours, source, target = net.config, tokenizer.source, tokenizer.target
    shared = ours.tied == "all"
    return package("transformers").MarianConfig(
        vocab_size=source.vocabulary,
        decoder_vocab_size=target.vocabulary,
        d_model=ours.width,
        encoder_layers=ours.encoder_layers,
        decoder_layers=ours.decoder_layers,
        encoder_attention_heads=ours.heads,
        decoder_attention_heads=ours.heads,
        encoder_ffn_dim=ours.feed_forward,
        decoder_ffn_dim=ours.feed_forward,
        dropout=ours.dropout,
        attention_dropout=ours.attention_dropout,
        activation_dropout=0.0,
        activation_function=ours.activation,
        max_position_embeddings=ours.longest,
        scale_embedding=True,
        share_encoder_decoder_embeddings=shared,
        tie_word_embeddings=ours.tied != "none",
        pad_token_id=target.pad,
        eos_token_id=target.eos,
        bos_token_id=None,
        decoder_start_token_id=target.pad,
    )


def generation(tokenizer: Tokenizer, longest: int) -> dict[str, Any]:
    """What `generate` has to know."""
    target = tokenizer.target
    return {
        "pad_token_id": target.pad,
        "eos_token_id": target.eos,
        "decoder_start_token_id": target.pad,
        "bad_words_ids": [[token] for token in sorted(target.banned_ids)],
        "forced_eos_token_id": target.eos,
        "max_length": longest,
        "num_beams": 4,
    }


def marian_weights(net: Transformer, tokenizer: Tokenizer) -> dict[str, Tensor]:
    """The network's weights as those of a MarianMTModel."""
    order, target = halves(net.config.width), tokenizer.target
    weights = layers_to_marian(net.state_dict(), net.config)
    source_VD = begun(rows(net.source_embedding.weight, tokenizer.source), tokenizer.source)[:, order]
    target_VD = begun(rows(net.target_embedding.weight, target), target)[:, order]
    output_VD = rows(net.output.weight, target)[:, order]
    if net.config.tied == "all":
        weights["model.shared.weight"] = target_VD
    weights["model.encoder.embed_tokens.weight"] = source_VD
    weights["model.decoder.embed_tokens.weight"] = target_VD
    weights["lm_head.weight"] = output_VD if net.config.tied == "none" else target_VD
    bias = torch.zeros(target.vocabulary) if net.output_bias is None else rows(net.output_bias, target)
    weights["final_logits_bias"] = bias[None]
    return weights


def begun(embedding_VD: Tensor, side: Side) -> Tensor:
    """The embedding with that of the beginning of sentence for padding, with which Marian begins."""
    embedding_VD = embedding_VD.clone()
    embedding_VD[side.pad] = embedding_VD[side.bos]
    return embedding_VD


def write_tokenizer(tokenizer: Tokenizer, folder: Path, *, longest: int) -> None:
    """Write what MarianTokenizer reads."""
    write_models(folder, tokenizer)
    source, target = tokenizer.source, tokenizer.target
    write_json(folder / "vocab.json", _numbers(source))
    if not tokenizer.joint:
        write_json(folder / "target_vocab.json", _numbers(target))
    unk, eos, pad = target.pieces([target.unk, target.eos, target.pad])
    settings = {
        "tokenizer_class": "MarianTokenizer",
        "source_lang": tokenizer.languages[0],
        "target_lang": tokenizer.languages[1],
        "separate_vocabs": not tokenizer.joint,
        "unk_token": unk,
        "eos_token": eos,
        "pad_token": pad,
        "model_max_length": longest,
    }
    write_json(folder / "tokenizer_config.json", settings)


def _numbers(side: Side) -> dict[str, int]:
    return {piece: number for number, piece in enumerate(side.pieces(range(side.vocabulary)))}


@torch.inference_mode()
def hugging_outcome(
    model: Any, tokenizer: Tokenizer, probe: Probe, sources: tuple[tuple[int, ...], ...]
) -> Outcome:
    """What a model with Hugging Face's way of translating makes of a probe."""
    start, eos = tokenizer.target.pad, tokenizer.target.eos
    never = sorted(tokenizer.target.banned_ids)
    scores, translations = [], []
    for ids, target in zip(probe.sources, probe.targets, strict=True):
        source = torch.tensor([[*ids, tokenizer.source.eos]])
        known = {"input_ids": source, "attention_mask": torch.ones_like(source)}
        logits = model(**known, decoder_input_ids=torch.tensor([[start, *target]])).logits[0].float()
        log = logits.index_fill(1, torch.tensor(never), -torch.inf).log_softmax(-1)
        scores.append(tuple(log.gather(1, torch.tensor([*target, eos])[:, None])[:, 0].tolist()))
        found = model.generate(
            **known, num_beams=1, do_sample=False, max_new_tokens=probe.limit, forced_eos_token_id=None
        )
        translations.append(_until(found[0, 1:].tolist(), eos))
    return Outcome(tuple(translations), tuple(scores), sources)


def _until(ids: Sequence[int], eos: int) -> tuple[int, ...]:
    return tuple(ids[: ids.index(eos)] if eos in ids else ids)
