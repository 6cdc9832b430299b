"""`trmt` as torchrun starts it in tests: it writes down what each step sees, and lets memory end where told.

The environment variable WATCHED says where to write and what is to happen, as JSON.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

from trmt import pulse
from trmt.batches import Column
from trmt.cli import main
from trmt.learner import Learner, Pass


def sentences(column: Column) -> list[list[int]]:
    begin, found = 0, []
    for length in column.lengths.tolist():
        found.append(column.ids[begin : begin + length].tolist())
        begin += length
    return found


def watch(told: dict[str, Any]) -> None:
    rank = int(os.environ.get("RANK", "0"))
    attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    pulse.SILENCE = told.get("silence", pulse.SILENCE)
    gradients = Learner._gradients

    def watched(self: Learner, passes: list[Pass], tokens: int, step: int) -> Any:
        if told.get("short") == [rank, attempt, step]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        seen = []
        for part in (each.part for each in passes if not each.idle):
            seen += [list(pair) for pair in zip(*map(sentences, part.columns.values()), strict=True)]
        with Path(told["seen"], f"{told['number']:03}-{attempt}-{rank}.jsonl").open("a") as stream:
            stream.write(json.dumps([step, seen]) + "\n")
        found = gradients(self, passes, tokens, step)
        if told.get("broken") == [rank, step]:
            told.pop("broken")
            next(self.net.parameters()).grad.fill_(torch.nan)  # type: ignore[union-attr]
        return found

    Learner._gradients = watched  # type: ignore[method-assign]
    # Its batches are no step's.
    Learner.rehearse = lambda self, batches: None  # type: ignore[method-assign]


if __name__ == "__main__":
    watch(json.loads(os.environ["WATCHED"]))
    main()
