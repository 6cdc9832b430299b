"""Draws the figures of docs/attention.md: python docs/attention.py models/demo --layer 2 --head 1.

`make demo` trains that model. attention.svg is a figure of `trmt attend`, attention-page.png a screenshot of
its page in a headless Chromium, if that is installed.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import tempfile
from pathlib import Path

from trmt.insight.heatmaps.extractor import AttendLine, AttendOptions, AttentionExtractor, write_maps

HERE = Path(__file__).resolve().parent
SENTENCES = (
    "The museum opens at half past nine.",
    "The soup costs seven euros.",
    "Where can I find the new library?",
    "My sister sold the old car yesterday.",
)
SIZE = (1180, 760)  # of the window, in pixels


def main() -> None:
    """Write both figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--layer", type=int, required=True, help="layer of the figure")
    parser.add_argument("--head", type=int, required=True, help="head of the figure")
    given = parser.parse_args()
    chosen = {"model": given.model, "layer": given.layer, "head": given.head, "by_words": True}
    lines = [AttendLine(number, text) for number, text in enumerate(SENTENCES, start=1)]
    write_maps(AttentionExtractor(AttendOptions(out=HERE / "attention.svg", **chosen)), lines[:1])
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "page.html"
        write_maps(AttentionExtractor(AttendOptions(out=page, **chosen)), lines)
        screenshot(page, HERE / "attention-page.png")


def screenshot(page: Path, out: Path) -> None:
    """Take a screenshot of the page, if there is a browser."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if not browser:
        print(f"Chromium is not installed; {out.name} is not updated")
        return
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        "--virtual-time-budget=5000",
    ]
    window = ",".join(map(str, SIZE))
    subprocess.run(
        [browser, *options, f"--window-size={window}", f"--screenshot={out}", page.as_uri()],
        check=True,
        stderr=subprocess.DEVNULL,
    )


if __name__ == "__main__":
    main()
