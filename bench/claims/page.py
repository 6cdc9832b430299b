"""The generated part of docs/claims.md, which follows from the result alone."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from claims import systems
from claims.asking import Claim
from claims.figures import PICTURES
from claims.sayings import claims, evidence, scale_of
from claims.scale import Scale
from claims.verdicts import CANNOT_TELL, CONFIRMED, NOT_CONFIRMED, PENDING, Contrast, Evidence

RESULTS = Path(__file__).resolve().parent.parent / "results"
HERE, OTHER = "lineage", "lineage-multi30k"
ELSEWHERE = "Computed exactly"  # the heading of claims without a figure
Tree = Mapping[str, Any]


def result(name: str = HERE) -> dict[str, Any] | None:
    """The result of one of the scales, if it exists."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_bytes()) if path.exists() else None


def overview(found: Tree, other: Tree | None) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Head and rows of a table with the verdict on every claim."""
    figures, seeds = found["figures"], found["figures"]["seeds"]
    rows: list[tuple[str, ...]] = []
    for claim in claims(scale_of(figures)):
        judged = figures["claims"][claim.name][0]
        row = (claim.title, judged["verdict"], value(claim.contrasts[0], judged, seeds=seeds))
        elsewhere = [other["figures"]["claims"].get(claim.name, [judged])[0]["verdict"]] if other else []
        rows.append((*row, *elsewhere))
    return ("claim", "verdict", "measured", *(["verdict on Multi30k"] if other else [])), rows


def count(found: Tree) -> str:
    """The number of claims with each verdict."""
    verdicts = Counter(judged[0]["verdict"] for judged in found["figures"]["claims"].values())
    kinds = (CONFIRMED, NOT_CONFIRMED, CANNOT_TELL, *([PENDING] if verdicts[PENDING] else []))
    return f"Of {verdicts.total()} claims: {', '.join(f'{verdicts[kind]} {kind}' for kind in kinds)}."


def design(found: Tree) -> str:
    """The training of the systems and the test sets."""
    figures = found["figures"]
    scale: Scale = scale_of(figures)
    words = [words_of(figures, str(n)) for n in (scale.shorter[0], scale.shorter[-1], scale.longer[-1])]
    lengths = "" if None in words else " have {:.0f}, {:.0f} and {:.0f} words".format(*words)
    done = {run["system"] for run in figures["runs"]}
    shortest, most, far = scale.shorter[0], scale.shorter[-1], scale.longer[-1]
    return (
        f"Every system was trained for {scale.steps} steps of {scale.tokens:,} tokens on {scale.examples:,} "
        f"examples of 1 to {scale.joined} concatenated sentences, with {figures['seeds']} seeds for data, "
        f"order and initial weights. Networks have a hidden size of {scale.width} and {scale.layers} "
        f"layers (deep ones {scale.layers * scale.deep}). Scores are BLEU of greedy translations of held-out "
        f"sentences. Test sets have examples of {shortest} to {most} concatenated sentences, and of "
        f"{' and '.join(map(str, scale.longer))}, which is longer than in training ({shortest}, {most} and "
        f"{far} sentences{lengths}). Such short trainings show which systems learn fast; these need not be "
        f"the best after long training. {len(done)} of {len(systems.ALL)} systems have been trained."
    )


def words_of(figures: Tree, length: str) -> float | None:
    """The mean number of words of the test examples of one length."""
    known = [run["lengths"][length]["words"] for run in figures["runs"] if "lengths" in run]
    return fmean(known) if known else None


def sections(found: Tree) -> str:
    """Every figure with its claims, and then the claims without a figure."""
    figures = found["figures"]
    asked = claims(scale_of(figures))
    parts = []
    for name in [*PICTURES, ""]:
        of_it = [claim for claim in asked if claim.figure == name]
        if not of_it:
            continue
        parts.append(f"## {PICTURES[name].title if name else ELSEWHERE}")
        if name:
            parts.append(f"![{PICTURES[name].says}](claims/{name}.svg)")
        parts += [paragraph(claim, figures) for claim in of_it]
    return "\n\n".join(parts)


def paragraph(claim: Claim, figures: Tree) -> str:
    """A claim, its source, the measurements and their verdicts."""
    judged, seeds = figures["claims"][claim.name], figures["seeds"]
    measured = [
        f"{_capital(contrast.asks)}: {value(contrast, one, seeds=seeds)}"
        + ("" if one["verdict"] == PENDING else f", {one['verdict']}")
        + "."
        for contrast, one in zip(claim.contrasts, judged, strict=True)
    ]
    text = " ".join([*measured, *losses(claim.begins_with, figures), *([claim.note] if claim.note else [])])
    return f"**{claim.title}: {judged[0]['verdict']}.** *{claim.says}* ({claim.source}.) {text}"


def losses(system: str, figures: Tree) -> list[str]:
    """A sentence on the training loss of a system, if it was trained."""
    curves = [run["training"]["curve"] for run in figures["runs"] if run["system"] == system]
    if not curves:
        return []
    points = [[curve[index] for curve in curves] for index in (0, len(curves[0]) // 4, -1)]
    shown = [f"{fmean(loss for _, loss in point):.2f} at step {point[0][0]}" for point in points]
    return [f"The loss of `{system}` is {shown[0]}, {shown[1]} and {shown[2]}."]


def value(contrast: Contrast, judged: Tree, *, seeds: int) -> str:
    """The measured value with its interval."""
    if judged["verdict"] == PENDING:
        known = len(judged["values"])
        return f"pending, {known} of {seeds} seeds" if known and contrast.unit != "times" else "pending"
    mean, low, high = (judged[name] for name in ("mean", "low", "high"))
    if contrast.unit == "times":
        shown = [f"{number:.3g}" for number in (mean, low, high)]
    elif contrast.unit == "BLEU":
        shown = [_signed(number, ".1f") for number in (mean, low, high)]
    elif contrast.unit == "nats":
        shown = [_signed(number, ".3f") for number in (mean, low, high)]
    else:
        shown = [f"{number:.2g}" for number in (mean, low, high)]
    interval = "" if low == high else f" ({shown[1]} to {shown[2]})"
    return f"{shown[0]} {contrast.unit}".rstrip() + interval


def _signed(number: float, form: str) -> str:
    return f"{number:+{form}}".replace("-", "−")


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def trained(found: Tree) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Head and rows of a table of all systems: parameters, scores, training time."""
    figures = found["figures"]
    known = evidence(figures)
    rows = []
    for system in systems.ALL:
        runs = [run for run in figures["runs"] if run["system"] == system.name]
        if not runs:
            rows.append((KINDS[system.family], system.title, f"`{system.name}`", *["pending"] * 5))
            continue
        seconds = fmean(run["training"]["seconds"] for run in runs)
        scores = (
            [_spread(known, f"{metric}/{system.name}/all", form) for metric, form in METRICS]
            if "all" in runs[0]
            else ["", ""]
        )
        parameters = round(fmean(run["training"]["parameters"] for run in runs))
        named = (KINDS[system.family], system.title, f"`{system.name}`")
        rows.append((*named, f"{parameters:,}", *scores, f"{seconds:.0f}", f"{len(runs)}"))
    head = (
        "network",
        "variant",
        "name",
        "parameters",
        "BLEU (lowest to highest)",
        "nats per token",
        "seconds, on shared cores",
        "seeds",
    )
    return head, rows


KINDS = {"recurrent": "recurrent", "conv": "ConvS2S", "transformer": "Transformer", "masked": "encoder"}
METRICS = (("bleu", ".1f"), ("nll", ".3f"))


def _spread(known: Evidence, name: str, form: str) -> str:
    values = known[name].values()
    return f"{fmean(values):{form}} ({min(values):{form}} to {max(values):{form}})"
