"""OpenNMT-py 3.5: its training program on plain text; what it shares with Eole is in `onmt_family.py`.

It knows no other layers than pre-norm. `scaled-dot-flash` is torch's fused attention on a GPU; on the CPU
OpenNMT-py multiplies matrices itself.
"""

from __future__ import annotations

import sys
from typing import Any

from peers import onmt_family
from peers.job import Job
from peers.probe import main

FILL, prepare = onmt_family.FILL, onmt_family.prepare


def settings(job: Job) -> dict[str, Any]:
    shape = job.shape
    return {
        **onmt_family.data_settings(job),
        **onmt_family.update_settings(job),
        "save_model": f"{job.work}/model",
        **({"gpu_ranks": [0], "world_size": 1} if job.cuda else {}),
        # Its 16-bit training is fp16 with loss scaling; bf16 it does not train in.
        "model_dtype": "fp16" if job.precision == "bf16" else "fp32",
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
        "max_grad_norm": 0,
        "param_init": 0,
        "param_init_glorot": True,
        **job.settings,
    }


def train(job: Job) -> None:
    from onmt.bin.train import main as program
    from onmt.modules.position_ffn import PositionwiseFeedForward
    from onmt.trainer import Trainer

    onmt_family.train(
        job,
        settings(job),
        program=program,
        command=["onmt_train"],
        trainer=Trainer,
        step="_gradient_accumulation",
        feed_forward=PositionwiseFeedForward,
        after=lambda batch: batch["tgt"][:, 1:, 0],
        differs="; fp16 instead of bf16" if job.precision == "bf16" else "",
    )


if __name__ == "__main__":
    main(sys.modules[__name__])
