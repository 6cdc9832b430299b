"""Translation of files in parts, by workers on this machine or on a Ray cluster.

A part is a range of whole lines of one input file. Its translation is a file that appears when it is
complete; the concatenation of a file's parts is what `trmt translate` outputs for that file.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, cast

from trmt import console
from trmt.bundles import bundles
from trmt.bundles.bundles import Manifest
from trmt.config import Options
from trmt.errors import BundleError, ConfigError, DataError, TrmtError
from trmt.scale.partition import RESERVED, InputFile, cut_input, missing_parts, open_partition, part_name
from trmt.scale.parts import PartsOutcome, process_parts
from trmt.scale.pool import PoolFactory
from trmt.storage import files
from trmt.storage.compression import Decompressed, is_compressed
from trmt.storage.locks import exclusive
from trmt.streaming import translate_stream, window_size
from trmt.text.ranges import FileSlice, LineRange, open_slice, split_by_size, whole_file
from trmt.training.models import find_model
from trmt.translating import TranslateOptions, Translator

PART_MIB, GPU_PART_MIB = 1, 4  # of text, about ten thousand lines a MiB: what the death of a worker costs
# Search options that change the speed and not the translation; of the device only the type matters.
SPEED_OPTIONS = ("batch", "device", "runs")


@dataclass(frozen=True, kw_only=True)
class CorpusOptions(Options):
    """What to translate and how."""

    source: str
    """A file, or a folder whose files are all translated; a path or a URL for fsspec."""
    out: str
    """The folder of the parts."""
    model: Path | None = None
    """A bundle or run folder under a path that all workers see; None is the default model."""
    search: TranslateOptions = field(default_factory=TranslateOptions)
    """How to search and how to batch."""
    as_json: bool = False
    """Whether to write JSON lines with scores."""
    prefixed: bool = False
    """Whether lines are a source, a tab, and a prefix of the translation."""
    part_mib: float = PART_MIB
    """The size of a part, in MiB of source text."""
    trust_code: bool = False
    """Whether the bundle may name code outside trmt."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.part_mib > 0:
            raise ConfigError("--part-size must be more than 0 MiB")


@dataclass(frozen=True)
class TextPart:
    """Some lines of a file, and the file for their translations."""

    name: str
    slice: FileSlice
    out: str


@dataclass(frozen=True)
class TranslateParts:
    """The job of each worker: load the model with this checksum, then translate parts."""

    model: str
    weights: str
    options: CorpusOptions

    def load(self) -> Callable[[TextPart], dict[str, Any]]:
        """Load the model; returns the function that translates a part."""
        import torch

        torch.set_num_threads(1)
        folder = Path(self.model)
        if bundles.read_manifest(folder).weights.get("sha256") != self.weights:
            raise BundleError(
                f"{folder} has other weights on this machine than on the one that started the command; "
                "copy the bundle again"
            )
        translator = Translator.load(folder, options=self.options.search, trust_code=self.options.trust_code)
        return partial(_translate_part, translator, self.options)


def _translate_part(translator: Translator, options: CorpusOptions, part: TextPart) -> dict[str, Any]:
    """Translate a part; returns counts and times."""
    started, cpu_started = time.perf_counter(), time.process_time()
    with files.atomic_file(part.out) as out, _open_text(part.slice) as source:
        first = part.slice.range.first
        report = translate_stream(
            translator,
            source,
            out,
            as_json=options.as_json,
            prefixed=options.prefixed,
            lines_before=first,
            window=window_size([options.search.device], options.search.batch),
            interactive=False,
        )
        lines = report.lines - first
        assert part.slice.compressed or lines == part.slice.range.lines, "a line has no translation, or two"
    return {
        "lines": lines,
        "split": len(report.split),
        "undecodable": len(report.undecodable),
        "prefix_cut": len(report.prefix_cut),
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - cpu_started,
    }


@contextmanager
def _open_text(piece: FileSlice) -> Iterator[BinaryIO]:
    with open_slice(files.open_file(piece.path), piece) as raw:
        yield cast(BinaryIO, Decompressed(raw, piece.path)) if piece.compressed else raw


def translate_corpus(options: CorpusOptions, make_pool: PoolFactory) -> PartsOutcome:
    """Translate the parts that are missing; raises a TrmtError at the end if some of them failed.

    Workers are started only if a part is missing.
    """
    model = find_model(options.model).absolute()
    manifest = bundles.read_manifest(model)
    source, out = files.absolute(options.source), files.absolute(options.out)
    names = _input_files(source, out)
    with exclusive(out):
        files.remove_partials(out, recursive=True)
        partition = open_partition(
            out,
            "translate",
            _identity(options, manifest),
            names=names,
            cut=lambda: _cut_all(names, max(int(options.part_mib * 2**20), 1)),
        )
        parts = list(_parts(source, out, partition.inputs))
        missing = set(missing_parts(out, [part.name for part in parts]))
        todo = [part for part in parts if part.name in missing]
        if len(todo) < len(parts):
            console.say(f"{len(parts) - len(todo):,} of {len(parts):,} parts in {out} are already done")
        # A compressed file is a single part of any size, so the largest parts are started first.
        todo.sort(key=lambda part: part.slice.range.begin - part.slice.range.end)
        outcome = PartsOutcome()
        if todo:
            weights = str(manifest.weights.get("sha256", ""))
            with make_pool(TranslateParts(str(model), weights, options)) as pool:
                outcome = process_parts(todo, pool, title="translating", done_before=len(parts) - len(todo))
    _report(outcome, out)
    return outcome


def _input_files(source: str, out: str) -> list[str]:
    """The files to translate, in order."""
    if files.is_file(source):
        return [source]
    if out == source or out.startswith(files.join(source, "")):
        raise ConfigError(f"{out} is inside the input folder; choose an output folder outside of it")
    found = [name for name in files.list_files(source) if not _is_hidden(name)]
    if not found:
        raise DataError(f"{source} is neither a file nor a folder with files in it; check the path")
    for name in found:
        if name.partition("/")[0] in RESERVED:
            raise ConfigError(
                f"{files.join(source, name)} has a name that is reserved for the output folder; rename it"
            )
    return [files.join(source, name) for name in found]


def _is_hidden(name: str) -> bool:
    return any(component.startswith(".") for component in name.split("/"))


def _identity(options: CorpusOptions, manifest: Manifest) -> dict[str, Any]:
    """All options that determine the contents of the parts."""
    search = {key: value for key, value in asdict(options.search).items() if key not in SPEED_OPTIONS}
    model = {"weights": manifest.weights.get("sha256"), "tokenizer": manifest.tokenizer}
    return {
        "model": model,
        "search": search,
        "device": options.search.device.partition(":")[0],
        "json": options.as_json,
        "prefixed": options.prefixed,
        "part size": float(options.part_mib),
    }


def _cut_all(names: Sequence[str], size: int) -> list[InputFile]:
    with console.progress("cutting", len(names), unit="files") as bar, ThreadPoolExecutor() as threads:
        found = []
        for each in threads.map(lambda name: cut_input(name, partial(_cut, size=size)), names):
            found.append(each)
            bar.advance()
        return found


def _cut(name: str, size: int) -> list[LineRange]:
    compressed = is_compressed(name)
    with files.open_file(name) as stream:
        return [whole_file(stream)] if compressed else split_by_size(stream, size=size)


def _parts(source: str, out: str, inputs: Sequence[InputFile]) -> list[TextPart]:
    """The parts of each file, in a folder with its name; those of a single file directly in `out`."""
    parts = []
    for each in inputs:
        folder = "" if each.name == source else each.name[len(files.join(source, "x")) - 1 :] + "/"
        for number, one in enumerate(each.ranges):
            name = folder + part_name(number, len(each.ranges))
            piece = FileSlice(each.name, one, one.lines < 0)
            parts.append(TextPart(name, piece, files.join(out, name)))
    return parts


def _report(outcome: PartsOutcome, out: str) -> None:
    """Print totals and warnings; raise an error if parts failed."""
    totals = {
        key: sum(counts[key] for _, counts in outcome.done)
        for key in ("lines", "split", "undecodable", "prefix_cut")
    }
    for key, what in (
        ("split", "longer than anything in training, translated in pieces"),
        ("undecodable", "not valid UTF-8, undecodable bytes replaced"),
        ("prefix_cut", "with a prefix longer than any translation, prefix truncated"),
    ):
        if totals[key]:
            console.warn(f"lines {what}: {totals[key]:,}")
    if outcome.failed:
        name, why = next(iter(outcome.failed.items()))
        raise TrmtError(
            f"{len(outcome.failed):,} parts are missing in {out}, {name} because: {why}; all others are "
            "done, and the same command tries the missing ones again"
        )
    console.say(f"translated {totals['lines']:,} lines; all parts are in {out}")
