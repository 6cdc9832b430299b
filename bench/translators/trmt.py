"""trmt's engine, with the network of a bundle."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from translators.server import BEGAN, How, Pieces, serve


class Trmt:
    """The engine behind `trmt translate`, given pieces."""

    def __init__(self, model: str, compute: str, threads: int) -> None:
        import torch

        import trmt
        from trmt.bundles import bundles

        torch.set_num_threads(threads)
        self.version = f"{trmt.__version__} on torch {torch.__version__}"
        bundle = bundles.load_bundle(Path(model))
        self.net, self.tokenizer, self.compute = bundle.net, bundle.tokenizer, compute
        source, target = self.tokenizer.source, self.tokenizer.target
        self.ids = {piece: number for number, piece in enumerate(source.pieces(range(source.vocabulary)))}
        self.pieces = target.pieces(range(target.vocabulary))
        self.engine = cache(self._engine)

    def _engine(self, beam: int, batch: int, penalty: float) -> Any:
        from trmt.decoding.beam import Beam
        from trmt.decoding.engine import Engine
        from trmt.decoding.greedy import Greedy
        from trmt.decoding.request import Batching

        side = self.tokenizer.target
        return Engine(
            self.net,
            Greedy() if beam == 1 else Beam(size=beam, length_penalty=penalty),
            bos=side.bos,
            eos=side.eos,
            banned={side.pad, side.bos, side.unk},
            batching=Batching(sentences=batch),
            precision=self.compute,
        )

    def translate(self, sentences: list[Pieces], how: How) -> Iterator[tuple[int, Pieces]]:
        from trmt.decoding.request import Request

        eos = self.tokenizer.source.eos
        requests = [
            Request(
                (*map(self.ids.__getitem__, source), eos),
                how.limit(source),
                key=number,
                min_tokens=how.least(source),
            )
            for number, source in enumerate(sentences)
        ]
        for request, hypotheses in self.engine(how.beam, how.batch, how.penalty).translate(requests):
            yield request.key, [self.pieces[token] for token in hypotheses[0].ids]


if __name__ == "__main__":
    serve(Trmt, BEGAN)
