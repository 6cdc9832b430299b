from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests import marians, moved, toy
from tests.marians import TAG, TEXTS, SentencePieceModels
from tests.texts import ENGLISH, GERMAN
from trmt.bundles import bundles
from trmt.errors import BundleError, ConfigError
from trmt.interop import from_marian
from trmt.interop.exporting import ExportOptions, export
from trmt.interop.importing import ImportOptions, import_model
from trmt.interop.marian import columns_to_marian
from trmt.nets.ragged import Ragged, Source
from trmt.sets.preparing import PrepareOptions, prepare
from trmt.text.tokenizer import Tokenizer
from trmt.training.planning import TrainOptions
from trmt.training.run import train
from trmt.translating import TranslateOptions, Translator
from trmt.verifying import VerifyOptions, verify

OPTIONS: list[dict[str, Any]] = [
    {},
    {"bias": True},
    {"tie_word_embeddings": False, "bias": True},
    {"tie_word_embeddings": False, "scale_embedding": False},
    {"separate": True, "activation_function": "relu", "bias": True},
    {"activation_function": "gelu", "decoder_layers": 1},
]


@pytest.fixture(scope="module")
def models() -> SentencePieceModels:
    return marians.train_models()


@pytest.fixture
def folder(models: SentencePieceModels, tmp_path: Path) -> Path:
    return marians.folder(tmp_path / "opus-mt-en-de", models, bias=True)


def imported(folder: Path, *, check: bool = False, **options: Any) -> Path:
    out = folder.parent / "bundle"
    return import_model(ImportOptions(folder=folder, out=out, check=check, **options))


def theirs(folder: Path, texts: list[str], **options: Any) -> list[str]:
    """What transformers itself translates, all texts in one padded batch."""
    model = transformers.MarianMTModel.from_pretrained(folder).eval()
    tokenizer = transformers.MarianTokenizer.from_pretrained(folder)
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    found = model.generate(**batch, do_sample=False, max_length=22, **options)
    return [text.strip() for text in tokenizer.batch_decode(found, skip_special_tokens=True)]


@torch.no_grad()
@pytest.mark.parametrize("options", OPTIONS, ids=moved.option_id)
def test_logits_are_those_of_transformers(
    options: dict[str, Any], models: SentencePieceModels, tmp_path: Path
) -> None:
    path = marians.folder(tmp_path / "marian", models, **options)
    found = from_marian.read_marian(path)
    model = transformers.MarianMTModel.from_pretrained(path).eval()
    target = found.tokenizer.target
    for text in TEXTS:
        [source] = found.tokenizer.source.encode([text])
        [reference] = target.encode([GERMAN[len(text) % 30]])
        expected = model(
            input_ids=torch.tensor([[*source, 0]]), decoder_input_ids=torch.tensor([[target.bos, *reference]])
        ).logits[0]
        hidden = found.net(Source.of([[*source, 0]]), Ragged.of([[target.bos, *reference]])).hidden
        torch.testing.assert_close(found.net.readout(hidden), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[2], OPTIONS[4]], ids=moved.option_id)
def test_it_translates_as_transformers_does(
    options: dict[str, Any], models: SentencePieceModels, tmp_path: Path
) -> None:
    path = marians.folder(tmp_path / "marian", models, **options)
    bundle = imported(path, check=True)
    texts = TEXTS[:-1]
    greedy = Translator.load(bundle, options=TranslateOptions(search="greedy", max_length=20))
    expected = theirs(path, texts, num_beams=1)
    assert [each.text for each in greedy.translate(texts)] == expected
    assert len(set(expected)) > 1, "whatever the source, the translation is the same"
    assert verify(VerifyOptions(model=bundle)).differences == ()


def test_beams_find_what_those_of_transformers_find(folder: Path) -> None:
    options = TranslateOptions(beam=4, length_penalty=0, max_length=20)
    ours = Translator.load(imported(folder), options=options).translate(TEXTS)
    expected = theirs(folder, TEXTS, num_beams=4, length_penalty=0.0, early_stopping="never")
    assert [each.text for each in ours] == expected


def test_texts_become_the_same_ids(folder: Path, models: SentencePieceModels, tmp_path: Path) -> None:
    separate = marians.folder(tmp_path / "separate", models, separate=True)
    for path in (folder, separate):
        tokenizer = from_marian.read_tokenizer(path)
        marian = transformers.MarianTokenizer.from_pretrained(path)
        assert tokenizer.joint == (path == folder)
        for text in [*TEXTS, *ENGLISH]:
            assert [*tokenizer.source.encode([text])[0], 0] == marian(text).input_ids
        for text in GERMAN:
            [ids] = tokenizer.target.encode([text])
            assert [*ids, 0] == marian(text_target=text).input_ids
            assert tokenizer.target.decode(ids) == text.replace("…", "...").replace("²", "2")
            assert tokenizer.target.pieces(ids) == marian.convert_ids_to_tokens(ids)


def test_the_tokenizer_survives_writing_and_pickling(folder: Path, tmp_path: Path) -> None:
    tokenizer = from_marian.read_tokenizer(folder)
    tokenizer.save(tmp_path / "tokenizer")
    copies = [Tokenizer.load(tmp_path / "tokenizer"), pickle.loads(pickle.dumps(tokenizer))]
    for copy in copies:
        assert copy.fingerprint == tokenizer.fingerprint
        assert copy.source.encode(TEXTS) == tokenizer.source.encode(TEXTS)
        assert (copy.target.bos, copy.target.banned_ids) == (tokenizer.target.pad, {tokenizer.target.pad})
    words = tmp_path / "tokenizer" / "vocabulary.json"
    words.write_text(words.read_text().replace('"▁the"', '"▁then"'))
    with pytest.raises(BundleError, match="fingerprint differs"):
        Tokenizer.load(tmp_path / "tokenizer")


def test_a_tag_begins_every_segment_of_a_long_line(folder: Path) -> None:
    translator = Translator.load(imported(folder), options=TranslateOptions(search="greedy"))
    tag = translator.tokenizer.source.tag_id(TAG)
    text = f"{TAG} " + " ".join(ENGLISH[:6])
    segments = list(translator._segments(text, translator._encoded(text)))
    assert len(segments) > 2
    assert all(ids[0] == tag and tag not in ids[1:] for ids, _ in segments)


def test_an_imported_model_is_fine_tuned(folder: Path, tmp_path: Path) -> None:
    bundle = imported(folder)
    corpus = toy.write_tsv(tmp_path / "train.tsv", list(zip(ENGLISH, GERMAN, strict=True)))
    prepare(
        PrepareOptions(
            train=(corpus,), out=tmp_path / "set", tokenizer=bundle / "tokenizer", dev_size=0, workers=1
        )
    )
    changes = {
        "training": {"steps": 30},
        "validation": {"every": 30},
        "optim": {"lr": 0.002},
        "loss": {"label_smoothing": 0.0},
    }
    recipe = toy.recipe(tmp_path, changes)
    run = train(TrainOptions(run=tmp_path / "run", data=tmp_path / "set", recipe=recipe, init_from=bundle))
    events = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    losses = [event["loss"] for event in events if event["event"] == "train"]
    before = loss_of(bundle)
    assert abs(losses[0] - before) < before / 2, "training does not start from the model"
    tuned = run / "step-00000030"
    assert loss_of(tuned) < before * 0.8
    assert not torch.equal(*(bundles.load_bundle(path).net.output_bias for path in (bundle, tuned)))


@torch.no_grad()
def loss_of(path: Path) -> float:
    bundle = bundles.load_bundle(path)
    sources = [[*ids, 0] for ids in bundle.tokenizer.source.encode(ENGLISH)]
    targets = bundle.tokenizer.target.encode(GERMAN)
    hidden = bundle.net(
        Source.of(sources), Ragged.of([[bundle.tokenizer.target.bos, *ids] for ids in targets])
    ).hidden
    labels = torch.tensor([token for ids in targets for token in (*ids, 0)])
    return float(torch.nn.functional.cross_entropy(bundle.net.readout(hidden), labels))


@pytest.mark.slow
@pytest.mark.parametrize("to", ["ctranslate2", "huggingface", "onnx"])
def test_an_imported_model_is_exported(
    folder: Path, to: str, models: SentencePieceModels, tmp_path: Path
) -> None:
    """Export itself compares: ids from a vocabulary file, translations that begin with padding, tags."""
    for number, path in enumerate((folder, marians.folder(tmp_path / "separate", models, separate=True))):
        bundle = import_model(ImportOptions(folder=path, out=tmp_path / f"bundle{number}", check=False))
        out = export(ExportOptions(model=bundle, to=to, out=tmp_path / f"{to}{number}"))
        assert (out / "source.spm").read_bytes() == (path / "source.spm").read_bytes()


def test_pickled_and_sharded_weights_are_read(folder: Path) -> None:
    model = transformers.MarianMTModel.from_pretrained(folder)
    expected = from_marian.read_marian(folder).net.state_dict()
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    found = from_marian.read_marian(folder).net.state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    (folder / "pytorch_model.bin").unlink()
    model.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    found = from_marian.read_marian(folder).net.state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_weights_cannot_run_code(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"model.shared.weight": Malicious(tmp_path / "touched")}, folder / "pytorch_model.bin")
    with pytest.raises(BundleError, match="cannot read the weights"):
        imported(folder)
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model_type": "t5"}, "of type 't5'; only Marian"),
        ({"normalize_before": True}, "normalize_before = True"),
        ({"scale_embedding": False}, "scale_embedding = false and ties"),
        ({"decoder_ffn_dim": 32}, "encoder_ffn_dim and decoder_ffn_dim"),
        ({"activation_function": "tanh"}, "activation_function = 'tanh'"),
        ({"encoder_layers": 3}, "does not hold a complete Marian model"),
        ({"d_model": "wide"}, "expected a whole number"),
    ],
)
def test_models_that_trmt_cannot_compute_are_refused(
    folder: Path, changes: dict[str, Any], expected: str
) -> None:
    config = json.loads((folder / "config.json").read_bytes())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises((BundleError, ConfigError), match=expected):
        imported(folder)
    assert not (folder.parent / "bundle").exists()


def test_incomplete_folders_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"cannot read .*config\.json"):
        imported(tmp_path)
    for name, expected in (
        ("source.spm", r"cannot read .*source\.spm"),
        ("vocab.json", r"cannot read .*vocab\.json"),
        ("model.safetensors", "there are no weights"),
    ):
        broken = shutil.copytree(folder, tmp_path / name)
        (broken / name).unlink()
        with pytest.raises(BundleError, match=expected):
            imported(broken)


def test_languages_and_licence_of_the_model_are_kept(folder: Path) -> None:
    manifest = bundles.read_manifest(imported(folder))
    assert manifest.languages == ("en", "de")
    assert manifest.licences == ("cc-by-4.0",)
    assert manifest.training == {"imported": "opus-mt-en-de"}
    assert len(manifest.golden) >= 4
    assert bundles.read_manifest(imported(folder, languages=("", "at"))).languages == ("en", "at")


def test_a_model_that_computes_something_else_is_not_imported(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        from_marian, "columns_from_marian", columns_to_marian
    )  # columns in another order than they should be
    with pytest.raises(BundleError, match="another log probability"):
        imported(folder, check=True)
    assert not (folder.parent / "bundle").exists()
