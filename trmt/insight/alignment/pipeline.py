"""The steps of `trmt align`: build an aligner, align a stream or a corpus, and evaluate against gold links.

A blank or broken line gets no links, is reported, and does not stop the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import BinaryIO

from trmt import console
from trmt.config import Options
from trmt.errors import ConfigError, DataError
from trmt.insight.alignment.aligners import (
    Aligner,
    AttentionAligner,
    AttentionHead,
    HeadOptions,
    Model1Aligner,
    SymmetrisedAligner,
    TextPair,
    all_heads,
    attention_links,
)
from trmt.insight.alignment.ibm_model1 import Model1
from trmt.insight.alignment.symmetrisation import METHODS
from trmt.registry import suggestion
from trmt.sets.shards import PreparedSet
from trmt.streaming import BOM, LineReader, decode_line
from trmt.text.corpus import parse_corpus
from trmt.text.lines import read_lines
from trmt.text.links import (
    NO_LINKS,
    AlignmentScore,
    GoldAlignment,
    Links,
    check_range,
    format_links,
    parse_gold,
    parse_links,
    score_corpus,
    score_links,
)
from trmt.text.pairs import read_corpus
from trmt.text.tokenizer import Tokenizer

BATCH_PAIRS = 1024  # pairs of a corpus that are aligned together


@dataclass(frozen=True, kw_only=True)
class AlignOptions(Options):
    """The options of `trmt align`."""

    model: Path | None = None  # None: the default model
    reverse: Path | None = None  # a model of the reverse direction
    model1: Path | None = None  # a prepared set to train IBM Model 1 on, instead of models
    head: HeadOptions = field(default_factory=HeadOptions)
    method: str | None = None  # of symmetrisation
    device: str = "auto"
    trust_code: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method is not None and self.method not in METHODS:
            raise ConfigError(
                f"there is no symmetrisation {self.method!r}; {suggestion(self.method, list(METHODS))}"
            )
        if self.method is not None and not (self.reverse or self.model1):
            raise ConfigError("--symmetrise needs two directions; name a model of the other with --reverse")
        if self.model1 and (self.model or self.reverse or self.head != HeadOptions()):
            raise ConfigError(
                "--ibm-model1 takes no model, --reverse, --layer, --head or --shift; leave these or it out"
            )


@dataclass
class AlignmentReport:
    """The number of lines aligned, and which were broken; line numbers count from 1."""

    lines: int = 0
    without_tab: list[int] = field(default_factory=list)
    undecodable: list[int] = field(default_factory=list)
    agreement: AlignmentScore | None = None  # with gold


def build_aligner(options: AlignOptions) -> Aligner:
    """The aligner that the options describe."""
    method = options.method or "grow-diag-final-and"
    if options.model1:
        return train_model1_aligner(options.model1, method)
    forward = AttentionAligner.load(
        options.model, options.head, device=options.device, trust_code=options.trust_code
    )
    if not options.reverse:
        return forward
    backward = AttentionAligner.load(
        options.reverse, options.head, device=options.device, trust_code=options.trust_code
    )
    if backward.languages != forward.languages[::-1]:
        there, back = (" to ".join(each.languages) for each in (forward, backward))
        raise ConfigError(
            f"--reverse {options.reverse} translates {back}, which is not the reverse of {there}; "
            "name another model"
        )
    return SymmetrisedAligner(forward, backward, method)


def train_model1_aligner(folder: Path, method: str) -> Aligner:
    """Train IBM Model 1 on a prepared set in both directions."""
    data = PreparedSet.open(folder)
    tokenizer = Tokenizer.load(data.tokenizer_folder)
    split = data.split("train")
    console.say(f"training IBM Model 1 on {len(split):,} pairs of {folder}")
    forward, backward = (Model1.train(split, tokenizer, reverse=reverse) for reverse in (False, True))
    sides = tokenizer.source, tokenizer.target
    return SymmetrisedAligner(
        Model1Aligner(sides, data.languages, forward),
        Model1Aligner(sides[::-1], data.languages[::-1], backward),
        method,
    )


def align_stream(
    aligner: Aligner, source: BinaryIO, out: BinaryIO, *, gold: Path | None = None
) -> AlignmentReport:
    """Write a line of links for each line of bytes, which is a source, a tab and a target."""
    report = AlignmentReport()
    evaluation = _Evaluation(gold)
    for window in LineReader(source).windows():
        batch = _split_pairs(window, report)
        found = aligner.links(batch)
        evaluation.add(batch, found)
        ends = [b"\r\n" if raw.endswith(b"\r") else b"\n" for raw in window]
        out.write(
            b"".join(format_links(links).encode() + end for links, end in zip(found, ends, strict=True))
        )
        out.flush()
    report.agreement = evaluation.result()
    return report


def _split_pairs(raw_lines: Sequence[bytes], report: AlignmentReport) -> list[TextPair]:
    """The pairs of lines that follow those already counted in the report."""
    found = []
    for raw in raw_lines:
        text, valid = decode_line(raw if report.lines else raw.removeprefix(BOM))
        report.lines += 1
        if not valid:
            report.undecodable.append(report.lines)
        source, tab, target = text.partition("\t")
        if not tab and text.strip():
            report.without_tab.append(report.lines)
        found.append((source, target))
    return found


def align_corpus(
    aligner: Aligner, corpus: str, out: BinaryIO, *, gold: Path | None = None
) -> AlignmentReport:
    """Write a line of links for each pair of a corpus."""
    report = AlignmentReport()
    evaluation = _Evaluation(gold)
    all_pairs = iter(read_corpus(parse_corpus(corpus, *aligner.languages)))
    with console.progress("aligning", unit="pairs") as progress:
        while batch := list(islice(all_pairs, BATCH_PAIRS)):
            found = aligner.links(batch)
            evaluation.add(batch, found)
            out.write(b"".join(format_links(links).encode() + b"\n" for links in found))
            report.lines += len(batch)
            progress.advance(len(batch))
    out.flush()
    report.agreement = evaluation.result()
    return report


def read_pairs(aligner: Aligner, source: BinaryIO | str) -> list[TextPair]:
    """All pairs of a stream or a corpus."""
    if isinstance(source, str):
        return list(read_corpus(parse_corpus(source, *aligner.languages)))
    raw_lines = [raw for window in LineReader(source).windows() for raw in window]
    return _split_pairs(raw_lines, AlignmentReport())


# Evaluation against gold links


class _Evaluation:
    """Compares links with a gold file, batch by batch; without a file it does nothing."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.gold = iter(enumerate(read_lines(path), start=1)) if path else None
        self.agreement = AlignmentScore()

    def add(self, batch: Sequence[TextPair], found: Sequence[Links]) -> None:
        if self.gold is None:
            return
        for pair, links in zip(batch, found, strict=True):
            number, line = next(self.gold, (0, ""))
            if not number:
                raise DataError(
                    f"{self.path} has fewer lines than there are pairs; name the gold links of these"
                )
            where = f"{self.path}, line {number}"
            gold = parse_gold(line, where=where)
            check_range(gold.possible, pair, where=where)
            self.agreement += score_links(links, gold)

    def result(self) -> AlignmentScore | None:
        if self.gold is None:
            return None
        if next(self.gold, None) is not None:
            raise DataError(f"{self.path} has more lines than there are pairs; name the gold links of these")
        return self.agreement


def evaluate_file(found: Path, gold: Path) -> AlignmentScore:
    """Compare the links of a file with gold."""
    links = [
        parse_links(line, where=f"{found}, line {n}") for n, line in enumerate(read_lines(found), start=1)
    ]
    expected = [gold_links for _, gold_links in _read_gold(gold)]
    if len(links) != len(expected):
        raise DataError(
            f"{found} has {len(links):,} lines but {gold} has {len(expected):,}; name files of the same text"
        )
    return score_corpus(links, expected)


def _read_gold(path: Path) -> list[tuple[str, GoldAlignment]]:
    """The gold links of each line, and its name for error messages."""
    numbered = ((f"{path}, line {number}", line) for number, line in enumerate(read_lines(path), start=1))
    return [(where, parse_gold(line, where=where)) for where, line in numbered]


def rank_heads(
    aligner: AttentionAligner, batch: Sequence[TextPair], gold: Path
) -> list[tuple[AttentionHead, AlignmentScore]]:
    """The score_links of each layer and head with gold, with and without the shift; the best first."""
    expected = _read_gold(gold)
    if len(expected) != len(batch):
        raise DataError(
            f"{gold} has {len(expected):,} lines, but there are {len(batch):,} pairs; "
            "name the gold links of these"
        )
    for (where, links), pair in zip(expected, batch, strict=True):
        check_range(links.possible, pair, where=where)
    found: dict[AttentionHead, list[Links]] = {}
    for index, pieces, weights_AHTL in aligner.attention(batch):
        for head in all_heads(*weights_AHTL.shape[:2]):
            found.setdefault(head, [NO_LINKS] * len(batch))[index] = attention_links(
                pieces, weights_AHTL, head
            )
    ranked = [(head, score_corpus(links, [links for _, links in expected])) for head, links in found.items()]
    return sorted(ranked, key=lambda each: each[1].error_rate)
