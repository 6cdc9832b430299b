"""A fleet without processes, whose workers die and fail when the test says so; and what workers see."""

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
from trmt.scale.fleet import Answer, Job

Accident = Callable[[Any], str | None]  # a part -> "died", an error, or None where all goes well


class FakeFleet:
    """Workers that do their parts here, last one first, when they are asked for answers."""

    def __init__(self, job: Job, *, count: int = 3, accident: Accident = lambda part: None) -> None:
        self.size, self.accident = count, accident
        self.work = pickle.loads(pickle.dumps(job)).begun()
        self.done: list[str] = []
        self.waiting: deque[Answer | tuple[int, Any]] = deque(
            Answer(number, "ready") for number in range(count)
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def send(self, worker: int, part: Any) -> None:
        self.waiting.append((worker, pickle.loads(pickle.dumps(part))))

    def answers(self) -> list[Answer]:
        assert self.waiting, "nobody has anything to do"
        found = self.waiting.pop()
        return [found] if isinstance(found, Answer) else self._did(*found)

    def _did(self, worker: int, part: Any) -> list[Answer]:
        happens = self.accident(part)
        if happens == "died":
            return [Answer(worker, "died", "killed by SIGKILL"), Answer(worker, "ready")]
        if happens:
            return [Answer(worker, "failed", happens)]
        try:
            said = self.work(part)
        except TrmtError as error:
            return [Answer(worker, "failed", str(error))]
        self.done.append(part.name)
        return [Answer(worker, "done", said)]


@dataclass(frozen=True)
class Asked:
    """Something to answer, by whoever is the first to find it open."""

    name: str
    folder: str


@dataclass(frozen=True)
class Seeing:
    """Says which GPUs its process sees, once both processes are there to say so."""

    def begun(self) -> Callable[[Asked], str | None]:
        return self.seen

    def seen(self, part: Asked) -> str | None:
        found = os.environ.get("CUDA_VISIBLE_DEVICES")
        Path(part.folder, str(found)).touch()
        while len(list(Path(part.folder).iterdir())) < 2:
            pass
        return found
