from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.fakes import random_sentences
from trmt.bundles import bundles
from trmt.errors import BundleError, ConfigError
from trmt.interop.bert_folder import import_bert, read_bert, wordpiece, write_bert
from trmt.lab.masked_encoder import MaskedEncoder, MaskedEncoderConfig
from trmt.nets.ragged import Source
from trmt.sets.shards import PreparedSet
from trmt.text.tokenizer import Tokenizer

transformers: Any = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def tokenizer(toy_set: Path) -> Tokenizer:
    return Tokenizer.load(PreparedSet.open(toy_set).tokenizer_folder)


def random_bert(vocabulary: int, **options: Any) -> Any:
    torch.manual_seed(3)
    config = transformers.BertConfig(
        vocab_size=vocabulary,
        hidden_size=24,
        intermediate_size=40,
        num_attention_heads=3,
        num_hidden_layers=2,
        max_position_embeddings=50,
        initializer_range=0.3,
        **options,
    )
    model = transformers.BertForPreTraining(config).eval()
    for parameter in model.parameters():  # biases and norms too, so that a test fails if one is left out
        torch.nn.init.normal_(parameter, std=0.3)
    return model


SENTENCES = random_sentences(5, longest=20, seed=4)


def assert_same_logits(net: MaskedEncoder, model: Any) -> None:
    """The logits of both heads, of sentences of different lengths with two segments."""
    sentences = [[*sentence, 3] for sentence in SENTENCES]
    segments = [[int(position > len(s) // 2) for position in range(len(s))] for s in sentences]
    source = Source.of(sentences)
    extras = {"segments": torch.tensor([x for row in segments for x in row])}
    source = Source(source.ids_N, source.lengths_S, source.longest, extras)
    with torch.inference_mode():
        hidden = net(source).hidden
        rows = net.readout(hidden).split([len(s) for s in sentences])
        starts = source.packed()[1][:-1]
        next_sentence = net.next_sentence_logits(hidden[starts])
        ids, real = source.padded()
        segment_ids = torch.zeros_like(ids)
        segment_ids[real] = extras["segments"]
        found = model(input_ids=ids, attention_mask=real.long(), token_type_ids=segment_ids)
    for number, row in enumerate(rows):
        torch.testing.assert_close(row, found.prediction_logits[number, : len(row)], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(next_sentence, found.seq_relationship_logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("pickled", [False, True])
def test_a_bert_that_is_read_computes_the_same(pickled: bool, tmp_path: Path) -> None:
    model = random_bert(30)
    model.save_pretrained(tmp_path)
    if pickled:
        (tmp_path / "model.safetensors").unlink()
        torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    bert = read_bert(tmp_path)
    net = MaskedEncoder(bert.config).eval()
    net.load_state_dict(bert.weights)
    assert_same_logits(net, model)


def test_a_bert_that_is_written_computes_the_same(tokenizer: Tokenizer, tmp_path: Path) -> None:
    side = tokenizer.source
    torch.manual_seed(5)
    net = MaskedEncoder(
        MaskedEncoderConfig(
            source_vocabulary=side.vocabulary,
            d_model=24,
            heads=3,
            feed_forward=40,
            encoder_layers=2,
            max_positions=50,
        )
    ).eval()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    write_bert(net, side, tmp_path)
    model, info = transformers.BertForPreTraining.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert_same_logits(net, model.eval())
    again = read_bert(tmp_path)
    assert again.config == net.config
    for name, tensor in net.state_dict().items():
        assert torch.equal(again.weights[name], tensor), name


def test_an_imported_folder_is_a_bundle_with_rows_matched_by_token(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    ours = tokenizer.source.pieces(range(tokenizer.source.vocabulary))
    known = [wordpiece(piece) for piece in ours[5:]]  # one is missing
    tokens = ["[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]", "other", *reversed(known)]
    model = random_bert(len(tokens))
    model.save_pretrained(tmp_path / "bert")
    (tmp_path / "bert/vocab.txt").write_text("\n".join([*tokens, ""]), encoding="utf-8")
    import_bert(tmp_path / "bert", tmp_path / "bundle", tokenizer)
    weights = bundles.read_weights(tmp_path / "bundle", bundles.read_manifest(tmp_path / "bundle"))
    rows = weights["encoder.embedding.tokens.weight"]
    their_rows = model.bert.embeddings.word_embeddings.weight
    for number, token in [(0, "[PAD]"), (1, "[MASK]"), (2, "[CLS]"), (3, "[SEP]"), (9, wordpiece(ours[9]))]:
        assert torch.equal(rows[number], their_rows[tokens.index(token)]), token
    torch.testing.assert_close(rows[4], their_rows.mean(0))


def test_other_folders_are_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"config\.json"):
        read_bert(tmp_path)
    random_bert(30).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    tree = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps({**tree, "hidden_act": "relu"}), encoding="utf-8")
    with pytest.raises(ConfigError, match="hidden_act = 'relu'"):
        read_bert(tmp_path)
    path.write_text(json.dumps({**tree, "model_type": "gpt2"}), encoding="utf-8")
    with pytest.raises(BundleError, match="does not describe a BERT"):
        read_bert(tmp_path)
    path.write_text(json.dumps(tree), encoding="utf-8")
    with pytest.raises(BundleError, match="the tokenizer"):
        import_bert(tmp_path, tmp_path / "out", tokenizer)
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(BundleError, match="cannot read the weights"):
        read_bert(tmp_path)


def test_options_that_bert_lacks_are_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    sizes = {"source_vocabulary": tokenizer.source.vocabulary, "d_model": 8, "heads": 2, "encoder_layers": 1}
    net = MaskedEncoder(MaskedEncoderConfig(**sizes, norm_position="pre"))
    with pytest.raises(ConfigError, match="norm_position = 'pre'"):
        write_bert(net, tokenizer.source, tmp_path)
