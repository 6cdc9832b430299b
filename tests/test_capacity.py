from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from trmt.devices import memory

CPU = torch.device("cpu")


def test_this_machine_says_what_it_has() -> None:
    total, free, taken = memory.total(CPU), memory.free(CPU), memory.taken(CPU)
    if sys.platform == "linux":
        assert total and free and taken
        assert taken < total and free <= total
        assert taken > 2**24  # torch alone takes that


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lets a process forget its peak")
def test_a_peak_is_remembered_until_it_is_forgotten() -> None:
    memory.forget_peak(CPU)
    before = memory.peak(CPU)
    block = np.ones(2**26, dtype=np.uint8)
    assert before
    with_block = memory.peak(CPU)
    assert with_block and with_block - before > 0.9 * block.nbytes
    del block
    assert memory.peak(CPU) == pytest.approx(with_block, rel=0.05)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("memory.max", "memory.current", "memory.stat"), 700),
        (("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"), 700),
        (("memory.max", "memory.current", "gone"), 400),
    ],
)
def test_a_container_may_take_less_than_the_machine_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: tuple[str, str, str], expected: int
) -> None:
    texts = ("1000\n", "600\n", "anon 5\ninactive_file 300\n")
    for name, text in zip(names, texts, strict=True):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    assert memory.total(CPU) == 1000
    assert memory.free(CPU) == expected


def test_a_container_without_a_limit_is_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    whole = memory.total(CPU)
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.total(CPU) == whole


def test_where_nothing_is_known_nothing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "PROC", tmp_path)
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    assert memory.free(CPU) is None
    assert memory.taken(CPU) is None
