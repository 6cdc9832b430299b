from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests import moved, toy
from tests.texts import ENGLISH
from trmt.bundles import bundles
from trmt.errors import ConfigError
from trmt.interop.exporting import ExportOptions, export
from trmt.interop.importing import ImportOptions, import_model
from trmt.interop.sentencepiece_files import normalising_model
from trmt.nets.ragged import Ragged, Source
from trmt.nets.transformer import Transformer
from trmt.text.tokenizer import Tokenizer, load_model
from trmt.text.tokenizer_training import TokenizerOptions, train_tokenizer
from trmt.translating import TranslateOptions, Translator

OPTIONS: list[dict[str, Any]] = [
    {},
    {"activation": "gelu", "output_bias": True},
    {"activation": "swish", "tied": "none"},
    {"tied": "target", "encoder_layers": 1},
]
UNUSUAL = [
    "  white\u00a0space,\tin \u3000 many forms ",
    "Vie\u0323\u0302t Vie\u0302\u0323t cafe\u0301 \u212b \u1112\u1161\u11ab\u1100\u1173\u11af",
    "10² ﬁ ½ №5 😀 \u200b\u064b",
]


@pytest.fixture(scope="module")
def tokenizer(toy_set: Path) -> Tokenizer:
    return Tokenizer.load(toy_set / "tokenizer")


def exported(model: Path, **options: Any) -> Path:
    return export(ExportOptions(model=model, to="huggingface", out=model.parent / "out", **options))


@torch.no_grad()
@pytest.mark.parametrize("options", OPTIONS, ids=moved.option_id)
def test_logits_are_those_of_trmt(
    options: dict[str, Any], separate_set: Path, toy_set: Path, tmp_path: Path
) -> None:
    data = separate_set if options.get("tied") in ("target", "none") else toy_set
    tokenizer = Tokenizer.load(data / "tokenizer")
    folder = moved.bundle(tmp_path / "bundle", tokenizer, **options)
    out, net = exported(folder, check=False), bundles.load_bundle(folder).net
    model = transformers.MarianMTModel.from_pretrained(out).eval()
    sources, targets = (side.encode(moved.TEXTS) for side in (tokenizer.source, tokenizer.target))
    for source, target in zip(sources, targets, strict=True):
        expected = net.readout(net(Source.of([[*source, 3]]), Ragged.of([[2, *target]])).hidden)
        # There, a translation begins with padding.
        found = model(input_ids=torch.tensor([[*source, 3]]), decoder_input_ids=torch.tensor([[0, *target]]))
        used = expected[:, : tokenizer.target.vocabulary]
        torch.testing.assert_close(found.logits[0][:, 1:], used[:, 1:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("beam", [1, 4])
def test_generate_translates_as_trmt_does(tokenizer: Tokenizer, tmp_path: Path, beam: int) -> None:
    folder = moved.bundle(tmp_path / "bundle", tokenizer, output_bias=True)
    out = exported(folder)
    options = TranslateOptions(beam=beam, length_penalty=0, max_length=20)
    ours = Translator.load(folder, options=options).translate(moved.TEXTS)
    # As a user of transformers would: with the Auto classes and a padded batch.
    tokenize = transformers.AutoTokenizer.from_pretrained(out)
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(out)
    batch = tokenize(moved.TEXTS, return_tensors="pt", padding=True)
    found = model.generate(**batch, num_beams=beam, length_penalty=0.0, max_length=22, early_stopping="never")
    texts = [text.strip() for text in tokenize.batch_decode(found, skip_special_tokens=True)]
    same = sum(mine.text == text for mine, text in zip(ours, texts, strict=True))
    assert same == len(texts) if beam == 1 else same >= len(texts) - 1


def corpus(folder: Path) -> str:
    return toy.write_tsv(folder / "corpus.tsv", list(zip(ENGLISH, ENGLISH, strict=True)))


def test_texts_become_the_same_ids(tmp_path: Path) -> None:
    for rule in ("nfc", "nmt_nfkc_cf", "none"):
        options = TokenizerOptions(
            corpora=(corpus(tmp_path),), size=400, normalise_source=rule, placeholders=("<name>",)
        )
        tokenizer, _ = train_tokenizer(options)
        out = exported(moved.bundle(tmp_path / rule / "bundle", tokenizer), check=False)
        tokenize = transformers.MarianTokenizer.from_pretrained(out)
        for text in [*ENGLISH, "<name> is here", *(UNUSUAL if rule != "none" else [])]:
            assert tokenize(text).input_ids[:-1] == tokenizer.source.encode([text])[0], (rule, text)


@pytest.mark.slow
def test_models_normalise_as_their_side_does(tmp_path: Path) -> None:
    """All characters and their decompositions."""
    tokenizer, _ = train_tokenizer(TokenizerOptions(corpora=(corpus(tmp_path),), size=400))
    side = tokenizer.source
    model = load_model(normalising_model(side))
    for code in range(0x20, 0x20000):
        character = chr(code)
        if unicodedata.category(character) in ("Cs", "Co", "Cn") or character in "\u2581\0":
            continue
        for text in (f"a {character} b", f"a {unicodedata.normalize('NFD', character)} b"):
            expected = side.normalise(text)
            assert model.normalize(text).replace("\u2581", " ").strip() == expected.replace("\u2581", " ")


def test_options_that_marian_lacks_are_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    for option, value in (
        ("norm_position", "pre"),
        ("norm", "rms"),
        ("positions", "learned"),
        ("positions", "rotary"),
        ("activation", "swiglu"),
        ("position_offset", 2),
    ):
        path = tmp_path / str(value)
        folder = moved.bundle(path / "bundle", tokenizer, **{option: value})
        with pytest.raises(ConfigError, match=f"Marian has no Transformer with {option} = {value!r}"):
            exported(folder)
        assert not (path / "out").exists()


def test_an_exported_model_is_imported_again(tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder = moved.bundle(tmp_path / "bundle", tokenizer, output_bias=True)
    back = import_model(ImportOptions(folder=exported(folder), out=tmp_path / "back"))
    options = TranslateOptions(search="greedy", max_length=20)
    before, after = (
        [each.text for each in Translator.load(bundle, options=options).translate(moved.TEXTS)]
        for bundle in (folder, back)
    )
    assert before == after
    again = export(ExportOptions(model=back, to="huggingface", out=tmp_path / "again"))
    assert json.loads((again / "vocab.json").read_bytes()) == json.loads(
        (tmp_path / "out" / "vocab.json").read_bytes()
    )
    assert isinstance(bundles.load_bundle(back).net, Transformer)


def test_special_ids_are_never_generated(tokenizer: Tokenizer, tmp_path: Path) -> None:
    out = exported(moved.bundle(tmp_path / "bundle", tokenizer))
    generation = json.loads((out / "generation_config.json").read_bytes())
    assert generation["bad_words_ids"] == [[0], [1], [2]]
    assert (generation["decoder_start_token_id"], generation["pad_token_id"], generation["eos_token_id"]) == (
        0,
        0,
        3,
    )
