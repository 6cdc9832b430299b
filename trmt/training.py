"""Training: from a prepared set and a recipe to a run folder; run again, it goes on exactly where it stood.

Exactness comes from keeping nothing in motion: the order of the data is a function of (seed, epoch,
position), dropout is drawn from a generator seeded anew for each batch, and everything else is in the
checkpoint. Validation and saving therefore cannot disturb the run.
"""

from __future__ import annotations

import hashlib
import math
import signal
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn, Self

import numpy as np
import torch
from torch import Tensor

from trmt import bundles, capacity, checkpoints, console, display, sharding, unchanged
from trmt.arch.base import Seq2Seq
from trmt.batches import Batches, Column, Examples, Position
from trmt.budget import Job, about, glance, pace, plan
from trmt.checkpoints import CONFIG, MODELS, Checkpoint
from trmt.config import to_toml, tree_of
from trmt.errors import ConfigError, DataError, TrmtError
from trmt.files import atomic_file, only_one, sweep, write_json
from trmt.history import LOG, TRAIN, VALIDATE, History
from trmt.learner import Learner, ShortMemory, is_out_of_memory
from trmt.logbook import Clock, Logbook
from trmt.outlook import foresee
from trmt.planning import (
    ORIGIN,
    TrainOptions,
    check_same_run,
    default_data,
    origin_of,
    remembered,
    resolved_recipe,
)
from trmt.recipe import Recipe, safe_name
from trmt.registry import ARCHITECTURES, resolve
from trmt.shards import PreparedSet
from trmt.spikes import GoBack, Spikes
from trmt.stopping import Interrupted, Signals, StoppedHere
from trmt.team import Team, assembled
from trmt.tokenizer import Tokenizer

HALVINGS = "halvings.json"  # in a run folder: what an attempt learned of memory and could not save
NOT_ONE_FITS = "not even a single sentence of the dev set fits into memory; training goes on without it"
VERDICTS_AT_ONCE = 100  # steps after which the host asks what became of them, at the latest


@dataclass(frozen=True)
class Validation:
    """What a look at the dev set found: scores with signatures, and some translations."""

    scores: tuple[dict[str, Any], ...] = ()
    samples: tuple[dict[str, Any], ...] = ()


Validate = Callable[[Seq2Seq, Tokenizer, PreparedSet, Recipe], Validation]


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


def train(options: TrainOptions, validate: Validate | None = None) -> Path:
    """Train, or go on training, and return the run folder.

    `validate` translates and scores the dev set; without it only the loss is looked at.
    """
    with assembled() as team:
        return _trained(Run.planned(options, validate, Team() if options.dry_run else team))


def _trained(run: Run) -> Path:
    if run.options.dry_run:
        run.describe()
        return run.folder
    team = run.team
    # Everything has been read by now: the leader is free to write.
    recipe = hashlib.sha256(to_toml(tree_of(run.recipe)).encode()).hexdigest()
    team.alike(data=run.data.fingerprint, recipe=recipe, torch=torch.__version__)
    try:
        with only_one(run.folder, job=team.job) if team.leads else nullcontext():
            run.begin()
            run.loop()
    except ShortMemory:
        write_json(run.folder / HALVINGS, run.learner.halvings + 1)
        raise
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise TrmtError(
            f"there is not enough memory for this network on {run.learner.device}; use a smaller one or "
            "lower batches.tokens in a new run folder, or another device in this one"
        ) from error
    finally:
        run.close()
    return run.folder


def resample_with(tokenizer: Tokenizer, alpha: float, longest: int) -> Callable[[str, Column, int], Column]:
    """Subword sampling as a transform of batches; a draw of more than `longest` pieces is not taken."""

    def resample(name: str, column: Column, seed: int) -> Column:
        side = tokenizer.source if name.startswith("source") else tokenizer.target
        before = Column(column.ids.astype(np.int64), column.lengths.astype(np.int64))
        after = Column(*side.sampler(alpha).draw(*before, seed=seed))
        return longer_ones_as_before(before, after, longest)

    return resample


def longer_ones_as_before(before: Column, after: Column, longest: int) -> Column:
    """`after`, but with the sentences of `before` where those of `after` have more than `longest` pieces."""
    if not (after.lengths > longest).any():
        return after
    parts = [np.split(column.ids, np.cumsum(column.lengths)[:-1]) for column in (before, after)]
    taken = [new if len(new) <= longest else old for old, new in zip(*parts, strict=True)]
    return Column(np.concatenate(taken), np.array(list(map(len, taken)), dtype=np.int64))


class Run:
    """One training run: its network, its folder, and the loop."""

    def __init__(
        self,
        folder: Path,
        recipe: Recipe,
        data: PreparedSet,
        tokenizer: Tokenizer,
        *,
        validate: Validate | None,
        options: TrainOptions,
        team: Team | None = None,
    ) -> None:
        self.team = team = team or Team()
        self.folder, self.recipe, self.data, self.tokenizer = folder, recipe, data, tokenizer
        self.validate, self.options = validate, options
        in_row = bool(resolve(ARCHITECTURES, recipe.architecture, trust_code=True).in_row)
        self.batches = Batches(data, recipe.batches, seed=recipe.training.seed, in_row=in_row)
        self.dev = Batches(data, recipe.batches, seed=0, split="dev") if "dev" in data.splits else None
        # Epochs differ by a batch or so; the first one's length stands for all.
        self.steps_per_epoch = len(self.batches.plan(0))
        self.learner = Learner(recipe, steps=self.last_step or 0, team=team)
        self.positions = int(getattr(self.learner.net.config, "longest", 1 << 30))
        if room := self.batches.room:
            self.learner.room = replace(room, longest=min(room.longest, self.positions))
        if alpha := recipe.batches.subword_alpha:
            self.batches.resample = resample_with(tokenizer, alpha, self.positions - 1)
        self.logbook: Logbook | None = None
        self.history = History()
        self.screen: display.Screen = display.Lines()
        self.progress = Progress()
        self.signals = Signals(team)
        half = self.learner.precision == "fp16"
        self.spikes = Spikes(folder, policy=recipe.training.on_spike, half=half, log=self.log, team=team)
        self._check()

    @classmethod
    def planned(cls, options: TrainOptions, validate: Validate | None, team: Team | None = None) -> Self:
        """The run that these options describe, about to begin."""
        options = remembered(options)
        data = PreparedSet.open(options.data or default_data())
        tokenizer = Tokenizer.load(data.tokenizer_folder)
        recipe, name = resolved_recipe(options, data, tokenizer, translates=validate is not None)
        folder = options.run or MODELS / safe_name(f"{data.folder.resolve().name}-{name}")
        check_same_run(folder, recipe, origin_of(options, data))
        return cls(folder, recipe, data, tokenizer, validate=validate, options=options, team=team)

    def _check(self) -> None:
        """What cannot work is said before the first step."""
        for batches in (self.batches, self.dev):
            if batches and batches.lengths.max() > self.positions:
                raise ConfigError(
                    f"{self.data.folder} has sentences of {batches.lengths.max()} tokens, the network "
                    f"positions for {self.positions}; raise network.longest, or prepare the data with a "
                    "lower --max-length"
                )
        if not self.dev and self.recipe.training.patience and not self.last_step:
            raise ConfigError(
                f"training.patience needs a dev set and {self.data.folder} has none; prepare it again with "
                "--dev, or set training.steps or training.epochs"
            )
        if not self.dev:
            console.warn(f"{self.data.folder} has no dev set: nothing tells which checkpoint is best")

    @property
    def last_step(self) -> int | None:
        """The step at which training ends, unless patience ends it before."""
        limits = []
        if self.recipe.training.steps:
            limits.append(self.recipe.training.steps)
        if self.recipe.training.epochs:
            limits.append(self.recipe.training.epochs * self.steps_per_epoch)
        return min(limits, default=None)

    # Restore

    def begin(self) -> None:
        """Take up the newest checkpoint, or start a new run folder."""
        self._verify()
        state = self.team.first(self._newest_state)
        if state:
            self._restore(*state)
            console.say(f"resuming {self.folder} at step {self.progress.step:,}")
        elif self.options.init_from:
            place = checkpoints.find_bundle(self.options.init_from)
            weights = bundles.read_weights(place, bundles.read_manifest(place))
            self.learner.start_from(weights, where=str(place))
            console.say(f"starting from the weights of {place}")
        learner = self.learner
        learner.start_alike()
        self._read_halvings()
        if self.team.leads:
            self.logbook = Logbook(self.folder / LOG, step=self.progress.step)
            if state and self.logbook.path.is_file():  # whoever tidied it away may go on without it
                self.history = History.read(self.logbook.path)
            with atomic_file(self.folder / CONFIG) as stream:
                stream.write(to_toml(tree_of(self.recipe)).encode())
            if not state:
                write_json(self.folder / ORIGIN, tree_of(origin_of(self.options, self.data)))
                unchanged.remember(self.folder, self.data)
        self.log(
            "resume" if state else "begin",
            data=str(self.data.folder),
            fingerprint=self.data.fingerprint,
            parameters=learner.parameters,
            **learner.machine(),
        )
        processes = f" on {self.team.size} processes" if self.team.size > 1 else ""
        console.say(
            f"{self.recipe.architecture}, {learner.parameters / 1e6:.1f}M parameters, "
            f"{learner.device.type} {learner.precision}{processes}, {len(self.batches.split):,} pairs, "
            f"{self.steps_per_epoch:,} steps an epoch -> {self.folder}"
        )
        glance(self.job())

    def _verify(self) -> None:
        """See that the data is as it was written, once on each machine."""
        if self.team.local_rank == 0:
            self.data.verify()
        self.team.gather(None)

    def _newest_state(self) -> checkpoints.State | None:
        if self.team.leads:
            sweep(self.folder)
        return checkpoints.newest_state(self.folder)

    def _read_halvings(self) -> None:
        """Take up what an attempt learned that ran out of memory before it could save."""
        with suppress(FileNotFoundError, ValueError):
            known = int((self.folder / HALVINGS).read_bytes())
            self.learner.halvings = max(self.learner.halvings, known)

    def _restore(self, plain: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        if plain["data"] != self.data.fingerprint:
            raise DataError(
                f"{self.data.folder} is not the data that {self.folder} was trained on; prepare it as "
                "before, or name another run folder to start a new run"
            )
        self.learner.restore(plain["learner"], tensors)
        self.progress = Progress(**plain["progress"])
        self.spikes.failed = plain.get("failed", 0)

    # Step

    def loop(self) -> None:
        """Train to the end of the recipe, to the end of patience, or until a signal."""
        progress, last = self.progress, self.last_step
        if self.finished() and not progress.look_due:
            limit = "training.steps" if last is not None and progress.step >= last else "training.patience"
            console.say(f"{self.folder} has ended at step {progress.step:,}; raise {limit} to go on")
            return
        mark = Clock(progress.target_tokens)
        with self.signals.heard(), display.watching(about(self.job()), self.history) as self.screen:
            if progress.look_due:  # the run was ended between saving and looking
                self.look()
            self.learner.rehearse(self.batches)
            mark.skip()
            while not self.finished():
                try:
                    self._stretch(mark)
                except GoBack as back:
                    before = self.progress.step
                    self._restore(*back.point.state())
                    self.screen.advance(self.progress.step - before)
                    mark.restart(self.progress.target_tokens)
        progress = self.progress
        self.log("end", seconds=round(progress.seconds, 1))
        console.say(f"done: {progress.step:,} steps in {console.duration(progress.seconds)} -> {self.folder}")

    def _stretch(self, mark: Clock) -> None:
        """Train to the end, or to where the run goes back."""
        recipe, progress = self.recipe, self.progress
        stream = self.batches.steps(Position(progress.epoch, progress.position))
        try:
            while not self.finished():
                after, examples = mark.next(stream)
                self._learn(examples)
                progress.epoch, progress.position = after
                progress.seconds += mark.lap(paused=self.signals.was_paused())
                if progress.step % recipe.training.log_every == 0:
                    self._report(mark)
                elif self.learner.guard.unread >= VERDICTS_AT_ONCE:
                    self._settle()
                self.screen.advance(1, mark.note)
                validating = progress.step % recipe.validation.every == 0 or self.finished()
                every = recipe.training.save_every
                if validating or (every and progress.step % every == 0) or self.signals.number is not None:
                    self._settle()
                    progress.look_due = validating and self.dev is not None
                    self.screen.doing("saving")
                    self.save()
                    if self.signals.number is not None:
                        self._stop(self.signals.number)
                    if progress.look_due:
                        self.screen.doing("validating")
                        self.look()
                    self.screen.doing("")
                    mark.skip()
        finally:
            stream.close()

    def _learn(self, examples: list[Examples]) -> None:
        number = self.progress.step + 1
        if number in self.spikes.left_out:
            self.log("left out", step=number)
        else:
            learned = self.learner.learn(examples, self.progress.step)
            self.progress.target_tokens += learned.tokens
        self.progress.step = number

    def _settle(self) -> None:
        """Hear what became of the steps since this was last asked; it may end in going back."""
        for verdict in self.learner.guard.verdicts():
            self.spikes.hear(verdict)

    def finished(self) -> bool:
        """Whether steps, epochs or patience are used up."""
        patience = self.recipe.training.patience
        last = self.last_step
        out_of_patience = bool(patience) and self.progress.stale >= patience
        return out_of_patience or (last is not None and self.progress.step >= last)

    # Log

    def log(self, event: str, *, step: int | None = None, **values: Any) -> None:
        """One line in the run's log, on this step or an earlier one; the leader writes it."""
        if not self.team.leads:
            return
        assert self.logbook, "a run begins before it logs"
        self.history.add(self.logbook.write(event, self.progress.step if step is None else step, **values))

    def close(self) -> None:
        """Let go of the log's files."""
        if self.logbook:
            self.logbook.close()

    def _report(self, mark: Clock) -> None:
        self._settle()
        loss = self.learner.guard.mean_loss()
        speed = mark.speed(self.progress.target_tokens)
        mark.note = "no usable gradient" if loss is None else f"loss {loss:.3f}  {speed:,.0f} tokens/s"
        self.log(
            "train",
            epoch=self.progress.epoch,
            loss=loss and round(loss, 5),
            lr=self.learner.rate(self.progress.step),
            tokens_per_second=round(speed, 1),
            waited=round(mark.wait_share, 5),
            memory=capacity.peak(self.learner.device),
            **self._place(),
        )
        if self.history.last(TRAIN, back=1) is None:
            console.say(pace(self.job(), seconds=self.progress.seconds / self.progress.step))

    def _place(self) -> dict[str, Any]:
        """How far training has come, for curves over tokens or hours."""
        return {"tokens": self.progress.target_tokens, "elapsed": round(self.progress.seconds, 3)}

    # Validate

    def look(self) -> None:
        """The dev set through the eyes of the weights just saved; what is found goes to them."""
        began = time.monotonic()
        try:
            with self.signals.harmless(), self.learner.at_rest():
                loss, found = self._found()
        except StoppedHere:
            assert self.signals.number is not None, "only a signal raises it"
            self._stop(self.signals.number)
        scores: list[dict[str, Any]] = []
        if loss is not None:
            scores += [{"metric": "loss", "value": loss, "signature": "nats per target token, dev set"}]
        scores += found.scores if found else ()
        metric = self.recipe.validation.metric
        scores.sort(key=lambda score: score["metric"] != metric)
        judged = bool(scores) and (scores[0]["metric"] == metric or math.isnan(scores[0]["value"]))
        if judged:
            self._count_patience(float(scores[0]["value"]), lower_is_better=metric == "loss")
        shown = ", ".join(f"{score['metric']} {score['value']:.4g}" for score in scores)
        better = "  (best)" if judged and self.progress.stale == 0 else ""
        console.say(f"step {self.progress.step:,}: {shown or 'not validated'}{better}")
        samples = found.samples if found else ()
        took = round(time.monotonic() - began, 2)
        self.log("validate", scores=scores, samples=samples, seconds=took, **self._place())
        if self.team.leads:
            self.screen.looked(samples, self._expected(metric))
        self.progress.look_due = False
        if self.team.leads:
            point = Checkpoint(checkpoints.step_folder(self.folder, self.progress.step), self.progress.step)
            kept = {"scores": tuple(scores) if judged else (), "golden": samples}
            point.add({"progress": vars(self.progress)}, **kept)
            self._prune()

    def _found(self) -> tuple[float | None, Validation | None]:
        """The dev loss and what `validate` found; what does not fit into memory is None, which is said."""
        assert self.dev, "only a run with a dev set looks at it"
        loss = None
        try:
            loss = self.learner.dev_loss(self.dev)
            if not math.isfinite(loss):
                console.warn("the dev loss is not a number; nothing is translated with these weights")
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            console.warn(NOT_ONE_FITS)
        if loss is None or not math.isfinite(loss) or not self.validate:
            return loss, None
        net = self.learner.to_translate_with()
        found = self.team.lead(lambda: tree_of(self._translated(net)))
        return loss, Validation(tuple(found["scores"]), tuple(found["samples"]))

    def _translated(self, net: Seq2Seq) -> Validation:
        assert self.validate, "it is only called where there is something to call"
        try:
            return self.validate(net, self.tokenizer, self.data, self.recipe)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
        console.warn(NOT_ONE_FITS)
        return Validation()

    def _expected(self, metric: str) -> str:
        progress = self.progress
        points = self.history.curve(VALIDATE, metric)
        settled = [point for point in points if point.step >= self.recipe.optim.warmup]
        return foresee(settled, metric, last=self.last_step, pace=progress.seconds / max(progress.step, 1))

    def _count_patience(self, value: float, *, lower_is_better: bool) -> None:
        best = self.progress.best
        better = best is None or (value < best if lower_is_better else value > best)
        if math.isnan(value):  # never an improvement, not even on nothing
            better = False
        if better:
            self.progress.best = value
        self.progress.stale = 0 if better else self.progress.stale + 1

    # Save

    def save(self) -> None:
        """Write a checkpoint; its scores come later."""
        progress = self.progress
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
            },
        )
        state = {
            "progress": vars(progress),
            "failed": self.spikes.failed,
            "data": self.data.fingerprint,
            "learner": self.learner.state(),
        }
        self._write(manifest, state)
        if not progress.look_due:
            self._prune()

    def _write(self, manifest: bundles.Manifest, state: Mapping[str, Any]) -> None:
        learner, step, tensors = self.learner, self.progress.step, self.learner.tensors()

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

    def _prune(self) -> None:
        """Let go of the checkpoints that are neither among the best nor among the last."""
        if not self.team.leads:
            return
        training = self.recipe.training
        checkpoints.prune(self.folder, best=training.keep_best, last=training.keep_last)

    def _longest(self) -> dict[str, int]:
        """The longest sentences met in training: beyond them the network has seen nothing."""
        return {"source": int(self.batches.by_source.max()), "target": int(self.batches.by_target.max())}

    # Stop

    def _stop(self, number: int) -> NoReturn:
        self.log("interrupted", signal=number)
        raise Interrupted(
            f"stopped by {signal.Signals(number).name} after step {self.progress.step:,}, which is saved; "
            "the same command goes on from there",
            number,
        )

    # Plan

    def describe(self) -> None:
        """What training would take: memory, time, disk."""
        plan(self.job())

    def job(self) -> Job:
        """What is to be done, for who says what it takes."""
        return Job(
            self.learner,
            self.batches,
            self.folder,
            self.recipe.training,
            steps_per_epoch=self.steps_per_epoch,
            last=self.last_step,
            done=self.progress.step,
        )
