"""Writes the measured results in README.md and docs from bench/results: `python bench/readme.py`.

A table stands between `<!-- results: NAME -->` and `<!-- end -->`. What comes from the code is written by
docs/generate.py.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import alignment_tables
import cluster_tables
import first_day_tables
import gpu_suite
import gpu_translation_tables
import highlight_tables
import options_tables
import quality_tables
import recipe_tables
import speed_tables
import translation_tables
from claims import page as claims_page

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
PAGES = (README, *sorted((ROOT / "docs").glob("*.md")))
RESULTS = ROOT / "bench" / "results"


def load(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_bytes())


def source(result: dict) -> str:
    """Command, commit, date, machine and versions of a result, in one line."""
    versions = f"Python {result['python']}, torch {result['versions']['torch']}"
    machine = result.get("gpu") or f"{result['cores']} cores of {result['cpu']}"
    note = f" {result['note']}" if "note" in result else ""
    return f"`{result['command']}` at {result['commit']}, {result['date']}: {machine}, {versions}.{note}"


def phrasebook() -> str:
    result = load("phrasebook")
    figures, scores = result["figures"], result["figures"]["scores"]
    rows = [
        ("BLEU", f"{scores['bleu'][0]:.1f}", f"`{scores['bleu'][1]}`"),
        ("chrF", f"{scores['chrf'][0]:.1f}", f"`{scores['chrf'][1]}`"),
        ("exact matches", f"{figures['exact']:,}", f"of {figures['sentences']:,} held-out sentences"),
        ("training", f"{figures['training_tokens_per_second']:,}", "target tokens/s"),
        ("translation, beam 4", f"{figures['translating_tokens_per_second']:,}", "target tokens/s"),
        ("whole demo", f"{figures['demo_seconds']:.0f} s", "without the installation"),
    ]
    return table(("", "", ""), rows) + f"\n\n{source(result)}"


def prepare() -> str:
    results = sorted(
        (json.loads(path.read_bytes()) for path in RESULTS.glob("prepare-*.json")),
        key=lambda result: result["figures"]["pairs"],
    )
    rows = [
        (
            f"{figures['pairs']:,}",
            f"{figures['workers']}",
            f"{figures['pairs_per_second']:,}",
            f"{figures['pairs_per_cpu_second']:,}",
            f"{figures['peak_mib_all']:,} MiB",
        )
        for figures in (result["figures"] for result in results)
    ]
    head = ("pairs", "workers", "pairs/s", "pairs per CPU second", "peak memory, all processes")
    return table(head, rows) + "\n\n" + "\n".join(f"- {source(result)}" for result in results)


def multi30k() -> str:
    result = load("multi30k-short")
    figures = result["figures"]
    rows = [
        (
            "steps",
            f"{figures['steps']:,}",
            f"stopped by SIGTERM after {figures['stopped_and_resumed_at']:,}, resumed",
        ),
        ("from text to score", f"{figures['seconds']:.0f} s", "all commands"),
        *(
            (found["name"], f"{found['value']:.1f}", f"`{found['signature']}`")
            for found in figures["scores"].values()
        ),
    ]
    return table(("", "", ""), rows) + f"\n\n{source(result)}"


def training() -> str:
    rows = speed_tables.training_rows()
    return table(speed_tables.TRAINING_HEAD, rows) + sources(list(speed_tables.TRAINING))


def peers() -> str:
    return table(speed_tables.PEERS_HEAD, speed_tables.peers_rows())


def scale() -> str:
    return table(speed_tables.SCALE_HEAD, speed_tables.scale_rows()) + sources(["scale"])


def translation() -> str:
    result = translation_tables.result()
    measured = table(translation_tables.HEAD, translation_tables.rows())
    return measured + (f"\n\n- {source(result)}" if result else "")


def ssru() -> str:
    result = translation_tables.result("ssru")
    measured = table(translation_tables.SSRU_HEAD, translation_tables.ssru_rows())
    return measured + (f"\n\n- {source(result)}" if result else "")


def startup() -> str:
    path = RESULTS / "startup.json"
    if not path.exists():
        return "pending"
    result = load("startup")
    figures = result["figures"]
    rows = [
        (what, *(f"{figures[name][part]:.2f} s" for part in ("median", "least", "most")))
        for name, what in (
            ("fp32", "first translation after `import torch`"),
            ("int8", "the same in int8"),
            ("help", "`trmt --help`, whole process"),
        )
    ]
    rows.append(
        ("packing weights for int8, the first time", f"{figures['int8_packing']['seconds']:.2f} s", "", "")
    )
    return table(("", "median", "minimum", "maximum"), rows) + f"\n\n- {source(result)}"


def recipes() -> str:
    result = recipe_tables.load("recipes")
    if result is None:
        return "pending"
    rows = table(recipe_tables.RECIPES_HEAD, recipe_tables.recipe_rows(result))
    notes = "\n".join(f"- {each}" for each in recipe_tables.earlier_rows(result))
    return rows + listed(result, list(result["figures"]["rows"].values())) + "\n" + notes


def starts() -> str:
    result = recipe_tables.load("starts")
    if result is None:
        return "pending"
    rows = table(recipe_tables.STARTS_HEAD, recipe_tables.start_rows(result))
    return rows + listed(result, [seed for seeds in result["figures"]["starts"].values() for seed in seeds])


def listed(result: dict, runs: list[dict]) -> str:
    """Signatures and source of these runs."""
    return "\n\n" + "\n".join(f"- {line}" for line in [*recipe_tables.signatures(runs), source(result)])


def options() -> str:
    result = options_tables.result()
    if result is None:
        return "pending"
    measured = table(options_tables.HEAD, options_tables.rows(result))
    return f"{measured}\n\n- {source(result)}"


def alignment() -> str:
    result = alignment_tables.result()
    if result is None:
        return "pending"
    rates = table(alignment_tables.HEAD, alignment_tables.rows(result))
    heads = table(alignment_tables.HEADS_HEAD, alignment_tables.head_rows(result))
    notes = (alignment_tables.chosen(result), alignment_tables.made_with(result), source(result))
    return "\n\n".join((rates, heads, "\n".join(f"- {note}" for note in notes)))


def cluster_translate() -> str:
    return table(cluster_tables.RATES_HEAD, cluster_tables.rates("translate")) + sources(
        ["cluster-translate"]
    )


def cluster_prepare() -> str:
    return table(cluster_tables.PREPARE_HEAD, cluster_tables.prepare_rates()) + sources(["cluster-prepare"])


def cluster_plan() -> str:
    return table(cluster_tables.PLAN_HEAD, cluster_tables.plan()) + sources(["cluster-main"])


def first_day() -> str:
    result = first_day_tables.result()
    if result is None:
        return "pending"
    measured = table(first_day_tables.HEAD, first_day_tables.rows(result))
    return f"{measured}\n\n- {source(result)}"


def sources(names: list[str]) -> str:
    """The sources of those results that exist."""
    found = [result for name in names if (result := speed_tables.load(name))]
    return "\n\n" + "\n".join(f"- {source(result)}" for result in found) if found else ""


def quality() -> str:
    names = list(quality_tables.MULTI30K)
    head = ("training", "scoring", "metric", "test2016", "test2017", "mscoco", "seeds")
    return table(head, quality_tables.multi30k_rows()) + notes(names)


def corpora() -> str:
    head = ("corpus", "scoring", "dev BLEU", "test BLEU", "test chrF2", "training time", "target tokens/s")
    return table(head, quality_tables.corpora_rows()) + notes(["tatoeba", "laws"])


def gpu_translation() -> str:
    found = [source(result) for result in gpu_translation_tables.results().values()]
    measured = table(gpu_translation_tables.HEAD, gpu_translation_tables.rows())
    return "\n".join([measured, *([""] if found else []), *(f"- {line}" for line in found)])


def gpu() -> str:
    named = [(row.name, row.measures) for row in gpu_suite.ROWS]
    return table(("row", "measures", "result"), quality_tables.gpu_rows(named))


def notes(names: list[str]) -> str:
    """Signatures and sources of those results that exist."""
    found = [result for name in names if (result := quality_tables.load(name))]
    lines = quality_tables.signatures(names) + [source(result) for result in found]
    return "\n\n" + "\n".join(f"- {line}" for line in lines) if lines else ""


def claims() -> str:
    found, other = claims_page.result(), claims_page.result(claims_page.OTHER)
    if found is None:
        return "pending"
    sources = [f"- {source(result)}" for result in (found, other) if result]
    parts = [
        claims_page.count(found),
        table(*claims_page.overview(found, other)),
        claims_page.design(found),
        claims_page.sections(found),
        "## All systems",
        table(*claims_page.trained(found)),
        "\n".join(sources),
    ]
    return "\n\n".join(parts)


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    rows = [tuple(cell.replace("|", "\\|") for cell in row) for row in rows]
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def highlights() -> str:
    return table(highlight_tables.HEAD, highlight_tables.rows())


TABLES = {
    "highlights": highlights,
    "expectations": highlight_tables.expectations,
    "files": highlight_tables.files,
    "phrasebook": phrasebook,
    "prepare": prepare,
    "multi30k": multi30k,
    "training": training,
    "peers": peers,
    "scale": scale,
    "translation": translation,
    "ssru": ssru,
    "startup": startup,
    "options": options,
    "alignment": alignment,
    "cluster_translate": cluster_translate,
    "cluster_prepare": cluster_prepare,
    "cluster_plan": cluster_plan,
    "quality": quality,
    "recipes": recipes,
    "starts": starts,
    "first_day": first_day,
    "corpora": corpora,
    "gpu": gpu,
    "gpu_translation": gpu_translation,
    "claims": claims,
}


def generated(text: str) -> str:
    """A page with all its tables written anew."""

    def fill(match: re.Match[str]) -> str:
        return f"<!-- results: {match[1]} -->\n{TABLES[match[1]]()}\n<!-- end -->"

    return re.sub(r"<!-- results: (\w+) -->\n.*?<!-- end -->", fill, text, flags=re.DOTALL)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(generated(page.read_text(encoding="utf-8")), encoding="utf-8")
