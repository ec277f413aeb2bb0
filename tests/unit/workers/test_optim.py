"""Schedules against closed forms and torch's own, AdamW against a hand-written one, clipping against torch and NaN."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim.lr_scheduler import (
    ConstantLR,
    CosineAnnealingLR,
    LambdaLR,
    LinearLR,
    LRScheduler,
    SequentialLR,
)

from api.spec import ClipSpec, ModelSpec, OptimizerSpec, ScheduleSpec
from workers.model import Transformer
from workers.optim import clip_gradients, learning_rate, make_optimizer, set_learning_rate, warmup_steps

WARMUPS = st.one_of(st.none(), st.integers(0, 50))
FLOORS = st.one_of(st.none(), st.floats(0, 1))
schedules = st.one_of(
    st.builds(ScheduleSpec, type=st.just("constant"), warmup_steps=WARMUPS),
    st.builds(
        ScheduleSpec,
        type=st.sampled_from(["linear", "cosine", "inverse_sqrt"]),
        warmup_steps=WARMUPS,
        floor=FLOORS,
    ),
    st.builds(
        ScheduleSpec,
        type=st.just("wsd"),
        warmup_steps=WARMUPS,
        floor=FLOORS,
        decay_fraction=st.one_of(st.none(), st.floats(0, 1, exclude_min=True)),
    ),
)
KINDS: list[Any] = ["norm", "infinity_norm", "value"]


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
        floor = schedule.floor if schedule.floor is not None else 1.0
        assert min(found[warmup:]) >= peak * floor * (1 - 1e-12)
        if schedule.type != "inverse_sqrt":
            assert found[-1] == pytest.approx(peak * floor, rel=1e-9, abs=1e-15)


def torchs_rates(make: Callable[[torch.optim.Optimizer], LRScheduler], warmup: int, steps: int) -> list[float]:
    """Return the rates of torch's own linear warm-up to a peak of 2, and of one of its schedules after it."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    rise = LinearLR(optimizer, start_factor=1 / warmup, total_iters=warmup - 1)
    scheduler = SequentialLR(optimizer, [rise, make(optimizer)], milestones=[warmup - 1])
    found = []
    for _ in range(steps):
        found.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize(
    ("schedule", "make"),
    [
        ({"type": "constant"}, lambda o: ConstantLR(o, factor=1.0)),
        ({"type": "linear", "floor": 0.25}, lambda o: LinearLR(o, 1.0, 0.25, total_iters=20)),
        ({"type": "cosine", "floor": 0.25}, lambda o: CosineAnnealingLR(o, T_max=20, eta_min=0.5)),
        ({"type": "inverse_sqrt", "floor": 0.0}, lambda o: LambdaLR(o, lambda k: math.sqrt(5 / (5 + k)))),
        (
            {"type": "wsd", "floor": 0.25, "decay_fraction": 0.32},
            lambda o: LambdaLR(o, lambda k: 1 - 0.75 * max(0, k - 12) / 8),
        ),
    ],
    ids=lambda value: value["type"] if isinstance(value, dict) else "",
)
def test_schedules_agree_with_torchs(schedule: dict[str, Any], make: Callable[[Any], LRScheduler]) -> None:
    found = rates(ScheduleSpec(warmup_steps=5, **schedule), 25)
    assert found == pytest.approx(torchs_rates(make, warmup=5, steps=25), rel=1e-9)


def test_inverse_sqrt_is_the_schedule_of_attention_is_all_you_need() -> None:
    """lrate = d^-½ · min(step^-½, step · warmup^-1.5), here with d such that the peak is 2."""
    expected = [2.0 * math.sqrt(7) * min(step**-0.5, step * 7**-1.5) for step in range(1, 101)]
    assert rates(ScheduleSpec(type="inverse_sqrt", warmup_steps=7, floor=0.0), 100) == pytest.approx(expected)


def test_inverse_sqrt_stays_at_its_floor_and_without_warm_up_begins_at_the_peak() -> None:
    found = rates(ScheduleSpec(type="inverse_sqrt", warmup_steps=0, floor=0.5), 6)
    assert found == pytest.approx([2.0, 2.0 / math.sqrt(2), 2.0 / math.sqrt(3), 1.0, 1.0, 1.0])


@pytest.mark.parametrize(
    ("warmup", "fraction", "expected"),
    [
        (2, 0.4, [1.0, 2.0, 2.0, 2.0, 2.0, 2.0, 1.75, 1.5, 1.25, 1.0]),
        (0, 0.01, [2.0] * 9 + [1.0]),
        (0, 1.0, [1.9, 1.8, 1.7, 1.6, 1.5, 1.4, 1.3, 1.2, 1.1, 1.0]),
        (8, 0.4, [0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0, 1.5, 1.0]),
    ],
    ids=["stable between", "one step at least", "no stable part", "warm-up longer than the stable part"],
)
def test_wsd_is_at_its_peak_until_the_last_part_of_the_run(warmup: int, fraction: float, expected: list[float]) -> None:
    schedule = ScheduleSpec(type="wsd", warmup_steps=warmup, floor=0.5, decay_fraction=fraction)
    assert rates(schedule, 10) == pytest.approx(expected)


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


def torchs_clip(model: nn.Module, kind: str) -> Any:
    match kind:
        case "norm":
            return nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        case "infinity_norm":
            return nn.utils.clip_grad_norm_(model.parameters(), 0.5, norm_type=math.inf)
    return nn.utils.clip_grad_value_(model.parameters(), 0.5)


@pytest.mark.parametrize(("kind", "order"), [("norm", 2.0), ("infinity_norm", math.inf), ("value", math.inf)])
def test_clipping_equals_torchs_and_returns_the_euclidean_norm_from_before(kind: Any, order: float) -> None:
    ours, theirs, untouched = (with_gradients(tiny_model(), 3.0) for _ in range(3))
    torchs_clip(theirs, kind)
    norm = clip_gradients(ours, ClipSpec(type=kind, threshold=0.5))
    assert all(torch.equal(a, b) for a, b in zip(gradients(ours), gradients(theirs), strict=True))
    assert torch.equal(norm, nn.utils.clip_grad_norm_(untouched.parameters(), math.inf))
    after = torch.cat([g.flatten() for g in gradients(ours)]).norm(order)
    assert float(after) == pytest.approx(0.5, rel=1e-5)


@pytest.mark.parametrize("clip", [None, *(ClipSpec(type=kind, threshold=1e9) for kind in KINDS)])
def test_without_clipping_or_below_the_threshold_gradients_stay_as_they_are(clip: ClipSpec | None) -> None:
    model = with_gradients(tiny_model())
    before = gradients(model)
    norm = clip_gradients(model, clip)
    assert float(norm) == pytest.approx(float(torch.cat([g.flatten() for g in before]).norm()), rel=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(before, gradients(model), strict=True))


@pytest.mark.parametrize("clip", [None, *(ClipSpec(type=kind) for kind in KINDS)])
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
