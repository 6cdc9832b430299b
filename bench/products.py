"""Matrix products and decoder steps by kernel and by PyTorch, one after the other in turn.

python bench/products.py [--seconds 60]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from provenance import RESULTS, record
from trmt.decoding.engine import frozen
from trmt.native.products import PackedProduct, backend
from trmt.nets.base import Decoding, Stepper
from trmt.nets.linear import Int8Product, PlainProducts
from trmt.nets.ragged import Source
from trmt.nets.transformer import Transformer, TransformerConfig

SHAPES = (
    (256, 256),
    (1024, 256),
    (256, 1024),
    (8000, 256),
    (512, 512),
    (2048, 512),
    (512, 2048),
    (32000, 512),
)
ROWS = (1, 4, 16, 64, 256)
STEPS = 16
LENGTH = 30  # of sources
Works = dict[str, Callable[[], object]]


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure matrix products and decoder steps on one thread.")
    parser.add_argument("--seconds", type=float, default=60, help="for all of it, about")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(1)
    budget = given.seconds / (len(SHAPES) * len(ROWS) + 4)
    with torch.inference_mode():
        figures = {
            "backend": backend() or "pure PyTorch",
            "unit": "microseconds, median of the rounds",
            "products": {
                f"{outer}x{inner}, {rows} rows": in_turn(products(outer, inner, rows), budget)
                for outer, inner in SHAPES
                for rows in ROWS
            },
            "steps of a base decoder with its readout, random weights": {
                f"{sentences} sentences, beam {beam}": {
                    name: round(value / STEPS, 1)
                    for name, value in in_turn(steps(sentences, beam), budget).items()
                }
                for sentences, beam in ((1, 1), (1, 4), (16, 4), (64, 1))
            },
        }
    command = f"python bench/products.py --seconds {given.seconds:g}"
    print(record("products", figures, command=command, folder=given.out))


def in_turn(works: Works, seconds: float) -> dict[str, float]:
    """The median time of each, at least three rounds of all of them."""
    taken: dict[str, list[float]] = {name: [] for name in works}
    for work in works.values():
        work()
    end = time.perf_counter() + seconds
    while len(next(iter(taken.values()))) < 3 or time.perf_counter() < end:
        for name, work in works.items():
            began = time.perf_counter()
            work()
            taken[name].append(time.perf_counter() - began)
    return {name: round(statistics.median(times) * 1e6, 1) for name, times in taken.items()}


def products(outer: int, inner: int, rows: int) -> Works:
    weight, bias, x = torch.randn(outer, inner), torch.randn(outer), torch.randn(rows, inner)
    kinds: dict[str, Callable[[torch.Tensor], object]] = {
        "F.linear": lambda x: F.linear(x, weight, bias),
        "fp32 pure": PlainProducts()(weight, bias),
        "fp32 native": PackedProduct(weight, bias, precision="fp32"),
        "int8 pure": Int8Product(weight, bias),
        "int8 native": PackedProduct(weight, bias, precision="int8"),
    }
    return {name: lambda kind=kind: kind(x) for name, kind in kinds.items()}


def steps(sentences: int, beam: int) -> Works:
    config = TransformerConfig(source_vocabulary=32000, target_vocabulary=32000)
    net = Transformer(config).eval()
    source = Source.of([torch.randint(4, 32000, (LENGTH,)).tolist() for _ in range(sentences)])
    steppers = {
        "fp32 pure": net.frozen(PlainProducts()),
        "fp32 native": frozen(net),
        "int8 native": frozen(net, "int8"),
    }
    return {name: stepping(stepper, source, beam) for name, stepper in steppers.items()}


def stepping(stepper: Stepper, source: Source, beam: int) -> Callable[[], object]:
    """Decoding steps, and the encoder before them."""
    tokens = torch.full((len(source), beam, 1), 5)
    parents = torch.arange(beam).expand(len(source), beam)

    def work() -> None:
        state = stepper.start(source, Decoding(beam, STEPS))
        for _ in range(STEPS):
            hidden, state = stepper.step(tokens, state)
            stepper.readout(hidden[:, :, 0])
            state = state.reorder(parents) if beam > 1 else state

    return work


if __name__ == "__main__":
    main()
