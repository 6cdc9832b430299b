from __future__ import annotations

import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from trmt.errors import ConfigError, DataError, TrmtError
from trmt.insight.plotting import COLOURS, PlotOptions, panels, plot, read_runs, rows, summary


def make_run(folder: Path, *, steps: int = 20, base: float = 0.0, with_tokens: bool = True) -> Path:
    folder.mkdir(parents=True)
    entries = [{"event": "begin", "step": 0}]
    for step in range(1, steps + 1):
        progress = {"tokens": 100 * step, "elapsed": 36.0 * step} if with_tokens else {}
        entries.append(
            {
                "event": "train",
                "step": step,
                "loss": base + 5 / step,
                "lr": 1e-3,
                "tokens_per_second": 50.0,
                **progress,
            }
        )
        if step % 5 == 0:
            scores = [
                {"metric": "chrf", "value": 30 + base + step},
                {"metric": "loss", "value": base + 4 / step},
            ]
            entries.append({"event": "validate", "step": step, "scores": scores, **progress})
    (folder / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return folder


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    return make_run(tmp_path / "first"), make_run(tmp_path / "other $run_2", steps=10, base=1.0)


def test_every_curve_of_every_run_is_there(two: tuple[Path, Path]) -> None:
    drawn = panels(read_runs(two), "steps")
    assert [panel.title for panel in drawn] == [
        "training loss (nats per token)",
        "dev loss (nats per token)",
        "dev chrF",
        "learning rate",
        "target tokens/s",
    ]
    assert [[len(line.x) for line in panel.lines] for panel in drawn] == [
        [20, 10],
        [4, 2],
        [4, 2],
        [20, 10],
        [20, 10],
    ]
    assert drawn[2].lines[1].y == [36.0, 41.0]


def test_curves_are_drawn_over_steps_tokens_or_hours(two: tuple[Path, Path]) -> None:
    runs = read_runs(two)
    over = {axis: panels(runs, axis)[1].lines[0].x for axis in ("steps", "tokens", "hours")}  # type: ignore[arg-type]
    assert list(over["steps"]) == [5, 10, 15, 20]
    assert list(over["tokens"]) == [500, 1000, 1500, 2000]
    assert list(over["hours"]) == pytest.approx([0.05, 0.1, 0.15, 0.2])


def test_a_log_without_tokens_is_refused_for_tokens_only(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", with_tokens=False)
    assert panels(read_runs([run]), "steps")
    with pytest.raises(DataError, match=r"the log of run has no tokens.*--x steps"):
        plot(PlotOptions(runs=(run,), axis="tokens"))


def test_a_run_is_a_folder_or_its_log_and_names_are_unique(tmp_path: Path) -> None:
    one, same = make_run(tmp_path / "a/run"), make_run(tmp_path / "b/run")
    assert list(read_runs([one])) == list(read_runs([one / "log.jsonl"])) == ["run"]
    assert list(read_runs([one, same])) == [str(one), str(same)]
    with pytest.raises(ConfigError, match="given twice"):
        read_runs([one, one])


def test_the_newest_run_is_drawn_if_none_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"no run in models/.*run trmt train first"):
        plot(PlotOptions())
    make_run(tmp_path / "models/mine")
    histories, _ = plot(PlotOptions())
    assert list(histories) == ["mine"]
    assert "run: models/mine" in capsys.readouterr().err
    assert list(read_runs([Path("mine")])) == ["mine"], "found by its name in models/"
    newer = make_run(tmp_path / "models/newer") / "log.jsonl"
    with newer.open("a") as log:
        log.write('{"event": "resume", "step": 1, "time": 9e12}\n')
    os.utime(newer, (1, 1))
    assert list(plot(PlotOptions())[0]) == ["newer"], "by its entries, not by the time of the file"


def test_runs_that_cannot_be_plotted_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot read"):
        plot(PlotOptions(runs=(tmp_path,)))
    (tmp_path / "log.jsonl").write_text('{"event": "begin", "step": 0}\n')
    with pytest.raises(DataError, match=r"has no curves; the run has fewer steps than training\.log_every"):
        plot(PlotOptions(runs=(tmp_path,)))
    with pytest.raises(ConfigError, match=r"has no known file format; end it in \.png, \.svg, \.pdf"):
        plot(PlotOptions(runs=(make_run(tmp_path / "run"),), out=tmp_path / "curves.gif"))


def test_the_summary_gives_steps_and_best_scores(two: tuple[Path, Path]) -> None:
    columns, table = summary(read_runs(two))
    assert columns == ["run", "steps", "training", "best chrF", "best loss"]
    assert table[0] == ["first", "20", "12 min 00 s", "50 at 20", "0.2 at 20"]
    assert table[1][3:] == ["41 at 10", "1.4 at 10"]


@pytest.mark.parametrize("width", [60, 79, 100, 160])
@pytest.mark.parametrize("marked", [True, False])
def test_text_fits_the_terminal_and_names_the_runs(two: tuple[Path, Path], width: int, marked: bool) -> None:
    runs = read_runs(two)
    made = rows(panels(runs, "steps"), list(runs), width=width, axis="steps", marked=marked)
    lines = ["".join(text for text, _ in row) for row in made]
    assert max(map(len, lines)) <= width
    assert lines[0].endswith("first") and lines[1].endswith("other $run_2")
    assert {number for row in made for _, number in row} == {None, 0, 1}


def test_the_command_prints_text_on_standard_output(two: tuple[Path, Path]) -> None:
    command = [sys.executable, "-m", "trmt", "plot", *map(str, two)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "dev chrF" in done.stdout and "x other $run_2" in done.stdout
    assert "\x1b" not in done.stdout
    assert "best chrF" in done.stdout and done.stderr == ""


# Figures


@pytest.mark.parametrize("kind", ["png", "svg", "pdf"])
def test_figures_are_complete_and_reproducible(two: tuple[Path, Path], tmp_path: Path, kind: str) -> None:
    pytest.importorskip("matplotlib")
    first, second = tmp_path / f"one.{kind}", tmp_path / f"two.{kind}"
    for out in (first, second):
        plot(PlotOptions(runs=two, out=out))
    magic = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[kind]
    assert first.read_bytes().startswith(magic)
    assert first.read_bytes() == second.read_bytes()
    assert not list(tmp_path.glob(".partial*"))


def test_a_run_has_one_colour_in_every_panel(two: tuple[Path, Path]) -> None:
    pytest.importorskip("matplotlib")
    from trmt.insight.plotting import draw_figure

    runs = read_runs(two)
    figure = draw_figure(panels(runs, "steps"), list(runs), axis="steps")
    for axes in figure.axes[:5]:
        assert [line.get_color() for line in axes.get_lines()] == list(COLOURS[:2])
    [legend] = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["first", "other $run_2"]
    assert len(set(COLOURS)) == len(COLOURS)


def test_the_figure_shows_the_values(two: tuple[Path, Path], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from trmt.insight.plotting import draw_figure

    runs = read_runs(two)
    figure = draw_figure(panels(runs, "tokens"), list(runs), axis="tokens")
    chrf = figure.axes[2].get_lines()[1]
    assert list(chrf.get_xdata()) == [500, 1000] and list(chrf.get_ydata()) == [36.0, 41.0]
    out = tmp_path / "curves.svg"
    plot(PlotOptions(runs=two, out=out))
    assert ElementTree.parse(out).getroot().tag.endswith("svg")


def test_many_runs_and_names_in_any_script(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    runs = tuple(make_run(tmp_path / f"_übung-日本-{number}") for number in range(9))
    plot(PlotOptions(runs=runs, out=tmp_path / "curves.png"))
    assert (tmp_path / "curves.png").stat().st_size > 10_000


def test_without_matplotlib_the_error_says_what_to_install(
    two: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(TrmtError, match=r"pip install 'trmt\[plot\]'"):
        plot(PlotOptions(runs=two, out=tmp_path / "curves.png"))
    assert not (tmp_path / "curves.png").exists()
    assert plot(PlotOptions(runs=two))[1]
