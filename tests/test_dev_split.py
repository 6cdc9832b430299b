from __future__ import annotations

import io
import os
import random
import sys
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.test_corpus_preparing import in_parts
from tests.test_preparing import decoded, random_pairs, tokenizer_folder, write_tsv  # noqa: F401
from trmt.errors import ConfigError
from trmt.sets.dev_split import HASHES, Hashes, choose, default_size
from trmt.sets.preparing import PrepareOptions, prepare
from trmt.sets.shards import PreparedSet
from trmt.storage.files import checksum
from trmt.text.filters import LengthLimits
from trmt.text.tokenizer import Tokenizer

Pair = tuple[str, str]


def connected_pairs(count: int, *, seed: int = 0) -> list[Pair]:
    """Pairs of which many share a source or a target, and some are repeated."""
    chooser = random.Random(seed)
    pairs = [
        (f"train {chooser.randrange(2 * count)}", f"Zug {chooser.randrange(2 * count)}") for _ in range(count)
    ]
    pairs += [("Yes.", f"Zug nach {number}") for number in range(count // 4)]  # a large component
    return pairs + pairs[::10]


@pytest.fixture
def options(tmp_path: Path, tokenizer_folder: Path) -> PrepareOptions:  # noqa: F811
    train = write_tsv(tmp_path / "train.tsv", connected_pairs(600))
    return PrepareOptions(
        train=(train,),
        out=tmp_path / "set",
        tokenizer=tokenizer_folder,
        limits=LengthLimits(max_ratio=0),
        workers=1,
    )


def dev_pairs(prepared: PreparedSet) -> list[Pair]:
    return list(zip(*prepared.dev_text(), strict=True))


def contents(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): checksum(path) for path in files}


def as_hashes(pairs: Sequence[tuple[int, int]]) -> Hashes:
    return np.array(list(pairs), HASHES)


def components(pairs: Sequence[tuple[int, int]]) -> list[set[tuple[int, int]]]:
    """The connected components, found one pair at a time."""
    found: list[set[tuple[int, int]]] = []
    for pair in {*pairs}:
        linked = [one for one in found if any(pair[0] == a or pair[1] == b for a, b in one)]
        found = [one for one in found if one not in linked] + [{pair}.union(*linked)]
    return found


# ------------------------------------------------------------------------------ the choice


@pytest.mark.parametrize("seed", range(8))
def test_chosen_are_whole_components_of_limited_size(seed: int) -> None:
    chooser = random.Random(seed)
    pairs = [(chooser.randrange(150), chooser.randrange(1000, 1200)) for _ in range(120)]
    pairs += [(500 + number, 5000) for number in range(100)] + pairs[:20]
    chosen = {(int(a), int(b)) for a, b in choose(as_hashes(pairs), 30)}
    assert 0 < len(chosen) <= 30
    for component in components(pairs):
        assert component <= chosen or not component & chosen
        assert len(component) <= 10 or not component & chosen


def test_the_choice_is_the_same_for_any_order() -> None:
    pairs = [(random.Random(1).randrange(9) + number // 2, number) for number in range(900)]
    first = choose(as_hashes(pairs), 40)
    random.Random(2).shuffle(pairs)
    assert np.array_equal(choose(as_hashes(pairs), 40), first)


def test_the_choice_does_not_depend_on_the_number_of_candidates_or_the_size_of_chunks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chooser = random.Random(3)
    pairs = [(chooser.randrange(2000), chooser.randrange(2000)) for _ in range(800)]
    first = choose(as_hashes(pairs), 50)
    monkeypatch.setattr("trmt.sets.dev_split.CHUNK", 37)
    assert np.array_equal(choose(as_hashes(pairs), 50, candidates=1), first)
    assert np.array_equal(choose(as_hashes(pairs), 50, candidates=100), first)
    monkeypatch.setattr("trmt.sets.dev_split.MANY_PAIRS", 60)
    assert np.array_equal(choose(as_hashes(pairs), 50), first)


def test_one_giant_component_leaves_the_other_pairs_to_choose_from() -> None:
    pairs = [(0, number) for number in range(5000)] + [(number, 9000 + number) for number in range(1, 60)]
    chosen = choose(as_hashes(pairs), 50)
    assert len(chosen) == 50 and 0 not in chosen["source"]


def test_a_long_chain_ends_and_is_given_up() -> None:
    chain = [(number // 2, 10_000 + (number + 1) // 2) for number in range(3000)]
    assert len(choose(as_hashes(chain), 100)) == 0


def test_the_default_is_a_twentieth_and_at_most_500() -> None:
    assert [default_size(pairs) for pairs in (100, 3_000, 10_000, 10_000_000)] == [5, 150, 500, 500]


# ------------------------------------------------------------------------------ prepared sets


def test_no_source_or_target_of_the_dev_set_is_in_the_training_set(options: PrepareOptions) -> None:
    prepared = prepare(options)
    assert prepared.splits == ("dev", "train")
    dev, train = decoded(prepared, "dev"), decoded(prepared, "train")
    assert len(dev) == len({*dev}) == len(connected_pairs(600)) // 20
    for side in (0, 1):
        assert not {pair[side] for pair in dev} & {pair[side] for pair in train}
    assert {*dev, *train} == {*connected_pairs(600)}, "no pair is lost"


def test_the_dev_set_is_the_same_for_a_shuffled_corpus(options: PrepareOptions, tmp_path: Path) -> None:
    first = prepare(options)
    pairs = connected_pairs(600)
    random.Random(5).shuffle(pairs)
    half = len(pairs) // 2
    corpora = write_tsv(tmp_path / "one.tsv", pairs[:half]), write_tsv(tmp_path / "two.tsv", pairs[half:])
    second = prepare(replace(options, train=corpora, out=tmp_path / "shuffled"))
    assert dev_pairs(first) == dev_pairs(second)
    assert {*decoded(first, "train")} == {*decoded(second, "train")}


def test_workers_and_parts_write_the_same_set(options: PrepareOptions, tmp_path: Path) -> None:
    expected = contents(prepare(options).folder)
    three = prepare(replace(options, out=tmp_path / "three", workers=3))
    assert contents(three.folder) == expected
    parts = replace(options, out=tmp_path / "parts")
    in_parts(parts, size=2000)
    assert contents(tmp_path / "parts") == expected


def test_streams_give_the_same_pairs_as_files(
    options: PrepareOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = prepare(options)
    text = Path(options.train[0]).read_bytes()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))
    piped = prepare(replace(options, train=("-",), out=tmp_path / "piped"))
    assert dev_pairs(piped) == dev_pairs(expected)
    assert decoded(piped, "train") == decoded(expected, "train")
    assert not [path for path in piped.folder.iterdir() if "split" in path.name]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes")
@pytest.mark.parametrize("size", [0, None])
def test_named_pipes_are_read_once(options: PrepareOptions, tmp_path: Path, size: int | None) -> None:
    names = [tmp_path / "pipe.en", tmp_path / "pipe.de"]
    pairs = connected_pairs(600)
    writers = []
    for side, name in enumerate(names):
        os.mkfifo(name)
        text = "".join(f"{pair[side]}\n" for pair in pairs)
        writers.append(threading.Thread(target=name.write_text, args=(text,), daemon=True))
        writers[-1].start()
    made = prepare(replace(options, train=(f"{names[0]},{names[1]}",), out=tmp_path / "piped", dev_size=size))
    assert decoded(made, "train") == decoded(prepare(replace(options, dev_size=size)), "train")


def test_under_a_hundred_pairs_none_is_taken_and_that_is_said(
    options: PrepareOptions, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    some = write_tsv(tmp_path / "some.tsv", [(f"train {n}", f"Zug {n}") for n in range(99)])
    assert prepare(replace(options, train=(some,))).splits == ("train",)
    assert "99 pairs are too few to take a dev set from" in capsys.readouterr().err


def test_a_dev_set_above_half_of_the_pairs_is_refused(options: PrepareOptions) -> None:
    with pytest.raises(ConfigError, match="more than half of the"):
        prepare(replace(options, dev_size=600))
    with pytest.raises(ConfigError, match="--dev names the dev set"):
        replace(options, dev="dev.tsv", dev_size=10)
    with pytest.raises(ConfigError, match="choose 0 or more"):
        replace(options, dev_size=-1)


def test_pairs_that_the_filters_drop_are_not_in_the_dev_set(options: PrepareOptions, tmp_path: Path) -> None:
    pairs = [(f"train {n}", "Zug " * (40 * (n % 2)) + f"nach {n}") for n in range(400)]
    long = write_tsv(tmp_path / "long.tsv", pairs)
    limits = LengthLimits(max_length=50)
    prepared = prepare(replace(options, train=(long,), limits=limits, dev_size=50))
    assert 10 < len(dev_pairs(prepared)) < 50
    assert all(len(target) < 40 for _, target in dev_pairs(prepared))


def test_spellings_that_are_normalised_alike_are_one_text_in_any_order(
    options: PrepareOptions, tmp_path: Path
) -> None:
    pairs = [(f"train {n}", f"fährt {n}") for n in range(300)]
    apart = [(source, target.replace("ä", "a\u0308")) for source, target in pairs]
    one = prepare(replace(options, train=(write_tsv(tmp_path / "one.tsv", pairs + apart),)))
    corpus = write_tsv(tmp_path / "other.tsv", apart + pairs)
    other = prepare(replace(options, train=(corpus,), out=tmp_path / "other"))
    assert dev_pairs(one) == dev_pairs(other)


def test_without_a_dev_set_the_bytes_are_those_of_older_versions(options: PrepareOptions) -> None:
    prepared = prepare(replace(options, dev_size=0))
    assert prepared.splits == ("train",)
    assert "dev_size" not in prepared.index["made_from"] and prepared.index["dev"] is None
    assert {*prepared.index["made_from"]} == {
        *("format", "tokenizer", "languages", "columns", "max_length"),
        *("max_ratio", "keep_duplicates", "dev", "inputs"),
    }


def test_a_set_without_dev_set_is_kept_unless_one_is_asked_for(
    options: PrepareOptions, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(prepare(replace(options, dev_size=0)).folder)
    assert contents(prepare(options).folder) == before
    assert "--force prepares it again, with a dev set" in capsys.readouterr().err
    assert "dev" in prepare(replace(options, dev_size=20)).splits
    assert len(prepare(replace(options, force=True)).dev_text()[0]) > 20


def test_a_taken_dev_set_is_up_to_date_the_second_time(
    options: PrepareOptions, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare(options)
    capsys.readouterr()
    prepare(options)
    assert "up to date" in capsys.readouterr().err


# ------------------------------------------------------------------------------ languages and folders


def test_languages_come_from_the_names_of_files(
    options: PrepareOptions,
    tmp_path: Path,
    tokenizer_folder: Path,  # noqa: F811
) -> None:
    for side, name in enumerate(("a.en", "a.de")):
        text = "".join(f"{pair[side]}\n" for pair in random_pairs(200))
        (tmp_path / name).write_text(text, encoding="utf-8")
    loaded = Tokenizer.load(tokenizer_folder)
    settings = replace(loaded.settings, languages=("", ""))
    Tokenizer(settings, loaded.models).save(tmp_path / "without")
    corpus = f"{tmp_path / 'a.en'},{tmp_path / 'a.de'}"
    made = prepare(replace(options, train=(corpus,), tokenizer=tmp_path / "without"))
    assert made.languages == ("en", "de")
    with pytest.raises(ConfigError, match="do not tell the languages; name them with --from and --to"):
        prepare(replace(options, tokenizer=tmp_path / "without"))
    swapped = f"{tmp_path / 'a.de'},{tmp_path / 'a.en'}"
    with pytest.raises(ConfigError, match="names de first, but the direction is en to de"):
        prepare(replace(options, train=(swapped,)))


def test_a_set_for_other_languages_is_not_replaced(
    options: PrepareOptions,
    tmp_path: Path,
    tokenizer_folder: Path,  # noqa: F811
) -> None:
    before = contents(prepare(options).folder)
    loaded = Tokenizer.load(tokenizer_folder)
    Tokenizer(replace(loaded.settings, languages=("en", "fur")), loaded.models).save(tmp_path / "fur")
    other = replace(options, tokenizer=tmp_path / "fur", force=True)
    with pytest.raises(ConfigError, match="holds the prepared set for en to de, which would be lost"):
        prepare(other)
    assert contents(options.out or tmp_path) == before
