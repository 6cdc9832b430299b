"""`trmt inspect`: what a bundle is, and how it would run here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def command(
    model: Annotated[
        Path | None,
        typer.Argument(help="Bundle or run folder. [default: $TRMT_MODEL, else the newest in models/]"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Everything, as JSON.")] = False,
) -> None:
    """Say what a bundle is: languages, network, precision, where it came from, and what would run it here."""
    import json

    from trmt.inspecting import inspect

    facts = inspect(model)
    if as_json:
        typer.echo(json.dumps(facts, indent=2, ensure_ascii=False))
        return
    for name, value in _lines(facts):
        typer.echo(f"{name:<13}{value}")


def _lines(facts: dict[str, Any]) -> list[tuple[str, str]]:
    sizes = ", ".join(f"{name} {value}" for name, value in facts["network"].items())
    lines = [
        ("bundle", facts["folder"]),
        ("languages", " -> ".join(facts["languages"])),
        ("network", f"{facts['architecture']}: {sizes}"),
        ("parameters", f"{facts['parameters']:,} in {facts['bytes'] / 2**20:.1f} MiB"),
        ("precision", facts["precision"]),
        ("on this CPU", f"{facts['backend']} ({', '.join(facts['processors']) or 'no kernels'})"),
    ]
    for name in ("shortlist", "training", "data", "versions"):
        shown = ", ".join(f"{key} {value}" for key, value in facts[name].items() if _is_plain(value))
        lines += [(name, shown)] if shown else []
    for score in facts["scores"]:
        lines.append((str(score["metric"]), f"{score['value']:.4g}  {score.get('signature', '')}".rstrip()))
    lines += [("licences", ", ".join(facts["licences"]))] if facts["licences"] else []
    return lines


def _is_plain(value: Any) -> bool:
    return isinstance(value, str | int | float)
