from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from trmt.devices import memory

CPU = torch.device("cpu")


def test_the_memory_of_this_machine_is_known() -> None:
    total, free, used = memory.total(CPU), memory.free(CPU), memory.used(CPU)
    if sys.platform == "linux":
        assert total and free and used
        assert used < total and free <= total
        assert used > 2**24  # torch alone uses that


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can reset the peak")
def test_the_peak_is_kept_until_it_is_reset() -> None:
    memory.reset_peak(CPU)
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
def test_a_container_may_have_less_memory_than_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: tuple[str, str, str], expected: int
) -> None:
    texts = ("1000\n", "600\n", "anon 5\ninactive_file 300\n")
    for name, text in zip(names, texts, strict=True):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    assert memory.total(CPU) == 1000
    assert memory.free(CPU) == expected


def test_a_container_without_a_limit_has_the_memory_of_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    whole = memory.total(CPU)
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.total(CPU) == whole


def test_unknown_memory_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "PROC", tmp_path)
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    assert memory.free(CPU) is None
    assert memory.used(CPU) is None
