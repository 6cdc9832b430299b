"""What a run keeps with each checkpoint, so that it goes on from there exactly as if nothing had happened."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from trmt.bundles import bundles, checkpoints
from trmt.bundles.checkpoints import Checkpoint
from trmt.errors import DataError
from trmt.sets.batches import Batches
from trmt.storage.files import remove_partials, write_json
from trmt.text.tokenizer import Tokenizer
from trmt.training import sharding
from trmt.training.learner import Learner
from trmt.training.recipe import Recipe
from trmt.training.spikes import Spikes
from trmt.training.validation import Seen

HALVINGS = "halvings.json"  # in a run folder: what an attempt learned of memory and could not save


@dataclass
class Progress:
    """What changes during a run, apart from tensors; saved with every checkpoint."""

    step: int = 0
    epoch: int = 0
    position: int = 0
    best: float | None = None
    stale: int = 0  # validations since the best one
    target_tokens: int = 0
    seconds: float = 0.0
    look_due: bool = False  # whether the dev set has still to be looked at with these weights

    def judge(self, value: float, *, lower_is_better: bool) -> None:
        """Count the validations since the best one, of which this is the newest."""
        better = self.best is None or (value < self.best if lower_is_better else value > self.best)
        if math.isnan(value):  # never an improvement, not even on nothing
            better = False
        if better:
            self.best = value
        self.stale = 0 if better else self.stale + 1


class Keeper:
    """Writes the checkpoints of a run, and takes them up; for all ranks of a team to call together."""

    def __init__(
        self,
        folder: Path,
        recipe: Recipe,
        tokenizer: Tokenizer,
        learner: Learner,
        batches: Batches,
        spikes: Spikes,
    ) -> None:
        self.folder, self.recipe, self.tokenizer = folder, recipe, tokenizer
        self.learner, self.batches, self.spikes = learner, batches, spikes
        self.data, self.team = batches.data, learner.team

    # Take up

    def newest(self) -> checkpoints.State | None:
        """The newest state that is whole; the leader also removes what was left half-written."""
        if self.team.leads:
            remove_partials(self.folder)
        return checkpoints.newest_state(self.folder)

    def take_up(self, plain: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Progress:
        """Put everything back to where it stood, and say how far that was."""
        if plain["data"] != self.data.fingerprint:
            raise DataError(
                f"{self.data.folder} is not the data that {self.folder} was trained on; prepare it as "
                "before, or name another run folder to start a new run"
            )
        self.learner.restore(plain["learner"], tensors)
        self.spikes.failed = plain.get("failed", 0)
        return Progress(**plain["progress"])

    def remember_shortage(self) -> None:
        """Note, where nothing can be saved, that the next attempt is to take smaller parts of batches."""
        write_json(self.folder / HALVINGS, self.learner.parts.halvings + 1)

    def recall_shortage(self) -> None:
        """Take up what an attempt learned that ran out of memory before it could save."""
        with suppress(FileNotFoundError, ValueError):
            known = int((self.folder / HALVINGS).read_bytes())
            self.learner.parts.halvings = max(self.learner.parts.halvings, known)

    # Save

    def save(self, progress: Progress) -> None:
        """Write a checkpoint; its scores come later."""
        manifest = bundles.describe(
            self.learner.net,
            self.recipe.architecture,
            self.tokenizer,
            longest=self._longest(),
            data={"set": self.data.folder.name, "fingerprint": self.data.fingerprint},
            training={
                "step": progress.step,
                "epoch": progress.epoch,
                "target_tokens": progress.target_tokens,
                **self.learner.objective.told(),
            },
        )
        state = {
            "progress": vars(progress),
            "failed": self.spikes.failed,
            "data": self.data.fingerprint,
            "learner": self.learner.state(),
        }
        self._write(manifest, state, progress.step)
        if not progress.look_due:
            self.prune()

    def _write(self, manifest: bundles.Manifest, state: Mapping[str, Any], step: int) -> None:
        learner, tensors = self.learner, self.learner.tensors()

        def write() -> None:
            whole = (state, tensors)
            checkpoints.save(self.folder, manifest, learner.weights(), self.tokenizer, step=step, state=whole)

        if not learner.sharded:
            self.team.lead(write)
            return
        mine = sharding.slices_of(tensors, self.team)
        checkpoints.save_slices(
            self.folder,
            manifest,
            self.tokenizer,
            step=step,
            state=(state, mine),
            kept=learner.kept(),
            team=self.team,
        )

    def _longest(self) -> dict[str, int]:
        """The longest sentences met in training: beyond them the network has seen nothing."""
        return {
            "source": int(self.batches.source_lengths.max()),
            "target": int(self.batches.target_lengths.max()),
        }

    def add(self, progress: Progress, seen: Seen) -> None:
        """Give the checkpoint just written what a look with its weights found."""
        if not self.team.leads:
            return
        point = Checkpoint(checkpoints.step_folder(self.folder, progress.step), progress.step)
        kept = {"scores": seen.scores if seen.judged else (), "golden": seen.samples}
        point.add({"progress": vars(progress)}, **kept)
        self.prune()

    def prune(self) -> None:
        """Let go of the checkpoints that are neither among the best nor among the last."""
        if not self.team.leads:
            return
        training = self.recipe.training
        checkpoints.prune(self.folder, best=training.keep_best, last=training.keep_last)
