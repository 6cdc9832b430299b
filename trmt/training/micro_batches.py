"""Batches in parts, where memory is too short for the whole: nothing is dropped, and the plan stays."""

from __future__ import annotations

from typing import NamedTuple, NoReturn

from trmt import console
from trmt.errors import TrmtError
from trmt.sets.batches import RaggedBatch
from trmt.training.distributed import Team


class Pass(NamedTuple):
    """Some pairs to go forwards and backwards through."""

    part: RaggedBatch
    idle: bool = False  # whether nothing of it counts


class ShortMemory(TrmtError):
    """Memory ran out where the other processes could not be told, so that all have to begin again."""


class Parts:
    """How a process cuts its share of each batch; how small the parts are is for a team to agree on."""

    def __init__(self, team: Team, *, sharded: bool, whole: bool = False) -> None:
        """`whole` batches cannot be cut: in parts the network would make something else of them."""
        self.team, self.sharded, self.whole = team, sharded, whole
        self.halvings = 0  # how often batches are halved

    def passes(self, examples: list[RaggedBatch]) -> list[Pass]:
        """What this process goes through: its share of each batch, in parts.

        With weights in slices, every process has to go through as many: the others wait for its own.
        """
        rank, size = self.team.rank, self.team.size
        mine = self._halved([share for batch in examples if len(share := batch.shard(rank, size))])
        most = len(self._halved([batch.shard(0, size) for batch in examples])) if self.sharded else 0
        idle = Pass(examples[0].slice(0, 1), idle=True)
        return [Pass(part) for part in mine] + [idle] * (most - len(mine))

    def _halved(self, examples: list[RaggedBatch]) -> list[RaggedBatch]:
        for _ in range(self.halvings):
            examples = [half for batch in examples for half in (batch.halve() if len(batch) > 1 else [batch])]
        return examples

    def halve(self, pairs: int) -> None:
        """Go on with smaller parts of batches, the largest of which has so many pairs."""
        self._check_divisible(pairs)
        self.halvings += 1
        console.warn(f"out of memory: going on with batches in {2**self.halvings} parts")

    def give_up(self, pairs: int) -> NoReturn:
        """The others are waiting for weights that this process can no longer send."""
        self._check_divisible(pairs)
        raise ShortMemory(
            "out of memory; the same command goes on from the last checkpoint with batches in "
            f"{2 ** (self.halvings + 1)} parts (torchrun --max-restarts 1 does so by itself)"
        )

    def _check_divisible(self, pairs: int) -> None:
        if self.whole:
            raise TrmtError(
                'a batch does not fit into memory, and network.norm = "batch" takes its statistics of whole '
                'ones; lower batches.tokens, or set network.norm = "layer"'
            )
        if 2**self.halvings >= pairs:
            raise TrmtError(
                "a single pair does not fit into memory; use a smaller network, or prepare the data again "
                "with a lower --max-length"
            )
