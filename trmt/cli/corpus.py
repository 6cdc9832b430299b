"""`trmt translate --input` and `trmt prepare --ray`: a corpus in parts, by workers here or on Ray."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trmt.scale.pool import PoolFactory
    from trmt.sets.preparing import PrepareOptions
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
    model: Path | None, options: TranslateOptions, files: TextFiles, *, ray: str | None, workers: str | None
) -> None:
    """Translate files in parts."""
    from trmt.scale.corpus_translating import GPU_PART_MIB, PART_MIB, CorpusOptions, translate_corpus

    with (
        _on_ray(ray, workers, options.device) if ray else _here(workers, options.device) as (
            make_pool,
            device,
        )
    ):
        usual = GPU_PART_MIB if device == "cuda" else PART_MIB
        translate_corpus(
            CorpusOptions(
                source=files.source,
                out=files.out,
                model=model,
                search=replace(options, device=device),
                as_json=files.as_json,
                prefixed=files.prefixed,
                part_mib=usual if files.part_mib is None else files.part_mib,
                trust_code=files.trust_code,
            ),
            make_pool,
        )


def prepare(options: PrepareOptions, *, ray: str, workers: int | None) -> None:
    """Prepare a set whose pairs are encoded in parts."""
    from trmt.scale.corpus_preparing import prepare_in_parts

    with _on_ray(ray, None if workers is None else str(workers), "cpu") as (make_pool, _):
        prepare_in_parts(options, make_pool)


@contextmanager
def _here(workers: str | None, asked: str) -> Iterator[tuple[PoolFactory, str]]:
    """What makes workers on this machine, and the kind of device that each works with."""
    from trmt.scale.devices import devices_for
    from trmt.scale.pool import ProcessPool

    devices = devices_for(asked, workers)
    yield partial(ProcessPool, devices=devices), devices[0].partition(":")[0]


@contextmanager
def _on_ray(address: str, workers: str | None, asked: str) -> Iterator[tuple[PoolFactory, str]]:
    """What makes workers on a Ray cluster, and the kind of device that each works with."""
    from trmt.errors import ConfigError
    from trmt.scale.devices import ALL, worker_count
    from trmt.scale.ray_pool import ray_cluster

    if asked not in ("auto", "cpu", "cuda", ALL):
        raise ConfigError(f"--device {asked} is for Ray to choose; write cpu, cuda or auto beside --ray")
    count = None if workers is None else worker_count(workers)
    with ray_cluster(address, workers=count) as cluster:
        gpu = asked in ("cuda", ALL) or (asked == "auto" and cluster.gpus > 0)
        yield partial(cluster.pool, count=count, gpu=gpu), "cuda" if gpu else "cpu"
