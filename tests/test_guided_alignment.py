"""Guided alignment: links in prepared sets, their loss, and runs that learn them."""

from __future__ import annotations

import gzip
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests import toy
from tests.fakes import random_sentences, small_network
from tests.variants import Variant, variants
from trmt.averaging import AverageOptions, average
from trmt.bundles import bundles, checkpoints
from trmt.errors import ConfigError, DataError
from trmt.lab.denoising import DenoisingConfig
from trmt.nets.base import WantedWeights, layer_index
from trmt.nets.ragged import Ragged, Source
from trmt.objectives.base import Specials
from trmt.objectives.guided_alignment import SMALLEST, BatchLinks, GuidedHead, alignment_loss
from trmt.objectives.translation import TranslationConfig, TranslationObjective
from trmt.sets.batches import BatchConfig, Batches, RaggedBatch
from trmt.sets.preparing import PrepareOptions, prepare
from trmt.sets.shards import PreparedSet, RaggedArray
from trmt.text.tokenizer import Tokenizer
from trmt.text.words import word_indices
from trmt.training.recipe import load_recipe
from trmt.training.run import train

SPECIALS = Specials(bos=3, eos=2)


def backwards(text: str) -> str:
    """The links of a pair of the toy language, whose translations are the words backwards."""
    count = len(text.split())
    return " ".join(f"{word}-{count - 1 - word}" for word in range(count))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy.make_set(tmp_path_factory.mktemp("plain"))


def with_links(plain: Path, folder: Path, **more: Any) -> PrepareOptions:
    """The toy set with its true links, one of the files packed."""
    names = []
    for name in ("half", "rest"):
        tsv = (plain.parent / f"{name}.tsv").read_text(encoding="utf-8")
        lines = [backwards(line.split("\t")[0]) for line in tsv.splitlines()]
        names.append(str(folder / f"{name}.align.gz"))
        with gzip.open(names[-1], "wt", encoding="utf-8") as stream:
            stream.write("".join(f"{line}\n" for line in lines))
    return PrepareOptions(
        train=tuple(str(plain.parent / f"{name}.tsv") for name in ("half", "rest")),
        dev=str(plain.parent / "dev.tsv"),
        out=folder / "set",
        tokenizer=plain.parent / "tokenizer",
        alignments=tuple(names),
        workers=1,
        **more,
    )


@pytest.fixture(scope="module")
def guided_set(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(with_links(plain, tmp_path_factory.mktemp("guided"))).folder


# Prepared sets


def test_links_of_words_become_links_of_pieces(plain: Path, guided_set: Path) -> None:
    data = PreparedSet.open(guided_set)
    split = data.split("train")
    tokenizer = Tokenizer.load(data.tokenizer_folder)
    every = np.arange(len(split))
    columns = [split.gather(name, every) for name in ("source.ids", "target.ids", "alignment")]
    seen = set()
    for source, target, flat in zip(
        *(np.split(values, np.cumsum(lengths)[:-1]) for values, lengths in columns), strict=True
    ):
        texts = tokenizer.source.decode(source.tolist()), tokenizer.target.decode(target.tolist())
        words = (
            word_indices(tokenizer.source, texts[0], source.tolist()),
            word_indices(tokenizer.target, texts[1], target.tolist()),
        )
        links = {tuple(link) for link in flat.reshape(-1, 2).tolist()}
        last = len(texts[0].split()) - 1
        assert links == {
            (one, other)
            for one, word in enumerate(words[0])
            for other, image in enumerate(words[1])
            if word == last - image
        }
        seen.add(len(links))
    assert len(seen) > 5
    # Duplicates are dropped with their links, and a set without links has no such column.
    assert len(split) < 300
    assert "alignment" not in {column.name for column in PreparedSet.open(plain).split("train").columns}


def test_the_same_files_are_up_to_date_and_others_are_not(
    plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = with_links(plain, tmp_path)
    first = prepare(options).fingerprint
    assert prepare(options).fingerprint == first and "up to date" in capsys.readouterr().err
    path = Path(options.alignments[0])
    lines = gzip.decompress(path.read_bytes()).splitlines()
    path.write_bytes(gzip.compress(b"\n".join([b"0-0", *lines[1:]]) + b"\n"))
    assert prepare(options).fingerprint != first
    assert "up to date" not in capsys.readouterr().err


def test_links_that_do_not_belong_to_the_pairs_are_refused(plain: Path, tmp_path: Path) -> None:
    options = with_links(plain, tmp_path)
    path = Path(options.alignments[1])
    lines = gzip.decompress(path.read_bytes()).decode().splitlines()

    def refused(changed: list[str], message: str) -> None:
        path.write_bytes(gzip.compress("".join(f"{line}\n" for line in changed).encode()))
        with pytest.raises(DataError, match=message):
            prepare(options)
        assert not (tmp_path / "set").exists()

    refused(lines[:-1], r"rest.align.gz has 149 lines but .*rest.tsv has more pairs")
    refused([*lines, ""], r"rest.align.gz has more lines than the 150 pairs")
    refused([*lines[:9], "0-99", *lines[10:]], r"rest.align.gz, line 10: 0-99 is beyond")
    refused([*lines[:9], "zero-0", *lines[10:]], r"rest.align.gz, line 10: 'zero-0' is no link")
    with pytest.raises(ConfigError, match="one for each"):
        PrepareOptions(train=("a", "b"), alignments=("c",))


def test_workers_find_the_same_links(plain: Path, guided_set: Path, tmp_path: Path) -> None:
    options = with_links(plain, tmp_path)
    many = prepare(PrepareOptions(**{**vars(options), "workers": 2}))
    files = {
        name: entry["sha256"] for name, entry in many.index["files"].items() if name.startswith("train-")
    }
    assert any("alignment" in name for name in files)
    before = PreparedSet.open(guided_set).index["files"]
    assert files == {name: before[name]["sha256"] for name in files}


# The loss


def examples(count: int, *, seed: int = 0) -> RaggedBatch:
    """Pairs with some links, one of them without any."""
    chooser = random.Random(seed)
    sides = [random_sentences(count, seed=seed), random_sentences(count, seed=seed + 1)]
    links = []
    for number, (source, target) in enumerate(zip(*sides, strict=True)):
        points = [(one, other) for one in range(len(source)) for other in range(len(target))]
        some = chooser.sample(points, min(len(points), number * 2))
        links.append([position for point in some for position in point])

    def column(rows: list[list[int]]) -> RaggedArray:
        flat = [value for row in rows for value in row]
        return RaggedArray(np.array(flat, np.int64), np.array([len(row) for row in rows], np.int64))

    return RaggedBatch(
        {"source.ids": column(sides[0]), "target.ids": column(sides[1]), "alignment": column(links)}
    )


def by_hand(net: Any, batch: RaggedBatch, guided: GuidedHead) -> float:
    """The loss of the definition, one sentence and one link at a time."""
    columns = {
        name: np.split(column.values, np.cumsum(column.lengths)[:-1])
        for name, column in batch.columns.items()
    }
    total = 0.0
    for source, target, flat in zip(*columns.values(), strict=True):
        output = net(Source.of([[*source, 2]]), Ragged.of([[3, *target]]), want=WantedWeights(cross=True))
        layer = output.cross_attention[layer_index(guided.layer, output.cross_attention.shape[0])]
        weights = layer[0, min(guided.head, layer.shape[1] - 1)]
        links = flat.reshape(-1, 2).tolist()
        for written in {other for _, other in links}:
            sources = [one for one, other in links if other == written]
            row = weights[written + guided.shift]
            total -= sum(math.log(max(row[one].item(), SMALLEST)) for one in sources) / len(sources)
    return total


WITH_ATTENTION = [each for each in variants(defaults=True) if each.weights and "cross" in each.weights]


@pytest.mark.parametrize("variant", WITH_ATTENTION, ids=str)
@pytest.mark.parametrize("shift", [False, True])
def test_the_loss_is_that_of_the_definition(variant: Variant, shift: bool) -> None:
    net = small_network(variant.name, **variant.options)
    batch = examples(6)
    plain = TranslationObjective(TranslationConfig(), SPECIALS)
    config = TranslationConfig(alignment_weight=0.5, alignment_head=2, alignment_shift=shift)
    guided = TranslationObjective(config, SPECIALS)
    with torch.no_grad():
        before = plain.loss(net, plain.collate(without_links(batch), torch.device("cpu")))
        after = guided.loss(net, guided.collate(batch, torch.device("cpu")))
    expected = by_hand(net, batch, GuidedHead(-2, 1, int(shift)))
    assert expected > 1
    assert float(after.total - before.total) == pytest.approx(0.5 * expected, rel=1e-4)
    assert float(after.nll) == pytest.approx(float(before.nll)) and after.tokens == before.tokens


def without_links(batch: RaggedBatch) -> RaggedBatch:
    return RaggedBatch({name: column for name, column in batch.columns.items() if name != "alignment"})


@pytest.mark.parametrize("architecture", ["transformer", "rnn"])
def test_sums_and_gradients_add_up_over_any_split(architecture: str) -> None:
    net = small_network(architecture)
    objective = TranslationObjective(TranslationConfig(alignment_weight=0.3), SPECIALS)
    batch = examples(7)

    def learned(parts: list[RaggedBatch]) -> tuple[float, list[torch.Tensor]]:
        net.zero_grad()
        total = 0.0
        for part in parts:
            loss = objective.loss(net, objective.collate(part, torch.device("cpu")))
            loss.total.backward()
            total += float(loss.total.detach())
        return total, [p.grad.clone() for p in net.parameters() if p.grad is not None]

    whole = learned([batch])
    for parts in (
        [batch.slice(0, 3), batch.slice(3, 7)],
        [batch.shard(rank, 3) for rank in range(3)],
        [batch.slice(at, at + 1) for at in range(7)],  # the first of which has no links
    ):
        total, gradients = learned(parts)
        assert total == pytest.approx(whole[0], rel=1e-5)
        for one, other in zip(gradients, whole[1], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_only_the_guided_head_is_computed() -> None:
    net = small_network("transformer", decoder_layers=3)
    source, target = Source.of([[5, 6, 2], [7, 2]]), Ragged.of([[3, 8], [3, 9, 10]])
    every = net(source, target, want=WantedWeights(cross=True)).cross_attention
    for layer in (0, 1, 2, -1, -3, -9, 7):
        for head in (0, 1, 5):  # there are two: the last one stands for those beyond it
            want = WantedWeights(cross=True, layer=layer, head=head)
            found = net(source, target, want=want).cross_attention
            assert found.shape[0] == found.shape[2] == 1
            torch.testing.assert_close(found[0, :, 0], every[layer_index(layer, 3), :, min(head, 1)])
    assert (WantedWeights().cross_layers(3), WantedWeights().cross_heads(2)) == (range(0), slice(None))
    assert WantedWeights(cross=True).cross_layers(3) == range(3)


def test_weights_of_zero_do_not_end_training() -> None:
    attention = torch.tensor([[[[[1.0, 0.0]]]]], requires_grad=True)
    links = BatchLinks.of(RaggedArray(np.array([1, 0]), np.array([2])), torch.device("cpu"))
    loss = alignment_loss(attention, links, GuidedHead(0, 0, 0))
    loss.backward()
    assert attention.grad is not None
    assert torch.isfinite(loss) and torch.isfinite(attention.grad).all()


def test_what_cannot_be_guided_is_refused(plain: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="alignment_layer"):
        TranslationConfig(alignment_layer=0)
    with pytest.raises(ConfigError, match="which denoising has not"):
        DenoisingConfig(alignment_weight=1.0)
    with pytest.raises(ConfigError, match="subword_alpha"):
        load_recipe("transformer-tiny", ["batches.subword_alpha=0.1", "loss.alignment_weight=0.1"])
    with pytest.raises(ConfigError, match=r"has no alignments.*--alignments FILE"):
        Batches(PreparedSet.open(plain), BatchConfig(), seed=1, extra_columns=("alignment",))
    objective = TranslationObjective(TranslationConfig(alignment_weight=1.0), SPECIALS)
    batch = objective.collate(examples(3), torch.device("cpu"))
    with pytest.raises(ConfigError, match="this network has none"):
        objective.loss(small_network("rnn", context="start"), batch)


# Runs


@pytest.mark.parametrize("architecture", ["transformer", "rnn"])
def test_guided_attention_learns_the_links(architecture: str) -> None:
    batch = examples(8, seed=3)
    left = {}
    for weight in (0.0, 2.0):
        net = small_network(architecture).train()
        objective = TranslationObjective(TranslationConfig(alignment_weight=weight), SPECIALS)
        optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
        for _ in range(25):
            loss = objective.loss(net, objective.collate(batch, torch.device("cpu")))
            optimizer.zero_grad()
            (loss.total / loss.tokens).backward()
            optimizer.step()
        left[weight] = by_hand(net.eval(), batch, objective.head)
    assert left[2.0] < 0.7 * left[0.0]


def test_a_guided_run_resumes_exactly_and_records_its_head(guided_set: Path, tmp_path: Path) -> None:
    recipe = toy.recipe(tmp_path, {"loss": {"alignment_weight": 0.5, "alignment_shift": True}})
    whole, run = tmp_path / "whole", tmp_path / "run"
    train(toy.options(whole, guided_set, recipe))
    train(toy.options(run, guided_set, recipe, "training.steps=3"))
    train(toy.options(run, guided_set, recipe))
    once, resumed = (checkpoints.list_checkpoints(folder)[-1].load_state()[1] for folder in (whole, run))
    torch.testing.assert_close(dict(resumed), dict(once), rtol=0, atol=0, equal_nan=True)
    expected = {"layer": -2, "head": 0, "shift": 1}
    assert checkpoints.list_checkpoints(run)[-1].manifest.training["alignment"] == expected
    averaged = average(AverageOptions(paths=(run,), last=2))
    assert bundles.read_manifest(averaged).training["alignment"] == expected
    # What guides it may not change on the way.
    with pytest.raises(ConfigError, match=r"loss\.alignment_weight"):
        train(toy.options(run, guided_set, recipe, "loss.alignment_weight=0.1", "training.steps=9"))
