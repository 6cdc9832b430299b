"""`trmt env`: print the environment and what its devices can do, for bug reports."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def command() -> None:
    """Print versions, machine, devices and what each can do, for bug reports.

    What a GPU can do is proven by tiny runs on it, which take up to a minute. An environment variable
    switches each ability off (0) or takes it for granted (1).
    """
    import os
    import platform
    from contextlib import suppress
    from importlib.metadata import PackageNotFoundError, version

    import torch
    import typer

    from trmt import __version__

    typer.echo(f"trmt           {__version__}")
    typer.echo(f"python         {platform.python_version()} ({platform.python_implementation()})")
    typer.echo(f"system         {platform.platform()}")
    packages = ("torch", "sentencepiece", "sacrebleu", "datasets", "safetensors", "typer", "rich", "numpy")
    for name in packages:
        try:
            typer.echo(f"{name:<14} {version(name)}")
        except PackageNotFoundError:
            typer.echo(f"{name:<14} missing")
    # Exported models are checked with these.
    for name in ("ctranslate2", "transformers", "onnxruntime", "optimum-onnx"):
        with suppress(PackageNotFoundError):
            typer.echo(f"{name:<14} {version(name)}")
    capability = torch.backends.cpu.get_cpu_capability()
    typer.echo(f"cpu            {os.cpu_count()} cores, {torch.get_num_threads()} threads, {capability}")
    variables = ["TRMT_MODEL", "TRMT_KERNELS", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES"]
    variables += _print_devices()
    for variable in variables:
        if variable in os.environ:
            typer.echo(f"{variable}={os.environ[variable]}")


def _print_devices() -> list[str]:
    """Print what each device can do; the environment variables that change it."""
    import typer

    from trmt.devices import hardware
    from trmt.devices.abilities import ABILITIES, abilities, all_devices
    from trmt.errors import TrmtError

    typer.echo(f"torch is for   {hardware.build()}{'' if hardware.has_nccl() else ', without NCCL'}")
    if why := hardware.why_no_gpu():
        typer.echo(f"gpu            cannot be used: {why}")
    for device in all_devices():
        if device.type == "cpu":
            typer.echo("what each device can do, and the variable that switches it off (0) or forces it (1):")
        typer.echo(f"{device!s:<14} {_described(device)}")
        for name, ability in ABILITIES.items():
            if device.type == "cpu" and name == "compile":  # which takes a minute there
                typer.echo(f'  {name:<12} tried where training.compile = "on" ({ability.variable})')
                continue
            try:
                why = abilities(device).lacks(name)
            except TrmtError as error:  # which the other rows can still be printed after
                why = str(error)
            typer.echo(f"  {name:<12} {f'no: {why}' if why else 'yes'} ({ability.variable})")
            if name == "architecture" and why:
                break  # nothing else can be run
    return [ability.variable for ability in ABILITIES.values()]


def _described(device: torch.device) -> str:
    """The name and the memory of a device, or why it does not tell them."""
    from trmt.devices import hardware, memory
    from trmt.errors import first_line

    try:
        total = memory.total(device)
        return hardware.gpu_name(device) + (f", {total / 2**30:.0f} GiB" if total else "")
    except Exception as error:  # whatever a driver in trouble raises
        return f"cannot be asked ({first_line(error)})"
