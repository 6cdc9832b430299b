"""Draws docs/training.svg and curves.svg: python docs/pictures.py RUN [OTHERS...] --step 750 --last 1500.

The first is the display of `trmt train` at that step, the second the figure of `trmt plot`.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import time
from pathlib import Path

from rich.console import Console

from trmt.insight.plotting import PlotOptions, plot
from trmt.training.display import LiveDisplay, RunInfo
from trmt.training.forecast import describe_forecast
from trmt.training.history import LOG, TRAIN, VALIDATE, History

HERE = Path(__file__).resolve().parent
COLUMNS, LINES = 96, 30


def display(run: Path, *, step: int, last: int) -> str:
    """The display of a run at `step` of `last`, as SVG."""
    history, began, epoch = History(), {}, 1
    for line in (run / LOG).read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        if entry["event"] == "begin":
            began = entry
        if entry["event"] == TRAIN and entry["epoch"] == 0:
            epoch = entry["step"]
        if entry["step"] <= step:
            history.add(entry)
    parameters, device = (
        f"{began['parameters'] / 1e6:.1f}M parameters",
        f"{began['device']} {began['precision']}",
    )
    info = RunInfo(name=str(run), network=f"{parameters}, {device}", steps_per_epoch=epoch, last_step=last)
    seconds = history.entries[-1]["elapsed"]
    picture = LiveDisplay(info, history)
    picture.began = time.monotonic() - seconds
    picture.advance(step)
    metric = history.metrics()[0]
    points = history.curve(VALIDATE, metric)
    picture.show_validation([], describe_forecast(points, metric, last=last, seconds=seconds / step))
    terminal = Console(record=True, width=COLUMNS, height=LINES, file=io.StringIO(), force_terminal=True)
    terminal.print(picture)
    drawing = terminal.export_svg(title="trmt train", unique_id="trmt")
    # Without fonts from the network: any monospaced font will do.
    return re.sub(r"@font-face \{.*?\}\s*", "", drawing, flags=re.DOTALL)


def main() -> None:
    """Write both figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--step", type=int, required=True, help="the step to show")
    parser.add_argument("--last", type=int, required=True, help="the last step of the run")
    parser.add_argument("others", nargs="*", type=Path, help="runs to compare in the curves")
    given = parser.parse_args()
    (HERE / "training.svg").write_text(display(given.run, step=given.step, last=given.last), encoding="utf-8")
    plot(PlotOptions(runs=(given.run, *given.others), out=HERE / "curves.svg"))


if __name__ == "__main__":
    main()
