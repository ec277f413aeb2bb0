"""The one place, with `main.py`, where workers meet Ray: who am I in the group, and which start of it is this?"""

import os

import ray
import ray.train
import torch
import torch.distributed as dist
from ray.train.v2._internal.execution.callback import WorkerGroupCallback

from workers.session import Session

_RESTART = "LOCKSTEP_RESTART"


def connect() -> str:
    """Join the Ray cluster that started this process and return its session name."""
    if not ray.is_initialized():
        ray.init(address="auto", log_to_driver=False)
    return str(ray._private.worker._global_node.session_name)


class RestartCounter(WorkerGroupCallback):  # type: ignore[misc] # Ray carries no types
    """Gives each start of the worker group its number, on Ray Train's controller, before any rank runs.

    A rank never chooses it, so a late zombie of an earlier start cannot become the newest segment.
    """

    def __init__(self) -> None:
        self._restart = -1

    def before_worker_group_start(self, worker_group_context: object) -> None:
        self._restart += 1

    def after_worker_group_start(self, worker_group: object) -> None:
        worker_group.execute(_set_restart, self._restart)  # type: ignore[attr-defined]


def _set_restart(restart: int) -> None:
    os.environ[_RESTART] = str(restart)


def current_session(attempt: int, gpus: int) -> Session:
    """Return this rank's session, inside a Ray Train worker. A GPU is used only if Ray reserved one for the rank."""
    context = ray.train.get_context()
    device = ray.train.torch.get_device() if gpus else torch.device("cpu")
    assert context.get_world_size() == 1 or dist.is_initialized()
    return Session(
        attempt=attempt,
        restart=int(os.environ[_RESTART]),
        rank=context.get_world_rank(),
        world_size=context.get_world_size(),
        device=device,
    )
