"""The tables of what a shortlist gains and loses."""

from __future__ import annotations

import json
from pathlib import Path

RESULT = Path(__file__).resolve().parent / "results" / "shortlist.json"
NETWORKS = {
    "trained": "trained, tiny (4+4 layers of 128), real sentences",
    "base": "base (6+6 layers of 512), random weights, random sentences",
}
SPEED_HEAD = (
    "network",
    "products",
    "batch",
    "search",
    "pieces of a list, of the vocabulary",
    "target tokens per CPU second, whole",
    "with lists",
    "times as fast",
)
QUALITY_HEAD = (
    "search",
    "chrF2, whole",
    "chrF2, with lists",
    "same translations",
    "references' pieces listed",
)
Row = tuple[str, ...]


def result() -> dict | None:
    return json.loads(RESULT.read_bytes()) if RESULT.exists() else None


def speed_rows(found: dict) -> list[Row]:
    """One for each point."""
    figures = found["figures"]
    return [
        _speed_row(network, name, figures[network])
        for network in NETWORKS
        for name in figures[network]["points"]
    ]


def _speed_row(network: str, name: str, sizes: dict) -> Row:
    precision, batch, search = name.split("/")
    point = sizes["points"][name]
    low, high = point["times"]["interval"]
    return (
        NETWORKS[network],
        precision,
        batch,
        search,
        f"{sizes['listed']:,} of {sizes['vocabulary']:,}",
        f"{point['rates']['whole']:,}",
        f"{point['rates']['shortlist']:,}",
        f"{point['times']['median']:.2f} ({low:.2f}–{high:.2f})",
    )


def quality_rows(found: dict) -> list[Row]:
    """One for each search."""
    figures = found["figures"]["trained"]
    scores = figures["chrf"]
    return [
        (
            search,
            f"{scores[f'whole/{search}']:.2f}",
            f"{scores[f'shortlist/{search}']:.2f}",
            f"{scores[f'same/{search}']:.1%}",
            f"{figures['of_references_listed']:.1%}",
        )
        for search in ("greedy", "beam")
    ]
