"""The tables of translation quality, and of the measurements that need a GPU."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path

import gpu_translation_tables

RESULTS = Path(__file__).resolve().parent / "results"
WAITS = "waits for a GPU"
PUBLISHED = {"test_2016_flickr": 41.02, "test_2017_flickr": 33.36, "test_2017_mscoco": 29.88}
MULTI30K = {
    "multi30k": "published recipe",
    "multi30k-plus": "recipe multi30k-plus",
    "multi30k-raw": "recipe multi30k-plus, raw text",
}
FORMS = {"published": ("bleu",), "detokenised": ("bleu", "chrf"), "all references": ("bleu", "chrf")}
Row = tuple[str, ...]


def load(name: str) -> dict | None:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_bytes()) if path.exists() else None


def spread(values: list[float]) -> str:
    """The mean, the lowest and the highest."""
    mean = f"{statistics.mean(values):.2f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.2f}–{max(values):.2f})"


def seeds(result: dict) -> str:
    done, wanted = len(result["figures"]["seeds"]), result["figures"]["wanted"]
    return f"{done}" if done == wanted else f"{done} of {wanted}"


def multi30k_rows() -> list[Row]:
    """A row for each recipe, form and metric."""
    rows: list[Row] = [
        ("Wu et al. 2021", "published", "BLEU", *(f"{score:.2f}" for score in PUBLISHED.values()), "1")
    ]
    for name, recipe in MULTI30K.items():
        result = load(name)
        if result is None:
            rows.append((recipe, "both", "", *(WAITS for _ in PUBLISHED), ""))
            continue
        for form in result["figures"]["experiment"]["forms"]:
            for metric in FORMS[form]:
                cells = [spread(values(result, test, form, metric)) for test in PUBLISHED]
                rows.append((recipe, form, shown(result, form, metric), *cells, seeds(result)))
    return rows


def values(result: dict, test: str, form: str, metric: str) -> list[float]:
    return [seed["tests"][test][form][metric]["value"] for seed in result["figures"]["seeds"]]


def shown(result: dict, form: str, metric: str) -> str:
    """sacreBLEU's name of a metric."""
    return result["figures"]["seeds"][0]["dev_scores"][form][metric]["name"]


def signatures(names: list[str]) -> list[str]:
    """The signatures of these results, once each."""
    found = {}
    for name in names:
        result = load(name)
        for form, metrics in (result["figures"]["seeds"][0]["dev_scores"] if result else {}).items():
            for metric in FORMS[form]:
                found[f"{metrics[metric]['name']}, {form}: `{metrics[metric]['signature']}`"] = None
    return list(found)


def corpora_rows() -> list[Row]:
    """A row for each corpus and form: scores on dev and test sets, and the training time."""
    rows: list[Row] = []
    for name in ("tatoeba", "laws"):
        result = load(name)
        if result is None:
            rows.append((name, "", WAITS, WAITS, WAITS, WAITS, ""))
            continue
        for form in result["figures"]["experiment"]["forms"]:
            runs = result["figures"]["seeds"]
            dev = spread([run["dev_scores"][form]["bleu"]["value"] for run in runs])
            bleu, chrf = (spread(values(result, "test", form, metric)) for metric in ("bleu", "chrf"))
            minutes = statistics.mean(run["training"]["seconds"] for run in runs) / 60
            speed = statistics.mean(run["training"]["tokens_per_second"] or 0 for run in runs)
            time = f"{minutes:.1f} min" + (", on a shared GPU" if result["figures"]["shared"] else "")
            rows.append((name, form, dev, bleu, chrf, time, f"{speed:,.0f}"))
    return rows


def gpu_rows(named: list[tuple[str, str]]) -> list[Row]:
    """The rows of the GPU suite, given as (name, what it measures), and the results so far."""
    return [(f"`{name}`", measures, _state(name)) for name, measures in named]


def _state(name: str) -> str:
    result = load(name)
    if result is None or not result.get("gpu"):
        return WAITS
    figure = SUMMARIES.get(name, lambda figures: "")(result["figures"])
    return f"{result['date']}, {result['gpu']}" + (f": {figure}" if figure else "")


def _speed(found: dict) -> str:
    ours, share = found["toolkits"]["trmt"], found["trmt"]
    return (
        f"{ours['target_tokens_per_second']:,.0f} target tokens/s, {share['share_of_gemm_peak']:.0%} of the "
        f"GEMM peak, {ours.get('peak_device_mib', 0):,.0f} MiB, "
        f"{share['share_waiting_for_the_loader']:.2%} waiting for data"
    )


def _against(found: dict) -> str:
    rival = found.get("fastest_peer")
    return f"{found['ratios'][rival]['median']:.2f} times {rival}" if rival else ""


SUMMARIES: dict[str, Callable[[dict], str]] = {
    "machine": lambda found: (
        f"{found['bf16_tflops']:,.0f} TFLOP/s in bf16, copies at {found['copy_gb_per_second']:,.0f} GB/s, "
        f"{found['launch_microseconds']:.1f} µs a launch"
    ),
    "gpu-probes": lambda found: ", ".join(name for name, one in found["abilities"].items() if one["has"]),
    "gpu-tests": lambda found: f"{found['passed']} of {found['tests']} passed",
    "train-base": _speed,
    "train-big": _speed,
    "train-peers": _against,
    "translate-base": gpu_translation_tables.summary,
    "translate-big": gpu_translation_tables.summary,
    "train-deterministic": lambda found: f"{found['times_slower']:.2f} times slower",
}
