"""`trmt train`: from a prepared set and a recipe to a run folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

# What `trmt pretrain` takes as well.
RunFolder = Annotated[
    Path | None,
    typer.Argument(help="Run folder; one that exists is gone on with. [default: models/<data>-<recipe>]"),
]
Settings = Annotated[
    list[str] | None, typer.Option("--set", help="Change a setting: --set optim.lr=5e-4. Repeatable.")
]
Device = Annotated[
    str | None, typer.Option("--device", help="cpu, cuda, cuda:1, mps. [default: the best there is]")
]
Threads = Annotated[int, typer.Option("--threads", min=0, help="CPU threads; 0 takes all.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only say what it would take: memory, time, disk.")]
TrustCode = Annotated[
    bool, typer.Option("--trust-code", help="Let a bundle or run folder name code outside trmt.")
]


def command(
    run: RunFolder = None,
    data: Annotated[
        Path | None, typer.Option("--data", help="Prepared set. [default: the newest in data/]")
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option("--recipe", help="Recipe by name or path. [default: the one that fits the data's size]"),
    ] = None,
    settings: Settings = None,
    init_from: Annotated[
        Path | None, typer.Option("--init-from", help="Start from the weights of this bundle: fine-tuning.")
    ] = None,
    device: Device = None,
    threads: Threads = 0,
    dry_run: DryRun = False,
    trust_code: TrustCode = False,
) -> None:
    """Train a network. Run it again and it goes on exactly where it stopped."""
    from trmt.training.planning import TrainOptions
    from trmt.training.run import train
    from trmt.validating import validate

    make_ready(threads)
    options = TrainOptions(
        run=run,
        data=data,
        recipe=recipe,
        settings=with_device(settings, device),
        init_from=init_from,
        dry_run=dry_run,
        trust_code=trust_code,
    )
    train(options, validate)


def make_ready(threads: int) -> None:
    """What a process does before it trains."""
    import torch

    from trmt.devices.choice import keep_freed_memory

    if threads:
        torch.set_num_threads(threads)
    keep_freed_memory()


def with_device(settings: list[str] | None, device: str | None) -> list[str]:
    """The settings, and the device as the last of them."""
    return [*(settings or []), *([f'training.device="{device}"'] if device else [])]
