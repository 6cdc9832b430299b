"""The table of translation speed on a CPU, compared with other programs with the same weights."""

from __future__ import annotations

import json
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"
NAMES = {
    "trained": "trained, tiny (4+4 layers of 128), real sentences",
    "base": "base (6+6 layers of 512), random weights, 30 source and 30 target pieces",
    "deep": "deep (12+1 layers of 512), random weights, 30 source and 30 target pieces",
}
HEAD = (
    "network",
    "precision",
    "batch",
    "search",
    "threads",
    "trmt, target tokens/s",
    "relative to CTranslate2",
    "relative to Hugging Face",
    "chrF2: trmt, CTranslate2",
)
SSRU_HEAD = ("network, precision, length", "decoder", "translation, greedy", "translation, beam 4")
SSRU_PARTS = ("decoder", "translation, greedy", "translation, beam of 4")
Row = tuple[str, ...]


def result(name: str = "translate") -> dict | None:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_bytes()) if path.exists() else None


def ssru_rows() -> list[Row]:
    """The speed of an SSRU decoder relative to self-attention, for each network, precision and length."""
    found = result("ssru")
    if found is None:
        return [("pending", *("" for _ in SSRU_HEAD[1:]))]
    points = found["figures"]["times_faster"]
    return [(name, *(_ratio(point[part]) for part in SSRU_PARTS)) for name, point in points.items()]


def _ratio(point: dict) -> str:
    return f"{point['times']:.2f} ({point['from']:.2f}–{point['to']:.2f})"


def rows() -> list[Row]:
    """One for each point that was measured."""
    found = result()
    if found is None:
        return [("pending", *("" for _ in HEAD[1:]))]
    return [_row(name, point) for name, point in sorted(found["figures"]["points"].items(), key=_order)]


def _order(item: tuple[str, dict]) -> tuple:
    network, compute, batch, search, threads = item[0].split("/")
    size = int(batch) if batch.isdecimal() else 1 << 30
    return [*NAMES].index(network), compute, int(threads), size, search != "greedy"


def _row(name: str, point: dict) -> Row:
    network, compute, batch, search, threads = name.split("/")
    engines = point["engines"]
    scores = [
        f"{engines[engine]['chrf']['value']:.1f}"
        for engine in ("trmt", "ctranslate2")
        if "chrf" in engines.get(engine, {})
    ]
    return (
        NAMES[network],
        compute,
        "whole file" if batch == "whole" else batch,
        search,
        threads,
        f"{engines['trmt']['target_tokens_per_second']:,.0f}",
        _times(point, "ctranslate2"),
        _times(point, "transformers"),
        ", ".join(scores),
    )


def _times(point: dict, engine: str) -> str:
    ratio = point["ratios"].get(engine)
    if not ratio:
        return ""
    low, high = ratio["interval"]
    return f"{ratio['median']:.2f} ({low:.2f}–{high:.2f})"
