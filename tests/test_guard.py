"""The guard: what it leaves out is left out whole, what it takes is what torch would have done."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from tests import toy
from trmt.training.guard import ENOUGH, FIRST_SCALE, HIGH, NOT_FINITE, STEEP, WINDOW, Guard, Verdict, _median
from trmt.training.run import Run

CPU = torch.device("cpu")


def parameter() -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.linspace(-1, 1, 12).view(3, 4))


def adam(some: torch.nn.Parameter, *, fused: bool = True, kind: str = "adam") -> torch.optim.Optimizer:
    made = torch.optim.AdamW if kind == "adamw" else torch.optim.Adam
    return made([some], lr=0.1, betas=(0.9, 0.98), weight_decay=0.01, fused=fused)


def guard(*, leaves_out_steep: bool = True, half: bool = False) -> Guard:
    return Guard(CPU, leaves_out_steep=leaves_out_steep, half=half)


def take(
    some: Guard,
    optimizer: torch.optim.Optimizer,
    grad: torch.Tensor,
    *,
    step: int = 1,
    loss: float = 3.0,
    **more: float,
) -> None:
    (only,) = (p for group in optimizer.param_groups for p in group["params"])
    only.grad = grad.clone() * some.scale
    norm = torch.nn.utils.get_total_norm([only.grad])
    some.take(
        optimizer, step=step, norm=norm, nll=torch.tensor(loss * 5), tokens=5, clip=more.get("clip", 0.0)
    )


def gradient(seed: int, size: float = 1.0) -> torch.Tensor:
    drawn = torch.randn(3, 4, generator=torch.Generator().manual_seed(seed))
    return drawn / drawn.norm() * size


@pytest.mark.parametrize("kind", ["adam", "adamw"])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("clip", [0.0, 0.5])
@pytest.mark.parametrize("half", [False, True])
def test_what_is_taken_is_torchs_own_step(kind: str, fused: bool, clip: float, half: bool) -> None:
    ours, theirs = parameter(), parameter()
    optimizer, reference = adam(ours, fused=fused, kind=kind), adam(theirs, fused=False, kind=kind)
    some = guard(half=half)
    for step in range(5):
        grad = gradient(step, size=0.3 + step)
        take(some, optimizer, grad, step=step + 1, clip=clip)
        theirs.grad = grad.clone()
        if clip:
            torch.nn.utils.clip_grad_norm_([theirs], clip)
        reference.step()
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
    found = some.verdicts()
    assert [verdict.bits for verdict in found] == [0] * 5
    assert [verdict.norm for verdict in found] == pytest.approx([0.3, 1.3, 2.3, 3.3, 4.3], rel=1e-5)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_a_gradient_without_numbers_leaves_weights_and_moments_untouched(
    fused: bool, broken: float, clip: float
) -> None:
    weights = parameter()
    optimizer, some = adam(weights, fused=fused), guard()
    take(some, optimizer, gradient(1), clip=clip)
    before = weights.detach().clone()
    moments = {name: value.clone() for name, value in optimizer.state[weights].items()}
    grad = gradient(2)
    grad[1, 2] = broken
    take(some, optimizer, grad, step=2, clip=clip, loss=broken)
    assert torch.equal(weights, before)
    assert all(torch.equal(optimizer.state[weights][name], value) for name, value in moments.items())
    assert [verdict.bits for verdict in some.verdicts()] == [0, NOT_FINITE]
    assert some.mean_loss() == pytest.approx(3.0), "the loss of a step that was left out does not count"
    take(some, optimizer, gradient(3), step=3, clip=clip)
    assert not torch.equal(weights, before)


def used_to(some: Guard, optimizer: torch.optim.Optimizer, steps: int = WINDOW) -> None:
    """Steps whose gradients and losses vary as usual."""
    generator = torch.Generator().manual_seed(4)
    sizes = torch.exp(0.3 * torch.randn(steps, generator=generator))
    losses = 4.0 + 0.2 * torch.randn(steps, generator=generator)
    for step in range(steps):
        take(some, optimizer, gradient(step, float(sizes[step])), step=step + 1, loss=float(losses[step]))


@pytest.mark.parametrize("leaves_out", [True, False])
@pytest.mark.parametrize(
    ("size", "loss", "bits"),
    [(1.0, 4.0, 0), (3.0, 4.5, 0), (200.0, 4.0, STEEP), (1.0, 9.0, HIGH), (1e6, 1e3, STEEP | HIGH)],
)
def test_a_spike_is_far_above_the_usual(leaves_out: bool, size: float, loss: float, bits: int) -> None:
    weights = parameter()
    optimizer, some = adam(weights), guard(leaves_out_steep=leaves_out)
    used_to(some, optimizer)
    assert not any(verdict.bits for verdict in some.verdicts())
    before = weights.detach().clone()
    take(some, optimizer, gradient(0, size), step=WINDOW + 1, loss=loss)
    (verdict,) = some.verdicts()
    assert (verdict.step, verdict.bits) == (WINDOW + 1, bits)
    assert verdict.norm == pytest.approx(size, rel=1e-4) and verdict.loss == pytest.approx(loss, rel=1e-4)
    assert torch.equal(weights, before) == (leaves_out and bool(bits & STEEP))


def test_too_few_steps_say_nothing_of_the_usual() -> None:
    optimizer, some = adam(parameter()), guard()
    used_to(some, optimizer, ENOUGH - 1)
    take(some, optimizer, gradient(0, 1e6), step=ENOUGH, loss=1e3)
    assert not any(verdict.bits for verdict in some.verdicts())


def test_what_lasts_becomes_the_usual() -> None:
    optimizer, some = adam(parameter()), guard()
    used_to(some, optimizer)
    some.verdicts()
    for step in range(2 * WINDOW):
        take(some, optimizer, gradient(step, 500.0), step=step + 1)
    bits = [verdict.bits for verdict in some.verdicts()]
    assert bits[0] == STEEP and not any(bits[WINDOW:])
    assert 20 < bits.index(0) <= WINDOW, "medians follow, but not at once"


def test_spikes_do_not_hide_the_next_ones() -> None:
    optimizer, some = adam(parameter()), guard()
    used_to(some, optimizer)
    some.verdicts()
    for step in range(10):
        take(some, optimizer, gradient(step, 1e4), step=step + 1)
    assert [verdict.bits for verdict in some.verdicts()] == [STEEP] * 10


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_what_is_not_finite_is_no_part_of_the_usual(broken: float) -> None:
    optimizer, some = adam(parameter()), guard()
    used_to(some, optimizer)
    before = some.usual.clone()
    take(some, optimizer, torch.full((3, 4), broken), step=WINDOW + 1)
    take(some, optimizer, gradient(1), step=WINDOW + 2, loss=broken)
    assert [verdict.bits for verdict in some.verdicts()[-2:]] == [NOT_FINITE] * 2
    assert torch.equal(some.usual, before)


def test_going_on_from_what_was_saved_is_the_same() -> None:
    one, two = guard(), guard()
    used_to(one, adam(parameter()), 100)
    two.restore({name: tensor.clone() for name, tensor in one.tensors().items()})
    assert not two.unread and two.verdicts() == []
    one.verdicts()
    for some in (one, two):
        optimizer = adam(parameter())
        for step in range(30):
            take(some, optimizer, gradient(step, 40.0 if step == 7 else 1.0), step=step + 1, loss=4.0)
    assert one.verdicts() == two.verdicts()
    assert one.mean_loss() == two.mean_loss()
    assert all(torch.equal(one.tensors()[name], value) for name, value in two.tensors().items())


def test_the_scale_is_torchs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against GradScaler: halved after each infinity, doubled after many steps without one."""
    many = 60
    monkeypatch.setattr("trmt.training.guard.SCALE_STEPS", many)
    weights, some = parameter(), guard(half=True)
    optimizer = adam(weights)
    theirs = torch.amp.GradScaler("cpu", init_scale=FIRST_SCALE, growth_interval=many)
    twin = adam(parameter())
    (other,) = twin.param_groups[0]["params"]
    bad = {0, 1, 5, 40}
    for step in range(many + 45):
        grad = torch.full((3, 4), math.inf) if step in bad else torch.ones(3, 4)
        take(some, optimizer, grad, step=step + 1)
        other.grad = grad * theirs.scale(torch.ones(()))
        theirs.step(twin)
        theirs.update()
        assert float(some.scale) == theirs.get_scale()
    assert float(some.scale) == FIRST_SCALE / 2**4 * 2
    torch.testing.assert_close(weights, other, atol=1e-5, rtol=1e-5)


def test_a_spike_does_not_change_the_scale() -> None:
    optimizer, some = adam(parameter()), guard(half=True)
    used_to(some, optimizer)
    take(some, optimizer, gradient(0, 1e3), step=WINDOW + 1)
    assert some.verdicts()[-1].steep and float(some.scale) == FIRST_SCALE


def test_a_scale_is_kept_in_half_precision_only() -> None:
    assert "scale" not in guard().tensors()
    some = guard(half=True)
    some.restore(guard().tensors())
    assert float(some.scale) == FIRST_SCALE


def test_a_verdict_says_what_it_knows() -> None:
    verdict = Verdict(3, STEEP | HIGH, 2.0, 1.0)
    assert verdict.finite and verdict.steep and verdict.high
    assert not Verdict(3, NOT_FINITE, 2.0, 1.0).finite


# Waiting


class Waits(torch.overrides.TorchFunctionMode):
    """Counts what would make the host wait for the device."""

    count = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if getattr(function, "__name__", "") in (
            "item",
            "tolist",
            "__bool__",
            "__float__",
            "__int__",
            "cpu",
            "numpy",
        ):
            self.count += 1
        return function(*args, **(kwargs or {}))


def test_a_whole_step_never_asks_the_device(toy_set: Path, tmp_path: Path) -> None:
    """Neither gradients, clipping, the optimiser nor the running mean do; nor does this network."""
    recipe = toy.recipe(tmp_path, {"optim": {"clip": 1.0, "ema": 0.9}}, architecture="conv")
    run = Run.planned(toy.options(tmp_path / "run", toy_set, recipe), None)
    batches = [run.batches.load(pairs) for step in run.batches.plan(0) for pairs in step]
    with Waits() as waits:
        for step in range(3):
            run.learner.learn(batches[step : step + 2], step)
        assert waits.count == 0
        run.learner.guard.mean_loss()
    assert waits.count == 1


def test_a_step_never_asks_the_device() -> None:
    optimizer, some = adam(parameter()), guard(half=True)
    with Waits() as waits:
        for step in range(3):
            take(some, optimizer, gradient(step), step=step + 1, clip=1.0)
        assert waits.count == 0
        some.verdicts()
    assert waits.count == 1
    with Waits() as waits:
        assert bool(torch.ones(())) and float(torch.ones(())) == 1
    assert waits.count >= 2, "what it is to notice is noticed"


def test_what_was_saved_is_not_written_to() -> None:
    saved = {name: tensor.clone() for name, tensor in guard().tensors().items()}
    kept = {name: tensor.clone() for name, tensor in saved.items()}
    other = guard()
    other.restore(saved)
    weights = torch.nn.Parameter(torch.ones(3))
    weights.grad = torch.ones(3)
    other.take(adam(weights), step=1, norm=torch.tensor(2.0), nll=torch.tensor(3.0), tokens=2, clip=0.0)
    for name, tensor in kept.items():
        torch.testing.assert_close(saved[name], tensor, equal_nan=True)


def test_the_median_is_the_lower_one_of_those_that_are_numbers() -> None:
    nan = math.nan
    rows = torch.tensor([[4.0, nan, 1, 3, 2], [5, nan, nan, nan, 7], [9, 1, 8, 2, 3]])
    middle, count = _median(rows)
    assert (middle.tolist(), count.tolist()) == ([2, 5, 3], [4, 2, 5])
