"""`trmt` as torchrun starts it in tests: it records the pairs of each step, and fails where it is told to.

The environment variable RECORDED_TRAIN has the options as JSON.
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
from trmt.training import heartbeat, run, step
from trmt.training.micro_batches import MicroBatch
from trmt.training.state import TrainState


def sentences(column: RaggedArray) -> list[list[int]]:
    return [values.tolist() for values in column.split()]


@contextmanager
def recorded(options: dict[str, Any]) -> Iterator[None]:
    """Record the training within this block, and inject the errors in `options`."""
    rank = int(os.environ.get("RANK", "0"))
    attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    original = step.forward_backward

    def forward_backward(state: TrainState, micro_batches: list[MicroBatch], tokens: int) -> Any:
        number = state.progress.step
        if options.get("out_of_memory") == [rank, attempt, number]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        pairs = []
        for examples in (each.examples for each in micro_batches if not each.is_dummy):
            pairs += [list(pair) for pair in zip(*map(sentences, examples.columns.values()), strict=True)]
        name = f"{options['number']:03}-{attempt}-{rank}.jsonl"
        with Path(options["folder"], name).open("a") as stream:
            stream.write(json.dumps([number, pairs]) + "\n")
        nll = original(state, micro_batches, tokens)
        if options.get("nan") == [rank, number]:
            options.pop("nan")
            gradient = next(state.net.parameters()).grad
            assert gradient is not None, "the backward pass is over"
            gradient.fill_(torch.nan)
        return nll

    with (
        mock.patch.object(heartbeat, "TIMEOUT", options.get("heartbeat_timeout", heartbeat.TIMEOUT)),
        mock.patch.object(step, "forward_backward", forward_backward),
        mock.patch.object(run, "rehearse"),  # its batches are not those of a step
    ):
        yield


if __name__ == "__main__":
    with recorded(json.loads(os.environ["RECORDED_TRAIN"])):
        main()
