"""Training a tokenizer: sample the corpora, learn pieces with sentencepiece, report what they are like."""

from __future__ import annotations

import io
import random
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import sentencepiece

from trmt import console
from trmt.errors import ConfigError, DataError
from trmt.text.corpus import count, pairs, parse_corpus
from trmt.text.tokenizer import (
    BOS,
    EOS,
    NORMALISATIONS,
    PAD,
    UNK,
    Normalisation,
    Settings,
    Side,
    Tokenizer,
    normaliser,
    refuse_foreign,
)

LONGEST = 2000  # characters; sentencepiece leaves out longer lines and cannot count beyond 65,535 in a word
STRIDE = 1000  # pairs between two steps of the progress bar
MEASURED = 10_000  # sentences of each side that the report is made from
LISTED = 20  # characters that the report names
SMALL_ALPHABET = 0.05  # of the vocabulary: as much may go to the rarest characters too
USUAL_COVERAGE = 0.9995  # sentencepiece's own default


@dataclass(frozen=True)
class TokenizerOptions:
    """What `train_tokenizer` is asked for."""

    corpora: tuple[str, ...]
    """Corpus strings: two files, one of pairs, a prefix, `hf:NAME` or `-`; weights change nothing here."""
    languages: tuple[str, str] = ("", "")
    """The languages translated from and to."""
    kind: Literal["bpe", "unigram"] = "bpe"
    """How pieces are found: merged from below (bpe) or chosen from above (unigram)."""
    joint: bool = True
    """Whether both sides share one model."""
    size: int = 8000
    """Pieces in each model, special ids, tags, placeholders and bytes included."""
    coverage: float | None = None
    """The share of running characters that get pieces of their own; None: all of them in a small alphabet."""
    byte_fallback: bool = True
    """Whether characters without a piece are spelled in bytes, so that none is unknown."""
    split_digits: bool = True
    """Whether every digit is a piece of its own."""
    normalise_source: Normalisation = "nfc"
    """What is done to source text first: nfc, nfkc, nmt_nfkc, nmt_nfkc_cf or none."""
    normalise_target: Normalisation = "nfc"
    """What is done to target text first."""
    tags: tuple[str, ...] = ()
    """Symbols that text cannot spell, such as <2de>."""
    placeholders: tuple[str, ...] = ()
    """Symbols that stay whole in text."""
    source_column: str | None = None
    """The column of the source text in JSONL, Parquet and hub data."""
    target_column: str | None = None
    """The column of the target text there."""
    sample: int = 2_000_000
    """Sentences to learn from at most, both sides together; each takes about 1 kB for bpe, 4 for unigram."""
    seed: int = 1
    """The seed of that even draw."""

    def __post_init__(self) -> None:
        if not self.corpora:
            raise ConfigError("a tokenizer is learnt from text; name a corpus with --train")
        if self.kind not in ("bpe", "unigram"):
            raise ConfigError(f"a tokenizer is of kind bpe or unigram, not {self.kind!r}; change --kind")
        if self.coverage is not None and not 0.9 <= self.coverage <= 1:
            raise ConfigError(f"the coverage is between 0.9 and 1, not {self.coverage}; change --coverage")
        if self.sample < 2:
            raise ConfigError(f"a sample of {self.sample} holds no pair; raise --sample")
        if not 0 < self.size < 2**24:
            raise ConfigError(f"a vocabulary cannot have {self.size} pieces; change --size")
        for name in (self.normalise_source, self.normalise_target):
            if name not in NORMALISATIONS:
                raise ConfigError(
                    f"there is no normalisation {name!r}; known are {', '.join(NORMALISATIONS)}"
                )
        self._check_symbols()

    def _check_symbols(self) -> None:
        symbols = [*self.tags, *self.placeholders]
        for symbol in symbols:
            if not symbol or re.search(r"[\s\u2581\u2585\0]", symbol):
                raise ConfigError(
                    f"{symbol!r} cannot be a tag or placeholder: it is empty or holds white space"
                )
            if symbol in ("<pad>", "<unk>", "<s>", "</s>") or re.fullmatch(r"<0x[0-9A-F]{2}>", symbol):
                raise ConfigError(
                    f"{symbol!r} is a piece of the tokenizer itself; give the symbol another name"
                )
            if symbols.count(symbol) > 1:
                raise ConfigError(f"the symbol {symbol!r} is given twice; leave one out")
        for name in (self.normalise_source, self.normalise_target):
            for symbol in self.placeholders:
                if (becomes := normaliser(name)(symbol)) != symbol:
                    raise ConfigError(
                        f"normalisation {name} turns the placeholder {symbol!r} into {becomes!r}; "
                        "write it that way or choose another normalisation"
                    )


@dataclass(frozen=True)
class Lost:
    """A character that encoding and decoding does not give back."""

    character: str
    count: int

    def __str__(self) -> str:
        name = unicodedata.name(self.character, "no name")
        shown = self.character if self.character.isprintable() else "?"
        return f"{shown} U+{ord(self.character):04X} {name} ×{self.count:,}"


@dataclass(frozen=True)
class SideReport:
    """How one side's pieces fit a sample of the text they were learnt from."""

    language: str
    sentences: int
    words: int
    characters: int
    tokens: int
    unknown: int
    bytes: int
    lost: tuple[Lost, ...]

    @property
    def tokens_per_word(self) -> float:
        """Tokens for each word between white space."""
        return self.tokens / max(self.words, 1)

    @property
    def tokens_per_character(self) -> float:
        """Tokens for each character that is not white space; the one to read for unspaced scripts."""
        return self.tokens / max(self.characters, 1)


@dataclass(frozen=True)
class Report:
    """What `trmt tokenizer` shows at its end."""

    source: SideReport
    target: SideReport


def train_tokenizer(options: TokenizerOptions, *, out: Path | None = None) -> tuple[Tokenizer, Report]:
    """Learn a tokenizer from the corpora, and write it to the folder `out` if that is given.

    The same options and text give the same models. Where the text does not yield as many pieces as asked
    for, a model has as many as it does yield. Memory holds `options.sample` sentences at most, and what
    sentencepiece makes of them.
    """
    if out is not None:
        refuse_foreign(out)
    sources, targets = _sampled(options)
    chooser = random.Random(options.seed)
    measured = [chooser.sample(side, min(MEASURED, len(side))) for side in (sources, targets)]
    settings = Settings(
        options.languages,
        normalise_source=options.normalise_source,
        normalise_target=options.normalise_target,
        tags=options.tags,
        placeholders=options.placeholders,
    )
    source = _Text(sources, settings.normalise_source)
    target = _Text(targets, settings.normalise_target)
    groups = [[source, target]] if options.joint else [[source], [target]]
    tokenizer = Tokenizer(settings, [_learnt(texts, options) for texts in groups])
    if out is not None:
        tokenizer.save(out)
    report = Report(
        measure(tokenizer.source, measured[0], language=options.languages[0]),
        measure(tokenizer.target, measured[1], language=options.languages[1]),
    )
    return tokenizer, report


def _sampled(options: TokenizerOptions) -> tuple[list[str], list[str]]:
    """All the pairs, or an even draw of as many as `options.sample` allows."""
    source_column, target_column = options.source_column, options.target_column
    corpora = [
        parse_corpus(text, *options.languages, source_column=source_column, target_column=target_column)
        for text in options.corpora
    ]
    sizes = [count(corpus) for corpus in corpora] if console.watched() else []
    total = sum(size or 0 for size in sizes) if sizes and None not in sizes else None
    room = options.sample // 2
    chooser = random.Random(options.seed)
    kept: list[tuple[str, str]] = []
    seen = 0
    with console.progress("reading", total, unit="pairs") as progress:
        for seen, pair in enumerate(chain.from_iterable(map(pairs, corpora)), start=1):
            if seen % STRIDE == 0:
                progress.advance(STRIDE)
            if len(kept) < room:
                kept.append(pair)
            elif (place := chooser.randrange(seen)) < room:
                kept[place] = pair
    console.say(f"read {seen:,} pairs" + (f", learning from {room:,} of them" if seen > room else ""))
    return [source for source, _ in kept], [target for _, target in kept]


@dataclass(frozen=True)
class _Text:
    """The sentences of one side on their way into sentencepiece."""

    sentences: Sequence[str]
    normalisation: str

    def __iter__(self) -> Iterator[str]:
        normalise = normaliser(self.normalisation)
        for sentence in self.sentences:
            # sentencepiece marks its own things with these two, and leaves out lines that hold them.
            text = normalise(sentence).replace("\t", " ").replace("\u2585", " ")
            for start in range(0, len(text), LONGEST):
                yield text[start : start + LONGEST]


def _learnt(texts: Sequence[_Text], options: TokenizerOptions) -> bytes:
    """The bytes of a sentencepiece model for these texts."""
    alphabet: set[str] = set()
    for line in chain.from_iterable(texts):
        alphabet.update(line)
    if not alphabet - {" "}:
        raise DataError(f"there is no text to learn from in {', '.join(options.corpora)}; check the files")
    coverage = options.coverage if options.coverage is not None else _coverage(len(alphabet), options.size)
    console.say(f"learning {options.size:,} {options.kind} pieces, character coverage {coverage:g}")
    settings: dict[str, Any] = {
        "vocab_size": options.size,
        "hard_vocab_limit": False,
        "model_type": options.kind,
        "character_coverage": coverage,
        "byte_fallback": options.byte_fallback,
        "split_digits": options.split_digits,
        "control_symbols": list(options.tags),
        "user_defined_symbols": list(options.placeholders),
        # Sides normalise by themselves: what the model did besides would be seen nowhere.
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "max_sentence_length": 4 * LONGEST,
        # Sums of unigram training depend on the number of threads, so it is the same on every machine.
        "num_threads": 16,
        "minloglevel": 2,
        "pad_id": PAD,
        "unk_id": UNK,
        "bos_id": BOS,
        "eos_id": EOS,
    }
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=chain.from_iterable(texts), model_writer=model, **settings
        )
    except RuntimeError as error:
        raise _explained(error, options) from error
    learnt = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).vocab_size()
    if learnt < options.size:
        console.say(f"the text yields {learnt:,} pieces, not {options.size:,}: the vocabulary has as many")
    return model.getvalue()


def _coverage(characters: int, size: int) -> float:
    """All characters where they are few, and otherwise not those that hardly ever occur."""
    return 1.0 if characters <= SMALL_ALPHABET * size else USUAL_COVERAGE


def _explained(error: RuntimeError, options: TokenizerOptions) -> ConfigError | DataError:
    needed = re.search(r"smaller than required_chars\. \d+ vs (\d+)", str(error))
    if needed:
        return ConfigError(
            f"a vocabulary of {options.size} is too small: characters and special ids alone take "
            f"{needed[1]}; raise --size above that or lower --coverage"
        )
    return DataError(
        f"sentencepiece cannot learn from {', '.join(options.corpora)}: {str(error).strip()}; "
        "check the text and the options"
    )


def measure(side: Side, sentences: Sequence[str], *, language: str = "") -> SideReport:
    """How this side's pieces fit these sentences, and which characters do not survive the round trip.

    A character survives if its canonical equivalent comes back; white space is not counted.
    """
    encoded = side.encode(sentences)
    lost: Counter[str] = Counter()
    words = characters = 0
    for sentence, ids in zip(sentences, encoded, strict=True):
        before = _characters(sentence)
        words += len(sentence.split())
        characters += before.total()
        lost += before - _characters(side.decode(ids))
    tokens = Counter(token for ids in encoded for token in ids)
    return SideReport(
        language,
        sentences=len(sentences),
        words=words,
        characters=characters,
        tokens=tokens.total(),
        unknown=tokens[side.unk],
        bytes=sum(count for token, count in tokens.items() if side.is_byte(token)),
        lost=tuple(Lost(character, count) for character, count in lost.most_common(LISTED)),
    )


def _characters(text: str) -> Counter[str]:
    return Counter("".join(unicodedata.normalize("NFC", text).split()))
