"""What a device can do is proven before it is used; what fails is done without: same result, one warning."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tests import toy
from tests.fakes import random_sentences, small_network
from trmt.devices import abilities as module
from trmt.devices import choice, cuda_graphs, hardware, probes, varlen
from trmt.devices.abilities import ABILITIES, abilities
from trmt.devices.probes import Unsupported, WrongResult
from trmt.errors import ConfigError, first_line
from trmt.nets import layers
from trmt.nets.base import to_half
from trmt.nets.ragged import Ragged, Source
from trmt.nets.readout import Fp32Readout
from trmt.objectives import cross_entropy
from trmt.registry import is_installed
from trmt.training.distributed import Distributed
from trmt.training.overlap import OverlappedSums
from trmt.training.run import TrainingRun, train
from trmt.training.step import FAILED, compute_gradients

PACKAGE = Path(module.__file__).parent.parent
CPU = torch.device("cpu")
Probe = Callable[[torch.device], None]
CHECKS = re.compile(
    r"is_available\(|device_count\(|get_device_capability|get_arch_list|is_bf16_supported"
    r"|is_nccl_available|get_device_properties|gcnArchName"
)


@pytest.fixture(autouse=True)
def _nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_known", {})
    monkeypatch.setattr(choice, "_warned", set())
    monkeypatch.setattr(varlen, "varlen_attn", None)
    monkeypatch.setattr(varlen, "_usable", {})
    for ability in ABILITIES.values():
        monkeypatch.delenv(ability.variable, raising=False)


@pytest.fixture
def proven(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Replaces the probe of an ability: by one that passes, or that raises an error."""

    def proven(name: str, error: BaseException | None = None) -> None:
        def probe(device: torch.device) -> None:
            if error:
                raise error

        monkeypatch.setitem(module.ABILITIES, name, replace(ABILITIES[name], probe=probe))

    return proven


@pytest.fixture
def as_a_gpu(monkeypatch: pytest.MonkeyPatch, proven: Callable[..., None]) -> None:
    """The CPU is treated as a GPU that can do everything."""
    monkeypatch.setattr(hardware, "is_cuda", lambda device: True)
    monkeypatch.setenv("TRMT_KERNELS", "0")
    for name in ABILITIES:
        proven(name)


def warnings_in(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]


# One place


def test_only_devices_asks_what_a_device_can_do() -> None:
    found = {
        file.relative_to(PACKAGE).as_posix()
        for file in PACKAGE.rglob("*.py")
        if CHECKS.search(file.read_text(encoding="utf-8"))
    }
    assert found and all(name.startswith("devices/") for name in found)


@pytest.mark.parametrize("name", ABILITIES)
@pytest.mark.parametrize(
    "error", [ImportError("no such module"), RuntimeError("first\nsecond"), WrongResult("wrong")], ids=repr
)
def test_what_fails_its_probe_is_not_used_and_a_warning_says_so(
    name: str, error: Exception, proven: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    proven(name, error)
    for _ in range(3):
        assert not abilities(CPU).use(name) and not abilities(CPU).has(name)
    [line] = capsys.readouterr().err.splitlines()
    ability = ABILITIES[name]
    expected = f"{ability.title} cannot be used on cpu: {first_line(error)}; {ability.without}"
    assert line == f"warning: {expected}"


def test_what_a_device_is_not_made_for_is_said_without_a_warning(
    proven: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    proven("varlen", Unsupported("it is too old"))
    assert not abilities(CPU).use("varlen") and not abilities(CPU).use("varlen")
    assert capsys.readouterr().err == (
        "attention without padding cannot be used on cpu: it is too old; attention is computed with padding\n"
    )


def test_a_probe_runs_once(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    calls: list[torch.device] = []
    monkeypatch.setitem(module.ABILITIES, "bf16", replace(ABILITIES["bf16"], probe=calls.append))
    assert all(abilities(torch.device("cpu")).use("bf16") for _ in range(3))
    assert len(calls) == 1 and not capsys.readouterr().err


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("no"),
        MemoryError(),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
    ids=str,
)
def test_a_probe_that_runs_out_of_memory_says_nothing_about_an_ability(
    error: Exception, proven: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    proven("graphs", error)
    assert not abilities(CPU).use("graphs") and not abilities(CPU).use("graphs")
    assert capsys.readouterr().err == (
        "CUDA graphs cannot be used on cpu: its memory is full now; decoding steps run one by one, slower\n"
    )
    proven("graphs")
    assert abilities(CPU).use("graphs")
    abilities(CPU).lose("graphs", RuntimeError("broken"))
    assert len(warnings_in(capsys)) == 1, "what is said later is said although a line was printed before"


FULL = torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be reported later")


@pytest.mark.parametrize("name", ["auto", "cuda:0"])
def test_a_gpu_whose_memory_is_full_is_an_error_of_one_sentence(
    name: str, gpus: Callable[[int], None], proven: Callable[..., None]
) -> None:
    gpus(1)
    proven("architecture", FULL)
    with pytest.raises(ConfigError, match=r"^cuda:0 has no memory left for this process, .*--device$"):
        choice.choose_device(name)
    proven("architecture")
    assert choice.choose_device(name) == torch.device("cuda:0")


def test_env_prints_a_gpu_that_cannot_even_be_asked(
    gpus: Callable[[int], None], trmt: Any, proven: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise FULL

    gpus(1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", broken)
    monkeypatch.setattr(torch.cuda, "get_device_name", broken)
    for name in ABILITIES:
        proven(name, FULL)
    code, out, _ = trmt("env")
    assert code == 0
    assert "cuda:0         cannot be asked (CUDA error: out of memory)" in out.decode()
    assert "  architecture no: cuda:0 has no memory left for this process" in out.decode()


@pytest.mark.parametrize("name", ABILITIES)
def test_an_environment_variable_overrides_each_probe(
    name: str,
    proven: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    proven(name, AssertionError("it must not run"))
    monkeypatch.setenv(ABILITIES[name].variable, "1")
    assert abilities(CPU).use(name)
    monkeypatch.setattr(module, "_known", {})
    monkeypatch.setenv(ABILITIES[name].variable, "0")
    assert not abilities(CPU).use(name)
    assert ABILITIES[name].variable in abilities(CPU).lacks(name)
    assert not capsys.readouterr().err, "who switches it off knows"
    monkeypatch.setattr(module, "_known", {})
    monkeypatch.setenv(ABILITIES[name].variable, "maybe")
    with pytest.raises(ConfigError, match="set it to 0"):
        abilities(CPU).use(name)


def test_what_fails_in_use_is_not_used_again(
    proven: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    proven("triton")
    assert abilities(CPU).use("triton")
    for _ in range(2):
        abilities(CPU).lose("triton", RuntimeError("\n  ptxas fatal: no\nmore"))
    assert not abilities(CPU).use("triton")
    assert warnings_in(capsys) == [
        "warning: trmt's Triton kernels cannot be used on cpu: ptxas fatal: no; "
        "PyTorch computes the same, slower"
    ]


def test_probes_pass_on_the_cpu_or_say_that_they_are_for_gpus() -> None:
    assert not abilities(CPU).lacks("architecture") and not abilities(CPU).lacks("bf16")
    for name in ("readout", "varlen", "triton", "graphs"):
        assert abilities(CPU).lacks(name) == probes.ONLY_GPUS


def test_a_probe_is_not_disturbed_by_what_is_going_on() -> None:
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), probes.undisturbed(CPU):
        x = torch.ones(2, 2, requires_grad=True)
        (x @ x).sum().backward()
        assert x.grad is not None and (x @ x).dtype == torch.float32


@pytest.mark.slow
def test_a_machine_without_a_compiler_cannot_compile(tmp_path: Path) -> None:
    """Where nothing that was compiled before lies in a cache."""
    code = (
        "import torch; from trmt.devices.abilities import abilities;"
        "print(abilities(torch.device('cpu')).lacks('compile'))"
    )
    missing = {"CC": "/nonexistent", "CXX": "/nonexistent"}
    caches = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "one"), "TRITON_CACHE_DIR": str(tmp_path / "other")}
    for changed, has in ((missing, False), *([({}, True)] if shutil.which("g++") else [])):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | caches | changed,
            capture_output=True,
            text=True,
            check=True,
        )
        assert (done.stdout == "\n") == has
        assert has or "nonexistent" in done.stdout, done.stdout


def test_what_computes_a_wrong_result_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda layer: lambda x, weight: 2 * layer(x, weight))
    assert module.Abilities(torch.device("cpu")).lacks("compile") == "a test run computed a wrong result"


def test_a_compilers_message_is_that_of_the_error_inside() -> None:
    wrapped = torch._dynamo.exc.BackendCompilerFailed(print, FileNotFoundError("no g++.\nmore"), None)
    assert first_line(wrapped) == "no g++"
    assert first_line(RuntimeError("\n  one: \ntwo")) == "one" and first_line(KeyError()) == "KeyError"


def test_a_probe_draws_no_random_numbers() -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state()
    assert abilities(CPU).has("architecture") and abilities(CPU).has("bf16")
    assert torch.equal(torch.get_rng_state(), before)


# Devices


@pytest.mark.parametrize(
    ("architecture", "supported", "runs"),
    [
        ("sm_90", ["sm_80", "sm_90"], True),
        ("sm_89", ["sm_80", "sm_86", "sm_90"], True),
        ("sm_70", ["sm_75", "sm_80"], False),
        ("sm_75", ["sm_80"], False),
        ("sm_90", ["sm_90a"], False),
        ("sm_121", ["sm_120", "compute_120"], True),
        ("sm_100", ["sm_80", "compute_90"], True),
        ("sm_100", ["sm_80", "sm_90"], False),
        ("gfx942", ["gfx90a", "gfx942"], True),
        ("gfx1103", ["gfx90a", "gfx1100"], False),
        ("sm_70", [], True),
    ],
)
def test_kernels_run_on_their_architecture_and_on_later_ones_of_it(
    architecture: str, supported: list[str], runs: bool
) -> None:
    assert hardware.has_kernels_for(architecture, supported) == runs


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sets how many GPUs there are; those in `BROKEN` cannot compute."""

    def gpus(count: int) -> None:
        monkeypatch.setattr(hardware, "gpu_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
        monkeypatch.setattr(probes, "undisturbed", lambda device: torch.enable_grad())

    return gpus


@pytest.fixture
def v100(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first GPU is of a kind that this build of PyTorch has no kernels for."""

    def probe(device: torch.device) -> None:
        if device.index == 0:
            raise Unsupported("it is a Tesla V100, sm_70, and this build of PyTorch (CUDA 13.0) is for sm_75")

    monkeypatch.setitem(module.ABILITIES, "architecture", replace(ABILITIES["architecture"], probe=probe))


@pytest.mark.usefixtures("v100")
@pytest.mark.parametrize(("count", "chosen"), [(1, "cpu"), (2, "cuda:1")])
def test_auto_takes_the_first_device_that_can_compute(
    count: int, chosen: str, gpus: Callable[[int], None], capsys: pytest.CaptureFixture[str]
) -> None:
    gpus(count)
    assert [str(choice.choose_device("auto")) for _ in range(2)] == [chosen] * 2
    [warning] = warnings_in(capsys)
    assert "Tesla V100, sm_70" in warning and warning.endswith("; another device is used")


@pytest.mark.usefixtures("v100")
@pytest.mark.parametrize("name", ["cuda", "cuda:0"])
def test_a_named_device_that_cannot_compute_is_an_error(name: str, gpus: Callable[[int], None]) -> None:
    gpus(2)
    with pytest.raises(ConfigError, match="cuda:0 cannot be used: it is a Tesla V100"):
        choice.choose_device(name)
    assert choice.choose_device("cuda:1") == torch.device("cuda:1")


@pytest.mark.parametrize("name", ["auto", "cuda", "cuda:0"])
def test_a_chosen_gpu_has_the_number_that_its_tensors_name(
    name: str, gpus: Callable[[int], None], proven: Callable[..., None]
) -> None:
    gpus(2)
    proven("architecture")
    assert choice.choose_device(name).index == 0
    assert abilities(torch.device("cuda")) is abilities(torch.device("cuda:0"))
    assert abilities(torch.device("cuda")) is not abilities(torch.device("cuda:1"))


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A driver that knows a GPU, which PyTorch cannot use."""
    (tmp_path / "0000:01:00.0").mkdir()
    monkeypatch.setattr(hardware, "PROC_NVIDIA", tmp_path)
    monkeypatch.setattr(hardware, "gpu_count", lambda: 0)
    monkeypatch.setattr(hardware, "has_mps", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.mark.usefixtures("driver")
@pytest.mark.parametrize(
    ("cuda", "expected"),
    [("13.0", "built for CUDA 13.0, cannot use it: its driver"), (None, "for the CPU only")],
)
def test_a_gpu_that_cannot_be_used_is_named_loudly(
    cuda: str | None,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.version, "cuda", cuda)
    assert [choice.choose_device("auto") for _ in range(2)] == [CPU, CPU]
    [warning] = warnings_in(capsys)
    assert expected in warning and "install" in warning
    with pytest.raises(ConfigError, match=expected):
        choice.choose_device("cuda")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert not hardware.why_no_gpu(), "it is hidden on purpose"


def test_pytorchs_own_warning_of_an_old_driver_is_not_shown_beside_ours(
    monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    def is_available() -> bool:
        warnings.warn("CUDA initialization: The NVIDIA driver on your system is too old", stacklevel=1)
        return False

    monkeypatch.setattr(torch.cuda, "is_available", is_available)
    assert hardware.gpu_count() == 0 and not recwarn.list


def test_env_prints_every_ability_of_every_device(
    gpus: Callable[[int], None],
    trmt: Any,
    monkeypatch: pytest.MonkeyPatch,
    proven: Callable[..., None],
) -> None:
    gpus(1)
    monkeypatch.setattr(hardware, "gpu_name", lambda device: "Tesla T4, sm_75")
    monkeypatch.setattr("trmt.devices.memory.total", lambda device: 15 << 30)
    for name in ABILITIES:
        proven(name)
    proven("varlen", Unsupported("it needs compute capability 8.0, and this GPU has 7.5"))
    code, out, err = trmt("env")
    text = out.decode()
    assert code == 0 and not err
    assert "cuda:0         Tesla T4, sm_75, 15 GiB" in text
    assert "  varlen       no: it needs compute capability 8.0, and this GPU has 7.5 (TRMT_VARLEN)" in text
    for name, ability in ABILITIES.items():
        assert len(re.findall(rf"^  {name} .*\({ability.variable}\)$", text, re.MULTILINE)) == 2


# Precision


@pytest.mark.parametrize(("error", "precision"), [(None, "bf16"), (Unsupported("too old"), "fp16")])
def test_the_precision_is_what_the_gpu_has_proven(
    error: Exception | None, precision: str, proven: Callable[..., None]
) -> None:
    proven("bf16", error)
    monkeypatch_device = torch.device("cuda:0")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probes, "undisturbed", lambda device: torch.enable_grad())
        assert choice.choose_precision("auto", monkeypatch_device) == precision
    assert choice.choose_precision("auto", CPU) == "fp32"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_of_16_bit_networks_have_single_precision(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    weight, bias, hidden = (
        torch.randn(50, 32).to(dtype),
        torch.randn(50).to(dtype),
        torch.randn(3, 4, 32).to(dtype),
    )
    logits = Fp32Readout(weight, bias)(hidden)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, F.linear(hidden.float(), weight.float(), bias.float()))
    assert not torch.equal(logits, logits.to(dtype).float())


def test_a_readout_that_fails_on_the_device_uses_a_copy(
    proven: Callable[..., None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    proven("readout")
    weight, hidden = torch.randn(50, 32).bfloat16(), torch.randn(2, 32).bfloat16()
    expected = Fp32Readout(weight, None)(hidden)
    readout = Fp32Readout(weight, None)
    readout._copy_DV = None  # as on a GPU: the CPU has no such product and really fails
    assert torch.equal(readout(hidden), expected) and torch.equal(readout(hidden), expected)
    assert len(warnings_in(capsys)) == 1


POSITIONS = {
    "transformer": ("positions", "transformer"),
    "rotary": ("rotary_table", "transformer"),
    "universal": ("step_table", "universal"),
    "complex": ("frequencies.weight", "transformer-complex"),
}


@pytest.mark.parametrize("kind", POSITIONS)
def test_positions_stay_in_single_precision(kind: str) -> None:
    suffix, architecture = POSITIONS[kind]
    if architecture != "transformer" and not is_installed("trmt.lab"):
        pytest.skip("trmt.lab is not here")
    net = small_network(architecture, **({"positions": "rotary"} if kind == "rotary" else {}))
    expected = net(Source.of([[5, 6, 7]]), Ragged.of([[5, 6]])).hidden
    to_half(net, torch.bfloat16)
    tensors = {**dict(net.named_parameters()), **dict(net.named_buffers())}
    kept = {name: tensor for name, tensor in tensors.items() if name.endswith(suffix)}
    assert kept and all(tensor.dtype == torch.float32 for tensor in kept.values())
    assert net.output.weight.dtype == torch.bfloat16
    hidden = net(Source.of([[5, 6, 7]]), Ragged.of([[5, 6]])).hidden
    assert hidden.dtype == torch.bfloat16
    torch.testing.assert_close(hidden.float(), expected, atol=0.1, rtol=0.1)


# Attention without padding


def stand_in(calls: list[torch.dtype], fails_at: int = -1) -> Callable[..., Tensor]:
    """What PyTorch's function computes, on the CPU; one call fails."""

    def attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        starts: Tensor,
        others: Tensor,
        longest: int,
        other: int,
        *,
        window_size: tuple[int, int],
    ) -> Tensor:
        assert query.dtype == key.dtype == value.dtype
        calls.append(query.dtype)
        if len(calls) - 1 == fails_at:
            raise RuntimeError("FlashAttention only supports Ampere GPUs or newer.")
        spans = layers.Spans(starts.long(), starts, longest)
        keys = layers.Spans(others.long(), others, other)
        out = layers.attend_padded(query, key, value, spans, keys, causal=window_size == (-1, 0))
        return out.unflatten(-1, (query.shape[1], -1))

    return attention


NETWORKS = ["transformer", "universal", "transformer-hard"]


@pytest.mark.usefixtures("as_a_gpu")
@pytest.mark.parametrize("positions", ["sinusoidal", "rotary"])
def test_attention_gets_queries_keys_and_values_of_one_precision(
    positions: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[torch.dtype] = []
    monkeypatch.setattr(varlen, "load_varlen", lambda: stand_in(calls))
    net = small_network("transformer", positions=positions)
    with torch.autocast("cpu", torch.bfloat16):
        net(Source.of(random_sentences(4)), Ragged.of(random_sentences(4)))
    config: Any = net.config
    assert calls == [torch.bfloat16] * (config.encoder_layers + 2 * config.decoder_layers)


@pytest.mark.usefixtures("as_a_gpu")
def test_every_network_with_packed_attention_loads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    if not is_installed("trmt.lab"):
        pytest.skip("trmt.lab is not here")
    from trmt.lab.masked_encoder import MaskedEncoder, MaskedEncoderConfig

    masked = MaskedEncoder(
        MaskedEncoderConfig(
            source_vocabulary=30,
            d_model=16,
            feed_forward=16,
            heads=2,
            encoder_layers=1,
            attention_dropout=0.0,
        )
    )
    sources, targets = Source.of(random_sentences(4)), Ragged.of(random_sentences(4))
    runs: dict[str, Callable[[], object]] = {
        "masked": lambda: masked(sources),
        **{name: partial(small_network(name), sources, targets) for name in NETWORKS},
    }
    for name, run in runs.items():
        calls: list[torch.dtype] = []
        monkeypatch.setattr(varlen, "varlen_attn", stand_in(calls))
        with torch.autocast("cpu", torch.bfloat16):
            run()
        assert calls, name


@pytest.mark.usefixtures("as_a_gpu")
def test_a_traced_network_uses_what_was_proven_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen, "load_varlen", lambda: stand_in([]))
    compiled = torch.compile(
        lambda x: x + (1 if varlen.serves(x.device, torch.bfloat16, 64) else 0),
        backend="eager",
        fullgraph=True,
    )
    assert float(compiled(torch.zeros(1))) == 0, "nothing is run on the device while it is traced"
    assert varlen.usable(CPU) and float(compiled(torch.zeros(1))) == 1
    abilities(CPU).lose("varlen", "it failed")
    assert not varlen.usable(CPU) and float(compiled(torch.zeros(1))) == 0
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["cuda", "cuda:0"])
def test_what_was_proven_for_a_gpu_holds_for_its_tensors_while_they_are_traced(
    name: str,
    gpus: Callable[[int], None],
    proven: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpus(1)
    proven("varlen")
    monkeypatch.setattr(varlen, "load_varlen", lambda: stand_in([]))
    assert varlen.usable(torch.device(name))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert varlen.serves(torch.device("cuda:0"), torch.bfloat16, 64)
    assert not varlen.serves(torch.device("cuda:1"), torch.bfloat16, 64), "nothing was proven there"


def test_importing_it_loads_neither_triton_nor_the_compiler() -> None:
    code = "import sys, trmt.devices.varlen; print({'triton', 'torch._dynamo'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


@pytest.mark.usefixtures("as_a_gpu")
@pytest.mark.parametrize(("head_dim", "serves"), [(64, True), (12, False), (256, True), (264, False)])
def test_head_dimensions_that_it_does_not_serve_are_not_tried(
    head_dim: int, serves: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(varlen, "load_varlen", lambda: stand_in([]))
    assert varlen.serves(CPU, torch.bfloat16, head_dim) == serves
    assert not varlen.serves(CPU, torch.float32, head_dim)


@pytest.mark.usefixtures("as_a_gpu")
@pytest.mark.parametrize("when", ["import", "first use", "later"])
def test_attention_that_fails_is_computed_with_padding(
    when: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[torch.dtype] = []

    def load() -> Any:
        if when == "import":
            raise ImportError("cannot import name 'varlen_attn'")
        return stand_in(calls, fails_at={"first use": 0, "later": 3}[when])

    net = small_network("transformer")
    sentences = Source.of(random_sentences(4)), Ragged.of(random_sentences(4))
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(varlen, "serves", lambda *_: False)
            expected = net(*sentences).hidden
        monkeypatch.setattr(varlen, "load_varlen", load)
        assert torch.equal(net(*sentences).hidden, expected)
        assert torch.equal(net(*sentences).hidden, expected)
    assert len(calls) == {"import": 0, "first use": 1, "later": 4}[when]
    assert len(warnings_in(capsys)) == 1


def test_pytorchs_own_function_takes_what_it_is_given() -> None:
    """Its signature and the shapes of its result, which it computes only on a GPU."""
    with FakeTensorMode():
        query = torch.empty(10, 2, 64, dtype=torch.bfloat16)
        key = torch.empty(12, 2, 64, dtype=torch.bfloat16)
        starts = torch.empty(4, dtype=torch.int32), torch.empty(4, dtype=torch.int32)
        for causal in (True, False):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(varlen, "varlen_attn", probes.load_varlen())
                out = varlen.attend(query, key, key, starts, (6, 6), causal=causal)
            assert out is not None and out.shape == query.shape and out.dtype == torch.bfloat16


# The loss


@pytest.fixture
def failing_compiler(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, int], None]:
    """Replaces torch.compile by a compiler whose product fails forward or backward, from some call on."""

    def install(where: str, works: int = 0) -> None:
        calls = [0]

        class Backward(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, x: Tensor, fails: bool) -> Tensor:
                ctx.fails = fails
                return x.view_as(x)

            @staticmethod
            def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
                if ctx.fails:
                    raise FileNotFoundError("the compiler is gone")
                return grad, None

        class Compiled:
            def __init__(self, made: Any, **options: Any) -> None:
                self.made = made

            def __getattr__(self, name: str) -> Any:
                return getattr(self.made, name)

            def __call__(self, *arguments: Any, **named: Any) -> Any:
                calls[0] += 1
                fails = calls[0] > works
                if fails and where == "forward":
                    raise FileNotFoundError("the compiler is gone")
                out = self.made(*arguments, **named)
                if where == "backward":
                    return replace(out, hidden=Backward.apply(out.hidden, fails))
                return out

        monkeypatch.setattr(torch, "compile", Compiled)
        cross_entropy._compiled.cache_clear()

    return install


@pytest.fixture(autouse=True)
def _forget_compiled_losses() -> Iterator[None]:
    yield
    cross_entropy._compiled.cache_clear()


@pytest.mark.usefixtures("as_a_gpu")
@pytest.mark.parametrize("works", [0, 2])
def test_a_loss_that_cannot_be_compiled_is_the_same(
    works: int,
    failing_compiler: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("TRMT_KERNELS", "0")
    torch.manual_seed(0)
    hidden, weight = torch.randn(9, 8, requires_grad=True), torch.randn(20, 8, requires_grad=True)
    target = torch.randint(0, 20, (9,))
    failing_compiler("forward", works)
    found = [cross_entropy.smoothed_cross_entropy(hidden, weight, target, 0.1) for _ in range(4)]
    monkeypatch.setattr(hardware, "is_cuda", lambda device: False)
    expected = cross_entropy.smoothed_cross_entropy(hidden, weight, target, 0.1)
    assert all(torch.equal(total, expected[0]) and torch.equal(nll, expected[1]) for total, nll in found)
    [warning] = warnings_in(capsys)
    assert "torch.compile cannot be used on cpu: the compiler is gone" in warning


# Training


def gradients_of(run: TrainingRun) -> list[Tensor]:
    [pairs] = run.batches.plan(0)[0]
    compute_gradients(run.state, [run.batches.load(pairs)])
    return [p.grad.clone() for p in run.state.net.parameters() if p.grad is not None]


def toy_run(toy_set: Path, folder: Path, *settings: str) -> TrainingRun:
    folder.mkdir(exist_ok=True)
    recipe = toy.recipe(folder)
    return TrainingRun.from_options(
        toy.options(folder / "run", toy_set, recipe, "network.dropout=0.0", *settings)
    )


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("works", [0, 1])
def test_a_network_that_cannot_be_compiled_learns_the_same(
    where: str,
    works: int,
    toy_set: Path,
    tmp_path: Path,
    proven: Callable[..., None],
    failing_compiler: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    expected = gradients_of(toy_run(toy_set, tmp_path / "plain"))
    proven("compile")
    failing_compiler(where, works)
    run = toy_run(toy_set, tmp_path / "compiled", "training.compile=on")
    assert run.state.compiled
    for _ in range(works + 2):
        found = gradients_of(run)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    assert not run.state.compiled
    assert warnings_in(capsys) == [
        "warning: torch.compile cannot be used on cpu: the compiler is gone; "
        "PyTorch computes without it, slower"
    ]


@pytest.mark.parametrize("where", ["device", "data"])
def test_torch_compile_is_not_blamed_for_what_fails_elsewhere(
    where: str,
    toy_set: Path,
    tmp_path: Path,
    proven: Callable[..., None],
    failing_compiler: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    proven("compile")
    failing_compiler("never")
    run = toy_run(toy_set, tmp_path, "training.compile=on")
    errors = {"device": torch.AcceleratorError("CUDA error: misaligned address"), "data": KeyError("ids")}

    def collate(*_: object, **__: object) -> None:
        raise errors[where]

    def loss(*_: object, **__: object) -> None:
        raise errors[where]

    fails = collate if where == "data" else loss
    monkeypatch.setattr(run.state.objective, fails.__name__, fails)
    with pytest.raises(type(errors[where])):
        gradients_of(run)
    assert run.state.compiled and not warnings_in(capsys)


@pytest.mark.usefixtures("as_a_gpu")
def test_packed_attention_that_fails_in_a_compiled_network_is_blamed_itself(
    toy_set: Path,
    tmp_path: Path,
    failing_compiler: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(varlen, "load_varlen", lambda: stand_in([]))
    failing_compiler("never")
    run = toy_run(toy_set, tmp_path, "training.precision=bf16", "training.compile=on")
    loss = run.state.objective.loss
    operator: dict[str, Any] = {}
    exec(
        compile("def run(): raise RuntimeError('no kernel')", "torch/nn/attention/varlen.py", "exec"),
        operator,
    )

    def fails(*given: Any) -> Any:
        if abilities(CPU).has("varlen"):
            operator["run"]()
        return loss(*given)

    monkeypatch.setattr(run.state.objective, "loss", fails)
    gradients_of(run)
    assert run.state.compiled and not abilities(CPU).has("varlen")
    [warning] = warnings_in(capsys)
    assert warning.startswith("warning: attention without padding cannot be used on cpu: no kernel; ")


def test_a_compiler_that_fails_its_probe_is_not_used(
    toy_set: Path, tmp_path: Path, proven: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    proven("compile", RuntimeError("Failed to find C compiler"))
    run = toy_run(toy_set, tmp_path, "training.compile=on")
    assert run.state.forward is run.state.net
    assert len(warnings_in(capsys)) == 1


def test_an_error_that_nothing_can_be_blamed_for_is_raised(
    toy_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = toy_run(toy_set, tmp_path)

    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(run.state.objective, "loss", broken)
    with pytest.raises(ZeroDivisionError):
        gradients_of(run)


@pytest.mark.usefixtures("as_a_gpu")
def test_attention_whose_gradients_fail_is_computed_with_padding(
    toy_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ("training.precision=bf16", "training.compile=off")
    monkeypatch.setenv("TRMT_COMPILE", "0")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(varlen, "serves", lambda *_: False)
        expected = gradients_of(toy_run(toy_set, tmp_path / "plain", *settings))

    class NoGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.view_as(x)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            raise RuntimeError("no kernel image is available")

    attention = stand_in([])
    monkeypatch.setattr(varlen, "varlen_attn", lambda *x, **named: NoGradient.apply(attention(*x, **named)))
    run = toy_run(toy_set, tmp_path / "run", *settings)
    for _ in range(2):
        for one, other in zip(gradients_of(run), expected, strict=True):
            assert torch.equal(one, other)
    assert warnings_in(capsys) == [
        "warning: attention without padding cannot be used on cpu: no kernel image is available; "
        "attention is computed with padding"
    ]


@pytest.mark.usefixtures("as_a_gpu")
@pytest.mark.parametrize(
    ("architecture", "compiled"), [("transformer", True), ("rnn", False), ("ssru", False)]
)
def test_only_networks_that_it_pays_for_are_compiled(
    architecture: str, compiled: bool, toy_set: Path, tmp_path: Path, failing_compiler: Callable[..., None]
) -> None:
    failing_compiler("never")
    recipe = toy.recipe(tmp_path, architecture=architecture)
    run = TrainingRun.from_options(toy.options(tmp_path / "run", toy_set, recipe, "training.precision=fp32"))
    assert run.state.compiled == compiled
    assert not run.state.fills_batches, "in grids each sentence would be as long as the longest"


def test_a_gpu_that_fails_ends_training_with_a_sentence(
    toy_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise torch.AcceleratorError("CUDA error: device-side assert triggered\nmore")

    monkeypatch.setattr("trmt.training.run.train_step", broken)
    with pytest.raises(
        Exception, match=r"device-side assert triggered\); the same command goes on"
    ) as caught:
        train(toy.options(tmp_path / "run", toy_set, toy.recipe(tmp_path)))
    assert "\n" not in str(caught.value)


# Ranks


def test_all_ranks_do_without_what_one_of_them_lacks(
    proven: Callable[..., None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from trmt.training.distributed import MultiProcess

    proven("varlen")
    rank = object.__new__(MultiProcess)
    monkeypatch.setattr(rank, "all_gather", lambda mine: [mine, "it needs 8.0, and this GPU has 7.5"])
    rank.agree(CPU, "varlen")
    assert not abilities(CPU).use("varlen")
    assert "rank 1 has it not (it needs 8.0, and this GPU has 7.5)" in capsys.readouterr().err


class TwoAlike(Distributed):
    """As if another rank had the same gradients."""

    world_size = 2

    def __init__(self) -> None:
        self.sent: list[int] = []

    def start_all_reduce(self, tensor: Tensor) -> Callable[[], None]:
        self.sent.append(len(tensor))
        tensor.mul_(2)
        return lambda: None


def test_gradients_are_summed_while_the_backward_pass_runs() -> None:
    net = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(3)))
    unused = torch.nn.Linear(4, 4)
    both = torch.nn.ModuleList([net, unused])
    ranks = TwoAlike()
    overlap = OverlappedSums(both, ranks, bucket_bytes=80)
    x = torch.ones(2, 4)
    net(x).sum().backward()
    assert not ranks.sent, "gradients are not final before the last micro-batch"
    kept = [p.grad for p in net.parameters()]
    first = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    overlap.start()
    net(x).sum().backward()
    assert not ranks.sent, "buckets are sent in order, and the first one has no gradients"
    overlap.finish()
    assert ranks.sent == [20] * 4
    assert all(p.grad is grad for p, grad in zip(net.parameters(), kept, strict=True)), "nothing is copied"
    overlap.zero_grad()
    assert not any(flat.any() for flat in overlap.sums)
    for parameter in both.parameters():
        assert parameter.grad is not None
        parameter.grad += 1
    assert all(bool((flat == 1).all()) for flat in overlap.sums), "gradients are views"
    overlap.zero_grad()
    net(x).sum().backward()
    overlap.start()
    net(x).sum().backward()
    overlap.finish()
    ranks.sent.clear()
    for parameter, one in zip(net.parameters(), first, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, 4 * one)
    net.zero_grad()
    used = OverlappedSums(net, ranks, bucket_bytes=80)
    ranks.sent.clear()
    used.start()
    net(x).sum().backward()
    assert ranks.sent == [20] * 3, "all are sent before the backward pass returns"
    used.finish()


@pytest.mark.filterwarnings("default::DeprecationWarning")  # of torch's compiler, about torch
@pytest.mark.parametrize(("bucket_bytes", "parts"), [(0, 1), (80, 3)])
def test_a_compiled_network_gives_its_gradients_one_part_after_another(bucket_bytes: int, parts: int) -> None:
    net = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(3)))
    torch._dynamo.reset()
    compiled = choice.compile_network(net, bucket_bytes=bucket_bytes, backend="aot_eager")
    x = torch.ones(2, 4)
    loss = compiled(x).square().sum()
    left, backward = [loss.grad_fn], set()
    while left:
        node = left.pop()
        if node.name().startswith("CompiledFunction"):
            backward.add(node)
        left += [each for each, _ in node.next_functions if each]
    assert len(backward) == parts
    loss.backward()
    found = [p.grad for p in net.parameters()]
    net.zero_grad()
    net(x).square().sum().backward()
    torch.testing.assert_close([p.grad for p in net.parameters()], found)
    torch._dynamo.reset()


def test_a_rank_whose_backward_pass_fails_still_sends_every_bucket(
    toy_set: Path, tmp_path: Path, proven: Callable[..., None], failing_compiler: Callable[..., None]
) -> None:
    expected = gradients_of(toy_run(toy_set, tmp_path / "plain"))
    proven("compile")
    failing_compiler("backward")
    run = toy_run(toy_set, tmp_path / "run", "training.compile=on")
    ranks = TwoAlike()
    run.state.overlap = OverlappedSums(run.state.net, ranks, bucket_bytes=1000)
    found = gradients_of(run)
    assert len(ranks.sent) == 2 * len(run.state.overlap.sums)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, 2 * other, atol=1e-5, rtol=1e-4)


def test_what_fails_on_another_rank_is_done_without_here(
    toy_set: Path,
    tmp_path: Path,
    proven: Callable[..., None],
    failing_compiler: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    proven("compile")
    failing_compiler("never")
    run = toy_run(toy_set, tmp_path, "training.compile=on")
    answers = iter([FAILED, 0])
    monkeypatch.setattr(run.distributed, "all_reduce_max", lambda value: next(answers))
    gradients_of(run)
    assert not run.state.compiled


# Recording


@pytest.mark.parametrize("closed_already", [False, True])
def test_a_failed_capture_gives_its_pool_back_once(
    closed_already: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch 2.11 leaves the pool open; 2.12 closes it, and a second release would free another's memory."""
    calls: list[str] = []

    def end(index: int, pool: Any) -> None:
        calls.append("end")
        if closed_already:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")

    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_releasePool", lambda *_: calls.append("release"), raising=False)

    class Generator:
        def clone_state(self) -> str:
            return "a copy"

        def graphsafe_set_state(self, state: str) -> None:
            calls.append(state)

    monkeypatch.setattr(torch.cuda, "default_generators", (Generator(),))
    cuda_graphs.release_failed_capture(torch.device("cuda:0"), (0, 1))
    assert calls == (["end"] if closed_already else ["end", "release", "a copy"])
