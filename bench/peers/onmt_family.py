"""What OpenNMT-py and Eole, which grew out of it, are told and how they are watched alike.

Their token batches count the longer side with padding, as trmt's do, and the target's beginning of sentence;
their sources have no end of sentence. The default bucket holds 262,144 pairs: a smaller corpus is read again
and again until it is full, so that batches of a small corpus have hardly any padding. Reading it takes
seconds every few hundred updates, which the warm-up hides.

Their layers are pre-norm, and they drop out the inner layer of the feed-forward with the same rate as
everything else: that one is exchanged for the identity after the network is built.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peers.job import Job
from peers.probe import Probe, padded_lengths

FILL = 0.899  # real target tokens in a token of their budget, on Multi30k German-English

SPECIALS = ["<unk>", "<blank>", "<s>", "</s>"]


def prepare(job: Job) -> None:
    Path(job.work, "vocabulary.txt").write_text("\n".join([*SPECIALS, *job.pieces]) + "\n", encoding="ascii")


def data_settings(job: Job) -> dict[str, Any]:
    source, target = job.train
    return {
        "data": {"corpus": {"path_src": source, "path_tgt": target, "transforms": [], "weight": 1}},
        "src_vocab": f"{job.work}/vocabulary.txt",
        "tgt_vocab": f"{job.work}/vocabulary.txt",
        "share_vocab": True,
        "src_vocab_size": job.shape.vocabulary,
        "tgt_vocab_size": job.shape.vocabulary,
        "vocab_size_multiple": 8,
        "overwrite": True,
        "seed": job.seed,
        "report_every": 100,
    }


def update_settings(job: Job) -> dict[str, Any]:
    return {
        "num_workers": job.options.get("workers", 0),
        "bucket_size": 262144,
        "batch_type": "tokens",
        "batch_size": job.budget(FILL),
        "batch_size_multiple": 8 if job.cuda else 1,
        "accum_count": [1],
        "normalization": "tokens",
        "optim": "adam",
        "adam_beta1": 0.9,
        "adam_beta2": 0.98,
        "learning_rate": job.learning_rate,
        "max_grad_norm": 0.0,
        "label_smoothing": job.shape.label_smoothing,
        "dropout": [job.shape.dropout],
        "attention_dropout": [0.0],
        "dropout_steps": [0],
        "train_steps": 1_000_000,
        "save_checkpoint_steps": 1_000_000,
        "valid_steps": 1_000_000,
    }


def train(
    job: Job,
    told: dict[str, Any],
    *,
    program: Callable[[], Any],
    command: list[str],
    trainer: Any,
    step: str,
    feed_forward: type,
    after: Callable[[Any], Any],
    differs: str = "",
) -> None:
    """Run `program` as `command`; the trainer's `step` gets batches, `after` finds a batch's targets."""
    probe = Probe(
        job,
        {
            "settings": told,
            "counts": "tokens: the longer side, padding and <s> included; sources have no </s>",
            "changed": "dropout of the inner feed-forward layer replaced by the identity",
            "differs": f"pre-norm; bias of the output{differs}",
        },
    )
    begin, take_step = trainer.train, getattr(trainer, step)

    def without_inner_dropout(self: Any, *rest: Any, **named: Any) -> Any:
        import torch

        for module in self.model.modules():
            if isinstance(module, feed_forward):
                module.dropout_1 = torch.nn.Identity()
        return begin(self, *rest, **named)

    def measured(self: Any, batches: Any, *rest: Any, **named: Any) -> Any:
        for batch in batches:
            targets = after(batch)
            lengths = padded_lengths(targets, self.train_loss.padding_idx)
            probe.batch(batch["srclen"], lengths, batch["src"].numel(), targets.numel())
        return take_step(self, batches, *rest, **named)

    trainer.train = without_inner_dropout
    setattr(trainer, step, measured)
    config = Path(job.work, "config.yaml")
    config.write_text(json.dumps(told), encoding="ascii")  # JSON is YAML
    probe.install()
    sys.argv = [*command, "-config", str(config)]
    program()
