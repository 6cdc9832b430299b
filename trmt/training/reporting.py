"""Reporting the progress of a run: to its log, to the curves of its history, and to the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trmt import console
from trmt.devices import memory
from trmt.training import display, overfitting
from trmt.training.budget import PlannedRun, describe_speed
from trmt.training.forecast import describe_forecast
from trmt.training.history import LABELS, LOG, TRAIN, VALIDATE, History, best
from trmt.training.run_log import RunLog, StepClock
from trmt.training.state import TrainState
from trmt.training.validation import ValidationResult


class Reporter:
    """Writes the log of a run and shows its progress; with several processes only on rank 0."""

    def __init__(self, folder: Path, state: TrainState) -> None:
        self.folder, self.state = folder, state
        self.run_log: RunLog | None = None
        self.history = History()
        self.display: display.TrainingDisplay = display.LineDisplay()

    def open(self, *, resumed: bool) -> None:
        """Open the log, which a resumed run continues."""
        if not self.state.distributed.is_main:
            return
        self.run_log = RunLog(self.folder / LOG, step=self.state.progress.step)
        if resumed and self.run_log.path.is_file():  # it may have been removed
            self.history = History.read(self.run_log.path)

    def close(self) -> None:
        """Close the files of the log."""
        if self.run_log:
            self.run_log.close()

    def log(self, event: str, *, step: int | None = None, **values: Any) -> None:
        """Write an event of this or of an earlier step."""
        if self.state.distributed.is_main:
            assert self.run_log, "open comes first"
            step = self.state.progress.step if step is None else step
            self.history.add(self.run_log.write(event, step, **values))

    def log_step(self, clock: StepClock, run: PlannedRun) -> None:
        """Report loss, learning rate and speed since the last call."""
        progress = self.state.progress
        loss = self.state.guard.pop_mean_loss()
        speed = clock.tokens_per_second(progress.target_tokens)
        clock.note = "no usable gradient" if loss is None else f"loss {loss:.3f}  {speed:,.0f} tokens/s"
        self.log(
            TRAIN,
            epoch=progress.epoch,
            loss=loss and round(loss, 5),
            lr=self.state.learning_rate(progress.step),
            tokens_per_second=round(speed, 1),
            waited=round(clock.wait_share, 5),
            memory=memory.peak(self.state.device),
            **self._tokens_and_time(),
        )
        if self.history.last(TRAIN, back=1) is None:
            console.log(describe_speed(run, seconds=progress.seconds / progress.step))

    def log_validation(
        self, result: ValidationResult, *, is_best: bool, seconds: float, last_step: int | None
    ) -> None:
        """Report scores and samples of a validation that took so many seconds."""
        progress = self.state.progress
        scores = ", ".join(f"{score['metric']} {score['value']:.4g}" for score in result.scores)
        best = "  (best)" if is_best else ""
        console.log(f"step {progress.step:,}: {scores or 'not validated'}{best}")
        self.log(
            VALIDATE,
            scores=result.scores,
            samples=result.samples,
            seconds=round(seconds, 2),
            **self._tokens_and_time(),
        )
        if self.state.distributed.is_main:
            self.display.show_validation(result.samples, self._forecast(last_step))
            self._name_overfitting()

    def _name_overfitting(self) -> None:
        """Warn of overfitting when it is new."""
        if found := overfitting.find(self.history):
            console.warn(overfitting.describe(found, self.state.recipe))
            self.log("overfitting", since=found.since, dev_loss=found.dev_loss, train_loss=found.train_loss)

    def finish(self, reason: str, next_command: str) -> None:
        """Report the end of the run: why, how long it took, the best score, and what to do next."""
        progress = self.state.progress
        self.log("end", seconds=round(progress.seconds, 1), reason=reason)
        if not self.state.distributed.is_main:
            return
        validating = sum(
            entry.get("seconds", 0.0) for entry in self.history.entries if entry["event"] == VALIDATE
        )
        validation = f" and {console.duration(validating)} of validation" if validating else ""
        console.say(
            f"done: {progress.step:,} steps in {console.duration(progress.seconds)}{validation}, "
            f"ended because {reason}"
        )
        console.say(f"{self._best_score()} -> {self.folder}\nnext: {next_command}")

    def _best_score(self) -> str:
        """The best score of the run in words, and its step."""
        metric = self.state.recipe.validation.metric
        found = best(self.history.curve(VALIDATE, metric), metric)
        if not found:
            return "no score on a dev set"
        digits = 3 if metric == "loss" else 2
        return f"best: dev {LABELS[metric]} {found.value:.{digits}f} at step {found.step:,}"

    def _tokens_and_time(self) -> dict[str, Any]:
        """The values of a log entry for curves over tokens or hours."""
        progress = self.state.progress
        return {"tokens": progress.target_tokens, "elapsed": round(progress.seconds, 3)}

    def _forecast(self, last_step: int | None) -> str:
        progress, recipe = self.state.progress, self.state.recipe
        metric = recipe.validation.metric
        points = self.history.curve(VALIDATE, metric)
        after_warmup = [point for point in points if point.step >= recipe.optim.warmup]
        seconds = progress.seconds / max(progress.step, 1)
        return describe_forecast(after_warmup, metric, last=last_step, seconds=seconds)
