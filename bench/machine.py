"""What the machine itself can do: matrix products, copies, and how fast small work can be handed to it.

python bench/machine.py [--device cuda] [--size 8192]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from budget import die_together
from provenance import RESULTS, record
from trmt.devices.choice import choose_device

REPEATS = 10


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure products, copies and launches.")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--size", type=int, default=8192, help="of the square matrices")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    die_together()
    figures = measure(choose_device(given.device), given.size)
    print(
        record("machine", figures, command=f"python bench/machine.py --size {given.size}", folder=given.out)
    )


def measure(device: torch.device, size: int) -> dict[str, float | str]:
    figures: dict[str, float | str] = {"device": device.type}
    for name, kind in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        left, right = (torch.randn(size, size, device=device, dtype=kind) for _ in range(2))
        seconds = median_seconds(lambda a=left, b=right: a @ b, device)
        figures[f"{name}_tflops"] = round(2 * size**3 / seconds / 1e12, 3)
    room = torch.empty(size * size * 8, device=device)
    other = torch.empty_like(room)
    # Read once, written once.
    copied = 2 * room.numel() * room.element_size()
    figures["copy_gb_per_second"] = round(copied / median_seconds(lambda: other.copy_(room), device) / 1e9, 1)
    small = torch.zeros(1, device=device)
    launches = 1000

    def launch() -> None:
        for _ in range(launches):
            small.add_(1)

    figures["launch_microseconds"] = round(median_seconds(launch, device) / launches * 1e6, 2)
    return figures


def median_seconds(work: Callable[[], object], device: torch.device) -> float:
    """The clock's median over warm repeats."""
    taken = []
    for repeat in range(REPEATS + 3):
        synchronise(device)
        began = time.perf_counter()
        work()
        synchronise(device)
        if repeat >= 3:
            taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
