"""The peak of this hardware: the rate of plain matrix multiplication, with all ranks at it at once.

A rank alone would measure more than a rank gets in training: ranks share a machine's memory, its power and its cores,
if there are fewer cores than threads. So the world's peak is the sum over ranks of what each reaches in the same
stretch of time; the best of a few stretches, because what else the machine does can only slow them.

It leaves no trace in the run: its numbers come from a generator of its own, and its buffers go when it is done.
"""

import logging
import math
from collections.abc import Callable
from time import perf_counter

import torch

from api.spec import Precision
from workers.session import Session

logger = logging.getLogger("lockstep.workers")

_ROUNDS = 3
_SIDE_OF_THREAD = 512
"""Three such matrices of fp32 fill a core's cache; t threads get √t times the side, so the same share each."""
_SIDE_OF_GPU = 8192


def measure_peak(session: Session, precision: Precision, seconds: float) -> float | None:
    """Return the FLOP/s of all ranks together, the same on every rank; None if `seconds`, the time to take, is 0."""
    if not seconds:
        return None
    multiply, operations = make_multiplication(session.device, precision)
    multiply()  # the first one also loads and chooses the kernel
    rates = []
    for _ in range(_ROUNDS):
        session.gather(None)  # all ranks begin together
        rates.append(operations * calls_per_second(multiply, session.device, seconds / _ROUNDS))
    peak = float(session.total(torch.tensor(rates, dtype=torch.float64)).max())
    if session.device.type == "cuda":
        del multiply
        torch.cuda.empty_cache()
    logger.info("peak of %d workers in %s: %.4g FLOP/s", session.world_size, precision, peak)
    return peak


def make_multiplication(device: torch.device, precision: Precision) -> tuple[Callable[[], object], int]:
    """Return a product of two square matrices, to be called again and again, and its floating-point operations."""
    side = _SIDE_OF_GPU if device.type == "cuda" else round(_SIDE_OF_THREAD * math.sqrt(torch.get_num_threads()))
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    generator = torch.Generator(device).manual_seed(0)  # the run's own stays where it is
    left, right = torch.rand((2, side, side), generator=generator, device=device).to(dtype)
    out = torch.empty_like(left)
    return lambda: torch.mm(left, right, out=out), 2 * side**3


def calls_per_second(call: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Call again and again until the time is over; on a GPU until the calls are done, not only begun."""
    count, start = 0, perf_counter()
    while (elapsed := perf_counter() - start) < seconds or not count:
        call()
        count += 1
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return count / elapsed
