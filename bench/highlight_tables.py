"""README's table of chosen results, the cost of a first training, and the files to read first."""

from __future__ import annotations

import json
from pathlib import Path

from speed_tables import NAMES, times

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
HEAD = ("what", "measured", "compared with")
# The files of the core that explain the others, in the order in which to read them.
FILES = {
    "trmt/nets/base.py": "what a network has to implement, and the state of decoding",
    "trmt/nets/transformer.py": "the Transformer, for training and decoding",
    "trmt/nets/kv_cache.py": "keys and values of the tokens decoded so far",
    "trmt/decoding/engine.py": "the decode loop, with continuous batching",
    "trmt/training/run.py": "the training loop",
    "trmt/bundles/bundles.py": "the files of a model",
}
ROUNDED_TO = 50  # lines
SHORT = "docs/networks.md#short-trainings-with-every-recipe"
BASE, TINY = "base (6+6 layers of 512, random weights)", "tiny (4+4 layers of 128)"
Row = tuple[str, str, str]


def load(name: str) -> dict:
    """The figures of one result."""
    figures: dict = json.loads((RESULTS / f"{name}.json").read_bytes())["figures"]
    return figures


def rows() -> list[Row]:
    """The chosen results."""
    return [demo(), training(), *translation(), resumed(), *data()]


def demo() -> Row:
    found = load("phrasebook")
    scores = found["scores"]
    return (
        "the demo, 2 CPU cores",
        f"BLEU {scores['bleu'][0]:.1f}, chrF {scores['chrf'][0]:.1f}",
        f"{found['exact']:,} of {found['sentences']:,} held-out sentences exactly right, "
        f"{found['demo_seconds']:.0f} s in all",
    )


def training() -> Row:
    """Speed and memory of training, compared with the fastest other toolkit."""
    found = load("train-multi30k")
    ours, rival = found["toolkits"]["trmt"], found["fastest_peer"]
    theirs, name = found["toolkits"][rival], NAMES[rival]
    others = sum("target_tokens_per_second" in each for each in found["toolkits"].values()) - 1
    return (
        "training, 3+3 layers of 256, fp32, 2 CPU cores",
        cost(ours),
        f"{times(found['ratios'][rival])} times {name} {theirs['version']}, the fastest of {others} toolkits "
        f"({theirs['peak_mib']:,.0f} MiB)",
    )


def translation() -> list[Row]:
    """Speed and memory of translation, compared with other programs; the last row is the worst case."""
    points = load("translate")["points"]
    shown = {
        f"translation, {BASE}, int8": points["base/int8/16/beam/1"],
        f"translation, {BASE}, fp32": points["base/fp32/16/beam/1"],
        f"translation, {TINY}, fp32": points["trained/fp32/16/beam/1"],
    }
    made = [
        (f"{name}, beam 4, batch 16, 1 thread", cost(point["engines"]["trmt"]), compared(point))
        for name, point in shown.items()
    ]
    worst_name, worst = min(points.items(), key=lambda item: item[1]["ratios"]["ctranslate2"]["median"])
    network, precision, batch, search, threads = worst_name.split("/")
    network = {"trained": TINY, "base": BASE}.get(network, network)
    batch = "whole file" if batch == "whole" else f"batch {batch}"
    what = f"{network}, {precision}, {search}, {batch}, {threads} thread{'s' * (threads != '1')}"
    name = f"the slowest of {len(points)} such measurements: {what}"
    return [*made, (name, cost(worst["engines"]["trmt"]), compared(worst))]


def cost(figures: dict) -> str:
    """Speed and peak memory."""
    return f"{figures['target_tokens_per_second']:,.0f} target tokens/s, {figures['peak_mib']:,.0f} MiB"


def compared(point: dict) -> str:
    """The speed relative to other programs, and their peak memory."""
    names = {"ctranslate2": "CTranslate2", "transformers": "Hugging Face"}
    return ", ".join(
        f"{times(ratio)} times {names[engine]} ({point['engines'][engine]['peak_mib']:,.0f} MiB)"
        for engine, ratio in point["ratios"].items()
    )


def resumed() -> Row:
    found = load("multi30k-short")
    stopped = found["stopped_and_resumed_at"]
    return (
        f"Multi30k, {found['steps']} steps, stopped by SIGTERM after {stopped} and resumed",
        f"{found['seconds']:.0f} s from text to score",
        "equal to an uninterrupted run: tests/test_resume_check.py",
    )


def data() -> list[Row]:
    """Preparing data and training on it, at the largest size."""
    prepared = load("prepare-10000000")
    few, *_, many = load("scale")["rows"]
    return [
        (
            f"preparing {prepared['pairs']:,} pairs with {prepared['workers']} workers",
            f"{prepared['pairs_per_second']:,} pairs/s",
            f"{prepared['peak_mib_all']:,} MiB peak memory of all processes",
        ),
        (
            f"training on {many['pairs']:,} pairs: share of the time spent waiting for data",
            f"{many['share_waiting']:.2%}",
            f"{many['own_mib']:,} MiB of memory; with {few['pairs']:,} pairs {few['own_mib']:,} MiB",
        ),
    ]


def expectations() -> str:
    """What a first training takes and reaches, in sentences."""
    first, short = load("phrasebook"), load("multi30k-short")
    tiny = load("recipes")["rows"]["transformer-tiny"]
    bleu = first["scores"]["bleu"][0], tiny["scores"]["bleu"]["value"], short["scores"]["bleu"]["value"]
    return (
        f"On two CPU cores, the demo's recipe ({first['parameters'] / 1e6:.1f}M parameters) trains for "
        f"{first['training_seconds']:.0f} s and reaches BLEU {bleu[0]:.1f} on the demo's small language. "
        f"`transformer-tiny`, with settings for a [short training]({SHORT}), reaches BLEU {bleu[1]:.1f} "
        f"there in {tiny['seconds']:.0f} s on one core. On Multi30k, {short['steps']} training steps and all "
        f"other commands take {short['seconds']:.0f} s and reach BLEU {bleu[2]:.1f}, which is far from "
        "convergence."
    )


def files() -> str:
    """The files to read first, with their numbers of lines."""
    lines = []
    for name, what in FILES.items():
        count = len((ROOT / name).read_text(encoding="utf-8").splitlines())
        about = max(round(count / ROUNDED_TO), 1) * ROUNDED_TO
        short = name.removeprefix("trmt/")
        lines.append(f"{len(lines) + 1}. [{short}]({name}), about {about} lines: {what}")
    return "\n".join(lines)
