"""Training: from a prepared set and a recipe to a run folder; the same command resumes it exactly.

`TrainingRun` has the loop: restore, step, log, save, stop, validate. step.py has the step, state.py what a
checkpoint saves. Validating and saving do not change the run, because no random generator has a state that
they could disturb.
"""

from __future__ import annotations

import hashlib
import shlex
import signal
import time
from collections.abc import Generator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import NoReturn, Self

import torch

from trmt import console
from trmt.bundles import bundles, checkpoints, init_from
from trmt.bundles.checkpoints import CONFIG, Checkpoint
from trmt.config import build, to_toml, to_tree
from trmt.devices.memory import is_device_error, is_out_of_memory
from trmt.errors import ConfigError, TrmtError, first_line
from trmt.nets.base import Seq2Seq
from trmt.objectives.base import Specials
from trmt.registry import NETWORKS, OBJECTIVES, resolve
from trmt.sets import record
from trmt.sets.batches import DataPosition, RaggedBatch
from trmt.sets.shards import DOCUMENTS, PAIRS, PreparedSet
from trmt.sets.subword_sampling import subword_resampler
from trmt.storage.files import atomic_file, write_verified_json
from trmt.storage.locks import exclusive
from trmt.text.tokenizer import Tokenizer
from trmt.training import word_vectors
from trmt.training.budget import PlannedRun, print_plan, print_requirements
from trmt.training.checkpointer import Checkpointer
from trmt.training.display import open_display
from trmt.training.distributed import Distributed, init_distributed
from trmt.training.micro_batches import ShardedOutOfMemory
from trmt.training.planning import (
    ORIGIN,
    TrainOptions,
    check_same_run,
    default_data,
    origin_of,
    resolved_recipe,
    run_folder,
    with_origin,
)
from trmt.training.recipe import Recipe, with_defaults
from trmt.training.reporting import Reporter
from trmt.training.run_log import StepClock
from trmt.training.spikes import SpikePolicy
from trmt.training.state import TrainState
from trmt.training.step import rehearse, train_step
from trmt.training.stopping import Ending, Interrupted, StopNow, StopSignals, ending
from trmt.training.validation import TranslateDevSet, Validator

MAX_PENDING_REPORTS = 100  # steps after which the guard's reports are read, at the latest


def train(options: TrainOptions, translate: TranslateDevSet | None = None) -> Path:
    """Train or resume, and return the run folder.

    `translate` translates and scores the dev set; without it only the loss is validated.
    """
    with init_distributed() as distributed:
        if options.dry_run:
            run = TrainingRun.from_options(options, translate)
            print_plan(run.planned())
            return run.folder
        run = TrainingRun.from_options(options, translate, distributed)
        # Nothing is written before this: all input has been read and checked.
        recipe = hashlib.sha256(to_toml(to_tree(run.recipe)).encode()).hexdigest()
        distributed.check_equal(data=run.data.fingerprint, recipe=recipe, torch=torch.__version__)
        job = distributed.torchrun_job
        try:
            with exclusive(run.folder, job=job) if distributed.is_main else nullcontext():
                run.restore()
                run.train()
        except ShardedOutOfMemory:
            run.checkpointer.save_halvings()
            raise
        except (MemoryError, RuntimeError) as error:
            if is_device_error(error):
                raise TrmtError(
                    f"{run.state.device} failed ({first_line(error)}); the same command goes on from "
                    "the last checkpoint, and trmt env shows what works on this device"
                ) from error
            if not is_out_of_memory(error):
                raise
            raise TrmtError(
                f"there is not enough memory for this network on {run.state.device}; use a smaller one or "
                "lower batches.tokens in a new run folder, or another device in this one"
            ) from error
        finally:
            run.reporter.close()
        return run.folder


class TrainingRun:
    """One training run: its data, its state, its folder, and the loop."""

    def __init__(
        self,
        folder: Path,
        recipe: Recipe,
        data: PreparedSet,
        tokenizer: Tokenizer,
        *,
        options: TrainOptions,
        translate: TranslateDevSet | None = None,
        distributed: Distributed | None = None,
    ) -> None:
        self.distributed = distributed or Distributed()
        self.folder, self.recipe, self.data, self.tokenizer = folder, recipe, data, tokenizer
        self.options = options
        padding_free = bool(resolve(NETWORKS, recipe.architecture, trust_code=True).packs_tokens)
        objective = resolve(OBJECTIVES, recipe.objective, trust_code=True)
        make_batches = objective.batches(build(objective.config_class, recipe.loss, where="loss"))
        self.batches = make_batches(
            data, recipe.batches, seed=recipe.training.seed, padding_free=padding_free
        )
        # The lengths of epochs differ by a batch or so; that of the first one stands for all.
        self.steps_per_epoch = len(self.batches.plan(0))
        self.state = TrainState(
            recipe,
            total_steps=self.last_step or 0,
            distributed=self.distributed,
            specials=Specials.of(tokenizer.target),
        )
        max_tokens = self.state.net.max_positions
        if alpha := recipe.batches.subword_alpha:
            self.batches.resample = subword_resampler(tokenizer, alpha, max_tokens - 1)
        if shape := self.batches.shape:
            self.state.batch_shape = replace(shape, max_length=min(shape.max_length, max_tokens))
        self.validator: Validator | None = None
        if "dev" in data.splits:
            dev = make_batches(data, recipe.batches, seed=0, split="dev")
            self.validator = Validator(dev, self.state, tokenizer, translate)
        self.reporter = Reporter(folder, self.state)
        self.signals = StopSignals(self.distributed)
        self.spikes = SpikePolicy(
            folder,
            policy=recipe.training.on_spike,
            fp16=self.state.precision == "fp16",
            log=self.reporter.log,
            distributed=self.distributed,
        )
        self.checkpointer = Checkpointer(folder, self.state, tokenizer, self.batches)
        self._check()

    @classmethod
    def from_options(
        cls,
        options: TrainOptions,
        translate: TranslateDevSet | None = None,
        distributed: Distributed | None = None,
    ) -> Self:
        """The run that these options describe; nothing is written yet."""
        options = with_origin(options)
        data = PreparedSet.open(options.data or default_data(kind=DOCUMENTS if options.pretrain else PAIRS))
        tokenizer = Tokenizer.load(data.tokenizer_folder)
        recipe, name = resolved_recipe(options, data, tokenizer, translates=translate is not None)
        folder = run_folder(options, data, name)
        check_same_run(folder, recipe, origin_of(options, data))
        recipe = with_defaults(recipe, trust_code=True)  # as `resolved_recipe` has checked
        return cls(
            folder, recipe, data, tokenizer, options=options, translate=translate, distributed=distributed
        )

    def _check(self) -> None:
        """Raise errors that would otherwise come up only later in training."""
        max_tokens = self.state.net.max_positions
        for batches in (self.batches, *([self.validator.batches] if self.validator else [])):
            if batches.lengths.max() > max_tokens:
                shorter = (
                    "prepare the data with a lower --max-length"
                    if self.data.kind == PAIRS
                    else "lower batches.passage_tokens"
                )
                raise ConfigError(
                    f"{self.data.folder} has sentences of {batches.lengths.max()} tokens, the network only "
                    f"has positions for {max_tokens}; raise network.max_positions, or {shorter}"
                )
        if not self.validator and self.recipe.training.patience and not self.last_step:
            raise ConfigError(
                f"training.patience needs a dev set and {self.data.folder} has none; prepare it again with "
                "--dev, or set training.steps or training.epochs"
            )
        if not self.validator:
            console.warn(f"{self.data.folder} has no dev set, so that the best checkpoint remains unknown")

    @property
    def last_step(self) -> int | None:
        """The step at which training ends, unless patience ends it before."""
        limits = []
        if self.recipe.training.steps:
            limits.append(self.recipe.training.steps)
        if self.recipe.training.epochs:
            limits.append(self.recipe.training.epochs * self.steps_per_epoch)
        return min(limits, default=None)

    @property
    def is_past_end(self) -> bool:
        """Whether the run already has more steps than its settings allow."""
        return self.last_step is not None and self.state.progress.step > self.last_step

    # Restore

    def restore(self) -> None:
        """Restore the newest checkpoint, or initialise the weights and start a new run folder."""
        if self.distributed.local_rank == 0:  # once on each machine
            self.data.verify()
        self.distributed.all_gather(None)
        state = self.state
        saved = self.distributed.main_first(self.checkpointer.newest)
        if saved:
            self.checkpointer.restore(saved)
            console.say(f"resuming {self.folder} at step {state.progress.step:,}")
        else:
            self._initialise_weights()
        state.broadcast_weights()
        self.checkpointer.restore_halvings()
        self.reporter.open(resumed=bool(saved))
        if self.distributed.is_main:
            if not self.is_past_end:  # nothing is trained with these settings
                with atomic_file(self.folder / CONFIG) as stream:
                    stream.write(to_toml(to_tree(self.recipe)).encode())
            if not saved:
                write_verified_json(self.folder / ORIGIN, to_tree(origin_of(self.options, self.data)))
                record.write_record(self.folder, self.data)
        self.reporter.log(
            "resume" if saved else "begin",
            data=str(self.data.folder),
            fingerprint=self.data.fingerprint,
            parameters=state.parameter_count,
            **state.environment(),
        )
        world_size = self.distributed.world_size
        processes = f" on {world_size} processes" if world_size > 1 else ""
        console.say(
            f"{self.recipe.architecture}, {state.parameter_count / 1e6:.1f}M parameters, "
            f"{state.device.type} {state.precision}{processes}, {len(self.batches.split):,} pairs, "
            f"{self.steps_per_epoch:,} steps an epoch -> {self.folder}"
        )
        print_requirements(self.planned())

    def _initialise_weights(self) -> None:
        """Replace random weights by those of --init-from and by word vectors, where they are given."""
        if self.options.init_from:
            path, encoder_only = init_from.split_encoder_suffix(self.options.init_from)
            bundle = checkpoints.find_bundle(path)
            weights = bundles.read_weights(bundle, bundles.read_manifest(bundle))
            self.state.initialise_from(weights, where=str(bundle), encoder_only=encoder_only)
            console.say(f"starting from the {'encoder' if encoder_only else 'weights'} of {bundle}")
        word_vectors.initialise_embeddings(self.state.net, self.recipe.vectors, self.tokenizer, self.data)
        self.state.restart_ema()

    # The loop

    def train(self) -> None:
        """Train until steps, epochs or patience are used up, or until a signal."""
        progress = self.state.progress
        if self.is_past_end and not progress.validation_pending:
            console.warn(
                f"{self.folder} has {progress.step:,} steps already and cannot end at step "
                f"{self.last_step:,}: nothing is trained, and its settings stay as they were"
            )
            return
        if (end := self.ending()) and not progress.validation_pending:
            console.say(
                f"{self.folder} has ended at step {progress.step:,} because {end.reason}; "
                f"raise {end.setting} to go on, or use it: {self._next_command()}"
            )
            return
        clock = StepClock(progress.target_tokens)
        shown = open_display(self.planned().info, self.reporter.history)
        with self.signals.handled(), shown as self.reporter.display:
            if progress.validation_pending:  # the run was ended between saving and validating
                self.validate()
            if self.state.compiled:
                console.say(
                    'compiling the network, which can take minutes (training.compile = "off" does without)'
                )
            rehearse(self.state, self.batches)
            clock.skip()
            while not self.ending():
                if checkpoint := self._train_until_rollback(clock):
                    self._roll_back(checkpoint, clock)
        if end := self.ending():
            self.reporter.finish(end.reason, self._next_command())

    def _train_until_rollback(self, clock: StepClock) -> Checkpoint | None:
        """Train until the end, or until a checkpoint has to be rolled back to, which is returned."""
        training, validation = self.recipe.training, self.recipe.validation
        progress, guard = self.state.progress, self.state.guard
        stream = self._batch_stream()
        try:
            while not self.ending():
                # Step
                position, batches = clock.next(stream)
                self.step(batches)
                progress.epoch, progress.epoch_step = position
                progress.seconds += clock.end_step(paused=self.signals.was_paused())
                self.reporter.display.advance(1, clock.note)

                # What is due, and whether the steps so far were good
                log_due = progress.step % training.log_every == 0
                validation_due = progress.step % validation.every == 0 or bool(self.ending())
                save_due = bool(training.save_every) and progress.step % training.save_every == 0
                save_due = save_due or validation_due or self.signals.number is not None
                if log_due or save_due or guard.pending >= MAX_PENDING_REPORTS:
                    for report in guard.pop_reports():
                        if checkpoint := self.spikes.handle(report, progress):
                            return checkpoint

                # Log
                if log_due:
                    self.reporter.log_step(clock, self.planned())
                if not save_due:
                    continue

                # Save
                progress.validation_pending = validation_due and self.validator is not None
                self.reporter.display.set_activity("saving")
                self.checkpointer.save()

                # Stop
                if self.signals.number is not None:
                    self._stop(self.signals.number)

                # Validate
                if progress.validation_pending:
                    self.reporter.display.set_activity("validating")
                    self.validate()
                self.reporter.display.set_activity("")
                clock.skip()
        finally:
            stream.close()
        return None

    def _batch_stream(self) -> Generator[tuple[DataPosition, list[RaggedBatch]]]:
        """The batches of each step from the current position on."""
        return self.batches.steps(DataPosition(self.state.progress.epoch, self.state.progress.epoch_step))

    def step(self, batches: list[RaggedBatch]) -> None:
        """Take the next step, unless a rollback has excluded it."""
        number = self.state.progress.step + 1
        if number in self.spikes.skipped_steps:
            self.reporter.log("left out", step=number)
            self.state.progress.step = number
        else:
            train_step(self.state, batches)

    def _roll_back(self, checkpoint: Checkpoint, clock: StepClock) -> None:
        """Restore an older checkpoint."""
        before = self.state.progress.step
        self.checkpointer.restore(checkpoint.load_state())
        self.reporter.display.advance(self.state.progress.step - before)
        clock.restart(self.state.progress.target_tokens)

    def ending(self) -> Ending | None:
        """Why training ends now; None while it goes on."""
        return ending(self.recipe, self.state.progress, last_step=self.last_step)

    def _next_command(self) -> str:
        """What is usually done with a run that has ended."""
        run = shlex.quote(str(self.folder))
        if self.data.kind == DOCUMENTS:
            suffix = "" if isinstance(self.state.net, Seq2Seq) else init_from.ENCODER_SUFFIX
            return f"trmt train --data SET --init-from {run}{suffix}"
        if len(checkpoints.list_checkpoints(self.folder)) > 1:
            return f"trmt average {run}"
        return f"trmt translate {run} < FILE"

    # Validate

    def validate(self) -> None:
        """Validate the weights just saved, and add the results to their checkpoint."""
        assert self.validator, "only runs with a dev set validate"
        began, progress = time.monotonic(), self.state.progress
        try:
            with self.signals.stop_at_once(), self.state.evaluating():
                result = self.validator.validate()
        except StopNow:
            assert self.signals.number is not None, "only a signal raises it"
            self._stop(self.signals.number)
        is_best = False
        if result.has_metric:
            lower_is_better = self.recipe.validation.metric == "loss"
            warmup = self.recipe.optim.warmup
            value = float(result.scores[0]["value"])
            is_best = progress.add_score(value, lower_is_better=lower_is_better, warmup=warmup)
        seconds = time.monotonic() - began
        self.reporter.log_validation(result, is_best=is_best, seconds=seconds, last_step=self.last_step)
        progress.validation_pending = False
        self.checkpointer.add_results(result)

    # Stop

    def _stop(self, number: int) -> NoReturn:
        self.reporter.log("interrupted", signal=number)
        raise Interrupted(
            f"stopped by {signal.Signals(number).name} after step {self.state.progress.step:,}, which is "
            "saved; the same command goes on from there",
            number,
        )

    # Plan

    def planned(self) -> PlannedRun:
        """This run, as the estimates of memory, time and disk need it."""
        return PlannedRun(
            self.state,
            self.batches,
            self.folder,
            self.recipe.training,
            steps_per_epoch=self.steps_per_epoch,
            last_step=self.last_step,
            validator=self.validator,
        )
