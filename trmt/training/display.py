"""A training run as a person watches it: one picture on a terminal that is drawn anew, plain lines elsewhere.

With console.py the only file that knows Rich. Everything shown comes from the run's log entries, so a
resumed run shows its whole past. Samples are text of any script from a network that may say anything: they
are stripped of what steers a terminal, and every line is cut to the terminal's width by what its characters
take up there.
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
from rich.live import Live
from rich.text import Text

from trmt import clock, console
from trmt.training.history import LABELS, TRAIN, VALIDATE, History, best
from trmt.training.textplot import Segment, sparkline

REFRESH = 2.0  # pictures a second
NARROW = 80  # columns below which remarks are left out
BAR = 24
LABEL = 14  # columns
CURVE = 48
SAMPLE_LINES = 2  # of each translation
JOINERS = "\u200c\u200d"  # of Persian and Indic scripts; all other format characters are for the terminal
# Scripts that put no space between words are compared sign by sign.
WORDS = re.compile(
    r"\s+|[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]"
    r"|[^\s\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]+"
)


@dataclass(frozen=True)
class About:
    """What is known of a run before its first step."""

    name: str
    network: str
    steps_per_epoch: int
    last: int | None  # the step it ends at, if that is known
    done: int = 0  # steps taken at another time
    memory: int | None = None  # bytes that the device has


class Screen(Protocol):
    """What training tells whoever watches; its log entries come by way of the history."""

    def advance(self, amount: float = 1, note: str = "") -> None:
        """So many steps were taken."""

    def doing(self, what: str) -> None:
        """What takes its time besides steps; nothing when that is over."""

    def looked(self, samples: Sequence[Mapping[str, str]], outlook: str) -> None:
        """A validation is in the log; more training is expected to bring this."""


@contextmanager
def watching(about: About, history: History) -> Iterator[Screen]:
    """Show a run for as long as the block lasts."""
    if not console.is_terminal():
        with console.progress("training", about.last, unit="steps", done=about.done) as lines:
            yield Lines(lines)
        return
    picture = Picture(about, history)
    with (
        console.live_console() as terminal,
        _Steady(picture, console=terminal, refresh_per_second=REFRESH, redirect_stdout=False),
    ):
        # Rich hides the cursor while it draws; a process killed by force could never bring it back.
        terminal.show_cursor(True)
        yield picture


class _Steady(Live):
    """A live picture that survives a terminal that gets narrower."""

    width = 0

    def refresh(self) -> None:
        size = self.console.size
        if size.width < self.width:
            # The terminal has folded what was drawn, so nobody knows how many lines it takes to erase it:
            # it scrolls out of sight instead, and with it, unharmed, the messages above.
            self.console.file.write("\n" * size.height)
        self.width = size.width
        super().refresh()


class Lines:
    """A run in a log file: a line now and then."""

    def __init__(self, lines: console.ProgressBar | None = None) -> None:
        self.lines = lines

    def advance(self, amount: float = 1, note: str = "") -> None:
        if self.lines:
            self.lines.advance(amount, note)

    def doing(self, what: str) -> None:
        pass

    def looked(self, samples: Sequence[Mapping[str, str]], outlook: str) -> None:
        for sample in samples[:1]:
            console.say(f"  {harmless(sample['source'])}\n  -> {harmless(sample['translation'])}")
        if outlook:
            console.say(f"  {outlook}")


class Picture:
    """A run on a terminal, as it stands whenever it is drawn."""

    def __init__(self, about: About, history: History) -> None:
        self.about, self.history = about, history
        self.step = about.done
        self.began = clock.now()
        self.what = self.outlook = ""

    def advance(self, amount: float = 1, note: str = "") -> None:
        self.step += int(amount)

    def doing(self, what: str) -> None:
        self.what = what

    def looked(self, samples: Sequence[Mapping[str, str]], outlook: str) -> None:
        self.outlook = outlook

    def __rich_console__(self, terminal: Console, options: ConsoleOptions) -> RenderResult:
        size = terminal.size
        lines = self.lines(size.width, size.height, plain=options.ascii_only)
        yield Group(*lines)

    def lines(self, width: int, height: int, *, plain: bool = False) -> list[Text]:
        """At most `height` - 1 lines of less than `width` columns."""
        room, across = max(height - 1, 1), max(width - 1, 1)
        lines = [Text(), self._name(), self._way(across, plain=plain), *self._curves(across, plain=plain)]
        lines += self._state()
        lines += _wrapped(Text(self.outlook), across, SAMPLE_LINES) if self.outlook else []
        samples = _samples(self.history, across, room - len(lines))
        return [_cut(line, across) for line in (lines + samples)[:room]]

    def _name(self) -> Text:
        busy = f"  {self.what} ..." if self.what else ""
        return Text.assemble((harmless(self.about.name), "bold"), busy, "  ", (self.about.network, "dim"))

    def _way(self, width: int, *, plain: bool) -> Text:
        about, wide = self.about, width >= NARROW - 1
        passed, taken = clock.now() - self.began, self.step - about.done
        line = Text(f"step {self.step:,}")
        if about.last:
            part = min(self.step / about.last, 1.0)
            bar = BAR if wide else BAR // 2
            full = int(part * bar)
            done, left = ("#" * full, "-" * (bar - full)) if plain else ("━" * full, "─" * (bar - full))
            line = Text.assemble((done, "green"), (left, "dim"), f" {part:4.0%}  {line} of {about.last:,}")
            if taken > 0:
                seconds = passed * max(about.last - self.step, 0) / taken
                line.append(f"  {console.duration(seconds)} left", "bold")
        line.append(f"  epoch {self.step / max(about.steps_per_epoch, 1):.1f}")
        if wide:
            line.append(f"  {console.duration(passed)} gone", "dim")
        return line

    def _curves(self, width: int, *, plain: bool) -> list[Text]:
        wanted = [("train loss", TRAIN, "loss")]
        for name in sorted(self.history.metrics(), key=lambda name: name != "loss"):
            wanted.append((f"dev {LABELS.get(name, name)}", VALIDATE, name))
        wanted.append(("learning rate", TRAIN, "lr"))
        return [self._curve(*row, width=width, plain=plain) for row in wanted if self.history.curve(*row[1:])]

    def _curve(self, label: str, event: str, name: str, *, width: int, plain: bool) -> Text:
        points = self.history.curve(event, name)
        value = points[-1].value
        line = Text.assemble((f"{label:{LABEL}}", "dim"), (f"{_figure(name, value):>9}  ", "bold"))
        remark = ""
        if event == VALIDATE and width >= NARROW - 1:
            top = best(points, name)
            remark = f"  best {_figure(name, top.value)} at {top.step:,}" if top else ""
        # The remarks need a column of their own, so that curves end where they like.
        across = max(min(width - len(line) - (30 if width >= NARROW - 1 else 0), CURVE), 0)
        curve = sparkline([point.value for point in points], across, plain=plain)
        line.append(curve, "cyan" if event == TRAIN else "green")
        line.append(remark, "dim")
        return line

    def _state(self) -> list[Text]:
        last = self.history.last(TRAIN)
        facts = []
        if last and last.get("tokens_per_second") is not None:
            facts.append(f"{last['tokens_per_second']:,.0f} tokens/s")
        if last and last.get("memory"):
            of = f" of {gib(self.about.memory)}" if self.about.memory else ""
            facts.append(f"memory {gib(last['memory'])}{of} GiB")
        if last and last.get("waited") is not None:
            facts.append(f"data wait {last['waited']:.1%}")
        return [Text("  ".join(facts))] if facts else []


def gib(size: int) -> str:
    """Bytes in GiB: two digits where they are few."""
    return f"{size / 2**30:.2g}" if size < 10 * 2**30 else f"{size / 2**30:,.0f}"


def _figure(name: str, value: float) -> str:
    if name == "lr":
        return f"{value:.2e}"
    return f"{value:.4f}" if name == "loss" else f"{value:.2f}"


# Samples


def _samples(history: History, width: int, room: int) -> list[Text]:
    """Translations of the last validation beside those of the one before, as many as there is room for."""
    now, before = history.last(VALIDATE), history.last(VALIDATE, back=1)
    if not now:
        return []
    earlier = {sample["source"]: sample["translation"] for sample in (before or {}).get("samples", ())}
    lines: list[Text] = []
    for sample in now.get("samples", ()):
        block = [Text(), *_sample(sample, earlier.get(sample["source"]), now, before, width)]
        if len(lines) + len(block) > room:
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
    translation = harmless(sample["translation"])
    rows = [("source", Text(harmless(sample["source"]), "dim"))]
    if earlier is not None and before is not None:
        gone, new = changes(harmless(earlier), translation)
        rows.append((f"step {before['step']:,}", _marked(gone, "strike dim")))
        rows.append((f"step {now['step']:,}", _marked(new, "bold underline green")))
    else:
        rows.append((f"step {now['step']:,}", Text(translation)))
    rows.append(("reference", Text(harmless(sample["reference"]), "dim")))
    return [line for label, text in rows for line in _labelled(label, text, width)]


def _labelled(label: str, text: Text, width: int) -> list[Text]:
    """The text beside its label, in a few lines at most."""
    across = width - LABEL
    # Terminals disagree on how wide some scripts are: what they may draw wider gets room for that.
    if any(ord(character) > 0x2FF for character in text.plain):
        across -= across // 8
    lines = _wrapped(text, max(across, 8), SAMPLE_LINES)
    labels = [f"{label:{LABEL}}"] + [" " * LABEL] * (len(lines) - 1)
    return [Text.assemble((head, "dim"), line) for head, line in zip(labels, lines, strict=True)]


def _wrapped(text: Text, width: int, most: int) -> list[Text]:
    lines = list(text.wrap(console.stderr(), width, overflow="fold")) or [Text()]
    if len(lines) > most:
        lines = lines[:most]
        lines[-1].truncate(width - 1)
        lines[-1].append("…")
    return lines


def changes(before: str, now: str) -> tuple[list[tuple[str, bool]], list[tuple[str, bool]]]:
    """Both texts in pieces, each with whether the other text lacks it."""
    old, new = WORDS.findall(before), WORDS.findall(now)
    matcher = difflib.SequenceMatcher(a=old, b=new, autojunk=False)
    gone: list[tuple[str, bool]] = []
    come: list[tuple[str, bool]] = []
    for kind, a, b, c, d in matcher.get_opcodes():
        gone += [(word, kind != "equal" and not word.isspace()) for word in old[a:b]]
        come += [(word, kind != "equal" and not word.isspace()) for word in new[c:d]]
    return gone, come


def _marked(pieces: Sequence[tuple[str, bool]], style: str) -> Text:
    return Text.assemble(*((piece, style if changed else "") for piece, changed in pieces))


def harmless(text: str) -> str:
    """The text without what would steer a terminal: escapes, line ends, marks that turn the direction."""
    return "".join(map(_harmless, text))


def _harmless(character: str) -> str:
    kind = unicodedata.category(character)
    if kind in ("Cc", "Zl", "Zp"):
        return " "
    if kind == "Cf":
        return character if character in JOINERS else ""
    return "?" if kind == "Cs" else character


def _cut(line: Text, width: int) -> Text:
    if cell_len(line.plain) > width:
        line.truncate(width - 1)
        line.append("…")
    line.no_wrap = True
    line.end = "\n"
    return line


# Plots


def draw(rows: Sequence[Sequence[Segment]], colours: Sequence[str]) -> None:
    """Rows of a text plot on standard output, each line of the plot in its colour where there are colours."""
    out = Console(file=sys.stdout, highlight=False, markup=False, emoji=False, soft_wrap=True)
    for row in rows:
        pieces = ((text, "" if line is None else colours[line % len(colours)]) for text, line in row)
        out.print(Text.assemble(*pieces))
