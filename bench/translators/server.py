"""A process that holds one engine and one model, and translates what it is told, when it is told.

`python -m translators.NAME MODEL COMPUTE THREADS [DEVICE]` answers each line of JSON on standard input with
one on standard output. The clock and the counters are here, the same for every engine:

- seconds are those of the clock, CPU seconds those of the process and its children, all threads;
- a target token is a piece of the best translation, the end of the sentence not counted;
- the first line is there when the translation of the first sentence of a call is.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from peers.probe import cpu_seconds, peak_mib

Pieces = list[str]


@dataclass(frozen=True, kw_only=True)
class How:
    """What is asked of an engine."""

    beam: int  # 1 is greedy search
    batch: int  # sentences of a call that are translated together
    penalty: float = 0.0  # exponent of the length penalty of Wu et al.
    power: float = 0.0  # of the length, the nearest to that penalty for engines that divide by a power
    forced: int = 0  # a translation has exactly so many pieces; 0: it ends by itself
    mirrored: bool = False  # a translation has exactly as many pieces as its source
    extra: int = 50  # pieces it may have more than its source, if it ends by itself

    def least(self, source: Sequence[object]) -> int:
        return len(source) if self.mirrored else self.forced

    def limit(self, source: Sequence[object]) -> int:
        return self.least(source) or len(source) + self.extra


class Translator(Protocol):
    """One engine with one model."""

    version: str

    def translate(self, sentences: list[Pieces], how: How) -> Iterator[tuple[int, Pieces]]:
        """(number of the sentence, its translation) as they become ready."""


def neighbours(sentences: Sequence[Sequence[object]], batch: int) -> Iterator[list[int]]:
    """Batches of sentences that are about as long, the longest first; each by its number."""
    order = sorted(range(len(sentences)), key=lambda number: -len(sentences[number]))
    return (order[begin : begin + batch] for begin in range(0, len(order), batch))


def serve(make: type, began: float) -> None:
    """Load the model and answer until standard input ends."""
    # Whatever a library prints must not stand between the answers.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    translator: Translator = make(*sys.argv[1:3], int(sys.argv[3]), *sys.argv[4:])
    told = {"load_seconds": round(time.monotonic() - began, 3), "version": translator.version}
    sentences: list[Pieces] = []
    while True:
        print(json.dumps(told), file=answers, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        asked = json.loads(line)
        if "sentences" in asked:
            with open(asked["sentences"], encoding="utf-8") as file:
                sentences = json.load(file)
            told = {"sentences": len(sentences)}
        else:
            calls = [sentences[begin:end] for begin, end in asked["calls"]]
            told = run(translator, calls, How(**asked["how"]), asked.get("seconds", 0.0))
            # What only some can tell: memory of a GPU, and the like.
            told |= getattr(translator, "more", dict)()
            if not asked.get("show"):
                told.pop("translations")


def run(translator: Translator, calls: list[list[Pieces]], how: How, most: float) -> dict[str, Any]:
    """Translate call by call; with `most` only so many calls as fit into these seconds, at least one."""
    translations: list[Pieces] = []
    first = 0.0
    done = 0
    cpu, began = cpu_seconds(), time.monotonic()
    for call in calls:
        found: list[Pieces] = [[] for _ in call]
        for number, pieces in translator.translate(call, how):
            found[number] = pieces
            if number == 0 and not first:
                first = time.monotonic() - began
        translations += found
        done += 1
        if most and time.monotonic() - began >= most:
            break
    seconds, busy = time.monotonic() - began, cpu_seconds() - cpu
    tokens = sum(map(len, translations))
    return {
        "calls": done,
        "seconds": seconds,
        "cpu_seconds": busy,
        "first_seconds": first,
        "target_tokens": tokens,
        "target_tokens_per_second": tokens / seconds,
        "target_tokens_per_cpu_second": tokens / busy if busy else None,
        "sentences_per_second": len(translations) / seconds,
        "peak_mib": peak_mib(),
        "translations": translations,
    }


BEGAN = time.monotonic()
