"""Packed weights in the user's cache: found again, shared, and never trusted."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.fakes import small_network
from trmt.decoding.engine import frozen
from trmt.native import build, packed_weights, products
from trmt.native.products import PackedProducts
from trmt.nets.base import Precision

pytestmark = pytest.mark.skipif(not products.best_processor(), reason="no C compiler here")

WEIGHTS = [torch.randn(70, 33), torch.randn(40, 130), torch.randn(16, 64)]
X = [torch.randn(5, 33), torch.randn(5, 130), torch.randn(5, 64)]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(packed_weights, "WORTH", 0)
    monkeypatch.setattr(build, "cache_folder", lambda: tmp_path)
    return tmp_path / "packed"


def made(checksum: str, precision: Precision, weights: list[Tensor] = WEIGHTS) -> tuple[list[Tensor], bool]:
    """The products of weights that were cached under a checksum, and whether all of them were found there."""
    packed = PackedProducts(precision, checksum=checksum)
    found = [packed(weight, None)(x) for weight, x in zip(weights, X, strict=False)]
    packed.save()
    assert packed.cache
    return found, packed.cache._complete


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_packed_weights_are_found_again(precision: Precision, home: Path) -> None:
    first, complete = made("a", precision)
    assert not complete and len(list(home.iterdir())) == 1
    again, complete = made("a", precision)
    assert complete and same(first, again)
    assert not made("b", precision)[1] and not made("a", "fp32" if precision == "int8" else "int8")[1]
    assert len(list(home.iterdir())) == 3


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_network_finds_all_its_weights(
    precision: Precision, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = small_network("transformer")
    frozen(net, precision, "some checksum")
    (file,) = home.iterdir()
    before = file.stat().st_ino
    monkeypatch.setattr(products, "_pack_int8", lambda *_: pytest.fail("packed again"))
    monkeypatch.setattr(products, "_pack_fp32", lambda *_: pytest.fail("packed again"))
    frozen(net, precision, "some checksum")
    assert file.stat().st_ino == before


def test_a_damaged_file_is_noticed_and_written_again(home: Path) -> None:
    first, _ = made("a", "int8")
    (file,) = home.iterdir()
    whole = file.read_bytes()
    for broken in (whole[:100], b"", whole[:700] + b"?" + whole[701:], whole[:-1]):
        file.write_bytes(broken)
        again, complete = made("a", "int8")
        assert same(first, again) and not complete
        assert file.read_bytes() == whole


def test_other_weights_under_the_same_checksum_are_not_taken(home: Path) -> None:
    made("a", "int8")
    others = [torch.randn(70, 33), *WEIGHTS[1:]]
    found, complete = made("a", "int8", others)
    assert not complete and same(found, made("b", "int8", others)[0])


def test_files_that_were_not_used_for_longest_go(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made("a", "int8")
    (file,) = home.iterdir()
    monkeypatch.setattr(packed_weights, "LIMIT", int(2.5 * file.stat().st_size))
    os.utime(file, (1, 1))
    made("b", "int8")
    old = next(each for each in home.iterdir() if each != file)
    os.utime(old, (2, 2))
    assert made("a", "int8")[1], "it was used, and is now younger than the other"
    made("c", "int8")
    assert file.exists() and not old.exists() and len(list(home.iterdir())) == 2


def test_small_networks_are_not_kept(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_weights, "WORTH", 1 << 20)
    made("a", "int8")
    assert not home.exists()


def test_without_a_checksum_nothing_is_kept(home: Path) -> None:
    frozen(small_network("transformer"), "int8")
    assert not home.exists()


def test_a_cache_that_cannot_be_written_is_left_out(home: Path) -> None:
    home.write_text("in the way")
    assert not made("a", "int8")[1]


def test_processes_share_the_pages(home: Path) -> None:
    made("a", "fp32")
    (file,) = home.iterdir()
    product = PackedProducts("fp32", checksum="a")(WEIGHTS[0], None)
    parts = product.tensors
    address = parts[0].data_ptr()
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("this system does not say what is mapped")
    ranges = [line.split()[0].split("-") for line in maps.read_text().splitlines() if str(file) in line]
    assert any(int(low, 16) <= address < int(high, 16) for low, high in ranges)


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="modes do not say who may write")
def test_weights_that_others_may_write_to_are_packed_again(home: Path) -> None:
    made("a", "fp32")
    (file,) = home.iterdir()
    assert not file.stat().st_mode & 0o077
    assert made("a", "fp32")[1]
    file.chmod(0o620)
    assert not made("a", "fp32")[1]
    assert made("a", "fp32")[1] and not file.stat().st_mode & 0o022
    home.chmod(0o777)
    before = file.stat().st_mtime_ns
    assert not made("a", "fp32")[1] and file.stat().st_mtime_ns == before
