"""`trmt check-resume`: proof that a run can be resumed exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trmt.cli import completion
from trmt.cli.common import Threads, print_report


def command(
    run: Annotated[
        Path,
        typer.Argument(
            metavar="RUN",
            help="Run folder; it is copied and not touched.",
            autocompletion=completion.models,
        ),
    ],
    steps: Annotated[int, typer.Option("--steps", help="Steps to train on, with a kill in the middle.")] = 20,
    data: Annotated[
        Path | None,
        typer.Option(
            "--data",
            metavar="FOLDER",
            help="Prepared set. [default: that of the run]",
            autocompletion=completion.folders,
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Change a setting of the copy: --set training.deterministic=true.",
        ),
    ] = None,
    threads: Threads = 0,
    trust_code: Annotated[
        bool, typer.Option("--trust-code", help="Allow the run folder to load code from outside trmt.")
    ] = False,
) -> None:
    """Check on a copy that a run resumes exactly. Killed and resumed, it must end with the same bytes."""
    from trmt import console
    from trmt.errors import TrmtError
    from trmt.resume_check import CheckOptions, check_resume

    options = CheckOptions(
        run=run,
        steps=steps,
        data=data,
        settings=tuple(settings or ()),
        threads=threads,
        trust_code=trust_code,
    )
    found = check_resume(options)
    for difference in found:
        console.warn(difference)
    if found:
        raise TrmtError(
            f"resuming {run} does not continue the same run; on a GPU, try --set training.deterministic=true"
        )
    print_report(
        "the same to the last byte: weights, optimiser, all else that is saved, data and log, "
        "with a kill in between as without"
    )
