"""Trains the little Transformer of the phrasebook with each of its options, for a few hundred steps.

    python bench/options.py [NAME ...]

What is in the result file already stays, so that a run can be stopped and gone on with. So few steps tell how
fast an option learns at first; they are no comparison of what options reach in the end.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from provenance import RESULTS, ROOT, record

STEPS = 200
SHARED = (
    "network.encoder_layers=2",
    "network.decoder_layers=2",
    "optim.warmup=100",
    f"training.steps={STEPS}",
    f"validation.every={STEPS}",
    "validation.sentences=250",
)
CONCATENATE = ("architecture=transformer-concatenated", "network.position_columns=32")
# Beside the recipe: sinusoidal positions, layer norm before sublayers, 4 heads.
OPTIONS: dict[str, tuple[str, ...]] = {
    "base": (),
    "none": ("architecture=transformer-no-positions",),
    "learned": ("network.positions=learned",),
    "complex": ("architecture=transformer-complex",),
    "rotary": ("network.positions=rotary",),
    "relative": ("architecture=transformer-relative",),
    "t5": ("architecture=transformer-t5",),
    "alibi": ("architecture=transformer-alibi",),
    "sinusoidal-beside": CONCATENATE,
    "learned-beside": ("network.positions=learned", *CONCATENATE),
    "post": ("network.norm_position=post",),
    "rms": ("network.norm=rms",),
    "batch": ("architecture=transformer-batch-norm",),
    "no-residual": ("architecture=transformer-no-residual",),
    "no-scale": ("architecture=transformer-unscaled",),
    "one-head": ("network.heads=1",),
    "sixteen-heads": ("network.heads=16",),
    "same": ("architecture=transformer-same-layer",),
    "gumbel": ("architecture=transformer-hard",),
    "sampled": ("architecture=transformer-hard", "network.cross_attention=sampled"),
}
NAME = "options"


def main() -> None:
    parser = argparse.ArgumentParser(description="Train with each option of the Transformer.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"some of {', '.join(OPTIONS)}")
    names = parser.parse_args().names or list(OPTIONS)
    with tempfile.TemporaryDirectory() as work:
        for name in names:
            found = known()
            if found.get(name, {}).get("settings") == settings(name):
                continue
            prepare(Path(work))
            found[name] = {"settings": settings(name), **learned(Path(work), name)}
            ordered = {each: found[each] for each in OPTIONS if each in found}
            print(record(NAME, {"steps": STEPS, "options": ordered}, command="python bench/options.py"))


def known() -> dict:
    """What has been measured."""
    path = RESULTS / f"{NAME}.json"
    return json.loads(path.read_bytes())["figures"]["options"] if path.exists() else {}


def settings(name: str) -> list[str]:
    return [*SHARED, *OPTIONS[name]]


def trmt(*words: str, cwd: Path) -> None:
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "trmt", "--quiet", *words]
    subprocess.run(command, cwd=cwd, env=os.environ | {"PYTHONPATH": path}, check=True)


def prepare(work: Path) -> None:
    """The phrasebook as the demo prepares it, once."""
    if (work / "texts").exists():
        return
    subprocess.run([sys.executable, str(ROOT / "data" / "phrasebook.py"), "texts"], cwd=work, check=True)
    texts = ("--train", "texts/train")
    trmt("tokenizer", *texts, "--from", "en", "--to", "de", "--size", "2400", cwd=work)
    trmt("prepare", *texts, "--dev", "texts/dev", cwd=work)


def learned(work: Path, name: str) -> dict:
    """Train, and what translations of the dev set score in the end."""
    run = work / "models" / name
    words = [word for setting in settings(name) for word in ("--set", setting)]
    began = time.perf_counter()
    trmt("train", str(run), "--recipe", "phrasebook", *words, cwd=work)
    seconds = time.perf_counter() - began
    events = map(json.loads, (run / "log.jsonl").read_text(encoding="utf-8").splitlines())
    scores = [event["scores"] for event in events if event["event"] == "validate"][-1]
    by_metric = {score["metric"]: score for score in scores}
    return {
        "bleu": round(by_metric["bleu"]["value"], 2),
        "signature": by_metric["bleu"]["signature"],
        "loss": round(by_metric["loss"]["value"], 4),
        "seconds": round(seconds, 1),
    }


if __name__ == "__main__":
    main()
