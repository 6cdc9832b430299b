"""`trmt translate --input` and `trmt prepare --ray`: a corpus in parts, by workers here or on Ray."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trmt.preparing import PrepareOptions
    from trmt.scale.fleet import Fleets
    from trmt.translating import TranslateOptions


@dataclass(frozen=True)
class TextFiles:
    """What is translated, into what, and in which form."""

    source: str
    out: str
    part_mib: float | None
    as_json: bool
    prefixed: bool
    trust_code: bool


def translate(
    model: Path | None, options: TranslateOptions, files: TextFiles, *, ray: str | None, workers: int | None
) -> None:
    """Translate files in parts."""
    from trmt.scale.corpus_translating import PART_MIB, CorpusOptions, translate_corpus

    with _fleets(ray, workers, options.device) as (fleets, device):
        translate_corpus(
            CorpusOptions(
                source=files.source,
                out=files.out,
                model=model,
                search=replace(options, device=device),
                as_json=files.as_json,
                prefixed=files.prefixed,
                part_mib=PART_MIB if files.part_mib is None else files.part_mib,
                trust_code=files.trust_code,
            ),
            fleets,
        )


def prepare(options: PrepareOptions, *, ray: str, workers: int | None) -> None:
    """Prepare a set whose pairs are encoded in parts."""
    from trmt.scale.corpus_preparing import prepare_in_parts

    with _fleets(ray, workers, "cpu") as (fleets, _):
        prepare_in_parts(options, fleets)


@contextmanager
def _fleets(ray: str | None, workers: int | None, device: str) -> Iterator[tuple[Fleets, str]]:
    """What makes workers, and the device that each works with."""
    if ray is None:
        from trmt.engines.device import choose_device
        from trmt.scale.fleet import LocalFleet

        yield partial(LocalFleet, count=workers or 1), str(choose_device(device))
        return
    from trmt.scale.ray_fleet import connected

    with connected(ray, workers=workers) as cluster:
        gpu = device.startswith("cuda") or (device == "auto" and cluster.gpus > 0)
        yield partial(cluster.fleet, count=workers, gpu=gpu), "cuda" if gpu else "cpu"
