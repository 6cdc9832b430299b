"""Micro-batches: the batches of a step are split further where memory is short, without changing the step."""

from __future__ import annotations

from typing import NamedTuple, NoReturn

from trmt import console
from trmt.errors import TrmtError
from trmt.sets.batches import RaggedBatch
from trmt.training.distributed import Distributed


class MicroBatch(NamedTuple):
    """Some pairs for one forward and backward pass."""

    examples: RaggedBatch
    is_dummy: bool = False  # computed only because other ranks wait for it; its results are multiplied by 0


class ShardedOutOfMemory(TrmtError):
    """A rank of a sharded run is out of memory while others wait for its weights: all have to restart."""


class MicroBatchSplitter:
    """Splits the batches of a step into the micro-batches of one rank."""

    def __init__(self, distributed: Distributed, *, sharded: bool, indivisible: bool = False) -> None:
        """`indivisible` batches cannot be split, because the network computes statistics over them."""
        self.distributed, self.sharded, self.indivisible = distributed, sharded, indivisible
        self.halvings = 0  # how often batches are halved; the same on all ranks

    def split(self, batches: list[RaggedBatch]) -> list[MicroBatch]:
        """This rank's share of each batch, in micro-batches.

        With sharded weights all ranks need the same number of them, because each waits for the others.
        """
        rank, world_size = self.distributed.rank, self.distributed.world_size
        shares = [batch.shard(rank, world_size) for batch in batches]
        own = self._halved([share for share in shares if len(share)])
        most = len(self._halved([batch.shard(0, world_size) for batch in batches])) if self.sharded else 0
        dummy = MicroBatch(batches[0].slice(0, 1), is_dummy=True)
        return [MicroBatch(examples) for examples in own] + [dummy] * (most - len(own))

    def _halved(self, batches: list[RaggedBatch]) -> list[RaggedBatch]:
        for _ in range(self.halvings):
            batches = [half for batch in batches for half in (batch.halve() if len(batch) > 1 else [batch])]
        return batches

    def halve(self, pairs: int) -> None:
        """Use micro-batches of half the size from now on; the largest share of a batch has `pairs` pairs."""
        self._check_divisible(pairs)
        self.halvings += 1
        console.warn(f"out of memory: splitting each batch into {2**self.halvings} micro-batches from now on")

    def raise_out_of_memory(self, pairs: int) -> NoReturn:
        """End a sharded run, whose other ranks wait for weights that this one can no longer send."""
        self._check_divisible(pairs)
        raise ShardedOutOfMemory(
            "out of memory; the same command goes on from the last checkpoint and splits each batch into "
            f"{2 ** (self.halvings + 1)} micro-batches (torchrun --max-restarts 1 runs it again by itself)"
        )

    def _check_divisible(self, pairs: int) -> None:
        if self.indivisible:
            raise TrmtError(
                "a batch does not fit into memory, and batch normalisation needs whole ones for its "
                "statistics; lower batches.tokens, or choose an architecture without batch-norm"
            )
        if 2**self.halvings >= pairs:
            raise TrmtError(
                "a single pair does not fit into memory; use a smaller network, or prepare the data again "
                "with a lower --max-length"
            )
