"""Attention as one page that needs nothing else: no network, no library, only a browser."""

from __future__ import annotations

import base64
import html
import json
import re
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from torch import Tensor

from trmt.insight.heatmaps.matrix import AXES, Axis, Choice, Looks
from trmt.storage.files import atomic_file

# What could end the element that holds JSON, or a line in it, is written by its number.
UNSAFE = re.compile(r"[<>&\u2028\u2029]")
NAMES = {"cross": "target to source", "encoder": "source to itself", "decoder": "target to itself"}


@dataclass(frozen=True)
class About:
    """What the page says of all its sentences."""

    title: str
    languages: tuple[str, str]
    choice: Choice  # what is shown first


def write(out: Path, looks: Iterable[Looks], about: About) -> int:
    """Write the page, sentence by sentence as they come, at least one; how many there were."""
    before, after = _around(about.title)
    count, sizes = 0, {}
    with atomic_file(out) as stream:
        stream.write(before.encode())
        for count, each in enumerate(looks, start=1):
            sizes = {
                kind: dict(zip(("layers", "heads"), weights.shape, strict=False))
                for kind, weights in each.weights.items()
            }
            stream.write(_sentence(each, count - 1).encode())
        assert count, "a page is of at least one sentence"
        stream.write(_element("application/json", _json(_described(about, sizes)), 'id="about"').encode())
        stream.write(after.encode())
    return count


def _around(title: str) -> tuple[str, str]:
    """The page before and after its data."""
    template = Template(_part("html"))
    script = _part("weights.js") + _part("js")
    parts = {"title": html.escape(title), "style": _part("css"), "script": script, "data": "\0"}
    before, after = template.substitute(parts).split("\0")
    return before, after


def _part(kind: str) -> str:
    return resources.files("trmt.insight.heatmaps").joinpath(f"page.{kind}").read_text(encoding="utf-8")


def _described(about: About, sizes: Any) -> dict[str, Any]:
    choice = about.choice
    unit = "words" if choice.by_words else "pieces"
    return {
        "languages": about.languages,
        "kinds": list(sizes),
        "kindNames": NAMES,
        "axes": AXES,
        "sizes": sizes,
        "choice": {"kind": choice.kind, "layer": choice.layer, "head": choice.head, "unit": unit},
    }


def _sentence(looks: Looks, number: int) -> str:
    """The elements that hold a sentence: its labels, and the weights of each kind."""
    used = {name for kind in looks.weights for name in AXES[kind]} | {"source"}
    axes = {name: _axis(looks.axes[name]) for name in sorted(used)}
    labels = _element("application/json", _json({"axes": axes}), 'class="sentence"')
    weights = (
        _element("text/plain", packed(weights), f'id="{kind}-{number}"')
        for kind, weights in looks.weights.items()
    )
    return labels + "".join(weights)


def _axis(axis: Axis) -> dict[str, Any]:
    return {
        "text": axis.text,
        "pieces": axis.pieces,
        "words": axis.words,
        "ends": [place.stop for place in axis.places],
        "leftward": axis.leftward,
    }


def packed(weights: Tensor) -> str:
    """The weights as bytes, 255 times their square roots: what is small loses less than what is not."""
    rounded = (weights.clamp(0, 1).sqrt() * 255).round().byte()
    return base64.b64encode(zlib.compress(rounded.numpy().tobytes())).decode()


def _json(tree: Any) -> str:
    text = json.dumps(tree, ensure_ascii=False, separators=(",", ":"))
    return UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def _element(kind: str, content: str, attribute: str) -> str:
    return f'<script type="{kind}" {attribute}>{content}</script>\n'
