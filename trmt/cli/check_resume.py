"""`trmt check-resume`: check that a run can be resumed exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    run: Annotated[Path, typer.Argument(help="Run folder; only copies of it are changed.")],
    steps: Annotated[
        int, typer.Option("--steps", help="Further training steps, with a kill in the middle.")
    ] = 20,
    data: Annotated[
        Path | None, typer.Option("--data", help="Prepared set. [default: the set of the run]")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="Change a setting of the copies: --set training.deterministic=true."),
    ] = None,
    threads: Annotated[int, typer.Option("--threads", min=0, help="CPU threads; 0: all.")] = 0,
    trust_code: Annotated[
        bool, typer.Option("--trust-code", help="Allow the run folder to load code from outside trmt.")
    ] = False,
) -> None:
    """Check that a run can be resumed exactly. Copies of it are trained on, with and without a kill."""
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
            f"resuming {run} does not give the same result; on a GPU, try --set training.deterministic=true"
        )
    console.say(
        "the same to the last byte with and without a kill: weights, optimizer and all other saved state, "
        "data and log"
    )
