"""The steps of `trmt attend`: lines of text to attention maps, and maps to files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

from trmt import console
from trmt.bundles import bundles
from trmt.config import Options
from trmt.devices.choice import choose_device
from trmt.errors import ConfigError, DataError
from trmt.insight.heatmaps import figure, page
from trmt.insight.heatmaps.maps import AttentionMaps, MapChoice, attention_maps, choose_map
from trmt.insight.heatmaps.weights import (
    KINDS,
    AttentionKind,
    attention_weights,
    layers_and_heads,
    max_positions,
)
from trmt.streaming import decode_line
from trmt.training.models import find_model
from trmt.translating import TranslateOptions, Translator

FORMATS = ("html", *figure.FORMATS)
BATCH_LINES = 64  # lines that are translated together


@dataclass(frozen=True, kw_only=True)
class AttendOptions(Options):
    """The options of `trmt attend`."""

    model: Path | None = None  # None: the default model
    kinds: tuple[AttentionKind, ...] = ()  # none: cross-attention, for a page all that the network has
    layer: int = 0  # from 1; 0 is the mean of all
    head: int = 0
    by_words: bool = False  # not by pieces
    out: Path | None = None
    beam: int = 4
    device: str = "auto"
    trust_code: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for kind in self.kinds:
            if kind not in KINDS:
                raise ConfigError(f"there is no --kind {kind}; choose {', '.join(KINDS)}")
        if len(self.kinds) > 1 and self.format != "html":
            raise ConfigError(
                "only a page shows several kinds; choose one --kind, or let --output end in .html"
            )
        if self.out and self.format not in FORMATS:
            raise ConfigError(f"{self.out} has no known file format; end it in .{', .'.join(FORMATS)}")
        if min(self.layer, self.head) < 0:
            raise ConfigError("layers and heads count from 1; leave --layer or --head out for their mean")

    @property
    def format(self) -> str:
        """The extension of the output file, or nothing."""
        return self.out.suffix.lower().removeprefix(".") if self.out else ""


@dataclass(frozen=True)
class AttendLine:
    """A line of input: a source, and its translation if it is given."""

    number: int
    source: str
    target: str | None = None

    @classmethod
    def parse(cls, raw: bytes, number: int) -> AttendLine:
        """Parse bytes: a source, or a source, a tab and a target."""
        text, valid = decode_line(raw)
        if not valid:
            console.warn(f"line {number} is not valid UTF-8; undecodable bytes were replaced")
        source, tab, target = text.partition("\t")
        return cls(number, source, target if tab else None)


class AttentionExtractor:
    """A translation model, and the attention maps of the lines it translates."""

    def __init__(self, options: AttendOptions) -> None:
        self.options = options
        self.folder = find_model(options.model)
        device = choose_device(options.device)
        bundle = bundles.load_bundle(self.folder, device=device, trust_code=options.trust_code)
        self.net, self.tokenizer = bundle.net, bundle.tokenizer
        self.sizes = layers_and_heads(self.net, self.tokenizer)
        self.kinds = self._choose_kinds()
        self.choice = MapChoice(self.kinds[0], options.layer, options.head, options.by_words)
        self._check_choice()
        self.longest = bundle.manifest.longest.get("source", max_positions(self.net))
        search = TranslateOptions(
            search="greedy" if options.beam == 1 else "beam", beam=options.beam, precision="fp32"
        )
        self.translator = Translator(self.net, self.tokenizer, longest=self.longest, options=search)

    def _choose_kinds(self) -> tuple[AttentionKind, ...]:
        if not self.sizes:
            raise ConfigError(
                f"the network of {self.folder} has no attention: its decoder uses a fixed vector of the "
                "source; choose another model"
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

    def maps(self, lines: Iterable[AttendLine]) -> Iterator[tuple[AttendLine, AttentionMaps]]:
        """The maps of each line; blank lines and lines that are too long are skipped with a warning."""
        remaining = iter(lines)
        while batch := list(islice(remaining, BATCH_LINES)):
            yield from self._batch_maps(batch)

    def _batch_maps(self, lines: Sequence[AttendLine]) -> Iterator[tuple[AttendLine, AttentionMaps]]:
        sources = self.tokenizer.source.encode([line.source for line in lines])
        targets = [self._encode_target(line) for line in lines]
        usable = [
            index for index, line in enumerate(lines) if self._is_usable(line, sources[index], targets[index])
        ]
        open_ = [index for index in usable if targets[index] is None]
        translations = self.translator.translate_ids([sources[index] for index in open_])
        for index, ids in zip(open_, translations, strict=True):
            targets[index] = list(ids)
        pairs = [(sources[index], targets[index] or []) for index in usable]
        found = attention_weights(self.net, self.tokenizer, pairs, kinds=self.kinds)
        for index, attention in zip(usable, found, strict=True):
            yield lines[index], attention_maps(self.tokenizer, attention)

    def _encode_target(self, line: AttendLine) -> list[int] | None:
        return None if line.target is None else self.tokenizer.target.encode([line.target])[0]

    def _is_usable(self, line: AttendLine, source: Sequence[int], target: Sequence[int] | None) -> bool:
        if not source:
            console.warn(f"line {line.number} has no source and is skipped")
            return False
        max_pieces = max_positions(self.net) - 1
        if max(len(source), len(target or ())) > max_pieces:
            console.warn(
                f"line {line.number} has more pieces than the {max_pieces} of the network and is skipped"
            )
            return False
        if len(source) > self.longest:
            console.warn(f"line {line.number} is longer than anything in training")
        return True


def write_maps(extractor: AttentionExtractor, lines: Iterable[AttendLine]) -> list[Path]:
    """Write a page of all lines, or a figure of each, as the options say; returns the files."""
    options = extractor.options
    assert options.out, "there is no output file to write"
    maps = extractor.maps(lines)
    first = next(maps, None)
    if first is None:
        raise DataError("there is no line whose attention can be drawn; give some text")
    maps = chain([first], maps)
    if options.format == "html":
        info = page.PageInfo(_title(extractor), extractor.tokenizer.languages, extractor.choice)
        count = page.write_page(options.out, (each for _, each in maps), info)
        console.say(f"{count:,} sentences -> {options.out}")
        return [options.out]
    drawn = [(line.number, choose_map(each, extractor.choice)) for line, each in maps]
    written = []
    for number, each in drawn:
        path = options.out if len(drawn) == 1 else options.out.with_stem(f"{options.out.stem}-{number}")
        figure.write_figure(path, each, title=str(extractor.choice))
        console.say(f"line {number} -> {path}")
        written.append(path)
    return written


def _title(extractor: AttentionExtractor) -> str:
    source, target = extractor.tokenizer.languages
    return f"{extractor.folder}: {source} to {target}" if source and target else str(extractor.folder)
