"""Lines of text to the attention they cause: translated, or beside the translation they come with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from trmt import console
from trmt.bundles import bundles
from trmt.devices.choice import choose_device
from trmt.errors import ConfigError, DataError
from trmt.insight.heatmaps import page, picture
from trmt.insight.heatmaps.attending import KINDS, Kind, attend, positions, sizes
from trmt.insight.heatmaps.matrix import Choice, Looks, Matrix, looks, matrix
from trmt.translating import TranslateOptions, Translator, find_model

FORMATS = ("html", *picture.FORMATS)
TOGETHER = 64  # lines translated together


@dataclass(frozen=True, kw_only=True)
class AttendOptions:
    """What `trmt attend` takes."""

    model: Path | None = None  # None: the default one
    kinds: tuple[Kind, ...] = ()  # none: "cross", and for a page all there are
    layer: int = 0  # from 1; 0 is the mean of all
    head: int = 0
    by_words: bool = False  # and not by pieces
    out: Path | None = None
    beam: int = 4
    device: str = "auto"
    trust_code: bool = False

    def __post_init__(self) -> None:
        for kind in self.kinds:
            if kind not in KINDS:
                raise ConfigError(f"there is no --kind {kind}; choose {', '.join(KINDS)}")
        if len(self.kinds) > 1 and self.format != "html":
            raise ConfigError("several kinds are for a page; choose one --kind, or let --out end in .html")
        if self.out and self.format not in FORMATS:
            raise ConfigError(f"{self.out} says no known format; end it in .{', .'.join(FORMATS)}")
        if min(self.layer, self.head) < 0:
            raise ConfigError("layers and heads count from 1; leave --layer or --head out for their mean")

    @property
    def format(self) -> str:
        """What the name of the output says, if there is one."""
        return self.out.suffix.lower().removeprefix(".") if self.out else ""


@dataclass(frozen=True)
class Line:
    """A line of the input: a source, and its translation where one is given."""

    number: int
    source: str
    target: str | None = None

    @classmethod
    def read(cls, raw: bytes, number: int) -> Line:
        """The line that these bytes are: a source, or a source, a tab, and a target."""
        raw = raw.removesuffix(b"\r")
        try:
            text = raw.decode()
        except UnicodeDecodeError:
            text = raw.decode(errors="replace")
            console.warn(f"line {number} is not valid UTF-8; what could not be read was replaced")
        source, tab, target = text.partition("\t")
        return cls(number, source, target if tab else None)


class Attender:
    """A network that translates, and says where it looked."""

    def __init__(self, options: AttendOptions) -> None:
        self.options = options
        self.folder = find_model(options.model)
        device = choose_device(options.device)
        bundle = bundles.load_bundle(self.folder, device=device, trust_code=options.trust_code)
        self.net, self.tokenizer = bundle.net, bundle.tokenizer
        self.sizes = sizes(self.net, self.tokenizer)
        self.kinds = self._kinds()
        self.choice = Choice(self.kinds[0], options.layer, options.head, options.by_words)
        self._check_choice()
        self.longest = bundle.manifest.longest.get("source", positions(self.net))
        search = TranslateOptions(
            search="greedy" if options.beam == 1 else "beam", beam=options.beam, precision="fp32"
        )
        self.translator = Translator(self.net, self.tokenizer, longest=self.longest, options=search)

    def _kinds(self) -> tuple[Kind, ...]:
        if not self.sizes:
            raise ConfigError(
                f"the network of {self.folder} has no attention: it writes from a summary of the source; "
                "choose another model"
            )
        for kind in self.options.kinds:
            if kind not in self.sizes:
                raise ConfigError(
                    f"the network of {self.folder} has no attention of kind {kind}; "
                    f"choose {' or '.join(self.sizes)}"
                )
        if self.options.kinds:
            return tuple(dict.fromkeys(self.options.kinds))
        return tuple(self.sizes) if self.options.format == "html" else tuple(self.sizes)[:1]

    def _check_choice(self) -> None:
        for name, count in zip(("layer", "head"), self.sizes[self.choice.kind], strict=True):
            if getattr(self.choice, name) > count:
                raise ConfigError(
                    f"--{name} {getattr(self.choice, name)} is too high: {self.folder} has {count}; "
                    "lower it, or leave it out for the mean"
                )

    def looks(self, lines: Iterable[Line]) -> Iterator[tuple[Line, Looks]]:
        """What can be drawn of each line; one of which nothing can be is left out with a warning."""
        window: list[Line] = []
        for line in lines:
            window.append(line)
            if len(window) == TOGETHER:
                yield from self._looks(window)
                window = []
        yield from self._looks(window)

    def _looks(self, lines: Sequence[Line]) -> Iterator[tuple[Line, Looks]]:
        sources = self.tokenizer.source.encode([line.source for line in lines])
        targets = [self._given(line) for line in lines]
        shown = [at for at, line in enumerate(lines) if self._is_shown(line, sources[at], targets[at])]
        open_ = [at for at in shown if targets[at] is None]
        for at, ids in zip(open_, self.translator.translate_ids([sources[at] for at in open_]), strict=True):
            targets[at] = list(ids)
        pairs = [(sources[at], targets[at] or []) for at in shown]
        for at, attended in zip(
            shown, attend(self.net, self.tokenizer, pairs, kinds=self.kinds), strict=True
        ):
            yield lines[at], looks(self.tokenizer, attended)

    def _given(self, line: Line) -> list[int] | None:
        return None if line.target is None else self.tokenizer.target.encode([line.target])[0]

    def _is_shown(self, line: Line, source: Sequence[int], target: Sequence[int] | None) -> bool:
        if not source:
            console.warn(f"line {line.number} has no source, and is left out")
            return False
        room = positions(self.net) - 1
        if max(len(source), len(target or ())) > room:
            console.warn(
                f"line {line.number} has more pieces than the {room} of the network, and is left out"
            )
            return False
        if len(source) > self.longest:
            console.warn(f"line {line.number} is longer than anything in training")
        return True


def write(attender: Attender, lines: Iterable[Line]) -> list[Path]:
    """Write what the options name: one page of all lines, or a picture of each; the files there are now."""
    options = attender.options
    assert options.out, "without a place to write to there is nothing to write"
    found = attender.looks(lines)
    first = next(found, None)
    if first is None:
        raise DataError("there is no line whose attention could be drawn; give some text")
    if options.format == "html":
        languages = attender.tokenizer.languages
        about = page.About(_title(attender), languages, attender.choice)
        count = page.write(options.out, (each for _, each in _chained(first, found)), about)
        console.say(f"{count:,} sentences -> {options.out}")
        return [options.out]
    matrices = [(line, matrix(each, attender.choice)) for line, each in _chained(first, found)]
    return _pictures(options.out, matrices, title=str(attender.choice))


def _chained(first: tuple[Line, Looks], rest: Iterator[tuple[Line, Looks]]) -> Iterator[tuple[Line, Looks]]:
    yield first
    yield from rest


def _title(attender: Attender) -> str:
    source, target = attender.tokenizer.languages
    return f"{attender.folder}: {source} to {target}" if source and target else str(attender.folder)


def _pictures(out: Path, matrices: Sequence[tuple[Line, Matrix]], *, title: str) -> list[Path]:
    """One file for one sentence; several have the numbers of their lines in their names."""
    written = []
    for line, each in matrices:
        place = out if len(matrices) == 1 else out.with_stem(f"{out.stem}-{line.number}")
        picture.write(place, each, title=title)
        console.say(f"line {line.number} -> {place}")
        written.append(place)
    return written
