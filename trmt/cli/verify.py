"""`trmt verify`: check a bundle and its golden translations."""

from __future__ import annotations

from trmt.cli.common import Device, Model, Threads, TrustCode, print_report, set_threads


def command(
    model: Model = None,
    device: Device = "auto",
    threads: Threads = 0,
    trust_code: TrustCode = False,
) -> None:
    """Check the integrity of a model. Files must be intact and golden sentences translated as before."""
    from trmt import console
    from trmt.errors import BundleError
    from trmt.verifying import VerifyOptions, verify

    set_threads(threads)
    found = verify(VerifyOptions(model=model, device=device, trust_code=trust_code))
    for each in found.differences:
        console.warn(f"the translation of {each.source!r} was {each.before!r} and is now {each.now!r}")
    if problem := found.problem():
        raise BundleError(problem)
    if not found.sentences:
        console.warn(f"{found.folder} has no golden sentences; only its files were checked")
    else:
        print_report(f"{found.folder}: files intact, {found.sentences} golden sentences translated as before")
    if found.versions:
        console.say(f"versions differ from those it was written with: {', '.join(found.versions)}")
