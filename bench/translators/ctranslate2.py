"""CTranslate2, with what `trmt export --to ctranslate2` wrote.

`max_batch_size` is 0 where a call is one batch, so that nothing is regrouped; a whole file is sorted and cut
by CTranslate2 itself. Unknown words are ruled out in both engines.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from translators.server import BEGAN, How, Pieces, serve


class CTranslate2:
    """One translator that uses all the threads for each batch, and for a whole file one of each."""

    def __init__(self, model: str, compute: str, threads: int) -> None:
        import ctranslate2

        self.version = ctranslate2.__version__
        named = {"fp32": "float32", "int8": "int8"}
        self.load: Any = lambda inter, intra: ctranslate2.Translator(
            model, device="cpu", compute_type=named[compute], inter_threads=inter, intra_threads=intra
        )
        self.threads = threads
        self.translator, self.many = self.load(1, threads), None

    def translate(self, sentences: list[Pieces], how: How) -> Iterator[tuple[int, Pieces]]:
        whole = len(sentences) > how.batch
        if whole and self.threads > 1 and self.many is None:
            self.many = self.load(self.threads, 1)
        results = (self.many or self.translator if whole else self.translator).translate_batch(
            sentences,
            beam_size=how.beam,
            length_penalty=how.power if how.beam > 1 else 1,
            max_batch_size=how.batch if whole else 0,
            max_input_length=0,
            max_decoding_length=max(how.limit(source) for source in sentences),
            min_decoding_length=how.forced or 1,
            disable_unk=True,
        )
        for number, result in enumerate(results):
            yield number, result.hypotheses[0]


if __name__ == "__main__":
    serve(CTranslate2, BEGAN)
