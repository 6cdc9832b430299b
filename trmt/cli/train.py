"""`trmt train` and `trmt pretrain`: train a network in a run folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trmt.cli import completion
from trmt.cli.common import Threads, set_threads

RunFolder = Annotated[
    str | None,
    typer.Argument(
        metavar="RUN",
        help="Run folder, or a name in models/; an existing run is resumed. [default: models/DATA-RECIPE]",
        autocompletion=completion.models,
    ),
]
RecipeName = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        metavar="NAME",
        help="Recipe by name or path. [default: chosen by the size of the data]",
        autocompletion=completion.recipes,
    ),
]
RecipeSettings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a setting: --set optim.lr=5e-4. Repeatable."),
]
TrainDevice = Annotated[
    str | None,
    typer.Option(
        "--device",
        metavar="DEVICE",
        help="cpu, cuda, cuda:1, mps or auto. [default: that of the recipe, which is auto in most]",
        autocompletion=completion.devices,
    ),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Only estimate the memory, time and disk space of the run.")
]
TrustRunCode = Annotated[
    bool, typer.Option("--trust-code", help="Allow bundles and run folders to load code from outside trmt.")
]


def command(
    run: RunFolder = None,
    data: Annotated[
        Path | None,
        typer.Option(
            "--data",
            metavar="FOLDER",
            help="Prepared set. [default: the newest in data/]",
            autocompletion=completion.folders,
        ),
    ] = None,
    recipe: RecipeName = None,
    settings: RecipeSettings = None,
    init_from: Annotated[
        Path | None,
        typer.Option(
            "--init-from",
            metavar="MODEL",
            help="Start from the weights of this bundle (fine-tuning).",
            autocompletion=completion.models,
        ),
    ] = None,
    device: TrainDevice = None,
    threads: Threads = 0,
    dry_run: DryRun = False,
    trust_code: TrustRunCode = False,
) -> None:
    """Train a network. The same command resumes a stopped run exactly."""
    from trmt.bundles.checkpoints import named_folder
    from trmt.training.planning import TrainOptions
    from trmt.training.run import train
    from trmt.validating import validate

    make_ready(threads)
    options = TrainOptions(
        run=named_folder(run) if run else None,
        data=data,
        recipe=recipe,
        settings=_with_device(settings, device),
        init_from=init_from,
        dry_run=dry_run,
        trust_code=trust_code,
    )
    train(options, validate)


def pretrain(
    run: RunFolder = None,
    data: Annotated[
        Path | None,
        typer.Option(
            "--data",
            metavar="FOLDER",
            help="Prepared set of documents. [default: the newest in data/]",
            autocompletion=completion.folders,
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe",
            metavar="NAME",
            help="Recipe by name or path: bert-tiny, bert-base, bart-tiny, bart-base.",
            autocompletion=completion.recipes,
        ),
    ] = None,
    settings: RecipeSettings = None,
    init_from: Annotated[
        Path | None,
        typer.Option(
            "--init-from",
            metavar="MODEL",
            help="Start from the weights of this bundle.",
            autocompletion=completion.models,
        ),
    ] = None,
    device: TrainDevice = None,
    threads: Threads = 0,
    dry_run: DryRun = False,
    trust_code: TrustRunCode = False,
) -> None:
    """Pretrain a network on documents. Then fine-tune it: trmt train --init-from RUN:encoder."""
    from trmt.bundles.checkpoints import named_folder
    from trmt.training.planning import TrainOptions
    from trmt.training.run import train

    make_ready(threads)
    options = TrainOptions(
        run=named_folder(run) if run else None,
        data=data,
        recipe=recipe,
        settings=_with_device(settings, device),
        init_from=init_from,
        pretrain=True,
        dry_run=dry_run,
        trust_code=trust_code,
    )
    train(options)


def make_ready(threads: int) -> None:
    """Set the number of threads and the memory allocator, before training."""
    from trmt.registry import NATIVE, optional

    set_threads(threads)
    if keep_freed_memory := optional(NATIVE["keep_freed_memory"]):
        keep_freed_memory()


def _with_device(settings: list[str] | None, device: str | None) -> list[str]:
    """The settings, and the device as the last of them."""
    return [*(settings or []), *([f'training.device="{device}"'] if device else [])]
