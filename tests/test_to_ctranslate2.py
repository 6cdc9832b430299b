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
from trmt.interop import probes
from trmt.interop.base import Outcome
from trmt.interop.exporting import ExportOptions, export
from trmt.interop.to_ctranslate2 import CTranslate2
from trmt.text.tokenizer import Tokenizer
from trmt.translating import TranslateOptions, Translator

KINDS: list[dict[str, Any]] = [
    {},
    {"norm_place": "pre"},
    {"norm_place": "pre", "norm": "rms", "activation": "swiglu", "positions": "rotary"},
    {"norm": "rms", "activation": "gelu", "positions": "learned"},
    {"activation": "swish", "output_bias": True, "tied": "none"},
    {"activation": "swiglu", "positions": "rotary", "tied": "target"},
    {"norm_place": "pre", "activation": "gelu", "positions": "learned", "tied": "none"},
]


@pytest.fixture
def tokenizer(toy_set: Path) -> Tokenizer:
    return Tokenizer.load(toy_set / "tokenizer")


def exported(model: Path, **options: Any) -> Path:
    return export(ExportOptions(model=model, to="ctranslate2", out=model.parent / "out", **options))


@pytest.mark.parametrize("options", KINDS, ids=lambda options: "-".join(map(str, options.values())) or "base")
def test_ctranslate2_computes_the_same(options: dict[str, Any], tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder = moved.bundle(tmp_path / "bundle", tokenizer, **options)
    out = exported(folder, check=False)
    ours = probes.expected(bundles.load_bundle(folder).net, tokenizer, moved.TEXTS, longest=40)
    theirs = CTranslate2().outcome(out, tokenizer, ours.probe)
    assert probes.compare(ours, theirs, name="") < 1e-4
    assert len(set(ours.outcome.translations)) > 1, "whatever the source, the translation is the same"


def test_it_translates_as_trmt_does(separate_set: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(separate_set / "tokenizer")
    folder = moved.bundle(tmp_path / "bundle", tokenizer, tied="target")
    out = exported(folder)
    ours = Translator.load(folder, options=TranslateOptions(search="greedy", max_length=20))
    translator = ctranslate2.Translator(str(out), intra_threads=1)
    # As any user of CTranslate2 would: with the models and vocabularies of the folder alone.
    sources = [tokenizer.source.pieces(ids) for ids in tokenizer.source.encode(moved.TEXTS)]
    found = translator.translate_batch(sources, beam_size=1, max_decoding_length=20)
    numbers = {
        piece: place for place, piece in enumerate(json.loads((out / "target_vocabulary.json").read_bytes()))
    }
    texts = [tokenizer.target.decode([numbers[piece] for piece in each.hypotheses[0]]) for each in found]
    assert texts == [each.text for each in ours.translate(moved.TEXTS)]


def test_what_may_not_be_generated_is_ruled_out(tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder = moved.bundle(tmp_path / "bundle", tokenizer, output_bias=True)
    bundle = bundles.load_bundle(folder)
    weights = bundle.net.state_dict()
    weights["output_bias"][:3] = 50.0  # a network that would say nothing but pad, unk and bos
    bundles.save_bundle(folder, bundle.manifest, weights, tokenizer)
    translator = ctranslate2.Translator(str(exported(folder)), intra_threads=1)
    sources = [tokenizer.source.pieces(ids) for ids in tokenizer.source.encode(moved.TEXTS)]
    [*pieces] = [
        piece
        for each in translator.translate_batch(sources, beam_size=4, num_hypotheses=4, max_decoding_length=9)
        for hypothesis in each.hypotheses
        for piece in hypothesis
    ]
    assert pieces and not {"<pad>", "<unk>", "<s>"} & set(pieces)


def test_defaults_are_written_out_and_padding_is_stripped(tokenizer: Tokenizer, tmp_path: Path) -> None:
    out = exported(moved.bundle(tmp_path / "bundle", tokenizer))
    config = json.loads((out / "config.json").read_bytes())
    assert config["layer_norm_epsilon"] == 1e-5
    assert (config["add_source_eos"], config["decoder_start_token"]) == (True, "<s>")
    vocabulary = json.loads((out / "shared_vocabulary.json").read_bytes())
    assert len(vocabulary) == tokenizer.target.vocabulary
    assert (out / "source.spm").read_bytes().startswith(tokenizer.models[0])
    content = (out / "model.bin").read_bytes()
    assert all(f"{side}/position_encodings/encodings".encode() in content for side in ("encoder", "decoder"))


def test_a_model_that_computes_something_else_never_appears(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = moved.bundle(tmp_path / "bundle", tokenizer)
    whole = CTranslate2.outcome

    def wrong(self: Any, *arguments: Any) -> Outcome:
        found = whole(self, *arguments)
        return Outcome(
            found.translations, (tuple(score + 0.01 for score in found.scores[0]), *found.scores[1:])
        )

    monkeypatch.setattr(CTranslate2, "outcome", wrong)
    with pytest.raises(BundleError, match=r"another log probability, off by 0\.01"):
        exported(folder)
    assert not (tmp_path / "out").exists()

    def other_words(self: Any, *arguments: Any) -> Outcome:
        found = whole(self, *arguments)
        return Outcome(((5, 5, 5), *found.translations[1:]), found.scores)

    monkeypatch.setattr(CTranslate2, "outcome", other_words)
    with pytest.raises(BundleError, match="translates sentence 1 of the comparison otherwise"):
        exported(folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle"]


def test_other_networks_and_other_folders_are_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    net = bundles.build_network("rnn", {"source_vocabulary": 60, "target_vocabulary": 60, "width": 16})
    manifest = bundles.make_manifest(net, "rnn", tokenizer, longest={"source": 40})
    bundles.save_bundle(tmp_path / "rnn", manifest, net.state_dict(), tokenizer)
    with pytest.raises(ConfigError, match="only a transformer can be exported"):
        exported(tmp_path / "rnn")
    with pytest.raises(ConfigError, match="did you mean 'ctranslate2'"):
        export(ExportOptions(model=tmp_path / "rnn", to="ctranslate"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("no copy of it")
    with pytest.raises(BundleError, match="is no export"):
        exported(moved.bundle(tmp_path / "bundle", tokenizer))
    assert (tmp_path / "out" / "thesis.tex").exists()


def test_without_the_package_one_sentence_says_what_to_install(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = moved.bundle(tmp_path / "bundle", tokenizer)
    monkeypatch.setitem(sys.modules, "ctranslate2", None)
    with pytest.raises(ConfigError, match=r"pip install 'trmt\[export\]'"):
        exported(folder)


def test_ties_are_no_differences() -> None:
    probe = probes.Probe(("a",), ((7,),), ((4,),), 9)
    ours = probes.Expected(probe, Outcome(((5, 6),), ((-1.0, -1.0),)), ((2.0, 1e-5, 2.0),))
    assert probes.compare(ours, Outcome(((5, 8, 9),), ours.outcome.scores), name="") == 0
    with pytest.raises(BundleError, match="otherwise"):
        probes.compare(ours, Outcome(((8, 6),), ours.outcome.scores), name="it")
    with pytest.raises(BundleError, match="another log probability"):
        probes.compare(ours, Outcome(((5, 6),), ((-1.0, float("nan")),)), name="")


def test_made_up_sentences_are_always_the_same(tokenizer: Tokenizer, tmp_path: Path) -> None:
    bundle = bundles.load_bundle(moved.bundle(tmp_path / "bundle", tokenizer))
    made = probes.sentences(bundle)
    assert made == probes.sentences(bundle)
    assert len(set(made)) >= 4


def test_a_network_too_short_for_any_sentence_says_so(tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder = moved.bundle(tmp_path / "bundle", tokenizer)
    with pytest.raises(BundleError, match="pass --no-check"):
        probes.expected(bundles.load_bundle(folder).net, tokenizer, moved.TEXTS, longest=0)
