"""The decode loop: requests in, hypotheses out, with continuous batching.

Requests are sorted by length. A batch is kept going: hypotheses that are finished leave it, and the next
requests of the queue take their slots. What runs a batch's steps is a `Runner`: `DirectRunner` calls PyTorch,
or a kernel for several steps at once where there is one; `GraphRunner` replays CUDA graphs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Literal

import torch

from trmt.acceleration import accelerated
from trmt.decoding.base import Hypothesis, Search
from trmt.decoding.batch import BatchDecoder
from trmt.decoding.direct import DirectRunner
from trmt.decoding.graphs import GraphRunner
from trmt.decoding.request import Batching, Request
from trmt.devices import hardware
from trmt.devices.abilities import abilities
from trmt.nets.base import Precision, Seq2Seq, Stepper
from trmt.nets.linear import PlainProducts

Runs = Literal["auto", "direct", "graphs"]
Result = tuple[Request, list[Hypothesis]]


class Engine:
    """A network and a search, ready to decode any number of requests."""

    def __init__(
        self,
        net: Seq2Seq,
        search: Search,
        *,
        bos: int,
        eos: int,
        banned: Collection[int] = (),
        batching: Batching = Batching(),
        precision: Precision = "fp32",
        checksum: str = "",
        runs: Runs = "auto",
    ) -> None:
        """With the `checksum` of the weights' file, packed weights are kept for other processes.

        `runs` says how steps are run; "auto" takes CUDA graphs on a GPU.
        """
        device = next(net.parameters()).device
        on_gpu = hardware.is_cuda(device)
        graphs = runs == "graphs" or (runs == "auto" and on_gpu)
        if graphs and on_gpu:
            graphs = abilities(device).use("graphs")
        stepper = frozen(net, precision, checksum, static=graphs)
        ids = tuple(sorted(banned))
        self.decoder = BatchDecoder(stepper, search, bos, eos, ids, device, batching)
        self.runner = GraphRunner(self.decoder, net.max_positions) if graphs else DirectRunner(self.decoder)

    def translate(self, requests: Iterable[Request]) -> Iterator[Result]:
        """Each request with its hypotheses, in whatever order they are ready."""
        # Similar lengths together; the longest first, so that what does not fit into memory shows at once.
        ordered = sorted(requests, key=lambda request: -len(request.source))
        # Where no token may come there is nothing to search for.
        yield from ((request, [Hypothesis((), 0.0, 0.0)]) for request in ordered if not request.max_tokens)
        for queue, max_tokens in self.runner.queues([each for each in ordered if each.max_tokens]):
            yield from self._decode(queue, max_tokens)

    @torch.inference_mode()
    def _decode(self, queue: deque[Request], max_tokens: int) -> Iterator[Result]:
        """The loop over a queue whose requests want up to `max_tokens`."""
        runner = self.runner
        runner.open(queue, max_tokens)
        while runner.admit(queue):
            runner.run(queue)
            yield from runner.finished()
        yield from runner.drain()

    @torch.inference_mode()
    def encodes_finitely(self, requests: Sequence[Request]) -> bool:
        """Whether the encoder's output for these requests is of finite numbers."""
        memory, _, _ = self.decoder.start(requests, 1).state.take()
        # Masks have minus infinity; what overflows has plus infinity too, or is no number.
        return all(bool((x < torch.inf).all()) for x in memory.tensors.values() if x.is_floating_point())

    def shrink(self) -> bool:
        """Decode fewer sentences at a time from now on, since memory is short; False if that cannot be."""
        before = self.decoder.batching
        fewer = before.sentences // 4 or 1
        self.decoder.batching = replace(before, sentences=fewer)
        self.runner.free()
        if self.decoder.device.type == "cuda":
            torch.cuda.empty_cache()
        return fewer < before.sentences


def frozen(
    net: Seq2Seq, precision: Precision = "fp32", checksum: str = "", *, static: bool = False
) -> Stepper:
    """The fastest stepper of a network; a `static` one where steps are to be recorded."""
    if not static and (fast := accelerated("stepper")):
        stepper: Stepper | None = fast(net, precision, checksum)
        if stepper:
            return stepper
    return net.frozen(PlainProducts(precision))
