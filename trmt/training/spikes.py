"""What a run does about a step that went wrong: leave it out, go back to before it, or stop with advice.

    training.on_spike    a gradient far above the usual       a loss far above     no numbers
    skip                 the step is left out                 said                 left out
    rollback             the run goes back to the checkpoint before it and leaves out its batches
    stop                 training ends; the last checkpoint is the one before
    ignore               said                                 said                 left out

Steps that were gone back over are a fact of the run, like its data: they stand in `rollbacks.json`, and
no later attempt takes them, from whatever checkpoint it goes on. Their numbers are used up, so the plan of
batches and the learning rate stay what they were.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trmt import console
from trmt.bundles import checkpoints
from trmt.bundles.checkpoints import Checkpoint
from trmt.config import Tree, build, to_tree
from trmt.errors import BundleError, TrmtError
from trmt.storage.files import write_json
from trmt.training.distributed import Team
from trmt.training.guard import Verdict

ROLLBACKS = "rollbacks.json"  # in a run folder
FAILED_STEPS = 20  # left out in a row, after which training has failed
ATTEMPTS = 3  # rollbacks to one checkpoint, after which training has failed
SUSPECTS = 8  # steps before a high loss that may have caused it
LOWER = "start a new run with a lower optim.lr or with optim.clip=1.0"


@dataclass(frozen=True)
class Rollback:
    """A way back that was taken."""

    to: int  # the step gone back to
    at: int  # the step that went wrong
    why: str
    left_out: tuple[int, ...]  # steps that are not taken again


class GoBack(Exception):
    """The run is to go on from an older checkpoint."""

    def __init__(self, point: Checkpoint) -> None:
        super().__init__(f"back to step {point.step}")
        self.point = point


class Spikes:
    """The policy of a run, with what has happened so far."""

    def __init__(
        self, folder: Path, *, policy: str, half: bool, log: Callable[..., None], team: Team
    ) -> None:
        self.folder, self.policy, self.half, self.log, self.team = folder, policy, half, log, team
        self.failed = 0  # steps left out in a row; saved with each checkpoint
        self.high = False  # whether the loss of the last step was
        self.rollbacks = read(folder)

    @property
    def left_out(self) -> frozenset[int]:
        """The steps that are not taken, counted from 1."""
        return frozenset(step for rollback in self.rollbacks for step in rollback.left_out)

    def hear(self, verdict: Verdict) -> None:
        """Say and log what is remarkable about a step, and do what the policy asks for."""
        taken = verdict.finite and not (verdict.steep and self.policy != "ignore")
        self.failed = 0 if taken else self.failed + 1
        # A loss scale that is still being found meets infinities on purpose, but not so many in a row.
        expected = self.half and not verdict.finite
        if not expected and verdict.bits:
            self._respond(verdict, taken=taken)
        self.high = verdict.high
        if self.failed >= FAILED_STEPS:
            raise TrmtError(
                f"training fell apart: {FAILED_STEPS} steps in a row up to step {verdict.step:,} had no "
                f"gradient that could be used; {LOWER}"
            )

    def _respond(self, verdict: Verdict, *, taken: bool) -> None:
        why = reason(verdict)
        numbers = {"norm": verdict.norm, "loss": verdict.loss} if verdict.finite else {}
        self.log(
            "spike" if verdict.finite else "bad gradient", step=verdict.step, why=why, taken=taken, **numbers
        )
        if self.policy == "stop":
            raise TrmtError(
                f"step {verdict.step:,}: {why}, and training.on_spike is stop; go on from the last "
                f"checkpoint with --set training.on_spike=rollback, or {LOWER}"
            )
        if self.policy == "rollback":
            taken_back = self.team.lead(lambda: self._way_back(verdict, why))
            if taken_back:
                self.rollbacks = [build(Rollback, entry, where=ROLLBACKS) for entry in taken_back]
                step = self.rollbacks[-1].to
                raise GoBack(Checkpoint(checkpoints.step_folder(self.folder, step), step))
            console.warn(f"step {verdict.step:,}: {why}; there is no checkpoint before it to go back to")
        elif not taken:
            console.warn(f"step {verdict.step:,}: {why}; the step is left out")
        elif not self.high:  # said once, not at each step of a plateau
            console.warn(f"step {verdict.step:,}: {why}")

    def _way_back(self, verdict: Verdict, why: str) -> list[Tree]:
        """Choose the checkpoint to go on from, set the newer ones aside, and note the way after the others.

        Without a checkpoint to go back to, there are none.
        """
        first = verdict.step - SUSPECTS if verdict.high and not verdict.steep else verdict.step
        older = [point for point in whole_points(self.folder) if point.step < verdict.step]
        if not older:
            return []
        point = next((point for point in reversed(older) if point.step < first), older[0])
        if sum(rollback.to == point.step for rollback in self.rollbacks) >= ATTEMPTS:
            raise TrmtError(
                f"step {verdict.step:,}: {why}, as after each of {ATTEMPTS} rollbacks to step "
                f"{point.step:,}; {LOWER}"
            )
        for newer in checkpoints.steps(self.folder):
            if newer.step > point.step:
                checkpoints.set_aside(newer, "rolled-back")
        steps = tuple(range(max(first, point.step + 1), verdict.step + 1))
        rollbacks = [*self.rollbacks, Rollback(point.step, verdict.step, why, steps)]
        trees = [to_tree(rollback) for rollback in rollbacks]
        write_json(self.folder / ROLLBACKS, trees)
        console.warn(
            f"step {verdict.step:,}: {why}; going back to step {point.step:,} and leaving out "
            + (f"steps {steps[0]:,} to {steps[-1]:,}" if len(steps) > 1 else f"step {steps[0]:,}")
        )
        self.log("rollback", step=verdict.step, to=point.step, why=why, left_out=steps)
        return trees


def reason(verdict: Verdict) -> str:
    """What is wrong with a step, in words."""
    if not verdict.finite:
        return "the gradient is not finite"
    if verdict.steep:
        return f"the gradient's norm of {verdict.norm:.3g} is far above the usual"
    return f"the loss of {verdict.loss:.2f} is far above the usual"


def whole_points(folder: Path) -> list[Checkpoint]:
    """The checkpoints that can be gone on from, oldest first."""
    return [point for point in checkpoints.steps(folder) if point.resumable()]


def read(folder: Path) -> list[Rollback]:
    """The rollbacks of the run in `folder`, oldest first."""
    path = folder / ROLLBACKS
    try:
        entries: Any = json.loads(path.read_bytes())
        return [build(Rollback, entry, where=str(path)) for entry in entries]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise BundleError(f"cannot read {path}: {error}; put it back, or name another run folder") from error
