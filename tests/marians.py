"""Hugging Face folders with random Marian models, as OPUS-MT's are laid out."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zlib import crc32

import sentencepiece
import torch
import transformers

from tests.texts import ENGLISH, GERMAN

TAG = ">>deu<<"
TEXTS = [
    *ENGLISH[:6],
    f"{TAG} {ENGLISH[7]}",
    "  white\u00a0space,\ttabs  and ﬁne ligatures ",
    "cafe\u0301 №5 😀 Ωmega",
    ">>xyz<< a tag that the model does not know",
]


@dataclass(frozen=True)
class SentencePieceModels:
    """The sentencepiece models of both languages."""

    source: bytes
    target: bytes


def train_models() -> SentencePieceModels:
    """Two models with the ids and the normalisation that are sentencepiece's defaults."""
    return SentencePieceModels(*(_model(lines) for lines in (ENGLISH, GERMAN)))


def _model(lines: list[str]) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        vocab_size=150,
        minloglevel=2,
        character_coverage=1.0,
    )
    return model.getvalue()


def vocabulary(*models: bytes) -> dict[str, int]:
    """The end of sentence first, the unknown token second, padding last."""
    tokens = ["</s>", "<unk>"]
    for model in models:
        processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        tokens += [processor.id_to_piece(number) for number in range(3, processor.vocab_size())]
    return {token: number for number, token in enumerate(dict.fromkeys([*tokens, TAG, "<pad>"]))}


def folder(
    path: Path, models: SentencePieceModels, *, separate: bool = False, bias: bool = False, **options: Any
) -> Path:
    """A folder with a random model; `separate` gives each side a vocabulary of its own."""
    path.mkdir()
    (path / "source.spm").write_bytes(models.source)
    (path / "target.spm").write_bytes(models.target)
    if separate:
        source, target = vocabulary(models.source), vocabulary(models.target)
        options |= {"share_encoder_decoder_embeddings": False, "decoder_vocab_size": len(target)}
        (path / "target_vocab.json").write_text(json.dumps(target))
    else:
        source = target = vocabulary(models.source, models.target)
    (path / "vocab.json").write_text(json.dumps(source))
    settings = {"source_lang": "en", "target_lang": "de", "separate_vocabs": separate}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    (path / "README.md").write_text("---\nlanguage: en\nlicense: cc-by-4.0\n---\n# A model\n")
    sizes = {"vocab_size": len(source), "pad_token_id": target["<pad>"], "d_model": 32}
    for side in ("encoder", "decoder"):
        sizes |= {f"{side}_layers": 2, f"{side}_attention_heads": 4, f"{side}_ffn_dim": 64}
    config = transformers.MarianConfig(
        **{
            **sizes,
            "activation_function": "swish",
            "scale_embedding": True,
            "max_position_embeddings": 64,
            "eos_token_id": 0,
            "decoder_start_token_id": target["<pad>"],
            "bos_token_id": None,
            **options,
        }
    )
    model = with_large_weights(transformers.MarianMTModel(config), bias=bias)
    model.generation_config.bad_words_ids = [[target["<pad>"]]]
    model.save_pretrained(path)
    return path


@torch.no_grad()
def with_large_weights(model: Any, *, bias: bool) -> Any:
    """The model with weights so large that its choices are rarely close, in eval mode."""
    for name, parameter in model.named_parameters():
        if "embed_positions" in name:
            continue
        # By name, since not every version of transformers has them in the same order.
        drawn = (
            torch.randn(parameter.shape, generator=torch.Generator().manual_seed(crc32(name.encode()))) * 0.3
        )
        if parameter.dim() == 1:
            parameter.add_(drawn)
        else:
            embeds = "shared" in name or "embed_tokens" in name
            larger = model.config.d_model**0.5 if embeds and not model.config.scale_embedding else 1
            parameter.copy_(drawn * larger)
    if bias:
        model.final_logits_bias.normal_(generator=torch.Generator().manual_seed(11))
    return model.eval()
