"""Measures links of words: how far those of networks, and of counting, are from what people found.

    python bench/alignment.py WORK --corpus CORPUS --test TEST --gold GOLD --from de --to en

CORPUS, TEST and GOLD are prefixes of a file for each language, .gz or not; GOLD.align.gz holds the links that
people found. The corpus is made as the gold text is, lowercased and cut into words by Moses. In both
directions a small Transformer is trained on the same pairs with the same steps, once as it is and once with
one head that is taught the links that counting finds in these pairs. What is measured is the alignment error
rate of each, per direction and symmetrised, beside that of counting alone; that of every layer and head, and
which of them agrees best with counting, which needs no gold; and how well the networks translate TEST, which
is of the corpus.

Every stage leaves its result in WORK and is not done twice, so that a stopped run goes on.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moses import escaped, tokenised
from provenance import RESULTS, record
from trmt.bundles import bundles
from trmt.bundles.checkpoints import find_bundle, list_checkpoints
from trmt.insight.alignment.aligners import (
    Aligner,
    AttentionAligner,
    HeadOptions,
    SymmetrisedAligner,
    TextPair,
)
from trmt.insight.alignment.pipeline import AlignOptions, align_corpus, build_aligner, rank_heads
from trmt.insight.alignment.symmetrisation import METHODS
from trmt.scoring import ScoreOptions, score
from trmt.sets.preparing import PrepareOptions, prepare
from trmt.sets.shards import PreparedSet
from trmt.storage.files import atomic_file
from trmt.text.lines import read_lines
from trmt.text.links import AlignmentScore, format_links, parse_gold, reverse_links, score_corpus
from trmt.text.tokenizer_training import TokenizerOptions, train_tokenizer
from trmt.training.planning import TrainOptions
from trmt.training.run import train
from trmt.translating import TranslateOptions, Translator

SIZE = 8000  # pieces
RECIPE = "transformer-tiny"
# Many small steps that end at a rate of 0 make most of a short training.
SETTINGS = ("batches.tokens=1024", "optim.schedule=cosine", "network.dropout=0.1")
WEIGHT = 0.5  # of the guided head's loss
TESTED = 500  # pairs of the test that are linked; all are translated
METHOD = "grow-diag-final-and"

Figures = dict[str, Any]


def once(path: Path, make: Callable[[Path], object]) -> Path:
    """The path, which `make` has written unless it was there."""
    if not path.exists():
        make(path)
    return path


def corpus_lines(prefix: Path, language: str) -> list[str]:
    found = prefix.with_name(f"{prefix.name}.{language}")
    return [*read_lines(found if found.exists() else Path(f"{found}.gz"))]


def write_lines(path: Path, text: Iterable[str]) -> None:
    with atomic_file(path) as stream:
        stream.write("".join(f"{line}\n" for line in text).encode())


def cut_text(given: argparse.Namespace, language: str, path: Path) -> None:
    raw = corpus_lines(given.corpus, language)
    count = min(given.pairs, len(raw))
    raw = [raw[number * len(raw) // count] for number in range(count)]
    write_lines(path, tokenised(raw, language))


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
        common = {"train": (corpus[name],), "tokenizer": tokenizer, "dev_size": 0, "workers": 1}
        plain = prepare(PrepareOptions(out=work / f"plain-{name}", **common)).folder
        links = once(
            work / f"{name}.align",
            lambda path, plain=plain, name=name: write_links(plain, corpus[name], path),
        )
        options = PrepareOptions(out=work / f"set-{name}", alignments=(str(links),), **common)
        sets[name] = prepare(options).folder
    return sets


def write_links(folder: Path, corpus: str, path: Path) -> None:
    aligner = build_aligner(AlignOptions(model1=folder, method=METHOD))
    with atomic_file(path) as stream:
        align_corpus(aligner, corpus, stream)


def trained(given: argparse.Namespace, sets: dict[str, Path]) -> dict[str, Path]:
    """The bundle of each network."""
    made = {}
    for direction, folder in sets.items():
        for kind, settings in networks().items():
            run = given.work / f"run-{kind}-{direction}"
            found = list_checkpoints(run)
            if not found or found[-1].step < given.steps:
                every = [f"training.steps={given.steps}", f"validation.every={given.steps}"]
                every += ["validation.metric=loss", "validation.sentences=0", "training.save_every=100"]
                every += [*SETTINGS, *settings]
                options = TrainOptions(run=run, data=folder, recipe=RECIPE, settings=every)
                train(options)
            made[f"{kind}-{direction}"] = find_bundle(run)
    return made


def networks() -> dict[str, list[str]]:
    guided = [f"loss.alignment_weight={WEIGHT}", "loss.alignment_shift=true"]
    return {"plain": [], "guided": guided}


def figures_of(seen: AlignmentScore) -> Figures:
    return {
        "aer": round(seen.error_rate, 4),
        "precision": round(seen.precision, 4),
        "recall": round(seen.recall, 4),
        "links": seen.found,
    }


@dataclass(frozen=True)
class Compared:
    """Pairs, and a file of the links that those of a network are compared with."""

    pairs: list[TextPair]
    links: Path


@dataclass(frozen=True)
class Direction:
    """What links of one direction are compared with."""

    gold: Compared
    counted: Compared  # the same pairs
    test: Compared  # pairs like those of the corpus, counted too


def directions(given: argparse.Namespace, counting: SymmetrisedAligner) -> dict[str, Direction]:
    """The gold text, its words written as those of the corpus are, and the test, from both sides."""
    languages = (given.source, given.target)
    named = [given.gold.with_name(f"{given.gold.name}.{name}.gz") for name in languages]
    some = list(zip(*(map(escaped, read_lines(side)) for side in named), strict=True))
    cut = [tokenised(corpus_lines(given.test, name)[:TESTED], name) for name in languages]
    test = list(zip(*cut, strict=True))
    gold = given.gold.with_name(f"{given.gold.name}.align.gz")
    back = turned_gold(gold, given.work / "gold-back.align")

    made = {}
    for way, links, step in (("there", gold, 1), ("back", back, -1)):
        counted = []
        for name, pairs in (("counted", some), ("counted-test", test)):
            path = given.work / f"{name}-{way}.align"
            found = counting.links(pairs)
            write_lines(path, map(format_links, found if step == 1 else map(reverse_links, found)))
            counted.append(Compared([pair[::step] for pair in pairs], path))
        made[way] = Direction(Compared(counted[0].pairs, links), *counted)
    return made


def turned_gold(gold: Path, out: Path) -> Path:
    """The same links seen from the other side, in a file of their own."""
    known = [parse_gold(line, where=str(gold)) for line in read_lines(gold)]
    both = (
        (format_links(reverse_links(each.sure)), format_links(reverse_links(each.possible))) for each in known
    )
    write_lines(out, (f"{sure} {possible.replace('-', 'p')}" for sure, possible in both))
    return out


def rates(aligners: dict[str, Aligner], ways: dict[str, Direction]) -> Figures:
    """The figures of one direction, or of two and of both made one."""
    known = [parse_gold(line, where="gold") for line in read_lines(ways["there"].gold.links)]
    found = {way: aligner.links(ways[way].gold.pairs) for way, aligner in aligners.items()}
    if "back" in found:
        found["back"] = [reverse_links(each) for each in found["back"]]
        for name, join in METHODS.items():
            found[name] = [join(*pair) for pair in zip(found["there"], found["back"], strict=True)]
    return {name: figures_of(score_corpus(links, known)) for name, links in found.items()}


def looks(aligner: AttentionAligner, way: Direction) -> list[Figures]:
    """The error rate of every look against gold, and beside it those against counting."""
    compared = {"aer": way.gold, "from_counting": way.counted, "test_from_counting": way.test}
    found = {name: dict(rank_heads(aligner, each.pairs, each.links)) for name, each in compared.items()}
    return [
        {"layer": look.layer + 1, "head": look.head, "shift": look.shift}
        | {name: round(seen[look].error_rate, 4) for name, seen in found.items()}
        for look in found["aer"]
    ]


def chosen_look(seen: list[Figures]) -> HeadOptions:
    """The look that agrees best with counting."""
    best = min(seen, key=lambda look: look["from_counting"])
    head = None if best["head"] is None else best["head"] + 1
    return HeadOptions(layer=best["layer"], head=head, shift=bool(best["shift"]))


def bleu(bundle: Path, test: Path, languages: TextPair) -> float:
    """Of the test in the form of the corpus: lowercased words as Moses cuts them."""
    source, target = (tokenised(corpus_lines(test, language), language) for language in languages)
    translator = Translator.load(bundle, options=TranslateOptions(beam=4, device="cpu"))
    found = [each.text for each in translator.translate(source)]
    options = ScoreOptions(metrics=("bleu",), tokenize="none")
    return round(score(found, [target], options=options)["bleu"].value, 2)


def figures(given: argparse.Namespace) -> Figures:
    """All that is measured, and what it was measured on."""
    sets = prepared(given)
    counting = build_aligner(AlignOptions(model1=sets["there"]))
    assert isinstance(counting, SymmetrisedAligner)
    ways = directions(given, counting)
    found: Figures = {"counting": rates({"there": counting.forward, "back": counting.backward}, ways)}
    made = trained(given, sets)
    for kind in networks():
        places = {way: made[f"{kind}-{way}"] for way in sets}
        aligners = {way: AttentionAligner.load(place) for way, place in places.items()}
        found[kind] = rates(aligners, ways)
        seen = {way: looks(aligner, ways[way]) for way, aligner in aligners.items()}
        found[kind]["looks"] = seen
        if kind == "plain":
            chosen = {way: AttentionAligner.load(places[way], chosen_look(seen[way])) for way in sets}
            found["chosen"] = rates(chosen, ways)
        found[kind]["bleu"] = {
            way: bleu(places[way], given.test, aligner.languages) for way, aligner in aligners.items()
        }
    found["made_with"] = {
        "pairs": len(PreparedSet.open(sets["there"]).split("train")),
        "recipe": RECIPE,
        "steps": given.steps,
        "settings": SETTINGS,
        "target_tokens": bundles.read_manifest(made["plain-there"]).training["target_tokens"],
        "weight": WEIGHT,
        "languages": [given.source, given.target],
        "gold_pairs": len(ways["there"].gold.pairs),
        "pieces": SIZE,
    }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure links of words against gold.")
    parser.add_argument("work", type=Path, help="a folder for what is made on the way")
    parser.add_argument("--corpus", type=Path, required=True, help="prefix of the training text")
    parser.add_argument("--gold", type=Path, required=True, help="prefix of the gold text and its links")
    parser.add_argument("--test", type=Path, required=True, help="prefix of a test of the corpus")
    parser.add_argument("--from", dest="source", required=True)
    parser.add_argument("--to", dest="target", required=True)
    parser.add_argument("--pairs", type=int, default=50_000, help="of the corpus, spread over all of it")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--one-way", action="store_true", help="train no network of the other direction")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the folder of the result")
    given = parser.parse_args()
    torch.set_num_threads(1)
    given.work.mkdir(parents=True, exist_ok=True)
    words = ["--from", given.source, "--to", given.target]
    words += ["--pairs", str(given.pairs), "--steps", str(given.steps)] + ["--one-way"] * given.one_way
    command = f"python bench/alignment.py WORK --corpus CORPUS --test TEST --gold {given.gold.name}"
    print(record("alignment", figures(given), command=f"{command} {shlex.join(words)}", folder=given.out))


if __name__ == "__main__":
    main()
