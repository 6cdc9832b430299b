"""Exports to ONNX: folders with the files, names and inputs that Hugging Face's Optimum loads.

The encoder is one graph. The decoder is another, with a branch for the first step and one for later
steps, which use the keys and values of earlier tokens. Every Transformer can be exported, whatever its
options: config.json, which only holds sizes and special ids, calls it a Marian model.

Axes: B batch, T target position, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from trmt.bundles.bundles import Bundle
from trmt.interop.base import CheckInputs, CheckResults, Format, import_package, transformer_of
from trmt.interop.onnx_transformer import decoder_graph, encoder_graph
from trmt.interop.to_huggingface import generation_options, write_tokenizer
from trmt.nets.transformer import TransformerConfig
from trmt.storage.files import write_json
from trmt.text.tokenizer import Tokenizer

ENCODER, DECODER = "encoder_model.onnx", "decoder_model_merged.onnx"


class ONNX(Format):
    """A folder for `ORTModelForSeq2SeqLM`, or for any ONNX runtime."""

    name = "ONNX"
    packages = ("onnx", "onnxruntime")

    def write(self, bundle: Bundle, folder: Path) -> None:
        net, tokenizer = transformer_of(bundle, self.name), bundle.tokenizer
        max_length = net.config.max_positions
        encoder_graph(net, tokenizer).save(folder / ENCODER)
        decoder_graph(net, tokenizer).save(folder / DECODER)
        write_tokenizer(tokenizer, folder, languages=bundle.manifest.languages, max_length=max_length)
        write_json(folder / "config.json", _config(net.config, tokenizer))
        write_json(folder / "generation_config.json", generation_options(tokenizer, max_length))

    def run(self, folder: Path, tokenizer: Tokenizer, inputs: CheckInputs) -> CheckResults:
        model = _RuntimeModel(folder, tokenizer)
        pairs = zip(inputs.sources, inputs.targets, strict=True)
        scores = tuple(model.score(source, target) for source, target in pairs)
        translations = tuple(model.translate(source, inputs.max_tokens) for source in inputs.sources)
        return CheckResults(translations, scores)


def _config(config: TransformerConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    target = tokenizer.target
    return {
        "model_type": "marian",
        "architectures": ["MarianMTModel"],
        "is_encoder_decoder": True,
        "vocab_size": target.vocabulary,
        "decoder_vocab_size": target.vocabulary,
        "d_model": config.d_model,
        "encoder_layers": config.encoder_layers,
        "decoder_layers": config.decoder_layers,
        "encoder_attention_heads": config.heads,
        "decoder_attention_heads": config.heads,
        "encoder_ffn_dim": config.feed_forward,
        "decoder_ffn_dim": config.feed_forward,
        "activation_function": config.activation,
        "max_position_embeddings": config.max_positions,
        "scale_embedding": True,
        "pad_token_id": target.pad,
        "eos_token_id": target.eos,
        "decoder_start_token_id": target.pad,
    }


class _RuntimeModel:
    """The two graphs in ONNX Runtime."""

    def __init__(self, folder: Path, tokenizer: Tokenizer) -> None:
        runtime = import_package("onnxruntime")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = 1
        self.encoder, self.decoder = (
            runtime.InferenceSession(str(folder / name), options, providers=["CPUExecutionProvider"])
            for name in (ENCODER, DECODER)
        )
        self.tokenizer = tokenizer
        self.banned = sorted(tokenizer.target.banned_ids)
        self.empty_cache = {
            value.name: np.zeros((1, value.shape[1], 0, value.shape[3]), np.float32)
            for value in self.decoder.get_inputs()
            if value.name.startswith("past")
        }

    def score(self, source: tuple[int, ...], target: tuple[int, ...]) -> tuple[float, ...]:
        """The log probability of each token of a translation, and of its end."""
        log_prob_TV, _ = self._step(self._encode(source), [self.tokenizer.target.pad, *target], None)
        next_ids = [*target, self.tokenizer.target.eos]
        return tuple(float(row[token]) for row, token in zip(log_prob_TV, next_ids, strict=True))

    def translate(self, source: tuple[int, ...], max_tokens: int) -> tuple[int, ...]:
        """The translation by greedy search, one token at a time."""
        encoded, cache, ids = self._encode(source), None, [self.tokenizer.target.pad]
        while len(ids) <= max_tokens:
            log_prob_TV, cache = self._step(encoded, ids[-1:], cache)
            ids.append(int(log_prob_TV[-1].argmax()))
            if ids[-1] == self.tokenizer.target.eos:
                return tuple(ids[1:-1])
        return tuple(ids[1:])

    def _encode(self, source: tuple[int, ...]) -> dict[str, Any]:
        ids = np.array([[*source, self.tokenizer.source.eos]], np.int64)
        mask = np.ones_like(ids)
        (hidden,) = self.encoder.run(None, {"input_ids": ids, "attention_mask": mask})
        return {"encoder_hidden_states": hidden, "encoder_attention_mask": mask}

    def _step(
        self, encoded: dict[str, Any], ids: list[int], cache: dict[str, Any] | None
    ) -> tuple[Any, dict[str, Any]]:
        """Log probabilities of the token after each of these, and the new KV cache."""
        inputs = {**encoded, **(cache or self.empty_cache), "input_ids": np.array([ids], np.int64)}
        inputs["use_cache_branch"] = np.array([cache is not None])
        logits_BTV, *present = self.decoder.run(None, inputs)
        logits_TV = logits_BTV[0].astype(np.float64)
        logits_TV[:, self.banned] = -np.inf
        top_T1 = logits_TV.max(-1, keepdims=True)
        log_prob_TV = logits_TV - top_T1 - np.log(np.exp(logits_TV - top_T1).sum(-1, keepdims=True))
        return log_prob_TV, dict(zip(self.empty_cache, present, strict=True))
