"""Word vectors: initialising embeddings with vectors of word2vec (arXiv 1301.3781), GloVe, or trained here.

Files have the text or the binary format of word2vec, or that of GloVe, which has no header. A piece that is a
whole word takes the vector of the word. A file of vectors of pieces, as `trmt vectors` writes it, is used as
it is. Vectors are shifted and scaled to the standard deviation of the network's fresh embeddings.
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
from trmt.text.lines import read_lines
from trmt.text.tokenizer import Side, Tokenizer

TRAIN = "train"  # in a recipe: train vectors on the prepared set
WORD_START = "\u2581"  # first character of the pieces that begin a word
READ_SENTENCES = 1 << 14  # at a time
SIDES = ("source", "target")
Floats32 = NDArray[np.float32]


@dataclass(frozen=True)
class WordVectors:
    """Words and their vectors."""

    words: tuple[str, ...]
    rows: Floats32  # one vector for each word


# Reading


def read_vectors(path: Path, wanted: Collection[str] | None = None) -> WordVectors:
    """The vectors in a file of word2vec or GloVe, or only those of the wanted words."""
    try:
        with path.open("rb") as stream:
            first_line = stream.readline()
            count, size = _parse_header(first_line)
            if size and not _is_text(stream, size):
                stream.seek(len(first_line))
                return _collect(_read_binary(stream, count, size, path), wanted, path)
    except OSError as error:
        raise DataError(
            f"cannot read {path}: {error.strerror}; check vectors.source and vectors.target"
        ) from error
    return _collect(_read_text(path, has_header=bool(size)), wanted, path)


def _parse_header(line: bytes) -> tuple[int, int]:
    """The number of vectors and their size, if the line is a header; else zeros."""
    fields = line.split()
    if len(fields) == 2 and all(field.isdigit() for field in fields):
        return int(fields[0]), int(fields[1])
    return 0, 0


def _is_text(stream: BinaryIO, size: int) -> bool:
    """Whether the next line is a word and numbers."""
    fields = stream.readline().rstrip().split(b" ")
    try:
        return len(fields) == size + 1 and all(np.isfinite(float(field)) for field in fields[1:])
    except ValueError:
        return False


def _read_text(path: Path, *, has_header: bool) -> Iterator[tuple[str, Floats32]]:
    size = None
    for number, line in enumerate(read_lines(path), start=1):
        if (has_header and number == 1) or not line.strip():
            continue
        fields = line.rstrip(" ").split(" ")
        size = size or len(fields) - 1
        # Counted from the end, because GloVe's largest files have words with spaces in them.
        try:
            row = np.array(fields[-size:], np.float32)
        except ValueError as error:
            raise DataError(
                f"{path}, line {number}: not a word and {size} numbers; correct the file"
            ) from error
        if size < 1 or len(row) != size or len(fields) <= size:
            raise DataError(f"{path}, line {number}: not a word and {size} numbers; correct the file")
        yield " ".join(fields[:-size]), row


def _read_binary(stream: BinaryIO, count: int, size: int, path: Path) -> Iterator[tuple[str, Floats32]]:
    for number in range(1, count + 1):
        word = bytearray()
        while (byte := stream.read(1)) not in (b" ", b""):
            if byte != b"\n":  # some programs write a line end after each vector
                word += byte
        raw = stream.read(4 * size)
        if len(raw) < 4 * size:
            raise DataError(f"{path} ends in vector {number:,} of {count:,}; copy it again")
        yield word.decode("utf-8", errors="replace"), np.frombuffer(raw, "<f4").astype(np.float32)


def _collect(
    found: Iterable[tuple[str, Floats32]], wanted: Collection[str] | None, path: Path
) -> WordVectors:
    rows: dict[str, Floats32] = {}
    is_empty = True
    for word, row in found:
        is_empty = False
        if (wanted is None or word in wanted) and word not in rows:
            if not np.isfinite(row).all():
                raise DataError(f"{path}: the vector of {word!r} is not finite; make the file again")
            rows[word] = row
    if is_empty:
        raise DataError(f"{path} has no vectors; name a file of word2vec or GloVe")
    return WordVectors(tuple(rows), np.stack(list(rows.values())) if rows else np.zeros((0, 0), np.float32))


# Training and writing


def train_vectors(
    sentences: Iterable[Sequence[str]], *, size: int, seed: int = 1, epochs: int = 5
) -> WordVectors:
    """Vectors by skip-gram with negative sampling (gensim, with one worker so that it is reproducible)."""
    try:
        from gensim.models import Word2Vec
    except ImportError as error:
        raise ConfigError(
            "training word vectors needs the package gensim; install it with pip install 'trmt[vectors]', or "
            "name a file of vectors"
        ) from error
    fixed = {"seed": seed, "workers": 1}
    model = Word2Vec(sentences, vector_size=size, sg=1, min_count=1, window=5, epochs=epochs, **fixed)
    return WordVectors(tuple(model.wv.index_to_key), np.asarray(model.wv.vectors, np.float32))


def write_vectors(path: Path, vectors: WordVectors) -> None:
    """Write vectors in the text format of word2vec."""
    with atomic_file(path) as stream:
        stream.write(f"{len(vectors.words)} {vectors.rows.shape[1]}\n".encode())
        for word, row in zip(vectors.words, vectors.rows, strict=True):
            stream.write(f"{word} {' '.join(f'{x:.6g}' for x in row.tolist())}\n".encode())


class TextPieces:
    """The sentences of some files as pieces; can be iterated repeatedly."""

    def __init__(self, files: Sequence[str], side: Side) -> None:
        self.files, self.side = files, side

    def __iter__(self) -> Iterator[list[str]]:
        for name in self.files:
            for line in read_lines(name):
                if line.strip():
                    yield self.side.pieces(self.side.encode([line])[0])


class SetPieces:
    """The sentences of one column of a prepared set as pieces; can be iterated repeatedly."""

    def __init__(self, data: PreparedSet, column: str, side: Side) -> None:
        self.split, self.column = data.split("train"), column
        self.names = side.pieces(range(side.vocabulary))

    def __iter__(self) -> Iterator[list[str]]:
        for begin in range(0, len(self.split), READ_SENTENCES):
            numbers = np.arange(begin, min(begin + READ_SENTENCES, len(self.split)))
            ids, lengths = self.split.gather(self.column, numbers)
            for sentence in np.split(ids, np.cumsum(lengths)[:-1]):
                yield [self.names[token] for token in sentence.tolist()]


# Initialising embeddings


def check_and_freeze(net: Network, recipe: Any) -> None:
    """Check that a recipe's vectors fit its network, and exclude frozen embeddings from training."""
    sides = [side for side in SIDES if getattr(recipe.vectors, side)]
    if sides and recipe.training.shard:
        raise ConfigError(f"training.shard = true and vectors.{sides[0]} exclude each other; leave one out")
    for side in sides:
        if _embedding(net, side) is None:
            raise ConfigError(
                f"architecture = {recipe.architecture!r} has no embeddings for vectors.{side}; leave it out"
            )
        if recipe.vectors.frozen:
            _freeze(net, side)
    if len(sides) == 2 and _embedding(net, "source") is _embedding(net, "target"):
        raise ConfigError(
            'network.tied = "all" gives both sides the same embeddings, so that vectors.source and '
            'vectors.target exclude each other; leave one out, or set network.tied = "target"'
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


def initialise_embeddings(net: Network, config: Any, tokenizer: Tokenizer, data: PreparedSet) -> None:
    """Initialise the embeddings of a network with the vectors that a recipe names."""
    for name in SIDES:
        file = getattr(config, name)
        if not file:
            continue
        side: Side = getattr(tokenizer, name)
        weight = _embedding(net, name).weight
        if file == TRAIN:
            column = f"{name}.ids" if data.kind == PAIRS else "text.ids"
            vectors = train_vectors(SetPieces(data, column, side), size=weight.shape[1])
        else:
            vectors = read_vectors(Path(file), set(_spellings(side)))
        count = set_rows(weight, vectors, side, where=f"vectors.{name} = {file!r}")
        console.say(f"{name} embeddings: {count:,} of {side.vocabulary:,} pieces start with a word vector")


def _spellings(side: Side) -> Iterator[str]:
    for piece in side.pieces(range(side.vocabulary)):
        yield from _names(piece)


def _names(piece: str) -> list[str]:
    """The words under which a file may have a vector for a piece, the best first."""
    if not piece.startswith(WORD_START) or piece == WORD_START:
        return [piece]
    return [piece, piece[1:], piece[1:].lower()]


def set_rows(weight: torch.Tensor, vectors: WordVectors, side: Side, *, where: str) -> int:
    """Overwrite the embeddings of the pieces that have a vector; returns the number of these pieces."""
    indices = {word: index for index, word in enumerate(vectors.words)}
    # In a file of pieces, one without WORD_START continues a word.
    has_pieces = any(word.startswith(WORD_START) for word in vectors.words)
    tokens, rows = [], []
    for token, piece in enumerate(side.pieces(range(side.vocabulary))):
        names = [piece] if has_pieces else _names(piece)[-2:] if piece.startswith(WORD_START) else []
        found = next((indices[name] for name in names if name in indices), None)
        if found is not None:
            tokens.append(token)
            rows.append(found)
    if not tokens:
        raise DataError(f"{where} has no vector for any piece of the tokenizer; is it of another language?")
    if vectors.rows.shape[1] != weight.shape[1]:
        raise ConfigError(
            f"{where} has vectors of {vectors.rows.shape[1]} numbers and network.d_model is "
            f"{weight.shape[1]}; they have to be equal"
        )
    values = torch.from_numpy(vectors.rows[rows])
    deviation = float(weight.detach().std())
    values = (values - values.mean()) / values.std().clamp(min=1e-12) * deviation
    with torch.no_grad():
        weight[torch.tensor(tokens)] = values.to(weight)
    return len(tokens)
