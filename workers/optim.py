"""Learning-rate schedules, parameter groups and clipping: pure functions around torch's fused AdamW."""

import math

import torch
from torch import Tensor, nn

from api.spec import ClipSpec, OptimizerSpec, ScheduleSpec


def learning_rate(spec: ScheduleSpec, peak: float, step: int, total_steps: int) -> float:
    """Return the learning rate of `step`, counted from 1.

    Linear warm-up reaches the peak at step `warmup`; then the schedule's own shape, a fraction of the peak, follows.
    """
    warmup = warmup_steps(spec, total_steps)
    if step <= warmup:
        return peak * step / warmup
    return peak * _after_warmup(spec, step, warmup, total_steps)


def _after_warmup(spec: ScheduleSpec, step: int, warmup: int, total_steps: int) -> float:
    """Return the fraction of the peak at a step after the warm-up; it never rises.

    Cosine: Loshchilov & Hutter, 2017. Inverse square root: Vaswani et al., 2017, section 5.3. Warm-up, stable, decay:
    Hu et al., 2024 (MiniCPM).
    """
    floor = spec.floor if spec.floor is not None else 1.0
    match spec.type:
        case "constant":
            return 1.0
        case "linear":
            return _linear_fall(floor, step, warmup, total_steps)
        case "cosine":
            progress = (step - warmup) / max(1, total_steps - warmup)
            return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))
        case "inverse_sqrt":
            return max(floor, math.sqrt(max(1, warmup) / step))
        case "wsd":
            return _linear_fall(floor, step, max(warmup, total_steps - decay_steps(spec, total_steps)), total_steps)


def _linear_fall(floor: float, step: int, start: int, end: int) -> float:
    """Return 1 up to step `start`, the floor at step `end`, and a straight line between."""
    if step <= start:
        return 1.0
    return floor + (1 - floor) * ((end - step) / (end - start))


def warmup_steps(spec: ScheduleSpec, total_steps: int) -> int:
    """Return the steps of warm-up: as given, else a tenth of the run but at most 100."""
    return spec.warmup_steps if spec.warmup_steps is not None else min(100, total_steps // 10)


def decay_steps(spec: ScheduleSpec, total_steps: int) -> int:
    """Return the steps in which the rate of `wsd` falls: at least the last one, or the floor would not be reached."""
    assert spec.decay_fraction is not None  # filled in by the validator
    return max(1, round(spec.decay_fraction * total_steps))


def make_optimizer(model: nn.Module, spec: OptimizerSpec) -> torch.optim.AdamW:
    """Return AdamW that decays matrices (two or more dimensions) and leaves norms and biases alone."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": spec.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=spec.learning_rate, betas=spec.betas, eps=spec.epsilon, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def clip_gradients(model: nn.Module, spec: ClipSpec | None) -> Tensor:
    """Clip in place; return the Euclidean norm of all gradients from before, whatever they are clipped by.

    It is finite only if every gradient is. That is why it is taken first: a clamp would turn an infinite gradient
    into a fine one, and the run would go on with it.
    """
    parameters = [p for p in model.parameters() if p.grad is not None]
    if spec is not None and spec.type == "norm":
        return nn.utils.clip_grad_norm_(parameters, spec.threshold)
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if spec is not None and spec.type == "infinity_norm":
        nn.utils.clip_grad_norm_(parameters, spec.threshold, norm_type=math.inf)
    elif spec is not None:
        nn.utils.clip_grad_value_(parameters, spec.threshold)
    return norm
