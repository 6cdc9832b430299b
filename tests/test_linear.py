"""Products whose rows do not depend on their neighbours, with one thread and with more."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from trmt.nets.linear import PlainProducts

# Outputs by inputs, as networks have them: projections, feed-forward layers, gates, vocabularies.
SHAPES = [
    (128, 128), (384, 128), (256, 1024), (1024, 256), (512, 512), (1536, 512), (2048, 512), (512, 2048),
    (512, 1024), (1024, 1536), (512, 1280), (256, 896), (128, 384), (200, 64), (23, 16), (1000, 128),
]  # fmt: skip
VOCABULARIES = [(8000, 256), (32000, 128)]
EDGES = [1, 15, 17, 64, 100, 129, 193, 300]
PLAIN = PlainProducts()


def unequal_rows(counts: list[int], shapes: list[tuple[int, int]]) -> list[str]:
    """Where rows of a product depend on their neighbours, as sentences."""
    found = []
    for outer, inner in shapes:
        generator = torch.Generator().manual_seed(outer + inner)
        weight, bias = torch.randn(outer, inner, generator=generator), torch.randn(outer, generator=generator)
        product = PLAIN(weight, bias)
        x = torch.randn(340, inner, generator=generator)
        whole = product(x)
        found += [
            f"{outer} x {inner} at {rows} rows from {first}"
            for rows in counts
            for first in (0, 40 * (rows % 2))
            if not torch.equal(product(x[first : first + rows]), whole[first : first + rows])
        ]
    return found


def digest() -> str:
    """A checksum of all products, to compare numbers of threads."""
    made = hashlib.sha256()
    for outer, inner in SHAPES:
        generator = torch.Generator().manual_seed(outer)
        product = PLAIN(torch.randn(outer, inner, generator=generator), None)
        made.update(product(torch.randn(47, inner, generator=generator)).numpy().tobytes())
    return made.hexdigest()


def with_threads(threads: int, statement: str) -> str:
    """What `statement` prints in a fresh process with this many threads."""
    code = (
        f"import torch; torch.set_num_threads({threads}); from tests.test_linear import *\nprint({statement})"
    )
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "KMP_BLOCKTIME": "0",
        "GOMP_SPINCOUNT": "0",
        "MKL_DYNAMIC": "FALSE",
    }
    command = [sys.executable, "-c", code]
    return subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout.strip()


@pytest.fixture(scope="module")
def reports() -> list[str]:
    """The rows that differ and the checksum, with one thread and with two."""
    statement = "unequal_rows(EDGES, SHAPES) + unequal_rows([77], VOCABULARIES), digest()"
    return [with_threads(threads, statement) for threads in (1, 2)]


def test_a_row_has_the_same_bits_whatever_its_neighbours(reports: list[str]) -> None:
    assert [report.split(" ")[0] for report in reports] == ["[]", "[]"], reports


def test_the_thread_count_changes_no_bit(reports: list[str]) -> None:
    assert reports[0] == reports[1]


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_row_has_the_same_bits_at_every_row_count(threads: int) -> None:
    assert with_threads(threads, "unequal_rows(list(range(1, 301)), SHAPES)") == "[]"


@pytest.mark.parametrize(("outer", "inner"), SHAPES)
@pytest.mark.parametrize("biased", [True, False])
def test_it_is_the_product(outer: int, inner: int, biased: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    weight, x = torch.randn(outer, inner, generator=generator), torch.randn(3, 7, inner, generator=generator)
    bias = torch.randn(outer, generator=generator) if biased else None
    expected = F.linear(x.double(), weight.double(), None if bias is None else bias.double()).float()
    product = PLAIN(weight, bias)
    torch.testing.assert_close(product(x), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(product(x[0, :1]), expected[0, :1], atol=1e-4, rtol=1e-4)
    assert product(x[:0]).shape == (0, 7, outer)


def test_a_product_leaves_its_input_and_weights_alone() -> None:
    weight, bias, x = torch.randn(64, 1024), torch.randn(64), torch.randn(20, 1024)
    before = [tensor.clone() for tensor in (weight, bias, x)]
    product = PLAIN(weight, bias)
    assert torch.equal(product(x), product(x))
    assert all(torch.equal(one, other) for one, other in zip(before, (weight, bias, x), strict=True))
