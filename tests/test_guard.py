"""The gradient guard: a skipped step changes nothing, any other is the step of torch's own optimiser."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from tests import toy
from trmt.training.guard import (
    GRADIENT_SPIKE,
    INITIAL_SCALE,
    LOSS_SPIKE,
    MIN_STEPS,
    NOT_FINITE,
    WINDOW,
    GradientGuard,
    StepReport,
    _median,
)
from trmt.training.run import TrainingRun
from trmt.training.step import train_step

CPU = torch.device("cpu")


def parameter() -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.linspace(-1, 1, 12).view(3, 4))


def adam(weights: torch.nn.Parameter, *, fused: bool = True, name: str = "adam") -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW if name == "adamw" else torch.optim.Adam
    return optimizer([weights], lr=0.1, betas=(0.9, 0.98), weight_decay=0.01, fused=fused)


def make_guard(*, skip_spikes: bool = True, fp16: bool = False) -> GradientGuard:
    return GradientGuard(CPU, skip_spikes=skip_spikes, fp16=fp16)


def guarded_step(
    guard: GradientGuard,
    optimizer: torch.optim.Optimizer,
    grad: torch.Tensor,
    *,
    step: int = 1,
    loss: float = 3.0,
    **more: float,
) -> None:
    (only,) = (p for group in optimizer.param_groups for p in group["params"])
    only.grad = grad.clone() * guard.scale
    norm = torch.nn.utils.get_total_norm([only.grad])
    guard.update(
        optimizer, step=step, norm=norm, nll=torch.tensor(loss * 5), tokens=5, clip=more.get("clip", 0.0)
    )


def gradient(seed: int, norm: float = 1.0) -> torch.Tensor:
    direction = torch.randn(3, 4, generator=torch.Generator().manual_seed(seed))
    return direction / direction.norm() * norm


@pytest.mark.parametrize("name", ["adam", "adamw"])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("clip", [0.0, 0.5])
@pytest.mark.parametrize("fp16", [False, True])
def test_a_step_is_that_of_torch(name: str, fused: bool, clip: float, fp16: bool) -> None:
    ours, theirs = parameter(), parameter()
    optimizer, reference = adam(ours, fused=fused, name=name), adam(theirs, fused=False, name=name)
    guard = make_guard(fp16=fp16)
    for step in range(5):
        grad = gradient(step, norm=0.3 + step)
        guarded_step(guard, optimizer, grad, step=step + 1, clip=clip)
        theirs.grad = grad.clone()
        if clip:
            torch.nn.utils.clip_grad_norm_([theirs], clip)
        reference.step()
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
    found = guard.pop_reports()
    assert [report.flags for report in found] == [0] * 5
    assert [report.norm for report in found] == pytest.approx([0.3, 1.3, 2.3, 3.3, 4.3], rel=1e-5)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_a_gradient_that_is_not_finite_leaves_weights_and_moments_untouched(
    fused: bool, broken: float, clip: float
) -> None:
    weights = parameter()
    optimizer, guard = adam(weights, fused=fused), make_guard()
    guarded_step(guard, optimizer, gradient(1), clip=clip)
    before = weights.detach().clone()
    moments = {name: value.clone() for name, value in optimizer.state[weights].items()}
    grad = gradient(2)
    grad[1, 2] = broken
    guarded_step(guard, optimizer, grad, step=2, clip=clip, loss=broken)
    assert torch.equal(weights, before)
    assert all(torch.equal(optimizer.state[weights][name], value) for name, value in moments.items())
    assert [report.flags for report in guard.pop_reports()] == [0, NOT_FINITE]
    assert guard.pop_mean_loss() == pytest.approx(3.0), "the loss of a skipped step does not count"
    guarded_step(guard, optimizer, gradient(3), step=3, clip=clip)
    assert not torch.equal(weights, before)


def take_usual_steps(guard: GradientGuard, optimizer: torch.optim.Optimizer, steps: int = WINDOW) -> None:
    """Take steps whose gradients and losses vary a little."""
    generator = torch.Generator().manual_seed(4)
    norms = torch.exp(0.3 * torch.randn(steps, generator=generator))
    losses = 4.0 + 0.2 * torch.randn(steps, generator=generator)
    for step in range(steps):
        guarded_step(
            guard, optimizer, gradient(step, float(norms[step])), step=step + 1, loss=float(losses[step])
        )


@pytest.mark.parametrize("skip_spikes", [True, False])
@pytest.mark.parametrize(
    ("norm", "loss", "flags"),
    [
        (1.0, 4.0, 0),
        (3.0, 4.5, 0),
        (200.0, 4.0, GRADIENT_SPIKE),
        (1.0, 9.0, LOSS_SPIKE),
        (1e6, 1e3, GRADIENT_SPIKE | LOSS_SPIKE),
    ],
)
def test_a_spike_is_far_above_recent_steps(skip_spikes: bool, norm: float, loss: float, flags: int) -> None:
    weights = parameter()
    optimizer, guard = adam(weights), make_guard(skip_spikes=skip_spikes)
    take_usual_steps(guard, optimizer)
    assert not any(report.flags for report in guard.pop_reports())
    before = weights.detach().clone()
    guarded_step(guard, optimizer, gradient(0, norm), step=WINDOW + 1, loss=loss)
    (report,) = guard.pop_reports()
    assert (report.step, report.flags) == (WINDOW + 1, flags)
    assert report.norm == pytest.approx(norm, rel=1e-4) and report.loss == pytest.approx(loss, rel=1e-4)
    assert torch.equal(weights, before) == (skip_spikes and bool(flags & GRADIENT_SPIKE))


def test_there_are_no_spikes_among_the_first_steps() -> None:
    optimizer, guard = adam(parameter()), make_guard()
    take_usual_steps(guard, optimizer, MIN_STEPS - 1)
    guarded_step(guard, optimizer, gradient(0, 1e6), step=MIN_STEPS, loss=1e3)
    assert not any(report.flags for report in guard.pop_reports())


def test_a_lasting_change_stops_being_a_spike() -> None:
    optimizer, guard = adam(parameter()), make_guard()
    take_usual_steps(guard, optimizer)
    guard.pop_reports()
    for step in range(2 * WINDOW):
        guarded_step(guard, optimizer, gradient(step, 500.0), step=step + 1)
    flags = [report.flags for report in guard.pop_reports()]
    assert flags[0] == GRADIENT_SPIKE and not any(flags[WINDOW:])
    assert 20 < flags.index(0) <= WINDOW, "the median follows, but not at once"


def test_spikes_do_not_hide_later_spikes() -> None:
    optimizer, guard = adam(parameter()), make_guard()
    take_usual_steps(guard, optimizer)
    guard.pop_reports()
    for step in range(10):
        guarded_step(guard, optimizer, gradient(step, 1e4), step=step + 1)
    assert [report.flags for report in guard.pop_reports()] == [GRADIENT_SPIKE] * 10


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_steps_that_are_not_finite_are_not_among_the_recent_ones(broken: float) -> None:
    optimizer, guard = adam(parameter()), make_guard()
    take_usual_steps(guard, optimizer)
    before = guard.recent.clone()
    guarded_step(guard, optimizer, torch.full((3, 4), broken), step=WINDOW + 1)
    guarded_step(guard, optimizer, gradient(1), step=WINDOW + 2, loss=broken)
    assert [report.flags for report in guard.pop_reports()[-2:]] == [NOT_FINITE] * 2
    assert torch.equal(guard.recent, before)


def test_a_restored_guard_makes_the_same_decisions() -> None:
    one, two = make_guard(), make_guard()
    take_usual_steps(one, adam(parameter()), 100)
    two.load({name: tensor.clone() for name, tensor in one.tensors().items()})
    assert not two.pending and two.pop_reports() == []
    one.pop_reports()
    for guard in (one, two):
        optimizer = adam(parameter())
        for step in range(30):
            guarded_step(
                guard, optimizer, gradient(step, 40.0 if step == 7 else 1.0), step=step + 1, loss=4.0
            )
    assert one.pop_reports() == two.pop_reports()
    assert one.pop_mean_loss() == two.pop_mean_loss()
    assert all(torch.equal(one.tensors()[name], value) for name, value in two.tensors().items())


def test_the_loss_scale_is_that_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against GradScaler: halved after each infinity, doubled after many steps without one."""
    many = 60
    monkeypatch.setattr("trmt.training.guard.SCALE_STEPS", many)
    weights, guard = parameter(), make_guard(fp16=True)
    optimizer = adam(weights)
    theirs = torch.amp.GradScaler("cpu", init_scale=INITIAL_SCALE, growth_interval=many)
    twin = adam(parameter())
    (other,) = twin.param_groups[0]["params"]
    infinite = {0, 1, 5, 40}
    for step in range(many + 45):
        grad = torch.full((3, 4), math.inf) if step in infinite else torch.ones(3, 4)
        guarded_step(guard, optimizer, grad, step=step + 1)
        other.grad = grad * theirs.scale(torch.ones(()))
        theirs.step(twin)
        theirs.update()
        assert float(guard.scale) == theirs.get_scale()
    assert float(guard.scale) == INITIAL_SCALE / 2**4 * 2
    torch.testing.assert_close(weights, other, atol=1e-5, rtol=1e-5)


def test_a_spike_does_not_change_the_scale() -> None:
    optimizer, guard = adam(parameter()), make_guard(fp16=True)
    take_usual_steps(guard, optimizer)
    guarded_step(guard, optimizer, gradient(0, 1e3), step=WINDOW + 1)
    assert guard.pop_reports()[-1].gradient_spike and float(guard.scale) == INITIAL_SCALE


def test_a_scale_is_saved_in_fp16_only() -> None:
    assert "scale" not in make_guard().tensors()
    guard = make_guard(fp16=True)
    guard.load(make_guard().tensors())
    assert float(guard.scale) == INITIAL_SCALE


def test_a_report_has_properties_for_its_flags() -> None:
    report = StepReport(3, GRADIENT_SPIKE | LOSS_SPIKE, 2.0, 1.0)
    assert report.finite and report.gradient_spike and report.loss_spike
    assert not StepReport(3, NOT_FINITE, 2.0, 1.0).finite


# Synchronisation


class Synchronisations(torch.overrides.TorchFunctionMode):
    """Counts the calls that would make the host wait for the device."""

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


def test_a_training_step_does_not_synchronise(toy_set: Path, tmp_path: Path) -> None:
    """Neither gradients, clipping, the optimiser nor the moving average do; nor does this network."""
    recipe = toy.recipe(tmp_path, {"optim": {"clip": 1.0, "ema": 0.9}}, architecture="conv")
    run = TrainingRun.from_options(toy.options(tmp_path / "run", toy_set, recipe), None)
    batches = [run.batches.load(pairs) for step in run.batches.plan(0) for pairs in step]
    with Synchronisations() as found:
        for step in range(3):
            train_step(run.state, batches[step : step + 2])
        assert found.count == 0
        run.state.guard.pop_mean_loss()
    assert found.count == 1


def test_a_step_of_the_guard_does_not_synchronise() -> None:
    optimizer, guard = adam(parameter()), make_guard(fp16=True)
    with Synchronisations() as found:
        for step in range(3):
            guarded_step(guard, optimizer, gradient(step), step=step + 1, clip=1.0)
        assert found.count == 0
        guard.pop_reports()
    assert found.count == 1
    with Synchronisations() as found:
        assert bool(torch.ones(())) and float(torch.ones(())) == 1
    assert found.count >= 2, "the test notices synchronisations"


def test_loaded_tensors_are_not_modified() -> None:
    saved = {name: tensor.clone() for name, tensor in make_guard().tensors().items()}
    copies = {name: tensor.clone() for name, tensor in saved.items()}
    other = make_guard()
    other.load(saved)
    weights = torch.nn.Parameter(torch.ones(3))
    weights.grad = torch.ones(3)
    other.update(adam(weights), step=1, norm=torch.tensor(2.0), nll=torch.tensor(3.0), tokens=2, clip=0.0)
    for name, tensor in copies.items():
        torch.testing.assert_close(saved[name], tensor, equal_nan=True)


def test_the_median_is_the_lower_one_without_nan() -> None:
    nan = math.nan
    rows = torch.tensor([[4.0, nan, 1, 3, 2], [5, nan, nan, nan, 7], [9, 1, 8, 2, 3]])
    middle, count = _median(rows)
    assert (middle.tolist(), count.tolist()) == ([2, 5, 3], [4, 2, 5])
