"""The driver of search: sorts sentences by length, batches them, steps, and drops what is finished.

Axes: S sentence, K hypothesis, V vocabulary, T target position.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from trmt.arch.base import Seq2Seq, Source, State, Stepper
from trmt.decode.base import Hypothesis, Search
from trmt.engines import linear
from trmt.engines.base import Batching, Engine, Request
from trmt.errors import BundleError, ConfigError
from trmt.kernels.products import Precision
from trmt.kernels.shelf import Shelf

COMPACT_AT = 0.25  # share of finished sentences at which the batch is made smaller
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
        if net.couples_batch:
            raise ConfigError(
                f"translations of {type(net).__name__} would depend on the sentences beside them, "
                "which this engine does not allow; choose another network"
            )
        shelf = Shelf.of(weights, precision) if weights else None
        self.stepper: Stepper = net.frozen(linear.choose(precision, shelf=shelf))
        if shelf:
            shelf.keep()
        self.search = search
        self.bos, self.eos = bos, eos
        self.batching = batching
        self.device = next(net.parameters()).device
        self.banned = torch.tensor(sorted(banned), dtype=torch.long, device=self.device)

    def translate(self, requests: Sequence[Request]) -> Iterator[tuple[int, list[Hypothesis]]]:
        for batch in self._batches(requests):
            yield from self._run([(index, requests[index]) for index in batch])

    def _batches(self, requests: Sequence[Request]) -> Iterator[list[int]]:
        """Neighbours in length together; the longest first, so that what does not fit shows at once."""
        order = sorted(range(len(requests)), key=lambda index: -len(requests[index].source))
        batch: list[int] = []
        for index in order:
            widest = len(requests[batch[0]].source) if batch else 0
            full = (len(batch) + 1) * widest > self.batching.tokens
            if batch and (full or len(batch) >= self.batching.sentences):
                yield batch
                batch = []
            batch.append(index)
        if batch:
            yield batch

    @torch.inference_mode()
    def _run(self, batch: list[tuple[int, Request]]) -> Iterator[tuple[int, list[Hypothesis]]]:
        """One batch to its end, handing out each sentence when the batch is made smaller."""
        requests = [request for _, request in batch]
        indices = [index for index, _ in batch]
        room = max(request.limit for request in requests) + 1
        source = Source.of([request.source for request in requests], self.device)
        masks = Masks(requests, banned=self.banned, eos=self.eos)
        search_state = self.search.start(
            [request.key for request in requests], room=room, eos=self.eos, device=self.device
        )
        state = self.stepper.start(
            source, hypotheses=self.search.hypotheses, room=room, reorders=self.search.reorders
        )
        tokens_SK = torch.full((len(batch), self.search.hypotheses), self.bos, device=self.device)
        for step in range(room):
            tokens_SK, state, search_state = self._step(step, tokens_SK, state, masks, search_state)
            last = step == room - 1
            if not last and self.device.type != "cpu" and (step + 1) % LOOK_EVERY:
                continue
            done = search_state.done_S.tolist()
            if all(done) or last:
                yield from zip(indices, self._results(search_state), strict=True)
                return
            if sum(done) >= COMPACT_AT * len(done):
                finished = [place for place, is_done in enumerate(done) if is_done]
                alive = [place for place, is_done in enumerate(done) if not is_done]
                results = self._results(search_state.keep(self._places(finished)))
                yield from zip((indices[place] for place in finished), results, strict=True)
                kept = self._places(alive)
                indices = [indices[place] for place in alive]
                tokens_SK, state, search_state = tokens_SK[kept], state.keep(kept), search_state.keep(kept)
                masks = masks.keep(kept)

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
        return torch.tensor(places, dtype=torch.long, device=self.device)

    def _step(
        self, step: int, tokens_SK: Tensor, state: State, masks: Masks, search_state: Any
    ) -> tuple[Tensor, State, Any]:
        output, state = self.stepper.step(tokens_SK[:, :, None], state)
        # In half precision a sum over a vocabulary would lose the differences that decide.
        scores_SKV = self.stepper.readout(output.hidden[:, :, 0]).float()
        masks.apply(scores_SKV, step)
        parents_SK, tokens_SK, search_state = self.search.advance(scores_SKV, search_state)
        if self.search.reorders:
            state = state.reorder(parents_SK)
        return tokens_SK, state, search_state


class Masks:
    """What may not come next: banned ids, anything but the prefix, anything but the end at the limit."""

    def __init__(self, requests: Sequence[Request], *, banned: Tensor, eos: int) -> None:
        device = banned.device
        self.banned, self.eos = banned, eos
        self.limit_S = torch.tensor([request.limit for request in requests], device=device)
        self.shortest = min(request.limit for request in requests)
        self.least_S = torch.tensor([request.least for request in requests], device=device)
        self.most_least = max(request.least for request in requests)
        self.longest_prefix = max(len(request.prefix) for request in requests)
        rows = [
            list(request.prefix) + [-1] * (self.longest_prefix - len(request.prefix)) for request in requests
        ]
        self.prefix_ST = torch.tensor(rows, dtype=torch.long, device=device).view(len(requests), -1)

    def keep(self, sentences: Tensor) -> Masks:
        """The masks of these sentences only."""
        kept = object.__new__(Masks)
        kept.__dict__.update(self.__dict__)
        kept.limit_S, kept.prefix_ST = self.limit_S[sentences], self.prefix_ST[sentences]
        kept.least_S = self.least_S[sentences]
        return kept

    def apply(self, scores_SKV: Tensor, step: int) -> None:
        """Rule out, in place, what may not follow `step` tokens."""
        if len(self.banned):
            scores_SKV.index_fill_(2, self.banned, -torch.inf)
        if step < self.most_least:
            end_SK = scores_SKV[:, :, self.eos]
            end_SK.masked_fill_((self.least_S > step)[:, None], -torch.inf)
        if step < self.longest_prefix:
            wanted_S = self.prefix_ST[:, step]
            self._force(scores_SKV, wanted_S.clamp(min=0), where_S=wanted_S >= 0)
        if step >= self.shortest:
            end_S = torch.full_like(self.limit_S, self.eos)
            self._force(scores_SKV, end_S, where_S=self.limit_S <= step)

    @staticmethod
    def _force(scores_SKV: Tensor, token_S: Tensor, *, where_S: Tensor) -> None:
        """Where asked, leave only one token: its score becomes certain, the others impossible."""
        token_V = torch.arange(scores_SKV.shape[2], device=scores_SKV.device)
        # The score is set and not left, since the token may be banned elsewhere.
        certain_SV = torch.where(token_V == token_S[:, None], 0.0, -torch.inf)
        scores_SKV.copy_(torch.where(where_S[:, None, None], certain_SV[:, None], scores_SKV))
