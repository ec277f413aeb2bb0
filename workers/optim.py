"""Learning-rate schedules, parameter groups and clipping: pure functions around torch's fused AdamW."""

import math

import torch
from torch import Tensor, nn

from api.spec import ClipSpec, OptimizerSpec, ScheduleSpec


def learning_rate(spec: ScheduleSpec, peak: float, step: int, total_steps: int) -> float:
    """Return the learning rate of `step`, counted from 1.

    Linear warm-up reaches the peak at step `warmup`; cosine decay (Loshchilov & Hutter, 2017) then falls to
    floor × peak at the last step.
    """
    warmup = warmup_steps(spec, total_steps)
    if step <= warmup:
        return peak * step / warmup
    if spec.type == "constant":
        return peak
    progress = (step - warmup) / max(1, total_steps - warmup)
    return peak * (spec.floor + (1 - spec.floor) * 0.5 * (1 + math.cos(math.pi * progress)))


def warmup_steps(spec: ScheduleSpec, total_steps: int) -> int:
    """Return the steps of warm-up: as given, else a tenth of the run but at most 100."""
    return spec.warmup_steps if spec.warmup_steps is not None else min(100, total_steps // 10)


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
    """Clip in place; return the global gradient norm from before, which is finite only if every gradient is."""
    threshold = spec.threshold if spec is not None else math.inf
    return torch.nn.utils.clip_grad_norm_(model.parameters(), threshold)
