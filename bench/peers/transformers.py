"""Hugging Face's Seq2SeqTrainer with a Marian model.

The trainer counts batches in sentences and groups sentences of like length (`group_by_length`, the longer
side); the number of sentences is chosen so that an update sees as many real target tokens as the others'
Marian is post-norm with sinusoids; its attention is torch's fused one.
Its own activation is swish, here ReLU as everywhere. Label smoothing is that of the trainer, outside the
model.
"""

from __future__ import annotations

import inspect
import sys
from typing import Any

from peers.job import Job
from peers.probe import Probe, main

PAD, UNK, BOS, EOS = 0, 1, 2, 3


def prepare(job: Job) -> None:
    """Ids as arrays: nothing is tokenised while it trains."""
    import datasets

    numbers = {piece: number + 4 for number, piece in enumerate(job.pieces)}

    def read(path: str) -> list[list[int]]:
        with open(path, encoding="ascii") as file:
            return [[numbers[word] for word in line.split()] + [EOS] for line in file]

    source, target = map(read, job.train)
    longest = [max(len(one), len(other)) for one, other in zip(source, target, strict=True)]
    columns = {"input_ids": source, "labels": target, "length": longest}
    datasets.Dataset.from_dict(columns).save_to_disk(f"{job.work}/data")


def sentences(job: Job) -> int:
    """How many sentences hold as many target tokens as an update should."""
    with open(job.train[1], encoding="ascii") as file:
        lengths = [line.count(" ") + 2 for line in file]
    return round(job.real_tokens * len(lengths) / sum(lengths))


def settings(job: Job) -> dict[str, dict[str, Any]]:
    shape = job.shape
    model = {
        "vocab_size": shape.vocabulary,
        "decoder_vocab_size": shape.vocabulary,
        "d_model": shape.width,
        "encoder_layers": shape.encoder_layers,
        "decoder_layers": shape.decoder_layers,
        "encoder_attention_heads": shape.heads,
        "decoder_attention_heads": shape.heads,
        "encoder_ffn_dim": shape.feed_forward,
        "decoder_ffn_dim": shape.feed_forward,
        "dropout": shape.dropout,
        "attention_dropout": 0.0,
        "activation_dropout": 0.0,
        "activation_function": "relu",
        "max_position_embeddings": 512,
        "share_encoder_decoder_embeddings": True,
        "tie_word_embeddings": True,
        "scale_embedding": True,
        "use_cache": False,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "forced_eos_token_id": None,
        "decoder_start_token_id": BOS,
    }
    training = {
        "output_dir": f"{job.work}/model",
        "per_device_train_batch_size": sentences(job),
        "train_sampling_strategy": "group_by_length",
        "length_column_name": "length",
        "label_smoothing_factor": shape.label_smoothing,
        "learning_rate": job.learning_rate,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch_fused",
        "adam_beta2": 0.98,
        "weight_decay": 0.0,
        "max_grad_norm": 0.0,
        "max_steps": 1_000_000,
        "logging_steps": 100,
        "save_strategy": "no",
        "report_to": "none",
        "seed": job.seed,
        "dataloader_num_workers": job.options.get("workers", 0 if not job.cuda else 2),
        "use_cpu": not job.cuda,
        "bf16": job.precision == "bf16",
        "remove_unused_columns": True,
        "disable_tqdm": True,
        **job.settings,
    }
    return {"model": model, "training": training, "collator": {"pad_to_multiple_of": 8 if job.cuda else None}}


def train(job: Job) -> None:
    import datasets
    import torch
    from transformers import MarianConfig, MarianMTModel, Seq2SeqTrainer, Seq2SeqTrainingArguments

    told = settings(job)
    torch.manual_seed(job.seed)
    model = MarianMTModel(MarianConfig(**told["model"]))
    attention = model.config._attn_implementation
    multiple = told["collator"]["pad_to_multiple_of"] or 1
    configuration = told | {
        "counts": "sentences",
        "attention": attention,
        "differs": "grouped by the longer side, batches of equally many sentences",
    }
    probe = Probe(job, configuration)

    def padded(rows: list[list[int]], padding: int) -> torch.Tensor:
        width = -(-max(map(len, rows)) // multiple) * multiple
        return torch.tensor([row + [padding] * (width - len(row)) for row in rows])

    def collate(examples: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        source, target = ([one[name] for one in examples] for name in ("input_ids", "labels"))
        ids, labels = padded(source, PAD), padded(target, -100)
        before = torch.where(labels == -100, PAD, labels).roll(1, 1)
        before[:, 0] = BOS
        return {
            "input_ids": ids,
            "attention_mask": (ids != PAD).long(),
            "decoder_input_ids": before,
            "labels": labels,
        }

    class Measured(Seq2SeqTrainer):
        def training_step(self, model: Any, inputs: Any, *rest: Any, **named: Any) -> Any:
            labels = inputs["labels"]
            source, target = inputs["attention_mask"].sum(1), (labels != -100).sum(1)
            probe.batch(source, target, inputs["input_ids"].numel(), labels.numel())
            return super().training_step(model, inputs, *rest, **named)

    training = dict(told["training"])
    if "train_sampling_strategy" not in inspect.signature(Seq2SeqTrainingArguments).parameters:
        # Its name before version 5.
        training["group_by_length"] = training.pop("train_sampling_strategy") == "group_by_length"
    trainer = Measured(
        model=model,
        args=Seq2SeqTrainingArguments(**training),
        train_dataset=datasets.load_from_disk(f"{job.work}/data"),
        data_collator=collate,
    )
    probe.install()
    trainer.train()


if __name__ == "__main__":
    main(sys.modules[__name__])
