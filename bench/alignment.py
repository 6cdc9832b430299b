"""Measures links of words: `python bench/alignment.py WORK --corpus CORPUS --gold GOLD --from de --to en`.

CORPUS and GOLD are prefixes of a file for each language, .gz or not; GOLD.align.gz holds the links that
people found. The corpus is made as the gold text is, lowercased and cut into words by Moses. In both
directions a small Transformer is trained on the same pairs with the same steps, once as it is and once with
one head that is taught the links that counting finds in these pairs. What is measured is the alignment error
rate of each, per direction and symmetrised, beside that of counting alone.

Every stage leaves its result in WORK and is not done twice, so that a stopped run goes on.
"""

from __future__ import annotations

import argparse
import gzip
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from moses import tokenised
from provenance import RESULTS, record
from trmt.alignment.aligning_streams import AlignOptions, align_corpus, build_aligner, judge_looks
from trmt.alignment.linking import Aligner, AttentionAligner, BothWays, Pair
from trmt.alignment.symmetrising import METHODS
from trmt.files import atomic_file
from trmt.preparing import PrepareOptions, prepare
from trmt.runs.planning import TrainOptions
from trmt.saved import bundles
from trmt.saved.checkpoints import find_bundle, steps
from trmt.sets.shards import PreparedSet
from trmt.text.corpus import lines
from trmt.text.links import Agreement, judged, parsed_gold, turned
from trmt.tokenizing import TokenizerOptions, train_tokenizer
from trmt.training import train

SIZE = 8000  # pieces
RECIPE = "transformer-tiny"
WEIGHT = 0.5  # of the guided head's loss
METHOD = "grow-diag-final-and"


def once(path: Path, make: Callable[[Path], object]) -> Path:
    """The path, which `make` has written unless it was there."""
    if not path.exists():
        make(path)
    return path


def cut_text(given: argparse.Namespace, language: str, path: Path) -> None:
    found = given.corpus.with_name(f"{given.corpus.name}.{language}")
    raw = [*lines(found if found.exists() else f"{found}.gz")]
    count = min(given.pairs, len(raw))
    raw = [raw[number * len(raw) // count] for number in range(count)]
    with atomic_file(path) as stream:
        stream.write("".join(f"{line}\n" for line in tokenised(raw, language)).encode())


def prepared(given: argparse.Namespace) -> dict[str, Path]:
    """The set of each direction that is wanted, with the links that counting finds."""
    work, languages = given.work, (given.source, given.target)
    texts = [
        once(work / f"text.{language}", lambda path, language=language: cut_text(given, language, path))
        for language in languages
    ]
    corpus = {"there": ",".join(map(str, texts)), "back": ",".join(map(str, texts[::-1]))}
    sets = {}
    ways = {"there": languages, "back": languages[::-1]}
    for name, pair in list(ways.items())[: 1 if given.one_way else 2]:
        tokenizer = work / f"tokenizer-{name}"
        options = TokenizerOptions(corpora=(corpus[name],), languages=pair, size=SIZE)
        once(tokenizer, lambda path, options=options: train_tokenizer(options, out=path))
        common = {"train": (corpus[name],), "tokenizer": tokenizer, "workers": 1}
        plain = prepare(PrepareOptions(out=work / f"plain-{name}", **common)).folder
        links = once(
            work / f"{name}.align",
            lambda path, plain=plain, name=name: write_links(plain, corpus[name], path),
        )
        options = PrepareOptions(out=work / f"set-{name}", alignments=(str(links),), **common)
        sets[name] = prepare(options).folder
    return sets


def write_links(folder: Path, corpus: str, path: Path) -> None:
    aligner = build_aligner(AlignOptions(counts=folder, method=METHOD))
    with atomic_file(path) as stream:
        align_corpus(aligner, corpus, stream)


def trained(given: argparse.Namespace, sets: dict[str, Path]) -> dict[str, Path]:
    """The bundle of each network."""
    made = {}
    for direction, folder in sets.items():
        for kind, settings in networks().items():
            run = given.work / f"run-{kind}-{direction}"
            found = steps(run)
            if not found or found[-1].step < given.steps:
                every = [f"training.steps={given.steps}", f"validation.every={given.steps}"]
                every += ["validation.metric=loss", "validation.sentences=0", "training.save_every=100"]
                options = TrainOptions(run=run, data=folder, recipe=RECIPE, settings=[*every, *settings])
                train(options)
            made[f"{kind}-{direction}"] = find_bundle(run)
    return made


def networks() -> dict[str, list[str]]:
    guided = [f"loss.alignment_weight={WEIGHT}", "loss.alignment_shift=true"]
    return {"plain": [], "guided": guided}


def figures_of(seen: Agreement) -> dict[str, Any]:
    return {
        "aer": round(seen.error_rate, 4),
        "precision": round(seen.precision, 4),
        "recall": round(seen.recall, 4),
        "links": seen.found,
    }


def measured(there: Aligner, back: Aligner | None, some: Sequence[Pair], gold: Path) -> dict[str, Any]:
    """The figures of one direction, or of two and of both made one."""
    known = [parsed_gold(line, where=str(gold)) for line in lines(gold)]
    found = {"there": there.links(some)}
    if back:
        found["back"] = [turned(each) for each in back.links([pair[::-1] for pair in some])]
        for name, join in METHODS.items():
            found[name] = [join(*pair) for pair in zip(found["there"], found["back"], strict=True)]
    return {name: figures_of(judged(links, known)) for name, links in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure links of words against gold.")
    parser.add_argument("work", type=Path, help="a folder for what is made on the way")
    parser.add_argument("--corpus", type=Path, required=True, help="prefix of the training text")
    parser.add_argument("--gold", type=Path, required=True, help="prefix of the gold text and its links")
    parser.add_argument("--from", dest="source", required=True)
    parser.add_argument("--to", dest="target", required=True)
    parser.add_argument("--pairs", type=int, default=50_000, help="of the corpus, spread over all of it")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--one-way", action="store_true", help="train no network of the other direction")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the folder of the result")
    given = parser.parse_args()
    torch.set_num_threads(1)
    given.work.mkdir(parents=True, exist_ok=True)
    gold, *sides = (
        given.gold.with_name(f"{given.gold.name}.{ending}.gz")
        for ending in ("align", given.source, given.target)
    )
    texts = [gzip.decompress(side.read_bytes()).decode().split("\n")[:-1] for side in sides]
    some = list(zip(*texts, strict=True))
    sets = prepared(given)
    counting = build_aligner(AlignOptions(counts=sets["there"]))
    assert isinstance(counting, BothWays)
    figures: dict[str, Any] = {"counting": measured(counting.forward, counting.backward, some, gold)}
    made = trained(given, sets)
    for kind in networks():
        there, *back = (AttentionAligner.load(made[f"{kind}-{way}"]) for way in sets)
        figures[kind] = measured(there, back[0] if back else None, some, gold)
        looks = judge_looks(there, some, gold)
        figures[kind]["looks"] = [
            {
                "layer": look.layer + 1,
                "head": look.head,
                "shift": look.shift,
                "aer": round(seen.error_rate, 4),
            }
            for look, seen in looks
        ]
    figures["made_with"] = {
        "pairs": len(PreparedSet.open(sets["there"]).split("train")),
        "recipe": RECIPE,
        "steps": given.steps,
        "target_tokens": bundles.read_manifest(made["plain-there"]).training["target_tokens"],
        "weight": WEIGHT,
        "languages": [given.source, given.target],
        "gold_pairs": len(some),
    }
    names = {
        "--from": given.source,
        "--to": given.target,
        "--pairs": str(given.pairs),
        "--steps": str(given.steps),
    }
    rest = shlex.join([word for pair in names.items() for word in pair] + ["--one-way"] * given.one_way)
    command = f"python bench/alignment.py WORK --corpus CORPUS --gold {given.gold.name} {rest}"
    print(record("alignment", figures, command=command, folder=given.out))


if __name__ == "__main__":
    main()
