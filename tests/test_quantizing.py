"""Bundles in int8: a quarter of the size, the same translations as quantising when loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.fakes import small_network
from tests.variants import every_network
from trmt.acceleration import accelerated
from trmt.averaging import average_bundles
from trmt.bundles import bundles, quantised
from trmt.bundles.bundles import make_manifest, read_manifest, read_weights, save_bundle
from trmt.errors import BundleError, ConfigError
from trmt.insight.inspecting import inspect
from trmt.quantizing import quantize
from trmt.text.tokenizer import Tokenizer
from trmt.translating import TranslateOptions, Translator

TEXTS = ["one two three", "four", "", "three three two one", "five six seven eight nine"]


@pytest.fixture(params=every_network())
def bundle(request: pytest.FixtureRequest, toy_set: Path, tmp_path: Path) -> Path:
    """A bundle of random weights, large enough for its matrices to be most of it."""
    tokenizer = Tokenizer.load(toy_set / "tokenizer")
    net = small_network(
        request.param, source_vocabulary=60, target_vocabulary=60, d_model=64, **_wide(request.param)
    )
    manifest = make_manifest(
        net,
        request.param,
        tokenizer,
        longest={"source": 20, "target": 20},
        golden=tuple({"source": text, "translation": "?", "reference": "!"} for text in TEXTS[:2]),
        scores=({"metric": "bleu", "value": 99.0, "signature": "made up"},),
    )
    save_bundle(tmp_path / "fp32", manifest, net.state_dict(), tokenizer)
    return tmp_path / "fp32"


def _wide(architecture: str) -> dict[str, int]:
    return {"feed_forward": 128} if architecture.startswith("transformer") else {}


def translations(folder: Path, **options: object) -> list[tuple[str, float]]:
    translator = Translator.load(folder, options=TranslateOptions(device="cpu", **options))  # type: ignore[arg-type]
    found = translator.translate(TEXTS)
    return [(each.text, each.candidates[0].score if each.candidates else 0.0) for each in found]


def test_a_quantised_bundle_translates_as_one_quantised_while_loading(bundle: Path, tmp_path: Path) -> None:
    result = quantize(bundle, tmp_path / "int8")
    assert translations(tmp_path / "int8") == translations(bundle, precision="int8")
    assert translations(tmp_path / "int8") == translations(tmp_path / "int8", batch=1)
    assert translations(tmp_path / "int8") != translations(bundle)
    assert result.bytes_after < 0.45 * result.bytes_before
    manifest = read_manifest(tmp_path / "int8")
    assert manifest.precision == "int8" and manifest.scores == ()
    assert [entry["translation"] for entry in manifest.golden] == [
        text for text, _ in translations(tmp_path / "int8")[:2]
    ]


def test_kernels_and_plain_pytorch_translate_alike(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not accelerated("backend"):
        pytest.skip("no kernels here")
    native = translations(bundle, precision="int8")
    monkeypatch.setenv("TRMT_KERNELS", "0")
    assert translations(bundle, precision="int8") == native


def test_weights_are_read_as_they_were_rounded(bundle: Path, tmp_path: Path) -> None:
    quantize(bundle, tmp_path / "int8")
    net = bundles.load_bundle(bundle).net
    quantised.round_weights(net)
    found = read_weights(tmp_path / "int8", read_manifest(tmp_path / "int8"))
    assert all(torch.equal(tensor, found[name]) for name, tensor in net.state_dict().items())


def test_bundles_that_cannot_be_quantised_are_refused(bundle: Path, tmp_path: Path) -> None:
    quantize(bundle, tmp_path / "int8")
    with pytest.raises(BundleError, match="quantised already"):
        quantize(tmp_path / "int8", tmp_path / "again")
    with pytest.raises(BundleError, match="average the checkpoints it was made from"):
        average_bundles([tmp_path / "int8"], tmp_path / "mean")
    with pytest.raises(BundleError, match="would be lost"):
        quantize(bundle, bundle)
    (tmp_path / "notes").mkdir()
    with pytest.raises(BundleError, match="is not a bundle"):
        quantize(bundle, tmp_path / "notes")
    with pytest.raises(ConfigError, match="no precision"):
        TranslateOptions(precision="int4")  # type: ignore[arg-type]


def test_int8_bundles_have_a_format_that_older_versions_refuse(bundle: Path, tmp_path: Path) -> None:
    quantize(bundle, tmp_path / "int8")
    formats = [
        json.loads((folder / "manifest.json").read_bytes())["format"]
        for folder in (bundle, tmp_path / "int8")
    ]
    assert formats == [3, 4]


def test_broken_weights_are_not_quantised(bundle: Path, tmp_path: Path) -> None:
    net = bundles.load_bundle(bundle).net
    with torch.no_grad():
        next(parameter for parameter in net.parameters() if parameter.dim() == 2)[0, 0] = torch.nan
    manifest = bundles.replace(read_manifest(bundle), golden=())
    save_bundle(bundle, manifest, net.state_dict(), Tokenizer.load(bundle / "tokenizer"))
    with pytest.raises(BundleError, match="not finite"):
        quantize(bundle, tmp_path / "int8")
    assert not (tmp_path / "int8").exists()


def test_inspect_shows_the_precision_and_the_backend(bundle: Path, tmp_path: Path) -> None:
    quantize(bundle, tmp_path / "int8")
    before, after = inspect(bundle), inspect(tmp_path / "int8")
    assert (before["precision"], after["precision"]) == ("fp32", "int8")
    stored = bundles.load_bundle(bundle).net.state_dict().values()
    count = sum({tensor.data_ptr(): tensor.numel() for tensor in stored}.values())  # tied ones once
    assert before["parameters"] == after["parameters"] == count
    backend = accelerated("backend")
    assert before["backend"].startswith("native" if backend and backend() else "pure")
    assert before["scores"] and not after["scores"] and json.dumps(after)
