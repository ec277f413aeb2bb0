"""What a run measures of itself between two metric lines."""

import os
from time import perf_counter

import torch


class Meter:
    """Adds up between two metric lines; `line` gives the figures and begins anew."""

    def __init__(self, flops_per_token: int, device: torch.device) -> None:
        self._flops_per_token, self._device = flops_per_token, device
        self._waited = self._stalled = 0.0
        self._begin()

    def _begin(self) -> None:
        self._start, self._paused = perf_counter(), 0.0

    def pause(self, seconds: float) -> None:
        """Leave this time (an evaluation) out of the throughput."""
        self._paused += seconds

    def line(self, steps: int, tokens: int, waited: float, stalled: float) -> dict[str, float]:
        """Return throughput, data wait, checkpoint stall and memory since the last line.

        `steps` and `tokens` were trained since then; `waited` and `stalled` are running totals of the seconds
        that the training thread was held.
        """
        elapsed = max(perf_counter() - self._start - self._paused, 1e-9)
        rate = tokens / elapsed
        values = {
            "tokens_per_second": rate,
            "seconds_per_step": elapsed / max(steps, 1),
            "model_flops_per_second": rate * self._flops_per_token,
            "data_wait": (waited - self._waited) / elapsed,
            "checkpoint_stall": (stalled - self._stalled) / elapsed,
            "memory_bytes": float(memory_bytes(self._device)),
        }
        self._waited, self._stalled = waited, stalled
        self._begin()
        return values


def memory_bytes(device: torch.device) -> int:
    """Return the memory of this process: the GPU's peak where there is one, else what is resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
