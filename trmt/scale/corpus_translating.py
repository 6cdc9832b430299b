"""A corpus of files, translated in parts by workers that may be anywhere.

Each part is a range of whole lines of one file, and becomes a file of its own, which is there when it is
complete: `cat` of a file's parts is what `trmt translate` makes of the file.
"""

from __future__ import annotations

import gzip
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, cast

from trmt import console
from trmt.bundles import bundles
from trmt.bundles.bundles import Manifest
from trmt.errors import BundleError, ConfigError, DataError, TrmtError
from trmt.scale.devices import window_for
from trmt.scale.fleet import Fleets, Outcome, work_through
from trmt.scale.partition import RESERVED, Input, begun, measured, missing, part_name
from trmt.storage import files
from trmt.storage.locks import exclusive
from trmt.streaming import translate_stream
from trmt.text.ranges import FileSlice, LineRange, open_slice, split_by_size, whole_file
from trmt.translating import TranslateOptions, Translator, find_model

PART_MIB, GPU_PART_MIB = 1, 4  # of text: ten thousand lines a MiB, which is what a dead worker can lose
# What changes how fast a translation is there, but not the translation; of the device, only the kind does.
NO_MATTER = ("batch", "device", "engine")


@dataclass(frozen=True, kw_only=True)
class CorpusOptions:
    """What to translate, and into what."""

    source: str
    """A file, or a folder whose files are all translated; a path or a URL that fsspec knows."""
    out: str
    """The folder of the parts."""
    model: Path | None = None
    """The bundle or run folder, which every worker must see there; by itself the default one."""
    search: TranslateOptions = field(default_factory=TranslateOptions)
    """How to search and how to batch."""
    as_json: bool = False
    """Whether to write JSON lines with scores."""
    prefixed: bool = False
    """Whether lines are a source, a tab, and what the translation begins with."""
    part_mib: float = PART_MIB
    """How much text makes a part, in MiB."""
    trust_code: bool = False
    """Whether the bundle may name code outside trmt."""

    def __post_init__(self) -> None:
        if not self.part_mib > 0:
            raise ConfigError("--part-size is more than 0 MiB")


@dataclass(frozen=True)
class TextPart:
    """Some lines of a file, and where their translations go."""

    name: str
    slice: FileSlice
    out: str


@dataclass(frozen=True)
class TranslateJob:
    """What a worker loads: a network, known by its checksum."""

    model: str
    weights: str
    options: CorpusOptions

    def begun(self) -> Callable[[TextPart], dict[str, Any]]:
        """What translates one part after the other."""
        import torch

        torch.set_num_threads(1)
        place = Path(self.model)
        found = bundles.read_manifest(place).weights.get("sha256")
        if found != self.weights:
            raise BundleError(
                f"{place} holds other weights there than where the work was begun; copy the bundle again"
            )
        translator = Translator.load(place, options=self.options.search, trust_code=self.options.trust_code)
        return partial(_translated, translator, self.options)


def _translated(translator: Translator, options: CorpusOptions, part: TextPart) -> dict[str, Any]:
    """Translate a part, and say what is worth knowing of it."""
    began, worked = time.perf_counter(), time.process_time()
    with files.atomic_file(part.out) as out, _text(part.slice) as source:
        first = part.slice.range.first
        try:
            report = translate_stream(
                translator,
                source,
                out,
                as_json=options.as_json,
                prefixed=options.prefixed,
                before=first,
                window=window_for([options.search.device], options.search.batch),
                waited_for=False,
            )
        except (EOFError, gzip.BadGzipFile) as error:
            raise DataError(f"{part.slice.path} is damaged ({error}); fetch or pack it again") from error
        lines = report.lines - first
        assert part.slice.compressed or lines == part.slice.range.lines, "a line has no translation, or two"
    return {
        "lines": lines,
        "split": len(report.split),
        "undecodable": len(report.undecodable),
        "prefix_cut": len(report.prefix_cut),
        "seconds": time.perf_counter() - began,
        "cpu_seconds": time.process_time() - worked,
    }


def _text(place: FileSlice) -> BinaryIO:
    raw = open_slice(files.open_file(place.path), place)
    return cast(BinaryIO, gzip.GzipFile(fileobj=raw)) if place.compressed else raw


def translate_corpus(options: CorpusOptions, fleets: Fleets) -> Outcome:
    """Translate what has no translation yet; a TrmtError at the end if some parts could not be done.

    The workers are begun only if there is something to do.
    """
    model = find_model(options.model).absolute()
    manifest = bundles.read_manifest(model)
    source, out = files.absolute(options.source), files.absolute(options.out)
    names = _inputs(source, out)
    with exclusive(out):
        files.remove_partials(out, recursive=True)
        partition = begun(
            out,
            "translate",
            _decisive(options, manifest),
            names=names,
            cut=lambda: _cut_all(names, max(int(options.part_mib * 2**20), 1)),
        )
        parts = list(_parts(source, out, partition.inputs))
        wanted = set(missing(out, [part.name for part in parts]))
        todo = [part for part in parts if part.name in wanted]
        if len(todo) < len(parts):
            console.say(f"{len(parts) - len(todo):,} of {len(parts):,} parts in {out} are there already")
        # A packed file is one part however long it is, so it had better not be begun last.
        todo.sort(key=lambda part: part.slice.range.begin - part.slice.range.end)
        outcome = Outcome()
        if todo:
            weights = str(manifest.weights.get("sha256", ""))
            with fleets(TranslateJob(str(model), weights, options)) as fleet:
                outcome = work_through(todo, fleet, title="translating", before=len(parts) - len(todo))
    _tell(outcome, out)
    return outcome


def _inputs(source: str, out: str) -> list[str]:
    """The files to translate, in order."""
    if files.is_file(source):
        return [source]
    if out == source or out.startswith(files.join(source, "")):
        raise ConfigError(f"{out} is in the folder that is translated; choose an output folder beside it")
    found = [name for name in files.list_files(source) if not _hidden(name)]
    if not found:
        raise DataError(f"there is no file {source}, and no folder of that name with files in it")
    for name in found:
        if name.partition("/")[0] in RESERVED:
            raise ConfigError(
                f"{files.join(source, name)} is called like a file of ours; give it another name"
            )
    return [files.join(source, name) for name in found]


def _hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


def _decisive(options: CorpusOptions, manifest: Manifest) -> dict[str, Any]:
    """All options that decide what the parts hold."""
    search = {key: value for key, value in asdict(options.search).items() if key not in NO_MATTER}
    model = {"weights": manifest.weights.get("sha256"), "tokenizer": manifest.tokenizer}
    return {
        "model": model,
        "search": search,
        "device": options.search.device.partition(":")[0],
        "json": options.as_json,
        "prefixed": options.prefixed,
        "part size": float(options.part_mib),
    }


def _cut_all(names: Sequence[str], size: int) -> list[Input]:
    with console.progress("cutting", len(names), unit="files") as bar, ThreadPoolExecutor() as threads:
        found = []
        for each in threads.map(lambda name: measured(name, partial(_cut, size=size)), names):
            found.append(each)
            bar.advance()
        return found


def _cut(name: str, size: int) -> list[LineRange]:
    with files.open_file(name) as stream:
        return [whole_file(stream)] if _packed(name) else split_by_size(stream, size=size)


def _packed(name: str) -> bool:
    return name.lower().endswith(".gz")


def _parts(source: str, out: str, inputs: Sequence[Input]) -> list[TextPart]:
    """The parts of each file, in a folder called as it is; a single file has no folder of its own."""
    parts = []
    for each in inputs:
        folder = "" if each.name == source else each.name[len(files.join(source, "x")) - 1 :] + "/"
        for number, one in enumerate(each.ranges):
            name = folder + part_name(number, len(each.ranges))
            parts.append(TextPart(name, FileSlice(each.name, one, _packed(each.name)), files.join(out, name)))
    return parts


def _tell(outcome: Outcome, out: str) -> None:
    """What was done; what was not is the error that ends the command."""
    sums = {
        key: sum(said[key] for _, said in outcome.done)
        for key in ("lines", "split", "undecodable", "prefix_cut")
    }
    for key, what in (
        ("split", "longer than anything in training and were translated in pieces"),
        ("undecodable", "not valid UTF-8; what could not be read was replaced"),
        ("prefix_cut", "with a prefix longer than any translation, whose end was left out"),
    ):
        if sums[key]:
            console.warn(f"lines that are {what}: {sums[key]:,}")
    if outcome.failed:
        name, why = next(iter(outcome.failed.items()))
        raise TrmtError(
            f"{len(outcome.failed):,} parts are missing in {out}, {name} because: {why}; all others are "
            "there, and the same command tries those again"
        )
    console.say(f"wrote {sums['lines']:,} lines; all parts are in {out}")
