"""`trmt env`: print the environment, for bug reports."""

from __future__ import annotations


def command() -> None:
    """Print versions, machine and devices, for bug reports."""
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
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        typer.echo(f"gpu {index}          {card.name}, {card.total_memory / 2**30:.0f} GiB")
    if torch.backends.mps.is_available():
        typer.echo("gpu            Apple MPS")
    for variable in ("TRMT_MODEL", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES"):
        if variable in os.environ:
            typer.echo(f"{variable}={os.environ[variable]}")
