"""What a run does about a bad step: skip it, roll back to before it, or stop with advice.

    training.on_spike    gradient spike               loss spike                   gradient not finite
    skip                 the step is skipped          a warning                    the step is skipped
    rollback             the run goes back to the checkpoint before it and skips the steps that caused it
    stop                 training ends; the last checkpoint is the one before it
    ignore               a warning                    a warning                    the step is skipped

Steps that a rollback skips are a fact of the run, like its data: they are listed in `rollbacks.json`, and no
later attempt takes them, whatever checkpoint it resumes from. Their numbers stay used, so the order of the
batches and the learning rate do not change.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from trmt import console
from trmt.bundles import checkpoints
from trmt.bundles.checkpoints import Checkpoint
from trmt.config import Count, Tree, build, build_stored, to_tree
from trmt.errors import BundleError, TrmtError
from trmt.storage.files import write_verified_json
from trmt.training.distributed import Distributed
from trmt.training.guard import StepReport
from trmt.training.state import TrainProgress
from trmt.trees import TreeError, read_json, verified

ROLLBACKS = "rollbacks.json"  # in a run folder
MAX_SKIPPED_IN_A_ROW = 20  # steps, after which training has failed
MAX_ROLLBACKS = 3  # to one checkpoint, after which training has failed
SUSPECT_STEPS = 8  # before a loss spike, which may have caused it
ADVICE = "start a new run with a lower optim.lr or with optim.clip=1.0"


@dataclass(frozen=True)
class Rollback:
    """A rollback that a run has made."""

    to: Count  # the step of the checkpoint that was restored
    at: Count  # the bad step
    why: str  # what was bad about it
    left_out: tuple[Count, ...]  # the steps that are skipped from then on


@dataclass(frozen=True)
class Rollbacks:
    """What ROLLBACKS holds."""

    rollbacks: tuple[Rollback, ...]


class SpikePolicy:
    """Reports bad steps and decides what to do about them."""

    def __init__(
        self,
        folder: Path,
        *,
        policy: str,
        fp16: bool,
        log: Callable[..., None],
        distributed: Distributed,
    ) -> None:
        self.folder, self.policy, self.fp16 = folder, policy, fp16
        self.log, self.distributed = log, distributed
        self.previous_loss_spike = False  # whether the step before had one
        self.rollbacks = read_rollbacks(folder)

    @property
    def skipped_steps(self) -> frozenset[int]:
        """The steps, counted from 1, that rollbacks have excluded."""
        return frozenset(step for rollback in self.rollbacks for step in rollback.left_out)

    def handle(self, report: StepReport, progress: TrainProgress) -> Checkpoint | None:
        """Log a step if it was bad; returns the checkpoint to roll back to if the policy asks for that."""
        updated = report.finite and not (report.gradient_spike and self.policy != "ignore")
        progress.skipped_in_a_row = 0 if updated else progress.skipped_in_a_row + 1
        # While the loss scale of fp16 is being adjusted, infinities are expected, but not many in a row.
        expected = self.fp16 and not report.finite
        if report.flags and not expected and (checkpoint := self._respond(report, updated=updated)):
            return checkpoint
        self.previous_loss_spike = report.loss_spike
        if progress.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise TrmtError(
                f"training has diverged: {MAX_SKIPPED_IN_A_ROW} steps in a row up to step {report.step:,} "
                f"had no usable gradient; {ADVICE}"
            )
        return None

    def _respond(self, report: StepReport, *, updated: bool) -> Checkpoint | None:
        why = describe(report)
        values = {"norm": report.norm, "loss": report.loss} if report.finite else {}
        event = "spike" if report.finite else "bad gradient"
        self.log(event, step=report.step, why=why, taken=updated, **values)
        if self.policy == "stop":
            raise TrmtError(
                f"step {report.step:,}: {why}, and training.on_spike is stop; go on from the last "
                f"checkpoint with --set training.on_spike=rollback, or {ADVICE}"
            )
        if self.policy == "rollback":
            rollbacks = self.distributed.on_main(lambda: self._roll_back(report, why))
            if rollbacks:
                self.rollbacks = [build(Rollback, entry, where=ROLLBACKS) for entry in rollbacks]
                step = self.rollbacks[-1].to
                return Checkpoint(checkpoints.step_folder(self.folder, step), step)
            console.warn(f"step {report.step:,}: {why}; there is no checkpoint before it to roll back to")
        elif not updated:
            console.warn(f"step {report.step:,}: {why}; the step is skipped")
        elif not self.previous_loss_spike:  # one warning, not one for each step of a plateau
            console.warn(f"step {report.step:,}: {why}")
        return None

    def _roll_back(self, report: StepReport, why: str) -> list[Tree]:
        """Choose the checkpoint to restore, set the newer ones aside, and write the new list of rollbacks.

        The list is empty if there is no checkpoint to roll back to.
        """
        is_delayed = report.loss_spike and not report.gradient_spike
        first_suspect = report.step - SUSPECT_STEPS if is_delayed else report.step
        older = [
            found for found in checkpoints.resumable_checkpoints(self.folder) if found.step < report.step
        ]
        if not older:
            return []
        target = next((found for found in reversed(older) if found.step < first_suspect), older[0])
        if sum(rollback.to == target.step for rollback in self.rollbacks) >= MAX_ROLLBACKS:
            raise TrmtError(
                f"step {report.step:,}: {why}, as after each of {MAX_ROLLBACKS} rollbacks to step "
                f"{target.step:,}; {ADVICE}"
            )
        for newer in checkpoints.list_checkpoints(self.folder):
            if newer.step > target.step:
                checkpoints.set_aside(newer, "rolled-back")
        steps = tuple(range(max(first_suspect, target.step + 1), report.step + 1))
        rollbacks = [*self.rollbacks, Rollback(target.step, report.step, why, steps)]
        trees = [to_tree(rollback) for rollback in rollbacks]
        write_verified_json(self.folder / ROLLBACKS, {"rollbacks": trees})
        console.warn(
            f"step {report.step:,}: {why}; rolling back to step {target.step:,} and skipping "
            + (f"steps {steps[0]:,} to {steps[-1]:,}" if len(steps) > 1 else f"step {steps[0]:,}")
        )
        self.log("rollback", step=report.step, to=target.step, why=why, left_out=steps)
        return trees


def describe(report: StepReport) -> str:
    """What is bad about a step, in words."""
    if not report.finite:
        return "the gradient is not finite"
    if report.gradient_spike:
        return f"the gradient's norm of {report.norm:.3g} is far above that of recent steps"
    return f"the loss of {report.loss:.2f} is far above that of recent steps"


def read_rollbacks(folder: Path) -> list[Rollback]:
    """The rollbacks of the run in `folder`, oldest first."""
    path, advice = folder / ROLLBACKS, "restore the file, or name another run folder"
    try:
        tree = read_json(path)
        tree = {"rollbacks": tree} if isinstance(tree, list) else verified(tree)  # a list in older versions
        return list(build_stored(Rollbacks, tree, where=str(path), advice=advice).rollbacks)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise BundleError(f"cannot read {path}: {error.strerror}; {advice}") from error
    except TreeError as error:
        raise BundleError(f"{path} {error}; {advice}") from error
