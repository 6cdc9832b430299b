"""Hugging Face's `generate` on a Marian model, with what `trmt export --to huggingface` wrote.

Sentences of a call are padded together; those of a whole file are sorted by length first, as its users do.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from translators.meter import Meter
from translators.server import BEGAN, How, Pieces, neighbours, serve


class Transformers:
    """`generate`, given ids."""

    def __init__(self, model: str, compute: str, threads: int, device: str = "cpu") -> None:
        import torch
        import transformers
        from transformers import MarianMTModel

        torch.set_num_threads(threads)
        transformers.logging.set_verbosity_error()
        self.version = transformers.__version__
        self.torch = torch
        self.meter, kind = Meter(device), {"fp32": torch.float32, "bf16": torch.bfloat16}[compute]
        self.model = MarianMTModel.from_pretrained(model).eval().to(device, kind)
        self.ids = json.loads((Path(model) / "vocab.json").read_bytes())
        self.pieces = {number: piece for piece, number in self.ids.items()}
        config = self.model.generation_config
        config.forced_eos_token_id = None  # it would be one of the pieces that are asked for
        self.special = {config.pad_token_id, config.eos_token_id, config.decoder_start_token_id}

    def translate(self, sentences: list[Pieces], how: How) -> Iterator[tuple[int, Pieces]]:
        self.meter.watch(how)
        for numbers in neighbours(sentences, how.batch):
            found = self._together([sentences[number] for number in numbers], how)
            yield from zip(numbers, found, strict=True)

    def _together(self, sentences: list[Pieces], how: How) -> list[Pieces]:
        torch, config = self.torch, self.model.generation_config
        rows = [[*map(self.ids.__getitem__, source), config.eos_token_id] for source in sentences]
        width = max(map(len, rows))
        device = self.model.device
        ids = torch.tensor([row + [config.pad_token_id] * (width - len(row)) for row in rows], device=device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
        # One length for all: that of the longest.
        forced = max(how.least(source) for source in sentences)
        lengths = {"min_new_tokens": forced} if forced else {}
        with torch.inference_mode():
            out = self.model.generate(
                ids,
                attention_mask=mask,
                num_beams=how.beam,
                do_sample=False,
                length_penalty=how.power,
                early_stopping=False,
                max_length=None,
                max_new_tokens=max(how.limit(source) for source in sentences),
                **lengths,
            )
        return [
            [self.pieces[token] for token in row if token not in self.special] for row in out[:, 1:].tolist()
        ]

    def more(self) -> dict[str, Any]:
        """The memory that it took."""
        return self.meter.figures()


if __name__ == "__main__":
    serve(Transformers, BEGAN)
