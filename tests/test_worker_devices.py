"""Which devices --device and --workers choose, and that each process has its own and enough lines."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.pools import GpuQuestion, ReportGpus
from trmt.devices import abilities
from trmt.errors import ConfigError
from trmt.scale import devices
from trmt.scale.parts import process_parts
from trmt.scale.pool import ProcessPool
from trmt.streaming import CPU_CHUNK, chunk_sizes, window_size


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sets how many GPUs torch reports."""

    def gpus(count: int) -> None:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
        monkeypatch.setenv("TRMT_ARCHITECTURE", "1")  # nothing can be run on them
        monkeypatch.setattr(abilities, "_known", {})

    return gpus


CORES = len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("count", "device", "workers", "expected"),
    [
        (0, "auto", None, ["cpu"]),
        (0, "auto", "3", ["cpu"] * 3),
        (0, "cpu", "auto", ["cpu"] * CORES),
        (2, "cpu", "3", ["cpu"] * 3),
        (0, "cpu,cpu", None, ["cpu", "cpu"]),
        (4, "auto", None, ["cuda:0"]),
        (4, "auto", "auto", ["cuda:0", "cuda:1", "cuda:2", "cuda:3"]),
        (4, "cuda", "3", ["cuda:0", "cuda:1", "cuda:2"]),
        (4, "cuda", "1", ["cuda:0"]),
        (4, "cuda:2", None, ["cuda:2"]),
        (4, "cuda:2", "1", ["cuda:2"]),
        (4, "cuda:2", "auto", ["cuda:2"]),
        (4, "cuda:3,cuda:1", None, ["cuda:3", "cuda:1"]),
        (4, "cuda,cuda:1", None, ["cuda:0", "cuda:1"]),
        (3, "all", None, ["cuda:0", "cuda:1", "cuda:2"]),
        (1, "all", None, ["cuda:0"]),
    ],
)
def test_each_process_gets_a_core_or_a_gpu(
    gpus: Callable[[int], None], count: int, device: str, workers: str | None, expected: list[str]
) -> None:
    gpus(count)
    assert list(devices.devices_for(device, workers)) == expected


@pytest.mark.parametrize(
    ("count", "device", "workers", "message"),
    [
        (0, "all", None, "means every GPU, and torch sees none"),
        (2, "cuda:0,cuda:2", None, "cuda:2 was asked for, but torch sees 2 GPUs"),
        (2, "cuda:1,cuda:1", None, "names cuda:1 twice"),
        (2, "cuda,cuda:0", None, "names cuda:0 twice"),
        (2, "cuda:0,cpu", None, "mixes types of devices"),
        (2, "cuda:0,auto", None, "is not a list of devices"),
        (2, "cuda:0,all", None, "is not a list of devices"),
        (2, "cuda:0,", None, "is not a list of devices"),
        (2, "cuda:0,gpu1", None, "there is no device 'gpu1'"),
        (2, "cuda:0,cuda:1", "2", "leave --workers out"),
        (2, "all", "auto", "leave --workers out"),
        (
            2,
            "auto",
            "3",
            "--workers 3 need a GPU each, and torch sees 2; ask for fewer, or add --device cpu",
        ),
        (2, "cuda:1", "2", "--workers 2 need a GPU each, and cuda:1 is one"),
        *((0, "cpu", wrong, "is not a number of processes") for wrong in ("0", "-1", "x", "1.5", "", "2000")),
    ],
)
def test_impossible_choices_are_one_sentence(
    gpus: Callable[[int], None], count: int, device: str, workers: str | None, message: str
) -> None:
    gpus(count)
    with pytest.raises(ConfigError) as caught:
        devices.devices_for(device, workers)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("visible", "device", "sees"),
    [
        (None, "cuda:1", "1"),
        (None, "cuda", "0"),
        ("3,5", "cuda:1", "5"),
        ("GPU-8932f937, MIG-GPU-b1", "cuda:1", "MIG-GPU-b1"),
        ("3,5", "cpu", "3,5"),
    ],
)
def test_a_process_sees_only_its_own_gpu(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, device: str, sees: str
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    devices.hide_other_gpus(device)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == sees


def test_processes_of_a_pool_see_one_gpu_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7,4,6")
    parts = [GpuQuestion(name, str(tmp_path)) for name in ("one", "two")]
    with ProcessPool(ReportGpus(), devices=("cuda:0", "cuda:2")) as pool:
        outcome = process_parts(parts, pool, title="asking")
    assert sorted(visible for _, visible in outcome.done) == ["6", "7"]
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "7,4,6", "the main process still sees all of them"


def test_a_gpu_gets_whole_batches_and_a_window_holds_several_chunks_for_each() -> None:
    assert chunk_sizes("cpu", 512) == chunk_sizes("cpu", 1) == CPU_CHUNK
    smallest, largest = chunk_sizes("cuda:1", 512)
    assert smallest == 512 and largest >= 4096
    assert window_size(["cuda:0", "cuda:1"], 512) >= 4 * 2 * largest
