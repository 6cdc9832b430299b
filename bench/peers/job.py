"""What is to be trained and measured: the same for every toolkit; written as JSON, read by its process."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A Transformer of the paper's kind: post-norm, sinusoids, ReLU, all three embeddings one matrix."""

    width: int = 256
    feed_forward: int = 1024
    heads: int = 4
    encoder_layers: int = 3
    decoder_layers: int = 3
    vocabulary: int = 8000
    dropout: float = 0.1  # of embeddings and of each sublayer's output; nowhere else
    label_smoothing: float = 0.1


@dataclass(frozen=True, kw_only=True)
class Job:
    """One training process and how it is measured."""

    corpus: str  # folder: train.source, train.target, dev.source, dev.target, pieces.txt
    work: str  # folder that belongs to this toolkit
    report: str  # file the figures are written to
    shape: Shape = field(default_factory=Shape)
    data_set: str = ""  # trmt's prepared set, which the corpus was written from
    recipe: str = ""  # trmt's recipe
    batch_tokens: int = 4096  # trmt's budget: of the longer side, padding included
    real_tokens: int = 3420  # target tokens in an update of trmt's, on average: what the others aim at
    threads: int = 2
    device: str = "cpu"
    precision: str = "fp32"
    learning_rate: float = 5e-4
    seed: int = 1
    warmup_updates: int = 5
    warmup_seconds: float = 5.0
    seconds: float = 30.0  # length of the measured window, which ends with an update
    updates: int = 5  # the window has at least so many
    # A toolkit's own: `batch_tokens`, `workers`, `settings` or `arguments` laid over those of its adapter.
    options: dict[str, Any] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path | str) -> Job:
        tree = json.loads(Path(path).read_bytes())
        return cls(**{**tree, "shape": Shape(**tree["shape"])})

    @property
    def train(self) -> tuple[str, str]:
        """The training texts: pieces as words, one sentence a line."""
        return f"{self.corpus}/train.source", f"{self.corpus}/train.target"

    @property
    def dev(self) -> tuple[str, str]:
        return f"{self.corpus}/dev.source", f"{self.corpus}/dev.target"

    @property
    def pieces(self) -> list[str]:
        """Every piece that is no special symbol, most of them words of the corpus."""
        return Path(self.corpus, "pieces.txt").read_text(encoding="ascii").split()

    def budget(self, fill: float) -> int:
        """A toolkit's own budget in tokens of which a share of `fill` are real target tokens."""
        return int(self.options.get("batch_tokens", round(self.real_tokens / fill)))

    @property
    def settings(self) -> dict[str, Any]:
        return dict(self.options.get("settings", {}))

    @property
    def arguments(self) -> list[str]:
        return [str(word) for word in self.options.get("arguments", [])]

    @property
    def cuda(self) -> bool:
        return self.device.startswith("cuda")
