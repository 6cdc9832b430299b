"""`trmt verify`: whether a bundle still does what it did when it was written."""

from __future__ import annotations

from typing import Annotated

import typer

from trmt.cli.options import Device, Model, TrustCode


def command(
    model: Model = None,
    device: Device = "auto",
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, help="CPU threads. [default: all]")
    ] = None,
    trust_code: TrustCode = False,
) -> None:
    """Check a model's files, and that it translates its golden sentences as when it was written."""
    import torch

    from trmt import console
    from trmt.errors import BundleError
    from trmt.verifying import VerifyOptions, verify

    if threads:
        torch.set_num_threads(threads)
    found = verify(VerifyOptions(model=model, device=device, trust_code=trust_code))
    for each in found.differences:
        console.warn(f"{each.source!r} was {each.before!r} and is now {each.now!r}")
    if problem := found.problem():
        raise BundleError(problem)
    if not found.sentences:
        console.warn(f"{found.folder} has no golden sentences: only its files were checked")
    else:
        console.say(f"{found.folder}: whole, and {found.sentences} golden sentences are translated as before")
    if found.versions:
        console.say(f"other versions than it was written with: {', '.join(found.versions)}")
