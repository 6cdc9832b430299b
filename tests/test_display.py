from __future__ import annotations

import contextlib
import io
import itertools
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len

from tests import texts, toy
from trmt import console
from trmt.training import display
from trmt.training.display import About, Picture, changes, harmless
from trmt.training.history import History

ABOUT = About(
    name="models/run", network="transformer, 1.9M parameters", steps_per_epoch=50, last=400, memory=2**35
)
SAMPLE = {
    "source": "Two dogs play.",
    "translation": "Zwei Hunde spielen.",
    "reference": "Zwei Hunde spielen.",
}


def history(*, samples: list[list[dict[str, str]]], steps: int = 200) -> History:
    made = History()
    for step in range(10, steps + 1, 10):
        made.add(
            {
                "event": "train", "step": step, "loss": 5 + 40 / step, "lr": 1e-4 * step,
                "tokens_per_second": 12_345.6, "memory": 3 * 2**30, "waited": 0.0125,
            }
        )  # fmt: skip
        number = len(samples) - 1 - (steps - step) // 10
        if number < 0:
            continue
        found = samples[number]
        scores = [{"metric": "chrf", "value": 20.0 + number}, {"metric": "loss", "value": 4.0 - number / 10}]
        made.add({"event": "validate", "step": step, "scores": scores, "samples": found})
    return made


def picture(made: History, about: About = ABOUT) -> Picture:
    shown = Picture(about, made)
    shown.advance(100)
    shown.looked([], "100 more steps (3 min 20 s) should bring about +0.4 dev chrF (80 %: +0.1 to +0.9)")
    return shown


def lines(shown: Picture, width: int = 100, height: int = 40, **more: Any) -> list[str]:
    return [line.plain for line in shown.lines(width, height, **more)]


def test_it_shows_where_a_run_stands() -> None:
    shown = "\n".join(lines(picture(history(samples=[[SAMPLE], [SAMPLE]]))))
    for part in (
        "models/run", "step 100 of 400", " 25%", "left", "epoch 2.0",
        "train loss       5.2000", "dev loss         3.9000",
        "dev chrF          21.00", "best 21.00 at 200", "2.00e-02", "12,346 tokens/s", "memory 3 of 32 GiB",
        "data wait 1.2%", "+0.4 dev chrF (80 %: +0.1 to +0.9)", "Two dogs play.", "step 190", "reference",
    ):  # fmt: skip
        assert part in shown, f"{part}\n{shown}"
    assert "▁" in shown and "█" in shown


def test_a_run_without_an_end_or_a_past_is_shown_too() -> None:
    about = About(name="run", network="rnn", steps_per_epoch=50, last=None)
    shown = "\n".join(lines(Picture(about, History())))
    assert "step 0" in shown and "epoch 0.0" in shown
    assert "left" not in shown


@pytest.mark.parametrize("width", [20, 40, 60, 80, 100, 200])
@pytest.mark.parametrize("height", [3, 10, 24, 60])
@pytest.mark.parametrize("language", list(texts.ALL))
def test_no_script_breaks_the_picture(width: int, height: int, language: str) -> None:
    found = [{"source": text, "translation": text * 3, "reference": text} for text in texts.ALL[language][:3]]
    before = [{**sample, "translation": sample["translation"][::-1]} for sample in found]
    shown = picture(history(samples=[before, found])).lines(width, height)
    assert len(shown) < height
    assert max(cell_len(line.plain) for line in shown) < width
    assert not any(character in line.plain for line in shown for character in "\n\r\t\x1b\u202e\u2066")


def test_as_many_samples_as_there_is_room_for() -> None:
    three = [{**SAMPLE, "source": f"Sentence {number}."} for number in range(3)]
    shown = picture(history(samples=[three, three]))
    counts = [sum("Sentence" in line for line in lines(shown, height=height)) for height in range(10, 40)]
    assert counts == sorted(counts)
    assert counts[0] == 0 and set(counts) == {0, 1, 2, 3}


def test_words_that_changed_are_marked_on_both_sides() -> None:
    before = [{**SAMPLE, "translation": "Zwei Katzen spielen."}]
    shown = picture(history(samples=[before, [SAMPLE]])).lines(100, 40)
    [old] = [line for line in shown if "Katzen" in line.plain]
    [new] = [line for line in shown if line.plain.startswith("step 200")]
    assert [
        (old.plain[span.start : span.end], str(span.style))
        for span in old.spans
        if "strike" in str(span.style)
    ] == [("Katzen", "strike dim")]
    assert [new.plain[span.start : span.end] for span in new.spans if "underline" in str(span.style)] == [
        "Hunde"
    ]


def test_changes_are_words_or_signs() -> None:
    gone, new = changes("ich bin hier", "ich war gestern hier")
    assert [piece for piece, changed in gone if changed] == ["bin"]
    assert [piece for piece, changed in new if changed] == ["war", "gestern"]
    gone, new = changes("我在这里", "我在那里")
    assert [piece for piece, changed in gone if changed] == ["这"]
    assert [piece for piece, changed in new if changed] == ["那"]


@pytest.mark.parametrize("language", list(texts.ALL))
def test_the_pieces_are_the_text(language: str) -> None:
    some = [harmless(text) for text in texts.ALL[language]]
    for before, now in itertools.pairwise(some):
        gone, new = changes(before, now)
        assert "".join(piece for piece, _ in gone) == before
        assert "".join(piece for piece, _ in new) == now


def test_nothing_that_steers_a_terminal_gets_through() -> None:
    assert harmless("a\x1b[2Jb\nc\td\x07\x9b1m\u202ee\u2028f\ud800") == "a [2Jb c d  1me f?"
    assert harmless("می\u200cخواهم") == "می\u200cخواهم"


def test_where_there_is_no_unicode_there_are_plain_bars() -> None:
    shown = lines(picture(history(samples=[])), plain=True)
    assert not re.search(r"[^\x00-\x7f]", "".join(shown))


# On a terminal


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def at_a_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Put one in the place of standard error; no fixture: pytest exchanges the stream after those."""
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("LINES", "40")
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    return stream


def test_messages_stay_above_the_picture_and_the_cursor_is_left_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    terminal = at_a_terminal(monkeypatch)
    with display.watching(ABOUT, history(samples=[])) as screen:
        assert isinstance(screen, Picture)
        console.say("a message")
        console.warn("a warning")
    drawn = terminal.getvalue()
    assert drawn.index("a message") < drawn.rindex("models/run")
    assert drawn.rindex("\x1b[?25h") > drawn.rindex("\x1b[?25l")
    # From its first picture on, long before the end.
    assert drawn.index("\x1b[?25h") < drawn.index("a message")


def test_an_error_leaves_a_clean_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = at_a_terminal(monkeypatch)
    with pytest.raises(KeyboardInterrupt), display.watching(ABOUT, history(samples=[])):
        raise KeyboardInterrupt
    assert terminal.getvalue().endswith("\n") or terminal.getvalue().endswith("\x1b[?25h")
    assert sys.stderr is terminal
    console.say("after")
    assert terminal.getvalue().endswith("after\x1b[0m\n")


def test_without_colour_nothing_is_coloured_but_changes_are_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = at_a_terminal(monkeypatch)
    monkeypatch.setenv("NO_COLOR", "1")
    before = [{**SAMPLE, "translation": "Zwei Katzen spielen."}]
    with display.watching(ABOUT, history(samples=[before, [SAMPLE]])):
        pass
    codes = {
        code for found in re.findall(r"\x1b\[([\d;]+)m", terminal.getvalue()) for code in found.split(";")
    }
    assert codes <= {"0", "1", "2", "4", "9"}
    assert {"1", "4", "9"} <= codes


def test_a_terminal_that_gets_narrower_pushes_the_folded_picture_out_of_sight(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    terminal = at_a_terminal(monkeypatch)
    with display.watching(ABOUT, history(samples=[])):
        before = len(terminal.getvalue())
        console.stderr().size = (60, 40)
    assert "\n" * 40 in terminal.getvalue()[before:]
    assert "\n" * 40 not in terminal.getvalue()[:before]


@pytest.mark.parametrize("kind", ["quiet", "dumb", "file"])
def test_elsewhere_nothing_is_drawn(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    at_a_terminal(monkeypatch)
    if kind == "quiet":
        console.set_quiet(True)
    if kind == "dumb":
        monkeypatch.setenv("TERM", "dumb")
    if kind == "file":
        monkeypatch.setattr(sys, "stderr", io.StringIO())
    with display.watching(ABOUT, history(samples=[])) as screen:
        screen.advance(1)
        screen.doing("validating")
        screen.looked([{**SAMPLE, "translation": "a\x1b[2J"}], "5 more steps should bring little")
    assert isinstance(sys.stderr, io.StringIO)
    said = sys.stderr.getvalue()
    assert "\x1b" not in said
    assert said.split("\n") == (
        [""]
        if kind == "quiet"
        else ["  Two dogs play.", "  -> a [2J", "  5 more steps should bring little", ""]
    )


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pseudo-terminals")
def test_a_real_run_on_a_real_terminal_ends_cleanly_on_ctrl_c(toy_set: Path, tmp_path: Path) -> None:
    import pty

    recipe = toy.recipe(tmp_path, {"training": {"steps": 1_000_000, "log_every": 1}})
    leader, follower = pty.openpty()
    command = [sys.executable, "-m", "trmt", "train", str(tmp_path / "run"), "--data", str(toy_set)]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "90", "LINES": "30", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*command, "--recipe", recipe],
        stderr=follower,
        stdout=subprocess.PIPE,
        stdin=follower,
        env=environment,
    )
    os.close(follower)
    seen, asked = "", False
    with contextlib.suppress(OSError):  # how Linux says that nobody writes any more
        while part := os.read(leader, 65536):
            seen += part.decode(errors="replace")
            if not asked and "train loss" in seen and "dev loss" in seen:
                asked = True
                process.send_signal(signal.SIGINT)
    os.close(leader)
    assert process.communicate()[0] == b""
    assert process.returncode == 128 + signal.SIGINT
    last = [line for line in re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", seen).splitlines() if line.strip()][-1]
    assert last.startswith("error: stopped by SIGINT after step")
    assert seen.rindex("\x1b[?25h") > seen.rindex("\x1b[?25l")
