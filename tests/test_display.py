from __future__ import annotations

import contextlib
import io
import itertools
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len

from tests import texts, toy
from trmt import console
from trmt.training import display
from trmt.training.display import LiveDisplay, RunInfo, remove_controls, word_diff
from trmt.training.history import History

INFO = RunInfo(
    name="models/run", network="transformer, 1.9M parameters", steps_per_epoch=50, last_step=400, memory=2**35
)
SAMPLE = {
    "source": "Two dogs play.",
    "translation": "Zwei Hunde spielen.",
    "reference": "Zwei Hunde spielen.",
}


def history(*, samples: list[list[dict[str, str]]], steps: int = 200) -> History:
    found = History()
    for step in range(10, steps + 1, 10):
        found.add(
            {
                "event": "train", "step": step, "loss": 5 + 40 / step, "lr": 1e-4 * step,
                "tokens_per_second": 12_345.6, "memory": 3 * 2**30, "waited": 0.0125,
            }
        )  # fmt: skip
        number = len(samples) - 1 - (steps - step) // 10
        if number < 0:
            continue
        scores = [{"metric": "chrf", "value": 20.0 + number}, {"metric": "loss", "value": 4.0 - number / 10}]
        found.add({"event": "validate", "step": step, "scores": scores, "samples": samples[number]})
    return found


def display_of(entries: History, info: RunInfo = INFO) -> LiveDisplay:
    shown = LiveDisplay(info, entries)
    shown.advance(100)
    shown.show_validation(
        [], "100 more steps (3 min 20 s) should bring info +0.4 dev chrF (80 %: +0.1 to +0.9)"
    )
    return shown


def lines(shown: LiveDisplay, width: int = 100, height: int = 40, **more: Any) -> list[str]:
    return [line.plain for line in shown.lines(width, height, **more)]


def test_it_shows_the_state_of_a_run() -> None:
    shown = "\n".join(lines(display_of(history(samples=[[SAMPLE], [SAMPLE]]))))
    for part in (
        "models/run", "step 100 of 400", " 25%", "left", "epoch 2.0",
        "train loss       5.2000", "dev loss         3.9000",
        "dev chrF          21.00", "best 21.00 at 200", "2.00e-02", "12,346 tokens/s", "memory 3 of 32 GiB",
        "data wait 1.2%", "+0.4 dev chrF (80 %: +0.1 to +0.9)", "Two dogs play.", "step 190", "reference",
    ):  # fmt: skip
        assert part in shown, f"{part}\n{shown}"
    assert "▁" in shown and "█" in shown


def test_a_run_that_may_end_early_has_at_most_so_much_time_left() -> None:
    shown = lines(display_of(history(samples=[]), replace(INFO, may_end_early=True)))
    assert any("at most" in line and " left" in line for line in shown)


def test_a_run_without_a_last_step_or_a_history_is_shown() -> None:
    info = RunInfo(name="run", network="rnn", steps_per_epoch=50, last_step=None)
    shown = "\n".join(lines(LiveDisplay(info, History())))
    assert "step 0" in shown and "epoch 0.0" in shown
    assert "left" not in shown


@pytest.mark.parametrize("width", [20, 40, 60, 80, 100, 200])
@pytest.mark.parametrize("height", [3, 10, 24, 60])
@pytest.mark.parametrize("language", list(texts.ALL))
def test_no_script_exceeds_the_size_of_the_terminal(width: int, height: int, language: str) -> None:
    found = [{"source": text, "translation": text * 3, "reference": text} for text in texts.ALL[language][:3]]
    before = [{**sample, "translation": sample["translation"][::-1]} for sample in found]
    shown = display_of(history(samples=[before, found])).lines(width, height)
    assert len(shown) < height
    assert max(cell_len(line.plain) for line in shown) < width
    assert not any(character in line.plain for line in shown for character in "\n\r\t\x1b\u202e\u2066")


def test_as_many_samples_are_shown_as_fit() -> None:
    three = [{**SAMPLE, "source": f"Sentence {number}."} for number in range(3)]
    shown = display_of(history(samples=[three, three]))
    counts = [sum("Sentence" in line for line in lines(shown, height=height)) for height in range(10, 40)]
    assert counts == sorted(counts)
    assert counts[0] == 0 and set(counts) == {0, 1, 2, 3}


def test_changed_words_are_highlighted_in_both_translations() -> None:
    before = [{**SAMPLE, "translation": "Zwei Katzen spielen."}]
    shown = display_of(history(samples=[before, [SAMPLE]])).lines(100, 40)
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


def test_differences_are_words_or_characters() -> None:
    old, new = word_diff("ich bin hier", "ich war gestern hier")
    assert [word for word, changed in old if changed] == ["bin"]
    assert [word for word, changed in new if changed] == ["war", "gestern"]
    old, new = word_diff("我在这里", "我在那里")
    assert [word for word, changed in old if changed] == ["这"]
    assert [word for word, changed in new if changed] == ["那"]


@pytest.mark.parametrize("language", list(texts.ALL))
def test_the_words_of_a_diff_are_the_text(language: str) -> None:
    sentences = [remove_controls(text) for text in texts.ALL[language]]
    for before, now in itertools.pairwise(sentences):
        old, new = word_diff(before, now)
        assert "".join(word for word, _ in old) == before
        assert "".join(word for word, _ in new) == now


def test_control_characters_are_removed() -> None:
    assert remove_controls("a\x1b[2Jb\nc\td\x07\x9b1m\u202ee\u2028f\ud800") == "a [2Jb c d  1me f?"
    assert remove_controls("می\u200cخواهم") == "می\u200cخواهم"


def test_without_unicode_bars_and_curves_are_ascii() -> None:
    shown = lines(display_of(history(samples=[])), plain=True)
    assert not re.search(r"[^\x00-\x7f]", "".join(shown))


# On a terminal


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def at_a_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Replace standard error by a terminal; not a fixture, because pytest replaces it after fixtures."""
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("LINES", "40")
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    return stream


def test_messages_are_printed_above_the_display_and_the_cursor_stays_visible(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    terminal = at_a_terminal(monkeypatch)
    with display.open_display(INFO, history(samples=[])) as shown:
        assert isinstance(shown, LiveDisplay)
        console.say("a message")
        console.warn("a warning")
    drawn = terminal.getvalue()
    assert drawn.index("a message") < drawn.rindex("models/run")
    assert drawn.rindex("\x1b[?25h") > drawn.rindex("\x1b[?25l")
    # From the first update on.
    assert drawn.index("\x1b[?25h") < drawn.index("a message")


def test_an_error_leaves_a_clean_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = at_a_terminal(monkeypatch)
    with pytest.raises(KeyboardInterrupt), display.open_display(INFO, history(samples=[])):
        raise KeyboardInterrupt
    assert terminal.getvalue().endswith("\n") or terminal.getvalue().endswith("\x1b[?25h")
    assert sys.stderr is terminal
    console.say("after")
    assert terminal.getvalue().endswith("after\x1b[0m\n")


def test_without_colour_changes_are_highlighted_in_other_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = at_a_terminal(monkeypatch)
    monkeypatch.setenv("NO_COLOR", "1")
    before = [{**SAMPLE, "translation": "Zwei Katzen spielen."}]
    with display.open_display(INFO, history(samples=[before, [SAMPLE]])):
        pass
    codes = {
        code for found in re.findall(r"\x1b\[([\d;]+)m", terminal.getvalue()) for code in found.split(";")
    }
    assert codes <= {"0", "1", "2", "4", "9"}
    assert {"1", "4", "9"} <= codes


@pytest.mark.parametrize("width", [60, 70, 80, 100])
@pytest.mark.parametrize("steps", [400, 1_000_000])
def test_from_60_columns_on_nothing_is_cut(width: int, steps: int) -> None:
    info = RunInfo(
        name="models/multi30k-transformer-tiny-with-a-long-name",
        network="transformer, 1.9M parameters, 2+2 layers of 128, cpu, fp32",
        steps_per_epoch=50,
        last_step=steps,
        steps_done=0,
        memory=2**37,
    )
    shown = display_of(history(samples=[[SAMPLE], [SAMPLE]]), info)
    shown.advance(steps - 200)
    shown.set_activity("validating")
    text = lines(shown, width)
    assert all(cell_len(line) < width for line in text)
    assert not [line for line in text if "…" in line]
    for part in (
        info.name,
        "validating",
        info.network,
        f"of {steps:,}",
        "left",
        "tokens/s",
        "data wait 1.2%",
    ):
        assert part in " ".join(" ".join(text).split()), part


@pytest.mark.parametrize("kind", ["quiet", "dumb", "file"])
def test_nothing_is_drawn_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    at_a_terminal(monkeypatch)
    if kind == "quiet":
        console.set_quiet(True)
    if kind == "dumb":
        monkeypatch.setenv("TERM", "dumb")
    if kind == "file":
        monkeypatch.setattr(sys, "stderr", io.StringIO())
    with display.open_display(INFO, history(samples=[])) as shown:
        shown.advance(1)
        shown.set_activity("validating")
        shown.show_validation([{**SAMPLE, "translation": "a\x1b[2J"}], "5 more steps should bring little")
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
    seen, interrupted = "", False
    with contextlib.suppress(OSError):  # raised by Linux when the other end is closed
        while part := os.read(leader, 65536):
            seen += part.decode(errors="replace")
            if not interrupted and "train loss" in seen and "dev loss" in seen:
                interrupted = True
                process.send_signal(signal.SIGINT)
    os.close(leader)
    assert process.communicate()[0] == b""
    assert process.returncode == 128 + signal.SIGINT
    last = [line for line in re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", seen).splitlines() if line.strip()][-1]
    assert last.startswith("error: stopped by SIGINT after step")
    assert seen.rindex("\x1b[?25h") > seen.rindex("\x1b[?25l")
