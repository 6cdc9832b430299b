"""Word vectors: embeddings that begin with what word2vec (arXiv 1301.3781) or GloVe found, or with our own.

Files are the text format of word2vec, its binary one, and that of GloVe, which has no first line. A piece
that is a whole word takes the vector of the word; a file of pieces, as `trmt vectors` writes it, fits as
it is.
Vectors are shifted and scaled to the spread that the network's fresh embeddings have.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray

from trmt import console
from trmt.errors import ConfigError, DataError
from trmt.nets.base import Network
from trmt.sets.shards import PAIRS, PreparedSet
from trmt.storage.files import atomic_file
from trmt.text.corpus import lines
from trmt.text.tokenizer import Side, Tokenizer

TRAIN = "train"  # in a recipe: make vectors from the prepared set
MARK = "\u2581"  # begins the pieces that begin a word
TOGETHER = 1 << 14  # sentences that are read at a time
SIDES = ("source", "target")
Matrix = NDArray[np.float32]


@dataclass(frozen=True)
class Vectors:
    """Words and a row for each."""

    words: tuple[str, ...]
    rows: Matrix


# Reading


def read_vectors(path: Path, wanted: Collection[str] | None = None) -> Vectors:
    """The vectors in a file of word2vec or GloVe, or those of the wanted words only."""
    try:
        with path.open("rb") as stream:
            first = stream.readline()
            count, width = _header(first)
            if width and not _is_text(stream, width):
                stream.seek(len(first))
                return _collected(_binary(stream, count, width, path), wanted, path)
    except OSError as error:
        raise DataError(
            f"cannot read {path}: {error.strerror}; check vectors.source and vectors.target"
        ) from error
    return _collected(_text(path, skip=bool(width)), wanted, path)


def _header(line: bytes) -> tuple[int, int]:
    """How many vectors there are and how wide, if the first line says so."""
    parts = line.split()
    if len(parts) == 2 and all(part.isdigit() for part in parts):
        return int(parts[0]), int(parts[1])
    return 0, 0


def _is_text(stream: BinaryIO, width: int) -> bool:
    """Whether the next line is a word and numbers."""
    parts = stream.readline().rstrip().split(b" ")
    try:
        return len(parts) == width + 1 and all(np.isfinite(float(part)) for part in parts[1:])
    except ValueError:
        return False


def _text(path: Path, *, skip: bool) -> Iterator[tuple[str, Matrix]]:
    width = None
    for number, line in enumerate(lines(path), start=1):
        if (skip and number == 1) or not line.strip():
            continue
        parts = line.rstrip(" ").split(" ")
        width = width or len(parts) - 1
        # GloVe's largest files have words with spaces in them.
        try:
            row = np.array(parts[-width:], np.float32)
        except ValueError as error:
            raise DataError(
                f"{path}, line {number}: not a word and {width} numbers; mend the file"
            ) from error
        if width < 1 or len(row) != width or len(parts) <= width:
            raise DataError(f"{path}, line {number}: not a word and {width} numbers; mend the file")
        yield " ".join(parts[:-width]), row


def _binary(stream: BinaryIO, count: int, width: int, path: Path) -> Iterator[tuple[str, Matrix]]:
    for number in range(1, count + 1):
        word = bytearray()
        while (byte := stream.read(1)) not in (b" ", b""):
            if byte != b"\n":  # some writers put one behind each vector
                word += byte
        raw = stream.read(4 * width)
        if len(raw) < 4 * width:
            raise DataError(f"{path} ends in vector {number:,} of {count:,}; copy it again")
        yield word.decode("utf-8", errors="replace"), np.frombuffer(raw, "<f4").astype(np.float32)


def _collected(found: Iterable[tuple[str, Matrix]], wanted: Collection[str] | None, path: Path) -> Vectors:
    kept: dict[str, Matrix] = {}
    anything = False
    for word, row in found:
        anything = True
        if (wanted is None or word in wanted) and word not in kept:
            if not np.isfinite(row).all():
                raise DataError(f"{path}: the vector of {word!r} is not finite; make the file again")
            kept[word] = row
    if not anything:
        raise DataError(f"{path} holds no vectors; name a file of word2vec or GloVe")
    return Vectors(tuple(kept), np.stack(list(kept.values())) if kept else np.zeros((0, 0), np.float32))


# Making


def train_vectors(
    sentences: Iterable[Sequence[str]], *, width: int, seed: int = 1, epochs: int = 5
) -> Vectors:
    """Vectors of skip-gram with negative sampling, by gensim with one worker: the same ones each time."""
    try:
        from gensim.models import Word2Vec
    except ImportError as error:
        raise ConfigError(
            "making word vectors needs the package gensim; install it with pip install 'trmt[vectors]', or "
            "name a file of vectors"
        ) from error
    drawn = {"seed": seed, "workers": 1}
    model = Word2Vec(sentences, vector_size=width, sg=1, min_count=1, window=5, epochs=epochs, **drawn)
    return Vectors(tuple(model.wv.index_to_key), np.asarray(model.wv.vectors, np.float32))


def write_vectors(path: Path, vectors: Vectors) -> None:
    """Write vectors in the text format of word2vec."""
    with atomic_file(path) as stream:
        stream.write(f"{len(vectors.words)} {vectors.rows.shape[1]}\n".encode())
        for word, row in zip(vectors.words, vectors.rows, strict=True):
            stream.write(f"{word} {' '.join(f'{x:.6g}' for x in row.tolist())}\n".encode())


class TextPieces:
    """The sentences of some files in pieces, as often as they are asked for."""

    def __init__(self, files: Sequence[str], side: Side) -> None:
        self.files, self.side = files, side

    def __iter__(self) -> Iterator[list[str]]:
        for name in self.files:
            for line in lines(name):
                if line.strip():
                    yield self.side.pieces(self.side.encode([line])[0])


class SetPieces:
    """The sentences of one column of a prepared set in pieces, as often as they are asked for."""

    def __init__(self, data: PreparedSet, column: str, side: Side) -> None:
        self.split, self.column = data.split("train"), column
        self.names = side.pieces(range(side.vocabulary))

    def __iter__(self) -> Iterator[list[str]]:
        for begin in range(0, len(self.split), TOGETHER):
            places = np.arange(begin, min(begin + TOGETHER, len(self.split)))
            ids, lengths = self.split.gather(self.column, places)
            for part in np.split(ids, np.cumsum(lengths)[:-1]):
                yield [self.names[token] for token in part.tolist()]


# Using


def check_and_freeze(net: Network, recipe: Any) -> None:
    """Refuse what vectors cannot be put into, and hold still what is to stay as it is."""
    asked = [side for side in SIDES if getattr(recipe.vectors, side)]
    if asked and recipe.training.shard:
        raise ConfigError(f"training.shard = true and vectors.{asked[0]} exclude each other; leave one out")
    for side in asked:
        if _embedding(net, side) is None:
            raise ConfigError(
                f"architecture = {recipe.architecture!r} has no embeddings for vectors.{side}; leave it out"
            )
        if recipe.vectors.frozen:
            _freeze(net, side)
    if len(asked) == 2 and _embedding(net, "source") is _embedding(net, "target"):
        raise ConfigError(
            'vectors.source and vectors.target are two for the one table of network.tied = "all"; leave one '
            'out, or set network.tied = "target"'
        )


def _embedding(net: Any, side: str) -> Any:
    """The embeddings of one side; None if the network has none."""
    stack = getattr(net, "encoder" if side == "source" else "decoder", None)
    return getattr(net, f"{side}_embedding", getattr(getattr(stack, "embedding", None), "tokens", None))


def _freeze(net: Network, side: str) -> None:
    weight = _embedding(net, side).weight
    output = getattr(getattr(net, "output", None), "weight", None)
    if weight is output:
        raise ConfigError(
            f"vectors.frozen = true would freeze the output too: network.tied = {net.config.tied!r} ties it "
            f'to the {side} embeddings; set network.tied = "none", or do not freeze'
        )
    weight.requires_grad_(False)


def begin_with(net: Network, config: Any, tokenizer: Tokenizer, data: PreparedSet) -> None:
    """Put the vectors that a recipe names into the embeddings of a fresh network."""
    for name in SIDES:
        file = getattr(config, name)
        if not file:
            continue
        side: Side = getattr(tokenizer, name)
        weight = _embedding(net, name).weight
        if file == TRAIN:
            column = f"{name}.ids" if data.kind == PAIRS else "text.ids"
            vectors = train_vectors(SetPieces(data, column, side), width=weight.shape[1])
        else:
            vectors = read_vectors(Path(file), set(_spellings(side)))
        known = put(weight, vectors, side, where=f"vectors.{name} = {file!r}")
        console.say(f"{name} embeddings: {known:,} of {side.vocabulary:,} pieces begin with a vector")


def _spellings(side: Side) -> Iterator[str]:
    for piece in side.pieces(range(side.vocabulary)):
        yield from _words(piece)


def _words(piece: str) -> list[str]:
    """What a file may call a piece, the best first."""
    if not piece.startswith(MARK) or piece == MARK:
        return [piece]
    return [piece, piece[1:], piece[1:].lower()]


def put(weight: torch.Tensor, vectors: Vectors, side: Side, *, where: str) -> int:
    """Overwrite the rows of the pieces that have a vector; how many have one is returned."""
    places = {word: number for number, word in enumerate(vectors.words)}
    # In a file of pieces, a word without a mark goes on with another one.
    marked = any(word.startswith(MARK) for word in vectors.words)
    at, rows = [], []
    for number, piece in enumerate(side.pieces(range(side.vocabulary))):
        names = [piece] if marked else _words(piece)[-2:] if piece.startswith(MARK) else []
        found = next((places[name] for name in names if name in places), None)
        if found is not None:
            at.append(number)
            rows.append(found)
    if not at:
        raise DataError(f"{where} has no vector for any piece of the tokenizer; is it of another language?")
    if vectors.rows.shape[1] != weight.shape[1]:
        raise ConfigError(
            f"{where} has vectors of {vectors.rows.shape[1]} numbers, network.d_model is {weight.shape[1]}; "
            "set one to the other"
        )
    taken = torch.from_numpy(vectors.rows[rows])
    spread = float(weight.detach().std())
    taken = (taken - taken.mean()) / taken.std().clamp(min=1e-12) * spread
    with torch.no_grad():
        weight[torch.tensor(at)] = taken.to(weight)
    return len(at)
