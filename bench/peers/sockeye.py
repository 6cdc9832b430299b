"""Sockeye 3.1: its training program on data prepared by its own preparation, traced by torch.jit as it does.

`max-word` counts the target with padding up to the bucket's width; buckets are two tokens wide (8, its
default, on a GPU), which leaves less padding. Post-norm as in the paper; dropout of attention and of the ReLU
are 0.
"""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

from peers.job import Job
from peers.probe import Probe, main, padded_lengths

FILL = 0.90  # real target tokens in a token of its budget, on Multi30k German-English

SPECIALS = ["<pad>", "<unk>", "<s>", "</s>"]


def prepare(job: Job) -> None:
    vocabulary = Path(job.work, "vocabulary.json")
    vocabulary.write_text(
        json.dumps({word: number for number, word in enumerate([*SPECIALS, *job.pieces])}), encoding="ascii"
    )
    source, target = job.train
    sys.argv = ["sockeye-prepare-data", "--source", source, "--target", target]
    sys.argv += ["--source-vocab", str(vocabulary), "--target-vocab", str(vocabulary)]
    sys.argv += ["--shared-vocab", "--output", f"{job.work}/prepared", "--max-seq-len", LONGEST]
    sys.argv += ["--bucket-width", "8" if job.cuda else "2", "--max-processes", "1"]
    runpy.run_module("sockeye.prepare_data", run_name="__main__")


LONGEST = "256:256"


def arguments(job: Job) -> list[str]:
    shape = job.shape
    source, target = job.dev
    words = ["--prepared-data", f"{job.work}/prepared", "--output", f"{job.work}/model", "--overwrite-output"]
    words += ["--validation-source", source, "--validation-target", target, "--shared-vocab"]
    words += ["--encoder", "transformer", "--decoder", "transformer"]
    words += ["--num-layers", f"{shape.encoder_layers}:{shape.decoder_layers}"]
    words += ["--transformer-model-size", str(shape.width), "--num-embed", str(shape.width)]
    words += ["--transformer-attention-heads", str(shape.heads)]
    words += ["--transformer-feed-forward-num-hidden", str(shape.feed_forward)]
    words += ["--transformer-positional-embedding-type", "fixed"]
    words += ["--transformer-preprocess", ":", "--transformer-postprocess", "drn:drn"]
    words += ["--weight-tying-type", "src_trg_softmax", "--max-seq-len", LONGEST]
    words += ["--embed-dropout", str(shape.dropout), "--transformer-dropout-prepost", str(shape.dropout)]
    words += ["--transformer-dropout-attention", "0", "--transformer-dropout-act", "0"]
    words += ["--label-smoothing", str(shape.label_smoothing), "--label-smoothing-impl", "torch"]
    words += ["--batch-type", "max-word", "--batch-size", str(job.budget(FILL))]
    words += ["--batch-sentences-multiple-of", "8" if job.cuda else "1", "--update-interval", "1"]
    words += ["--optimizer", "adam", "--optimizer-betas", "0.9:0.98"]
    words += ["--initial-learning-rate", str(job.learning_rate), "--learning-rate-scheduler-type", "none"]
    words += ["--gradient-clipping-type", "none", "--seed", str(job.seed)]
    words += ["--checkpoint-interval", "1000000", "--max-updates", "1000000", "--decode-and-evaluate", "0"]
    if not job.cuda:
        words.append("--use-cpu")
    elif job.precision == "bf16":
        words.append("--amp")  # fp16: it knows no bf16 without DeepSpeed
    return words + job.arguments


def train(job: Job) -> None:
    from sockeye import constants
    from sockeye.train import main as program
    from sockeye.training import EarlyStoppingTrainer

    told = arguments(job)
    probe = Probe(
        job,
        {
            "arguments": told,
            "counts": "max-word: the target's bucket width, padding included",
            "differs": "bias of the output, none in attention"
            + ("; fp16 instead of bf16" if job.precision == "bf16" else ""),
        },
    )
    step = EarlyStoppingTrainer._step

    def measured(self: Any, batch: Any) -> Any:
        labels = batch.labels[constants.TARGET_LABEL_NAME]
        lengths = padded_lengths(labels, constants.PAD_ID)
        probe.batch(batch.source_length[:, 0], lengths, batch.source[:, :, 0].numel(), labels.numel())
        return step(self, batch)

    EarlyStoppingTrainer._step = measured
    probe.install()
    sys.argv = ["sockeye-train", *told]
    program()


if __name__ == "__main__":
    main(sys.modules[__name__])
