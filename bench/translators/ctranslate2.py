"""CTranslate2, with what `trmt export --to ctranslate2` wrote.

`max_batch_size` is 0 where a call is one batch, so that nothing is regrouped; a whole file is sorted and cut
by CTranslate2 itself. Unknown words are ruled out in both engines.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from translators.server import BEGAN, How, Pieces, neighbours, serve


class CTranslate2:
    """One translator that uses all the threads for each batch, and for a whole file one of each."""

    def __init__(self, model: str, compute: str, threads: int, device: str = "cpu") -> None:
        import ctranslate2

        self.version = ctranslate2.__version__
        named = {"fp32": "float32", "fp16": "float16", "int8": "int8"}
        kind, _, number = device.partition(":")
        place = {"device": kind, "device_index": int(number or 0), "compute_type": named[compute]}
        self.load: Any = lambda inter, intra: ctranslate2.Translator(
            model, inter_threads=inter, intra_threads=intra, **place
        )
        self.threads = threads
        self.translator, self.many = self.load(1, threads), None

    def translate(self, sentences: list[Pieces], how: How) -> Iterator[tuple[int, Pieces]]:
        if how.mirrored:
            for numbers in neighbours(sentences, how.batch):
                found = self._together([sentences[number] for number in numbers], how)
                yield from zip(numbers, found, strict=True)
        else:
            yield from enumerate(self._together(sentences, how))

    def _together(self, sentences: list[Pieces], how: How) -> Iterator[Pieces]:
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
            # One length for all: that of the longest.
            min_decoding_length=max(how.least(source) for source in sentences) or 1,
            disable_unk=True,
        )
        return (result.hypotheses[0] for result in results)


if __name__ == "__main__":
    serve(CTranslate2, BEGAN)
