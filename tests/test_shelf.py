"""Packed weights in the cache: found again, shared, never trusted."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor
from trmt.native.shelf import Shelf

from trmt.native import products, shelf
from trmt.native.products import Precision
from trmt.nets import linear

pytestmark = pytest.mark.skipif(not products.best(), reason="no C compiler here")

WEIGHTS = [torch.randn(70, 33), torch.randn(40, 130), torch.randn(16, 64)]
X = [torch.randn(5, 33), torch.randn(5, 130), torch.randn(5, 64)]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(shelf, "WORTH", 0)
    monkeypatch.setattr(shelf.kernels, "cache", lambda: tmp_path)
    return tmp_path / "packed"


def made(key: str, precision: Precision, weights: list[Tensor] = WEIGHTS) -> tuple[list[Tensor], bool]:
    """What products give whose weights went over a shelf, and whether all of them lay there."""
    place = Shelf.of(key, precision)
    choose = linear.choose(precision, shelf=place)
    found = [choose(weight, None)(x) for weight, x in zip(weights, X, strict=False)]
    place.keep()
    return found, place._complete


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_what_was_packed_is_found_again(precision: Precision, home: Path) -> None:
    first, complete = made("a", precision)
    assert not complete and len(list(home.iterdir())) == 1
    again, complete = made("a", precision)
    assert complete and same(first, again)
    assert not made("b", precision)[1] and not made("a", "fp32" if precision == "int8" else "int8")[1]
    assert len(list(home.iterdir())) == 3


def test_a_damaged_file_is_noticed_and_written_again(home: Path) -> None:
    first, _ = made("a", "int8")
    (file,) = home.iterdir()
    whole = file.read_bytes()
    for broken in (whole[:100], b"", whole[:700] + b"?" + whole[701:], whole[:-1]):
        file.write_bytes(broken)
        again, complete = made("a", "int8")
        assert same(first, again) and not complete
        assert file.read_bytes() == whole


def test_other_weights_under_the_same_name_are_not_taken(home: Path) -> None:
    made("a", "int8")
    others = [torch.randn(70, 33), *WEIGHTS[1:]]
    found, complete = made("a", "int8", others)
    assert not complete and same(found, made("b", "int8", others)[0])


def test_those_that_were_not_used_for_longest_go(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made("a", "int8")
    (file,) = home.iterdir()
    monkeypatch.setattr(shelf, "LIMIT", int(2.5 * file.stat().st_size))
    os.utime(file, (1, 1))
    made("b", "int8")
    old = next(each for each in home.iterdir() if each != file)
    os.utime(old, (2, 2))
    assert made("a", "int8")[1], "it was used, and is now younger than the other"
    made("c", "int8")
    assert file.exists() and not old.exists() and len(list(home.iterdir())) == 2


def test_small_networks_are_not_kept(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shelf, "WORTH", 1 << 20)
    made("a", "int8")
    assert not home.exists()


def test_a_cache_that_cannot_be_written_is_done_without(home: Path) -> None:
    home.write_text("in the way")
    assert not made("a", "int8")[1]


def test_processes_share_the_pages(home: Path) -> None:
    made("a", "fp32")
    (file,) = home.iterdir()
    place = Shelf.of("a", "fp32")
    parts = place.take(WEIGHTS[0], lambda: pytest.fail("packed again"))
    address = parts[0].data_ptr()
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("this system does not say what is mapped")
    ranges = [line.split()[0].split("-") for line in maps.read_text().splitlines() if str(file) in line]
    assert any(int(low, 16) <= address < int(high, 16) for low, high in ranges)
