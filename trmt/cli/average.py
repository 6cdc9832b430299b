"""`trmt average`: the mean of several checkpoints' weights as a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trmt.cli import completion
from trmt.cli.common import Device, Threads, TrustCode


def command(
    checkpoints: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="RUN",
            help="A run folder, or the checkpoints themselves. [default: the newest run in models/]",
            autocompletion=completion.models,
        ),
    ] = None,
    best: Annotated[
        int | None,
        typer.Option("--best", help="Average the best N checkpoints of the run, if that helps or not."),
    ] = None,
    last: Annotated[
        int | None,
        typer.Option("--last", help="Average the last N checkpoints of the run, if that helps or not."),
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FOLDER",
            help="Bundle to write, or its name in models/. [default: average/ in the run]",
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            "--data",
            metavar="FOLDER",
            help="Prepared set with the dev set of the run. [default: that of the run]",
            autocompletion=completion.folders,
        ),
    ] = None,
    device: Device = "auto",
    threads: Threads = 0,
    trust_code: TrustCode = False,
) -> None:
    """Average checkpoints into a bundle. Those that make it better are chosen on the dev set."""
    import torch

    from trmt.averaging import AverageOptions, average
    from trmt.bundles.checkpoints import named_folder

    if threads:
        torch.set_num_threads(threads)
    average(
        AverageOptions(
            paths=tuple(checkpoints or ()),
            best=best,
            last=last,
            out=named_folder(out) if out else None,
            data=data,
            device=device,
            trust_code=trust_code,
        )
    )
