"""The end of the demo: translate the held-out sentences with the averaged model, score them, report.

python data/demo_report.py models/demo [--json figures.json]
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from trmt import console
from trmt.scoring import read_sentences, score
from trmt.translating import Translator

HELD_OUT = Path(__file__).parent / "phrasebook"
REQUIRED_BLEU = 90.0  # a closed little language: anything lower is a bug
SHOWN = 8


def main() -> None:
    parser = argparse.ArgumentParser(description="Translate and score the held-out phrasebook.")
    parser.add_argument("run", type=Path, help="the run folder whose average is tried")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    arguments = parser.parse_args()
    sources, references = (read_sentences(HELD_OUT / f"test.{language}") for language in ("en", "de"))
    translator = Translator.load(arguments.run)
    began = time.perf_counter()
    translations = [translation.text for translation in translator.translate(sources)]
    seconds = time.perf_counter() - began
    figures = measure(arguments.run, translator, translations, seconds)
    scores = score(translations, [references])
    figures["scores"] = {name: [found.value, found.signature] for name, found in scores.items()}
    figures["exact"] = sum(map(str.__eq__, translations, references))
    figures["sentences"] = len(sources)
    show(arguments.run, sources, translations, figures)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    if scores["bleu"].value < REQUIRED_BLEU:
        console.fail(
            f"BLEU {scores['bleu'].value:.1f} is below {REQUIRED_BLEU}; this is a bug, please report it"
        )
        raise SystemExit(1)


def measure(run: Path, translator: Translator, translations: list[str], seconds: float) -> dict[str, object]:
    log = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    speeds = [entry["tokens_per_second"] for entry in log if entry["event"] == "train"]
    tokens = sum(map(len, translator.tokenizer.target.encode(translations)))
    return {
        "parameters": next(entry["parameters"] for entry in log if "parameters" in entry),
        "training_seconds": next(entry["seconds"] for entry in log if entry["event"] == "end"),
        "training_tokens_per_second": round(sum(speeds) / len(speeds)),
        "translating_tokens_per_second": round(tokens / seconds),
        "translating_sentences_per_second": round(len(translations) / seconds),
    }


def show(run: Path, sources: list[str], translations: list[str], figures: dict) -> None:
    step = len(sources) // SHOWN
    pairs = [[source, text] for source, text in zip(sources[::step], translations[::step], strict=True)]
    console.table("Sentences it never saw", ["English", "German"], pairs[:SHOWN])
    scores = figures["scores"]
    rows = [
        ["BLEU", f"{scores['bleu'][0]:.2f}", scores["bleu"][1]],
        ["chrF", f"{scores['chrf'][0]:.2f}", scores["chrf"][1]],
        ["word for word right", f"{figures['exact']}", f"of {figures['sentences']} held-out sentences"],
        ["training", f"{figures['training_tokens_per_second']:,}", "target tokens/s"],
        ["translating, beam 4", f"{figures['translating_tokens_per_second']:,}", "target tokens/s"],
        ["model", str(run / "average"), f"{figures['parameters'] / 1e6:.1f}M parameters"],
    ]
    console.table("The demo", ["what", "how much", "how measured"], rows)
    console.say("now try:  echo 'The museum opens at half past nine.' | .venv/bin/trmt translate")


if __name__ == "__main__":
    main()
