"""What rounds of measurements add up to: rates, medians, ratios with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from arithmetic import training_flops
from peers.job import Shape

Run = Mapping[str, Any]  # what the probe reported of one process, with `per_second`; or an `error`

SPEED = "target_tokens_per_second"
MEDIANS = (
    SPEED,
    "target_tokens_per_cpu_second",
    "target_tokens_per_update",
    "gflops",
    "padding",
    "busy",
    "peak_mib",
    "peak_device_mib",
    "loader_wait_seconds",
)


def per_second(report: Mapping[str, Any], shape: Shape) -> dict[str, Any]:
    """The rates and shares that follow from a report's sums."""
    seconds, target = report["seconds"], report["target_tokens"]
    cells = report["source_cells"] + report["target_cells"]
    return {
        "target_tokens_per_second": round(target / seconds, 1),
        "target_tokens_per_cpu_second": round(target / report["cpu_seconds"], 1),
        "target_tokens_per_update": round(target / report["updates"]),
        "gflops": round(training_flops(shape, report) / seconds / 1e9, 2),
        "padding": round(1 - (report["source_tokens"] + target) / cells, 4),
        "busy": round(report["cpu_seconds"] / seconds, 2),  # cores
    }


def summed_up(runs: Mapping[str, Sequence[Run]], products: Sequence[Run]) -> dict[str, Any]:
    """The figures of rounds of toolkits, ours named trmt, and of the matrix products measured beside them."""
    peaks = [found["peak"] for found in products]
    figures: dict[str, Any] = {
        "gemm_gflops": {"median": median(peaks) if peaks else None, "rounds": list(products)},
        "toolkits": {name: _medians(found) for name, found in runs.items()},
    }
    ours = runs["trmt"]
    good = [(run, peak) for run, peak in zip(ours, peaks, strict=False) if "error" not in run]
    if not good:
        return figures
    shares = [run["gflops"] / peak for run, peak in good]
    waits = [run["loader_wait_seconds"] / run["seconds"] for run, _ in good]
    figures["trmt"] = {
        "share_of_gemm_peak": round(median(shares), 4),
        "share_of_gemm_peak_rounds": [round(share, 4) for share in shares],
        "share_waiting_for_the_loader": round(median(waits), 6),
    }
    figures["ratios"] = _ratios(runs, SPEED)
    # Where other programs share the machine, processor time is disturbed less than the clock.
    figures["ratios_by_cpu_time"] = _ratios(runs, "target_tokens_per_cpu_second")
    if figures["ratios"]:
        figures["fastest_peer"] = min(figures["ratios"], key=lambda name: figures["ratios"][name]["median"])
    return figures


def _ratios(runs: Mapping[str, Sequence[Run]], key: str) -> dict[str, Any]:
    found = {name: ratio(runs["trmt"], theirs, key=key) for name, theirs in runs.items() if name != "trmt"}
    return {name: times for name, times in found.items() if times}


def ratio(ours: Sequence[Run], theirs: Sequence[Run], *, key: str = SPEED) -> dict[str, Any] | None:
    """How many times as fast we are, round by round, with an interval for the median; None without rounds.

    From the smallest to the largest of n rounds the true median is covered with probability 1 - 2 / 2^n.
    """
    both = [(mine, other) for mine, other in zip(ours, theirs, strict=False) if key in mine and key in other]
    rounds = [mine[key] / other[key] for mine, other in both]
    if not rounds:
        return None
    return {
        "median": round(median(rounds), 3),
        "interval": [round(min(rounds), 3), round(max(rounds), 3)],
        "confidence": round(1 - 2 / 2 ** len(rounds), 4),
        "rounds": [round(one, 3) for one in rounds],
    }


def _medians(runs: Sequence[Run]) -> dict[str, Any]:
    """Medians of a toolkit's rounds, how it was configured, and the rounds themselves."""
    good = [run for run in runs if "error" not in run]
    summary: dict[str, Any] = {}
    if errors := [run["error"] for run in runs if "error" in run]:
        summary["error"] = errors[0]
    if good:
        summary |= {key: median(run[key] for run in good) for key in MEDIANS if good[0].get(key) is not None}
        summary |= {key: good[0][key] for key in ("torch", "threads", "parameters", "configuration")}
    left_out = ("configuration", "marks", "torch", "threads")
    summary["rounds"] = [
        {
            key: round(value, 3) if isinstance(value, float) else value
            for key, value in run.items()
            if key not in left_out
        }
        for run in good
    ]
    return summary


def table(figures: Mapping[str, Any]) -> str:
    """The figures for a person."""
    lines = [f"GEMM peak {figures['gemm_gflops']['median'] or 0:,.0f} GFLOP/s"]
    for name, found in figures["toolkits"].items():
        if "target_tokens_per_second" not in found:
            lines.append(f"{name:13} failed: {found['error'].splitlines()[-1]}")
            continue
        times = figures.get("ratios", {}).get(name)
        against = f"  trmt is {times['median']:.2f} times as fast {times['interval']}" if times else ""
        lines.append(
            f"{name:13}{found['target_tokens_per_second']:9,.0f} target tokens/s"
            f"{found['padding']:7.1%} padding{found['peak_mib']:8,.0f} MiB{against}"
        )
    if ours := figures.get("trmt"):
        lines.append(f"trmt: {ours['share_of_gemm_peak']:.1%} of the GEMM peak")
        lines.append(f"trmt waits for its loader {ours['share_waiting_for_the_loader']:.3%} of the time")
    return "\n".join(lines)
