"""Measures an SSRU decoder beside the self-attention decoder of the same size, on one thread: `python
bench/ssru.py`.

Random weights, one sentence at a time, translations as long as the source. "decoder" is the time of the
decoding steps alone, "translation" is all of `trmt translate` behind the tokenizer: encoder, decoder, logits
and search. Both networks run in turn in one process; ratios are medians over rounds of processor time.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from provenance import RESULTS, record
from trmt.decoding.base import Search
from trmt.decoding.beam import Beam
from trmt.decoding.engine import Engine, frozen
from trmt.decoding.greedy import Greedy
from trmt.decoding.request import Batching, Request
from trmt.nets.base import Decoding, Precision
from trmt.nets.ragged import Source
from trmt.nets.ssru import SSRUDecoder
from trmt.nets.transformer import Transformer, TransformerConfig

NETWORKS = {
    "tiny, 4+4 layers of 128": {"d_model": 128, "feed_forward": 256, "heads": 4, "layers": (4, 4)},
    "student, 6+2 layers of 256": {"d_model": 256, "feed_forward": 1536, "heads": 8, "layers": (6, 2)},
    "base, 6+6 layers of 512": {"d_model": 512, "feed_forward": 2048, "heads": 8, "layers": (6, 6)},
}
VOCABULARY = 8000
LENGTHS = (20, 80)
SEARCHES: dict[str, Search] = {"greedy": Greedy(), "beam of 4": Beam(size=4)}
PRECISIONS: tuple[Precision, ...] = ("fp32", "int8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure an SSRU decoder beside self-attention.")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    figures = {
        f"{name}, {precision}, {length} tokens": point(sizes, precision, length, given.rounds)
        for name, sizes in NETWORKS.items()
        for precision in PRECISIONS
        for length in LENGTHS
    }
    command = f"python bench/ssru.py --rounds {given.rounds}"
    print(record("ssru", {"times_faster": figures}, command=command, folder=given.out))


def point(sizes: dict[str, Any], precision: Precision, length: int, rounds: int) -> dict[str, Any]:
    """How many times as fast the SSRU is, by what is timed: median, lowest and highest round."""
    nets = [made(architecture, sizes) for architecture in (Transformer, SSRUDecoder)]
    works = {"decoder": [steps(net, precision, length) for net in nets]}
    for name, search in SEARCHES.items():
        works[f"translation, {name}"] = [translation(net, search, precision, length) for net in nets]
    return {name: in_turn(both, rounds) for name, both in works.items()}


def made(architecture: type[Transformer], sizes: dict[str, Any]) -> Transformer:
    torch.manual_seed(1)
    encoder, decoder = sizes["layers"]
    config = TransformerConfig(
        source_vocabulary=VOCABULARY,
        target_vocabulary=VOCABULARY,
        encoder_layers=encoder,
        decoder_layers=decoder,
        **{name: value for name, value in sizes.items() if name != "layers"},
    )
    return architecture(config).eval()


def steps(net: Transformer, precision: Precision, length: int) -> Callable[[], float]:
    """Processor time of decoding `length` tokens of one sentence."""
    stepper = frozen(net, precision)
    source, token = Source.of([list(range(10, 10 + length))]), torch.tensor([[[7]]])

    @torch.inference_mode()
    def work() -> float:
        state = stepper.start(source, Decoding(1, length))
        began = time.process_time()
        for _ in range(length):
            _, state = stepper.step(token, state)
        return time.process_time() - began

    return work


def translation(net: Transformer, search: Search, precision: Precision, length: int) -> Callable[[], float]:
    """Processor time of translating one sentence into as many tokens."""
    engine = Engine(net, search, bos=1, eos=2, banned=(0, 1), precision=precision, batching=Batching(1))
    requests = [Request((*range(10, 10 + length), 2), length, min_tokens=length)]

    def work() -> float:
        began = time.process_time()
        list(engine.translate(requests))
        return time.process_time() - began

    return work


def in_turn(both: list[Callable[[], float]], rounds: int) -> dict[str, Any]:
    for work in both:
        work()
    ratios, taken = [], []
    for number in range(rounds):
        order = both if number % 2 else both[::-1]
        times = {work: work() for work in order}
        taken.append([times[work] for work in both])
        ratios.append(taken[-1][0] / taken[-1][1])
    return {
        "times": round(statistics.median(ratios), 3),
        "from": round(min(ratios), 3),
        "to": round(max(ratios), 3),
        "milliseconds": [round(1000 * statistics.median(each), 3) for each in zip(*taken, strict=True)],
    }


if __name__ == "__main__":
    main()
