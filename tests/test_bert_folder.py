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
from trmt.nets.base import Source
from trmt.sets.shards import PreparedSet
from trmt.text.tokenizer import Tokenizer

transformers: Any = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def tokenizer(toy_set: Path) -> Tokenizer:
    return Tokenizer.load(PreparedSet.open(toy_set).tokenizer_folder)


def theirs(vocabulary: int, **options: Any) -> Any:
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
    for parameter in model.parameters():  # biases and norms too, so that none can be forgotten
        torch.nn.init.normal_(parameter, std=0.3)
    return model


SENTENCES = random_sentences(5, longest=20, seed=4)


def same(net: MaskedEncoder, model: Any) -> None:
    """The logits of both heads, of sentences of different lengths with two segments."""
    sentences = [[*sentence, 3] for sentence in SENTENCES]
    segments = [[int(place > len(s) // 2) for place in range(len(s))] for s in sentences]
    source = Source.of(sentences)
    extras = {"segments": torch.tensor([x for row in segments for x in row])}
    source = Source(source.ids_N, source.lengths_S, source.longest, extras)
    with torch.inference_mode():
        hidden = net(source).hidden
        rows = net.readout(hidden).split([len(s) for s in sentences])
        starts = source.packed()[1][:-1]
        judged = net.judge(hidden[starts])
        ids, real = source.padded()
        kinds = torch.zeros_like(ids)
        kinds[real] = extras["segments"]
        found = model(input_ids=ids, attention_mask=real.long(), token_type_ids=kinds)
    for number, row in enumerate(rows):
        torch.testing.assert_close(row, found.prediction_logits[number, : len(row)], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(judged, found.seq_relationship_logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("pickled", [False, True])
def test_what_is_read_computes_the_same(pickled: bool, tmp_path: Path) -> None:
    model = theirs(30)
    model.save_pretrained(tmp_path)
    if pickled:
        (tmp_path / "model.safetensors").unlink()
        torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    found = read_bert(tmp_path)
    net = MaskedEncoder(found.config).eval()
    net.load_state_dict(found.weights)
    same(net, model)


def test_what_is_written_computes_the_same(tokenizer: Tokenizer, tmp_path: Path) -> None:
    side = tokenizer.source
    torch.manual_seed(5)
    net = MaskedEncoder(
        MaskedEncoderConfig(
            source_vocabulary=side.vocabulary,
            width=24,
            heads=3,
            feed_forward=40,
            encoder_layers=2,
            longest=50,
        )
    ).eval()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    write_bert(net, side, tmp_path)
    model, told = transformers.BertForPreTraining.from_pretrained(tmp_path, output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"]
    same(net, model.eval())
    again = read_bert(tmp_path)
    assert again.config == net.config
    for name, tensor in net.state_dict().items():
        assert torch.equal(again.weights[name], tensor), name


def test_an_imported_folder_is_a_bundle_with_rows_by_piece(tokenizer: Tokenizer, tmp_path: Path) -> None:
    ours = tokenizer.source.pieces(range(tokenizer.source.vocabulary))
    known = [wordpiece(piece) for piece in ours[5:]]  # one is missing
    pieces = ["[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]", "else", *reversed(known)]
    model = theirs(len(pieces))
    model.save_pretrained(tmp_path / "bert")
    (tmp_path / "bert/vocab.txt").write_text("\n".join([*pieces, ""]), encoding="utf-8")
    import_bert(tmp_path / "bert", tmp_path / "bundle", tokenizer)
    weights = bundles.read_weights(tmp_path / "bundle", bundles.read_manifest(tmp_path / "bundle"))
    rows = weights["source_embedding.weight"]
    their_rows = model.bert.embeddings.word_embeddings.weight
    for number, piece in [(0, "[PAD]"), (1, "[MASK]"), (2, "[CLS]"), (3, "[SEP]"), (9, wordpiece(ours[9]))]:
        assert torch.equal(rows[number], their_rows[pieces.index(piece)]), piece
    torch.testing.assert_close(rows[4], their_rows.mean(0))


def test_what_is_no_bert_is_said(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"config\.json"):
        read_bert(tmp_path)
    theirs(30).save_pretrained(tmp_path)
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
    with pytest.raises(BundleError, match="damaged"):
        read_bert(tmp_path)


def test_what_bert_has_not_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    sizes = {"source_vocabulary": tokenizer.source.vocabulary, "width": 8, "heads": 2, "encoder_layers": 1}
    net = MaskedEncoder(MaskedEncoderConfig(**sizes, norm_place="pre"))
    with pytest.raises(ConfigError, match="norm_place = 'pre'"):
        write_bert(net, tokenizer.source, tmp_path)
