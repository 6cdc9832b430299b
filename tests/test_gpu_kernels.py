"""Kernels for GPUs: what they compute, that they compile, and what happens where there are none."""

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

import gpu_kernels
from tests.cached_attention import cached_attention
from trmt.decoding.top import top
from trmt.nets.base import Decoding
from trmt.nets.kv_cache import SharedKVCache

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

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 99

    def get_current_stream(self, device: int) -> int:
        return 0


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("capability", [75, 80, 86, 89, 90, 100, 120])
def test_they_compile_for_a_gpu(capability: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from triton.runtime import driver, jit

    from trmt.native import gpu
    from trmt.native.gpu import attention_kernel, top_kernel

    compiled = []

    def only_compiled(kernel: Any, grid: Any) -> Callable[..., None]:
        return lambda *given, **named: compiled.append(kernel.warmup(*given, grid=grid, **named))

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(driver, "_active", Card(capability))
    monkeypatch.setattr(jit.JITFunction, "__getitem__", only_compiled)
    sentences, heads, hypotheses, columns = 32, 8, 4, 64
    newest = {"position_S": torch.zeros(sentences, dtype=torch.long), "columns": columns}
    some = torch.zeros(sentences, hypotheses, columns, dtype=torch.long)
    usual = torch.bfloat16 if capability >= 80 else torch.float16  # which has no bf16
    made = [(usual, head_dim, some) for head_dim in gpu.HEAD_DIMS]
    for dtype, head_dim, ancestors in (*made, (usual, 64, None), (torch.float32, 64, some)):
        cached = torch.zeros(2, sentences, heads, columns * hypotheses, head_dim, dtype=dtype)
        query, kv = cached[0, :, :, :hypotheses], cached[:, :, :, :hypotheses]
        attention_kernel.launch(query, query, kv, cached, ancestors_SKC=ancestors, **newest)
    best, log = torch.zeros(2, 4), torch.zeros(2, 1)
    for dtype in (usual, torch.float32):
        top_kernel.launch(torch.zeros(2, 5001, dtype=dtype), best, best.long(), log)
    names = [kernel.metadata.name for kernel in compiled if kernel.asm["cubin"]]
    assert names == ["_attend"] * 6 + ["_survey", "_pick"] * 2


@needs_triton
@pytest.mark.slow
def test_their_speed_can_be_measured(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "bench" / "gpu_kernels.py"), "--smoke", "--out", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True)
    figures = json.loads((tmp_path / "translate-kernels.json").read_bytes())["figures"]
    for row in (*figures["attention"], *figures["top"]):
        assert row["kernel_microseconds"] > 0 and row["pytorch_microseconds"] > 0


def test_each_byte_that_must_be_read_is_counted_once() -> None:
    work = gpu_kernels.Attention(8, 5, torch.device("cpu"), cold=1)
    others = 2 * 6 * 8 * 8 * 64 + 8 * 8 * 5  # queries, new keys and values twice, the output; the table
    for seen, table in ((1, torch.zeros(2, 4, 5)), (4, torch.arange(4)[:, None].expand(2, 4, 5))):
        work.ancestors_SKC = table.long()
        assert work.moved() == 2 * 2 * (2 * 4 * seen) * 8 * 64 + others


def test_hypotheses_with_one_common_ancestor_have_all_before_it_in_common() -> None:
    table = gpu_kernels.ancestors(5, 30)
    assert torch.equal(table[:, :, -1], torch.arange(4).expand(5, 4))
    alike = table[:, :, None] == table[:, None]  # [S, K, K, C]
    assert (alike[..., :-1] | ~alike[..., 1:]).all()
    assert alike[..., 0].all() and not alike[..., -1].all()


@needs_triton
def test_where_triton_fails_pytorch_serves_and_a_warning_is_printed_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Triton takes no tensor of the CPU, so its kernels really fail.
    monkeypatch.setattr("trmt.devices.abilities._known", {})
    monkeypatch.setattr("trmt.devices.hardware.is_cuda", lambda device: True)
    monkeypatch.setenv("TRMT_TRITON", "1")
    scores = torch.randn(3, 700, dtype=torch.bfloat16)
    for _ in range(2):
        best, ids, sums = top(scores, 2)
        assert torch.equal(best, scores.float().topk(2).values)
        assert torch.equal(scores.float().gather(1, ids), best)
        torch.testing.assert_close(sums, scores.float().logsumexp(-1, keepdim=True))
    printed = capsys.readouterr().err
    assert printed.count("warning: trmt's Triton kernels cannot be used on cpu: ") == 1
    assert "; PyTorch computes the same, slower" in printed


@pytest.mark.parametrize("hypotheses", [1, 4])
def test_plain_pytorch_computes_the_same(hypotheses: int) -> None:
    draw = torch.Generator().manual_seed(1)
    sentences, heads, columns, head_dim = 3, 2, 16, 16
    query, *kv = torch.randn(3, sentences, heads, hypotheses, head_dim, generator=draw)
    cached = torch.randn(2, sentences, heads, columns * hypotheses, head_dim, generator=draw)
    ancestors = torch.randint(hypotheses, (sentences, hypotheses, columns), generator=draw)
    position = torch.tensor([0, 5, 20])  # the last one is beyond the cache
    decoding = Decoding(hypotheses, columns, static=True)
    cache = SharedKVCache.empty(query, sentences, decoding, (1, heads, head_dim))
    cache.ancestors_SKC, cache.key_values = ancestors, [cached.clone()]
    cache.advance(position, 1)
    found = cache.attend(0, query, torch.stack(kv))
    expected = cached_attention(query, torch.stack(kv), cached, ancestors, position[:, None], columns)
    torch.testing.assert_close(found, expected.float(), atol=1e-5, rtol=1e-5)
    assert torch.equal(cache.key_values[0], cached)
