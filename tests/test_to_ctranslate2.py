from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import ctranslate2
import pytest

from tests import moved
from trmt.bundles import bundles
from trmt.errors import BundleError, ConfigError
from trmt.interop import checking
from trmt.interop.base import CheckInputs, CheckResults
from trmt.interop.exporting import ExportOptions, export
from trmt.interop.to_ctranslate2 import CTranslate2
from trmt.text.tokenizer import Tokenizer
from trmt.translating import TranslateOptions, Translator

OPTIONS: list[dict[str, Any]] = [
    {},
    {"norm_position": "pre"},
    {"norm_position": "pre", "norm": "rms", "activation": "swiglu", "positions": "rotary"},
    {"norm": "rms", "activation": "gelu", "positions": "learned"},
    {"activation": "swish", "output_bias": True, "tied": "none"},
    {"activation": "swiglu", "positions": "rotary", "tied": "target"},
    {"norm_position": "pre", "activation": "gelu", "positions": "learned", "tied": "none"},
]


@pytest.fixture
def tokenizer(toy_set: Path) -> Tokenizer:
    return Tokenizer.load(toy_set / "tokenizer")


def exported(model: Path, **options: Any) -> Path:
    return export(ExportOptions(model=model, to="ctranslate2", out=model.parent / "out", **options))


@pytest.mark.parametrize("options", OPTIONS, ids=moved.option_id)
def test_ctranslate2_computes_the_same(options: dict[str, Any], tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder = moved.bundle(tmp_path / "bundle", tokenizer, **options)
    out = exported(folder, check=False)
    ours = checking.reference(bundles.load_bundle(folder).net, tokenizer, moved.TEXTS, max_source_length=40)
    theirs = CTranslate2().run(out, tokenizer, ours.inputs)
    assert checking.compare(ours, theirs, name="") < 1e-4
    assert len(set(ours.results.translations)) > 1, "whatever the source, the translation is the same"


def test_it_translates_as_trmt_does(separate_set: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(separate_set / "tokenizer")
    folder = moved.bundle(tmp_path / "bundle", tokenizer, tied="target")
    out = exported(folder)
    ours = Translator.load(folder, options=TranslateOptions(search="greedy", max_length=20))
    translator = ctranslate2.Translator(str(out), intra_threads=1)
    # As a user of CTranslate2 would: with the models and vocabularies of the folder alone.
    sources = [tokenizer.source.pieces(ids) for ids in tokenizer.source.encode(moved.TEXTS)]
    found = translator.translate_batch(sources, beam_size=1, max_decoding_length=20)
    vocabulary = json.loads((out / "target_vocabulary.json").read_bytes())
    ids = {token: number for number, token in enumerate(vocabulary)}
    texts = [tokenizer.target.decode([ids[token] for token in each.hypotheses[0]]) for each in found]
    assert texts == [each.text for each in ours.translate(moved.TEXTS)]


def test_banned_tokens_are_never_generated(tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder = moved.bundle(tmp_path / "bundle", tokenizer, output_bias=True)
    bundle = bundles.load_bundle(folder)
    weights = bundle.net.state_dict()
    weights["output_bias"][:3] = 50.0  # a network that would generate nothing but pad, unk and bos
    bundles.save_bundle(folder, bundle.manifest, weights, tokenizer)
    translator = ctranslate2.Translator(str(exported(folder)), intra_threads=1)
    sources = [tokenizer.source.pieces(ids) for ids in tokenizer.source.encode(moved.TEXTS)]
    tokens = {
        token
        for each in translator.translate_batch(sources, beam_size=4, num_hypotheses=4, max_decoding_length=9)
        for hypothesis in each.hypotheses
        for token in hypothesis
    }
    assert tokens and not {"<pad>", "<unk>", "<s>"} & tokens


def test_defaults_are_written_and_padding_rows_are_not(tokenizer: Tokenizer, tmp_path: Path) -> None:
    out = exported(moved.bundle(tmp_path / "bundle", tokenizer))
    config = json.loads((out / "config.json").read_bytes())
    assert config["layer_norm_epsilon"] == 1e-5
    assert (config["add_source_eos"], config["decoder_start_token"]) == (True, "<s>")
    vocabulary = json.loads((out / "shared_vocabulary.json").read_bytes())
    assert len(vocabulary) == tokenizer.target.vocabulary
    assert (out / "source.spm").read_bytes().startswith(tokenizer.models[0])
    content = (out / "model.bin").read_bytes()
    assert all(f"{side}/position_encodings/encodings".encode() in content for side in ("encoder", "decoder"))


def test_a_model_that_computes_something_else_is_not_exported(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = moved.bundle(tmp_path / "bundle", tokenizer)
    run = CTranslate2.run

    def wrong_scores(self: Any, *arguments: Any) -> CheckResults:
        found = run(self, *arguments)
        scores = (tuple(score + 0.01 for score in found.scores[0]), *found.scores[1:])
        return CheckResults(found.translations, scores)

    monkeypatch.setattr(CTranslate2, "run", wrong_scores)
    with pytest.raises(BundleError, match=r"another log probability, off by 0\.01"):
        exported(folder)
    assert not (tmp_path / "out").exists()

    def wrong_translation(self: Any, *arguments: Any) -> CheckResults:
        found = run(self, *arguments)
        return CheckResults(((5, 5, 5), *found.translations[1:]), found.scores)

    monkeypatch.setattr(CTranslate2, "run", wrong_translation)
    with pytest.raises(BundleError, match="translates sentence 1 of the comparison differently"):
        exported(folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle"]


def test_other_networks_and_other_folders_are_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    # A subclass of the Transformer, which computes something else.
    sizes = {"source_vocabulary": 60, "target_vocabulary": 60, "d_model": 16, "feed_forward": 16}
    net = bundles.build_network("ssru", sizes)
    manifest = bundles.make_manifest(net, "ssru", tokenizer, longest={"source": 40})
    bundles.save_bundle(tmp_path / "ssru", manifest, net.state_dict(), tokenizer)
    with pytest.raises(ConfigError, match=r"no networks like 'ssru' .* only a transformer can be exported"):
        exported(tmp_path / "ssru")
    with pytest.raises(ConfigError, match="did you mean 'ctranslate2'"):
        export(ExportOptions(model=tmp_path / "ssru", to="ctranslate"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("the only copy")
    with pytest.raises(BundleError, match="is not an exported model"):
        exported(moved.bundle(tmp_path / "bundle", tokenizer))
    assert (tmp_path / "out" / "thesis.tex").exists()


def test_a_missing_package_is_named_with_how_to_install_it(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = moved.bundle(tmp_path / "bundle", tokenizer)
    monkeypatch.setitem(sys.modules, "ctranslate2", None)
    with pytest.raises(ConfigError, match=r"pip install 'trmt\[export\]'"):
        exported(folder)


def test_ties_are_not_differences() -> None:
    inputs = CheckInputs(("a",), ((7,),), ((4,),), 9)
    ours = checking.Reference(inputs, CheckResults(((5, 6),), ((-1.0, -1.0),)), ((2.0, 1e-5, 2.0),))
    assert checking.compare(ours, CheckResults(((5, 8, 9),), ours.results.scores), name="") == 0
    with pytest.raises(BundleError, match="differently"):
        checking.compare(ours, CheckResults(((8, 6),), ours.results.scores), name="it")
    with pytest.raises(BundleError, match="another log probability"):
        checking.compare(ours, CheckResults(((5, 6),), ((-1.0, float("nan")),)), name="")


def test_random_sentences_are_always_the_same(tokenizer: Tokenizer, tmp_path: Path) -> None:
    bundle = bundles.load_bundle(moved.bundle(tmp_path / "bundle", tokenizer))
    sentences = checking.check_sentences(bundle)
    assert sentences == checking.check_sentences(bundle)
    assert len(set(sentences)) >= 4


def test_a_network_too_short_for_any_sentence_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder = moved.bundle(tmp_path / "bundle", tokenizer)
    with pytest.raises(BundleError, match="pass --no-check"):
        checking.reference(bundles.load_bundle(folder).net, tokenizer, moved.TEXTS, max_source_length=0)
