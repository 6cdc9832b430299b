"""Training: from a prepared set and a recipe to a run folder; run again, it goes on exactly where it stood.

Exactness comes from keeping nothing in motion: the order of the data is a function of (seed, epoch,
position), dropout is drawn from a generator seeded anew for each batch, and everything else is in the
checkpoint. Validation and saving therefore cannot disturb the run.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
from torch import Tensor

from trmt import bundles, checkpoints, console
from trmt.arch.base import Seq2Seq
from trmt.batches import Batches, Column, Examples, Position
from trmt.checkpoints import CONFIG, LOG, MODELS
from trmt.config import to_toml, tree_of
from trmt.errors import ConfigError, DataError, TrmtError
from trmt.files import atomic_file, only_one, sweep, write_json
from trmt.learner import Learner, is_out_of_memory
from trmt.logbook import Clock, Logbook
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
from trmt.tokenizer import Tokenizer


class Interrupted(TrmtError):
    """A signal asked the run to stop; everything is saved."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + number


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


def train(options: TrainOptions, validate: Validate | None = None) -> Path:
    """Train, or go on training, and return the run folder.

    `validate` translates and scores the dev set; without it only the loss is looked at.
    """
    options = remembered(options)
    data = PreparedSet.open(options.data or default_data())
    tokenizer = Tokenizer.load(data.tokenizer_folder)
    recipe, name = resolved_recipe(options, data, tokenizer, translates=validate is not None)
    run_folder = options.run or MODELS / safe_name(f"{data.folder.resolve().name}-{name}")
    check_same_run(run_folder, recipe, origin_of(options, data))
    run = Run(run_folder, recipe, data, tokenizer, validate=validate, options=options)
    if options.dry_run:
        run.describe()
        return run_folder
    try:
        with only_one(run_folder):
            run.begin()
            run.loop()
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise TrmtError(
            f"there is not enough memory for this network on {run.learner.device}; use a smaller one or "
            "lower batches.tokens in a new run folder, or another device in this one"
        ) from error
    finally:
        run.close()
    return run_folder


def resample_with(tokenizer: Tokenizer, alpha: float, longest: int) -> Callable[[str, Column, int], Column]:
    """Subword sampling as a transform of batches; a draw of more than `longest` pieces is not taken."""

    def resample(name: str, column: Column, seed: int) -> Column:
        side = tokenizer.source if name.startswith("source") else tokenizer.target
        sentences = np.split(column.ids, np.cumsum(column.lengths)[:-1])
        before = [sentence.tolist() for sentence in sentences]
        drawn = [
            after if len(after) <= longest else sentence
            for sentence, after in zip(before, side.sample(before, alpha=alpha, seed=seed), strict=True)
        ]
        lengths = np.array([len(sentence) for sentence in drawn], dtype=np.int64)
        ids = np.array([token for sentence in drawn for token in sentence], dtype=np.int64)
        return Column(ids, lengths)

    return resample


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
    ) -> None:
        self.folder, self.recipe, self.data, self.tokenizer = folder, recipe, data, tokenizer
        self.validate, self.options = validate, options
        in_row = bool(resolve(ARCHITECTURES, recipe.architecture, trust_code=True).in_row)
        self.batches = Batches(data, recipe.batches, seed=recipe.training.seed, in_row=in_row)
        self.dev = Batches(data, recipe.batches, seed=0, split="dev") if "dev" in data.splits else None
        # Epochs differ by a batch or so; the first one's length stands for all.
        self.steps_per_epoch = len(self.batches.plan(0))
        self.learner = Learner(recipe, steps=self.last_step or 0)
        self.positions = int(getattr(self.learner.net.config, "longest", 1 << 30))
        if alpha := recipe.batches.subword_alpha:
            self.batches.resample = resample_with(tokenizer, alpha, self.positions - 1)
        self.logbook: Logbook | None = None
        self.progress = Progress()
        self.signal: int | None = None
        self._log_sums = (0.0, 0)  # negative log likelihood and tokens since the last log line
        self._check()

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
        sweep(self.folder)
        state = checkpoints.newest_state(self.folder)
        if state:
            self._restore(*state)
            console.say(f"resuming {self.folder} at step {self.progress.step:,}")
        elif self.options.init_from:
            place = checkpoints.find_bundle(self.options.init_from)
            weights = bundles.read_weights(place, bundles.read_manifest(place))
            self.learner.start_from(weights, where=str(place))
            console.say(f"starting from the weights of {place}")
        self.logbook = Logbook(self.folder / LOG, step=self.progress.step)
        with atomic_file(self.folder / CONFIG) as stream:
            stream.write(to_toml(tree_of(self.recipe)).encode())
        if not state:
            write_json(self.folder / ORIGIN, tree_of(origin_of(self.options, self.data)))
        learner = self.learner
        self.log(
            "resume" if state else "begin",
            data=str(self.data.folder),
            fingerprint=self.data.fingerprint,
            parameters=learner.parameters,
            **learner.machine(),
        )
        console.say(
            f"{self.recipe.architecture}, {learner.parameters / 1e6:.1f}M parameters, "
            f"{learner.device.type} {learner.precision}, {len(self.batches.split):,} pairs, "
            f"{self.steps_per_epoch:,} steps an epoch -> {self.folder}"
        )

    def _restore(self, plain: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        if plain["data"] != self.data.fingerprint:
            raise DataError(
                f"{self.data.folder} is not the data that {self.folder} was trained on; prepare it as "
                "before, or name another run folder to start a new run"
            )
        self.learner.restore(plain["learner"], tensors)
        self.progress = Progress(**plain["progress"])

    # Step

    def loop(self) -> None:
        """Train to the end of the recipe, to the end of patience, or until a signal."""
        recipe, progress, last = self.recipe, self.progress, self.last_step
        if self.finished():
            limit = "training.steps" if last is not None and progress.step >= last else "training.patience"
            console.say(f"{self.folder} has ended at step {progress.step:,}; raise {limit} to go on")
            return
        stream = self.batches.steps(Position(progress.epoch, progress.position))
        mark = Clock(progress.target_tokens)
        with _signals(self), console.progress("training", last, unit="steps", done=progress.step) as bar:
            try:
                while not self.finished():
                    after, examples = next(stream)
                    self._learn(examples)
                    progress.epoch, progress.position = after
                    progress.seconds += mark.lap()
                    if progress.step % recipe.training.log_every == 0:
                        self._report(mark)
                    bar.advance(1, mark.note)
                    validating = progress.step % recipe.validation.every == 0 or self.finished()
                    saving = validating or bool(
                        recipe.training.save_every and progress.step % recipe.training.save_every == 0
                    )
                    if self.signal is not None and not validating:
                        self.save(Validation())
                        self._stop(self.signal)
                    if saving:
                        self.save(self.look() if validating else Validation())
                        mark.skip()
                    if self.signal is not None:
                        self._stop(self.signal)
            finally:
                stream.close()  # type: ignore[attr-defined]
        self.log("end", seconds=round(progress.seconds, 1))
        console.say(f"done: {progress.step:,} steps in {console.duration(progress.seconds)} -> {self.folder}")

    def _learn(self, examples: list[Examples]) -> None:
        learned = self.learner.learn(examples, self.progress.step)
        self.progress.step += 1
        self.progress.target_tokens += learned.tokens
        if learned.usable:
            self._log_sums = (self._log_sums[0] + learned.nll, self._log_sums[1] + learned.tokens)
        elif not self.learner.scaler.is_enabled():
            self.log("bad gradient")
            console.warn(f"step {self.progress.step:,}: the gradient is not finite; the step is left out")

    def finished(self) -> bool:
        """Whether steps, epochs or patience are used up."""
        patience = self.recipe.training.patience
        last = self.last_step
        out_of_patience = bool(patience) and self.progress.stale >= patience
        return out_of_patience or (last is not None and self.progress.step >= last)

    # Log

    def log(self, event: str, **values: Any) -> None:
        """One line in the run's log."""
        assert self.logbook, "a run begins before it logs"
        self.logbook.write(event, self.progress.step, **values)

    def close(self) -> None:
        """Let go of the log's files."""
        if self.logbook:
            self.logbook.close()

    def _report(self, mark: Clock) -> None:
        nll, tokens = float(self._log_sums[0]), self._log_sums[1]
        self._log_sums = (0.0, 0)
        speed = mark.speed(self.progress.target_tokens)
        loss = nll / tokens if tokens else None
        mark.note = f"loss {loss:.3f}  {speed:,.0f} tokens/s" if tokens else "no usable gradient"
        self.log(
            "train",
            epoch=self.progress.epoch,
            loss=loss and round(loss, 5),
            lr=self.learner.rate(self.progress.step),
            tokens_per_second=round(speed, 1),
        )

    # Validate

    def look(self) -> Validation:
        """The dev set through the eyes of the weights that are kept."""
        if not self.dev:
            return Validation()
        began = time.monotonic()
        with self.learner.at_rest():
            loss = self.learner.dev_loss(self.dev)
            net, found = self.learner.net, None
            if not math.isfinite(loss):
                console.warn("the dev loss is not a number; nothing is translated with these weights")
            elif self.validate:
                found = self.validate(net, self.tokenizer, self.data, self.recipe)
        scores: list[dict[str, Any]] = [
            {"metric": "loss", "value": loss, "signature": "nats per target token, dev set"}
        ]
        if found:
            scores += found.scores
        metric = self.recipe.validation.metric
        scores.sort(key=lambda score: score["metric"] != metric)
        self._count_patience(float(scores[0]["value"]), lower_is_better=metric == "loss")
        shown = ", ".join(f"{score['metric']} {score['value']:.4g}" for score in scores)
        better = "  (best)" if self.progress.stale == 0 else ""
        console.say(f"step {self.progress.step:,}: {shown}{better}")
        samples = found.samples if found else ()
        for sample in samples[:1]:
            console.say(f"  {sample['source']}\n  -> {sample['translation']}")
        self.log("validate", scores=scores, samples=samples, seconds=round(time.monotonic() - began, 2))
        return Validation(tuple(scores), samples)

    def _count_patience(self, value: float, *, lower_is_better: bool) -> None:
        best = self.progress.best
        better = best is None or (value < best if lower_is_better else value > best)
        if math.isnan(value):  # never an improvement, not even on nothing
            better = False
        if better:
            self.progress.best = value
        self.progress.stale = 0 if better else self.progress.stale + 1

    # Save

    def save(self, validation: Validation) -> None:
        """Write a checkpoint, and let go of those that are neither among the best nor among the last."""
        progress, training = self.progress, self.recipe.training
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
            scores=validation.scores,
            golden=validation.samples,
        )
        state = {
            "progress": vars(progress),
            "data": self.data.fingerprint,
            "learner": self.learner.state(),
        }
        checkpoints.save(
            self.folder,
            manifest,
            self.learner.weights(),
            self.tokenizer,
            step=progress.step,
            state=(state, self.learner.tensors()),
        )
        checkpoints.prune(self.folder, best=training.keep_best, last=training.keep_last)

    def _longest(self) -> dict[str, int]:
        """The longest sentences met in training: beyond them the network has seen nothing."""
        return {"source": int(self.batches.by_source.max()), "target": int(self.batches.by_target.max())}

    # Stop

    def _stop(self, number: int) -> None:
        self.log("interrupted", signal=number)
        raise Interrupted(
            f"stopped by {signal.Signals(number).name} after step {self.progress.step:,}, which is saved; "
            "the same command goes on from there",
            number,
        )

    # Plan

    def describe(self) -> None:
        """What training would take: parameters, memory, steps."""
        learner = self.learner
        copies = 4 + bool(learner.mean)  # weights, gradients, two moments, the running mean
        activations = learner.activation_bytes(self.batches)
        last = f"{self.last_step:,}" if self.last_step else "until patience ends it"
        rows = [
            ["parameters", f"{learner.parameters:,}"],
            ["weights, gradients, optimiser", f"{learner.parameters * 4 * copies / 2**20:,.0f} MiB"],
            ["activations of the largest batch", f"{activations / 2**20:,.0f} MiB"],
            ["steps per epoch", f"{self.steps_per_epoch:,}"],
            ["steps in all", last],
            ["pairs", f"{len(self.batches.split):,}"],
            ["target tokens per epoch", f"{int((self.batches.by_target + 1).sum()):,}"],
            ["device and precision", f"{learner.device} {learner.precision}"],
        ]
        console.table(f"plan for {self.folder}", ["what", "how much"], rows)


@contextmanager
def _signals(run: Run) -> Iterator[None]:
    """Let the first Ctrl-C or SIGTERM end the run after its step; the second one acts at once."""

    def note(number: int, frame: FrameType | None) -> None:
        run.signal = number
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        # Whoever is interrupted may be writing to the same stream, which refuses to be entered twice.
        with suppress(RuntimeError):
            console.say(
                "stopping after this step; once more stops at once and loses the steps since the last save"
            )

    before = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, note)
    except ValueError:  # not the main thread: signals are somebody else's
        pass
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
