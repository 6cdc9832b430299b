"""What a device is able to do: each ability is proven by a tiny run on the device when it is first asked for.

Versions and data sheets say too little: drivers, compilers and builds of PyTorch differ from machine to
machine. So everything that has a choice asks here. What is not proven is not used, which is said in one line;
what fails later, in use, is not used again in this process, which is said in one warning. An environment
variable switches each ability off (0) or takes it for granted (1). `trmt env` prints all of them.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch

from trmt import console
from trmt.devices import hardware, probes
from trmt.devices.memory import is_out_of_memory
from trmt.devices.probes import Unsupported
from trmt.errors import ConfigError, first_line


@dataclass(frozen=True)
class Ability:
    """Something that a device may be able to do."""

    title: str  # what messages call it
    variable: str  # the environment variable that switches it off (0) or takes it for granted (1)
    without: str  # what is done instead
    probe: Callable[[torch.device], None]  # a tiny run; it raises Unsupported, or whatever fails


ABILITIES: dict[str, Ability] = {
    "architecture": Ability(
        "computing", "TRMT_ARCHITECTURE", "another device is used", probes.probe_architecture
    ),
    "bf16": Ability("bf16", "TRMT_BF16", "fp16 or fp32 is used", probes.probe_bf16),
    "readout": Ability(
        "a product of 16-bit matrices in fp32",
        "TRMT_READOUT",
        "the readout uses a copy of its matrix in fp32",
        probes.probe_readout,
    ),
    "varlen": Ability(
        "attention without padding",
        "TRMT_VARLEN",
        "attention is computed with padding",
        probes.probe_varlen,
    ),
    "compile": Ability(
        "torch.compile", "TRMT_COMPILE", "PyTorch computes without it, slower", probes.probe_compile
    ),
    "triton": Ability(
        "trmt's Triton kernels", "TRMT_TRITON", "PyTorch computes the same, slower", probes.probe_triton
    ),
    "graphs": Ability(
        "CUDA graphs", "TRMT_GRAPHS", "decoding steps run one by one, slower", probes.probe_graphs
    ),
}

NOT_NOW = "its memory is full now"

_lock = threading.RLock()
_known: dict[torch.device, Abilities] = {}


class Abilities:
    """The abilities of one device, each proven when it is first asked for."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._lacks: dict[str, str] = {}  # why an ability is missing; empty if it is there
        self._failed: set[str] = set()  # those whose probe failed where it should have passed
        self._told: dict[str, str] = {}  # what a line has said of those that are missing

    def has(self, name: str) -> bool:
        """Whether the device has an ability."""
        return not self.lacks(name)

    def lacks(self, name: str) -> str:
        """Why the device does not have an ability; empty if it has.

        A lack of memory says nothing about an ability: it is asked for again the next time. A device on which
        nothing can be computed for lack of memory is an error.
        """
        if name in self._lacks:
            return self._lacks[name]
        with _lock:
            try:
                if name not in self._lacks:
                    self._lacks[name] = self._prove(name)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                if name == "architecture":
                    raise ConfigError(
                        f"{self.device} has no memory left for this process, which other programs use; wait "
                        "until they have ended, or choose another --device"
                    ) from error
                return NOT_NOW
            return self._lacks[name]

    def use(self, name: str) -> bool:
        """Whether the device has an ability that is to be used; if not, one line says so, once."""
        why = self.lacks(name)
        if why and self._told.get(name) != why:
            self._told[name] = why
            ability = ABILITIES[name]
            message = f"{ability.title} cannot be used on {self.device}: {why}; {ability.without}"
            (console.warn if name in self._failed else console.say)(message)
        return not why

    def lose(self, name: str, error: BaseException | str, *, warn: bool = True) -> None:
        """Never use an ability again: it failed in use, of which one warning says so, or on another rank."""
        with _lock:
            if not self._lacks.get(name):
                self._lacks[name] = error if isinstance(error, str) else first_line(error)
                self._failed |= {name} if warn else set()
        if warn:
            self.use(name)

    def _prove(self, name: str) -> str:
        ability = ABILITIES[name]
        override = os.environ.get(ability.variable, "")
        if override not in ("", "0", "1"):
            raise ConfigError(
                f"{ability.variable} = {override!r} is not a choice; set it to 0 (never used) or 1 (used "
                "without a test), or leave it out"
            )
        if override:
            why = f"{ability.variable}=0" if override == "0" else ""
            self._told[name] = why  # who switches it off knows
            return why
        try:
            with probes.undisturbed(self.device), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                ability.probe(self.device)
        except Unsupported as error:
            return str(error)
        except Exception as error:  # whatever compilers, drivers and PyTorch raise
            if is_out_of_memory(error):
                raise
            self._failed.add(name)
            return first_line(error)
        return ""


def abilities(device: torch.device) -> Abilities:
    """The abilities of a device, the same object at each call of this process."""
    known = _known.get(device)  # attention asks here in each layer
    if known is None:
        device = hardware.numbered(device)
        with _lock:
            known = _known.setdefault(device, Abilities(device))
    return known


def all_devices() -> list[torch.device]:
    """The CPU and all GPUs that PyTorch can use."""
    gpus = [torch.device("cuda", number) for number in range(hardware.gpu_count())]
    return [torch.device("cpu"), *gpus, *([torch.device("mps")] if hardware.has_mps() else [])]
