"""trmt itself, by the same probe: the command `trmt train` on its prepared set."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from peers.job import Job
from peers.probe import Probe, main


def prepare(job: Job) -> None:
    """Nothing to do: the prepared set is where the common corpus comes from."""


def settings(job: Job) -> list[str]:
    """What is laid over the recipe, or over the defaults where none is named."""
    shape = job.shape
    network = {
        "d_model": shape.width,
        "feed_forward": shape.feed_forward,
        "heads": shape.heads,
        "encoder_layers": shape.encoder_layers,
        "decoder_layers": shape.decoder_layers,
        "dropout": shape.dropout,
        "attention_dropout": 0.0,
        "norm_position": "post",
        "activation": "relu",
        "positions": "sinusoidal",
        "tied": "all",
    }
    told: dict[str, Any] = {} if job.recipe else {f"network.{key}": value for key, value in network.items()}
    if not job.recipe:
        told |= {"loss.label_smoothing": shape.label_smoothing, "batches.tokens": job.batch_tokens}
        told |= {"optim.lr": job.learning_rate}
    told |= {
        "training.steps": 1_000_000,
        "training.seed": job.seed,
        "training.precision": job.precision,
        "training.log_every": 100,
        "validation.every": 1_000_000,
        **job.settings,
    }
    return [f"{key}={json.dumps(value)}" for key, value in told.items()]


def train(job: Job) -> None:
    from trmt import cli

    run = Path(job.work, "run")
    shutil.rmtree(run, ignore_errors=True)
    base = Path(job.work, "base.toml")
    base.write_text('architecture = "transformer"\n[training]\nsteps = 1\n', encoding="ascii")
    told = ["train", str(run), "--data", job.data_set, "--recipe", job.recipe or str(base)]
    told += ["--device", job.device]
    for change in settings(job):
        told += ["--set", change]
    program = cli.app

    def listened_to() -> None:
        # Only now: the command line has things to settle before torch is loaded.
        listen(Probe(job, {"arguments": told}))
        program()

    cli.app = listened_to
    sys.argv = ["trmt", *told]
    cli.main()


def listen(probe: Probe) -> None:
    """Let the probe see every step, what its batches held, and how long the loop waited for them."""
    import torch

    from trmt.sets.batches import Batches
    from trmt.training import run

    train_step, steps = run.train_step, Batches.steps
    waited, cells, seen = 0.0, [0, 0], [0, 0]

    def lengths(examples: Any, side: str) -> Any:
        parts = [torch.from_numpy(one.columns[side].lengths.astype("int64")) + 1 for one in examples]
        return torch.cat(parts)

    def counted(net: Any, collate: Callable[..., Any]) -> Callable[..., Any]:
        """Collating as before; what the network will compute on is added to `cells`."""

        def collated(*given: Any, **named: Any) -> Any:
            batch = collate(*given, **named)
            for side, ragged in enumerate((batch.source, batch.before)):
                cells[side] += ragged.ids_N.numel() if net.packs_tokens else len(ragged) * ragged.longest
            return batch

        return collated

    def measured(state: Any, examples: Any) -> Any:
        if not probe.parameters:
            probe.parameters = state.parameter_count
            state.objective.collate = counted(state.net, state.objective.collate)
        result = train_step(state, examples)
        new = [now - before for now, before in zip(cells, seen, strict=True)]
        seen[:] = cells
        probe.batch(lengths(examples, "source.ids"), lengths(examples, "target.ids"), *new)
        probe.update()
        return result

    def waiting(self: Any, *given: Any, **named: Any) -> Iterator[Any]:
        nonlocal waited
        stream = steps(self, *given, **named)
        try:
            while True:
                began = time.perf_counter()
                item = next(stream)
                waited += time.perf_counter() - began
                yield item
        finally:
            stream.close()

    def begin_to_count() -> None:
        nonlocal waited
        waited = 0.0

    run.train_step, Batches.steps = measured, waiting
    probe.on_open = begin_to_count
    probe.extra["loader_wait_seconds"] = lambda: waited
    probe.install(optimiser_steps=False)


if __name__ == "__main__":
    main(sys.modules[__name__])
