"""The table of translation speed on a GPU, compared with other programs with the same weights."""

from __future__ import annotations

import json
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"
WAITS = "waits for a GPU"
NETWORKS = {
    "base": "base (6+6 layers of 512)",
    "big": "big (6+6 layers of 1024)",
}
# Points of bench/gpu_translate.py, with the goals of the base network in tokens per second.
POINTS = {
    "bf16/1/beam": "",
    "bf16/32/beam": "40,000; 100,000",
    "bf16/512/beam": "250,000; 500,000",
    "bf16/4096/greedy": "",
    "fp32/32/beam": "",
    "fp32/512/beam": "",
}
HEAD = (
    "network (random weights, forced length)",
    "precision",
    "batch",
    "search",
    "CUDA graphs, target tokens/s",
    "goals",
    "direct, target tokens/s",
    "times Hugging Face",
    "times CTranslate2 in fp16",
    "graphs",
    "peak memory",
    "warm-up",
)
SPEED = "target_tokens_per_second"
Row = tuple[str, ...]


def results() -> dict[str, dict]:
    """The results measured on a GPU, by network."""
    found = {}
    for network in NETWORKS:
        path = RESULTS / f"translate-{network}.json"
        if path.exists() and (result := json.loads(path.read_bytes())).get("gpu"):
            found[network] = result
    return found


def rows() -> list[Row]:
    """One for each point of each network, measured or pending."""
    found = results()
    return [
        _row(network, name, found.get(network, {"figures": {"points": {}}})["figures"]["points"].get(name))
        for network in NETWORKS
        for name in POINTS
    ]


def _row(network: str, name: str, point: dict | None) -> Row:
    compute, batch, search = name.split("/")
    what = (NETWORKS[network], compute, batch, "beam of 4" if search == "beam" else search)
    goals = POINTS[name] if network == "base" else ""
    if point is None:
        return (*what, WAITS, goals, *("" for _ in HEAD[6:]))
    captured = point["engines"].get("graphs", {})
    return (
        *what,
        speed(captured),
        goals,
        speed(point["engines"].get("direct", {})),
        _times(point, "transformers"),
        _times(point, "ctranslate2"),
        f"{captured.get('graphs', '')}",
        f"{captured['peak_reserved_mib']:,} MiB" if "peak_reserved_mib" in captured else "",
        f"{captured['warm_up_seconds']:.0f} s" if SPEED in captured else "",
    )


def speed(one: dict) -> str:
    """Tokens per second, or the reason why there are none; an engine that fell back to another is marked."""
    if "failed" in one:
        return f"failed: {one['failed']}"
    if SPEED not in one:
        return ""
    why = one.get("fell_back")
    return f"{one[SPEED]:,.0f}" + (f", fell back to direct steps: {why}" if why else "")


def _times(point: dict, engine: str) -> str:
    one = point["engines"].get(engine)
    if one is None:
        return ""
    ratio = point["ratios"].get(engine)
    if ratio is None:
        return speed(one)
    low, high = ratio["interval"]
    return f"{ratio['median']:.1f} ({low:.1f}–{high:.1f})"


def summary(figures: dict) -> str:
    """A short summary of one result."""
    parts = [
        f"{speed(point['engines'].get('graphs', {}))} at {name}"
        for name in POINTS
        if (point := figures["points"].get(name))
    ]
    return f"target tokens/s: {'; '.join(parts)}"
