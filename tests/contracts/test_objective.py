"""What every registered objective promises; the translation loss is compared with PyTorch's."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.derivatives import needs_kernels
from tests.fakes import VOCABULARY, random_sentences, small_network
from tests.variants import every_network
from trmt.acceleration import accelerated
from trmt.config import build
from trmt.errors import ConfigError
from trmt.nets.ragged import Ragged, Source
from trmt.objectives import cross_entropy
from trmt.objectives.base import Objective, Specials
from trmt.objectives.cross_entropy import SmoothedCrossEntropy
from trmt.objectives.translation import TranslationConfig, TranslationObjective
from trmt.registry import ARCHITECTURES, OBJECTIVES, installed, resolve
from trmt.sets.batches import Batches, BatchShape, RaggedBatch
from trmt.sets.shards import RaggedArray

BOS, EOS = 2, 3
PACKED = [name for name in installed(ARCHITECTURES) if resolve(ARCHITECTURES, name).packs_tokens]
CPU = torch.device("cpu")


def examples(count: int = 6) -> RaggedBatch:
    def column(seed: int) -> RaggedArray:
        sentences = random_sentences(count, seed=seed)
        lengths = np.array([len(sentence) for sentence in sentences])
        return RaggedArray(np.concatenate(sentences).astype(np.uint16), lengths)

    return RaggedBatch({"source.ids": column(1), "target.ids": column(2)})


def learns_from_pairs(name: str) -> bool:
    """The others have examples of their own (tests/test_masked.py)."""
    kind = resolve(OBJECTIVES, name)
    return kind.batches(kind.config_class()) is Batches


@pytest.fixture(params=list(filter(learns_from_pairs, installed(OBJECTIVES))))
def objective(request: pytest.FixtureRequest) -> Objective:
    kind = resolve(OBJECTIVES, request.param)
    made: Objective = kind(build(kind.config_class, {}, where="loss"), Specials(bos=BOS, eos=EOS))
    return made


@pytest.mark.parametrize("cuts", [[0, 3, 6], [0, 1, 2, 3, 4, 5, 6], [0, 5, 6]])
@pytest.mark.parametrize("architecture", every_network())
def test_sums_add_up_over_any_split(objective: Objective, architecture: str, cuts: list[int]) -> None:
    net = small_network(architecture)
    whole = examples()

    def gradients(parts: list[RaggedBatch]) -> tuple[float, float, int, list[torch.Tensor]]:
        net.zero_grad()
        losses = [objective.loss(net, objective.collate(part, CPU)) for part in parts]
        torch.stack([loss.total for loss in losses]).sum().backward()
        grads = [parameter.grad.clone() for parameter in net.parameters() if parameter.grad is not None]
        total, nll = (
            sum(float(x.detach()) for x in xs) for xs in zip(*((a.total, a.nll) for a in losses), strict=True)
        )
        return total, nll, sum(loss.tokens for loss in losses), grads

    one = gradients([whole])
    many = gradients([whole.slice(begin, end) for begin, end in pairwise(cuts)])
    assert one[0] == pytest.approx(many[0], rel=1e-5)
    assert one[1] == pytest.approx(many[1], rel=1e-5)
    assert one[2] == many[2] == objective.tokens(whole)
    for ours, theirs in zip(one[3], many[3], strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)


def test_the_target_is_shifted_by_one_and_the_source_ends_with_eos() -> None:
    column = RaggedArray(np.array([5, 6, 7, 8], np.uint16), np.array([3, 1]))
    objective = TranslationObjective(TranslationConfig(), Specials(bos=BOS, eos=EOS))
    batch = objective.collate(RaggedBatch({"source.ids": column, "target.ids": column}), CPU)
    assert batch.source.ids_N.tolist() == [5, 6, 7, EOS, 8, EOS]
    assert batch.before.ids_N.tolist() == [BOS, 5, 6, 7, BOS, 8]
    assert batch.after_N.tolist() == [5, 6, 7, EOS, 8, EOS]
    assert batch.source.lengths_S.tolist() == batch.before.lengths_S.tolist() == [4, 2]
    assert batch.source.longest == 4
    assert batch.tokens == 6


@pytest.mark.parametrize("architecture", every_network())
def test_every_column_of_the_logits_is_a_real_id(architecture: str) -> None:
    """So no padded id can take part in the normaliser or in the mass of smoothing."""
    net = small_network(architecture)
    batch = TranslationObjective(TranslationConfig(), Specials(bos=BOS, eos=EOS)).collate(examples(), CPU)
    hidden = net(batch.source, batch.before).hidden
    assert net.readout(hidden).shape == (len(batch.after_N), VOCABULARY)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.3])
def test_the_smoothed_loss_is_torchs(smoothing: float) -> None:
    torch.manual_seed(0)
    logits = (3 * torch.randn(9, 13, dtype=torch.double)).requires_grad_()
    twin = logits.detach().clone().requires_grad_()
    target = torch.randint(13, (9,))
    total, nll = SmoothedCrossEntropy.apply(logits, target, smoothing)
    expected = F.cross_entropy(twin, target, reduction="sum", label_smoothing=smoothing)
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(nll, F.cross_entropy(twin.detach(), target, reduction="sum"))
    (2.5 * total).backward()
    (2.5 * expected).backward()
    torch.testing.assert_close(logits.grad, twin.grad)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_handwritten_gradient_is_that_of_the_loss(smoothing: float) -> None:
    torch.manual_seed(1)
    logits = torch.randn(4, 6, dtype=torch.double, requires_grad=True)
    target = torch.randint(6, (4,))
    assert torch.autograd.gradcheck(lambda x: SmoothedCrossEntropy.apply(x, target, smoothing)[0], (logits,))


def test_huge_logits_stay_finite() -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True)
    total, _ = SmoothedCrossEntropy.apply(logits, torch.tensor([1]), 0.1)
    total.backward()
    assert total.isfinite()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("wrong", [-0.1, 1.0])
def test_smoothing_out_of_range_is_refused(wrong: float) -> None:
    with pytest.raises(ConfigError, match=r"loss\.label_smoothing"):
        TranslationConfig(label_smoothing=wrong)


def test_losses_of_the_network_itself_are_added(
    objective: Objective, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = small_network(installed(ARCHITECTURES)[0])
    batch = objective.collate(examples(), CPU)
    before = objective.loss(net, batch)
    plain = net.forward

    def with_aux(*args: Any, **options: Any) -> Any:
        return replace(plain(*args, **options), aux={"balance": torch.tensor(7.0)})

    monkeypatch.setattr(net, "forward", with_aux)
    after = objective.loss(net, batch)
    torch.testing.assert_close(after.total, before.total + 7)
    torch.testing.assert_close(after.nll, before.nll)


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_in_chunks_is_the_loss_of_all_logits(
    smoothing: float, kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not kernels:
        monkeypatch.setenv("TRMT_KERNELS", "0")
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", {"cpu": 0})  # the fewest tokens that can go at once
    torch.manual_seed(0)
    hidden = torch.randn(37, 12, requires_grad=True)
    weight = torch.randn(29, 12, requires_grad=True)
    target = torch.randint(0, 29, (37,))
    total, nll = cross_entropy.smoothed_cross_entropy(hidden, weight, target, smoothing)
    ours = torch.autograd.grad(3 * total, (hidden, weight))
    logits = hidden @ weight.T
    expected = F.cross_entropy(logits, target, label_smoothing=smoothing, reduction="sum")
    theirs = torch.autograd.grad(3 * expected, (hidden, weight))
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(nll, F.cross_entropy(logits, target, reduction="sum"))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_loss_in_half_precision_is_near(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(40, 16, requires_grad=True), torch.randn(500, 16, requires_grad=True)
    target = torch.randint(0, 500, (40,))
    with torch.autocast("cpu", dtype):
        total, _ = cross_entropy.smoothed_cross_entropy(hidden, weight, target, 0.1)
    ours = torch.autograd.grad(total, (hidden, weight))
    expected = F.cross_entropy(hidden @ weight.T, target, label_smoothing=0.1, reduction="sum")
    theirs = torch.autograd.grad(expected, (hidden, weight))
    torch.testing.assert_close(total, expected, rtol=0.02, atol=0)
    for one, other in zip(ours, theirs, strict=True):
        assert F.cosine_similarity(one.flatten(), other.flatten(), dim=0) > 0.999
        assert float(one.norm() / other.norm()) == pytest.approx(1, abs=0.02)


def test_a_token_that_many_predict_alike_is_within_fp16() -> None:
    torch.manual_seed(0)
    hidden = (torch.randn(2000, 16) * 0.3 + 1).requires_grad_()
    weight = (torch.randn(50, 16) * 0.1).requires_grad_()
    target = torch.randint(0, 50, (2000,)).clamp(min=20)  # nearly half of them are the same
    with torch.autocast("cpu", torch.float16):
        total, _ = cross_entropy.smoothed_cross_entropy(hidden, weight, target, 0.1)
    ours = torch.autograd.grad(total, (hidden, weight))
    expected = F.cross_entropy(hidden @ weight.T, target, label_smoothing=0.1, reduction="sum")
    for one, other in zip(ours, torch.autograd.grad(expected, (hidden, weight)), strict=True):
        assert F.cosine_similarity(one.flatten(), other.flatten(), dim=0) > 0.999
        assert float(one.norm() / other.norm()) == pytest.approx(1, abs=0.02)


def test_a_gpu_without_a_compiler_has_the_same_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> object:
        raise RuntimeError("no compiler here")

    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda made, **options: real(made, backend=broken, **options))
    monkeypatch.setattr(cross_entropy, "_compiled", cross_entropy._compiled.__wrapped__)
    monkeypatch.setattr("trmt.devices.abilities._known", {})
    monkeypatch.setattr("trmt.devices.hardware.is_cuda", lambda device: True)
    monkeypatch.setenv("TRMT_COMPILE", "1")
    logits, target = torch.randn(16, 40), torch.randint(0, 37, (16,))
    ours = cross_entropy._chunk_loss(logits, target, 37, 0.1, 1.0)
    theirs = cross_entropy._by_torch(logits, target, 37, 0.1, 1.0)
    torch.testing.assert_close(ours, theirs)


def test_columns_that_only_make_the_logits_wider_stand_for_nothing() -> None:
    logits, target = torch.randn(16, 37), torch.randint(0, 37, (16,))
    sums, grad = cross_entropy._by_torch(logits, target, 37, 0.1, 1.0)
    wide_sums, wide_grad = cross_entropy._by_torch(F.pad(logits, (0, 27)), target, 37, 0.1, 1.0)
    torch.testing.assert_close((wide_sums, wide_grad[:, :37]), (sums, grad))
    assert not wide_grad[:, 37:].any()


@pytest.mark.parametrize("kernels", [True, False])
def test_padding_counts_for_nothing_in_the_loss(kernels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not kernels:
        monkeypatch.setenv("TRMT_KERNELS", "0")
    torch.manual_seed(0)
    hidden, weight = torch.randn(9, 8, requires_grad=True), torch.randn(20, 8, requires_grad=True)
    target = torch.randint(0, 20, (9,))
    padded = torch.cat([target, torch.full((7,), -1)])
    with_padding = torch.cat([hidden, torch.randn(7, 8)])
    ours = cross_entropy.smoothed_cross_entropy(with_padding, weight, padded, 0.1)
    theirs = cross_entropy.smoothed_cross_entropy(hidden, weight, target, 0.1)
    torch.testing.assert_close(ours, theirs)
    for one, other in zip(
        torch.autograd.grad(ours[0], (hidden, weight)),
        torch.autograd.grad(theirs[0], (hidden, weight)),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


def padded_and_plain(architecture: str) -> tuple[Any, Any, Any]:
    objective = TranslationObjective(TranslationConfig(), Specials(bos=BOS, eos=EOS))
    some = examples()
    shape = BatchShape(source_tokens=80, target_tokens=72, sentences=20, max_length=30)
    return (
        small_network(architecture),
        objective.collate(some, CPU),
        objective.collate(some, CPU, shape=shape),
    )


@pytest.mark.parametrize("architecture", PACKED)
def test_filled_up_batches_have_one_shape_and_the_same_loss(architecture: str) -> None:
    net, plain, filled = padded_and_plain(architecture)
    assert (len(filled.source.ids_N), len(filled.before.ids_N), len(filled.source)) == (80, 72, 20)
    assert (len(filled.before), filled.source.longest, filled.before.longest) == (20, 30, 30)
    assert int(filled.source.lengths_S.sum()) == 80
    assert int(filled.before.lengths_S.sum()) == len(filled.after_N) == 72
    objective = TranslationObjective(TranslationConfig(), Specials(bos=BOS, eos=EOS))
    found = []
    for batch in (plain, filled):
        loss = objective.loss(net, batch)
        gradients = torch.autograd.grad(loss.total, list(net.parameters()), allow_unused=True)
        found.append((loss.total, loss.nll, *(each for each in gradients if each is not None)))
        assert loss.tokens == plain.tokens
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "shape",
    [
        BatchShape(10, 72, 20, 30),
        BatchShape(80, 72, 6, 30),
        BatchShape(80, 72, 20, 2),
        BatchShape(80, 2000, 20, 30),
    ],
)
def test_what_does_not_fit_is_left_as_it_is(shape: BatchShape) -> None:
    objective = TranslationObjective(TranslationConfig(), Specials(bos=BOS, eos=EOS))
    some = examples()
    plain, left = objective.collate(some, CPU), objective.collate(some, CPU, shape=shape)
    assert torch.equal(plain.source.ids_N, left.source.ids_N)
    assert torch.equal(plain.after_N, left.after_N)


@pytest.mark.parametrize("architecture", PACKED)
def test_a_padding_free_network_compiles_whole_and_once_for_one_shape(
    architecture: str,
) -> None:
    net, _, _ = padded_and_plain(architecture)
    net.train()
    graphs = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(net, backend=backend, fullgraph=True, dynamic=False)
    objective = TranslationObjective(TranslationConfig(), Specials(bos=BOS, eos=EOS))
    shape = BatchShape(source_tokens=80, target_tokens=72, sentences=20, max_length=30)
    for some in (examples(), examples().slice(0, 3), examples().slice(2, 6)):
        objective.loss(compiled, objective.collate(some, CPU, shape=shape)).total.backward()
    torch._dynamo.reset()
    assert len(graphs) == 1


@pytest.mark.slow
@pytest.mark.parametrize("architecture", installed(ARCHITECTURES))
def test_networks_that_pay_to_compile_make_few_graphs_for_any_lengths(architecture: str) -> None:
    """A graph for the first lengths, and one or two for any others; each one takes a minute to compile."""
    if not resolve(ARCHITECTURES, architecture).pays_to_compile:
        pytest.skip("it is not compiled on its own account")
    fields = resolve(ARCHITECTURES, architecture).config_class.__dataclass_fields__
    one_layer = {name: 1 for name in ("encoder_layers", "decoder_layers") if name in fields}
    net = small_network(architecture, **one_layer).train()
    graphs = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(net, backend=backend)
    counts = []
    for seed in range(5):
        source, target = (random_sentences(5 + seed, seed=seed + side) for side in (0, 50))
        compiled(Source.of(source), Ragged.of(target))
        counts.append(len(graphs))
    torch._dynamo.reset()
    assert counts[-1] <= 3 and counts[-1] == counts[-2]


@pytest.mark.parametrize("kernels", [True, False])
def test_a_target_without_a_logit_is_refused(kernels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not kernels:
        monkeypatch.setenv("TRMT_KERNELS", "0")
    hidden, weight = torch.randn(3, 8, requires_grad=True), torch.randn(20, 8)
    with pytest.raises((IndexError, RuntimeError)):
        cross_entropy.smoothed_cross_entropy(hidden, weight, torch.tensor([1, 20, 2]), 0.1)


@needs_kernels
def test_the_kernels_exponential_is_good_to_the_last_digits() -> None:
    logits = -torch.linspace(0, 80, 61 * 64).view(64, 61).t().contiguous()
    logits[:, 0] = 0  # the largest of each row, so that nothing is rounded before the exponential
    target = torch.zeros(61, dtype=torch.long)
    expected = logits.double().softmax(1)
    accelerated("cross_entropy")(logits, target, 0.0)
    torch.testing.assert_close(logits[:, 1:].double(), expected[:, 1:], rtol=1e-6, atol=0)
