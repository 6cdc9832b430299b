"""Bundles, runs and recipes of an earlier trmt are read, and its bundles translate as they did then.

tests/fixtures/old_bundles has a bundle for each architecture and option of then. To save space, all of them
share one tokenizer, and weights are compressed: `unpacked` restores a folder as it was. `expected.json`
has what the earlier trmt made of some sentences.
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
from trmt.bundles.upgrade import upgrade_network, upgrade_recipe, upgrade_weights
from trmt.config import to_toml
from trmt.errors import BundleError, ConfigError, TrmtError
from trmt.nets.base import Network
from trmt.nets.ragged import Ragged, Source
from trmt.text.tokenizer import Tokenizer
from trmt.training import describing
from trmt.training.planning import TrainOptions
from trmt.training.recipe import load_recipe
from trmt.training.run import train
from trmt.translating import TranslateOptions, Translation, Translator

FIXTURES = Path(__file__).parent / "fixtures/old_bundles"
EXPECTED: dict[str, Any] = json.loads((FIXTURES / "expected.json").read_bytes())
BUNDLES: dict[str, Any] = EXPECTED["bundles"]
TRANSLATORS = [name for name, entry in BUNDLES.items() if "greedy" in entry]
ENCODERS = [name for name, entry in BUNDLES.items() if "readout" in entry]

TOKENIZER, PACKED = "tokenizer", ".bz2"
CLOSE = 1e-4  # for scores and log probabilities
LIMIT = 30  # tokens of a translation

SEARCHES = {
    "greedy": TranslateOptions(search="greedy", max_length=LIMIT, device="cpu"),
    "beam": TranslateOptions(beam=4, length_penalty=0.6, max_length=LIMIT, device="cpu"),
    "n_best": TranslateOptions(beam=4, length_penalty=0.6, n_best=4, max_length=LIMIT, device="cpu"),
}


def unpacked(fixture: Path, folder: Path) -> Path:
    """A copy of a fixture with its weights unpacked, and with the tokenizer in every bundle and set."""
    for path in sorted(fixture.rglob("*")):
        copy = folder / path.relative_to(fixture)
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
    return folder


@pytest.fixture
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The bundle whose name a test has as a parameter, as it was written."""
    return unpacked(FIXTURES / request.getfixturevalue("name"), tmp_path / "bundle")


# What a bundle computes


def translate(folder: Path, search: str, lines: list[str]) -> list[Translation]:
    return Translator.load(folder, options=SEARCHES[search]).translate(lines)


def best(translations: list[Translation]) -> list[list[Any]]:
    """The text and the score of each translation."""
    return [[each.text, each.candidates[0].score] for each in translations]


def candidates(translation: Translation) -> list[list[Any]]:
    """The text, the score and the normalised score of each candidate."""
    return [[each.text, each.score, each.normalised] for each in translation.candidates]


def log_probabilities(bundle: Bundle, pairs: list[list[str]]) -> list[list[float]]:
    """The log probability of each token of the targets and of their ends, given the tokens before it."""
    tokenizer = bundle.tokenizer
    sources = [[*ids, tokenizer.source.eos] for ids in tokenizer.source.encode([pair[0] for pair in pairs])]
    targets = tokenizer.target.encode([pair[1] for pair in pairs])
    before = Ragged.of([[tokenizer.target.bos, *ids] for ids in targets])
    after = Ragged.of([[*ids, tokenizer.target.eos] for ids in targets])
    with torch.inference_mode():
        logits = bundle.net.readout(bundle.net(Source.of(sources), before).hidden)
    found = logits.log_softmax(-1).gather(-1, after.ids_N[:, None])[:, 0]
    return [sentence.tolist() for sentence in found.split(after.lengths_S.tolist())]


def load_encoder(folder: Path) -> tuple[Network, Tokenizer]:
    """The network of a bundle that only encodes."""
    manifest = read_manifest(folder)
    net = build_network(manifest.architecture, manifest.network)
    load_weights(net, read_weights(folder, manifest), where=str(folder))
    return net.eval(), Tokenizer.load(folder / TOKENIZER)


def predictions(net: Any, tokenizer: Tokenizer, texts: list[str]) -> dict[str, Any]:
    """The likeliest token at each position and its log probability, and next-sentence logits of each text.

    If the network has segments, the second half of each text is the second one.
    """
    side = tokenizer.source
    sentences = [[side.bos, *ids, side.eos] for ids in side.encode(texts)]
    source = Source.of(sentences)
    if net.config.segments > 1:
        source = replace(source, extras={"segments": halves(sentences)})
    lengths = [len(ids) for ids in sentences]
    with torch.inference_mode():
        hidden = net(source).hidden
        likeliest = net.readout(hidden).log_softmax(-1).max(-1)
        first = torch.stack([sentence[0] for sentence in hidden.split(lengths)])
        return {
            "pieces": [sentence.tolist() for sentence in likeliest.indices.split(lengths)],
            "log_probabilities": [sentence.tolist() for sentence in likeliest.values.split(lengths)],
            "judged": net.next_sentence_logits(first).tolist(),
        }


def halves(sentences: list[list[int]]) -> Tensor:
    """Zeros for the first half of each sentence, ones for the second."""
    return torch.cat([(torch.arange(len(ids)) >= (len(ids) + 1) // 2).long() for ids in sentences])


def assert_same_texts(found: list[list[Any]], expected: list[list[Any]]) -> None:
    """The same texts, and scores that are close."""
    assert [each[0] for each in found] == [each[0] for each in expected]
    assert_close([each[1:] for each in found], [each[1:] for each in expected])


def assert_close(found: list[list[float]], expected: list[list[float]]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, rel=0, abs=CLOSE)


# Bundles


def test_every_fixture_has_an_entry_and_every_entry_a_fixture() -> None:
    assert {path.parent.name for path in FIXTURES.glob(f"*/{bundles.MANIFEST}")} == set(BUNDLES)


@pytest.mark.parametrize("name", BUNDLES)
def test_a_manifest_is_that_of_the_earlier_version(name: str, folder: Path) -> None:
    """The fixture has the options in the words of then, which are no options of today."""
    tree = json.loads((FIXTURES / name / bundles.MANIFEST).read_bytes())
    assert tree["format"] in (1, 2) and "width" in tree["network"]
    assert tree["architecture"] == BUNDLES[name]["architecture"]
    assert tree["network"] == BUNDLES[name]["network"]
    manifest = read_manifest(folder)
    assert manifest.tokenizer == Tokenizer.load(FIXTURES / TOKENIZER).fingerprint
    assert "d_model" in manifest.network and "width" not in manifest.network


@pytest.mark.parametrize("name", TRANSLATORS)
def test_greedy_translations_are_those_of_the_earlier_version(name: str, folder: Path) -> None:
    assert_same_texts(best(translate(folder, "greedy", EXPECTED["lines"])), BUNDLES[name]["greedy"])


@pytest.mark.parametrize("name", TRANSLATORS)
def test_translations_of_beam_search_are_those_of_the_earlier_version(name: str, folder: Path) -> None:
    assert_same_texts(best(translate(folder, "beam", EXPECTED["lines"])), BUNDLES[name]["beam"])
    [translation] = translate(folder, "n_best", [EXPECTED["n_best_line"]])
    assert_same_texts(candidates(translation), BUNDLES[name]["n_best"])


@pytest.mark.parametrize("name", TRANSLATORS)
def test_log_probabilities_are_those_of_the_earlier_version(name: str, folder: Path) -> None:
    found = log_probabilities(load_bundle(folder), EXPECTED["pairs"])
    assert_close(found, BUNDLES[name]["log_probabilities"])


@pytest.mark.parametrize("name", ENCODERS)
def test_predictions_of_an_encoder_are_those_of_the_earlier_version(name: str, folder: Path) -> None:
    found, expected = predictions(*load_encoder(folder), EXPECTED["texts"]), BUNDLES[name]["readout"]
    assert found["pieces"] == expected["pieces"]
    assert_close(found["log_probabilities"], expected["log_probabilities"])
    assert_close(found["judged"], expected["judged"])


@pytest.mark.parametrize("name", ["transformer-int8", "transformer-mixed-9", "transformer-segments", "rnn-2"])
def test_an_old_bundle_stays_readable_once_its_manifest_was_written_again(name: str, folder: Path) -> None:
    """The manifest is then in the words of today, beside weights with the names of then."""
    bundles.rewrite_manifest(folder, licences=("CC0",))
    assert json.loads((folder / bundles.MANIFEST).read_bytes())["format"] in (3, 4)
    found = log_probabilities(load_bundle(folder), EXPECTED["pairs"])
    assert_close(found, BUNDLES[name]["log_probabilities"])


@pytest.mark.parametrize("name", BUNDLES)
def test_what_is_in_the_words_of_today_stays(name: str, folder: Path) -> None:
    manifest = read_manifest(folder)
    again = upgrade_network(manifest.architecture, manifest.network)
    assert again == (manifest.architecture, manifest.network)
    weights = read_weights(folder, manifest)
    assert upgrade_weights(weights, *again).keys() == weights.keys()


@pytest.mark.parametrize("positions", ["none", "rotary", "alibi"])
def test_segments_without_a_table_of_positions_are_refused(positions: str) -> None:
    with pytest.raises(ConfigError, match=f"segments = 2 with positions = '{positions}'"):
        upgrade_network("transformer", {"positions": positions, "segments": 2})


def test_a_bundle_that_cannot_be_upgraded_is_an_error_of_one_sentence(tmp_path: Path) -> None:
    folder = unpacked(FIXTURES / "transformer-positions-rotary", tmp_path / "bundle")
    tree = json.loads((folder / bundles.MANIFEST).read_bytes())
    tree["network"]["segments"] = 2
    (folder / bundles.MANIFEST).write_text(json.dumps(tree), encoding="utf-8")
    with pytest.raises(BundleError, match="segments = 2 with positions = 'rotary'"):
        load_bundle(folder)


# Runs and recipes


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A run folder, and the set it was trained on in the folder that its origin names."""
    unpacked(FIXTURES / "run", tmp_path / "models/run")
    unpacked(FIXTURES / "set", tmp_path / "data/set")
    monkeypatch.chdir(tmp_path)
    yield Path("models/run")


def test_the_checkpoints_of_a_run_translate_as_then(run: Path) -> None:
    expected = EXPECTED["run"]
    assert describing.is_run(run)
    found = [checkpoint.folder.name for checkpoint in checkpoints.list_checkpoints(run)]
    assert found == [*expected["checkpoints"]]
    assert checkpoints.find_bundle(run).name == expected["best"]
    for name, translated in expected["checkpoints"].items():
        assert_same_texts(best(translate(run / name, "greedy", EXPECTED["lines"])), translated["greedy"])
        bundle = load_bundle(run / name)
        assert_close(log_probabilities(bundle, EXPECTED["pairs"]), translated["log_probabilities"])


def test_a_run_of_the_earlier_version_is_not_resumed_but_fine_tuned(run: Path) -> None:
    with pytest.raises(TrmtError, match="older version of trmt"):
        train(TrainOptions(run=run, settings=["training.steps=90"]))
    options = TrainOptions(data=Path("data/set"), recipe=str(run / "config.toml"), init_from=run)
    tuned = train(replace(options, run=Path("models/tuned"), settings=["training.steps=1", "optim.lr=1e-9"]))
    [checkpoint] = checkpoints.list_checkpoints(tuned)
    found = log_probabilities(load_bundle(checkpoint.folder), EXPECTED["pairs"])
    weights = EXPECTED["run"]["checkpoints"][EXPECTED["run"]["best"]]
    assert_close(found, weights["log_probabilities"])


@pytest.mark.parametrize("name", sorted(path.stem for path in (FIXTURES / "recipes").glob("*.toml")))
def test_a_recipe_of_the_earlier_version_describes_the_same_network(name: str, tmp_path: Path) -> None:
    shutil.copyfile(FIXTURES / f"recipes/{name}.toml", tmp_path / checkpoints.CONFIG)
    recipe = describing.recipe(tmp_path)
    expected = {"rnn-luong": "rnn-attention"}.get(name, name)
    assert recipe.architecture == expected
    parameters = sum(each.numel() for each in build_network(recipe.architecture, recipe.network).parameters())
    assert parameters == EXPECTED["recipes"][name]["parameters"]
    tree = tomllib.loads((FIXTURES / f"recipes/{name}.toml").read_text(encoding="utf-8"))
    assert upgrade_recipe(upgrade_recipe(tree)) == upgrade_recipe(tree)


@pytest.mark.parametrize(
    ("settings", "architecture", "network"),
    [
        (["network.width=8"], "transformer", {"d_model": 8}),
        (
            ["network.positions=alibi", "network.norm=batch"],
            "transformer-alibi+batch-norm",
            {"norm": "batch"},
        ),
        (["network.positions=relative", "network.reach=3"], "transformer-relative", {"max_distance": 3}),
        (["network.cross_focus=sampled"], "transformer-hard", {"cross_attention": "sampled"}),
        (
            ["network.residual=false", "network.norm_place=post"],
            "transformer-no-residual",
            {"norm_position": "post"},
        ),
        (["network.residual=true", "network.reach=3", "network.segments=1"], "transformer", {}),
    ],
)
def test_settings_in_the_words_of_the_earlier_version_are_read(
    settings: list[str], architecture: str, network: dict[str, Any]
) -> None:
    recipe = load_recipe("transformer-tiny", settings)
    assert recipe.architecture == architecture
    assert {name: recipe.network[name] for name in network} == network
    vocabularies = {"source_vocabulary": 9, "target_vocabulary": 9}
    build_network(recipe.architecture, {**recipe.network, **vocabularies})


def test_old_words_in_a_recipe_and_new_ones_in_settings_do_not_clash(tmp_path: Path) -> None:
    network = {"width": 16, "norm_place": "pre", "positions": "alibi"}
    file = tmp_path / "old.toml"
    file.write_text(to_toml({"network": network, "training": {"steps": 1}}), encoding="utf-8")
    recipe = load_recipe(str(file), ["network.d_model=32", "network.longest=50"])
    assert recipe.architecture == "transformer-alibi"
    expected = {"d_model": 32, "norm_position": "pre", "positions": "alibi", "max_positions": 50}
    assert recipe.network == expected
