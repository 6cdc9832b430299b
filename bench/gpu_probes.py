"""What a GPU can do, each ability proven by a tiny run: the first row of `gpu_suite.py`.

    python bench/gpu_probes.py [--device cuda]

The result is written after each probe, with the seconds that it took: a probe that hangs or kills the process
leaves those before it.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch

from budget import die_together
from provenance import RESULTS, record
from trmt.devices import hardware
from trmt.devices.abilities import ABILITIES, abilities
from trmt.devices.choice import choose_device


def main() -> None:
    parser = argparse.ArgumentParser(description="Prove what a GPU can do.")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    die_together()
    device = choose_device(given.device)
    found: dict[str, Any] = {}
    figures = {
        "device": device.type,
        "name": hardware.gpu_name(device),
        "build": hardware.build(),
        "nccl": hardware.has_nccl(),
        "abilities": found,
    }
    for name in ABILITIES:
        if device.type == "cpu" and name == "compile":
            continue  # it takes a minute, and is only used where it is asked for
        found[name] = proven(device, name)
        print(name, found[name], flush=True)
        record("gpu-probes", figures, command="python bench/gpu_probes.py", folder=given.out)


def proven(device: torch.device, name: str) -> dict[str, Any]:
    """Whether the device has an ability, why not, and the seconds that it took to find out."""
    began = time.perf_counter()
    why = abilities(device).lacks(name)
    return {"has": not why, "why": why, "seconds": round(time.perf_counter() - began, 2)}


if __name__ == "__main__":
    main()
