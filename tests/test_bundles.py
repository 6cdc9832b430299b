from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from tests.edited import edit
from tests.fakes import small_network
from trmt.bundles import bundles
from trmt.bundles.bundles import load_bundle, make_manifest, read_manifest, read_weights, save_bundle
from trmt.errors import BundleError, ConfigError
from trmt.nets.base import Seq2Seq
from trmt.nets.ragged import Ragged, Source
from trmt.registry import ARCHITECTURES, installed
from trmt.text.tokenizer import Tokenizer


@pytest.fixture
def tokenizer(toy_set: Path) -> Tokenizer:
    return Tokenizer.load(toy_set / "tokenizer")


def write(folder: Path, tokenizer: Tokenizer, architecture: str = "transformer", **options: Any) -> Seq2Seq:
    net = small_network(architecture, source_vocabulary=60, target_vocabulary=60, **options)
    manifest = make_manifest(net, architecture, tokenizer, longest={"source": 9, "target": 9})
    save_bundle(folder, manifest, net.state_dict(), tokenizer)
    return net


def logits(net: Seq2Seq) -> torch.Tensor:
    with torch.no_grad():
        return net.readout(net(Source.of([[5, 6, 3], [7, 3]]), Ragged.of([[2, 8], [2, 9, 4]])).hidden)


def assert_same(loaded: Seq2Seq, net: Seq2Seq) -> None:
    """The same weights to the bit, and the same logits but for rounding.

    Loaded weights are at other addresses, and some processors round by where in memory a row begins.
    """
    ours, theirs = loaded.state_dict(), net.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    torch.testing.assert_close(logits(loaded), logits(net))


@pytest.mark.parametrize("architecture", installed(ARCHITECTURES))
def test_a_bundle_is_loaded_as_it_was_saved_and_can_be_copied(
    architecture: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    net = write(tmp_path / "bundle", tokenizer, architecture)
    shutil.copytree(tmp_path / "bundle", tmp_path / "elsewhere")
    shutil.rmtree(tmp_path / "bundle")
    loaded = load_bundle(tmp_path / "elsewhere")
    assert not loaded.net.training
    assert_same(loaded.net, net)
    assert loaded.tokenizer.fingerprint == tokenizer.fingerprint
    assert loaded.manifest.languages == ("x", "y")
    assert loaded.manifest.special == {"pad": 0, "unk": 1, "bos": 2, "eos": 3}


@pytest.mark.parametrize("tied", ["all", "target", "none"])
def test_tied_weights_are_stored_once(tokenizer: Tokenizer, tmp_path: Path, tied: str) -> None:
    net = write(tmp_path / "bundle", tokenizer, tied=tied)
    with safe_open(tmp_path / "bundle/weights.safetensors", "pt") as file:
        stored = {name: file.get_tensor(name).numel() for name in file.keys()}  # noqa: SIM118
    assert set(stored) == {name for name, _ in net.named_parameters()}
    assert sum(stored.values()) == sum(parameter.numel() for parameter in net.parameters())
    loaded = load_bundle(tmp_path / "bundle").net
    assert sum(p.numel() for p in loaded.parameters()) == sum(p.numel() for p in net.parameters())
    assert_same(loaded, net)


def test_nothing_is_pickled(tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "bundle", tokenizer)
    files = [path for path in (tmp_path / "bundle").rglob("*") if path.is_file()]
    assert len(files) == 4
    for path in files:
        head = path.read_bytes()[:4]
        # Pickles of protocol 2 and up begin with 0x80 and the protocol, torch.save writes a zip archive.
        assert not (head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05")
        assert head[:2] != b"PK"

    def forbidden(*_: Any, **__: Any) -> Any:
        raise AssertionError("something was unpickled")

    for module, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(module, name, forbidden)
    load_bundle(tmp_path / "bundle")


def test_a_bundle_cannot_run_code(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "bundle", tokenizer)
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')\n")
    monkeypatch.syspath_prepend(tmp_path)

    def forbidden(*_: Any, **__: Any) -> Any:
        raise AssertionError("code was run")

    monkeypatch.setattr(os, "system", forbidden)
    for name in ("os:system", "evil:Network", "builtins:eval", "trmt.nets.transformer:Transformer"):
        bundles.rewrite_manifest(tmp_path / "bundle", architecture=name)
        with pytest.raises(BundleError, match="--trust-code"):
            load_bundle(tmp_path / "bundle")
    assert load_bundle(tmp_path / "bundle", trust_code=True)  # the last one is our own
    bundles.rewrite_manifest(tmp_path / "bundle", architecture="transfromer")
    with pytest.raises(BundleError, match="did you mean 'transformer'"):
        load_bundle(tmp_path / "bundle")


def change(folder: Path, **changes: Any) -> None:
    edit(folder / "manifest.json", **changes)


def flip(path: Path, index: int) -> None:
    content = bytearray(path.read_bytes())
    content[index] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


BROKEN = {
    "a flipped byte in the weights": (lambda f: flip(f / "weights.safetensors", -7), "checksum differs"),
    "a flipped byte in their header": (lambda f: flip(f / "weights.safetensors", 20), "checksum differs"),
    "truncated weights": (lambda f: cut(f / "weights.safetensors"), "checksum differs"),
    "no weights": (lambda f: (f / "weights.safetensors").unlink(), "cannot read"),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "is not a bundle"),
    "no tokenizer": (lambda f: shutil.rmtree(f / "tokenizer"), "tokenizer"),
    "another tokenizer": (lambda f: change(f, tokenizer="00"), "is not the tokenizer"),
    "a damaged tokenizer": (lambda f: flip(f / "tokenizer/joint.model", 50), "not as it was written"),
    "half a manifest": (lambda f: cut(f / "manifest.json"), "is not valid JSON"),
    "a manifest that is a list": (lambda f: (f / "manifest.json").write_text("[]"), "is not a trmt manifest"),
    "a manifest in no encoding": (lambda f: (f / "manifest.json").write_bytes(b"\xff"), "not valid JSON"),
    "a newer format": (lambda f: change(f, format=99), "newer trmt"),
    "a manifest without its network": (lambda f: change(f, network=None), "needs a value for 'network'"),
    "a manifest with one language": (lambda f: change(f, languages=["x"]), "expected 2 values"),
    "an unknown option": (lambda f: change(f, network={"depth": 3}), "unknown key 'depth'"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_bundle_is_an_error_of_one_sentence(tokenizer: Tokenizer, tmp_path: Path, name: str) -> None:
    breaking, expected = BROKEN[name]
    write(tmp_path / "bundle", tokenizer)
    breaking(tmp_path / "bundle")
    with pytest.raises(BundleError, match=expected) as caught:
        load_bundle(tmp_path / "bundle")
    message = str(caught.value)
    assert "\n" not in message
    assert "bundle" in message, "the message says where"
    assert "--set" not in message, "advice about recipes would not help here"


def test_weights_that_do_not_fit_are_named(tokenizer: Tokenizer, tmp_path: Path) -> None:
    write(tmp_path / "bundle", tokenizer)
    weights = read_weights(tmp_path / "bundle", read_manifest(tmp_path / "bundle"))
    wider = small_network("transformer", source_vocabulary=60, target_vocabulary=60, d_model=32)
    with pytest.raises(BundleError, match="of shape"):
        bundles.load_weights(wider, weights, where="here")
    deeper = small_network("transformer", source_vocabulary=60, target_vocabulary=60, encoder_layers=3)
    with pytest.raises(BundleError, match=r"has no weights 'encoder\.layers\.2"):
        bundles.load_weights(deeper, weights, where="here")
    lower = small_network("transformer", source_vocabulary=60, target_vocabulary=60, encoder_layers=1)
    with pytest.raises(BundleError, match="which the network does not have"):
        bundles.load_weights(lower, weights, where="here")


def test_unknown_fields_of_a_manifest_are_ignored(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Later versions may add fields without changing the format."""
    write(tmp_path / "bundle", tokenizer)
    change(tmp_path / "bundle", mood="fine")
    assert load_bundle(tmp_path / "bundle").manifest.architecture == "transformer"


def test_the_manifest_can_be_changed(tokenizer: Tokenizer, tmp_path: Path) -> None:
    write(tmp_path / "bundle", tokenizer)
    before = read_manifest(tmp_path / "bundle")
    scores = ({"metric": "chrf", "value": 12.5},)
    bundles.rewrite_manifest(tmp_path / "bundle", scores=scores)
    after = read_manifest(tmp_path / "bundle")
    assert after.scores == scores
    assert after.weights == before.weights
    assert load_bundle(tmp_path / "bundle")


@pytest.mark.parametrize("max_positions", [10**15, 10**30])
@pytest.mark.parametrize("architecture", ["transformer", "conv"])
def test_sizes_that_no_machine_could_hold_are_an_error_of_one_sentence(
    architecture: str, max_positions: int
) -> None:
    options = {"source_vocabulary": 9, "target_vocabulary": 9, "max_positions": max_positions}
    with pytest.raises(ConfigError, match=r"choose (a smaller number|smaller ones)") as caught:
        bundles.build_network(architecture, options)
    assert "\n" not in str(caught.value)
