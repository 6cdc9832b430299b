"""trmt's engine on any device, its steps run directly or as CUDA graphs, given ids and giving ids: nothing of
a tokenizer is in it.

`python -m translators.trmt_engine BUNDLE PRECISION THREADS DEVICE direct|graphs`
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from translators.meter import Meter
from translators.server import BEGAN, How, serve


class TrmtEngine:
    """What `trmt translate` runs behind its tokenizer."""

    def __init__(self, model: str, compute: str, threads: int, device: str, engine: str) -> None:
        import torch

        import trmt
        from trmt.bundles import bundles
        from trmt.devices.choice import choose_device
        from trmt.nets.base import to_half
        from trmt.translating import HALVES

        torch.set_num_threads(threads)
        self.version = f"{trmt.__version__} on torch {torch.__version__}"
        bundle = bundles.load_bundle(Path(model), device=choose_device(device))
        self.net = bundle.net
        if compute in HALVES:
            to_half(self.net, HALVES[compute])
        self.tokenizer, self.name = bundle.tokenizer, engine
        self.meter = Meter(device)
        self.engine: Any = None
        self.graphs: int | None = None

    def translate(self, sentences: list[list[int]], how: How) -> Iterator[tuple[int, tuple[int, ...]]]:
        from trmt.decoding.request import Request

        if how != self.meter.how:
            self.engine = None  # so that its memory is free
            self.meter.watch(how)
            self.engine = self._made(how)
        eos = self.tokenizer.source.eos
        requests = [
            Request((*source, eos), how.limit(source), key=number, min_tokens=how.least(source))
            for number, source in enumerate(sentences)
        ]
        for request, hypotheses in self.engine.translate(requests):
            yield request.key, hypotheses[0].ids

    def _made(self, how: How) -> Any:
        from trmt.decoding.engine import Engine
        from trmt.decoding.graphs import GraphRunner
        from trmt.translating import TranslateOptions

        kind = "beam" if how.beam > 1 else "greedy"
        options = TranslateOptions(search=kind, beam=how.beam, length_penalty=how.penalty)
        target = self.tokenizer.target
        rows = self.net.config.target_vocabulary
        engine = Engine(
            self.net,
            options.build_search(),
            bos=target.bos,
            eos=target.eos,
            banned=target.banned_ids | set(range(target.vocabulary, rows)),
            batching=batching(how),
            runs=self.name,
        )
        self.graphs = None
        if self.name == "graphs":
            self.graphs = 0
            if isinstance(engine.runner, GraphRunner):
                engine.runner.record = self._counted(engine.runner.record)
        return engine

    def _counted(self, record: Callable[..., Any]) -> Callable[..., Any]:
        def recorded(steps: Callable[[], None]) -> Any:
            graph = record(steps)
            self.graphs += graph is not None
            return graph

        return recorded

    def more(self) -> dict[str, Any]:
        """Memory, graphs, and why there are none."""
        from trmt.decoding.graphs import GraphRunner
        from trmt.devices.abilities import abilities

        figures = self.meter.figures() | {"batching_tokens": self.engine.decoder.batching.tokens}
        if self.graphs is not None:
            figures["graphs"] = self.graphs
            runner = self.engine.runner
            if not isinstance(runner, GraphRunner):
                figures["fell_back"] = abilities(self.engine.decoder.device).lacks("graphs")
            elif runner.direct:
                figures["fell_back"] = runner.why
        return figures


def batching(how: How) -> Any:
    """That of `trmt translate` on a GPU."""
    from trmt.decoding.request import Batching

    return Batching.on("cuda", how.batch)


if __name__ == "__main__":
    serve(TrmtEngine, BEGAN)
