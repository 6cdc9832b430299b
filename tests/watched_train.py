"""`trmt` as torchrun starts it in tests: it writes down what each step sees, and lets memory end where told.

The environment variable WATCHED says where to write and what is to happen, as JSON.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from trmt.cli import main
from trmt.sets.shards import RaggedArray
from trmt.training import heartbeat
from trmt.training.learner import Learner
from trmt.training.micro_batches import Pass


def sentences(column: RaggedArray) -> list[list[int]]:
    begin, found = 0, []
    for length in column.lengths.tolist():
        found.append(column.values[begin : begin + length].tolist())
        begin += length
    return found


@contextmanager
def watched(told: dict[str, Any]) -> Iterator[None]:
    """Training that is watched."""
    rank = int(os.environ.get("RANK", "0"))
    attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    original = Learner._gradients

    def gradients(self: Learner, passes: list[Pass], tokens: int, step: int) -> Any:
        if told.get("short") == [rank, attempt, step]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        seen = []
        for part in (each.part for each in passes if not each.idle):
            seen += [list(pair) for pair in zip(*map(sentences, part.columns.values()), strict=True)]
        with Path(told["seen"], f"{told['number']:03}-{attempt}-{rank}.jsonl").open("a") as stream:
            stream.write(json.dumps([step, seen]) + "\n")
        found = original(self, passes, tokens, step)
        if told.get("broken") == [rank, step]:
            told.pop("broken")
            first = next(self.net.parameters()).grad
            assert first is not None, "the backward pass is over"
            first.fill_(torch.nan)
        return found

    with (
        mock.patch.object(heartbeat, "SILENCE", told.get("silence", heartbeat.SILENCE)),
        mock.patch.object(Learner, "_gradients", gradients),
        mock.patch.object(Learner, "rehearse"),  # its batches are no step's
    ):
        yield


if __name__ == "__main__":
    with watched(json.loads(os.environ["WATCHED"])):
        main()
