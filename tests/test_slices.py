from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from trmt.bundles import slices
from trmt.bundles.slices import SlicedTensors, TensorSlice, row_range


def tensors() -> dict[str, Tensor]:
    """Tensors as in a training state: a scalar, fewer rows than processes, other dtypes."""
    generator = torch.Generator().manual_seed(5)
    return {
        "matrix": torch.randn(11, 3, generator=generator),
        "vector": torch.randn(7, generator=generator),
        "two rows": torch.randn(2, 4, 2, generator=generator),
        "half": torch.randn(9, 2, generator=generator).bfloat16(),
        "count": torch.tensor(3.0),
        "integers": torch.arange(5),
    }


def write(folder: Path, count: int) -> SlicedTensors:
    """The slices that `count` processes write."""
    folder.mkdir()
    written = []
    for rank in range(count):
        own = {}
        for name, tensor in tensors().items():
            if name in ("count", "integers"):
                if rank == 0:
                    own[name] = TensorSlice(tensor, 0, tuple(tensor.shape))
                continue
            begin, end = row_range(len(tensor), rank, count)
            own[name] = TensorSlice(tensor[begin:end], begin, tuple(tensor.shape))
        written.append(slices.write_slices(folder, own, rank=rank, world_size=count))
    slices.write_index(folder, written)
    return SlicedTensors(folder)


def test_row_ranges_are_the_chunks_of_torch() -> None:
    for length in range(1, 20):
        for count in range(1, 8):
            expected = [len(chunk) for chunk in torch.arange(length).chunk(count)]
            found = [row_range(length, rank, count) for rank in range(count)]
            sizes = [end - begin for begin, end in found]
            assert sizes == expected + [0] * (count - len(expected))
            assert found[0][0] == 0 and found[-1][1] == length
            assert all(one[1] == two[0] for one, two in pairwise(found))


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_slices_can_be_read_on_any_number_of_processes(tmp_path: Path, count: int) -> None:
    read = write(tmp_path / "slices", count)
    assert set(read) == set(tensors())
    assert read.altered_file() is None
    for name, tensor in tensors().items():
        assert torch.equal(read[name], tensor), name
        assert read[name].dtype == tensor.dtype
        for other in (1, 2, 3, 4, 12) if tensor.dim() else ():
            for rank in range(other):
                begin, end = row_range(len(tensor), rank, other)
                assert torch.equal(read.rows(name, begin, end), tensor[begin:end]), (name, begin, end)


@pytest.mark.parametrize("count", [1, 3])
def test_merged_slices_are_an_ordinary_safetensors_file(tmp_path: Path, count: int) -> None:
    read = write(tmp_path / "slices", count)
    names = {name: f"new {name}" for name in ("vector", "half", "matrix", "count")}
    read.merge(tmp_path / "merged.safetensors", names)
    merged = load_file(tmp_path / "merged.safetensors")
    assert set(merged) == set(names.values())
    for name, new in names.items():
        assert torch.equal(merged[new], tensors()[name])
        assert merged[new].dtype == tensors()[name].dtype


def test_an_altered_or_missing_file_is_found(tmp_path: Path) -> None:
    folder = tmp_path / "slices"
    read = write(folder, 3)
    path = folder / "slices-00002-of-00003.safetensors"
    whole = path.read_bytes()
    generator = np.random.default_rng(2)
    for position in generator.integers(0, len(whole), 5):
        broken = bytearray(whole)
        broken[position] ^= 16
        path.write_bytes(broken)
        assert read.altered_file() == path
    path.write_bytes(whole[:-1])
    assert read.altered_file() == path
    path.unlink()
    assert read.altered_file() == path
    path.write_bytes(whole)
    assert read.altered_file() is None
