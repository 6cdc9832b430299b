"""What measures training speed counts right, and tells every toolkit the same."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.toy import make_set
from trmt.nets.ragged import Ragged, Source
from trmt.nets.transformer import Transformer, TransformerConfig
from trmt.sets.shards import PreparedSet

BENCH = Path(__file__).parent.parent / "bench"
PEERS = ("fairseq", "joeynmt", "eole", "opennmt", "sockeye", "transformers")


@pytest.fixture(scope="module")
def data_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_set(tmp_path_factory.mktemp("toy"))


def module(name: str) -> ModuleType:
    return importlib.import_module(name)


def job(folder: Path, **fields: Any) -> Any:
    fields = {"corpus": str(folder), "work": str(folder), "report": str(folder / "report.json"), **fields}
    return module("peers.job").Job(**fields)


def test_the_operations_are_those_that_torch_counts() -> None:
    sentences, source, target, width = 3, 16, 11, 32
    config = TransformerConfig(
        source_vocabulary=40,
        target_vocabulary=40,
        d_model=width,
        feed_forward=48,
        heads=4,
        encoder_layers=2,
        decoder_layers=3,
    )
    net = Transformer(config)

    def ragged(kind: Any, length: int) -> Any:
        ids = torch.randint(4, 40, (sentences * length,))
        return kind(ids, torch.full((sentences,), length), length)

    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        net.readout(net(ragged(Source, source), ragged(Ragged, target)).hidden).sum().backward()
    shape = module("peers.job").Shape(
        width=width, feed_forward=48, heads=4, encoder_layers=2, decoder_layers=3, vocabulary=40
    )
    sums = {
        "source_tokens": sentences * source,
        "target_tokens": sentences * target,
        "source_squares": sentences * source**2,
        "target_squares": sentences * target**2,
        "products": sentences * source * target,
    }
    # Torch counts what the causal mask hides: for each query, the keys behind it.
    hidden = 3 * 3 * 4 * width * sentences * target * (target - 1) / 2
    assert module("arithmetic").training_flops(shape, sums) + hidden == counter.get_total_flops()


PROCESS = """
import sys, torch
from peers.job import Job
from peers.probe import Probe

job = Job.read(sys.argv[1])
probe = Probe(job, {"told": 1}).install()
weight = torch.nn.Parameter(torch.ones(3))
optimiser = torch.optim.SGD([weight], lr=0.1)
for update in range(100):
    for micro in range(2):
        lengths = torch.tensor([update + 1, 2])
        probe.batch(lengths, lengths + micro, 2 * (update + 1), 2 * (update + 2))
        (weight.sum() * update).backward()
    optimiser.step()
print("it went on to the end")
"""


def run_with_probe(process: str, one: Any) -> subprocess.CompletedProcess[str]:
    one.write(Path(one.work) / "job.json")
    return subprocess.run(
        [sys.executable, "-c", process, f"{one.work}/job.json"],
        env=os.environ | {"PYTHONPATH": str(BENCH)},
        capture_output=True,
        text=True,
    )


def test_the_window_holds_what_was_trained_after_warming_up_and_ends_the_process(tmp_path: Path) -> None:
    done = run_with_probe(
        PROCESS, job(tmp_path, warmup_updates=3, warmup_seconds=0.0, seconds=0.0, updates=4)
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    report = json.loads((tmp_path / "report.json").read_bytes())
    updates = range(3, 7)  # counted from 0
    assert report["updates"] == len(report["marks"]) == 4 and report["warmup_updates"] == 3
    assert report["source_tokens"] == sum(2 * (update + 3) for update in updates)
    assert report["target_tokens"] == sum(2 * (update + 3) + 2 for update in updates)
    assert report["source_cells"] == sum(2 * 2 * (update + 1) for update in updates)
    assert report["target_cells"] == sum(2 * 2 * (update + 2) for update in updates)
    assert report["products"] == sum(
        (update + 1) ** 2 + 4 + (update + 1) * (update + 2) + 6 for update in updates
    )
    assert [tokens for _, tokens in report["marks"]] == [2 * (update + 3) + 2 for update in updates]
    assert report["configuration"] == {"told": 1} and report["parameters"] == 3


ENDS_EARLY = """
import sys
from peers.job import Job
from peers.probe import Probe

probe = Probe(Job.read(sys.argv[1]), {}).install(optimiser_steps=False)
for _ in range(4):
    probe.update()
"""


def test_training_that_ends_too_early_reports_nothing(tmp_path: Path) -> None:
    done = run_with_probe(ENDS_EARLY, job(tmp_path, warmup_updates=5))
    assert done.returncode == 0 and "training ended after 4 updates" in done.stderr
    assert not (tmp_path / "report.json").exists()


FAMILY = """
import sys
from types import SimpleNamespace

import torch
from peers import onmt_family
from peers.job import Job


class Feed(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.dropout_1 = torch.nn.Dropout(0.5)
        self.weight = torch.nn.Parameter(torch.ones(3))


class Trainer:
    def __init__(self):
        self.model, self.train_loss = torch.nn.Sequential(Feed()), SimpleNamespace(padding_idx=1)
        self.optimiser = torch.optim.SGD(self.model.parameters(), lr=0.1)

    def train(self):
        assert isinstance(self.model[0].dropout_1, torch.nn.Identity)
        for _ in range(9):
            self.step([{"src": torch.zeros(2, 5), "srclen": torch.tensor([5, 3]), "tgt": TARGET}])

    def step(self, batches):
        self.model[0].weight.sum().backward()
        self.optimiser.step()


TARGET = torch.tensor([[2, 7, 7, 3], [2, 7, 3, 1]])  # the second is one shorter
onmt_family.train(
    Job.read(sys.argv[1]),
    {"told": 1},
    program=lambda: Trainer().train(),
    command=["toolkit", "train"],
    trainer=Trainer,
    step="step",
    feed_forward=Feed,
    after=lambda batch: batch["tgt"][:, 1:],
)
"""


def test_toolkits_of_one_family_are_watched_where_they_train(tmp_path: Path) -> None:
    done = run_with_probe(FAMILY, job(tmp_path, warmup_updates=3, warmup_seconds=0.0, seconds=0.0, updates=4))
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "report.json").read_bytes())
    assert report["updates"] == 4
    assert (report["source_tokens"], report["source_cells"]) == (4 * 8, 4 * 10)
    assert (report["target_tokens"], report["target_cells"]) == (4 * 5, 4 * 6)
    assert report["configuration"]["settings"] == {"told": 1}
    assert json.loads((tmp_path / "config.yaml").read_bytes()) == {"told": 1}


def test_the_common_corpus_is_the_prepared_set(tmp_path: Path, data_set: Path) -> None:
    module("peers.corpus").write(data_set, tmp_path)
    data = PreparedSet.open(data_set)
    for side in ("source", "target"):
        lines = (tmp_path / f"train.{side}").read_text().splitlines()
        ids = [[int(word[1:]) for word in line.split()] for line in lines]
        split = data.split("train")
        values, lengths = split.gather(f"{side}.ids", torch.arange(len(split)).numpy())
        assert [token for sentence in ids for token in sentence] == values.tolist()
        assert [len(sentence) for sentence in ids] == lengths.tolist()
        pieces = set((tmp_path / "pieces.txt").read_text().split())
        assert {word for line in lines for word in line.split()} <= pieces
    assert len(pieces) == data.index["vocabulary"][0] - 4


def test_a_tokenizer_for_each_side_cannot_be_compared(tmp_path: Path) -> None:
    apart = make_set(tmp_path / "apart", joint=False)
    with pytest.raises(SystemExit, match="needs one for both"):
        module("peers.corpus").write(apart, tmp_path / "corpus")


@pytest.mark.parametrize("name", PEERS)
def test_every_toolkit_is_told_the_same(name: str, tmp_path: Path) -> None:
    shape = module("peers.job").Shape(
        width=264,
        feed_forward=1056,
        heads=12,
        encoder_layers=5,
        decoder_layers=7,
        vocabulary=8123,
        dropout=0.17,
        label_smoothing=0.13,
    )
    (tmp_path / "train.target").write_text("p4 p5\np6 p7\n")  # three tokens each with its end
    one = job(tmp_path, shape=shape, learning_rate=0.00077, seed=4321, real_tokens=3000)
    adapter = module(f"peers.{name}")
    told = adapter.arguments(one) if hasattr(adapter, "arguments") else adapter.settings(one)
    words = set(re.findall(r"[\w.]+", json.dumps(told)))
    assert {"264", "1056", "12", "5", "7", "0.17", "0.13", "0.00077", "4321"} <= words
    budget = 1000 if name == "transformers" else round(3000 / adapter.FILL)
    assert str(budget) in words, "its batches hold as many real target tokens as trmt's"


def test_a_budget_can_be_set_by_hand(tmp_path: Path) -> None:
    assert job(tmp_path, real_tokens=900).budget(0.9) == 1000
    assert job(tmp_path, options={"batch_tokens": 77}).budget(0.9) == 77


def rounds(*speeds: float) -> list[dict[str, Any]]:
    return [
        {
            "target_tokens_per_second": speed,
            "target_tokens_per_cpu_second": speed / 2,
            "parameters": 3,
            "padding": 0.1,
            "target_tokens_per_update": 10,
            "peak_mib": 11,
            "gflops": speed / 10,
            "seconds": 10.0,
            "loader_wait_seconds": 0.1,
            "torch": "2",
            "threads": 1,
            "configuration": {},
        }
        for speed in speeds
    ]


def test_both_halves_of_a_comparison_are_kept_after_each_round(monkeypatch: pytest.MonkeyPatch) -> None:
    speed = module("gpu_speed")

    def measure(spec: Any, keep: Any) -> dict[str, Any]:
        for rounds in (1, 2):
            figures = {"trmt": rounds, "toolkits": {"trmt": {"target_tokens_per_second": rounds}}}
            keep(figures)
        return figures

    monkeypatch.setattr(speed, "measure", measure)
    monkeypatch.setattr(speed, "replace", lambda spec, **_: spec)
    kept: list[dict[str, Any]] = []
    speed.deterministic(type("Spec", (), {"work": Path()}), kept.append)
    rounds = [{name: one["trmt"] for name, one in figures.items()} for figures in kept]
    assert rounds == [
        {"usual": 1},
        {"usual": 2},
        {"usual": 2, "deterministic": 1},
        {"usual": 2, "deterministic": 2},
    ]


def test_ratios_are_those_of_the_same_round() -> None:
    found = module("rounds").ratio(rounds(100, 300, 200), rounds(50, 100, 160))
    assert found["rounds"] == [2.0, 3.0, 1.25] and found["median"] == 2.0
    assert found["interval"] == [1.25, 3.0] and found["confidence"] == 0.75


def test_a_toolkit_that_fails_is_told_and_the_others_count() -> None:
    runs = {
        "trmt": rounds(100, 200, 300),
        "eole": rounds(50, 100, 150),
        "joeynmt": [*rounds(20), {"error": "no module"}],
        "sockeye": [{"error": "first line\nlast line"}],
    }
    figures = module("rounds").summed_up(runs, [{"peak": 20.0}, {"peak": 25.0}, {"peak": 50.0}])
    assert figures["trmt"]["share_of_gemm_peak_rounds"] == [0.5, 0.8, 0.6]
    assert figures["trmt"]["share_of_gemm_peak"] == 0.6
    assert figures["trmt"]["share_waiting_for_the_loader"] == 0.01
    assert figures["fastest_peer"] == "eole" and set(figures["ratios"]) == {"eole", "joeynmt"}
    assert figures["ratios"]["joeynmt"]["rounds"] == [5.0]
    assert figures["toolkits"]["sockeye"]["error"].endswith("last line")
    assert "failed: last line" in module("rounds").table(
        figures | {"toolkits": {"sockeye": figures["toolkits"]["sockeye"]}, "gemm_gflops": {"median": 1.0}}
    )


def test_fairseq_is_repaired_once_and_only_where_it_is_as_expected(tmp_path: Path) -> None:
    install = module("peers.install")
    broken = {
        "fairseq/dataclass/configs.py": "@dataclass\nclass A:\n    pass\n\n\n@dataclass\nclass B: ...\n",
        "fairseq/models/transformer/transformer_config.py": "@dataclass\nclass C: ...\n",
        "fairseq/data/data_utils.py": "x = np.array(y, np.int, np.int64)\n",
        "fairseq/modules/dynamic_crf_layer.py": 'x = np.float("inf")\n',
    }
    for name, text in broken.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    for _ in range(2):
        install.repair(tmp_path)
        texts = [(tmp_path / name).read_text() for name in broken]
        assert texts[0].count("@dataclass(eq=False)\n") == 2 and texts[1].startswith("@dataclass(eq=False)")
        assert texts[2] == "x = np.array(y, int, np.int64)\n" and texts[3] == 'x = float("inf")\n'
    (tmp_path / "fairseq/dataclass/configs.py").write_text("class A: ...\n")
    with pytest.raises(ValueError, match="not as expected"):
        install.repair(tmp_path)


def test_a_synthetic_set_has_the_wanted_vocabulary_and_lengths(tmp_path: Path) -> None:
    made = module("synthetic").prepared(tmp_path, pairs=2000, vocabulary=500)
    data = PreparedSet.open(made)
    assert data.index["vocabulary"] == [500, 500]
    lengths = data.split("train").lengths("source.ids")
    assert len(lengths) > 1900 and 25 < lengths.mean() < 31 and lengths.max() > 80
    assert module("synthetic").prepared(tmp_path, pairs=2000, vocabulary=500) == made


def test_the_loader_alone_is_measured(data_set: Path) -> None:
    found = module("scale").load(data_set)
    assert found["nanoseconds_per_token"] > 0 and found["seconds_to_first_batch"] >= 0


def test_tables_say_what_waits_and_what_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tables = module("speed_tables")
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    waiting = {row[1] for row in tables.training_rows()}
    assert waiting == {"pending", "pending: waits for a GPU"}
    assert all(row[1] == "pending" for row in tables.peers_rows()) and len(tables.peers_rows()) == 7
    runs = {
        "trmt": rounds(100, 200, 300),
        "eole": rounds(50, 100, 150),
        "sockeye": [{"error": "first line\nlast line"}],
        "joeynmt": rounds(150, 210, 310),
    }
    figures = module("rounds").summed_up(runs, [{"peak": 20.0}] * 3)
    for found in figures["toolkits"].values():
        found["version"] = None
    (tmp_path / "train-multi30k.json").write_text(json.dumps({"figures": figures}))
    assert [row[0] for row in tables.peers_rows()] == ["JoeyNMT", "trmt", "Eole", "Sockeye"]
    assert tables.peers_rows()[2][-1] == "2.00 (2.00–2.00)"
    assert tables.peers_rows()[3][2] == "failed: last line"
    assert tables.training_rows()[0][-1] == "0.95 (0.67–0.97), JoeyNMT"
    assert {len(row) for row in tables.peers_rows()} == {len(tables.PEERS_HEAD)}
    assert {len(row) for row in tables.training_rows()} == {len(tables.TRAINING_HEAD)}


@pytest.mark.slow
def test_trmt_is_measured_beside_a_toolkit_that_is_not_there(tmp_path: Path, data_set: Path) -> None:
    train, shape = module("train"), module("peers.job").Shape
    spec = train.Spec(
        data_set=data_set,
        work=tmp_path / "work",
        shape=shape(width=16, feed_forward=32, heads=2, encoder_layers=1, decoder_layers=1),
        peers=tmp_path,
        toolkits=("eole",),
        rounds=1,
        threads=1,
        batch_tokens=300,
        warmup_updates=2,
        warmup_seconds=0.0,
        seconds=0.2,
    )
    (tmp_path / "eole" / "bin").mkdir(parents=True)
    (tmp_path / "eole" / "bin" / "python").symlink_to(sys.executable)
    figures = train.measure(spec)
    [run] = figures["toolkits"]["trmt"]["rounds"]
    assert run["target_tokens"] > 0 and run["warmup_updates"] == 2
    assert 0 < figures["trmt"]["share_of_gemm_peak"] < 1
    assert figures["gemm_gflops"]["rounds"][0]["threads"] == figures["toolkits"]["trmt"]["threads"] == 1
    assert "No module named" in figures["toolkits"]["eole"]["error"]
    assert figures["ratios"] == {}
