"""A worker pool without processes, whose workers die and fail on demand, and a job that reports GPUs."""

from __future__ import annotations

import os
import pickle
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from trmt.errors import TrmtError
from trmt.scale.pool import WorkerJob, WorkerReply

Accident = Callable[[Any], str | None]  # a part -> "died", an error message, or None for success


class FakePool:
    """Workers that process their parts in this process, the last one first, when `replies` is called."""

    def __init__(self, job: WorkerJob, *, count: int = 3, accident: Accident = lambda part: None) -> None:
        self.size, self.accident = count, accident
        self.process = pickle.loads(pickle.dumps(job)).load()
        self.done: list[str] = []
        self.waiting: deque[WorkerReply | tuple[int, Any]] = deque(
            WorkerReply(number, "ready") for number in range(count)
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def send(self, worker: int, item: Any) -> None:
        self.waiting.append((worker, pickle.loads(pickle.dumps(item))))

    def replies(self) -> list[WorkerReply]:
        assert self.waiting, "no worker has anything to do"
        found = self.waiting.pop()
        return [found] if isinstance(found, WorkerReply) else self._process(*found)

    def _process(self, worker: int, part: Any) -> list[WorkerReply]:
        accident = self.accident(part)
        if accident == "died":
            return [WorkerReply(worker, "died", "killed by SIGKILL"), WorkerReply(worker, "ready")]
        if accident:
            return [WorkerReply(worker, "failed", accident)]
        try:
            result = self.process(part)
        except TrmtError as error:
            return [WorkerReply(worker, "failed", str(error))]
        self.done.append(part.name)
        return [WorkerReply(worker, "done", result)]


@dataclass(frozen=True)
class GpuQuestion:
    """A part of ReportGpus, and the folder where workers meet."""

    name: str
    folder: str


@dataclass(frozen=True)
class ReportGpus:
    """A job that returns which GPUs its process sees, once two processes have each got a part."""

    def load(self) -> Callable[[GpuQuestion], str | None]:
        return self.visible

    def visible(self, part: GpuQuestion) -> str | None:
        found = os.environ.get("CUDA_VISIBLE_DEVICES")
        Path(part.folder, str(found)).touch()
        while len(list(Path(part.folder).iterdir())) < 2:
            pass
        return found
