"""The prepared data of a seed: texts, a tokenizer, and the sets that systems train on."""

from __future__ import annotations

import shutil
from pathlib import Path

from claims import texts
from claims.scale import Scale


def folder(work: Path, seed: int) -> Path:
    """Where the data of a seed is."""
    return work / f"seed-{seed}" / "data"


def prepare(work: Path, seed: int, scale: Scale, corpus: Path | None) -> None:
    """Make what is not there yet; it appears whole."""
    from trmt.sets.documents import DocumentOptions, prepare_documents
    from trmt.sets.preparing import PrepareOptions, prepare
    from trmt.text.tokenizer_training import TokenizerOptions, train_tokenizer

    out = folder(work, seed)
    if out.exists():
        return
    made = out.with_name("partial")
    shutil.rmtree(made, ignore_errors=True)
    texts.write(made / "text", scale, seed, corpus)
    train = str(made / "text" / "train")
    train_tokenizer(
        TokenizerOptions(
            corpora=(train,), languages=texts.LANGUAGES, size=scale.vocabulary, byte_fallback=False
        ),
        out=made / "tokenizer",
    )
    for name in ("train", "little"):
        prepare(
            PrepareOptions(
                train=(str(made / "text" / name),),
                dev_size=0,
                out=made / name,
                tokenizer=made / "tokenizer",
                keep_duplicates=True,
                workers=1,
            )
        )
    prepare_documents(
        DocumentOptions(
            (str(made / "text" / "documents.en"),), out=made / "documents", tokenizer=made / "tokenizer"
        )
    )
    made.rename(out)


def vectors(prepared: Path, width: int) -> Path:
    """A file of vectors of pieces, made from all of the text on both sides."""
    from trmt.text.tokenizer import Tokenizer
    from trmt.training.word_vectors import TextPieces, train_vectors, write_vectors

    out = prepared / f"vectors-{width}.txt"
    if not out.exists():
        side = Tokenizer.load(prepared / "tokenizer").source
        mono = [str(prepared / "text" / f"train.{language}") for language in texts.LANGUAGES]
        write_vectors(out, train_vectors(TextPieces(mono, side), size=width, seed=1, epochs=5))
    return out
