"""Pretraining on documents, and translation models that start from the encoder."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import toy
from tests.toy import options, write_documents
from trmt.bundles import bundles, checkpoints
from trmt.config import to_toml
from trmt.errors import BundleError, TrmtError
from trmt.interop.bert_folder import export_bert
from trmt.nets.ragged import Source
from trmt.sets.documents import DocumentOptions, prepare_documents
from trmt.sets.shards import PreparedSet
from trmt.training.planning import TrainOptions
from trmt.training.run import train
from trmt.translating import Translator

POSITIONS, QKV = "encoder.embedding.positions", "layers.0.self_qkv.weight"
NETWORK = {"d_model": 16, "heads": 2, "feed_forward": 32, "encoder_layers": 1, "max_positions": 96}
BERT: dict[str, Any] = {
    **toy.BASE,
    "architecture": "masked-encoder",
    "objective": "masked",
    "network": {**NETWORK, "dropout": 0.1, "attention_dropout": 0.0},
    "batches": {"tokens": 200, "passage_tokens": 40},
}
BART = {**BERT, "architecture": "transformer", "objective": "denoising"}
BART["network"] = {**NETWORK, "decoder_layers": 1}


NO_UPDATES = "optim.lr=1e-9"  # so that the initial weights are still there after training


@pytest.fixture(scope="module")
def documents(toy_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("documents")
    train_file = write_documents(folder / "train.txt", count=60, seed=1)
    dev = write_documents(folder / "dev.txt", count=6, seed=2)
    tokenizer = PreparedSet.open(toy_set).tokenizer_folder
    return prepare_documents(DocumentOptions((train_file,), dev, folder / "set", tokenizer)).folder


def recipe(folder: Path, tree: dict[str, Any]) -> str:
    path = folder / f"{tree['objective']}.toml"
    path.write_text(to_toml(tree), encoding="utf-8")
    return str(path)


def pretrain(run: Path, data: Path, file: str, *settings: str, **more: Any) -> Path:
    return train(
        TrainOptions(run=run, data=data, recipe=file, settings=list(settings), pretrain=True, **more)
    )


def encoder_of(run: Path) -> Path:
    return Path(f"{run}:encoder")


def weights(run: Path) -> dict[str, torch.Tensor]:
    checkpoint = checkpoints.list_checkpoints(run)[-1]
    return bundles.read_weights(checkpoint.folder, checkpoint.manifest)


@pytest.fixture(scope="module")
def bert(documents: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bert")
    return pretrain(folder / "run", documents, recipe(folder, BERT))


@pytest.mark.parametrize("tree", [BERT, BART], ids=["bert", "bart"])
def test_pretraining_is_resumed_exactly(tree: dict[str, Any], documents: Path, tmp_path: Path) -> None:
    file = recipe(tmp_path, tree)
    hard = ["batches.accumulate=2", "batches.subword_alpha=0.2", "optim.ema=0.9"]
    pretrain(tmp_path / "uninterrupted", documents, file, *hard)
    for steps in (2, 3, 6):
        pretrain(tmp_path / "resumed", documents, file, *hard, f"training.steps={steps}")
    one, other = (weights(tmp_path / name) for name in ("uninterrupted", "resumed"))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("tree", [BERT, BART], ids=["bert", "bart"])
def test_the_loss_falls(tree: dict[str, Any], documents: Path, tmp_path: Path) -> None:
    run = pretrain(
        tmp_path / "run",
        documents,
        recipe(tmp_path, tree),
        "training.steps=60",
        "optim.lr=0.01",
        "validation.every=20",
    )
    scores = [checkpoint.score() for checkpoint in checkpoints.list_checkpoints(run)]
    losses = [score[1] for score in scores if score]
    assert min(losses[1:]) < losses[0] - 0.1


@pytest.mark.parametrize("asked", [True, False])
def test_the_accuracy_of_next_sentence_prediction_is_validated(
    asked: bool, documents: Path, tmp_path: Path
) -> None:
    settings = (f"loss.next_sentence={str(asked).lower()}", "training.steps=2")
    run = pretrain(tmp_path / "run", documents, recipe(tmp_path, BERT), *settings)
    assert bool(accuracies(run)) == asked and all(0 <= value <= 100 for value in accuracies(run))


def topical(path: Path, *, count: int, seed: int) -> str:
    """Documents of two to five sentences, each keeping to two of the words, which no other pair shares."""
    chooser = random.Random(seed)
    groups = [toy.WORDS[at : at + 2] for at in range(0, len(toy.WORDS), 2)]
    documents = []
    for _ in range(count):
        words = chooser.choice(groups)
        lines = (chooser.choices(words, k=chooser.randint(2, 4)) for _ in range(chooser.randint(2, 5)))
        documents.append("\n".join(" ".join(line) for line in lines))
    path.write_text("\n\n".join(documents) + "\n", encoding="utf-8")
    return str(path)


def test_next_sentence_prediction_is_learned_from_topics(toy_set: Path, tmp_path: Path) -> None:
    """Chance is 50 %; of the sentences that do not follow, one in six has the same topic."""
    tokenizer = PreparedSet.open(toy_set).tokenizer_folder
    train_file = topical(tmp_path / "train.txt", count=1500, seed=1)
    dev = topical(tmp_path / "dev.txt", count=150, seed=2)
    data = prepare_documents(DocumentOptions((train_file,), dev, tmp_path / "set", tokenizer)).folder
    network = {**BERT["network"], "d_model": 32, "encoder_layers": 2, "norm_position": "pre", "dropout": 0.0}
    tree = {**BERT, "network": network, "batches": {"tokens": 1000, "passage_tokens": 60}}
    settings = ("optim.lr=5e-3", "optim.warmup=20", "training.steps=120", "validation.every=120")
    run = pretrain(tmp_path / "run", data, recipe(tmp_path, tree), *settings)
    assert accuracies(run)[-1] > 70


def accuracies(run: Path) -> list[float]:
    """The accuracy in percent of next sentence prediction, at each validation."""
    events = map(json.loads, (run / "log.jsonl").read_text("utf-8").splitlines())
    scores = [score for event in events if event["event"] == "validate" for score in event["scores"]]
    return [score["value"] for score in scores if score["metric"] == "right"]


def test_a_translation_model_starts_from_the_encoder(bert: Path, toy_set: Path, tmp_path: Path) -> None:
    run = train(
        options(tmp_path / "run", toy_set, toy.recipe(tmp_path), NO_UPDATES, init_from=encoder_of(bert))
    )
    ours, theirs = weights(run), weights(bert)
    taken = [name for name in theirs if name.startswith("encoder.") and name != POSITIONS]
    assert len(taken) > 12
    for name in taken:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-6, rtol=0)
    positions = (
        theirs[POSITIONS] + theirs["segments"][0]
    )  # all sources of a translation model are of segment 0
    torch.testing.assert_close(ours[POSITIONS], positions, atol=1e-6, rtol=0)
    assert not torch.allclose(ours["decoder.embedding.positions"], theirs[POSITIONS], atol=1e-3)
    network = checkpoints.list_checkpoints(run)[-1].manifest.network
    assert (network["activation"], network["embedding_norm"]) == ("gelu", True)
    assert len(list(Translator.load(run).translate(["ka lomo", "ti"]))) == 2


@pytest.mark.parametrize(
    ("variant", "network", "architecture"),
    [
        ("masked-encoder-alibi+unscaled", {"segments": 1}, "transformer-alibi+unscaled"),
        ("masked-encoder", {"positions": "sinusoidal"}, "transformer"),
    ],
)
def test_an_encoder_is_taken_over_with_its_variants(
    variant: str, network: dict[str, Any], architecture: str, documents: Path, toy_set: Path, tmp_path: Path
) -> None:
    tree = {**BERT, "architecture": variant, "network": {**BERT["network"], **network}}
    encoder = pretrain(tmp_path / "bert", documents, recipe(tmp_path, tree), "training.steps=1")
    run = train(
        options(tmp_path / "run", toy_set, toy.recipe(tmp_path), NO_UPDATES, init_from=encoder_of(encoder))
    )
    assert checkpoints.list_checkpoints(run)[-1].manifest.architecture == architecture
    check_same_encoder(run, encoder)


def check_same_encoder(run: Path, bert: Path) -> None:
    manifest = checkpoints.list_checkpoints(bert)[-1].manifest
    encoder: Any = bundles.build_network(manifest.architecture, manifest.network).eval()
    bundles.load_weights(encoder, weights(bert), where="here")
    translator: Any = bundles.load_bundle(checkpoints.list_checkpoints(run)[-1].folder).net
    source = Source.of([[5, 6, 7, 3], [8, 3]])
    with torch.inference_mode():
        ours, theirs = translator.encode_packed(source), encoder.encode_packed(source)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_the_encoder_output_stays_the_same(bert: Path, toy_set: Path, tmp_path: Path) -> None:
    run = train(
        options(tmp_path / "run", toy_set, toy.recipe(tmp_path), NO_UPDATES, init_from=encoder_of(bert))
    )
    check_same_encoder(run, bert)


def test_the_encoder_of_a_translation_model_can_be_taken_over(toy_set: Path, tmp_path: Path) -> None:
    first = train(options(tmp_path / "first", toy_set, toy.recipe(tmp_path)))
    second = train(
        options(tmp_path / "second", toy_set, toy.recipe(tmp_path), NO_UPDATES, init_from=encoder_of(first))
    )
    one, other = weights(first), weights(second)
    torch.testing.assert_close(one[f"encoder.{QKV}"], other[f"encoder.{QKV}"])
    assert not torch.equal(one[f"decoder.{QKV}"], other[f"decoder.{QKV}"])


def test_a_denoising_model_can_be_fine_tuned_for_translation(
    documents: Path, toy_set: Path, tmp_path: Path
) -> None:
    bart = pretrain(tmp_path / "bart", documents, recipe(tmp_path, BART))
    run = train(options(tmp_path / "run", toy_set, toy.recipe(tmp_path), NO_UPDATES, init_from=bart))
    torch.testing.assert_close(weights(run)[f"decoder.{QKV}"], weights(bart)[f"decoder.{QKV}"])


def test_an_encoder_alone_cannot_translate(bert: Path) -> None:
    with pytest.raises(BundleError, match="--init-from"):
        Translator.load(bert)


def test_a_trained_encoder_can_be_exported_to_hugging_face(bert: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    export_bert(checkpoints.find_bundle(bert), tmp_path / "out")
    model = transformers.BertForPreTraining.from_pretrained(tmp_path / "out")
    rows = model.bert.embeddings.word_embeddings.weight
    torch.testing.assert_close(rows.detach(), weights(bert)["encoder.embedding.tokens.weight"])


def test_combinations_that_do_not_work_are_refused(
    bert: Path, documents: Path, toy_set: Path, tmp_path: Path
) -> None:
    encoder = encoder_of(bert)
    plain = toy.recipe(tmp_path)

    def refused(expected: str, run: Any) -> None:
        with pytest.raises(TrmtError, match=expected):
            run()

    at = tmp_path / "run"
    refused(
        "network.d_model = 32",
        lambda: train(options(at, toy_set, plain, "network.d_model=32", init_from=encoder)),
    )
    rnn = toy.recipe(tmp_path, architecture="rnn")
    refused("architecture = 'rnn'", lambda: train(options(at, toy_set, rnn, init_from=encoder)))
    refused("trmt train", lambda: pretrain(at, toy_set, recipe(tmp_path, BERT)))
    refused("trmt pretrain", lambda: train(options(at, documents, plain)))
    file = recipe(tmp_path, BERT)
    refused("objective = 'masked'", lambda: pretrain(at, documents, file, "architecture=transformer"))
    refused("batches.passage_tokens", lambda: pretrain(at, documents, file, "network.max_positions=20"))
    rnn_run = train(options(tmp_path / "rnn", toy_set, rnn))
    refused(
        "no encoder",
        lambda: train(options(at, toy_set, plain, init_from=encoder_of(rnn_run))),
    )
    assert not at.exists()
