from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import transformers

from tests import moved
from trmt.bundles import bundles
from trmt.interop import checking, onnx_graph
from trmt.interop.exporting import ExportOptions, export
from trmt.interop.to_onnx import ONNX
from trmt.text.tokenizer import Tokenizer
from trmt.translating import TranslateOptions, Translator

OPTIONS: list[dict[str, Any]] = [
    {},
    {"norm_position": "pre", "norm": "rms", "activation": "swiglu", "positions": "rotary"},
    {"norm": "rms", "activation": "gelu", "positions": "learned", "output_bias": True},
    {"norm_position": "pre", "activation": "swish", "tied": "none", "encoder_layers": 1},
]


@pytest.fixture
def tokenizer(toy_set: Path) -> Tokenizer:
    return Tokenizer.load(toy_set / "tokenizer")


def exported(model: Path, **options: Any) -> Path:
    return export(ExportOptions(model=model, to="onnx", out=model.parent / "out", **options))


@pytest.mark.parametrize("options", OPTIONS, ids=moved.option_id)
def test_onnx_runtime_computes_the_same(
    options: dict[str, Any], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    folder = moved.bundle(tmp_path / "bundle", tokenizer, **options)
    out = exported(folder, check=False)
    ours = checking.reference(bundles.load_bundle(folder).net, tokenizer, moved.TEXTS, max_source_length=40)
    assert checking.compare(ours, ONNX().run(out, tokenizer, ours.inputs), name="") < 1e-4


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("options", OPTIONS[:2], ids=["marian", "other"])
def test_optimum_loads_and_translates_it(
    options: dict[str, Any], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    from optimum.onnxruntime import ORTModelForSeq2SeqLM

    folder = moved.bundle(tmp_path / "bundle", tokenizer, **options)
    out = exported(folder)
    model = ORTModelForSeq2SeqLM.from_pretrained(out)
    tokenize = transformers.AutoTokenizer.from_pretrained(out)
    batch = tokenize(moved.TEXTS, return_tensors="pt", padding=True)
    greedy = Translator.load(folder, options=TranslateOptions(search="greedy", max_length=20))
    found = model.generate(**batch, num_beams=1, max_length=22)
    texts = [text.strip() for text in tokenize.batch_decode(found, skip_special_tokens=True)]
    assert texts == [each.text for each in greedy.translate(moved.TEXTS)]
    without = model.generate(**batch, num_beams=1, max_length=22, use_cache=False)
    assert without.tolist() == found.tolist()
    if not options:  # the same weights, run by transformers itself
        marian = export(ExportOptions(model=folder, to="huggingface", out=tmp_path / "marian"))
        theirs = transformers.MarianMTModel.from_pretrained(marian)
        options = {"num_beams": 4, "max_length": 22, "early_stopping": True}
        assert model.generate(**batch, **options).tolist() == theirs.generate(**batch, **options).tolist()


def test_the_cache_of_the_first_step_counts_for_nothing(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Some programs give one position of zeros for the first step, others none."""
    out = exported(moved.bundle(tmp_path / "bundle", tokenizer), check=False)
    encoder, decoder = (
        onnxruntime.InferenceSession(out / name, providers=["CPUExecutionProvider"])
        for name in ("encoder_model.onnx", "decoder_model_merged.onnx")
    )
    ids, mask = np.array([[7, 8, 9, 3], [9, 3, 0, 0]]), np.array([[1, 1, 1, 1], [1, 1, 0, 0]])
    (hidden,) = encoder.run(None, {"input_ids": ids, "attention_mask": mask})
    inputs = {"encoder_hidden_states": hidden, "encoder_attention_mask": mask, "input_ids": ids[:, :3]}
    inputs["use_cache_branch"] = np.array([False])
    logits = []
    for length in (0, 1):
        past = {
            value.name: np.zeros((2, value.shape[1], length, value.shape[3]), np.float32)
            for value in decoder.get_inputs()
            if value.name.startswith("past")
        }
        logits.append(decoder.run(["logits"], inputs | past)[0])
    assert np.array_equal(*logits)
    # Nor does padding of the source.
    (alone,) = encoder.run(None, {"input_ids": ids[1:, :2], "attention_mask": mask[1:, :2]})
    np.testing.assert_allclose(alone[0], hidden[1, :2], atol=1e-5)


def test_large_graphs_have_their_weights_in_another_file(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_graph, "MAX_BYTES", 1000)
    out = exported(moved.bundle(tmp_path / "bundle", tokenizer), check=False)
    assert (out / "encoder_model.onnx_data").stat().st_size > 1000
    assert (out / "encoder_model.onnx").stat().st_size < 60_000
    assert onnx.load(out / "encoder_model.onnx").graph.name == "encoder_model"


def test_each_weight_is_written_once(tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder = moved.bundle(tmp_path / "bundle", tokenizer)
    written = sum(path.stat().st_size for path in exported(folder, check=False).glob("*.onnx"))
    weights = (folder / "weights.safetensors").stat().st_size
    shared = (
        tokenizer.target.vocabulary * moved.SIZES["d_model"] * 4
    )  # an embedding for each of the two graphs
    tables = 2 * moved.SIZES["max_positions"] * moved.SIZES["d_model"] * 4
    assert written < weights + shared + tables + 60_000
