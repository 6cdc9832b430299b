"""fairseq's main branch, repaired for current Python by `install.py`: fairseq-train on binarised data.

`--max-tokens` counts as trmt does: the longer side with its padding, of the corpus sorted by length.
Dropout of attention and of the ReLU are 0, as fairseq's defaults.
"""

from __future__ import annotations

import sys
from typing import Any

from peers.job import Job
from peers.probe import Probe, main, padded_lengths

FILL = 0.829  # real target tokens in a token of its budget, on Multi30k German-English


def prepare(job: Job) -> None:
    """Binarise: the program's own way of not reading text while it trains."""
    from fairseq import options
    from fairseq_cli import preprocess

    words = "".join(f"{piece} 1\n" for piece in job.pieces)
    with open(f"{job.work}/dictionary.txt", "w", encoding="ascii") as file:
        file.write(words)
    prefix = f"{job.corpus}/train"
    arguments = ["--source-lang", "source", "--target-lang", "target", "--trainpref", prefix]
    arguments += [
        "--validpref",
        f"{job.corpus}/dev",
        "--destdir",
        f"{job.work}/binary",
        "--joined-dictionary",
    ]
    arguments += ["--srcdict", f"{job.work}/dictionary.txt", "--workers", "1"]
    preprocess.main(options.get_preprocessing_parser().parse_args(arguments))


def arguments(job: Job) -> list[str]:
    shape = job.shape
    words = [f"{job.work}/binary", "--task", "translation", "-s", "source", "-t", "target"]
    words += ["--arch", "transformer", "--share-all-embeddings"]
    for side, layers in (("encoder", shape.encoder_layers), ("decoder", shape.decoder_layers)):
        words += [f"--{side}-layers", str(layers), f"--{side}-embed-dim", str(shape.width)]
        words += [f"--{side}-ffn-embed-dim", str(shape.feed_forward)]
        words += [f"--{side}-attention-heads", str(shape.heads)]
    words += ["--dropout", str(shape.dropout), "--attention-dropout", "0", "--activation-dropout", "0"]
    words += ["--criterion", "label_smoothed_cross_entropy", "--label-smoothing", str(shape.label_smoothing)]
    words += ["--optimizer", "adam", "--adam-betas", "(0.9, 0.98)", "--lr", str(job.learning_rate)]
    words += ["--lr-scheduler", "inverse_sqrt", "--warmup-updates", "4000", "--clip-norm", "0"]
    words += ["--max-tokens", str(job.budget(FILL)), "--seed", str(job.seed)]
    words += ["--num-workers", str(job.options.get("workers", 0 if not job.cuda else 2))]
    words += ["--no-save", "--disable-validation", "--no-epoch-checkpoints", "--no-progress-bar"]
    words += ["--log-interval", "100", "--max-update", "1000000"]
    if not job.cuda:
        words.append("--cpu")
    elif job.precision == "bf16":
        words.append("--bf16")
    return words + job.arguments


def train(job: Job) -> None:
    from fairseq.tasks.fairseq_task import FairseqTask
    from fairseq_cli.train import cli_main

    told = arguments(job)
    probe = Probe(job, {"arguments": told, "counts": "max-tokens: the longer side, padding included"})
    step = FairseqTask.train_step

    def measured(self: Any, sample: Any, *rest: Any, **named: Any) -> Any:
        inputs, padding = sample["net_input"], self.target_dictionary.pad()
        target = sample["target"]
        probe.batch(
            inputs["src_lengths"],
            padded_lengths(target, padding),
            inputs["src_tokens"].numel(),
            target.numel(),
        )
        return step(self, sample, *rest, **named)

    FairseqTask.train_step = measured
    probe.install()
    sys.argv = ["fairseq-train", *told]
    cli_main()


if __name__ == "__main__":
    main(sys.modules[__name__])
