"""How much arithmetic training is, and how much the machine can do: the two halves of utilisation.

The model's operations are those of its matrix products over real tokens: padding, recomputation, norms,
softmax and the optimiser are not counted, so that they show as what they are, a loss. A multiplication with
its addition is two operations; the backward pass is twice the forward pass.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping
from typing import Any

from peers.job import Shape


def forward_flops(shape: Shape, sums: Mapping[str, float]) -> float:
    """Operations of one forward pass over batches with these sums of lengths.

    `source_tokens` and `target_tokens` are sums of lengths, `source_squares` and `target_squares` of their
    squares, `products` of source times target length. What the causal mask hides is not counted.
    """
    d, feed = shape.width, shape.feed_forward
    source, target = sums["source_tokens"], sums["target_tokens"]
    encoder = shape.encoder_layers * (
        2 * source * (4 * d * d + 2 * d * feed) + 4 * d * sums["source_squares"]
    )
    own = 2 * target * 4 * d * d + 2 * d * (sums["target_squares"] + target)
    cross = 2 * target * 2 * d * d + 2 * source * 2 * d * d + 4 * d * sums["products"]
    decoder = shape.decoder_layers * (own + cross + 2 * target * 2 * d * feed)
    return encoder + decoder + 2 * target * d * shape.vocabulary


def training_flops(shape: Shape, sums: Mapping[str, float]) -> float:
    """Operations of the forward and the backward pass."""
    return 3 * forward_flops(shape, sums)


# The machine


def gemm(device: str, precision: str, shape: Shape, *, rows: int) -> dict[str, Any]:
    """GFLOP/s of F.linear: `peak`, the best of large products, and each of the model's own shapes with as
    many rows as a batch has."""
    import torch

    kind = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    sides = (4096, 8192) if device.startswith("cuda") else (1024, 2048)
    large = {f"{side}x{side}x{side}": (side, side, side) for side in sides}
    d, feed = shape.width, shape.feed_forward
    own = {
        "attention, merged": (rows, 3 * d, d),
        "attention, out": (rows, d, d),
        "feed-forward, inner": (rows, feed, d),
        "feed-forward, outer": (rows, d, feed),
        "output": (rows, shape.vocabulary, d),
    }
    with torch.inference_mode():
        speeds = {
            name: _speed(size, lambda *sizes: torch.randn(*sizes, device=device).to(kind), device)
            for name, size in (large | own).items()
        }
    return {
        "peak": max(speeds[name] for name in large),
        "large": {name: speeds[name] for name in large},
        "own": {f"{name} {'x'.join(map(str, own[name]))}": speeds[name] for name in own},
        "threads": torch.get_num_threads(),
    }


def _speed(size: tuple[int, int, int], make: Callable[..., Any], device: str, seconds: float = 0.5) -> float:
    import torch

    rows, columns, inner = size
    x, weight = make(rows, inner), make(columns, inner)

    def product() -> float:
        began = time.perf_counter()
        torch.nn.functional.linear(x, weight)
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        return time.perf_counter() - began

    for _ in range(3):
        product()
    end, best = time.perf_counter() + seconds, float("inf")
    while time.perf_counter() < end:
        best = min(best, product())
    return round(2 * rows * columns * inner / best / 1e9, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure matrix products; JSON on standard output.")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--shape", default="{}", help="JSON of the fields of peers.job.Shape")
    parser.add_argument("--rows", type=int, default=4096)
    given = parser.parse_args()
    print(json.dumps(gemm(given.device, given.precision, Shape(**json.loads(given.shape)), rows=given.rows)))


if __name__ == "__main__":
    main()
