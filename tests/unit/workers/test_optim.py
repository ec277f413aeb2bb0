"""Schedules against their closed forms, AdamW against a hand-written one, clipping against torch and against NaN."""

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from api.spec import ClipSpec, ModelSpec, OptimizerSpec, ScheduleSpec
from workers.model import Transformer
from workers.optim import clip_gradients, learning_rate, make_optimizer, set_learning_rate, warmup_steps

schedules = st.builds(
    ScheduleSpec,
    type=st.sampled_from(["constant", "cosine"]),
    warmup_steps=st.one_of(st.none(), st.integers(0, 50)),
    floor=st.floats(0, 1),
)


def rates(schedule: ScheduleSpec, total: int, peak: float = 2.0) -> list[float]:
    """Return the learning rates of steps 1 to `total`."""
    return [learning_rate(schedule, peak, step, total) for step in range(1, total + 1)]


def tiny_model(**changes: Any) -> Transformer:
    torch.manual_seed(0)
    spec = ModelSpec(**{"layers": 1, "width": 16, "heads": 2, "norm": "layer", "bias": True, **changes})
    return Transformer(spec, 20, 8)


def with_gradients(model: nn.Module, scale: float = 1.0) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator) * scale
    return model


def gradients(model: nn.Module) -> list[Tensor]:
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


def test_constant_rises_to_the_peak_at_the_last_step_of_warm_up_and_stays() -> None:
    assert rates(ScheduleSpec(type="constant", warmup_steps=4), 8) == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0, 2.0, 2.0]


def test_without_warm_up_the_first_step_is_at_the_peak() -> None:
    assert rates(ScheduleSpec(type="constant", warmup_steps=0), 3) == [2.0, 2.0, 2.0]


def test_cosine_follows_its_closed_form() -> None:
    found = rates(ScheduleSpec(type="cosine", warmup_steps=5, floor=0.1), 25)
    expected = [2.0 * step / 5 for step in range(1, 6)]
    expected += [2.0 * (0.1 + 0.9 * (1 + math.cos(math.pi * (step - 5) / 20)) / 2) for step in range(6, 26)]
    assert found == pytest.approx(expected, rel=1e-12)
    assert found[14] == pytest.approx(2.0 * 0.55)


@given(schedules, st.integers(1, 300), st.floats(1e-6, 10))
def test_every_schedule_rises_to_its_peak_never_rises_again_and_ends_at_its_floor(
    schedule: ScheduleSpec, total: int, peak: float
) -> None:
    found, warmup = rates(schedule, total, peak), warmup_steps(schedule, total)
    rise, fall = found[:warmup], found[max(0, warmup - 1) :]
    assert all(a < b for a, b in itertools.pairwise(rise))
    assert all(a >= b - 1e-12 * peak for a, b in itertools.pairwise(fall))
    assert all(0 <= rate <= peak * (1 + 1e-12) for rate in found)
    if 0 < warmup <= total:
        assert rise[-1] == pytest.approx(peak, rel=1e-12)
    if warmup < total:
        floor = schedule.floor if schedule.type == "cosine" else 1.0
        assert found[-1] == pytest.approx(peak * floor, rel=1e-9, abs=1e-15)


@pytest.mark.parametrize(("total", "expected"), [(1, 0), (9, 0), (10, 1), (500, 50), (1000, 100), (100_000, 100)])
def test_warm_up_is_by_default_a_tenth_of_the_run_but_at_most_a_hundred_steps(total: int, expected: int) -> None:
    assert warmup_steps(ScheduleSpec(), total) == expected
    assert warmup_steps(ScheduleSpec(warmup_steps=7), total) == 7


def test_only_matrices_decay_and_every_parameter_is_in_one_group() -> None:
    model = tiny_model(positions="learned")
    decayed, exempt = make_optimizer(model, OptimizerSpec(weight_decay=0.3)).param_groups
    assert (decayed["weight_decay"], exempt["weight_decay"]) == (0.3, 0.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = [{names[id(parameter)] for parameter in group["params"]} for group in (decayed, exempt)]
    assert groups[0] | groups[1] == set(names.values())
    assert not groups[0] & groups[1]
    assert groups[1] == {name for name in names.values() if "norm" in name or name.endswith("bias")}


def test_the_learning_rate_reaches_every_group() -> None:
    optimizer = make_optimizer(tiny_model(), OptimizerSpec())
    set_learning_rate(optimizer, 0.125)
    assert [group["lr"] for group in optimizer.param_groups] == [0.125, 0.125]


def test_clipping_equals_torchs_and_returns_the_norm_from_before() -> None:
    ours, theirs = with_gradients(tiny_model(), 3.0), with_gradients(tiny_model(), 3.0)
    expected = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
    norm = clip_gradients(ours, ClipSpec(threshold=0.5))
    assert torch.equal(norm, expected)
    assert all(torch.equal(a, b) for a, b in zip(gradients(ours), gradients(theirs), strict=True))
    before = torch.cat([g.flatten() for g in gradients(with_gradients(tiny_model(), 3.0))]).norm()
    after = torch.cat([g.flatten() for g in gradients(ours)]).norm()
    assert float(norm) == pytest.approx(float(before), rel=1e-5)
    assert float(after) == pytest.approx(0.5, rel=1e-5)


@pytest.mark.parametrize("clip", [None, ClipSpec(threshold=1e9)])
def test_without_clipping_or_below_the_threshold_gradients_stay_as_they_are(clip: ClipSpec | None) -> None:
    model = with_gradients(tiny_model())
    before = gradients(model)
    norm = clip_gradients(model, clip)
    assert float(norm) == pytest.approx(float(torch.cat([g.flatten() for g in before]).norm()), rel=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(before, gradients(model), strict=True))


@pytest.mark.parametrize("clip", [None, ClipSpec()])
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_one_gradient_that_is_not_finite_makes_the_norm_so(clip: ClipSpec | None, poison: float) -> None:
    model = with_gradients(tiny_model())
    last = list(model.parameters())[-1]
    assert last.grad is not None
    last.grad.view(-1)[-1] = poison
    assert not math.isfinite(float(clip_gradients(model, clip)))


def adamw_by_hand(parameter: Tensor, grads: list[Tensor], spec: OptimizerSpec, decay: float) -> Tensor:
    """Decoupled weight decay (Loshchilov & Hutter, 2019), algorithm 2, in float64."""
    theta, m, v = parameter.double(), torch.zeros_like(parameter).double(), torch.zeros_like(parameter).double()
    beta1, beta2 = spec.betas
    for t, grad in enumerate((g.double() for g in grads), start=1):
        m = beta1 * m + (1 - beta1) * grad
        v = beta2 * v + (1 - beta2) * grad**2
        m_hat, v_hat = m / (1 - beta1**t), v / (1 - beta2**t)
        theta = theta - spec.learning_rate * (m_hat / (v_hat.sqrt() + spec.epsilon) + decay * theta)
    return theta


def test_the_optimizer_is_adamw_with_decoupled_decay() -> None:
    spec = OptimizerSpec(learning_rate=0.01, betas=(0.8, 0.9), epsilon=1e-3, weight_decay=0.5)
    model = tiny_model()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = make_optimizer(model, spec)
    generator = torch.Generator().manual_seed(2)
    history: dict[str, list[Tensor]] = {name: [] for name in before}
    for _ in range(20):
        for name, parameter in model.named_parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
            history[name].append(parameter.grad.clone())
        optimizer.step()
    for name, parameter in model.named_parameters():
        expected = adamw_by_hand(before[name], history[name], spec, 0.5 if parameter.dim() >= 2 else 0.0)
        torch.testing.assert_close(parameter.detach().double(), expected, rtol=1e-4, atol=1e-6)
