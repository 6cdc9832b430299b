"""ONNX folders with the files, names and inputs that Hugging Face's Optimum loads.

The encoder is one graph, and the decoder another with both ways in it: with nothing remembered, and with
the keys and values of the tokens before. Any Transformer can be written, whatever its options: config.json,
which only says how large things are and which ids are special, calls it a Marian model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from trmt.bundles.bundles import Bundle
from trmt.interop import onnx_transformer
from trmt.interop.base import Format, Outcome, Probe, package, transformer_of
from trmt.interop.to_huggingface import generation, write_tokenizer
from trmt.storage.files import write_json
from trmt.text.tokenizer import Tokenizer

ENCODER, DECODER = "encoder_model.onnx", "decoder_model_merged.onnx"


class ONNX(Format):
    """A folder for `ORTModelForSeq2SeqLM`, or for any runtime of ONNX."""

    name = "ONNX"
    packages = ("onnx", "onnxruntime")

    def write(self, bundle: Bundle, folder: Path) -> None:
        net, tokenizer = transformer_of(bundle, self.name), bundle.tokenizer
        onnx_transformer.encoder(net, tokenizer).save(folder / ENCODER)
        onnx_transformer.decoder(net, tokenizer).save(folder / DECODER)
        write_tokenizer(tokenizer, folder, longest=net.config.longest)
        write_json(folder / "config.json", _config(net.config, tokenizer))
        write_json(folder / "generation_config.json", generation(tokenizer, net.config.longest))

    def outcome(self, folder: Path, tokenizer: Tokenizer, probe: Probe) -> Outcome:
        model = _Model(folder, tokenizer)
        both = zip(probe.sources, probe.targets, strict=True)
        scores = tuple(model.scores(source, target) for source, target in both)
        return Outcome(tuple(model.translation(source, probe.limit) for source in probe.sources), scores)


def _config(config: Any, tokenizer: Tokenizer) -> dict[str, Any]:
    target = tokenizer.target
    return {
        "model_type": "marian",
        "architectures": ["MarianMTModel"],
        "is_encoder_decoder": True,
        "vocab_size": target.vocabulary,
        "decoder_vocab_size": target.vocabulary,
        "d_model": config.width,
        "encoder_layers": config.encoder_layers,
        "decoder_layers": config.decoder_layers,
        "encoder_attention_heads": config.heads,
        "decoder_attention_heads": config.heads,
        "encoder_ffn_dim": config.feed_forward,
        "decoder_ffn_dim": config.feed_forward,
        "activation_function": config.activation,
        "max_position_embeddings": config.longest,
        "scale_embedding": True,
        "pad_token_id": target.pad,
        "eos_token_id": target.eos,
        "decoder_start_token_id": target.pad,
    }


class _Model:
    """The two graphs in ONNX Runtime."""

    def __init__(self, folder: Path, tokenizer: Tokenizer) -> None:
        runtime = package("onnxruntime")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = 1
        self.encoder, self.decoder = (
            runtime.InferenceSession(str(folder / name), options, providers=["CPUExecutionProvider"])
            for name in (ENCODER, DECODER)
        )
        self.tokenizer = tokenizer
        self.banned_ids = sorted(tokenizer.target.banned_ids)
        self.past = {
            value.name: np.zeros((1, value.shape[1], 0, value.shape[3]), np.float32)
            for value in self.decoder.get_inputs()
            if value.name.startswith("past")
        }

    def _read(self, source: tuple[int, ...]) -> dict[str, Any]:
        ids = np.array([[*source, self.tokenizer.source.eos]], np.int64)
        seen = np.ones_like(ids)
        (hidden,) = self.encoder.run(None, {"input_ids": ids, "attention_mask": seen})
        return {"encoder_hidden_states": hidden, "encoder_attention_mask": seen}

    def _step(self, read: dict[str, Any], ids: list[int], past: dict[str, Any] | None) -> tuple[Any, Any]:
        """Log probabilities of what follows each of the ids, and what is remembered then."""
        given = {**read, **(past or self.past), "input_ids": np.array([ids], np.int64)}
        given["use_cache_branch"] = np.array([past is not None])
        logits, *present = self.decoder.run(None, given)
        logits = logits[0].astype(np.float64)
        logits[:, self.banned_ids] = -np.inf
        top = logits.max(-1, keepdims=True)
        log = logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))
        return log, dict(zip(self.past, present, strict=True))

    def scores(self, source: tuple[int, ...], target: tuple[int, ...]) -> tuple[float, ...]:
        """The log probability of each token of a translation, and of its end."""
        log, _ = self._step(self._read(source), [self.tokenizer.target.pad, *target], None)
        after = [*target, self.tokenizer.target.eos]
        return tuple(float(row[token]) for row, token in zip(log, after, strict=True))

    def translation(self, source: tuple[int, ...], limit: int) -> tuple[int, ...]:
        """The translation found greedily, one token at a time."""
        read, past, found = self._read(source), None, [self.tokenizer.target.pad]
        while len(found) <= limit:
            log, past = self._step(read, found[-1:], past)
            found.append(int(log[-1].argmax()))
            if found[-1] == self.tokenizer.target.eos:
                return tuple(found[1:-1])
        return tuple(found[1:])
