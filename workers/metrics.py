"""What a run measures of itself between two metric lines."""

from pathlib import Path
from time import perf_counter

import torch


class Meter:
    """Adds up between two metric lines; `line` gives the figures and begins anew."""

    def __init__(self, flops_per_token: int, device: torch.device, peak: float | None = None) -> None:
        """`peak` is what all workers together could do, in FLOP/s; without it there is no utilisation."""
        self._flops_per_token, self._device, self._peak = flops_per_token, device, peak
        self._waited = self._stalled = 0.0
        self._begin()

    def _begin(self) -> None:
        self._start, self._paused = perf_counter(), 0.0

    def pause(self, seconds: float) -> None:
        """Leave this time (an evaluation) out of the throughput."""
        self._paused += seconds

    def line(self, steps: int, tokens: int, waited: float, stalled: float) -> dict[str, float]:
        """Return throughput, utilisation, data wait and checkpoint stall since the last line, and the peak of memory.

        `steps` and `tokens` were trained since then; `waited` and `stalled` are running totals of the seconds
        that the training thread was held.
        """
        elapsed = max(perf_counter() - self._start - self._paused, 1e-9)
        rate = tokens / elapsed
        values = {
            "tokens_per_second": rate,
            "seconds_per_step": elapsed / max(steps, 1),
            "model_flops_per_second": rate * self._flops_per_token,
            **({"utilisation": rate * self._flops_per_token / self._peak} if self._peak else {}),
            "data_wait": (waited - self._waited) / elapsed,
            "checkpoint_stall": (stalled - self._stalled) / elapsed,
            "memory_bytes": float(peak_memory(self._device)),
        }
        self._waited, self._stalled = waited, stalled
        self._begin()
        return values


def peak_memory(device: torch.device) -> int:
    """Return the most memory that this process has had so far, in bytes: on the GPU where there is one, else resident.

    0 where the system does not tell.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    lines = Path("/proc/self/status").read_text().splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)
