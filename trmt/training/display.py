"""The display of a training run: a live view on a terminal, plain lines elsewhere.

Everything shown comes from the run's log entries, so a
resumed run shows its whole history. Sample translations are arbitrary text in any script: terminal control
characters are removed from them, and every line is cut to the width of the terminal by the width of its
characters.
"""

from __future__ import annotations

import difflib
import re
import sys
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.text import Text

from trmt import clock, console
from trmt.terminal import ResizableLive, bar, plain_console
from trmt.training.history import LABELS, TRAIN, VALIDATE, History, best
from trmt.training.textplot import Segment, sparkline

REFRESH = 2.0  # updates a second
NARROW = 80  # columns of a terminal below which details are left out
BAR = 24  # columns of the progress bar
LABEL = 14  # columns of labels
CURVE = 48  # columns of curves
SAMPLE_LINES = 2  # at most, of each text of a sample
JOINERS = "\u200c\u200d"  # of Persian and Indic scripts; other format characters can change the terminal
# Scripts without spaces between words are compared character by character.
WORDS = re.compile(
    r"\s+|[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]"
    r"|[^\s\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]+"
)


@dataclass(frozen=True)
class RunInfo:
    """What is known of a run before its first step."""

    name: str  # the run folder
    network: str  # architecture, size, device and precision
    steps_per_epoch: int
    last_step: int | None  # where it ends at the latest, if that is known
    may_end_early: bool = False  # when validations bring no gain
    steps_done: int = 0  # before this process was started
    memory: int | None = None  # of the device, in bytes


class TrainingDisplay(Protocol):
    """Shows the progress of training; the log entries to show come from the history."""

    def advance(self, amount: float = 1, note: str = "") -> None:
        """Count steps that were taken; a rollback counts negative ones."""

    def set_activity(self, activity: str) -> None:
        """What is going on besides steps; an empty string when it is over."""

    def show_validation(self, samples: Sequence[Mapping[str, str]], forecast: str) -> None:
        """A validation was logged; `forecast` says what more training is expected to gain."""


@contextmanager
def open_display(info: RunInfo, history: History) -> Iterator[TrainingDisplay]:
    """Show a run until the block ends."""
    if not console.is_terminal():
        done = info.steps_done
        with console.progress(
            "training", info.last_step, unit="steps", done=done, at_most=info.may_end_early
        ) as progress:
            yield LineDisplay(progress)
        return
    display = LiveDisplay(info, history)
    with (
        console.live_console() as terminal,
        ResizableLive(display, console=terminal, refresh_per_second=REFRESH, redirect_stdout=False),
    ):
        # Rich hides the cursor while it draws; a process that is killed would leave it hidden.
        terminal.show_cursor(True)
        yield display


class LineDisplay:
    """Plain lines, as in a log file."""

    def __init__(self, progress: console.ProgressBar | None = None) -> None:
        self.progress = progress

    def advance(self, amount: float = 1, note: str = "") -> None:
        if self.progress:
            self.progress.advance(amount, note)

    def set_activity(self, activity: str) -> None:
        pass

    def show_validation(self, samples: Sequence[Mapping[str, str]], forecast: str) -> None:
        for sample in samples[:1]:
            source, translation = (remove_controls(sample[key]) for key in ("source", "translation"))
            console.say(f"  {source}\n  -> {translation}")
        if forecast:
            console.say(f"  {forecast}")


class LiveDisplay:
    """A live view on a terminal, rendered from the current state whenever it is drawn."""

    def __init__(self, info: RunInfo, history: History) -> None:
        self.info, self.history = info, history
        self.step = info.steps_done
        self.began = clock.now()
        self.activity = self.forecast = ""

    def advance(self, amount: float = 1, note: str = "") -> None:
        self.step += int(amount)

    def set_activity(self, activity: str) -> None:
        self.activity = activity

    def show_validation(self, samples: Sequence[Mapping[str, str]], forecast: str) -> None:
        self.forecast = forecast

    def __rich_console__(self, terminal: Console, options: ConsoleOptions) -> RenderResult:
        size = terminal.size
        lines = self.lines(size.width, size.height, plain=options.ascii_only)
        yield Group(*lines)

    def lines(self, width: int, height: int, *, plain: bool = False) -> list[Text]:
        """At most `height` - 1 lines of less than `width` columns."""
        rows, columns = max(height - 1, 1), max(width - 1, 1)
        lines = [Text(), *self._title(columns), self._progress(columns, plain=plain)]
        lines += [*self._curves(columns, plain=plain), *self._speed_and_memory(columns)]
        lines += _wrapped(Text(self.forecast), columns, SAMPLE_LINES) if self.forecast else []
        samples = _samples(self.history, columns, rows - len(lines))
        return [_cut(line, columns) for line in (lines + samples)[:rows]]

    def _title(self, width: int) -> list[Text]:
        """The run, what it is doing, and its network, in two lines if one is too short."""
        activity = f"  {self.activity} ..." if self.activity else ""
        run = Text.assemble((remove_controls(self.info.name), "bold"), activity)
        network = Text(self.info.network, "dim")
        if cell_len(run.plain) + 2 + cell_len(network.plain) <= width:
            return [Text.assemble(run, "  ", network)]
        return [*_wrapped(run, width, SAMPLE_LINES), *_wrapped(network, width, SAMPLE_LINES)]

    def _progress(self, width: int, *, plain: bool) -> Text:
        """The step, and of the bar and the times what fits."""
        last = self.info.last_step
        elapsed, taken = clock.now() - self.began, self.step - self.info.steps_done
        share = min(self.step / last, 1.0) if last else 0.0
        left = elapsed * max((last or 0) - self.step, 0) / taken if taken > 0 else 0.0
        most = "at most " if self.info.may_end_early else ""
        optional = {  # the most important first
            "left": Text(f"{most}{console.duration(left)} left" if last and taken > 0 else "", "bold"),
            "epoch": Text(f"epoch {self.step / max(self.info.steps_per_epoch, 1):.1f}"),
            "share": Text(f"{share:4.0%}" if last else ""),
            "bar": bar(share, BAR if width >= NARROW - 1 else BAR // 2, plain=plain) if last else Text(),
            "elapsed": Text(f"{console.duration(elapsed)} elapsed", "dim"),
        }
        shown = {"step": Text(f"step {self.step:,}" + (f" of {last:,}" if last else ""))}
        for name, text in optional.items():
            if text and sum(len(each) + 2 for each in shown.values()) + len(text) <= width:
                shown[name] = text
        order = ("bar", "share", "step", "left", "epoch", "elapsed")
        return Text("  ").join(shown[name] for name in order if name in shown)

    def _curves(self, width: int, *, plain: bool) -> list[Text]:
        rows = [("train loss", TRAIN, "loss")]
        for name in sorted(self.history.metrics(), key=lambda name: name != "loss"):
            rows.append((f"dev {LABELS.get(name, name)}", VALIDATE, name))
        rows.append(("learning rate", TRAIN, "lr"))
        return [self._curve(*row, width=width, plain=plain) for row in rows if self.history.curve(*row[1:])]

    def _curve(self, label: str, event: str, name: str, *, width: int, plain: bool) -> Text:
        points = self.history.curve(event, name)
        value = points[-1].value
        line = Text.assemble((f"{label:{LABEL}}", "dim"), (f"{_number(name, value):>9}  ", "bold"))
        remark = ""
        if event == VALIDATE and width >= NARROW - 1:
            top = best(points, name)
            remark = f"  best {_number(name, top.value)} at {top.step:,}" if top else ""
        columns = max(min(width - len(line) - (30 if width >= NARROW - 1 else 0), CURVE), 0)
        curve = sparkline([point.value for point in points], columns, plain=plain)
        line.append(curve, "cyan" if event == TRAIN else "green")
        line.append(remark, "dim")
        return line

    def _speed_and_memory(self, width: int) -> list[Text]:
        last = self.history.last(TRAIN)
        facts = []
        if last and last.get("tokens_per_second") is not None:
            facts.append(f"{last['tokens_per_second']:,.0f} tokens/s")
        if last and last.get("memory"):
            of = f" of {gib(self.info.memory)}" if self.info.memory else ""
            facts.append(f"memory {gib(last['memory'])}{of} GiB")
        if last and last.get("waited") is not None:
            facts.append(f"data wait {last['waited']:.1%}")
        return _wrapped(Text("  ".join(facts)), width, SAMPLE_LINES) if facts else []


def gib(size: int) -> str:
    """A number of bytes in GiB, with two digits below 10."""
    return f"{size / 2**30:.2g}" if size < 10 * 2**30 else f"{size / 2**30:,.0f}"


def _number(name: str, value: float) -> str:
    if name == "lr":
        return f"{value:.2e}"
    return f"{value:.4f}" if name == "loss" else f"{value:.2f}"


# Samples


def _samples(history: History, width: int, max_lines: int) -> list[Text]:
    """Translations of the last validation next to those of the one before, as many as fit."""
    now, before = history.last(VALIDATE), history.last(VALIDATE, back=1)
    if not now:
        return []
    earlier = {sample["source"]: sample["translation"] for sample in (before or {}).get("samples", ())}
    lines: list[Text] = []
    for sample in now.get("samples", ()):
        block = [Text(), *_sample(sample, earlier.get(sample["source"]), now, before, width)]
        if len(lines) + len(block) > max_lines:
            break
        lines += block
    return lines


def _sample(
    sample: Mapping[str, str],
    earlier: str | None,
    now: Mapping[str, Any],
    before: Mapping[str, Any] | None,
    width: int,
) -> list[Text]:
    translation = remove_controls(sample["translation"])
    rows = [("source", Text(remove_controls(sample["source"]), "dim"))]
    if earlier is not None and before is not None:
        old_words, new_words = word_diff(remove_controls(earlier), translation)
        rows.append((f"step {before['step']:,}", _highlighted(old_words, "strike dim")))
        rows.append((f"step {now['step']:,}", _highlighted(new_words, "bold underline green")))
    else:
        rows.append((f"step {now['step']:,}", Text(translation)))
    rows.append(("reference", Text(remove_controls(sample["reference"]), "dim")))
    return [line for label, text in rows for line in _labelled(label, text, width)]


def _labelled(label: str, text: Text, width: int) -> list[Text]:
    """The text next to its label, in a few lines at most."""
    columns = width - LABEL
    # Terminals disagree on the width of some scripts: leave space where they may draw them wider.
    if any(ord(character) > 0x2FF for character in text.plain):
        columns -= columns // 8
    lines = _wrapped(text, max(columns, 8), SAMPLE_LINES)
    labels = [f"{label:{LABEL}}"] + [" " * LABEL] * (len(lines) - 1)
    return [Text.assemble((head, "dim"), line) for head, line in zip(labels, lines, strict=True)]


def _wrapped(text: Text, width: int, max_lines: int) -> list[Text]:
    lines = list(text.wrap(console.stderr(), width, overflow="fold")) or [Text()]
    if len(lines) > max_lines:
        lines = lines[:max_lines]
        lines[-1].truncate(width - 1)
        lines[-1].append("…")
    return lines


def word_diff(before: str, now: str) -> tuple[list[tuple[str, bool]], list[tuple[str, bool]]]:
    """The words of both texts, each with whether it differs from the other text."""
    old, new = WORDS.findall(before), WORDS.findall(now)
    matcher = difflib.SequenceMatcher(a=old, b=new, autojunk=False)
    old_words: list[tuple[str, bool]] = []
    new_words: list[tuple[str, bool]] = []
    for operation, a, b, c, d in matcher.get_opcodes():
        old_words += [(word, operation != "equal" and not word.isspace()) for word in old[a:b]]
        new_words += [(word, operation != "equal" and not word.isspace()) for word in new[c:d]]
    return old_words, new_words


def _highlighted(words: Sequence[tuple[str, bool]], style: str) -> Text:
    return Text.assemble(*((word, style if changed else "") for word, changed in words))


def remove_controls(text: str) -> str:
    """The text without escapes, line ends and direction marks, which would disturb a terminal."""
    return "".join(map(_printable, text))


def _printable(character: str) -> str:
    category = unicodedata.category(character)
    if category in ("Cc", "Zl", "Zp"):
        return " "
    if category == "Cf":
        return character if character in JOINERS else ""
    return "?" if category == "Cs" else character


def _cut(line: Text, width: int) -> Text:
    if cell_len(line.plain) > width:
        line.truncate(width - 1)
        line.append("…")
    line.no_wrap = True
    line.end = "\n"
    return line


# Plots


def draw(rows: Sequence[Sequence[Segment]], colours: Sequence[str]) -> None:
    """Print a text plot on standard output; each curve has its colour on a terminal that has colours."""
    out = plain_console(file=sys.stdout)
    for row in rows:
        pieces = ((text, "" if line is None else colours[line % len(colours)]) for text, line in row)
        out.print(Text.assemble(*pieces))
