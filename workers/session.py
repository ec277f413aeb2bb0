"""What the training loop knows of where it runs: a rank in a group. Ray, torchrun and a plain process all fit.

The loop calls nothing of Ray. Whoever starts it has made torch's process group (or none, for one process).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar, cast

import torch
import torch.distributed as dist

T = TypeVar("T")


def show_nothing(values: Mapping[str, float]) -> None:
    """Where nobody watches, the figures are in the metric lines alone."""


@dataclass(frozen=True)
class Session:
    """One rank of a worker group."""

    attempt: int
    restart: int
    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    show: Callable[[Mapping[str, float]], None] = show_nothing
    """Shows the newest figures, by name, to whoever watches live; rank 0 calls it with each metric line."""

    @property
    def leads(self) -> bool:
        """Rank 0 writes what the group writes once."""
        return self.rank == 0

    def maximum(self, *values: int) -> list[int]:
        """Return the element-wise maximum over all ranks."""
        reduced = self._reduce(torch.tensor(values, dtype=torch.int64), dist.ReduceOp.MAX)
        return [int(value) for value in reduced]

    def total(self, values: torch.Tensor) -> torch.Tensor:
        """Return the element-wise sum over all ranks, in float64."""
        return self._reduce(values.to(torch.float64), dist.ReduceOp.SUM)

    def broadcast(self, value: T | None) -> T:
        """Return rank 0's value on every rank."""
        if self.world_size == 1:
            return cast(T, value)
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return cast(T, box[0])

    def gather(self, value: T) -> list[T]:
        """Return every rank's value on every rank, by rank."""
        if self.world_size == 1:
            return [value]
        values: list[T | None] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return cast(list[T], values)

    def _reduce(self, values: torch.Tensor, op: dist.ReduceOp.RedOpType) -> torch.Tensor:
        if self.world_size == 1:
            return values
        on_device = values.to(self.device, copy=True)  # all_reduce works in place
        dist.all_reduce(on_device, op=op)
        return on_device.cpu()
