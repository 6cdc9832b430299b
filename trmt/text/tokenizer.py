"""Text to ids and back: one sentencepiece model for both sides, or one for each.

The only file that knows the special ids. Models trained here never normalise; each side does that itself,
by a rule stored with it. Tags are control symbols, which text cannot spell; placeholders are user-defined
symbols, which match wherever the text holds them. With byte fallback every normalised text survives encoding
and decoding, except that U+2581, by which sentencepiece marks white space, comes back as a space.

Imported models number their pieces in their own way: for them there is a list of pieces beside the model.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import sentencepiece

from trmt.config import build
from trmt.errors import BundleError, ConfigError, TrmtError
from trmt.registry import suggestion
from trmt.storage.files import atomic_folder, write_json
from trmt.text.subwords import Sampler

PAD, UNK, BOS, EOS = 0, 1, 2, 3

Normalisation = Literal["nfc", "nfkc", "nmt_nfkc", "nmt_nfkc_cf", "none"]
NORMALISATIONS: tuple[str, ...] = get_args(Normalisation)

FORMAT = 1
LISTED_FORMAT = 2  # of tokenizers with lists of pieces
SETTINGS_FILE = "tokenizer.json"
MARIAN_TAG = re.compile(r"\s*(>>[^<>\s]+<<)\s*")


@dataclass(frozen=True)
class Settings:
    """What a tokenizer is besides its models."""

    languages: tuple[str, str] = ("", "")
    normalise_source: Normalisation = "nfc"
    normalise_target: Normalisation = "nfc"
    tags: tuple[str, ...] = ()
    placeholders: tuple[str, ...] = ()


def normaliser(name: str) -> Callable[[str], str]:
    """The function behind a normalisation's name: any text in, one line with bare ends out."""
    if name == "nfc":
        return lambda text: unicodedata.normalize("NFC", " ".join(_encodable(text).split()))
    if name == "none":
        return lambda text: _encodable(text).replace("\n", " ").strip()
    if name not in NORMALISATIONS:
        raise ConfigError(f"there is no normalisation {name!r}; {suggestion(name, list(NORMALISATIONS))}")
    rules = sentencepiece.SentencePieceNormalizer(
        rule_name=name, add_dummy_prefix=False, escape_whitespaces=False, remove_extra_whitespaces=True
    )
    return lambda text: " ".join(rules.Normalize(_encodable(text)).split())


def _encodable(text: str) -> str:
    """`text` with lone surrogates, which have no UTF-8, turned into U+FFFD."""
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        return "".join("\ufffd" if "\ud800" <= character <= "\udfff" else character for character in text)
    return text


class Side:
    """One language's half of a tokenizer."""

    pad, unk, bos, eos = PAD, UNK, BOS, EOS

    def __init__(self, model: bytes, normalisation: str, placeholders: tuple[str, ...] = ()) -> None:
        self.model = model
        self.normalisation = normalisation
        self.placeholders = placeholders
        self.normalise = normaliser(normalisation)
        self._processor = self._loaded(model)
        self.vocabulary: int = self._processor.vocab_size()
        self._control = frozenset(filter(self._processor.is_control, range(self.vocabulary)))
        self._samplers: dict[float, Sampler] = {}

    def __reduce__(self) -> tuple[type[Side], tuple[Any, ...]]:
        return Side, (self.model, self.normalisation, self.placeholders)

    @staticmethod
    def _loaded(model: bytes) -> Any:
        return _processor(model)

    @property
    def never(self) -> frozenset[int]:
        """Ids that no translation may hold."""
        return frozenset({self.pad, self.bos, self.unk})

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text's pieces, without beginning and end of sentence."""
        # Given a list, sentencepiece starts a thread, which takes a hundred times as long as a sentence.
        return [self._processor.encode(self.normalise(text)) for text in texts]

    def lead(self, text: str) -> tuple[str, str]:
        """What belongs before every part of `text` should it be cut, and the text without it."""
        return "", text

    def decode(self, ids: Sequence[int]) -> str:
        """The text that `ids` spell, whatever they are.

        Special ids and ids outside the vocabulary are left out, and bytes that are no UTF-8 become U+FFFD.
        Byte pieces can spell a newline: whoever writes lines has to deal with it.
        """
        # sentencepiece itself leaves out control symbols, but writes a sign for the unknown piece.
        known = [int(token) for token in ids if 0 <= token < self.vocabulary and token != UNK]
        text: str = self._processor.decode(known)
        return text

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The piece behind each id, as sentencepiece writes it; one outside the vocabulary is unknown."""
        known = (int(token) if 0 <= token < self.vocabulary else UNK for token in ids)
        return [self._processor.id_to_piece(token) for token in known]

    def tag_id(self, tag: str) -> int:
        """The id of a tag such as `<2de>`."""
        token: int = self._processor.piece_to_id(tag)
        if token not in self._control or token in (PAD, BOS, EOS):
            raise ConfigError(
                f"this tokenizer has no tag {tag!r}; name it with --tag when training the tokenizer"
            )
        return token

    def is_byte(self, token: int) -> bool:
        """Whether this id stands for a single byte of a character that has no piece."""
        spells_byte: bool = self._processor.is_byte(token)
        return spells_byte

    def sample(self, ids: Sequence[Sequence[int]], *, alpha: float, seed: int) -> list[list[int]]:
        """The same sentences cut into pieces at random: BPE dropout, or a draw from the unigram lattice.

        `alpha` is the probability of overlooking a merge for BPE; for unigram it sharpens the draw, and the
        most probable pieces come as it grows. The result depends on the arguments and the model alone: not
        on the process, the thread, or what was drawn before. Special symbols, placeholders, bytes and
        unknown pieces stay as they are.
        """
        return self.sampler(alpha).sample(ids, seed=seed)

    def sampler(self, alpha: float) -> Sampler:
        """What `sample` draws with; it keeps what it has drawn."""
        if alpha not in self._samplers:
            self._samplers[alpha] = self._sampler(alpha)
        return self._samplers[alpha]

    def _sampler(self, alpha: float) -> Sampler:
        ids, model = range(self.vocabulary), self._processor
        kept = {model.piece_to_id(placeholder) for placeholder in self.placeholders}
        for stays in (model.is_control, model.is_unknown, model.is_byte, model.is_unused):
            kept.update(filter(stays, ids))
        pieces = [None if token in kept else model.id_to_piece(token) for token in ids]
        return Sampler(pieces, [model.get_score(token) for token in ids], alpha=alpha)


class ListedSide(Side):
    """A side whose ids are places in a list of pieces, as Marian numbers them; sentencepiece only cuts.

    The list may hold pieces that the model never makes: those of the other language, and tags such as
    `>>fr<<`, which count at the beginning of a text. Translations begin with the padding piece.
    """

    def __init__(
        self, model: bytes, normalisation: str, placeholders: tuple[str, ...], listed: tuple[str, ...]
    ) -> None:
        super().__init__(model, normalisation, placeholders)
        self.listed = listed
        self.vocabulary = len(listed)
        self._numbers = {piece: number for number, piece in enumerate(listed)}
        try:
            self.pad, self.unk, self.eos = (self._numbers[piece] for piece in ("<pad>", "<unk>", "</s>"))
        except KeyError as error:
            raise BundleError(f"the vocabulary has no piece {error}; copy or import it again") from error
        self.bos = self.pad

    def __reduce__(self) -> tuple[type[Side], tuple[Any, ...]]:
        return ListedSide, (self.model, self.normalisation, self.placeholders, self.listed)

    @staticmethod
    def _loaded(model: bytes) -> Any:
        return _any_processor(model)

    @property
    def never(self) -> frozenset[int]:
        return frozenset({self.pad})

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [self._encoded(self.normalise(text)) for text in texts]

    def _encoded(self, text: str) -> list[int]:
        lead, text = self.lead(text)
        pieces = [lead.strip()] if lead else []
        pieces += self._processor.encode(text, out_type=str)
        return [self._numbers.get(piece, self.unk) for piece in pieces]

    def lead(self, text: str) -> tuple[str, str]:
        tag = MARIAN_TAG.match(text)
        return (f"{tag[1]} ", text[tag.end() :]) if tag else ("", text)

    def decode(self, ids: Sequence[int]) -> str:
        special = (self.pad, self.unk, self.eos)
        pieces = [
            self.listed[token] for token in ids if 0 <= token < self.vocabulary and token not in special
        ]
        text: str = self._processor.decode(pieces) if pieces else ""
        return text.replace("\u2581", " ")  # which pieces keep that the model does not know

    def pieces(self, ids: Sequence[int]) -> list[str]:
        return [self.listed[token if 0 <= token < self.vocabulary else self.unk] for token in ids]

    def tag_id(self, tag: str) -> int:
        if tag not in self._numbers or not MARIAN_TAG.fullmatch(tag):
            known = sorted(filter(MARIAN_TAG.fullmatch, self.listed))
            raise ConfigError(f"this tokenizer has no tag {tag!r}; known are {', '.join(known) or 'none'}")
        return self._numbers[tag]

    def is_byte(self, token: int) -> bool:
        number = self._model_id(token)
        return number is not None and bool(self._processor.is_byte(number))

    def _model_id(self, token: int) -> int | None:
        """The id by which sentencepiece knows a piece, if it does."""
        number: int = self._processor.piece_to_id(self.listed[token])
        return number if self._processor.id_to_piece(number) == self.listed[token] else None

    def _sampler(self, alpha: float) -> Sampler:
        model = self._processor
        pieces: list[str | None] = []
        scores: list[float] = []
        for token, piece in enumerate(self.listed):
            number = self._model_id(token)
            stays = number is None or any(
                kind(number) for kind in (model.is_control, model.is_unknown, model.is_byte, model.is_unused)
            )
            pieces.append(None if stays else piece)
            scores.append(0.0 if number is None else model.get_score(number))
        return Sampler(pieces, scores, alpha=alpha)


class Tokenizer:
    """The two sides and what they have in common; it can be pickled.

    `listed` holds the pieces in the order of their ids, once for both sides or for each, where these are
    not sentencepiece's own.
    """

    def __init__(
        self, settings: Settings, models: Sequence[bytes], listed: Sequence[Sequence[str]] = ()
    ) -> None:
        assert len(models) in (1, 2), "one model for both sides, or one for each"
        assert len(listed) <= 2, "one list for both sides, or one for each"
        self.settings = settings
        self.models = tuple(models)
        self.listed = tuple(map(tuple, listed))
        self.joint = len(self.listed or models) == 1
        self.source = self._side(0, settings.normalise_source)
        same = self.joint and len(models) == 1 and settings.normalise_source == settings.normalise_target
        self.target = self.source if same else self._side(-1, settings.normalise_target)
        self.fingerprint = _fingerprint(settings, self.models, self.listed)

    def _side(self, place: int, normalisation: str) -> Side:
        of_all = (self.models[place], normalisation, self.settings.placeholders)
        return ListedSide(*of_all, self.listed[place]) if self.listed else Side(*of_all)

    def __reduce__(self) -> tuple[type[Tokenizer], tuple[Any, ...]]:
        return Tokenizer, (self.settings, self.models, self.listed)

    @property
    def languages(self) -> tuple[str, str]:
        """The languages translated from and to; empty where they were not told."""
        return self.settings.languages

    @property
    def tags(self) -> tuple[str, ...]:
        """The control symbols that the user defined."""
        return self.settings.tags

    @property
    def placeholders(self) -> tuple[str, ...]:
        """The symbols that stay whole wherever text holds them."""
        return self.settings.placeholders

    def save(self, folder: Path) -> None:
        """Write the folder that `load` reads, whole or not at all."""
        refuse_foreign(folder)
        with atomic_folder(folder) as partial:
            for name, model in zip(_model_names(len(self.models)), self.models, strict=True):
                (partial / name).write_bytes(model)
            for name, pieces in zip(_list_names(len(self.listed)), self.listed, strict=True):
                write_json(partial / name, pieces)
            head: dict[str, Any] = {"format": FORMAT, "fingerprint": self.fingerprint}
            head["joint"] = len(self.models) == 1
            if self.listed:
                head |= {"format": LISTED_FORMAT, "lists": len(self.listed)}
            write_json(partial / SETTINGS_FILE, head | asdict(self.settings))

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """The tokenizer in a folder that `save` wrote; one that is not as it was written is a BundleError."""
        path = folder / SETTINGS_FILE
        tree = _read_settings(path)
        fingerprint, joint = tree.pop("fingerprint", None), tree.pop("joint", None)
        lists = tree.pop("lists", 0)
        try:
            settings = build(Settings, tree, where=str(path))
            models = [(folder / name).read_bytes() for name in _model_names(1 if joint else 2)]
            listed = [_read_list(folder / name) for name in _list_names(lists)]
        except TrmtError as error:
            raise BundleError(str(error)) from error
        except OSError as error:
            raise BundleError(
                f"cannot read {error.filename}: {error.strerror}; copy or train the tokenizer again"
            ) from error
        if _fingerprint(settings, models, listed) != fingerprint:
            raise BundleError(
                f"the tokenizer in {folder} is not as it was written: its fingerprint differs; "
                "copy or train it again"
            )
        return cls(settings, models, listed)


def refuse_foreign(folder: Path) -> None:
    """Fail if writing a tokenizer to `folder` would replace something that is none."""
    foreign = folder.exists() and not folder.is_dir()
    if folder.is_dir():
        foreign = any(folder.iterdir()) and not (folder / SETTINGS_FILE).is_file()
    if foreign:
        raise BundleError(f"{folder} is there and is no tokenizer; choose another place for this one")


def _model_names(count: int) -> tuple[str, ...]:
    return ("joint.model",) if count == 1 else ("source.model", "target.model")


def _list_names(count: int) -> tuple[str, ...]:
    return ((), ("vocabulary.json",), ("source.vocabulary.json", "target.vocabulary.json"))[count]


def _read_list(path: Path) -> tuple[str, ...]:
    try:
        pieces = json.loads(path.read_bytes())
    except ValueError as error:
        raise BundleError(f"{path} is not valid JSON; copy or import the tokenizer again") from error
    if not isinstance(pieces, list) or not all(isinstance(piece, str) for piece in pieces):
        raise BundleError(f"{path} is not a list of pieces; copy or import the tokenizer again")
    return tuple(pieces)


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise BundleError(
            f"there is no tokenizer in {path.parent}; train one with `trmt tokenizer`"
        ) from error
    except OSError as error:
        raise BundleError(f"cannot read {path}: {error.strerror}; check the path and its rights") from error
    except ValueError as error:
        raise BundleError(f"{path} is not valid JSON; copy or train the tokenizer again") from error
    if not isinstance(tree, dict) or tree.pop("format", None) not in (FORMAT, LISTED_FORMAT):
        raise BundleError(
            f"{path} is not of a format that this trmt knows; upgrade trmt, or train the tokenizer again"
        )
    if tree.get("lists", 0) not in (0, 1, 2):
        raise BundleError(f"{path} is damaged; copy or train the tokenizer again")
    return tree


def _fingerprint(settings: Settings, models: Sequence[bytes], listed: Sequence[Sequence[str]]) -> str:
    """The same for equal settings and models on every machine."""
    digest = hashlib.sha256(json.dumps(asdict(settings), sort_keys=True).encode())
    for model in models:
        digest.update(hashlib.sha256(model).digest())
    if listed:
        digest.update(json.dumps(listed).encode())
    return digest.hexdigest()


def _any_processor(model: bytes) -> Any:
    try:
        return sentencepiece.SentencePieceProcessor(model_proto=model)
    except RuntimeError as error:
        raise BundleError(
            "sentencepiece cannot read the tokenizer's model; copy or train it again"
        ) from error


def _processor(model: bytes) -> Any:
    processor = _any_processor(model)
    ids = (processor.pad_id(), processor.unk_id(), processor.bos_id(), processor.eos_id())
    if ids != (PAD, UNK, BOS, EOS):
        raise BundleError(
            f"a sentencepiece model has the special ids {ids}, not {(PAD, UNK, BOS, EOS)}; "
            "train it with `trmt tokenizer`"
        )
    return processor
