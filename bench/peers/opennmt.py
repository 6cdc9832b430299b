"""OpenNMT-py 3.5: its training program on plain text.

Its token batches count the longer side with padding, as trmt's do, and the target's beginning of sentence;
its sources have no end of sentence. The default bucket holds 262,144 pairs: a smaller corpus is read again
and again until it is full, so that batches of a small corpus have hardly any padding. Reading it takes
seconds every few hundred updates, which the warm-up hides.

Its layers are pre-norm (it knows no other), and it drops out the inner layer of the feed-forward with the
same rate as everything else: that one is exchanged for the identity after the network is built.
`scaled-dot-flash` is torch's fused attention on a GPU; on the CPU OpenNMT-py multiplies matrices itself.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from peers.job import Job
from peers.probe import Probe, main, padded_lengths

FILL = 0.899  # real target tokens in a token of its budget, on Multi30k German-English

SPECIALS = ["<unk>", "<blank>", "<s>", "</s>"]


def prepare(job: Job) -> None:
    Path(job.work, "vocabulary.txt").write_text("\n".join([*SPECIALS, *job.pieces]) + "\n", encoding="ascii")


def settings(job: Job) -> dict[str, Any]:
    shape = job.shape
    source, target = job.train
    cuda = {"gpu_ranks": [0], "world_size": 1} if job.cuda else {}
    # Its 16-bit training is fp16 with loss scaling; bf16 it does not train in.
    half = {"model_dtype": "fp16"} if job.precision == "bf16" else {"model_dtype": "fp32"}
    return {
        "data": {"corpus": {"path_src": source, "path_tgt": target, "transforms": [], "weight": 1}},
        "src_vocab": f"{job.work}/vocabulary.txt",
        "tgt_vocab": f"{job.work}/vocabulary.txt",
        "share_vocab": True,
        "src_vocab_size": shape.vocabulary,
        "tgt_vocab_size": shape.vocabulary,
        "vocab_size_multiple": 8,
        "save_model": f"{job.work}/model",
        "overwrite": True,
        "seed": job.seed,
        "report_every": 100,
        **cuda,
        **half,
        "encoder_type": "transformer",
        "decoder_type": "transformer",
        "hidden_size": shape.width,
        "word_vec_size": shape.width,
        "transformer_ff": shape.feed_forward,
        "heads": shape.heads,
        "enc_layers": shape.encoder_layers,
        "dec_layers": shape.decoder_layers,
        "position_encoding": True,
        "share_embeddings": True,
        "share_decoder_embeddings": True,
        "add_qkvbias": True,
        "add_ffnbias": True,
        "self_attn_type": "scaled-dot-flash",
        "dropout": [shape.dropout],
        "attention_dropout": [0.0],
        "dropout_steps": [0],
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
        "max_grad_norm": 0,
        "label_smoothing": shape.label_smoothing,
        "param_init": 0,
        "param_init_glorot": True,
        "train_steps": 1_000_000,
        "save_checkpoint_steps": 1_000_000,
        "valid_steps": 1_000_000,
        **job.settings,
    }


def train(job: Job) -> None:
    import torch
    from onmt.bin.train import main as program
    from onmt.modules.position_ffn import PositionwiseFeedForward
    from onmt.trainer import Trainer

    told = settings(job)
    probe = Probe(
        job,
        {
            "settings": told,
            "counts": "tokens: the longer side, padding and <s> included; sources have no </s>",
            "changed": "dropout of the inner feed-forward layer replaced by the identity",
            "differs": "pre-norm; bias of the output"
            + ("; fp16 instead of bf16" if job.precision == "bf16" else ""),
        },
    )
    begin, step = Trainer.train, Trainer._gradient_accumulation

    def without_inner_dropout(self: Any, *rest: Any, **named: Any) -> Any:
        for module in self.model.modules():
            if isinstance(module, PositionwiseFeedForward):
                module.dropout_1 = torch.nn.Identity()
        return begin(self, *rest, **named)

    def measured(self: Any, batches: Any, *rest: Any, **named: Any) -> Any:
        for batch in batches:
            after = batch["tgt"][:, 1:, 0]
            lengths = padded_lengths(after, self.train_loss.padding_idx)
            probe.batch(batch["srclen"], lengths, batch["src"].numel(), after.numel())
        return step(self, batches, *rest, **named)

    Trainer.train, Trainer._gradient_accumulation = without_inner_dropout, measured
    config = Path(job.work, "config.yaml")
    config.write_text(json.dumps(told), encoding="ascii")  # JSON is YAML
    probe.install()
    sys.argv = ["onmt_train", "-config", str(config)]
    program()


if __name__ == "__main__":
    main(sys.modules[__name__])
