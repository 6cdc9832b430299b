"""Eole 0.6: its training program on plain text; what it shares with OpenNMT-py is in `onmt_family.py`.

Its layers are pre-norm because its decoder knows no other. Attention is torch's fused one on a GPU; on the
CPU Eole multiplies matrices itself. The entropy of attention, which it logs by default, is off.
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
        "n_sample": 0,
        "model": {
            "architecture": "transformer",
            "hidden_size": shape.width,
            "heads": shape.heads,
            "transformer_ff": shape.feed_forward,
            "share_embeddings": True,
            "share_decoder_embeddings": True,
            "add_qkvbias": True,
            "add_final_linear_bias": True,
            "add_ffnbias": True,
            "embeddings": {
                "word_vec_size": shape.width,
                "position_encoding": True,
                "position_encoding_type": "SinusoidalInterleaved",
            },
            "encoder": {"encoder_type": "transformer", "layers": shape.encoder_layers},
            "decoder": {"decoder_type": "transformer", "layers": shape.decoder_layers},
        },
        "training": {
            **onmt_family.update_settings(job),
            "gpu_ranks": [0] if job.cuda else [],
            "world_size": 1,
            "model_path": f"{job.work}/model",
            "compute_dtype": job.precision,
            "use_amp": True,
            "self_attn_backend": "flash",
            "log_attention_entropy": False,
            "prefetch_factor": 200,
            "decay_method": "none",
            "param_init_method": "xavier_uniform",
            "param_init": 0.0,
            **job.settings,
        },
    }


def train(job: Job) -> None:
    from eole.bin.main import main as program
    from eole.modules.transformer_mlp import MLP
    from eole.trainer import Trainer

    onmt_family.train(
        job,
        settings(job),
        program=program,
        command=["eole", "train"],
        trainer=Trainer,
        step="_train_step",
        feed_forward=MLP,
        after=lambda batch: batch["tgt"][:, 1:],
    )


if __name__ == "__main__":
    main(sys.modules[__name__])
