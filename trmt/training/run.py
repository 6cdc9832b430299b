"""Training: from a prepared set and a recipe to a run folder; run again, it goes on exactly where it stood.

Exactness comes from keeping nothing in motion: the order of the data is a function of (seed, epoch,
position), dropout is drawn from a generator seeded anew for each batch, and everything else is in the
checkpoint. Validation and saving therefore cannot disturb the run.
"""

from __future__ import annotations

import hashlib
import signal
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn, Self

import torch

from trmt import console
from trmt.bundles import bundles, checkpoints, init_from
from trmt.bundles.checkpoints import CONFIG, MODELS
from trmt.config import build, to_toml, tree_of
from trmt.devices import memory
from trmt.devices.memory import is_out_of_memory
from trmt.errors import ConfigError, TrmtError
from trmt.objectives.base import Specials
from trmt.registry import NETWORKS, OBJECTIVES, resolve
from trmt.sets import unchanged
from trmt.sets.batches import Examples, Position
from trmt.sets.resampling import resample_with
from trmt.sets.shards import DOCUMENTS, PAIRS, PreparedSet
from trmt.storage.files import atomic_file, only_one, write_json
from trmt.text.tokenizer import Tokenizer
from trmt.training import display, word_vectors
from trmt.training.budget import Job, about, glance, pace, plan
from trmt.training.checkpointer import Keeper, Progress
from trmt.training.distributed import Team, assembled
from trmt.training.history import LOG, TRAIN, VALIDATE, History
from trmt.training.learner import Learner
from trmt.training.logbook import Clock, Logbook
from trmt.training.micro_batches import ShortMemory
from trmt.training.outlook import foresee
from trmt.training.planning import (
    ORIGIN,
    TrainOptions,
    check_same_run,
    default_data,
    origin_of,
    remembered,
    resolved_recipe,
)
from trmt.training.recipe import Recipe, safe_name
from trmt.training.spikes import GoBack, Spikes
from trmt.training.stopping import Interrupted, Signals, StoppedHere
from trmt.training.validation import DevSet, Validate

VERDICTS_AT_ONCE = 100  # steps after which the host asks what became of them, at the latest


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
        run.keeper.remember_shortage()
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
        self.options = options
        in_row = bool(resolve(NETWORKS, recipe.architecture, trust_code=True).packs_tokens)
        objective = resolve(OBJECTIVES, recipe.objective, trust_code=True)
        read = objective.batches(build(objective.config_class, recipe.loss, where="loss"))
        self.batches = read(data, recipe.batches, seed=recipe.training.seed, in_row=in_row)
        # Epochs differ by a batch or so; the first one's length stands for all.
        self.steps_per_epoch = len(self.batches.plan(0))
        specials = Specials.of(tokenizer.target)
        self.learner = Learner(recipe, steps=self.last_step or 0, team=team, specials=specials)
        self.positions = self.learner.net.max_positions
        if alpha := recipe.batches.subword_alpha:
            self.batches.resample = resample_with(tokenizer, alpha, self.positions - 1)
        if room := self.batches.room:
            self.learner.room = replace(room, longest=min(room.longest, self.positions))
        self.dev: DevSet | None = None
        if "dev" in data.splits:
            dev = read(data, recipe.batches, seed=0, split="dev")
            self.dev = DevSet(dev, self.learner, recipe, tokenizer, validate)
        self.logbook: Logbook | None = None
        self.history = History()
        self.screen: display.Screen = display.Lines()
        self.progress = Progress()
        self.signals = Signals(team)
        half = self.learner.precision == "fp16"
        self.spikes = Spikes(folder, policy=recipe.training.on_spike, half=half, log=self.log, team=team)
        self.keeper = Keeper(folder, recipe, tokenizer, self.learner, self.batches, self.spikes)
        self._check()

    @classmethod
    def planned(cls, options: TrainOptions, validate: Validate | None, team: Team | None = None) -> Self:
        """The run that these options describe, about to begin."""
        options = remembered(options)
        data = PreparedSet.open(options.data or default_data(kind=DOCUMENTS if options.pretrain else PAIRS))
        tokenizer = Tokenizer.load(data.tokenizer_folder)
        recipe, name = resolved_recipe(options, data, tokenizer, translates=validate is not None)
        folder = options.run or MODELS / safe_name(f"{data.folder.resolve().name}-{name}")
        check_same_run(folder, recipe, origin_of(options, data))
        return cls(folder, recipe, data, tokenizer, validate=validate, options=options, team=team)

    def _check(self) -> None:
        """What cannot work is said before the first step."""
        for batches in (self.batches, *([self.dev.batches] if self.dev else [])):
            if batches.lengths.max() > self.positions:
                shorter = (
                    "prepare the data with a lower --max-length"
                    if self.data.kind == PAIRS
                    else "lower batches.passage"
                )
                raise ConfigError(
                    f"{self.data.folder} has sentences of {batches.lengths.max()} tokens, the network "
                    f"positions for {self.positions}; raise network.max_positions, or {shorter}"
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
        state = self.team.first(self.keeper.newest)
        if state:
            self.progress = self.keeper.take_up(*state)
            console.say(f"resuming {self.folder} at step {self.progress.step:,}")
        elif self.options.init_from:
            named, encoder = init_from.split(self.options.init_from)
            place = checkpoints.find_bundle(named)
            weights = bundles.read_weights(place, bundles.read_manifest(place))
            self.learner.start_from(weights, where=str(place), encoder=encoder)
            console.say(f"starting from the {'encoder' if encoder else 'weights'} of {place}")
        learner = self.learner
        if not state:
            word_vectors.begin_with(learner.net, self.recipe.vectors, self.tokenizer, self.data)
            learner.restart_mean()
        learner.start_alike()
        self.keeper.recall_shortage()
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
                    self.progress = self.keeper.take_up(*back.point.state())
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
                    self.keeper.save(progress)
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
            memory=memory.peak(self.learner.device),
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
        assert self.dev, "only a run with a dev set looks at it"
        began, progress = time.monotonic(), self.progress
        try:
            with self.signals.harmless(), self.learner.at_rest():
                seen = self.dev.look()
        except StoppedHere:
            assert self.signals.number is not None, "only a signal raises it"
            self._stop(self.signals.number)
        metric = self.recipe.validation.metric
        if seen.judged:
            progress.judge(float(seen.scores[0]["value"]), lower_is_better=metric == "loss")
        shown = ", ".join(f"{score['metric']} {score['value']:.4g}" for score in seen.scores)
        better = "  (best)" if seen.judged and progress.stale == 0 else ""
        console.say(f"step {progress.step:,}: {shown or 'not validated'}{better}")
        took = round(time.monotonic() - began, 2)
        self.log("validate", scores=seen.scores, samples=seen.samples, seconds=took, **self._place())
        if self.team.leads:
            self.screen.looked(seen.samples, self._expected(metric))
        progress.look_due = False
        self.keeper.add(progress, seen)

    def _expected(self, metric: str) -> str:
        progress = self.progress
        points = self.history.curve(VALIDATE, metric)
        settled = [point for point in points if point.step >= self.recipe.optim.warmup]
        return foresee(settled, metric, last=self.last_step, pace=progress.seconds / max(progress.step, 1))

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
