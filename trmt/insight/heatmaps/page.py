"""Attention maps as a single HTML file that needs neither network access nor libraries."""

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

from trmt.insight.heatmaps.maps import AXES, AttentionMaps, AxisLabels, MapChoice
from trmt.storage.files import atomic_file

# Characters that could end a script element or a line are escaped in JSON.
UNSAFE = re.compile(r"[<>&\u2028\u2029]")
KIND_NAMES = {
    "cross": "cross-attention",
    "encoder": "encoder self-attention",
    "decoder": "decoder self-attention",
}


@dataclass(frozen=True)
class PageInfo:
    """What all sentences of a page share."""

    title: str
    languages: tuple[str, str]
    choice: MapChoice  # the map that is shown first


def write_page(out: Path, sentences: Iterable[AttentionMaps], info: PageInfo) -> int:
    """Write a page of at least one sentence, one after the other; returns the number of sentences."""
    before, after = _split_template(info.title)
    count, sizes = 0, {}
    with atomic_file(out) as stream:
        stream.write(before.encode())
        for count, maps in enumerate(sentences, start=1):
            sizes = {
                kind: dict(zip(("layers", "heads"), weights.shape, strict=False))
                for kind, weights in maps.weights.items()
            }
            stream.write(_sentence(maps, count - 1).encode())
        assert count, "a page needs at least one sentence"
        stream.write(_element("application/json", _json(_description(info, sizes)), 'id="about"').encode())
        stream.write(after.encode())
    return count


def _split_template(title: str) -> tuple[str, str]:
    """The HTML before and after the data."""
    script = _resource("weights.js") + _resource("js")
    values = {"title": html.escape(title), "style": _resource("css"), "script": script, "data": "\0"}
    before, after = Template(_resource("html")).substitute(values).split("\0")
    return before, after


def _resource(extension: str) -> str:
    return resources.files("trmt.insight.heatmaps").joinpath(f"page.{extension}").read_text(encoding="utf-8")


def _description(info: PageInfo, sizes: Any) -> dict[str, Any]:
    choice = info.choice
    unit = "words" if choice.by_words else "pieces"
    return {
        "languages": info.languages,
        "kinds": list(sizes),
        "kindNames": KIND_NAMES,
        "axes": AXES,
        "sizes": sizes,
        "choice": {"kind": choice.kind, "layer": choice.layer, "head": choice.head, "unit": unit},
    }


def _sentence(maps: AttentionMaps, index: int) -> str:
    """The elements of a sentence: its labels, and the weights of each kind of attention."""
    used = {name for kind in maps.weights for name in AXES[kind]} | {"source"}
    axes = {name: _axis(maps.axes[name]) for name in sorted(used)}
    labels = _element("application/json", _json({"axes": axes}), 'class="sentence"')
    weights = (
        _element("text/plain", compress(weights), f'id="{kind}-{index}"')
        for kind, weights in maps.weights.items()
    )
    return labels + "".join(weights)


def _axis(axis: AxisLabels) -> dict[str, Any]:
    return {
        "text": axis.text,
        "pieces": axis.pieces,
        "words": axis.words,
        "ends": [positions.stop for positions in axis.word_pieces],
        "rightToLeft": axis.right_to_left,
    }


def compress(weights: Tensor) -> str:
    """The weights as bytes, 255 times their square roots, which makes small weights more precise."""
    rounded = (weights.clamp(0, 1).sqrt() * 255).round().byte()
    return base64.b64encode(zlib.compress(rounded.numpy().tobytes())).decode()


def _json(tree: Any) -> str:
    text = json.dumps(tree, ensure_ascii=False, separators=(",", ":"))
    return UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def _element(mime_type: str, content: str, attribute: str) -> str:
    return f'<script type="{mime_type}" {attribute}>{content}</script>\n'
