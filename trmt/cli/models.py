"""`trmt models`: what is in models/."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from trmt.cli.common import fitting_table, print_report


def command(
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """List the models and runs in models/. State, languages, size, scores, and which is the default."""
    import json
    import os

    from trmt import console
    from trmt.bundles.checkpoints import MODELS
    from trmt.errors import TrmtError
    from trmt.training.models import as_tree, default_model, list_models, shipped_elsewhere

    try:
        default, why = default_model()
    except TrmtError as error:
        default, why = None, str(error)
    rows = [as_tree(model, default=default) for model in [*list_models(), *shipped_elsewhere()]]
    if as_json:
        print_report(json.dumps(rows, indent=2, ensure_ascii=False))
        return
    if rows:
        head = ["name", "state", "languages", "parameters", "on disk", "dev set", ""]
        print_report(fitting_table(head, [_row(row) for row in rows]))
        for row in rows:
            if "problem" in row:
                console.warn(row["problem"])
    else:
        console.say(f"{MODELS}/ has no models; train one with trmt train")
    if default and os.environ.get("TRMT_MODEL"):
        console.say(f"default: {default} ({why})")
    elif rows and not default:
        console.say(f"there is no default: {why}")


def _row(facts: dict[str, Any]) -> list[str]:
    count = facts["parameters"]
    return [
        facts["name"],
        facts["state"],
        " -> ".join(facts["languages"]),
        f"{count / 1e6:.1f}M" if count is not None else "",
        f"{facts['bytes'] / 2**20:,.1f} MiB",
        _scores(facts["scores"]),
        "default" if facts["default"] else "",
    ]


def _scores(scores: list[dict[str, Any]]) -> str:
    from trmt.training.history import LABELS

    known = [each for each in scores if isinstance(each.get("value"), int | float) and "metric" in each]
    return ", ".join(f"{LABELS.get(each['metric'], each['metric'])} {each['value']:.4g}" for each in known)
