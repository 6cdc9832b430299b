"""Draw the pictures of docs/looking-inside.md: python docs/attention.py models/demo --layer 2 --head 1.

`make demo` trains that model. attention.svg is what `trmt attend` writes, attention-page.png its page in a
headless Chromium, if one is installed.
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
    """Write both pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--layer", type=int, required=True, help="of the picture")
    parser.add_argument("--head", type=int, required=True)
    given = parser.parse_args()
    chosen = {"model": given.model, "layer": given.layer, "head": given.head, "by_words": True}
    lines = [AttendLine(number, text) for number, text in enumerate(SENTENCES, start=1)]
    write_maps(AttentionExtractor(AttendOptions(out=HERE / "attention.svg", **chosen)), lines[:1])
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "page.html"
        write_maps(AttentionExtractor(AttendOptions(out=page, **chosen)), lines)
        photograph(page, HERE / "attention-page.png")


def photograph(page: Path, out: Path) -> None:
    """A picture of the page in a window, if there is a browser."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if not browser:
        print(f"there is no Chromium, and {out.name} stays as it is")
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
