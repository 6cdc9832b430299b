"""Exports to Hugging Face: a folder with a Marian model and its tokenizer, written by transformers itself.

Marian is the post-norm Transformer of the paper with sinusoidal positions, so only such networks can be
exported. There, a translation begins with the padding token, which gets the embedding of our beginning of
sentence.

Axes: T target position, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trmt.bundles.bundles import Bundle
from trmt.errors import ConfigError
from trmt.interop.base import (
    CheckInputs,
    CheckResults,
    Format,
    check_options,
    import_package,
    token_rows,
    transformer_of,
)
from trmt.interop.marian import columns_to_marian, layers_to_marian
from trmt.interop.sentencepiece_files import write_models
from trmt.nets.transformer import Transformer
from trmt.storage.files import write_json
from trmt.text.tokenizer import Side, Tokenizer


class HuggingFace(Format):
    """A folder for `MarianMTModel` and `MarianTokenizer`, or for the Auto classes."""

    name = "Hugging Face"
    packages = ("transformers",)

    def write(self, bundle: Bundle, folder: Path) -> None:
        net, tokenizer = transformer_of(bundle, self.name), bundle.tokenizer
        check_options(
            "Marian",
            net.config,
            norm_position=("post",),
            norm=("layer",),
            positions=("sinusoidal",),
            position_offset=(0,),
            activation=("relu", "gelu", "swish"),
        )
        if net.config.d_model % 2:
            raise ConfigError(
                f"Marian has no Transformer with an odd d_model, such as {net.config.d_model}; export to "
                "another format, or train another network"
            )
        write_model(net, tokenizer, folder)
        write_tokenizer(
            tokenizer, folder, languages=bundle.manifest.languages, max_length=net.config.max_positions
        )

    def run(self, folder: Path, tokenizer: Tokenizer, inputs: CheckInputs) -> CheckResults:
        transformers = import_package("transformers")
        model = transformers.MarianMTModel.from_pretrained(folder).eval()
        tokenize = transformers.MarianTokenizer.from_pretrained(folder)
        sources = tuple(tuple(tokenize(text).input_ids[:-1]) for text in inputs.texts)
        return run_model(model, tokenizer, inputs, sources)


def write_model(net: Transformer, tokenizer: Tokenizer, folder: Path) -> None:
    """Write the network's weights and configuration."""
    transformers, weights = import_package("transformers"), marian_weights(net, tokenizer)
    model = transformers.MarianMTModel(marian_config(net, tokenizer))
    positions = {name: table for name, table in model.state_dict().items() if "embed_positions" in name}
    model.load_state_dict(weights | positions)  # positions are as Marian computes them
    generation = generation_options(tokenizer, net.config.max_positions)
    model.generation_config = transformers.GenerationConfig(**generation)
    model.save_pretrained(folder)


def marian_config(net: Transformer, tokenizer: Tokenizer) -> Any:
    """The network's configuration as a MarianConfig."""
    config, source, target = net.config, tokenizer.source, tokenizer.target
    return import_package("transformers").MarianConfig(
        vocab_size=source.vocabulary,
        decoder_vocab_size=target.vocabulary,
        d_model=config.d_model,
        encoder_layers=config.encoder_layers,
        decoder_layers=config.decoder_layers,
        encoder_attention_heads=config.heads,
        decoder_attention_heads=config.heads,
        encoder_ffn_dim=config.feed_forward,
        decoder_ffn_dim=config.feed_forward,
        dropout=config.dropout,
        attention_dropout=config.attention_dropout,
        activation_dropout=0.0,
        activation_function=config.activation,
        max_position_embeddings=config.max_positions,
        scale_embedding=True,
        share_encoder_decoder_embeddings=config.tied == "all",
        tie_word_embeddings=config.tied != "none",
        pad_token_id=target.pad,
        eos_token_id=target.eos,
        bos_token_id=None,
        decoder_start_token_id=target.pad,
    )


def generation_options(tokenizer: Tokenizer, max_length: int) -> dict[str, Any]:
    """The defaults of `generate`."""
    target = tokenizer.target
    return {
        "pad_token_id": target.pad,
        "eos_token_id": target.eos,
        "decoder_start_token_id": target.pad,
        "bad_words_ids": [[token] for token in sorted(target.banned_ids)],
        "forced_eos_token_id": target.eos,
        "max_length": max_length,
        "num_beams": 4,
    }


def marian_weights(net: Transformer, tokenizer: Tokenizer) -> dict[str, Tensor]:
    """The network's weights as those of a MarianMTModel."""
    order, source, target = columns_to_marian(net.config.d_model), tokenizer.source, tokenizer.target
    weights = layers_to_marian(net.state_dict(), net.config)
    source_VD = begin_with_padding(token_rows(net.encoder.embedding.tokens.weight, source), source)[:, order]
    target_VD = begin_with_padding(token_rows(net.decoder.embedding.tokens.weight, target), target)[:, order]
    output_VD = token_rows(net.output.weight, target)[:, order]
    if net.config.tied == "all":
        weights["model.shared.weight"] = target_VD
    weights["model.encoder.embed_tokens.weight"] = source_VD
    weights["model.decoder.embed_tokens.weight"] = target_VD
    weights["lm_head.weight"] = output_VD if net.config.tied == "none" else target_VD
    bias = torch.zeros(target.vocabulary) if net.output_bias is None else token_rows(net.output_bias, target)
    weights["final_logits_bias"] = bias[None]
    return weights


def begin_with_padding(embedding_VD: Tensor, side: Side) -> Tensor:
    """The embedding with the row of the beginning of sentence for padding, with which Marian begins."""
    embedding_VD = embedding_VD.clone()
    embedding_VD[side.pad] = embedding_VD[side.bos]
    return embedding_VD


def write_tokenizer(
    tokenizer: Tokenizer, folder: Path, *, languages: tuple[str, str], max_length: int
) -> None:
    """Write the files of a MarianTokenizer."""
    write_models(folder, tokenizer)
    source, target = tokenizer.source, tokenizer.target
    write_json(folder / "vocab.json", _vocabulary(source))
    if not tokenizer.joint:
        write_json(folder / "target_vocab.json", _vocabulary(target))
    unk, eos, pad = target.pieces([target.unk, target.eos, target.pad])
    settings = {
        "tokenizer_class": "MarianTokenizer",
        "source_lang": languages[0],
        "target_lang": languages[1],
        "separate_vocabs": not tokenizer.joint,
        "unk_token": unk,
        "eos_token": eos,
        "pad_token": pad,
        "model_max_length": max_length,
    }
    write_json(folder / "tokenizer_config.json", settings)


def _vocabulary(side: Side) -> dict[str, int]:
    return {token: number for number, token in enumerate(side.pieces(range(side.vocabulary)))}


@torch.inference_mode()
def run_model(
    model: Any, tokenizer: Tokenizer, inputs: CheckInputs, sources: tuple[tuple[int, ...], ...]
) -> CheckResults:
    """Run a model of transformers on the inputs; `sources` are the ids of its own tokenizer."""
    start, eos = tokenizer.target.pad, tokenizer.target.eos
    banned = torch.tensor(sorted(tokenizer.target.banned_ids))
    scores, translations = [], []
    for ids, target in zip(inputs.sources, inputs.targets, strict=True):
        source = torch.tensor([[*ids, tokenizer.source.eos]])
        encoder_inputs = {"input_ids": source, "attention_mask": torch.ones_like(source)}
        decoder_ids = torch.tensor([[start, *target]])
        logits_TV = model(**encoder_inputs, decoder_input_ids=decoder_ids).logits[0].float()
        log_prob_TV = logits_TV.index_fill(1, banned, -torch.inf).log_softmax(-1)
        scores.append(tuple(log_prob_TV.gather(1, torch.tensor([*target, eos])[:, None])[:, 0].tolist()))
        generated = model.generate(
            **encoder_inputs,
            num_beams=1,
            do_sample=False,
            max_new_tokens=inputs.max_tokens,
            forced_eos_token_id=None,
        )
        translations.append(_until_end(generated[0, 1:].tolist(), eos))
    return CheckResults(tuple(translations), tuple(scores), sources)


def _until_end(ids: Sequence[int], eos: int) -> tuple[int, ...]:
    return tuple(ids[: ids.index(eos)] if eos in ids else ids)
