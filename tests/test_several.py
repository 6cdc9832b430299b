"""Which devices are meant, and that each process has its own and enough to do."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.fleets import Asked, Seeing
from trmt.errors import ConfigError
from trmt.scale import devices
from trmt.scale.fleet import LocalFleet, work_through


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Lets torch see so many GPUs."""

    def gpus(count: int) -> None:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)

    return gpus


CORES = len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("count", "asked", "workers", "expected"),
    [
        (0, "auto", None, ["cpu"]),
        (0, "auto", "3", ["cpu"] * 3),
        (0, "cpu", "auto", ["cpu"] * CORES),
        (2, "cpu", "3", ["cpu"] * 3),
        (0, "cpu,cpu", None, ["cpu", "cpu"]),
        (4, "auto", None, ["cuda"]),
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
def test_each_process_has_a_core_or_a_gpu(
    gpus: Callable[[int], None], count: int, asked: str, workers: str | None, expected: list[str]
) -> None:
    gpus(count)
    assert list(devices.devices_for(asked, workers)) == expected


@pytest.mark.parametrize(
    ("count", "asked", "workers", "said"),
    [
        (0, "all", None, "means every GPU, and torch sees none"),
        (2, "cuda:0,cuda:2", None, "cuda:2 was asked for, but torch sees 2 GPUs"),
        (2, "cuda:1,cuda:1", None, "names cuda:1 twice"),
        (2, "cuda,cuda:0", None, "names cuda:0 twice"),
        (2, "cuda:0,cpu", None, "devices of two kinds"),
        (2, "cuda:0,auto", None, "is no list of devices"),
        (2, "cuda:0,all", None, "is no list of devices"),
        (2, "cuda:0,", None, "is no list of devices"),
        (2, "cuda:0,gpu1", None, "there is no device 'gpu1'"),
        (2, "cuda:0,cuda:1", "2", "--workers is not needed; leave it out"),
        (2, "all", "auto", "--workers is not needed; leave it out"),
        (
            2,
            "auto",
            "3",
            "--workers 3 take a device each, and torch sees 2; ask for fewer, or add --device cpu",
        ),
        (2, "cuda:1", "2", "--workers 2 take a device each, and cuda:1 is one"),
        *((0, "cpu", wrong, "is no number of processes") for wrong in ("0", "-1", "x", "1.5", "", "2000")),
    ],
)
def test_what_cannot_be_is_one_sentence(
    gpus: Callable[[int], None], count: int, asked: str, workers: str | None, said: str
) -> None:
    gpus(count)
    with pytest.raises(ConfigError) as caught:
        devices.devices_for(asked, workers)
    assert said in str(caught.value) and "\n" not in str(caught.value)


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
def test_a_process_sees_its_own_gpu_only(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, device: str, sees: str
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert devices.keep_to(device) == device.partition(":")[0]
    assert os.environ["CUDA_VISIBLE_DEVICES"] == sees


def test_processes_of_a_fleet_have_a_gpu_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7,4,6")
    parts = [Asked(name, str(tmp_path)) for name in ("one", "two")]
    with LocalFleet(Seeing(), devices=("cuda:0", "cuda:2")) as fleet:
        outcome = work_through(parts, fleet, title="looking")
    assert sorted(said for _, said in outcome.done) == ["6", "7"]
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "7,4,6", "only the processes are kept to a GPU"


def test_a_gpu_gets_batches_and_all_together_several_windows_of_them() -> None:
    assert devices.lines_for("cpu", 512) == devices.lines_for("cpu", 1) == devices.ON_CPU
    least, most = devices.lines_for("cuda:1", 512)
    assert least == 512 and most >= 4096
    assert devices.window_for(["cuda:0", "cuda:1"], 512) >= 4 * 2 * most
