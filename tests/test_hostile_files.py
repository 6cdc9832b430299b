"""Damaged and hostile files: one sentence, or a result that is equal to that of the intact file.

Each value of each JSON and TOML file is replaced by values of other types, huge ones and deep ones, and bytes
of every kind of file are changed.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import random
import shutil
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests import toy
from tests.pools import FakePool
from tests.tree_mutations import as_json, flips, mutants
from trmt.averaging import AverageOptions, average
from trmt.bundles import bundles, checkpoints, slices
from trmt.bundles.slices import TensorSlice, row_range
from trmt.cli import inspect as inspect_command
from trmt.cli.new import _find_text, _read_record, _write_record
from trmt.config import to_toml, to_tree
from trmt.errors import TrmtError
from trmt.insight.comparing import CompareOptions, compare
from trmt.insight.inspecting import inspect
from trmt.insight.plotting import panels, summary
from trmt.native import build, packed_weights, products
from trmt.native.products import PackedProducts
from trmt.scale.corpus_translating import CorpusOptions, translate_corpus
from trmt.sets.record import read_record
from trmt.sets.shards import PreparedSet
from trmt.storage.files import write_verified_json
from trmt.text.tokenizer import Tokenizer
from trmt.training.checkpointer import HALVINGS
from trmt.training.history import History
from trmt.training.planning import TrainOptions
from trmt.training.run import TrainingRun, train
from trmt.training.spikes import ROLLBACKS, Rollback
from trmt.translating import TranslateOptions, Translator
from trmt.trees import CHECKSUM, with_checksum, without_checksum
from trmt.validating import validate
from trmt.verifying import VerifyOptions, verify

FEW = 5  # mutants and flips of each file in the fast tests
HAS_KERNELS = bool(products.best_processor())
MUTANTS, FLIPS = 200, 200  # in the slow ones
OF_SLICES = 300  # mutants of an index that has the same few values for every tensor
Use = Callable[[Path], Any]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a prepared set, a run on it, and an average of the run's checkpoints."""
    folder = tmp_path_factory.mktemp("made")
    data = toy.make_set(folder)
    recipe = toy.recipe(folder, {"validation": {"metric": "chrf", "sentences": 6}})
    run = train(toy.options(folder / "run", data, recipe), validate)
    average(AverageOptions(paths=(run,), best=1))
    shutil.copytree(run, folder / "sharded")
    shard(folder / SHARDED)
    write_verified_json(folder / "sharded" / HALVINGS, {"halvings": 1})
    rollback = to_tree(Rollback(to=3, at=5, why="the gradient is not finite", left_out=(4, 5)))
    write_verified_json(folder / "sharded" / ROLLBACKS, {"rollbacks": [rollback]})
    (folder / "text").mkdir()
    (folder / "text/lines.x").write_text("ka lomo ti\nremi\n")
    return folder


def shard(state: Path) -> None:
    """Save the tensors of a training state again, as two processes do that have some rows each."""
    values = json.loads((state / "state.json").read_bytes())
    tensors = load_file(state / values["tensors"])
    written = []
    for rank in range(2):
        own = {}
        for name, tensor in tensors.items():
            begin, end = row_range(len(tensor), rank, 2) if tensor.dim() else (0, 1 - rank)
            if end > begin:
                rows = tensor[begin:end] if tensor.dim() else tensor
                own[name] = TensorSlice(rows, begin, tuple(tensor.shape))
        written.append(slices.write_slices(state, own, rank=rank, world_size=2))
    slices.write_index(state, written)
    (state / values["tensors"]).unlink()
    kept = {key: value for key, value in values.items() if key not in ("format", "tensors", "sha256")}
    checkpoints.write_state(state, without_checksum(kept), tensors=slices.INDEX)


@pytest.fixture(scope="module")
def folder(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy to damage, of which each test restores what it has damaged."""
    copy = tmp_path_factory.mktemp("copy") / "made"
    shutil.copytree(made, copy)
    for origin in (copy / "run/origin.json", copy / "sharded/origin.json"):
        tree = without_checksum(json.loads(origin.read_bytes())) | {"data": str(copy / "set")}
        origin.write_text(json.dumps(with_checksum(tree)))
    use_new(copy)
    use_parts(copy)
    if HAS_KERNELS:
        use_kernel(copy)
        use_packed(copy)
    return copy


# What is done with files; the result is comparable.


def use_manifest(folder: Path) -> Any:
    return to_tree(bundles.read_manifest(folder / "run/average"))


def print_facts(folder: Path) -> Any:
    for path in (folder / "run/average", folder / "run"):
        facts = inspect(path)
        json.dumps(facts)
        inspect_command._bundle_lines(facts)
        inspect_command._run_lines(facts.get("run"))


def use_bundle(folder: Path) -> Any:
    translator = Translator.load(folder / "run/average", options=TranslateOptions(beam=2))
    translations = [result.text for result in translator.translate(["ka lomo ti", "remi"])]
    return translations, use_manifest(folder)


def verify_bundle(folder: Path) -> Any:
    return verify(VerifyOptions(model=folder / "run/average")).differences


def average_again(folder: Path) -> Any:
    average(AverageOptions(paths=(folder / "run/average",), out=folder / "again"))


def rank(folder: Path) -> Any:
    found = checkpoints.list_checkpoints(folder / "run")
    return [checkpoint.step for checkpoint in checkpoints.ranked(found)]


def compare_runs(folder: Path) -> Any:
    runs = (folder / "run", folder / "run")
    compare(CompareOptions(runs=runs, beam=1, resamples=5, log_only=True))


def use_set(folder: Path) -> Any:
    data = PreparedSet.open(folder / "set")
    data.verify()
    digest = hashlib.sha256()
    for name in data.splits:
        split = data.split(name)
        for column in split.columns:
            if column.ragged:
                digest.update(split.lengths(column.name).tobytes())
                digest.update(split.gather(column.name, np.arange(len(split))).values.tobytes())
    texts = data.dev_text() if "dev" in data.splits else None
    tokenizer = use_tokenizer(folder)
    return digest.hexdigest(), texts, data.kind, data.languages, list(data.corpus_weights), tokenizer


def use_tokenizer(folder: Path) -> Any:
    tokenizer = Tokenizer.load(folder / "set/tokenizer")
    return tokenizer.source.encode(["ka lomo"]), tokenizer.target.decode([5, 6, 7]), tokenizer.settings


@contextmanager
def in_cache(folder: Path) -> Iterator[None]:
    """Kernels and packed weights lie in a folder to damage."""
    sources, cache = folder / "sources", folder / "cache"
    for made in (sources, cache):
        made.mkdir(exist_ok=True, mode=0o700)
    (sources / "answer.c").write_text("int answer(void) { return 42; }\n")
    with (
        mock.patch.object(build, "SOURCES", sources),
        mock.patch.object(build, "cache_folder", lambda: cache),
        mock.patch.object(packed_weights, "WORTH", 0),
    ):
        yield


def use_kernel(folder: Path) -> Any:
    compiler = build._compiler()
    assert compiler
    with in_cache(folder):
        return ctypes.CDLL(str(build._built("answer", compiler, ()))).answer()


def use_packed(folder: Path) -> Any:
    weight = torch.arange(70 * 33.0).reshape(70, 33) / 999
    with in_cache(folder):
        made = PackedProducts("fp32", checksum="a")
        product = made(weight, None)
        made.save()
    return product(torch.ones(2, 33)).tolist()


def use_new(folder: Path) -> Any:
    text = _find_text([str(folder / "half.tsv")], None, None, "x", "y")
    new = folder / "new"
    if not new.exists():
        new.mkdir()
        _write_record(new, text, {"tokenizer": {"command": "trmt tokenizer"}})
    return _read_record(new, text)


def use_parts(folder: Path) -> Any:
    search = TranslateOptions(search="greedy", max_length=3, device="cpu")
    options = CorpusOptions(
        source=str(folder / "text"), out=str(folder / "parts"), model=folder / "run/average", search=search
    )
    translate_corpus(options, FakePool)
    return [path.read_bytes() for path in sorted((folder / "parts").glob("*/part-*"))]


def resume_sharded(folder: Path) -> Any:
    return resume(folder, "sharded")


def resume(folder: Path, name: str = "run") -> Any:
    """What a resumed run would begin with."""
    run = TrainingRun.from_options(TrainOptions(run=folder / name), validate)
    saved = run.checkpointer.newest()
    assert saved, "the run has checkpoints"
    run.checkpointer.restore(saved)
    run.checkpointer.restore_halvings()
    digest = hashlib.sha256()
    for tensor in run.state.tensors().values():
        digest.update(tensor.detach().numpy().tobytes())
    halvings = run.state.micro_batches.halvings
    return digest.hexdigest(), run.state.values(), run.data.fingerprint, run.spikes.skipped_steps, halvings


def use_log(folder: Path) -> Any:
    history = History.read(folder / "run/log.jsonl")
    if history.entries:
        with suppress(TrmtError):  # for an entry without a value that the axis needs
            panels({"run": history}, "steps")
        summary({"run": history})
    samples = [(entry["step"], entry.get("scores"), entry.get("samples")) for entry in history.entries]
    return history._curves, samples


def use_record(folder: Path) -> Any:
    return read_record(folder / "run")


STEP = "run/step-00000006"
SHARDED = "sharded/step-00000006/training"
MANIFEST = "run/average/manifest.json"
TREES: dict[str, list[Use]] = {
    MANIFEST: [use_manifest, print_facts, verify_bundle, average_again, compare_runs],
    f"{STEP}/manifest.json": [rank, print_facts],
    f"{STEP}/training/state.json": [resume],
    "run/config.toml": [resume, print_facts],
    "run/origin.json": [resume, print_facts],
    "run/data.json": [use_record, print_facts, compare_runs],
    "run/log.jsonl": [use_log, print_facts],
    "set/index.json": [use_set],
    "set/tokenizer/tokenizer.json": [use_tokenizer],
    f"{SHARDED}/slices.json": [resume_sharded],
    f"sharded/{ROLLBACKS}": [resume_sharded],
    f"sharded/{HALVINGS}": [resume_sharded],
    "new/new.json": [use_new],
    "parts/manifest.json": [use_parts],
}
FILES: dict[str, Use] = {
    "set/train-00000.source.ids": use_set,
    "set/train-00000.target.ids": use_set,
    "set/train-00000.source.ids.offsets": use_set,
    "set/train-00000.target.ids.offsets": use_set,
    "set/train-00000.corpus": use_set,
    "set/index.json": use_set,
    "set/dev.source.txt": use_set,
    "set/dev.target.txt": use_set,
    "set/tokenizer/tokenizer.json": use_set,
    "set/tokenizer/joint.model": use_set,
    MANIFEST: use_bundle,
    "run/average/weights.safetensors": use_bundle,
    "run/average/tokenizer/joint.model": use_bundle,
    f"{STEP}/training/state.json": resume,
    f"{STEP}/training/state.safetensors": resume,
    "run/config.toml": resume,
    "run/origin.json": resume,
    "run/data.json": use_record,
    "run/log.jsonl": use_log,
    f"{SHARDED}/state.json": resume_sharded,
    f"{SHARDED}/slices.json": resume_sharded,
    f"{SHARDED}/slices-00000-of-00002.safetensors": resume_sharded,
    f"{SHARDED}/slices-00001-of-00002.safetensors": resume_sharded,
    f"sharded/{ROLLBACKS}": resume_sharded,
    f"sharded/{HALVINGS}": resume_sharded,
    "new/new.json": use_new,
    "parts/manifest.json": use_parts,
    "cache/answer-*.so": use_kernel,
    "cache/answer-*.sha256": use_kernel,
    "cache/packed/*": use_packed,
}


def damaged(path: Path) -> Iterator[Callable[[], bytes]]:
    """What makes the mutants of a JSON, JSON lines or TOML file."""
    if path.suffix == ".toml":
        for _, make in mutants(tomllib.loads(path.read_text("utf-8"))):
            yield partial(_toml, make)
    elif path.suffix == ".jsonl":
        lines = path.read_bytes().splitlines()
        for number, line in enumerate(lines):
            entry = json.loads(line)
            del entry["crc"]
            for _, make in mutants(entry):
                yield partial(_log, lines, number, make)
    else:
        tree = json.loads(path.read_bytes())
        for keys, make in mutants(without_checksum(tree)):
            if keys[:1] != ("network",):  # sizes are compared with the weights elsewhere
                yield partial(_json, make, signed=CHECKSUM in tree)


def _toml(make: Callable[[], Any]) -> bytes:
    return to_toml(make()).encode()


def _log(lines: list[bytes], number: int, make: Callable[[], Any]) -> bytes:
    changed = [*lines[:number], as_json(make(), signed=False), *lines[number + 1 :]]
    return b"\n".join(changed) + b"\n"


def _json(make: Callable[[], Any], *, signed: bool) -> bytes:
    return as_json(make(), signed=signed)


def attempt(use: Use, folder: Path) -> Any:
    """The result of a use, or its error, which has to be one sentence."""
    try:
        return use(folder)
    except TrmtError as error:
        assert "\n" not in str(error) and len(str(error)) < 2000
        return error
    finally:
        for renamed in folder.glob("*/damaged-*"):
            renamed.rename(renamed.with_name(renamed.name.removeprefix("damaged-")))


def check_mutants(folder: Path, name: str, count: int) -> None:
    path = folder / name
    intact = path.read_bytes()
    try:
        found = list(damaged(path))
        chosen = random.Random(name).sample(found, min(count, len(found)))
        for make in chosen:
            try:
                content = make()
            except (AttributeError, UnicodeEncodeError):  # what TOML cannot say
                continue
            for use in TREES[name]:
                path.write_bytes(content)
                attempt(use, folder)
    finally:
        path.write_bytes(intact)


def check_flips(folder: Path, name: str, count: int, said: Callable[[], str]) -> None:
    if name.startswith("cache/") and not HAS_KERNELS:
        pytest.skip("no C compiler here, so nothing is cached")
    [path], use = [*folder.glob(name)], FILES[name]
    intact = path.read_bytes()
    expected = use(folder)
    usual = set(said().splitlines())
    try:
        for content in flips(path, count):
            replace(path, content)
            result = attempt(use, folder)
            new = set(said().splitlines()) - usual
            assert isinstance(result, TrmtError) or result == expected or new, name
    finally:
        replace(path, intact)
    assert use(folder) == expected


def replace(path: Path, content: bytes) -> None:
    """Another file of this name: one that is loaded may not change."""
    other = path.with_name("other")
    other.write_bytes(content)
    other.chmod(path.stat().st_mode)
    other.replace(path)


def test_a_run_in_slices_resumes_as_the_whole_one(folder: Path) -> None:
    assert resume_sharded(folder)[0] == resume(folder)[0]


@pytest.mark.parametrize("name", TREES)
def test_some_values_that_no_file_should_have_are_one_sentence(folder: Path, name: str) -> None:
    check_mutants(folder, name, FEW)


@pytest.mark.slow
@pytest.mark.parametrize("name", TREES)
def test_no_value_in_a_file_gives_a_traceback(folder: Path, name: str) -> None:
    check_mutants(folder, name, OF_SLICES if name.endswith(slices.INDEX) else MUTANTS)


@pytest.mark.parametrize("name", FILES)
def test_some_changed_bytes_are_noticed_or_change_nothing(
    folder: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    check_flips(folder, name, FEW, lambda: capsys.readouterr().err)


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_changed_bytes_are_noticed_or_change_nothing(
    folder: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    check_flips(folder, name, FLIPS, lambda: capsys.readouterr().err)
