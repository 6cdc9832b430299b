"""trmt itself, by the same probe: `trmt.training.train` on its prepared set, as `trmt train` calls it."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Iterator
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
        "width": shape.width,
        "feed_forward": shape.feed_forward,
        "heads": shape.heads,
        "encoder_layers": shape.encoder_layers,
        "decoder_layers": shape.decoder_layers,
        "dropout": shape.dropout,
        "attention_dropout": 0.0,
        "norm_place": "post",
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
        "training.device": job.device,
        "training.precision": job.precision,
        "training.log_every": 100,
        "validation.every": 1_000_000,
        **job.settings,
    }
    return [f"{key}={json.dumps(value)}" for key, value in told.items()]


def train(job: Job) -> None:
    import torch

    from trmt.batches import Batches
    from trmt.learner import Learner
    from trmt.planning import TrainOptions
    from trmt.training import train as program

    run = Path(job.work, "run")
    shutil.rmtree(run, ignore_errors=True)
    base = Path(job.work, "base.toml")
    base.write_text('architecture = "transformer"\n[training]\nsteps = 1\n', encoding="ascii")
    told = settings(job)
    probe = Probe(job, {"recipe": job.recipe or "none: the defaults", "settings": told})
    waited = 0.0

    def lengths(examples: Any, side: str) -> torch.Tensor:
        return torch.from_numpy(examples.columns[side].lengths.astype("int64")) + 1

    learn, steps = Learner.learn, Batches.steps

    def measured(self: Any, examples: Any, step: int, *rest: Any, **named: Any) -> Any:
        learned = learn(self, examples, step, *rest, **named)
        probe.parameters = self.parameters
        for batch in examples:
            source, target = lengths(batch, "source.ids"), lengths(batch, "target.ids")
            probe.batch(source, target, int(source.max()), int(target.max()))
        probe.update()
        return learned

    def waiting(self: Any, *rest: Any, **named: Any) -> Iterator[Any]:
        nonlocal waited
        stream = steps(self, *rest, **named)
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

    Learner.learn, Batches.steps = measured, waiting
    probe.on_open = begin_to_count
    probe.extra["loader_wait_seconds"] = lambda: waited
    probe.install(optimiser_steps=False)
    program(TrainOptions(run=run, data=Path(job.data_set), recipe=job.recipe or str(base), settings=told))


if __name__ == "__main__":
    main(sys.modules[__name__])
