"""`trmt inspect`: describe a bundle or a run."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from trmt.cli.common import Model, print_report, wrapped

NamedLines = list[tuple[str, str]]


def command(
    model: Model = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Describe a model or a run. Components, data, scores, origin, and how it would run on this machine."""
    import json

    from trmt.insight.inspecting import inspect

    facts = inspect(model)
    if as_json:
        print_report(json.dumps(facts, indent=2, ensure_ascii=False))
        return
    lines = _bundle_lines(facts) if "architecture" in facts else [("run", facts["folder"])]
    lines += _run_lines(facts.get("run"))
    print_report("\n".join(wrapped(value, indent=" " * 13, first=f"{name:<13}") for name, value in lines))


def _bundle_lines(facts: dict[str, Any]) -> NamedLines:
    sizes = ", ".join(f"{name} {value}" for name, value in facts["network"].items())
    lines = [
        ("bundle", facts["folder"]),
        ("languages", " -> ".join(facts["languages"]) if all(facts["languages"]) else "not known"),
        ("network", f"{facts['architecture']}: {sizes}"),
        ("parameters", f"{facts['parameters']:,} in {facts['bytes'] / 2**20:.1f} MiB"),
        _component_line(facts),
        ("precision", facts["precision"]),
        ("runs here", f"{facts['steps']} steps on {facts['device']}, {facts['backend']}"),
        ("CPU kernels", ", ".join(facts["processors"]) or "none"),
        *[("origin", text) for text in _origins(facts["came_from"])],
    ]
    for name in ("training", "data", "versions"):
        shown = ", ".join(f"{key} {value}" for key, value in facts[name].items() if _is_plain(value))
        lines += [(name, shown)] if shown else []
    lines += [_score_line(score) for score in facts["scores"]]
    if best := facts["best_checkpoint"]:
        lines += [
            _score_line(score, name="best single", at=f" at {best['name']}") for score in best["scores"][:1]
        ]
    lines += [("licences", ", ".join(facts["licences"]))] if facts["licences"] else []
    return lines


def _component_line(facts: dict[str, Any]) -> tuple[str, str]:
    components = [f"{name} {count:,}" for name, count in facts["parts"].items()]
    components += [f"{name} shared with {other}" for name, other in facts["shared"].items()]
    return "components", ", ".join(components)


def _origins(known: dict[str, Any]) -> list[str]:
    templates = {
        "imported": "imported model {}",
        "averaged": "average of {}",
        "run": "run {}",
        "init_from": "initialised with the weights of {}",
    }
    return [
        text.format(", ".join(map(str, found)) if isinstance(found := known[name], list) else found)
        for name, text in templates.items()
        if name in known
    ]


def _run_lines(run: dict[str, Any] | None) -> NamedLines:
    if not run:
        return []
    settings, data, progress = (run[name] for name in ("settings", "data", "progress"))
    lines = [("recipe", f"{settings['architecture']} for {settings['objective']}: {settings['description']}")]
    lines += [("init from", run["origin"]["init_from"])] if "init_from" in run["origin"] else []
    if data:
        pairs = ", ".join(f"{data[name]:,} {name} pairs" for name in ("train", "dev") if name in data)
        corpora = ", ".join(f"{each['name']} ({each['pairs']:,})" for each in data["corpora"])
        lines.append(("prepared set", f"{data['set']}: {pairs}; from {corpora}"))
    lines.append(("trained", _progress(progress)))
    for score in run["best"]:
        lines.append(_score_line(score, at=f" at step {score['step']:,}"))
    if run["checkpoints"]:
        lines.append(("checkpoints", ", ".join(map("{:,}".format, run["checkpoints"]))))
    return lines


def _progress(progress: dict[str, Any]) -> str:
    from trmt import console

    parts = [f"{progress['step']:,} steps"]
    if "target_tokens" in progress:
        parts.append(f"{progress['target_tokens']:,} target tokens")
    if "seconds" in progress:
        parts.append(console.duration(progress["seconds"]))
    if "tokens_per_second" in progress:
        parts.append(f"{progress['tokens_per_second']:,.0f} target tokens/s")
    return ", ".join(parts)


def _score_line(score: dict[str, Any], *, name: str = "", at: str = "") -> tuple[str, str]:
    name = name or (f"best {score['metric']}" if at else str(score["metric"]))
    return name, f"{score['value']:.4g}{at}  {score.get('signature', '')}".rstrip()


def _is_plain(value: Any) -> bool:
    return isinstance(value, str | int | float)
