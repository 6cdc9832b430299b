"""What the tables in manifests and logs hold; they may have more keys, which stay as they are."""

from __future__ import annotations

from typing import Annotated, NotRequired, TypedDict

from trmt.config import MAX_BEAM, Count, Within


class StoredScore(TypedDict):
    """A score of the weights; there may be more keys."""

    metric: str
    value: float
    signature: NotRequired[str]


class GoldenSentence(TypedDict):
    """A sentence and its translation with the weights."""

    source: str
    translation: str
    reference: NotRequired[str]
    beam: NotRequired[Annotated[int, Within(1, MAX_BEAM)]]


class GuidedHeadFacts(TypedDict):
    """The attention head that was trained with guided alignment."""

    layer: Annotated[int, Within(-1000, 1000)]  # counted from 0, or from the last one, which is -1
    head: Annotated[int, Within(0, 1000)]
    shift: Annotated[int, Within(0, 1)]


class TrainingFacts(TypedDict, total=False):
    """What is known of the training; there may be more keys."""

    step: Count
    epoch: Count
    target_tokens: Count
    averaged: list[str]  # the names of the checkpoints
    imported: str  # the name of the model
    alignment: GuidedHeadFacts


class WeightsFile(TypedDict, total=False):
    """Size and checksum of the weights' file."""

    bytes: Count
    sha256: str
