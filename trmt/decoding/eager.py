"""The driver of search: sorts sentences by length, keeps a batch of them going, and hands out what is done.

Axes: S sentence, K hypothesis, V vocabulary, T target position.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trmt.decoding.base import Hypothesis, Search
from trmt.decoding.engine import Batching, Engine, Request
from trmt.devices.transfer import to_device
from trmt.errors import BundleError
from trmt.native.chain import Chain
from trmt.native.products import Precision
from trmt.native.shelf import Shelf
from trmt.nets import linear
from trmt.nets.base import Seq2Seq, Source, State, Stepper

COMPACT_AT = 0.25  # share of finished sentences at which others take their places, or the batch shrinks
REFILL_WIDTH = 0.6  # of the longest source in a batch: what is shorter waits for the next
LOOK_EVERY = 8  # steps between two looks at an accelerator, each of which waits for it


class Eager(Engine):
    """Plain PyTorch, one operation after another; runs anywhere."""

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
        weights: str = "",
    ) -> None:
        """`weights` is the checksum of the weights' file; packed forms of them are then kept for others."""
        self.stepper = self._frozen(net, precision, weights)
        self.search = search
        self.chain = Chain.of(self.stepper, search)
        self.bos, self.eos = bos, eos
        self.batching = batching
        self.device = next(net.parameters()).device
        self.banned = torch.tensor(sorted(banned), dtype=torch.long, device=self.device)
        self.block = _block(sorted(banned))

    def _frozen(self, net: Seq2Seq, precision: Precision, weights: str) -> Stepper:
        shelf = Shelf.of(weights, precision) if weights else None
        stepper = net.frozen(linear.choose(precision, shelf=shelf))
        if shelf:
            shelf.keep()
        return stepper

    def translate(self, requests: Sequence[Request]) -> Iterator[tuple[int, list[Hypothesis]]]:
        # Neighbours in length together; the longest first, so that what does not fit shows at once.
        order = sorted(range(len(requests)), key=lambda index: -len(requests[index].source))
        # Where nothing may be written there is nothing to search for.
        yield from ((index, [Hypothesis((), 0.0, 0.0)]) for index in order if not requests[index].limit)
        queue = deque(index for index in order if requests[index].limit)
        room = max((request.limit for request in requests), default=0)
        while queue:
            yield from self._flow(requests, queue, room)

    def shrink(self) -> bool:
        fewer = self.batching.sentences // 4 or 1
        smaller = fewer < self.batching.sentences
        self.batching = replace(self.batching, sentences=fewer)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return smaller

    def _taken(self, requests: Sequence[Request], queue: deque[int], *, most: int) -> list[int]:
        """As many from the front of the queue as may be translated together."""
        widest = len(requests[queue[0]].source)
        count = max(min(most, self.batching.sentences, self.batching.tokens // widest), 1)
        return [queue.popleft() for _ in range(min(count, len(queue)))]

    @torch.inference_mode()
    def _flow(
        self, requests: Sequence[Request], queue: deque[int], room: int
    ) -> Iterator[tuple[int, list[Hypothesis]]]:
        """Sentences from the front of the queue to their end, while others take the places of finished ones.

        Who comes later is as long as those it stands beside, or little shorter: what is much shorter is left
        to the next flow, since here it would be padded.
        """
        under = self._started(requests, self._taken(requests, queue, most=len(queue)), room)
        refills = self.stepper.mixes_ages(self.search.hypotheses, room)
        shortest = REFILL_WIDTH * under.width
        for step in itertools.count(1):
            # On the way to where something is to be done, chains take as many steps as it needs.
            if not (self.chain and self.chain.run(under, room - under.oldest, under.enough)):
                under.step(self)
            at_end = under.oldest >= room  # of the room: who is there is done, and must not go on
            if not at_end and self.device.type != "cpu" and step % LOOK_EVERY:
                continue
            done = under.search_state.done_S.tolist()
            if not at_end and sum(done) < under.enough:
                continue
            finished = [place for place, is_done in enumerate(done) if is_done]
            results = self._results(under.search_state.keep(self._places(finished)))
            yield from zip([under.indices[place] for place in finished], results, strict=True)
            if all(done):
                return
            if refills and queue and len(requests[queue[0]].source) >= shortest:
                fresh = self._started(requests, self._taken(requests, queue, most=len(finished)), room)
                places, finished = finished[: len(fresh.indices)], finished[len(fresh.indices) :]
                under.replace(places, fresh)
            if finished:
                left_out = set(finished)
                under.keep([place for place in range(len(done)) if place not in left_out])
            under.oldest = int(under.search_state.length_S.max())

    def _started(self, requests: Sequence[Request], indices: list[int], room: int) -> Underway:
        """These sentences before their first token."""
        return self._begun([requests[index] for index in indices], indices, room)

    def _begun(
        self, chosen: Sequence[Request], indices: list[int], room: int, *, fixed: bool = False
    ) -> Underway:
        """What is asked for in `chosen`, which `indices` name, before its first token."""
        source = Source.of([request.source for request in chosen], self.device)
        kind = self.search
        return Underway(
            indices,
            torch.full((len(chosen), kind.hypotheses), self.bos, device=self.device),
            self.stepper.start(
                source, hypotheses=kind.hypotheses, room=room, reorders=kind.reorders, fixed=fixed
            ),
            kind.start(chosen, room=room, eos=self.eos, device=self.device),
            Masks.of(chosen, banned=self.banned, block=self.block, eos=self.eos),
            source.longest,
        )

    def _results(self, search_state: Any) -> list[list[Hypothesis]]:
        results = self.search.results(search_state)
        for hypotheses in results:
            if not hypotheses or not all(math.isfinite(each.score) for each in hypotheses):
                raise BundleError(
                    "the network's scores are not numbers: its weights are broken, or the precision is too "
                    "low for them; try another checkpoint or fp32"
                )
        return results

    def _places(self, places: list[int]) -> Tensor:
        return to_device(places, self.device)


@dataclass
class Underway:
    """The sentences that are being translated together, and all that belongs to them."""

    indices: list[int]  # of their requests
    tokens_SK: Tensor
    state: State
    search_state: Any
    masks: Masks
    width: int  # of the longest source
    oldest: int = 0  # tokens that the longest hypothesis has

    def step(self, engine: Eager) -> None:
        """One token more for each hypothesis."""
        output, state = engine.stepper.step(self.tokens_SK[:, :, None], self.state)
        scores_SKV = engine.stepper.readout(output.hidden[:, :, 0])
        self.masks.apply(scores_SKV, self.search_state.length_S)
        parents_SK, self.tokens_SK, self.search_state = engine.search.advance(scores_SKV, self.search_state)
        self.state = state.reorder(parents_SK) if engine.search.reorders else state
        self.oldest += 1

    @property
    def enough(self) -> int:
        """So many sentences have to be done before they are taken away."""
        return max(math.ceil(COMPACT_AT * len(self.indices)), 1)

    def keep(self, places: list[int]) -> None:
        """Only these sentences."""
        sentences = to_device(places, self.tokens_SK.device)
        self.indices = [self.indices[place] for place in places]
        self.tokens_SK = self.tokens_SK.index_select(0, sentences)
        self.state = self.state.keep(sentences)
        self.search_state = self.search_state.keep(sentences)
        self.masks.keep(sentences)

    def replace(self, at: list[int], other: Underway) -> None:
        """The sentences of `other` instead of those at these places."""
        for place, index in zip(at, other.indices, strict=True):
            self.indices[place] = index
        places = to_device(at, self.tokens_SK.device)
        self.tokens_SK = self.tokens_SK.index_copy(0, places, other.tokens_SK)
        self.state = self.state.replace(places, other.state)
        self.search_state = self.search_state.replace(places, other.search_state)
        self.masks.replace(places, other.masks)


@dataclass
class Masks:
    """What may not come next: banned ids, anything but the prefix, the end before its time."""

    banned: Tensor
    block: slice | None  # the banned ids, if they follow one another
    eos: int
    prefix_ST: Tensor  # -1 behind each prefix
    least_S: Tensor
    busy: int  # so many steps more there is something to do beside what is banned

    @classmethod
    def of(cls, requests: Sequence[Request], *, banned: Tensor, block: slice | None, eos: int) -> Masks:
        """The masks of these requests."""
        device = banned.device
        longest = max(len(request.prefix) for request in requests)
        rows = [[*request.prefix, *[-1] * (longest - len(request.prefix))] for request in requests]
        return cls(
            banned,
            block,
            eos,
            to_device(rows, device).view(len(requests), longest),
            to_device([request.least for request in requests], device),
            max(max(len(request.prefix), request.least) for request in requests),
        )

    def keep(self, sentences: Tensor) -> None:
        """The masks of these sentences only."""
        self.prefix_ST, self.least_S = self.prefix_ST[sentences], self.least_S[sentences]

    def replace(self, places: Tensor, other: Masks) -> None:
        """The sentences of `other` instead of those at `places`."""
        self.least_S = self.least_S.index_copy(0, places, other.least_S)
        width = max(self.prefix_ST.shape[1], other.prefix_ST.shape[1])
        mine, theirs = (
            F.pad(masks.prefix_ST, [0, width - masks.prefix_ST.shape[1]], value=-1) for masks in (self, other)
        )
        self.prefix_ST = mine.index_copy(0, places, theirs)
        self.busy = max(self.busy, other.busy)

    def apply(self, scores_SKV: Tensor, length_S: Tensor) -> None:
        """Rule out, in place, what may not follow so many tokens."""
        if self.block:
            scores_SKV[:, :, self.block] = -torch.inf
        elif len(self.banned):
            scores_SKV.index_fill_(2, self.banned, -torch.inf)
        if self.busy <= 0:
            return
        self.busy -= 1
        scores_SKV[:, :, self.eos].masked_fill_((length_S < self.least_S)[:, None], -torch.inf)
        longest = self.prefix_ST.shape[1]
        if longest:
            wanted_S = self.prefix_ST.gather(1, length_S.clamp(max=longest - 1)[:, None])[:, 0]
            within_S = (wanted_S >= 0) & (length_S < longest)
            self._force(scores_SKV, wanted_S.clamp(min=0), where_S=within_S)

    @staticmethod
    def _force(scores_SKV: Tensor, token_S: Tensor, *, where_S: Tensor) -> None:
        """Where asked, leave only one token: its score becomes certain, the others impossible."""
        token_V = torch.arange(scores_SKV.shape[2], device=scores_SKV.device)
        # The score is set and not left, since the token may be banned elsewhere.
        certain_SV = torch.where(token_V == token_S[:, None], 0.0, -torch.inf)
        scores_SKV.copy_(torch.where(where_S[:, None, None], certain_SV[:, None], scores_SKV))


def _block(ids: list[int]) -> slice | None:
    """The ids as a slice, if they follow one another: it is faster to fill."""
    if ids and ids == [*range(ids[0], ids[0] + len(ids))]:
        return slice(ids[0], ids[0] + len(ids))
    return None
