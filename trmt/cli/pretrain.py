"""`trmt pretrain`: from documents in one language to a network that can read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trmt.cli.train import Device, DryRun, RunFolder, Settings, Threads, TrustCode, make_ready, with_device


def command(
    run: RunFolder = None,
    data: Annotated[
        Path | None, typer.Option("--data", help="Set of documents. [default: the newest in data/]")
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option("--recipe", help="Recipe by name or path: bert-tiny, bert-base, bart-tiny, bart-base."),
    ] = None,
    settings: Settings = None,
    init_from: Annotated[
        Path | None, typer.Option("--init-from", help="Start from the weights of this bundle.")
    ] = None,
    device: Device = None,
    threads: Threads = 0,
    dry_run: DryRun = False,
    trust_code: TrustCode = False,
) -> None:
    """Train on documents (trmt prepare --documents); trmt train --init-from RUN:encoder goes on with it."""
    from trmt.training.planning import TrainOptions
    from trmt.training.run import train

    make_ready(threads)
    options = TrainOptions(
        run=run,
        data=data,
        recipe=recipe,
        settings=with_device(settings, device),
        init_from=init_from,
        pretrain=True,
        dry_run=dry_run,
        trust_code=trust_code,
    )
    train(options)
