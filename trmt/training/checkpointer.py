"""Saving and restoring the state of a run, so that a resumed run continues as if it had never stopped."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trmt.bundles import bundles, checkpoints, slices
from trmt.bundles.bundles import Manifest
from trmt.bundles.checkpoints import TRAINING, Checkpoint, SavedState
from trmt.bundles.slices import SlicedTensors, TensorSlice
from trmt.config import build_stored
from trmt.devices.memory import is_out_of_memory
from trmt.errors import BundleError, DataError, first_line
from trmt.sets.batches import Batches
from trmt.storage.files import atomic_folder, remove_partials, write_advice, write_verified_json
from trmt.text.tokenizer import Tokenizer
from trmt.training import sharding
from trmt.training.state import Halvings, SavedValues, TrainState
from trmt.training.validation import ValidationResult
from trmt.trees import TreeError, read_json, verified

HALVINGS = "halvings.json"  # in a run folder: for the next attempt, from one that could not save


@dataclass(frozen=True)
class SavedHalvings:
    """What HALVINGS holds."""

    halvings: Halvings


class Checkpointer:
    """Writes and restores the checkpoints of a run; its methods are for all ranks to call together."""

    def __init__(self, folder: Path, state: TrainState, tokenizer: Tokenizer, batches: Batches) -> None:
        self.folder, self.state, self.tokenizer, self.batches = folder, state, tokenizer, batches
        self.data, self.distributed = batches.data, state.distributed

    # Restore

    def newest(self) -> SavedState | None:
        """The newest undamaged training state; rank 0 also removes what killed processes left behind."""
        if self.distributed.is_main:
            remove_partials(self.folder)
        return checkpoints.newest_state(self.folder)

    def restore(self, saved: SavedState) -> None:
        """Restore weights, optimiser, progress and everything else that was saved."""
        tree, tensors = saved
        where, advice = str(self.folder), "name another run folder"
        values = build_stored(SavedValues, tree, where=where, advice=advice)
        if values.data != self.data.fingerprint:
            raise DataError(
                f"{self.data.folder} is not the data that {self.folder} was trained on; prepare it as "
                "before, or name another run folder to start a new run"
            )
        try:
            self.state.restore(values, tensors)
        except (KeyError, RuntimeError) as error:
            if is_out_of_memory(error):
                raise
            raise BundleError(
                f"the training state in {where} is not of this network ({first_line(error)}); {advice}"
            ) from error

    def save_halvings(self) -> None:
        """Let the next attempt use smaller micro-batches, where no checkpoint can be saved any more."""
        write_verified_json(self.folder / HALVINGS, {"halvings": self.state.micro_batches.halvings + 1})

    def restore_halvings(self) -> None:
        """Use what `save_halvings` of an earlier attempt wrote."""
        path, advice = self.folder / HALVINGS, "remove it, or name another run folder"
        try:
            saved = build_stored(SavedHalvings, verified(read_json(path)), where=str(path), advice=advice)
        except FileNotFoundError:
            return
        except OSError as error:
            raise BundleError(f"cannot read {path}: {error.strerror}; {advice}") from error
        except TreeError as error:
            raise BundleError(f"{path} {error}; {advice}") from error
        self.state.micro_batches.halvings = max(self.state.micro_batches.halvings, saved.halvings)

    # Save

    def save(self) -> None:
        """Write a checkpoint; validation scores are added later."""
        state, progress = self.state, self.state.progress
        manifest = bundles.make_manifest(
            state.net,
            state.recipe.architecture,
            self.tokenizer,
            languages=self.data.languages,
            longest={
                "source": int(self.batches.source_lengths.max()),
                "target": int(self.batches.target_lengths.max()),
            },
            data={"set": self.data.folder.name, "fingerprint": self.data.fingerprint},
            training={
                "step": progress.step,
                "epoch": progress.epoch,
                "target_tokens": progress.target_tokens,
                **state.objective.told(),
            },
        )
        values = {"data": self.data.fingerprint, **state.values()}
        if state.sharded:
            self._save_sharded(manifest, values)
        else:
            self.distributed.on_main(lambda: self._save_whole(manifest, values))
        if not progress.validation_pending:
            self.prune()

    def _save_whole(self, manifest: Manifest, values: Mapping[str, Any]) -> None:
        checkpoints.save_checkpoint(
            self.folder,
            manifest,
            self.state.bundle_weights(),
            self.tokenizer,
            step=self.state.progress.step,
            state=(values, self.state.tensors()),
        )

    def _save_sharded(self, manifest: Manifest, values: Mapping[str, Any]) -> None:
        """Let each rank write the rows it has; rank 0 merges the weights into the bundle."""
        own = sharding.slices_to_save(self.state.tensors(), self.distributed)
        target = checkpoints.step_folder(self.folder, self.state.progress.step)
        is_main = self.distributed.is_main
        with atomic_folder(target) if is_main else nullcontext(self.folder) as partial:
            folder = partial / TRAINING
            if is_main:
                folder.mkdir()
            folder = Path(self.distributed.on_main(lambda: str(folder)))
            written = self.distributed.all_gather(self._write_slices(folder, own))
            if is_main:
                slices.write_index(folder, written)
                SlicedTensors(folder).merge(partial / bundles.WEIGHTS, self.state.bundle_names())
                bundles.finish_bundle(partial, manifest, self.tokenizer)
                checkpoints.write_state(folder, values, tensors=slices.INDEX)
        self.distributed.on_main(lambda: None)  # no rank goes on before the checkpoint is complete

    def _write_slices(self, folder: Path, own: Mapping[str, TensorSlice]) -> dict[str, Any]:
        rank, world_size = self.distributed.rank, self.distributed.world_size
        try:
            return slices.write_slices(folder, own, rank=rank, world_size=world_size)
        except OSError as error:
            raise BundleError(
                f"cannot write to {folder}: {error.strerror or error}; {write_advice(error)}, and check that "
                "every machine sees the run folder"
            ) from error

    def add_results(self, result: ValidationResult) -> None:
        """Add validation results to the checkpoint of this step, then remove checkpoints not to be kept."""
        if not self.distributed.is_main:
            return
        progress = self.state.progress
        checkpoint = Checkpoint(checkpoints.step_folder(self.folder, progress.step), progress.step)
        scores = result.scores if result.has_metric else ()
        checkpoint.add_results({"progress": asdict(progress)}, scores=scores, golden=result.samples)
        self.prune()

    def prune(self) -> None:
        """Remove the checkpoints that are neither among the best nor among the last."""
        if self.distributed.is_main:
            training = self.state.recipe.training
            checkpoints.prune(self.folder, best=training.keep_best, last=training.keep_last)
