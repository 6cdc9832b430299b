"""Word alignment by attention and by IBM Model 1, and `trmt align`."""

from __future__ import annotations

import io
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests import texts, toy
from tests.commands import Command
from tests.fakes import small_network
from tests.scripted import hostile_line, random_bundle, small_tokenizer
from trmt.bundles import bundles
from trmt.errors import ConfigError, DataError
from trmt.insight.alignment.aligners import (
    AttentionAligner,
    AttentionHead,
    HeadOptions,
    TokenizedPair,
    all_heads,
    attention_links,
)
from trmt.insight.alignment.ibm_model1 import EMPTY_PROBABILITY, TENSION, UNSEEN, Model1
from trmt.insight.alignment.pipeline import (
    AlignOptions,
    align_corpus,
    build_aligner,
    rank_heads,
    read_pairs,
)
from trmt.insight.alignment.symmetrisation import METHODS
from trmt.nets.base import WantedWeights
from trmt.nets.ragged import Ragged, Source
from trmt.sets.shards import PreparedSet
from trmt.text.links import NO_LINKS, format_links, parse_gold, parse_links, reverse_links
from trmt.text.tokenizer import Side, Tokenizer
from trmt.text.words import NO_WORD, link_pieces, word_indices


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Bundles of both directions with random weights."""
    folder = tmp_path_factory.mktemp("models")
    for name, languages in (("forward", ("en", "de")), ("backward", ("de", "en"))):
        random_bundle(folder / name, small_tokenizer(folder / f"{name}-tokenizer", languages=languages))
    return folder / "forward", folder / "backward"


@pytest.fixture(scope="module")
def prepared_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy.make_set(tmp_path_factory.mktemp("set"), joint=False)


@pytest.fixture
def trmt(trmt: Command) -> Command:
    """The fixture `trmt`, with standard error in one line."""

    def run(*arguments: str | Path, stdin: bytes = b"") -> tuple[int, bytes, str]:
        code, out, err = trmt(*arguments, stdin=stdin)
        return code, out, " ".join(err.split())

    return run


# The words of pieces


def spelled(side: Side, ids: list[int]) -> str:
    return side.decode(ids).replace("\u2581", " ").strip()


def test_the_pieces_of_a_word_spell_it(tokenizer: Tokenizer) -> None:
    side, chooser = tokenizer.source, random.Random(4)
    sentences = [sentence for language in texts.ALL.values() for sentence in language]
    seen = 0
    for text in [*sentences, *(hostile_line(chooser).decode(errors="replace") for _ in range(300))]:
        given = text.split()
        [ids] = side.encode([text])
        words = word_indices(side, text, ids)
        assert len(words) == len(ids)
        while words and words[-1] == NO_WORD:  # white space at the end
            assert not spelled(side, [ids[len(words) - 1]])
            words.pop()
        assert words == sorted(words) and all(0 <= word < len(given) for word in words), text
        if "\u2581" in text:  # sentencepiece takes it for white space
            continue
        for index, word in enumerate(given):
            own = [token for token, each in zip(ids, words, strict=False) if each == index]
            assert spelled(side, own) == side.normalise(word), (text, word)
            seen += 1
    assert seen > 1000


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("´a´ ½ x", ["´a´", "½", "x"]),  # normalised to five words
        ("\u200b x y\u200by", [None, "x", "y\u200by"]),  # one is gone, one is two
        ("①② ﷺ z", ["①②", "ﷺ", "z"]),
        ("  a  b ", ["a", "b"]),
        ("x\u00a0y\u3000z", ["x", "y", "z"]),
    ],
)
def test_words_are_those_of_the_text_as_given(
    tokenizer: Tokenizer, text: str, expected: list[str | None]
) -> None:
    settings = replace(tokenizer.settings, normalise_source="nmt_nfkc", normalise_target="nmt_nfkc")
    side = Tokenizer(settings, tokenizer.models).source
    [ids] = side.encode([text])
    words = word_indices(side, text, ids)
    for index, word in enumerate(expected):
        own = [token for token, each in zip(ids, words, strict=True) if each == index]
        assert spelled(side, own) == (side.normalise(word) if word else "")


def test_every_piece_of_a_word_is_linked_to_every_piece_of_the_other() -> None:
    assert link_pieces(parse_links("0-1 1-0", where=""), [0, 0, 1], [0, 1, 1]) == [
        (0, 1),
        (1, 1),
        (0, 2),
        (1, 2),
        (2, 0),
    ]
    assert link_pieces(parse_links("5-0", where=""), [0, NO_WORD], [0]) == []


# Attention


def matrix(rows: list[list[float]]) -> torch.Tensor:
    """The weights of one layer and head."""
    return torch.tensor(rows)[None, None]


def test_links_are_where_the_attention_is_highest() -> None:
    pieces = TokenizedPair([1, 2, 3], [4, 5, 6], [0, 0, 1], [0, 1, 1], truncated=False)
    weights = matrix([[0.5, 0.1, 0.3, 0.9], [0.1, 0.2, 0.6, 0.1], [0.1, 0.6, 0.2, 0.1], [0.0, 0.0, 0.9, 0.1]])
    # The end of the source is never linked, though it has the highest weight of the first row.
    assert attention_links(pieces, weights, AttentionHead(0)) == parse_links("0-0 1-1 0-1", where="")
    assert attention_links(pieces, weights, AttentionHead(0, shift=1)) == parse_links("1-0 0-1 1-1", where="")
    two = torch.cat([weights, weights.roll(1, -1)], 1)
    assert attention_links(pieces, two, AttentionHead(0, head=0)) == attention_links(
        pieces, weights, AttentionHead(0)
    )
    assert attention_links(pieces, two, AttentionHead(0, head=1)) != attention_links(
        pieces, weights, AttentionHead(0)
    )


def aligner_of(tokenizer: Tokenizer, architecture: str = "transformer", **training: Any) -> AttentionAligner:
    sizes = {
        "source_vocabulary": tokenizer.source.vocabulary,
        "target_vocabulary": tokenizer.target.vocabulary,
    }
    net = small_network(architecture, **sizes)
    options = training.pop("options", HeadOptions())
    manifest = bundles.make_manifest(net, architecture, tokenizer, longest={}, training=training)
    return AttentionAligner(net, tokenizer, manifest, options)


PAIRS = [*zip(texts.ENGLISH, texts.GERMAN, strict=True)][:12]


@pytest.mark.parametrize("architecture", ["transformer", "rnn", "conv", "universal"])
def test_links_are_those_of_the_network_for_a_single_pair(tokenizer: Tokenizer, architecture: str) -> None:
    aligner = aligner_of(tokenizer, architecture, options=HeadOptions(layer=1, head=1, shift=False))
    found = aligner.links([("", "x"), *PAIRS, (" ", "\t")])
    assert found[0] == found[-1] == NO_LINKS
    side = tokenizer.source
    for (source, target), links in zip(PAIRS, found[1:-1], strict=True):
        ids = [side.encode([text])[0] for text in (source, target)]
        with torch.no_grad():
            before = Ragged.of([[side.bos, *ids[1]]])
            output = aligner.net(Source.of([[*ids[0], side.eos]]), before, want=WantedWeights(cross=True))
        weights = output.cross_attention[0, 0, 0, : len(ids[1]), : len(ids[0])]
        words = [word_indices(side, text, each) for text, each in zip((source, target), ids, strict=True)]
        aligned = weights.argmax(1).tolist()
        expected = {(words[0][column], words[1][row]) for row, column in enumerate(aligned)}
        assert links == expected


def test_a_guided_network_uses_its_guided_head(tokenizer: Tokenizer) -> None:
    def links(guided: dict[str, Any] | None, options: HeadOptions) -> list[Any]:
        training = {"alignment": guided} if guided else {}
        return aligner_of(tokenizer, options=options, **training).links(PAIRS)

    default = links(None, HeadOptions())
    # There are two layers, so the first is the penultimate.
    assert default == links(None, HeadOptions(layer=1)) != links(None, HeadOptions(layer=2))
    guided = links({"layer": -2, "head": 1, "shift": 1}, HeadOptions())
    assert guided == links(None, HeadOptions(layer=1, head=2, shift=True)) != default
    # A network of two layers has no third from the end: the first is used, as in training.
    assert links({"layer": -3, "head": 1, "shift": 1}, HeadOptions()) == guided
    # The user's choice comes first; the heads of another layer were not guided.
    head = {"layer": -2, "head": 1, "shift": 1}
    assert links(head, HeadOptions(layer=2)) == links(None, HeadOptions(layer=2, shift=True))
    assert links(head, HeadOptions(shift=False)) == links(None, HeadOptions(layer=1, head=2, shift=False))
    for wrong in (HeadOptions(layer=3), HeadOptions(head=3), HeadOptions(layer=0)):
        with pytest.raises(ConfigError, match="choose from 1 to 2"):
            links(None, wrong)


def test_long_sentences_are_truncated_and_counted(tokenizer: Tokenizer) -> None:
    aligner = aligner_of(tokenizer)  # of 96 positions
    long = "word " * 500
    found = aligner.links([(long, "eins zwei"), ("one", long), PAIRS[0]])
    assert aligner.truncated == 2 and all(found)
    assert all(source < 96 for source, _ in found[0]) and all(target < 96 for _, target in found[1])
    assert found[2] == aligner_of(tokenizer).links([PAIRS[0]])[0]


def test_the_best_head_comes_first(tokenizer: Tokenizer, tmp_path: Path) -> None:
    aligner = aligner_of(tokenizer)
    true = AttentionHead(1, head=1, shift=1)
    options = HeadOptions(layer=true.layer + 1, head=2, shift=True)
    gold = aligner_of(tokenizer, options=options).links(PAIRS)
    (tmp_path / "gold").write_text("".join(f"{format_links(links)}\n" for links in gold))
    ranked = rank_heads(aligner, PAIRS, tmp_path / "gold")
    assert ranked[0][0] == true and ranked[0][1].error_rate == 0 < ranked[1][1].error_rate
    assert {head for head, _ in ranked} == {*all_heads(2, 2)} and len(ranked) == 12
    with pytest.raises(DataError, match="has 12 lines, but there are 11 pairs"):
        rank_heads(aligner, PAIRS[1:], tmp_path / "gold")


# IBM Model 1


def test_probabilities_are_those_of_model_1(prepared_set: Path) -> None:
    data = PreparedSet.open(prepared_set)
    tokenizer, split = Tokenizer.load(data.tokenizer_folder), data.split("train")
    for reverse in (False, True):
        model = Model1.train(split, tokenizer, reverse=reverse)
        sides = ("target", "source") if reverse else ("source", "target")
        rows = [split.gather(f"{side}.ids", np.arange(len(split))) for side in sides]
        sentences = [np.split(values, np.cumsum(lengths)[:-1]) for values, lengths in rows]
        table = reference_model1([*zip(*sentences, strict=True)], empty=model.empty)
        for (source, target), expected in random.Random(3).sample(sorted(table.items()), 60):
            found = model.probability(np.array([source]), np.array([target]))[0, 0]
            assert found == pytest.approx(expected, rel=1e-6, abs=1e-12)


def reference_model1(pairs: list[Any], *, empty: int) -> dict[tuple[int, int], float]:
    """Five iterations of Model 1 with dictionaries, over the distinct pieces of each pair."""
    some = [({*source.tolist(), empty}, {*target.tolist()}) for source, target in pairs]
    value = {(one, other): 1.0 for source, target in some for one in source for other in target}
    for _ in range(5):
        counts = dict.fromkeys(value, 0.0)
        for source, target in some:
            for other in target:
                total = sum(value[one, other] for one in source)
                for one in source:
                    counts[one, other] += value[one, other] / total
        totals: dict[int, float] = {}
        for (one, _), count in counts.items():
            totals[one] = totals.get(one, 0.0) + count
        value = {(one, other): count / totals[one] for (one, other), count in counts.items()}
    return value


def test_repeated_pieces_are_aligned_along_the_diagonal() -> None:
    model = Model1(np.array([3 * 10 + 7]), np.array([0.5]), empty=9, target_vocabulary=10)
    # The same piece three times: each is aligned to the nearest one.
    assert model.align([3, 3, 3], [7, 7, 7]) == [0, 1, 2]
    weights = [np.exp(-TENSION * abs((position + 0.5) / 3 - 0.5)) for position in range(3)]
    assert 0.5 * weights[0] / sum(weights) * (1 - EMPTY_PROBABILITY) > EMPTY_PROBABILITY * UNSEEN
    # A piece that the empty piece explains best is not aligned.
    model = Model1(np.array([3 * 10 + 7, 9 * 10 + 8]), np.array([0.5, 0.5]), empty=9, target_vocabulary=10)
    assert model.align([3, 3], [8, 7]) == [-1, 1]


def test_model_1_learns_the_toy_language(prepared_set: Path) -> None:
    aligner = build_aligner(AlignOptions(model1=prepared_set))
    pairs = toy.pairs(60, seed=99)
    right = found = wanted = 0
    for (source, _), links in zip(pairs, aligner.links(pairs), strict=True):
        words = source.split()
        true = {(number, len(words) - 1 - number) for number in range(len(words))}
        right, found, wanted = right + len(links & true), found + len(links), wanted + len(true)
    # Words that occur twice in a sentence are ambiguous for Model 1.
    assert right / found > 0.7 and right / wanted > 0.7


# Both directions, and the command


def test_two_directions_are_symmetrised(models: tuple[Path, Path]) -> None:
    forward_model, backward_model = models
    forward = AttentionAligner.load(forward_model).links(PAIRS)
    backward = AttentionAligner.load(backward_model).links([(target, source) for source, target in PAIRS])
    for method in METHODS:
        aligner = build_aligner(AlignOptions(model=forward_model, reverse=backward_model, method=method))
        expected = [
            METHODS[method](*both) for both in zip(forward, map(reverse_links, backward), strict=True)
        ]
        assert aligner.links(PAIRS) == expected
    assert len({*map(len, forward)}) > 2


def test_every_line_has_one_line_of_links_whatever_its_bytes(
    models: tuple[Path, Path], trmt: Command
) -> None:
    chooser = random.Random(8)
    lines = [hostile_line(chooser) + chooser.choice([b"\t", b""]) + hostile_line(chooser) for _ in range(250)]
    lines[100:100] = [b"\tonly a target", b"only a source\t", b"no tab at all", b"a\tb\tc", b""]
    code, out, err = trmt("align", *models[:1], "--reverse", models[1], stdin=b"\n".join(lines))
    assert code == 0
    found = out.split(b"\n")
    assert found.pop() == b"" and len(found) == len(lines)
    for line, links in zip(lines, found, strict=True):
        assert links.endswith(b"\r") == line.endswith(b"\r")
        source, _, target = (
            line.removesuffix(b"\r").decode(errors="replace").removeprefix("\ufeff").partition("\t")
        )
        words = len(source.split()), len(target.split())
        for one, other in parse_links(links.decode(), where=""):
            assert one < words[0] and other < words[1]
        if not all(words):
            assert not links.strip()
    assert sum(map(bool, found)) > 50
    assert "have no tab" in err and "not valid UTF-8" in err


def test_streams_and_corpora_give_the_same_links(
    models: tuple[Path, Path], tmp_path: Path, trmt: Command
) -> None:
    corpus = toy.write_tsv(tmp_path / "pairs.tsv", PAIRS)
    expected = "".join(
        f"{format_links(links)}\n" for links in AttentionAligner.load(models[0]).links(PAIRS)
    ).encode()
    assert trmt("align", models[0], stdin=Path(corpus).read_bytes())[:2] == (0, expected)
    code, out, _ = trmt("align", models[0], "--pairs", corpus)
    assert (code, out) == (0, expected)
    aligner = AttentionAligner.load(models[0])
    assert read_pairs(aligner, io.BytesIO(Path(corpus).read_bytes())) == read_pairs(aligner, corpus) == PAIRS


def test_links_are_evaluated_against_gold(models: tuple[Path, Path], tmp_path: Path, trmt: Command) -> None:
    pairs = "".join(f"{source}\t{target}\n" for source, target in PAIRS).encode()
    _, out, _ = trmt("align", models[0], stdin=pairs)
    found, gold = tmp_path / "found", tmp_path / "gold"
    found.write_bytes(out)
    gold.write_bytes(out)
    code, again, err = trmt("align", models[0], "--gold", gold, stdin=pairs)
    assert (code, again) == (0, out) and "alignment error rate 0.0000" in err
    gold.write_text("0p0 1-1\n" * len(PAIRS))
    expected = sum(
        (len(links & {(1, 1)}) + len(links & {(1, 1), (0, 0)}))
        for links in (parse_links(line, where="") for line in out.decode().splitlines())
    )
    total = len(out.split()) + len(PAIRS)
    code, result, _ = trmt("align", "--evaluate", found, "--gold", gold)
    assert code == 0 and f"error rate {1 - expected / total:.4f}" in result.decode()
    assert (
        f"error rate {1 - expected / total:.4f}" in trmt("align", models[0], "--gold", gold, stdin=pairs)[2]
    )
    code, table, _ = trmt("align", models[0], "--gold", gold, "--rank-heads", stdin=pairs)
    assert code == 0 and len(table.splitlines()) == 13 and table.startswith(b"layer")


def test_gold_of_other_text_is_refused(models: tuple[Path, Path], tmp_path: Path, trmt: Command) -> None:
    pairs = "".join(f"{source}\t{target}\n" for source, target in PAIRS).encode()
    gold = tmp_path / "gold"
    for lines, message in (
        ("0-0\n" * 11, "fewer lines than there are pairs"),
        ("0-0\n" * 13, "more lines than there are pairs"),
        ("0-0\n50-0\n" + "0-0\n" * 10, "gold, line 2: 50-0 is beyond"),
        ("0-0\nnone\n" + "0-0\n" * 10, "gold, line 2: 'none' is no link"),
    ):
        gold.write_text(lines)
        code, _, err = trmt("align", models[0], "--gold", gold, stdin=pairs)
        assert code == 1 and message in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rank-heads"], "--rank-heads needs gold"),
        (["--choose"], "--rank-heads needs gold"),
        (["--given", "x"], "--evaluate needs gold"),
        (["--symmetrise", "union"], "--reverse"),
        (["--symmetrise", "grow", "--reverse", "x"], "there is no symmetrisation 'grow'"),
        (["--ibm-model1", "x", "--layer", "2"], "--ibm-model1 takes no model"),
        (["--counts", "x", "--reverse", "y"], "--ibm-model1 takes no model"),
    ],
)
def test_options_that_exclude_each_other_are_refused(options: list[str], message: str, trmt: Command) -> None:
    code, out, err = trmt("align", *options)
    assert code == 1 and message in err and not out


def test_a_model_of_the_same_direction_is_no_reverse(models: tuple[Path, Path], trmt: Command) -> None:
    code, _, err = trmt("align", models[0], "--reverse", models[0], stdin=b"a\tb\n")
    assert code == 1 and "translates en to de, which is not the reverse of en to de" in err


def test_prepare_reads_the_links(prepared_set: Path, tmp_path: Path) -> None:
    from trmt.sets.preparing import PrepareOptions, prepare

    corpus = str(prepared_set.parent / "half.tsv")
    with (tmp_path / "half.align").open("wb") as out:
        align_corpus(build_aligner(AlignOptions(model1=prepared_set)), corpus, out)
    made = prepare(
        PrepareOptions(
            train=(corpus,),
            out=tmp_path / "set",
            tokenizer=prepared_set.parent / "tokenizer",
            alignments=(str(tmp_path / "half.align"),),
            workers=1,
        )
    )
    values, lengths = made.split("train").gather("alignment", np.arange(len(made.split("train"))))
    assert len(values) == lengths.sum() and (lengths > 0).mean() > 0.9
    assert parse_gold((tmp_path / "half.align").read_text().splitlines()[0], where="").sure
