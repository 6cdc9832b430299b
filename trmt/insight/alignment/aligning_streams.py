"""What `trmt align` does: pairs in, a line of links out for each; how far they are from gold.

No pair ends the work on the others: what is blank or broken has no links, and is counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import BinaryIO

from trmt import console
from trmt.errors import ConfigError, DataError
from trmt.insight.alignment import linking
from trmt.insight.alignment.counting import Counts
from trmt.insight.alignment.linking import (
    Aligner,
    AttentionAligner,
    BothWays,
    CountingAligner,
    Look,
    LookOptions,
    Pair,
)
from trmt.insight.alignment.symmetrising import METHODS
from trmt.registry import suggestion
from trmt.sets.shards import PreparedSet
from trmt.streaming import BOM, LineReader
from trmt.text.corpus import lines, pairs, parse_corpus
from trmt.text.links import (
    NOTHING,
    Agreement,
    Links,
    agreement,
    check_range,
    judged,
    parsed,
    parsed_gold,
    written,
)
from trmt.text.tokenizer import Tokenizer

TOGETHER = 1024  # pairs of files that are looked at together


@dataclass(frozen=True, kw_only=True)
class AlignOptions:
    """What `trmt align` takes."""

    model: Path | None = None  # None: the default one
    reverse: Path | None = None  # a model of the other direction
    counts: Path | None = None  # a prepared set to count in, instead of models
    look: LookOptions = field(default_factory=LookOptions)
    method: str | None = None  # of making two directions one
    device: str = "auto"
    trust_code: bool = False

    def __post_init__(self) -> None:
        if self.method is not None and self.method not in METHODS:
            raise ConfigError(
                f"there is no way {self.method!r} to make two directions one; "
                f"{suggestion(self.method, list(METHODS))}"
            )
        if self.method is not None and not (self.reverse or self.counts):
            raise ConfigError("--symmetrise is for two directions; name a model of the other with --reverse")
        if self.counts and (self.model or self.reverse or self.look != LookOptions()):
            raise ConfigError("--counts takes no model, layer, head or shift; leave them or --counts out")


@dataclass
class Report:
    """What happened to the pairs; the numbers of lines count from 1."""

    lines: int = 0
    halves: list[int] = field(default_factory=list)  # without a tab
    undecodable: list[int] = field(default_factory=list)
    agreement: Agreement | None = None


def build_aligner(options: AlignOptions) -> Aligner:
    """What finds links as these options say."""
    method = options.method or "grow-diag-final-and"
    if options.counts:
        return counting(options.counts, method)
    forward = AttentionAligner.load(
        options.model, options.look, device=options.device, trust_code=options.trust_code
    )
    if not options.reverse:
        return forward
    backward = AttentionAligner.load(
        options.reverse, options.look, device=options.device, trust_code=options.trust_code
    )
    if backward.languages != forward.languages[::-1]:
        there, back = (" to ".join(each.languages) for each in (forward, backward))
        raise ConfigError(f"--reverse {options.reverse} goes from {back}, which does not turn {there} round")
    return BothWays(forward, backward, method)


def counting(folder: Path, method: str) -> Aligner:
    """What finds links by counting in a prepared set, in both directions."""
    data = PreparedSet.open(folder)
    tokenizer = Tokenizer.load(data.tokenizer_folder)
    split = data.split("train")
    console.say(f"counting in {len(split):,} pairs of {folder}")
    there, back = (Counts.learned(split, tokenizer, backward=backward) for backward in (False, True))
    sides = tokenizer.source, tokenizer.target
    return BothWays(
        CountingAligner(sides, data.languages, there),
        CountingAligner(sides[::-1], data.languages[::-1], back),
        method,
    )


def align_stream(aligner: Aligner, source: BinaryIO, out: BinaryIO, *, gold: Path | None = None) -> Report:
    """A line of links for each line of bytes, which is a source, a tab and a target."""
    report = Report()
    judge = _Judge(gold)
    for window in LineReader(source).windows():
        if report.lines == 0:
            window[0] = window[0].removeprefix(BOM)
        some = [_decoded(raw, report) for raw in window]
        found = aligner.links(some)
        judge.take(some, found)
        ends = [b"\r\n" if raw.endswith(b"\r") else b"\n" for raw in window]
        out.write(b"".join(written(links).encode() + end for links, end in zip(found, ends, strict=True)))
        out.flush()
    report.agreement = judge.verdict()
    return report


def _decoded(raw: bytes, report: Report) -> Pair:
    report.lines += 1
    try:
        text = raw.removesuffix(b"\r").decode()
    except UnicodeDecodeError:
        report.undecodable.append(report.lines)
        text = raw.removesuffix(b"\r").decode(errors="replace")
    source, tab, target = text.partition("\t")
    if not tab and text.strip():
        report.halves.append(report.lines)
    return source, target


def align_corpus(aligner: Aligner, corpus: str, out: BinaryIO, *, gold: Path | None = None) -> Report:
    """A line of links for each pair of a corpus."""
    report = Report()
    judge = _Judge(gold)
    every = iter(pairs(parse_corpus(corpus, *aligner.languages)))
    with console.progress("aligning", unit="pairs") as progress:
        while some := list(islice(every, TOGETHER)):
            found = aligner.links(some)
            judge.take(some, found)
            out.write(b"".join(written(links).encode() + b"\n" for links in found))
            report.lines += len(some)
            progress.advance(len(some))
    out.flush()
    report.agreement = judge.verdict()
    return report


# Gold


class _Judge:
    """Compares links with a gold file, as they come."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.gold = iter(enumerate(lines(path), start=1)) if path else None
        self.seen = Agreement()

    def take(self, some: Sequence[Pair], found: Sequence[Links]) -> None:
        if self.gold is None:
            return
        for pair, links in zip(some, found, strict=True):
            number, line = next(self.gold, (0, ""))
            if not number:
                raise DataError(f"{self.path} has fewer lines than there are pairs; name the gold of these")
            where = f"{self.path}, line {number}"
            known = parsed_gold(line, where=where)
            check_range(known.possible, pair, where=where)
            self.seen += agreement(links, known)

    def verdict(self) -> Agreement | None:
        if self.gold is None:
            return None
        if next(self.gold, None) is not None:
            raise DataError(f"{self.path} has more lines than there are pairs; name the gold of these")
        return self.seen


def judge_given(given: Path, gold: Path) -> Agreement:
    """How far the links in a file are from gold."""
    found = [parsed(line, where=f"{given}, line {n}") for n, line in enumerate(lines(given), start=1)]
    known = [parsed_gold(line, where=f"{gold}, line {n}") for n, line in enumerate(lines(gold), start=1)]
    if len(found) != len(known):
        raise DataError(
            f"{given} has {len(found):,} lines but {gold} has {len(known):,}; name files of one text"
        )
    return judged(found, known)


def judge_looks(aligner: AttentionAligner, some: Sequence[Pair], gold: Path) -> list[tuple[Look, Agreement]]:
    """How far each layer and head is from gold, with and without the shift; the best first."""
    numbered = [(f"{gold}, line {number}", line) for number, line in enumerate(lines(gold), start=1)]
    known = [parsed_gold(line, where=where) for where, line in numbered]
    if len(known) != len(some):
        raise DataError(
            f"{gold} has {len(known):,} lines, there are {len(some):,} pairs; name the gold of these"
        )
    for (where, _), pair, links in zip(numbered, some, known, strict=True):
        check_range(links.possible, pair, where=where)
    found: dict[Look, list[Links]] = {}
    for number, pieces, weights_AHTL in aligner.looked(some):
        for look in linking.all_looks(*weights_AHTL.shape[:2]):
            each = found.setdefault(look, [NOTHING] * len(some))
            each[number] = linking.linked(pieces, weights_AHTL, look)
    verdicts = [(look, judged(links, known)) for look, links in found.items()]
    return sorted(verdicts, key=lambda verdict: verdict[1].error_rate)


def read_pairs(aligner: Aligner, source: BinaryIO | str) -> list[Pair]:
    """All pairs of a stream or a corpus, for those who need them together."""
    if isinstance(source, str):
        return list(pairs(parse_corpus(source, *aligner.languages)))
    report = Report()
    raw = [line for window in LineReader(source).windows() for line in window]
    return [_decoded(line.removeprefix(b"" if number else BOM), report) for number, line in enumerate(raw)]
