from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import moved, toy
from trmt.averaging import AverageOptions, average
from trmt.bundles import bundles
from trmt.cli import main
from trmt.errors import BundleError
from trmt.quantizing import quantize
from trmt.text.tokenizer import Tokenizer
from trmt.training.run import train
from trmt.translating import TranslateOptions, Translator
from trmt.validating import validate
from trmt.verifying import VerifyOptions, record, verify


@pytest.fixture
def bundle(toy_set: Path, tmp_path: Path) -> Path:
    varied = {"norm_position": "pre", "norm": "rms", "activation": "swiglu", "positions": "rotary"}
    folder = moved.bundle(tmp_path / "bundle", Tokenizer.load(toy_set / "tokenizer"), **varied)
    record(folder, [{"source": text} for text in moved.TEXTS])
    return folder


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["trmt", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    return int(caught.value.code or 0)


def test_an_unchanged_bundle_is_verified(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = verify(VerifyOptions(model=bundle))
    assert (found.sentences, found.differences, found.problem()) == (len(moved.TEXTS), (), None)
    capsys.readouterr()
    assert command(monkeypatch, "verify", str(bundle)) == 0
    said = capsys.readouterr()
    assert said.err == ""
    assert f"files intact, {len(moved.TEXTS)} golden sentences translated as before" in said.out


def test_golden_sentences_have_the_translations_of_the_bundle(bundle: Path) -> None:
    golden = bundles.read_manifest(bundle).golden
    greedy = Translator.load(bundle, options=TranslateOptions(search="greedy"))
    found = greedy.translate(moved.TEXTS)
    assert [each["translation"] for each in golden] == [each.text for each in found]
    assert len({each["translation"] for each in golden}) > 1


def test_each_golden_sentence_is_translated_with_its_beam_size(bundle: Path) -> None:
    beam = Translator.load(bundle, options=TranslateOptions(beam=3)).translate(moved.TEXTS)
    golden = [
        {"source": text, "translation": each.text, "beam": 3}
        for text, each in zip(moved.TEXTS, beam, strict=True)
    ]
    mixed = [*golden, *bundles.read_manifest(bundle).golden]
    assert any(one["translation"] != two["translation"] for one, two in zip(mixed, mixed[8:], strict=False))
    bundles.rewrite_manifest(bundle, golden=tuple(mixed))
    assert verify(VerifyOptions(model=bundle)).differences == ()


def changed_weights(folder: Path, change: Any) -> None:
    bundle = bundles.load_bundle(folder)
    weights = {name: tensor.clone() for name, tensor in bundle.net.state_dict().items()}
    change(weights)
    bundles.save_bundle(folder, bundle.manifest, weights, bundle.tokenizer)


def test_changed_translations_are_reported(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    changed_weights(bundle, lambda weights: weights["cross_kv.weight"].mul_(-1))
    versions = {"torch": "1.0", "trmt": bundles.read_manifest(bundle).versions["trmt"]}
    bundles.rewrite_manifest(bundle, versions=versions)
    found = verify(VerifyOptions(model=bundle))
    assert found.differences
    assert found.versions == (f"torch 1.0 -> {torch.__version__}",)
    capsys.readouterr()
    assert command(monkeypatch, "verify", str(bundle)) == 1
    said = capsys.readouterr().err
    assert said.count(" and is now ") == len(found.differences)
    assert f"{len(found.differences)} of {len(moved.TEXTS)} golden sentences" in said
    assert "torch 1.0" in said


def test_damaged_weights_are_an_error(bundle: Path) -> None:
    def broken(weights: dict[str, torch.Tensor]) -> None:
        weights["cross_kv.bias"][3] = float("nan")

    changed_weights(bundle, broken)
    with pytest.raises(BundleError, match=r"'cross_kv\.bias' .* are not finite"):
        verify(VerifyOptions(model=bundle))
    path = bundle / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(BundleError, match="checksum differs"):
        verify(VerifyOptions(model=bundle))


def test_a_bundle_without_golden_sentences_is_warned_of(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bundles.rewrite_manifest(bundle, golden=())
    capsys.readouterr()
    assert command(monkeypatch, "verify", str(bundle)) == 0
    assert "has no golden sentences; only its files were checked" in capsys.readouterr().err


def test_runs_and_their_averages_can_be_verified(toy_set: Path, tmp_path: Path) -> None:
    changes = {"validation": {"metric": "chrf", "sentences": 4, "beam": 2}}
    run = train(toy.options(tmp_path / "run", toy_set, toy.recipe(tmp_path, changes)), validate)
    assert verify(VerifyOptions(model=run)).sentences == 3
    average(AverageOptions(paths=(run,)))
    golden = json.loads((run / "average" / "manifest.json").read_bytes())["golden"]
    assert [each["source"] for each in golden] == [
        each["source"] for each in bundles.read_manifest(run / "step-00000006").golden
    ]
    assert all(each["reference"] and each["beam"] == 1 for each in golden)
    assert verify(VerifyOptions(model=run)).differences == ()


def test_a_quantised_bundle_is_verified(bundle: Path) -> None:
    out = bundle.parent / "int8"
    quantize(bundle, out)
    golden = bundles.read_manifest(out).golden
    assert all(each["beam"] == 4 for each in golden)
    assert verify(VerifyOptions(model=out)).differences == ()
    greedy = tuple({**each, "beam": 1} for each in golden)
    bundles.rewrite_manifest(out, golden=greedy)
    assert verify(VerifyOptions(model=out)).differences, "the beam makes no difference here"
