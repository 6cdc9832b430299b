"""Bundles and runs that an earlier trmt wrote are read, and translate as they did then.

`old_bundles/` holds a bundle for each architecture and option there was. To save space, all of them share one
tokenizer, and weights are compressed: `as_written` puts a folder together as it was. `expected.json` tells
what the trmt that wrote them made of some sentences.
"""

from __future__ import annotations

import bz2
import json
import shutil
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from trmt.bundles import bundles, checkpoints
from trmt.bundles.bundles import Bundle, build_network, load_bundle, load_weights, read_manifest, read_weights
from trmt.nets.base import Network, Ragged, Source
from trmt.text.tokenizer import Tokenizer
from trmt.training import describing
from trmt.training.planning import TrainOptions
from trmt.training.run import train
from trmt.translating import TranslateOptions, Translation, Translator

FIXTURES = Path(__file__).parent / "fixtures/old_bundles"
EXPECTED: dict[str, Any] = (
    json.loads((FIXTURES / "expected.json").read_bytes()) if (FIXTURES / "expected.json").is_file() else {}
)
BUNDLES: dict[str, Any] = EXPECTED.get("bundles", {})
TRANSLATING = [name for name, entry in BUNDLES.items() if "greedy" in entry]
READING = [name for name, entry in BUNDLES.items() if "readout" in entry]

TOKENIZER, PACKED = "tokenizer", ".bz2"
CLOSE = 1e-4  # of scores and log probabilities
LIMIT = 30  # tokens of a translation

SEARCHES = {
    "greedy": TranslateOptions(search="greedy", max_length=LIMIT, device="cpu"),
    "beam": TranslateOptions(beam=4, length_penalty=0.6, max_length=LIMIT, device="cpu"),
    "n_best": TranslateOptions(beam=4, length_penalty=0.6, n_best=4, max_length=LIMIT, device="cpu"),
}


# How a fixture becomes what it was


def as_written(fixture: Path, place: Path) -> Path:
    """A copy of a fixture with its weights unpacked, and with the tokenizer in every bundle and set."""
    for path in sorted(fixture.rglob("*")):
        copy = place / path.relative_to(fixture)
        if path.is_dir():
            copy.mkdir(parents=True, exist_ok=True)
            continue
        copy.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == PACKED:
            copy.with_suffix("").write_bytes(bz2.decompress(path.read_bytes()))
        else:
            shutil.copyfile(path, copy)
        if path.name in (bundles.MANIFEST, "index.json"):
            shutil.copytree(FIXTURES / TOKENIZER, copy.parent / TOKENIZER, dirs_exist_ok=True)
    return place


# What is looked at


def translations(folder: Path, search: str, lines: list[str]) -> list[Translation]:
    """The translations of some lines by the bundle in a folder."""
    return Translator.load(folder, options=SEARCHES[search]).translate(lines)


def told(found: list[Translation]) -> list[list[Any]]:
    """The text and the score of each translation, as they stand in `expected.json`."""
    return [[each.text, rounded(each.candidates[0].score)] for each in found]


def told_best(found: Translation) -> list[list[Any]]:
    """The text, the score and the normalised score of each candidate."""
    return [[each.text, rounded(each.score), rounded(each.normalised)] for each in found.candidates]


def rounded(number: float) -> float:
    """A number as `expected.json` holds it, ten times as exact as it is compared."""
    return round(number, 5)


def log_probabilities(bundle: Bundle, pairs: list[list[str]], *, segments: bool = False) -> list[list[float]]:
    """The log probability of each piece of the targets, and of their ends, after the pieces before it.

    With `segments`, the second half of each source is of another kind.
    """
    tokenizer = bundle.tokenizer
    sources = [[*ids, tokenizer.source.eos] for ids in tokenizer.source.encode([pair[0] for pair in pairs])]
    targets = tokenizer.target.encode([pair[1] for pair in pairs])
    before = Ragged.of([[tokenizer.target.bos, *ids] for ids in targets])
    wanted = Ragged.of([[*ids, tokenizer.target.eos] for ids in targets])
    source = Source.of(sources)
    if segments:
        source = replace(source, extras={"segments": halves(sources)})
    with torch.inference_mode():
        logits = bundle.net.readout(bundle.net(source, before).hidden)
    found = logits.log_softmax(-1).gather(-1, wanted.ids_N[:, None])[:, 0]
    return [part.tolist() for part in found.split(wanted.lengths_S.tolist())]


def halves(sentences: list[list[int]]) -> Tensor:
    """Zeros for the first half of each sentence, ones for the second."""
    return torch.cat([(torch.arange(len(ids)) >= (len(ids) + 1) // 2).long() for ids in sentences])


def loaded_reader(folder: Path) -> tuple[Network, Tokenizer]:
    """The network of a bundle that reads and does not translate."""
    manifest = read_manifest(folder)
    net = build_network(manifest.architecture, manifest.network)
    load_weights(net, read_weights(folder, manifest), where=str(folder))
    return net.eval(), Tokenizer.load(folder / TOKENIZER)


def guesses(net: Any, tokenizer: Tokenizer, texts: list[str]) -> dict[str, Any]:
    """For each place of the texts the likeliest piece and its log probability; for each text its judgement.

    If the network tells segments apart, the second half of each text is of the second one.
    """
    side = tokenizer.source
    sentences = [[side.bos, *ids, side.eos] for ids in side.encode(texts)]
    source = Source.of(sentences)
    if net.config.segments > 1:
        source = replace(source, extras={"segments": halves(sentences)})
    lengths = [len(ids) for ids in sentences]
    with torch.inference_mode():
        hidden = net(source).hidden
        best = net.readout(hidden).log_softmax(-1).max(-1)
        first = torch.stack([part[0] for part in hidden.split(lengths)])
        judged = net.next_sentence_logits(first)
    return {
        "pieces": [part.tolist() for part in best.indices.split(lengths)],
        "log_probabilities": [part.tolist() for part in best.values.split(lengths)],
        "judged": judged.tolist(),
    }


# What is compared


def same_texts(found: list[list[Any]], wanted: list[list[Any]]) -> None:
    """Each with its scores: the texts are equal, the scores close."""
    assert [each[0] for each in found] == [each[0] for each in wanted]
    for one, other in zip(found, wanted, strict=True):
        assert one[1:] == pytest.approx(other[1:], rel=0, abs=CLOSE)


def same_numbers(found: list[list[float]], wanted: list[list[float]]) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert one == pytest.approx(other, rel=0, abs=CLOSE)


@pytest.fixture
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The bundle whose name a test was given, as it was written."""
    return as_written(FIXTURES / request.getfixturevalue("name"), tmp_path / "bundle")


# Bundles


def test_there_is_a_fixture_for_each_entry_and_an_entry_for_each_fixture() -> None:
    assert {path.parent.name for path in FIXTURES.glob(f"*/{bundles.MANIFEST}")} == set(BUNDLES)


@pytest.mark.parametrize("name", BUNDLES)
def test_a_manifest_is_that_of_the_architecture_it_is_said_to_be(name: str, folder: Path) -> None:
    """The manifest is there as the earlier trmt wrote it, whatever its options are called today."""
    tree = json.loads((FIXTURES / name / bundles.MANIFEST).read_bytes())
    assert tree["architecture"] == BUNDLES[name]["architecture"]
    assert tree["network"] == BUNDLES[name]["network"]
    assert read_manifest(folder).tokenizer == Tokenizer.load(FIXTURES / TOKENIZER).fingerprint


@pytest.mark.parametrize("name", TRANSLATING)
def test_greedy_translations_are_those_of_then(name: str, folder: Path) -> None:
    same_texts(told(translations(folder, "greedy", EXPECTED["lines"])), BUNDLES[name]["greedy"])


@pytest.mark.parametrize("name", TRANSLATING)
def test_translations_by_beam_search_are_those_of_then(name: str, folder: Path) -> None:
    same_texts(told(translations(folder, "beam", EXPECTED["lines"])), BUNDLES[name]["beam"])
    [best] = translations(folder, "n_best", [EXPECTED["n_best_line"]])
    same_texts(told_best(best), BUNDLES[name]["n_best"])


@pytest.mark.parametrize("name", TRANSLATING)
def test_each_piece_of_a_given_translation_is_as_likely_as_then(name: str, folder: Path) -> None:
    bundle = load_bundle(folder)
    same_numbers(log_probabilities(bundle, EXPECTED["pairs"]), BUNDLES[name]["log_probabilities"])
    if "with_segments" in BUNDLES[name]:
        found = log_probabilities(bundle, EXPECTED["pairs"], segments=True)
        same_numbers(found, BUNDLES[name]["with_segments"])


@pytest.mark.parametrize("name", READING)
def test_a_network_that_only_reads_guesses_and_judges_as_then(name: str, folder: Path) -> None:
    found, wanted = guesses(*loaded_reader(folder), EXPECTED["texts"]), BUNDLES[name]["readout"]
    assert found["pieces"] == wanted["pieces"]
    same_numbers(found["log_probabilities"], wanted["log_probabilities"])
    same_numbers(found["judged"], wanted["judged"])


# Runs


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A run folder and, in the folder that its origin names, the set it was trained on."""
    as_written(FIXTURES / "run", tmp_path / "models/run")
    as_written(FIXTURES / "set", tmp_path / "data/set")
    monkeypatch.chdir(tmp_path)
    yield Path("models/run")


def test_a_run_is_known_and_its_best_checkpoint_translates_as_then(run: Path) -> None:
    wanted = EXPECTED["run"]
    assert describing.is_run(run)
    assert [point.folder.name for point in checkpoints.steps(run)] == [*wanted["checkpoints"]]
    assert checkpoints.find_bundle(run).name == wanted["best"]
    for name, translated in wanted["checkpoints"].items():
        same_texts(told(translations(run / name, "greedy", EXPECTED["lines"])), translated["greedy"])
        bundle = load_bundle(run / name)
        same_numbers(log_probabilities(bundle, EXPECTED["pairs"]), translated["log_probabilities"])


def test_a_run_goes_on_as_it_would_have_then(run: Path) -> None:
    wanted = EXPECTED["run"]["resumed"]
    train(TrainOptions(run=run, settings=[f"training.steps={wanted['steps']}"]))
    log = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = {str(entry["step"]): entry["loss"] for entry in log if entry["event"] == "train"}
    assert losses == pytest.approx(wanted["losses"], rel=0, abs=CLOSE)
    bundle = load_bundle(run / wanted["checkpoint"])
    same_numbers(log_probabilities(bundle, EXPECTED["pairs"]), wanted["log_probabilities"])


@pytest.mark.parametrize("name", sorted(path.stem for path in (FIXTURES / "recipes").glob("*.toml")))
def test_a_recipe_of_then_describes_a_network(name: str, tmp_path: Path) -> None:
    shutil.copyfile(FIXTURES / f"recipes/{name}.toml", tmp_path / checkpoints.CONFIG)
    recipe = describing.recipe(tmp_path)
    tree = tomllib.loads((tmp_path / checkpoints.CONFIG).read_text(encoding="utf-8"))
    assert recipe.architecture == tree["architecture"]
    parameters = sum(each.numel() for each in build_network(recipe.architecture, recipe.network).parameters())
    assert parameters == EXPECTED["recipes"][name]["parameters"]
