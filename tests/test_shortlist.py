"""Shortlists: a lexicon learned from pairs, kept in a bundle, and translations that stay within it."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests import toy
from tests.fakes import VOCABULARY, random_sentences, small_network
from tests.scripted import random_bundle
from trmt.alignment.aligning import best, model_one, sample
from trmt.decode.base import Hypothesis, Search
from trmt.decode.beam import Beam
from trmt.decode.greedy import Greedy
from trmt.decode.sampling import Sampling
from trmt.engines.base import Batching, Request
from trmt.engines.eager import Eager
from trmt.errors import BundleError, ConfigError, DataError
from trmt.quantizing import quantize
from trmt.registry import ARCHITECTURES, resolve
from trmt.saved import bundles, lexicon
from trmt.saved.bundles import read_manifest
from trmt.saved.checkpoints import average
from trmt.saved.lexicon import Lexicon
from trmt.sets.shards import PreparedSet
from trmt.shortlisting import ShortlistOptions, make, shortlist
from trmt.text.tokenizer import Tokenizer
from trmt.translating import TranslateOptions, Translator
from trmt.verifying import VerifyOptions, verify

DATA = Path(__file__).parent.parent / "data"
EOS, BANNED = 2, (0, 1, 20)
TEXTS = ["ka lomo ti", "saru", "", "hikado mi wa yone ka ka", "remi bu tokuri ne"]


def network(architecture: str, vocabulary: int) -> Any:
    sizes = {"longest": 200, "width": 64, "feed_forward": 256, "heads": 4, "source_vocabulary": vocabulary}
    known = resolve(ARCHITECTURES, architecture).config_class.__dataclass_fields__
    sizes = {name: size for name, size in sizes.items() if name in known}
    return small_network(architecture, target_vocabulary=vocabulary, **sizes)


def random_lexicon(vocabulary: int, *, per: int, always: int = 4, room: int = 12) -> Lexicon:
    targets = np.random.default_rng(3).integers(0, vocabulary, (vocabulary, per))
    return Lexicon(np.arange(vocabulary + 1) * per, targets.ravel(), np.arange(always), room, vocabulary)


def whole(vocabulary: int) -> Lexicon:
    nothing = np.empty(0, np.int64)
    return Lexicon(np.zeros(vocabulary + 1, np.int64), nothing, np.arange(vocabulary), 0, vocabulary)


def requests_of(count: int, vocabulary: int) -> list[Request]:
    """Sentences of many lengths; some must begin with what their lists may not hold, or what is banned."""
    return [
        Request(
            (*sentence, EOS),
            limit=2 + len(sentence) * 2,
            prefix=(vocabulary - 1, 7, 20)[: index % 4],
            key=index,
            least=index % 3,
        )
        for index, sentence in enumerate(random_sentences(count, longest=12))
        if 2 + len(sentence) * 2 >= index % 4
    ]


def run(
    net: Any,
    requests: Sequence[Request],
    found: Lexicon | None,
    search: Search,
    sentences: int,
    precision: Any,
) -> list[list[Hypothesis]]:
    engine = Eager(
        net,
        search,
        bos=1,
        eos=EOS,
        banned=BANNED,
        batching=Batching(sentences=sentences),
        precision=precision,
        lexicon=found,
    )
    done = dict(engine.translate(requests))
    return [done[index] for index in range(len(requests))]


SEARCHES = [Greedy(), Beam(size=4, n_best=2), Sampling(samples=2, top_p=0.9)]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_neighbours_change_nothing(architecture: str, precision: str) -> None:
    vocabulary = 700
    net = network(architecture, vocabulary)
    found = random_lexicon(vocabulary, per=5, room=300)
    requests = requests_of(11, vocabulary)
    for search in SEARCHES:
        expected = run(net, requests, found, search, 1, precision)
        assert len({each[0].ids for each in expected}) > 3
        for sentences in (3, 8):
            assert run(net, requests, found, search, sentences, precision) == expected
        for request, hypotheses in zip(requests, expected, strict=True):
            allowed = set(found.listed(request.source).tolist()) - {*BANNED}
            for each in hypotheses:
                assert each.ids[: len(request.prefix)] == request.prefix
                assert set(each.ids[len(request.prefix) :]) <= allowed | {*request.prefix} - {*BANNED}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_without_kernels_too(architecture: str, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from trmt.decode import choosing
    from trmt.kernels import products

    monkeypatch.setattr(products, "best", lambda: None)
    monkeypatch.setattr(choosing, "_library", lambda: None)
    net = network(architecture, 700)
    found, requests = random_lexicon(700, per=5, room=300), requests_of(7, 700)
    for search in SEARCHES[:2]:
        expected = run(net, requests, found, search, 1, precision)
        assert run(net, requests, found, search, 6, precision) == expected


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_list_of_everything_changes_nothing(architecture: str) -> None:
    for vocabulary in (VOCABULARY, 700):
        net = network(architecture, vocabulary)
        requests = requests_of(12, vocabulary)
        for search in SEARCHES:
            listed = run(net, requests, whole(vocabulary), search, 5, "fp32")
            assert listed == run(net, requests, None, search, 5, "fp32")


def test_the_ids_of_all_lists_are_prepared_once_for_a_batch() -> None:
    net = network("transformer", 700)
    engine = Eager(net, Greedy(), bos=1, eos=EOS, lexicon=random_lexicon(700, per=5, room=50))
    prepared = []
    narrowed = engine.stepper.narrowed
    engine.stepper.narrowed = lambda ids: prepared.append(len(ids)) or narrowed(ids)  # type: ignore[method-assign]
    requests = [Request((5, 6, 7, EOS), limit=9, least=9)] * 6
    assert len([*engine.translate(requests)]) == 6
    assert len(prepared) == 1 and prepared[0] < 30


# --- lists


def test_the_best_of_each_piece_come_first_where_room_is_short() -> None:
    # Pieces 0, 1 and 2 may become 10.., 20.. and 30.., the most probable first.
    targets = np.array([12, 11, 10, 22, 21, 20, 32, 31, 30])
    found = Lexicon(np.array([0, 3, 6, 9]), targets, np.array([0, 1, 2]), 4, 40)
    assert found.listed([2, 0, 0]).tolist() == [0, 1, 2, 11, 12, 31, 32]
    assert found.listed([1]).tolist() == [0, 1, 2, 20, 21, 22]
    assert found.listed([0, 1, 2], prefix=[39, 39, 1]).tolist() == [0, 1, 2, 12, 22, 32, 39]


# --- learning


def slow_model_one(
    pairs: Sequence[tuple[list[int], list[int]]], iterations: int
) -> dict[tuple[int, int], float]:
    """As the textbook has it."""
    value: dict[tuple[int, int], float] = {}
    for _ in range(iterations):
        counts: dict[tuple[int, int], float] = {}
        for source, target in pairs:
            for word in set(target):
                around = [-1, *set(source)]
                total = sum(value.get((other, word), 1.0) for other in around)
                for other in around:
                    share = value.get((other, word), 1.0) / total
                    counts[other, word] = counts.get((other, word), 0.0) + share
        totals: dict[int, float] = {}
        for (source_id, _), count in counts.items():
            totals[source_id] = totals.get(source_id, 0.0) + count
        value = {key: count / totals[key[0]] for key, count in counts.items()}
    return value


def test_probabilities_are_those_of_the_textbook(toy_set: Path) -> None:
    split = PreparedSet.open(toy_set).split("train")
    every = np.arange(len(split))
    sides = []
    for column in ("source.ids", "target.ids"):
        values, lengths = split.gather(column, every)
        sides.append([each.tolist() for each in np.split(values, np.cumsum(lengths)[:-1])])
    expected = slow_model_one([*zip(*sides, strict=True)], 3)
    counted = sample(split, vocabularies=(60, 60), most=1 << 30)
    assert counted.pairs == len(split)
    found = model_one(counted, target_vocabulary=60, iterations=3)
    mine = {
        (source if source < 60 else -1, target): value
        for source, target, value in zip(*(each.tolist() for each in found), strict=True)
    }
    assert mine.keys() == expected.keys()
    assert mine == {key: pytest.approx(value, rel=1e-9) for key, value in expected.items()}
    for source, targets in best(found, count=3, least=0.01):
        row = {key[1]: value for key, value in mine.items() if key[0] == (source if source < 60 else -1)}
        assert [row[target] for target in targets] == sorted(row.values(), reverse=True)[:3][: len(targets)]


def test_a_sample_takes_no_more_than_it_should(toy_set: Path) -> None:
    split = PreparedSet.open(toy_set).split("train")
    assert sample(split, vocabularies=(60, 60), most=0).pairs == 0


@pytest.mark.parametrize("joint", [True, False])
def test_a_word_s_translation_is_in_its_list(joint: bool, tmp_path: Path) -> None:
    # Each pair is so many words, turned around, with a letter in front of each.
    data = PreparedSet.open(toy.make_set(tmp_path, joint=joint))
    tokenizer = Tokenizer.load(data.tokenizer_folder)
    found, pairs = make(data.split("train"), tokenizer, ShortlistOptions(best=6, frequent=0))
    assert pairs == len(data.split("train"))
    assert len(found.always) == 4
    for word in toy.WORDS:
        (source,), (target,) = tokenizer.source.encode([word]), tokenizer.target.encode([f"o{word}"])
        assert set(target) <= set(found.listed(source).tolist()), word


def test_words_of_the_phrasebook_are_in_the_lists_of_their_translations(tmp_path: Path) -> None:
    sys.path.insert(0, str(DATA))
    try:
        import phrasebook  # type: ignore[import-not-found]
    finally:
        sys.path.remove(str(DATA))
    from trmt.preparing import PrepareOptions, prepare
    from trmt.tokenizing import TokenizerOptions, train_tokenizer

    pairs = phrasebook.generate(1)["train"][:1500]
    text = toy.write_tsv(tmp_path / "pairs.tsv", pairs)
    train_tokenizer(
        TokenizerOptions(corpora=(text,), languages=("en", "de"), size=1200), out=tmp_path / "tokenizer"
    )
    prepare(
        PrepareOptions(
            train=(text,), dev=None, out=tmp_path / "set", tokenizer=tmp_path / "tokenizer", workers=1
        )
    )
    data = PreparedSet.open(tmp_path / "set")
    tokenizer = Tokenizer.load(data.tokenizer_folder)
    found, _ = make(data.split("train"), tokenizer, ShortlistOptions())
    for english, german in (
        ("museum", "Museum"),
        ("soup", "Suppe"),
        ("ticket", "Fahrkarte"),
        ("water", "Wasser"),
    ):
        assert any(english in source and german in target for source, target in pairs), english
        (source,), (target,) = tokenizer.source.encode([english]), tokenizer.target.encode([german])
        assert set(target) <= set(found.listed(source).tolist()), english
    kept = missed = 0
    for source_text, target_text in phrasebook.generate(1)["dev"][:300]:
        (source,), (target,) = tokenizer.source.encode([source_text]), tokenizer.target.encode([target_text])
        listed = set(found.listed(source).tolist())
        kept, missed = kept + len(listed & {*target}), missed + len({*target} - listed)
    assert missed < 0.01 * kept


# --- in a bundle


@pytest.fixture(scope="module")
def listed_bundle(tmp_path_factory: pytest.TempPathFactory, toy_set: Path) -> Path:
    folder = tmp_path_factory.mktemp("listed") / "bundle"
    random_bundle(folder, Tokenizer.load(toy_set / "tokenizer"))
    shortlist(ShortlistOptions(model=folder, data=toy_set, best=3, frequent=5, room=20))
    return folder


def translations(folder: Path, **options: Any) -> list[tuple[str, float]]:
    translator = Translator.load(folder, options=TranslateOptions(device="cpu", **options))
    found = translator.translate(TEXTS)
    return [(each.text, each.candidates[0].score if each.candidates else 0.0) for each in found]


def test_only_what_is_listed_is_written(listed_bundle: Path) -> None:
    tokenizer = Tokenizer.load(listed_bundle / "tokenizer")
    found = bundles.read_lexicon(listed_bundle, read_manifest(listed_bundle), tokenizer)
    texts = translations(listed_bundle, shortlist=True)
    assert texts == translations(listed_bundle, shortlist=True, batch=1)
    assert texts != translations(listed_bundle)
    translator = Translator.load(listed_bundle, options=TranslateOptions(device="cpu", shortlist=True))
    for ids in tokenizer.source.encode(filter(None, TEXTS)):  # type: ignore[arg-type]
        request = Request((*ids, translator.eos), limit=20)
        ((_, (hypothesis,)),) = translator.engine.translate([request])
        assert set(hypothesis.ids) <= set(found.listed(request.source).tolist())


def test_a_prefix_beyond_the_room_is_cut_and_told(listed_bundle: Path) -> None:
    translator = Translator.load(listed_bundle, options=TranslateOptions(device="cpu", shortlist=True))
    long = " ".join(f"o{word}" for word in toy.WORDS * 3)
    cut, kept = translator.translate(["ka", "ka"], prefixes=[long, "oka"])
    assert cut.prefix_cut and not kept.prefix_cut
    assert kept.text.startswith("oka")


def test_a_bundle_without_a_lexicon_says_how_to_get_one(listed_bundle: Path, tmp_path: Path) -> None:
    random_bundle(tmp_path / "bare", Tokenizer.load(listed_bundle / "tokenizer"))
    with pytest.raises(BundleError, match="make one with trmt shortlist"):
        translations(tmp_path / "bare", shortlist=True)


def test_copies_keep_it(listed_bundle: Path, tmp_path: Path) -> None:
    quantize(listed_bundle, tmp_path / "int8")
    expected = (listed_bundle / lexicon.FILE).read_bytes()
    assert (tmp_path / "int8" / lexicon.FILE).read_bytes() == expected
    assert translations(tmp_path / "int8", shortlist=True)
    random_bundle(tmp_path / "bare", Tokenizer.load(listed_bundle / "tokenizer"))
    average([tmp_path / "bare", listed_bundle], tmp_path / "mean")
    # Made anew from checkpoints without one, an average keeps its own.
    average([tmp_path / "bare"], tmp_path / "mean")
    assert (tmp_path / "mean" / lexicon.FILE).read_bytes() == expected
    assert translations(tmp_path / "mean", shortlist=True)
    average([tmp_path / "bare"], tmp_path / "other")
    assert not read_manifest(tmp_path / "other").shortlist


def test_making_it_again_gives_the_same(listed_bundle: Path, toy_set: Path, tmp_path: Path) -> None:
    shutil.copytree(listed_bundle, tmp_path / "again")
    shortlist(ShortlistOptions(model=tmp_path / "again", data=toy_set, best=3, frequent=5, room=20))
    assert read_manifest(tmp_path / "again") == read_manifest(listed_bundle)


@pytest.mark.parametrize("damage", ["bit", "cut", "gone", "foreign", "sizes"])
def test_a_damaged_or_foreign_one_is_refused(
    damage: str, listed_bundle: Path, separate_set: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(listed_bundle, folder)
    path = folder / lexicon.FILE
    raw = path.read_bytes()
    tokenizer = Tokenizer.load(folder / "tokenizer")
    if damage == "bit":
        path.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    elif damage == "cut":
        path.write_bytes(raw[: len(raw) // 2])
    elif damage == "gone":
        path.unlink()
    else:
        made = bundles.read_lexicon(folder, read_manifest(folder), tokenizer)
        if damage == "sizes":
            made = replace(made, vocabulary=made.vocabulary + 1)
        other = Tokenizer.load(separate_set / "tokenizer")
        owner = (other if damage == "foreign" else tokenizer).fingerprint
        bundles.rewrite_manifest(folder, shortlist=lexicon.write(path, made, tokenizer=owner))
    for job in (
        lambda: translations(folder, shortlist=True),
        lambda: verify(VerifyOptions(model=folder, device="cpu")),
    ):
        with pytest.raises(BundleError, match="make it again with trmt shortlist") as found:
            job()
        assert str(path) in str(found.value) and "\n" not in str(found.value)
    assert translations(folder) == translations(listed_bundle)  # which do not need it


def test_bytes_that_are_no_lexicon_are_refused(listed_bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(listed_bundle, folder)
    (folder / lexicon.FILE).write_bytes(b"not at all")
    entry = {"sha256": lexicon.checksum(folder / lexicon.FILE)}
    bundles.rewrite_manifest(folder, shortlist=entry)
    with pytest.raises(BundleError, match="is damaged"):
        translations(folder, shortlist=True)


def test_another_tokenizer_s_data_are_refused(listed_bundle: Path, separate_set: Path) -> None:
    with pytest.raises(DataError, match="another tokenizer"):
        shortlist(ShortlistOptions(model=listed_bundle, data=separate_set))


def test_a_bundle_that_does_not_know_its_data_asks(listed_bundle: Path) -> None:
    with pytest.raises(ConfigError, match="--data"):
        shortlist(ShortlistOptions(model=listed_bundle))


def test_the_command_line(listed_bundle: Path, toy_set: Path, tmp_path: Path, capsysbinary: Any) -> None:
    from typer.testing import CliRunner

    from trmt.cli import app

    random_bundle(tmp_path / "bundle", Tokenizer.load(listed_bundle / "tokenizer"))
    words = ["shortlist", str(tmp_path / "bundle"), "--data", str(toy_set), "--best", "3", "--frequent", "5"]
    assert CliRunner().invoke(app, [*words, "--room", "20"]).exit_code == 0
    assert (tmp_path / "bundle" / lexicon.FILE).read_bytes() == (listed_bundle / lexicon.FILE).read_bytes()
    given = "\n".join([*TEXTS, ""]).encode()
    asked = ["translate", str(tmp_path / "bundle"), "--shortlist", "--device", "cpu"]
    done = CliRunner().invoke(app, asked, input=given)
    assert done.exit_code == 0
    expected = [text for text, _ in translations(tmp_path / "bundle", shortlist=True)]
    assert done.stdout.split("\n")[: len(TEXTS)] == expected


def test_it_works_where_gradients_are_on(listed_bundle: Path) -> None:
    with torch.enable_grad():
        assert translations(listed_bundle, shortlist=True)
