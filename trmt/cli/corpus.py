"""`trmt translate --input` and `trmt prepare --ray`: corpora in parts, by processes or on a Ray cluster."""

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
    """The files to translate, the output folder, and the format."""

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

    pool = _ray_pool(ray, workers, options.device) if ray else _process_pool(workers, options.device)
    with pool as (make_pool, device):
        default = GPU_PART_MIB if device == "cuda" else PART_MIB
        translate_corpus(
            CorpusOptions(
                source=files.source,
                out=files.out,
                model=model,
                search=replace(options, device=device),
                as_json=files.as_json,
                prefixed=files.prefixed,
                part_mib=default if files.part_mib is None else files.part_mib,
                trust_code=files.trust_code,
            ),
            make_pool,
        )


def prepare(options: PrepareOptions, *, ray: str, workers: int | None) -> None:
    """Prepare a set whose training pairs are encoded in parts on a Ray cluster."""
    from trmt.scale.corpus_preparing import prepare_in_parts

    with _ray_pool(ray, None if workers is None else str(workers), "cpu") as (make_pool, _):
        prepare_in_parts(options, make_pool)


@contextmanager
def _process_pool(workers: str | None, device: str) -> Iterator[tuple[PoolFactory, str]]:
    """A factory of pools on this machine, and the type of their devices."""
    from trmt.scale.devices import devices_for
    from trmt.scale.pool import ProcessPool

    devices = devices_for(device, workers)
    yield partial(ProcessPool, devices=devices), devices[0].partition(":")[0]


@contextmanager
def _ray_pool(address: str, workers: str | None, device: str) -> Iterator[tuple[PoolFactory, str]]:
    """A factory of pools on a Ray cluster, and the type of their devices."""
    from trmt.errors import ConfigError
    from trmt.scale.devices import ALL, worker_count
    from trmt.scale.ray_pool import ray_cluster

    if device not in ("auto", "cpu", "cuda", ALL):
        raise ConfigError(
            f"--device {device} cannot be used with --ray, which assigns the GPUs; write cpu, cuda or auto"
        )
    count = None if workers is None else worker_count(workers)
    with ray_cluster(address, workers=count) as cluster:
        gpu = device in ("cuda", ALL) or (device == "auto" and cluster.gpus > 0)
        yield partial(cluster.pool, count=count, gpu=gpu), "cuda" if gpu else "cpu"
