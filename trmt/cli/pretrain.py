"""`trmt pretrain`: from documents in one language to a network that can read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    run: Annotated[
        Path | None,
        typer.Argument(help="Run folder; one that exists is gone on with. [default: models/<data>-<recipe>]"),
    ] = None,
    data: Annotated[
        Path | None, typer.Option("--data", help="Set of documents. [default: the newest in data/]")
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option("--recipe", help="Recipe by name or path: bert-tiny, bert-base, bart-tiny, bart-base."),
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Change a setting: --set optim.lr=5e-4. Repeatable.")
    ] = None,
    init_from: Annotated[
        Path | None, typer.Option("--init-from", help="Start from the weights of this bundle.")
    ] = None,
    device: Annotated[
        str | None, typer.Option("--device", help="cpu, cuda, cuda:1, mps. [default: the best there is]")
    ] = None,
    threads: Annotated[int, typer.Option("--threads", min=0, help="CPU threads; 0 takes all.")] = 0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what it would take: memory, time, disk.")
    ] = False,
    trust_code: Annotated[
        bool, typer.Option("--trust-code", help="Let a bundle or run folder name code outside trmt.")
    ] = False,
) -> None:
    """Train on documents (trmt prepare --documents); trmt train --init-from RUN:encoder goes on with it."""
    import torch

    from trmt.engines.device import keep_memory
    from trmt.planning import TrainOptions
    from trmt.training import train

    if threads:
        torch.set_num_threads(threads)
    changes = list(settings or [])
    if device:
        changes.append(f'training.device="{device}"')
    options = TrainOptions(
        run=run,
        data=data,
        recipe=recipe,
        settings=changes,
        init_from=init_from,
        dry_run=dry_run,
        trust_code=trust_code,
        pretrain=True,
    )
    keep_memory()
    train(options)
