"""Training of a tokenizer: sample the corpora, train sentencepiece, report statistics of the pieces."""

from __future__ import annotations

import io
import random
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import sentencepiece

from trmt import console
from trmt.config import Options, check_type
from trmt.errors import ConfigError, DataError
from trmt.text.corpus import TextPair, find_languages, parse_corpus
from trmt.text.pairs import count_pairs, read_corpus
from trmt.text.tokenizer import (
    BOS,
    EOS,
    NORMALISATIONS,
    PAD,
    UNK,
    Normalisation,
    Side,
    Tokenizer,
    TokenizerSettings,
    check_replaceable,
    normaliser,
    read_fingerprint,
)

# Characters: sentencepiece skips longer lines, and cannot count more than 65,535 in a word.
MAX_LINE = 2000
PROGRESS_STEP = 1000  # pairs between two updates of the progress bar
REPORT_SAMPLE = 10_000  # sentences of each side in the report
REPORTED_CHARACTERS = 20  # in the report
# Pairs of text below which a vocabulary has so many pieces, where --size is not given. Little text has few
# examples of each piece, so it is cut into shorter ones (Sennrich and Zhang, arXiv 1905.11901).
SIZES = ((1_000, 1_000), (10_000, 2_000))
LARGEST = 8_000
PIECES_PER_CHARACTER = 4  # at least, in a vocabulary of a size that was not given
BYTES = 256
SMALL_ALPHABET = 0.05  # the share of a given size up to which every character gets a piece
DEFAULT_COVERAGE = 0.9995  # that of sentencepiece


@dataclass(frozen=True)
class TokenizerOptions(Options):
    """The options of `trmt tokenizer`."""

    corpora: Sequence[str]  # as `parse_corpus` takes them; weights are ignored
    languages: tuple[str, str] = ("", "")  # of source and target; empty: those that files are named after
    kind: Literal["bpe", "unigram"] = "bpe"  # the type of the sentencepiece model
    joint: bool = True  # whether both sides share one model
    # pieces in each model, with special ids, tags, placeholders and bytes; None: fits the number of pairs
    size: int | None = None
    coverage: float | None = (
        None  # the share of running characters with a piece; None: chosen by the alphabet
    )
    byte_fallback: bool = True  # whether characters without a piece are spelled in bytes instead of <unk>
    split_digits: bool = True  # whether every digit is a piece of its own
    normalise_source: Normalisation = "nfc"  # the normalisation of source text
    normalise_target: Normalisation = "nfc"  # the normalisation of target text
    tags: Sequence[str] = ()  # symbols that text cannot spell, such as <2de>
    placeholders: Sequence[str] = ()  # symbols that are never split in text
    source_column: str | None = None  # the column of the source text, for corpora with columns
    target_column: str | None = None  # the column of the target text
    # Sentences to train on at most, both sides together; each takes about 1 kB for bpe, 4 kB for unigram.
    sample: int = 2_000_000
    seed: int = 1  # of the random sample

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.corpora:
            raise ConfigError("a tokenizer is trained on text; name a corpus with --train")
        if self.kind not in ("bpe", "unigram"):
            raise ConfigError(f"the kind of a tokenizer is bpe or unigram, not {self.kind!r}; change --kind")
        if self.coverage is not None and not 0.9 <= self.coverage <= 1:
            raise ConfigError(f"the coverage is between 0.9 and 1, not {self.coverage}; change --coverage")
        if self.sample < 2:
            raise ConfigError(f"a sample of {self.sample} holds no pair; raise --sample")
        if self.size is not None and not 0 < self.size < 2**24:
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
                raise ConfigError(f"{symbol!r} is reserved for the tokenizer; give the symbol another name")
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
class LostCharacter:
    """A character that is not the same after encoding and decoding."""

    character: str
    count: int

    def __str__(self) -> str:
        name = unicodedata.name(self.character, "no name")
        shown = self.character if self.character.isprintable() else "?"
        return f"{shown} U+{ord(self.character):04X} {name} ×{self.count:,}"


@dataclass(frozen=True)
class SideReport:
    """Statistics of one side's pieces on a sample of the training text."""

    language: str
    sentences: int
    words: int
    characters: int
    tokens: int
    unknown: int
    bytes: int
    lost: tuple[LostCharacter, ...]

    @property
    def tokens_per_word(self) -> float:
        """Tokens per word; words are separated by white space."""
        return self.tokens / max(self.words, 1)

    @property
    def tokens_per_character(self) -> float:
        """Tokens per character that is not white space, for scripts without spaces."""
        return self.tokens / max(self.characters, 1)


@dataclass(frozen=True)
class TokenizerReport:
    """The statistics that `trmt tokenizer` prints."""

    source: SideReport
    target: SideReport


def train_tokenizer(
    options: TokenizerOptions, *, out: Path | str | None = None
) -> tuple[Tokenizer, TokenizerReport]:
    """Train a tokenizer on the corpora, and write it to the folder `out` if that is given.

    The same options and text give the same models. A model has fewer pieces than requested if the text does
    not have as many. At most `options.sample` sentences are in memory, besides the data of sentencepiece.
    """
    check_type(options, TokenizerOptions, "options")
    source_language, target_language = find_languages(options.corpora, *options.languages)
    options = replace(options, languages=(source_language or "", target_language or ""))
    if out is not None:
        check_replaceable(Path(out), options.languages)
    sources, targets = _sample_corpora(options)
    chooser = random.Random(options.seed)
    samples = [chooser.sample(side, min(REPORT_SAMPLE, len(side))) for side in (sources, targets)]
    settings = TokenizerSettings(
        options.languages,
        normalise_source=options.normalise_source,
        normalise_target=options.normalise_target,
        tags=tuple(options.tags),
        placeholders=tuple(options.placeholders),
    )
    source = _TrainingText(sources, settings.normalise_source)
    target = _TrainingText(targets, settings.normalise_target)
    groups = [[source, target]] if options.joint else [[source], [target]]
    tokenizer = Tokenizer(settings, [_train_model(texts, options) for texts in groups])
    if out is not None:
        if read_fingerprint(Path(out)) not in (None, tokenizer.fingerprint):
            console.say(
                f"replacing the tokenizer in {out}, which was trained on other text or with other options"
            )
        tokenizer.save(out)
    report = TokenizerReport(
        measure_side(tokenizer.source, samples[0], language=options.languages[0]),
        measure_side(tokenizer.target, samples[1], language=options.languages[1]),
    )
    return tokenizer, report


def _sample_corpora(options: TokenizerOptions) -> tuple[list[str], list[str]]:
    """Sources and targets of all pairs, or of a uniform random sample (by reservoir sampling)."""
    source_column, target_column = options.source_column, options.target_column
    corpora = [
        parse_corpus(text, *options.languages, source_column=source_column, target_column=target_column)
        for text in options.corpora
    ]
    sizes = [count_pairs(corpus) for corpus in corpora] if console.is_terminal() else []
    total = sum(size or 0 for size in sizes) if sizes and None not in sizes else None
    wanted = options.sample // 2
    chooser = random.Random(options.seed)
    sample: list[TextPair] = []
    seen = 0
    with console.progress("reading", total, unit="pairs") as progress:
        for seen, pair in enumerate(chain.from_iterable(map(read_corpus, corpora)), start=1):
            if seen % PROGRESS_STEP == 0:
                progress.advance(PROGRESS_STEP)
            if len(sample) < wanted:
                sample.append(pair)
            elif (index := chooser.randrange(seen)) < wanted:
                sample[index] = pair
    console.say(f"read {seen:,} pairs" + (f", training on {wanted:,} of them" if seen > wanted else ""))
    return [source for source, _ in sample], [target for _, target in sample]


@dataclass(frozen=True)
class _TrainingText:
    """The sentences of one side as input of sentencepiece."""

    sentences: Sequence[str]
    normalisation: str

    def __iter__(self) -> Iterator[str]:
        normalise = normaliser(self.normalisation)
        for sentence in self.sentences:
            # sentencepiece uses these two characters itself, and skips lines that have them.
            text = normalise(sentence).replace("\t", " ").replace("\u2585", " ")
            for start in range(0, len(text), MAX_LINE):
                yield text[start : start + MAX_LINE]


def _train_model(texts: Sequence[_TrainingText], options: TokenizerOptions) -> bytes:
    """The bytes of a sentencepiece model that is trained on these texts."""
    alphabet: set[str] = set()
    for line in chain.from_iterable(texts):
        alphabet.update(line)
    if not alphabet - {" "}:
        raise DataError(f"there is no text to train on in {', '.join(options.corpora)}; check the files")
    pairs = max(len(text.sentences) for text in texts)
    size = fitting_size(pairs, len(alphabet)) if options.size is None else options.size
    coverage = options.coverage
    if coverage is None:
        small = SMALL_ALPHABET * size if options.size else (size - BYTES) / PIECES_PER_CHARACTER
        coverage = 1.0 if len(alphabet) <= small else DEFAULT_COVERAGE
    fits = "" if options.size else f" (fits {pairs:,} pairs; --size changes it)"
    console.say(f"training {size:,} {options.kind} pieces{fits}, character coverage {coverage:g}")
    settings: dict[str, Any] = {
        "vocab_size": size,
        "hard_vocab_limit": False,
        "model_type": options.kind,
        "character_coverage": coverage,
        "byte_fallback": options.byte_fallback,
        "split_digits": options.split_digits,
        "control_symbols": list(options.tags),
        "user_defined_symbols": list(options.placeholders),
        # Sides normalise text themselves, so the model must not.
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "max_sentence_length": 4 * MAX_LINE,  # bytes
        # Unigram training depends on the number of threads, so it is the same on every machine.
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
        raise _training_error(error, options, size) from error
    found = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).vocab_size()
    if found < size:
        console.say(f"the vocabulary has {found:,} pieces, not {size:,}: the text has no more")
    return model.getvalue()


def fitting_size(pairs: int, characters: int) -> int:
    """The size of a vocabulary for text of so many pairs and different characters."""
    size = next((size for limit, size in SIZES if pairs < limit), LARGEST)
    return max(size, min(BYTES + PIECES_PER_CHARACTER * characters, LARGEST))


def _training_error(error: RuntimeError, options: TokenizerOptions, size: int) -> ConfigError | DataError:
    needed = re.search(r"smaller than required_chars\. \d+ vs (\d+)", str(error))
    if needed:
        return ConfigError(
            f"a vocabulary of {size} is too small: characters and special ids alone need "
            f"{needed[1]}; raise --size above that or lower --coverage"
        )
    return DataError(
        f"sentencepiece cannot be trained on {', '.join(options.corpora)}: {str(error).strip()}; "
        "check the text and the options"
    )


def measure_side(side: Side, sentences: Sequence[str], *, language: str = "") -> SideReport:
    """Statistics of this side's pieces on these sentences, and the characters lost in encoding and decoding.

    A character is lost if no canonical equivalent is decoded; white space is not counted.
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
        lost=tuple(LostCharacter(*each) for each in lost.most_common(REPORTED_CHARACTERS)),
    )


def _characters(text: str) -> Counter[str]:
    return Counter("".join(unicodedata.normalize("NFC", text).split()))
