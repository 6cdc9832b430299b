"""How large everything is: on two CPU cores, on a GPU, and in tests of these programs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Sizes that all systems share, so that they differ in nothing but what is compared."""

    name: str
    templates: int = 0  # of the phrasebook that sentences are made of; 0: a corpus is given
    joined: int  # sentences of a training example, at most; at least one
    longer: tuple[int, ...]  # sentences of the examples that are longer than any in training
    examples: int  # to train on
    little: int  # the same where data is short
    tests: int  # examples of each length that is tested
    vocabulary: int  # pieces, of both languages together
    width: int
    layers: int  # of encoder and decoder each
    tokens: int  # of a batch
    steps: int
    little_steps: int
    deep: int  # times as many layers where depth is the question
    longest: int = 1024  # positions there are
    lengths: tuple[int, ...] = ()  # tokens of the sentences that speed is measured with
    rounds: int = 7  # of measuring speed

    @property
    def shorter(self) -> tuple[int, ...]:
        """Sentences of the test examples that are as long as those of training."""
        return tuple(range(1, self.joined + 1))


SCALES = {
    scale.name: scale
    for scale in (
        Scale(
            name="phrasebook",
            templates=28,
            joined=4,
            longer=(6, 8),
            examples=20_000,
            little=1_000,
            tests=100,
            vocabulary=800,
            width=64,
            layers=2,
            tokens=1024,
            steps=700,
            little_steps=350,
            deep=3,
            lengths=(8, 16, 32, 64, 128, 256),
        ),
        Scale(
            name="multi30k",
            joined=3,
            longer=(5, 7),
            examples=60_000,
            little=5_000,
            tests=400,
            vocabulary=8_000,
            width=256,
            layers=3,
            tokens=8_192,
            steps=8_000,
            little_steps=3_000,
            deep=4,
            lengths=(8, 16, 32, 64, 128, 256),
        ),
        Scale(
            name="toy",
            templates=3,
            joined=2,
            longer=(3,),
            examples=60,
            little=20,
            tests=3,
            vocabulary=160,
            width=16,
            layers=1,
            tokens=200,
            steps=3,
            little_steps=2,
            deep=2,
            lengths=(4, 8),
            rounds=2,
        ),
    )
}
