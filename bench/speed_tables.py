"""The tables of training speed, compared with other toolkits and as the data grows."""

from __future__ import annotations

import json
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"
PENDING = "pending"
WAITS = "pending: waits for a GPU"
Row = tuple[str, ...]

# Result file: network and data.
TRAINING = {
    "train-multi30k": "Multi30k German-English, 3+3 layers of 256, fp32, 2 cores",
    "train-multi30k-bf16": "the same in bf16, on a processor with AMX",
    "train-base": "base (6+6 layers of 512), 32k vocabulary, bf16, one GPU",
    "train-big": "big (6+6 layers of 1024), 32k vocabulary, bf16, one GPU",
}
NAMES = {
    "trmt": "trmt",
    "fairseq": "fairseq, main branch",
    "joeynmt": "JoeyNMT",
    "eole": "Eole",
    "opennmt": "OpenNMT-py",
    "sockeye": "Sockeye",
    "transformers": "Hugging Face Seq2SeqTrainer, Marian",
}
TRAINING_HEAD = (
    "network and data",
    "target tokens/s",
    "share of the GEMM peak",
    "padding",
    "peak memory",
    "waiting for data",
    "times the speed of the fastest other toolkit",
)
PEERS_HEAD = (
    "toolkit",
    "version",
    "target tokens/s",
    "target tokens per update",
    "padding",
    "peak memory",
    "speed of trmt divided by its speed",
)
SCALE_HEAD = (
    "pairs",
    "training, µs of CPU time per target token",
    "waiting for data",
    "data loader alone, ns per target token",
    "time to the first batch",
    "private memory",
    "with mapped pages",
)


def load(name: str) -> dict | None:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_bytes()) if path.exists() else None


def training_rows() -> list[Row]:
    """The training speed of trmt, one row for each network, measured or pending."""
    rows: list[Row] = []
    for name, trained in TRAINING.items():
        result = load(name)
        if result is None or "trmt" not in result["figures"]:
            waits = WAITS if "GPU" in trained else PENDING
            rows.append((trained, waits, *("" for _ in TRAINING_HEAD[2:])))
            continue
        figures = result["figures"]
        ours, shares = figures["toolkits"]["trmt"], figures["trmt"]
        rows.append(
            (
                trained,
                f"{ours['target_tokens_per_second']:,.0f}",
                f"{shares['share_of_gemm_peak']:.0%}",
                f"{ours['padding']:.1%}",
                f"{ours.get('peak_device_mib') or ours['peak_mib']:,.0f} MiB",
                f"{shares['share_waiting_for_the_loader']:.2%}",
                _fastest(figures),
            )
        )
    return rows


def _fastest(figures: dict) -> str:
    name = figures.get("fastest_peer")
    alone = len(figures["toolkits"]) == 1
    return f"{times(figures['ratios'][name])}, {NAMES[name]}" if name else "" if alone else PENDING


def times(ratio: dict) -> str:
    """The median of a ratio, and its smallest and largest rounds."""
    low, high = ratio["interval"]
    return f"{ratio['median']:.2f} ({low:.2f}–{high:.2f})"


def peers_rows(name: str = "train-multi30k") -> list[Row]:
    """The toolkits of one comparison, the fastest first, failed ones last."""
    result = load(name)
    if result is None:
        return [(NAMES[toolkit], PENDING, *("" for _ in PEERS_HEAD[2:])) for toolkit in NAMES]
    figures = result["figures"]
    found = figures["toolkits"]
    order = sorted(found, key=lambda toolkit: -found[toolkit].get("target_tokens_per_second", 0))
    rows: list[Row] = []
    for toolkit in order:
        one, version = found[toolkit], found[toolkit]["version"] or ""
        if "target_tokens_per_second" not in one:
            failure = f"failed: {one['error'].splitlines()[-1]}"
            rows.append((NAMES[toolkit], version, failure, *("" for _ in PEERS_HEAD[3:])))
            continue
        ratio = figures.get("ratios", {}).get(toolkit)
        rows.append(
            (
                NAMES[toolkit],
                version,
                f"{one['target_tokens_per_second']:,.0f}",
                f"{one['target_tokens_per_update']:,.0f}",
                f"{one['padding']:.1%}",
                f"{one['peak_mib']:,.0f} MiB",
                times(ratio) if ratio else "",
            )
        )
    return rows


def scale_rows() -> list[Row]:
    """The cost of training, one row for each size of the data set."""
    result = load("scale")
    if result is None:
        return [(PENDING, *("" for _ in SCALE_HEAD[1:]))]
    return [
        (
            f"{row['pairs']:,}",
            f"{row['cpu_microseconds_per_token']:.1f}",
            f"{row['share_waiting']:.2%}",
            f"{row['loader']['cpu_nanoseconds_per_token']:.0f}",
            f"{row['loader']['seconds_to_first_batch']:.2f} s",
            f"{row['own_mib']:,} MiB",
            f"{row['peak_mib']:,} MiB",
        )
        for row in result["figures"]["rows"]
    ]
