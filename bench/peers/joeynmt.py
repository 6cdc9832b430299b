"""JoeyNMT 2.3: its training program on plain text.

Its token batches count the longer side with padding, as trmt's do, but it does not sort by length: to see as
many real target tokens in an update, its budget has to be larger. It drops
out attention and the inner layer of the feed-forward with the same rate as everything else and has no option
for that: here both are exchanged for the identity after the network is built, so that it computes no more
than the others.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from peers.job import Job
from peers.probe import Probe, main

FILL = 0.396  # real target tokens in a token of its budget, on Multi30k German-English


def prepare(job: Job) -> None:
    from pathlib import Path

    specials = ["<unk>", "<pad>", "<s>", "</s>"]
    Path(job.work, "vocabulary.txt").write_text("\n".join([*specials, *job.pieces]) + "\n", encoding="ascii")


def settings(job: Job) -> dict[str, Any]:
    shape = job.shape

    def side(name: str) -> dict[str, Any]:
        return {
            "lang": name,
            "level": "word",
            "lowercase": False,
            "voc_file": f"{job.work}/vocabulary.txt",
            "max_length": -1,
        }

    def stack(layers: int) -> dict[str, Any]:
        return {
            "type": "transformer",
            "num_layers": layers,
            "num_heads": shape.heads,
            "embeddings": {"embedding_dim": shape.width, "scale": True, "dropout": 0.0},
            "hidden_size": shape.width,
            "ff_size": shape.feed_forward,
            "dropout": shape.dropout,
            "layer_norm": "post",
        }

    return {
        "name": "peer",
        "joeynmt_version": "2.3.0",
        "model_dir": f"{job.work}/model",
        "use_cuda": job.cuda,
        "fp16": job.precision != "fp32",
        "random_seed": job.seed,
        "data": {
            "train": f"{job.corpus}/train",
            "dev": f"{job.corpus}/dev",
            "dataset_type": "plain",
            "src": side("source"),
            "trg": side("target"),
            "special_symbols": {
                "unk_token": "<unk>",
                "unk_id": 0,
                "pad_token": "<pad>",
                "pad_id": 1,
                "bos_token": "<s>",
                "bos_id": 2,
                "eos_token": "</s>",
                "eos_id": 3,
            },
        },
        "testing": {"beam_size": 1},
        "training": {
            "optimizer": "adam",
            "adam_betas": [0.9, 0.98],
            "learning_rate": job.learning_rate,
            "scheduling": "warmupinversesquareroot",
            "learning_rate_warmup": 4000,
            "normalization": "tokens",
            "label_smoothing": shape.label_smoothing,
            "batch_size": job.budget(FILL),
            "batch_type": "token",
            "batch_multiplier": 1,
            "num_workers": job.options.get("workers", 0),
            "epochs": 1000,
            "shuffle": True,
            "logging_freq": 100,
            "validation_freq": 1_000_000,
            "overwrite": True,
            **job.settings,
        },
        "model": {
            "initializer": "xavier_uniform",
            "bias_initializer": "zeros",
            "embed_initializer": "xavier_uniform",
            "tied_embeddings": True,
            "tied_softmax": True,
            "encoder": stack(shape.encoder_layers),
            "decoder": stack(shape.decoder_layers),
        },
    }


def train(job: Job) -> None:
    from pathlib import Path

    import torch
    from joeynmt.__main__ import main as program
    from joeynmt.training import TrainManager
    from joeynmt.transformer_layers import MultiHeadedAttention, PositionwiseFeedForward

    told = settings(job)
    probe = Probe(
        job,
        {
            "settings": told,
            "counts": "token: the longer side, padding included, sentences in random order",
            "changed": "dropout of attention and of the inner feed-forward layer replaced by the identity",
        },
    )
    begin, step = TrainManager.train_and_validate, TrainManager._train_step

    def without_inner_dropout(self: Any, *rest: Any, **named: Any) -> Any:
        for module in self.model.modules():
            if isinstance(module, MultiHeadedAttention):
                module.dropout = torch.nn.Identity()
            if isinstance(module, PositionwiseFeedForward):
                module.pwff_layer[2] = torch.nn.Identity()
        return begin(self, *rest, **named)

    def measured(self: Any, batch: Any) -> Any:
        target = batch.trg_mask.sum((1, 2))
        probe.batch(batch.src_length, target, batch.src.numel(), batch.trg.numel())
        return step(self, batch)

    TrainManager.train_and_validate, TrainManager._train_step = without_inner_dropout, measured
    config = Path(job.work, "config.yaml")
    config.write_text(json.dumps(told), encoding="ascii")  # JSON is YAML
    probe.install()
    sys.argv = ["joeynmt", "train", str(config), "--skip-test"]
    program()


if __name__ == "__main__":
    main(sys.modules[__name__])
