"""Kernels for GPUs: what they compute, that they compile, and what happens where they cannot be had."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from trmt.decoding.choosing import highest
from trmt.nets.looking_back import look_back

import gpu_kernels
from trmt.native import gpu

ROOT = Path(__file__).resolve().parent.parent
needs_triton = pytest.mark.skipif(not find_spec("triton"), reason="no Triton here")


@needs_triton
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_they_compute_what_they_promise(device: str) -> None:
    # Whether to interpret is decided when Triton is imported, so once for each process.
    chosen = {"TRMT_TEST_DEVICE": device, "TRITON_INTERPRET": "1" if device == "cpu" else "0"}
    tests = str(ROOT / "tests" / "in_triton.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", tests]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | chosen, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


class Card:
    """A GPU that Triton can compile for and not launch on."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 99

    def get_current_stream(self, device: int) -> int:
        return 0


@needs_triton
@pytest.mark.slow
def test_they_compile_for_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from triton.runtime import driver, jit

    from trmt.native.gpu import highest as choosing
    from trmt.native.gpu import looking_back

    compiled = []

    def only_compiled(kernel: Any, grid: Any) -> Callable[..., None]:
        return lambda *given, **named: compiled.append(kernel.warmup(*given, grid=grid, **named))

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(driver, "_active", Card())
    monkeypatch.setattr(jit.JITFunction, "__getitem__", only_compiled)
    sentences, heads, hypotheses, columns, part = 32, 8, 4, 64, 64
    both = torch.zeros(2, sentences, heads, columns * hypotheses, part, dtype=torch.bfloat16)
    query = both[0, :, :, :hypotheses]
    told = {"position_S": torch.zeros(sentences, dtype=torch.long), "columns": columns}
    for table in (torch.zeros(sentences, hypotheses, columns, dtype=torch.long), None):
        looking_back.launch(query, query, both[:, :, :, :hypotheses], both, table_SKC=table, **told)
    best, log = torch.zeros(2, 4), torch.zeros(2, 1)
    choosing.launch(torch.zeros(2, 5001, dtype=torch.bfloat16), best, best.long(), log)
    names = [kernel.metadata.name for kernel in compiled if kernel.asm["cubin"]]
    assert names == ["_look_back", "_look_back", "_survey", "_pick"]


@needs_triton
@pytest.mark.slow
def test_their_speed_can_be_measured(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "bench" / "gpu_kernels.py"), "--smoke", "--out", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True)
    figures = json.loads((tmp_path / "translate-kernels.json").read_bytes())["figures"]
    [looking_back], [choosing] = figures["looking_back"], figures["highest"]
    for row in (looking_back, choosing):
        assert row["kernel_microseconds"] > 0 and row["pytorch_microseconds"] > 0


def test_what_must_be_read_is_counted_once() -> None:
    work = gpu_kernels.LookingBack(8, 5, torch.device("cpu"), cold=1)
    others = 2 * 6 * 8 * 8 * 64 + 8 * 8 * 5  # queries, fresh keys and values twice, what is found; the table
    for seen, table in ((1, torch.zeros(2, 4, 5)), (4, torch.arange(4)[:, None].expand(2, 4, 5))):
        work.table_SKC = table.long()
        assert work.moved() == 2 * 2 * (2 * 4 * seen) * 8 * 64 + others


def test_who_has_one_ancestor_has_all_its_ancestors() -> None:
    table = gpu_kernels.ancestors(5, 30)
    assert torch.equal(table[:, :, -1], torch.arange(4).expand(5, 4))
    alike = table[:, :, None] == table[:, None]  # [S, K, K, C]
    assert (alike[..., :-1] | ~alike[..., 1:]).all()
    assert alike[..., 0].all() and not alike[..., -1].all()


@needs_triton
def test_where_triton_fails_it_is_said_once_and_done_without(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Triton takes no tensor of the CPU, so its kernels really fail.
    monkeypatch.setattr(gpu, "_given_up", False)
    monkeypatch.setattr(gpu, "at_hand", lambda like: not gpu._given_up)
    scores = torch.randn(3, 700, dtype=torch.bfloat16)
    for _ in range(2):
        best, ids, sums = highest(scores, 2)
        assert torch.equal(best, scores.float().topk(2).values)
        assert torch.equal(scores.float().gather(1, ids), best)
        torch.testing.assert_close(sums, scores.float().logsumexp(-1, keepdim=True))
    said = capsys.readouterr().err
    assert said.count("warning: Triton cannot build trmt's kernels (") == 1
    assert "it goes on without them, slower" in said


def test_plain_pytorch_looks_back_the_same_way() -> None:
    draw = torch.Generator().manual_seed(1)
    sentences, heads, hypotheses, columns, part = 3, 2, 4, 9, 16
    query, *fresh = torch.randn(3, sentences, heads, hypotheses, part, generator=draw)
    store = torch.randn(2, sentences, heads, columns * hypotheses, part, generator=draw)
    table = torch.randint(hypotheses, (sentences, hypotheses, columns), generator=draw)
    position = torch.tensor([0, 5, 11])
    told = {"table_SKC": table, "position_S": position, "columns": columns}
    found = look_back(query, torch.stack(fresh), store, **told).unflatten(2, (heads, part))
    for sentence, newest in enumerate((0, 5, 8)):
        for hypothesis in range(hypotheses):
            rows = [*table[sentence, hypothesis, :newest].tolist(), hypothesis]
            slots = [column * hypotheses + row for column, row in enumerate(rows)]
            keys, values = store[:, sentence, :, slots].double()
            assert torch.equal(keys[:, -1].float(), fresh[0][sentence, :, hypothesis])
            assert torch.equal(values[:, -1].float(), fresh[1][sentence, :, hypothesis])
            scores = (keys * query[sentence, :, hypothesis, None].double()).sum(-1) / part**0.5
            expected = (scores.softmax(-1)[..., None] * values).sum(1).float()
            torch.testing.assert_close(found[sentence, hypothesis], expected, atol=1e-5, rtol=1e-5)
