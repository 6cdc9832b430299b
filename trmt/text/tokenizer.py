"""Text to ids and back: one sentencepiece model for both sides, or one for each.

Models trained here do not normalise: each side normalises text itself, by the rule in its settings. Tags are
control symbols, which text cannot spell; placeholders are user-defined symbols, which match wherever the text
has them. With byte fallback every normalised text survives encoding and decoding, except that U+2581, which
sentencepiece uses for white space, comes back as a space.

Models imported from Marian have their own ids: for them the vocabulary is stored beside the model.
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

from trmt.config import build_stored
from trmt.errors import BundleError, ConfigError
from trmt.registry import suggestion
from trmt.storage.files import atomic_folder, write_json
from trmt.text.subwords import WORD_MARK, Sampler
from trmt.trees import TreeError, read_bytes, read_json

PAD, UNK, BOS, EOS = 0, 1, 2, 3

Normalisation = Literal["nfc", "nfkc", "nmt_nfkc", "nmt_nfkc_cf", "none"]
NORMALISATIONS: tuple[str, ...] = get_args(Normalisation)

FORMAT = 1
VOCABULARY_FORMAT = 2  # with vocabularies beside the models
SETTINGS_FILE = "tokenizer.json"
MARIAN_TAG = re.compile(r"\s*(>>[^<>\s]+<<)\s*")


@dataclass(frozen=True)
class TokenizerSettings:
    """The settings of a tokenizer, stored beside its models."""

    languages: tuple[str, str] = ("", "")  # of source and target; empty if not given
    normalise_source: Normalisation = "nfc"  # the normalisation of source text
    normalise_target: Normalisation = "nfc"  # the normalisation of target text
    tags: tuple[str, ...] = ()  # control symbols, which text cannot spell
    placeholders: tuple[str, ...] = ()  # symbols that are never split in text


def normaliser(name: str) -> Callable[[str], str]:
    """The function of a normalisation: from any text to one line without white space at its ends."""
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
    """`text` with U+FFFD for lone surrogates, which have no UTF-8."""
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        return "".join("\ufffd" if "\ud800" <= character <= "\udfff" else character for character in text)
    return text


class Side:
    """The tokenizer of source text or of target text."""

    pad, unk, bos, eos = PAD, UNK, BOS, EOS

    def __init__(self, model: bytes, normalisation: str, placeholders: tuple[str, ...] = ()) -> None:
        self.model = model
        self.normalisation = normalisation
        self.placeholders = placeholders
        self.normalise = normaliser(normalisation)
        self._processor = self._load(model)
        self.vocabulary: int = self._processor.vocab_size()
        self._control = frozenset(filter(self._processor.is_control, range(self.vocabulary)))
        self._samplers: dict[float, Sampler] = {}

    def __reduce__(self) -> tuple[type[Side], tuple[Any, ...]]:
        return Side, (self.model, self.normalisation, self.placeholders)

    @staticmethod
    def _load(model: bytes) -> Any:
        return _load_trained_here(model)

    @property
    def banned_ids(self) -> frozenset[int]:
        """Ids that no translation may have."""
        return frozenset({self.pad, self.bos, self.unk})

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of the pieces of each text, without bos and eos."""
        # For a list, sentencepiece starts a thread, which takes a hundred times as long as a sentence.
        return [self._processor.encode(self.normalise(text)) for text in texts]

    def split_tag(self, text: str) -> tuple[str, str]:
        """The tag at the beginning of `text`, which each part of a split text needs, and the rest."""
        return "", text

    def decode(self, ids: Sequence[int]) -> str:
        """The text of any ids.

        Special ids and ids outside the vocabulary are skipped, and bytes that are no UTF-8 become U+FFFD.
        Byte pieces can spell a newline, which a caller that writes lines must replace.
        """
        # sentencepiece skips control symbols, but has a sign for the unknown piece.
        known = [int(token) for token in ids if 0 <= token < self.vocabulary and token != UNK]
        text: str = self._processor.decode(known)
        return text

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The piece of each id as sentencepiece spells it, or the unknown piece outside the vocabulary."""
        known = (int(token) if 0 <= token < self.vocabulary else UNK for token in ids)
        return [self._processor.id_to_piece(token) for token in known]

    def tag_id(self, tag: str) -> int:
        """The id of a tag such as `<2de>`."""
        token: int = self._processor.piece_to_id(tag)
        if token not in self._control or token in (PAD, BOS, EOS):
            raise ConfigError(f"this tokenizer has no tag {tag!r}; train one with --tag {tag}")
        return token

    def is_byte(self, token: int) -> bool:
        """Whether this id is a single byte of a character without a piece."""
        is_byte: bool = self._processor.is_byte(token)
        return is_byte

    def sample(self, ids: Sequence[Sequence[int]], *, alpha: float, seed: int) -> list[list[int]]:
        """The same sentences segmented at random: BPE-dropout, or a draw from the unigram lattice.

        `alpha` is the probability of dropping a merge for BPE; for unigram models a larger alpha prefers more
        probable segmentations. The result depends on the arguments and the model alone, and not on the
        process, the thread, or earlier draws. Special symbols, placeholders, bytes and unknown pieces are not
        changed.
        """
        return self.sampler(alpha).sample(ids, seed=seed)

    def sampler(self, alpha: float) -> Sampler:
        """The sampler that `sample` uses, with its cache."""
        if alpha not in self._samplers:
            self._samplers[alpha] = self._make_sampler(alpha)
        return self._samplers[alpha]

    def _make_sampler(self, alpha: float) -> Sampler:
        ids, model = range(self.vocabulary), self._processor
        fixed = {model.piece_to_id(placeholder) for placeholder in self.placeholders}
        for is_fixed in (model.is_control, model.is_unknown, model.is_byte, model.is_unused):
            fixed.update(filter(is_fixed, ids))
        pieces = [None if token in fixed else model.id_to_piece(token) for token in ids]
        return Sampler(pieces, [model.get_score(token) for token in ids], alpha=alpha)


class VocabularySide(Side):
    """A side whose ids are indices in a vocabulary, as Marian has it; sentencepiece only segments the text.

    The vocabulary may have pieces that the model never makes: those of the other language, and tags such as
    `>>fr<<`, which count at the beginning of a text. Translations begin with the padding piece.
    """

    def __init__(
        self, model: bytes, normalisation: str, placeholders: tuple[str, ...], all_pieces: tuple[str, ...]
    ) -> None:
        super().__init__(model, normalisation, placeholders)
        self.all_pieces = all_pieces
        self.vocabulary = len(all_pieces)
        self._ids = {piece: token for token, piece in enumerate(all_pieces)}
        try:
            self.pad, self.unk, self.eos = (self._ids[piece] for piece in ("<pad>", "<unk>", "</s>"))
        except KeyError as error:
            raise BundleError(f"the vocabulary has no piece {error}; copy or import it again") from error
        self.bos = self.pad

    def __reduce__(self) -> tuple[type[Side], tuple[Any, ...]]:
        return VocabularySide, (self.model, self.normalisation, self.placeholders, self.all_pieces)

    @staticmethod
    def _load(model: bytes) -> Any:
        return load_model(model)

    @property
    def banned_ids(self) -> frozenset[int]:
        return frozenset({self.pad})

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [self._encode(self.normalise(text)) for text in texts]

    def _encode(self, text: str) -> list[int]:
        tag, text = self.split_tag(text)
        pieces = [tag.strip()] if tag else []
        pieces += self._processor.encode(text, out_type=str)
        return [self._ids.get(piece, self.unk) for piece in pieces]

    def split_tag(self, text: str) -> tuple[str, str]:
        tag = MARIAN_TAG.match(text)
        return (f"{tag[1]} ", text[tag.end() :]) if tag else ("", text)

    def decode(self, ids: Sequence[int]) -> str:
        special = (self.pad, self.unk, self.eos)
        pieces = [
            self.all_pieces[token] for token in ids if 0 <= token < self.vocabulary and token not in special
        ]
        text: str = self._processor.decode(pieces) if pieces else ""
        return text.replace(WORD_MARK, " ")  # it stays in pieces that the model does not have

    def pieces(self, ids: Sequence[int]) -> list[str]:
        return [self.all_pieces[token if 0 <= token < self.vocabulary else self.unk] for token in ids]

    def tag_id(self, tag: str) -> int:
        if tag not in self._ids or not MARIAN_TAG.fullmatch(tag):
            known = sorted(filter(MARIAN_TAG.fullmatch, self.all_pieces))
            raise ConfigError(f"this tokenizer has no tag {tag!r}; known are {', '.join(known) or 'none'}")
        return self._ids[tag]

    def is_byte(self, token: int) -> bool:
        model_id = self._model_id(token)
        return model_id is not None and bool(self._processor.is_byte(model_id))

    def _model_id(self, token: int) -> int | None:
        """The id of a piece in the sentencepiece model, if the model has it."""
        model_id: int = self._processor.piece_to_id(self.all_pieces[token])
        return model_id if self._processor.id_to_piece(model_id) == self.all_pieces[token] else None

    def _make_sampler(self, alpha: float) -> Sampler:
        model = self._processor
        special = (model.is_control, model.is_unknown, model.is_byte, model.is_unused)
        pieces: list[str | None] = []
        scores: list[float] = []
        for token, piece in enumerate(self.all_pieces):
            model_id = self._model_id(token)
            fixed = model_id is None or any(is_special(model_id) for is_special in special)
            pieces.append(None if fixed else piece)
            scores.append(0.0 if model_id is None else model.get_score(model_id))
        return Sampler(pieces, scores, alpha=alpha)


class Tokenizer:
    """The source and the target side with their settings; it can be pickled.

    `vocabularies` are the pieces in the order of their ids, one vocabulary for both sides or one for each, if
    the ids are not those of the sentencepiece models.
    """

    def __init__(
        self,
        settings: TokenizerSettings,
        models: Sequence[bytes],
        vocabularies: Sequence[Sequence[str]] = (),
    ) -> None:
        assert len(models) in (1, 2), "one model for both sides, or one for each"
        assert len(vocabularies) <= 2, "one vocabulary for both sides, or one for each"
        self.settings = settings
        self.models = tuple(models)
        self.vocabularies = tuple(map(tuple, vocabularies))
        self.joint = len(self.vocabularies or models) == 1
        self.source = self._make_side(0, settings.normalise_source)
        same = self.joint and len(models) == 1 and settings.normalise_source == settings.normalise_target
        self.target = self.source if same else self._make_side(-1, settings.normalise_target)
        self.fingerprint = _fingerprint(settings, self.models, self.vocabularies)

    def _make_side(self, index: int, normalisation: str) -> Side:
        arguments = (self.models[index], normalisation, self.settings.placeholders)
        if self.vocabularies:
            return VocabularySide(*arguments, self.vocabularies[index])
        return Side(*arguments)

    def __reduce__(self) -> tuple[type[Tokenizer], tuple[Any, ...]]:
        return Tokenizer, (self.settings, self.models, self.vocabularies)

    @property
    def languages(self) -> tuple[str, str]:
        """The source and the target language; empty if they were not given."""
        return self.settings.languages

    @property
    def tags(self) -> tuple[str, ...]:
        """The control symbols that the user defined."""
        return self.settings.tags

    @property
    def placeholders(self) -> tuple[str, ...]:
        """The symbols that are never split in text."""
        return self.settings.placeholders

    def save(self, folder: Path | str) -> None:
        """Write the folder that `load` reads, atomically."""
        folder = Path(folder)
        check_replaceable(folder)
        with atomic_folder(folder) as partial:
            for name, model in zip(_model_names(len(self.models)), self.models, strict=True):
                (partial / name).write_bytes(model)
            names = _vocabulary_names(len(self.vocabularies))
            for name, pieces in zip(names, self.vocabularies, strict=True):
                write_json(partial / name, pieces)
            head: dict[str, Any] = {"format": FORMAT, "fingerprint": self.fingerprint}
            head["joint"] = len(self.models) == 1
            if self.vocabularies:
                head |= {"format": VOCABULARY_FORMAT, "lists": len(self.vocabularies)}
            write_json(partial / SETTINGS_FILE, head | asdict(self.settings))

    @classmethod
    def load(cls, folder: Path | str) -> Tokenizer:
        """The tokenizer in a folder that `save` wrote; one that has changed since is a BundleError."""
        folder = Path(folder)
        path = folder / SETTINGS_FILE
        tree = _read_settings(path)
        fingerprint, joint = tree.pop("fingerprint", None), tree.pop("joint", None)
        lists = tree.pop("lists", 0)
        advice = "copy or train the tokenizer again"
        settings = build_stored(TokenizerSettings, tree, where=str(path), advice=advice, exact=True)
        try:
            models = [read_bytes(folder / name) for name in _model_names(1 if joint else 2)]
            vocabularies = [_read_vocabulary(folder / name) for name in _vocabulary_names(lists)]
        except TreeError as error:
            raise BundleError(f"a file of the tokenizer in {folder} {error}; {advice}") from error
        except OSError as error:
            raise BundleError(
                f"cannot read {error.filename}: {error.strerror}; copy or train the tokenizer again"
            ) from error
        if _fingerprint(settings, models, vocabularies) != fingerprint:
            raise BundleError(
                f"the tokenizer in {folder} is not as it was written: its fingerprint differs; "
                "copy or train it again"
            )
        return cls(settings, models, vocabularies)


def check_replaceable(folder: Path, languages: tuple[str, str] | None = None) -> None:
    """Refuse to write a tokenizer to a path that has something else, or a tokenizer for other languages."""
    other = folder.exists() and not folder.is_dir()
    if folder.is_dir():
        other = any(folder.iterdir()) and not (folder / SETTINGS_FILE).is_file()
    if other:
        raise BundleError(f"{folder} exists and is no tokenizer; choose another path for this one")
    before = read_languages(folder)
    if languages is not None and before is not None and all(before) and before != languages:
        raise BundleError(
            f"{folder} is the tokenizer for {before[0]} to {before[1]}, which would be lost; name another "
            "folder for this one"
        )


def read_fingerprint(folder: Path) -> str | None:
    """What the settings of a tokenizer's folder say its fingerprint is; None without a tokenizer."""
    try:
        return str(json.loads((folder / SETTINGS_FILE).read_bytes())["fingerprint"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def read_languages(folder: Path) -> tuple[str, str] | None:
    """The languages of the tokenizer in a folder, empty ones if it has none; None without a tokenizer."""
    try:
        source, target = json.loads((folder / SETTINGS_FILE).read_bytes())["languages"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return str(source), str(target)


def _model_names(count: int) -> tuple[str, ...]:
    return ("joint.model",) if count == 1 else ("source.model", "target.model")


def _vocabulary_names(count: int) -> tuple[str, ...]:
    return ((), ("vocabulary.json",), ("source.vocabulary.json", "target.vocabulary.json"))[count]


def _read_vocabulary(path: Path) -> tuple[str, ...]:
    try:
        pieces = read_json(path)
    except TreeError as error:
        raise BundleError(f"{path} {error}; copy or import the tokenizer again") from error
    if not isinstance(pieces, list) or not all(isinstance(piece, str) for piece in pieces):
        raise BundleError(f"{path} is not a list of pieces; copy or import the tokenizer again")
    return tuple(pieces)


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        tree = read_json(path)
    except FileNotFoundError as error:
        raise BundleError(
            f"there is no tokenizer in {path.parent}; train one with `trmt tokenizer`"
        ) from error
    except NotADirectoryError as error:
        raise BundleError(
            f"{path.parent} is a file and not a tokenizer; name a folder that `trmt tokenizer` wrote"
        ) from error
    except OSError as error:
        raise BundleError(
            f"cannot read {path}: {error.strerror}; check the path and its permissions"
        ) from error
    except TreeError as error:
        raise BundleError(f"{path} {error}; copy or train the tokenizer again") from error
    if not isinstance(tree, dict) or tree.pop("format", None) not in (FORMAT, VOCABULARY_FORMAT):
        raise BundleError(
            f"{path} has a format that this version of trmt does not know; upgrade trmt, or train the "
            "tokenizer again"
        )
    if tree.get("lists", 0) not in (0, 1, 2):
        raise BundleError(f"{path} is damaged; copy or train the tokenizer again")
    return tree


def _fingerprint(
    settings: TokenizerSettings, models: Sequence[bytes], vocabularies: Sequence[Sequence[str]]
) -> str:
    """A hash of settings, models and vocabularies."""
    digest = hashlib.sha256(json.dumps(asdict(settings), sort_keys=True).encode())
    for model in models:
        digest.update(hashlib.sha256(model).digest())
    if vocabularies:
        digest.update(json.dumps(vocabularies).encode())
    return digest.hexdigest()


def load_model(model: bytes) -> Any:
    """A sentencepiece model, whatever its special ids are."""
    try:
        return sentencepiece.SentencePieceProcessor(model_proto=model)
    except RuntimeError as error:
        raise BundleError(
            "sentencepiece cannot read the tokenizer's model; copy or train it again"
        ) from error


def _load_trained_here(model: bytes) -> Any:
    processor = load_model(model)
    ids = (processor.pad_id(), processor.unk_id(), processor.bos_id(), processor.eos_id())
    if ids != (PAD, UNK, BOS, EOS):
        raise BundleError(
            f"a sentencepiece model has the special ids {ids}, not {(PAD, UNK, BOS, EOS)}; "
            "train it with `trmt tokenizer`"
        )
    return processor
