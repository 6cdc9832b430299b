"""The texts of a seed: short sentences of a corpus, some of them in a row as one example.

What is put in a row has as many sentences as wanted, so the same words come in examples of every length, and
length is the only thing that changes. Each seed draws anew, so that an interval over seeds holds the luck of
the data beside that of the first weights; all systems of a seed have the same.
"""

from __future__ import annotations

import gzip
import random
import sys
from collections.abc import Sequence
from pathlib import Path

from claims.scale import Scale
from provenance import ROOT

Pair = tuple[str, str]
LANGUAGES = ("en", "de")
HELD_OUT = ("test_2016_flickr", "test_2017_flickr", "test_2017_mscoco")  # of Multi30k
DOCUMENT = 4  # lines of a document of the text to pretrain on


def name_of(sentences: int) -> str:
    """What the test set is called whose examples have so many sentences."""
    return f"test-{sentences}"


def write(folder: Path, scale: Scale, seed: int, corpus: Path | None) -> None:
    """Write everything that is trained on and tested with, line by line; `folder` must be new."""
    rng = random.Random(seed)
    known, held_out = _phrasebook(scale.templates, seed) if scale.templates else _multi30k(corpus)
    train = [in_a_row(known, 1 + rng.randrange(scale.joined), rng) for _ in range(scale.examples)]
    folder.mkdir(parents=True)
    _write(folder, "train", train)
    _write(folder, "little", train[: scale.little])
    for sentences in (*scale.shorter, *scale.longer):
        _write(folder, name_of(sentences), [in_a_row(held_out, sentences, rng) for _ in range(scale.tests)])
    _write_documents(folder / "documents.en", [source for source, _ in train])


def in_a_row(pairs: Sequence[Pair], count: int, rng: random.Random) -> Pair:
    """Sentences, none of them twice, as one example."""
    chosen = rng.sample(pairs, count)
    return " ".join(source for source, _ in chosen), " ".join(target for _, target in chosen)


def read(folder: Path, name: str) -> tuple[list[str], list[str]]:
    """Both sides of a set."""
    source, target = (_lines(folder, f"{name}.{language}") for language in LANGUAGES)
    return source, target


def _phrasebook(count: int, seed: int) -> tuple[list[Pair], list[Pair]]:
    """Sentences of the first templates: those to train on, and those with new combinations of words."""
    sys.path.insert(0, str(ROOT / "data"))
    import phrasebook

    found: dict[str, list[Pair]] = {"train": [], "test": []}
    for template in phrasebook.templates()[:count]:
        drawn = phrasebook.combinations(template, seed)
        for name, pairs in found.items():
            pairs += [phrasebook.render(template, words) for words in drawn[name]]
    known = phrasebook.words_of(found["train"])
    return found["train"], [pair for pair in found["test"] if phrasebook.words_of([pair]) <= known]


def _multi30k(corpus: Path | None) -> tuple[list[Pair], list[Pair]]:
    assert corpus, "a scale without templates needs a corpus"
    return _pairs(corpus, "train"), [pair for name in HELD_OUT for pair in _pairs(corpus, name)]


def _pairs(corpus: Path, name: str) -> list[Pair]:
    source, target = (_lines(corpus, f"{name}.{language}") for language in LANGUAGES)
    return list(zip(source, target, strict=True))


def _lines(corpus: Path, name: str) -> list[str]:
    plain, packed = corpus / name, corpus / f"{name}.gz"
    data = plain.read_bytes() if plain.exists() else gzip.decompress(packed.read_bytes())
    return data.decode().removesuffix("\n").split("\n")


def _write(folder: Path, name: str, pairs: Sequence[Pair]) -> None:
    for side, language in enumerate(LANGUAGES):
        text = "".join(f"{pair[side]}\n" for pair in pairs)
        (folder / f"{name}.{language}").write_text(text, encoding="utf-8")


def _write_documents(path: Path, lines: Sequence[str]) -> None:
    documents = ["\n".join(lines[at : at + DOCUMENT]) for at in range(0, len(lines), DOCUMENT)]
    path.write_text("\n\n".join(documents) + "\n", encoding="utf-8")
