"""The one place, with `main.py`, where workers meet Ray: who am I in the group, and which start of it is this?"""

import os
from collections.abc import Mapping

import ray
import ray.train
import torch
import torch.distributed as dist
from ray.exceptions import OutOfMemoryError
from ray.train.v2._internal.execution.callback import WorkerGroupCallback
from ray.train.v2._internal.execution.worker_group.poll import WorkerGroupPollStatus
from ray.util.metrics import Gauge

from api.documents import JobDocument
from api.jobs import Reason
from api.spec import TrainSpec
from api.storage import Bucket
from workers.attempt import Attempt
from workers.lost import BRIEFLY, give_notice, note_dead_ranks
from workers.session import Session
from workers.settings import WorkerSettings

_RESTART = "LOCKSTEP_RESTART"
_GAUGES = {
    "step": "Optimizer steps done",
    "loss": "Mean training loss since the metric line before, in nats per token",
    "eval_loss": "Mean loss on the eval split at the newest evaluation, in nats per token",
    "tokens_per_second": "Tokens trained per second, over all workers",
    "utilisation": "Model FLOP/s as a fraction of the peak measured at the start, over all workers",
    "data_wait": "Fraction of the time that training waited for data",
    "checkpoint_stall": "Fraction of the time that checkpoints held the training",
}
"""What Ray's metrics port shows, with the names that metric lines have."""


def connect() -> str:
    """Join the Ray cluster that started this process and return its session name."""
    if not ray.is_initialized():
        ray.init(address="auto", log_to_driver=False)
    return str(ray._private.worker._global_node.session_name)


class GroupWatcher(WorkerGroupCallback):  # type: ignore[misc] # Ray carries no types
    """What Ray Train's controller, which outlives each worker group, does for the ranks.

    It gives each start of the group its number before any rank runs: a rank never chooses it, so a late zombie of an
    earlier start cannot become the newest segment. It passes on the notice that a machine of ours is about to go. And
    it says of a rank that died without a word what the rank itself could not.
    """

    def __init__(self, attempt: Attempt) -> None:
        self._attempt = attempt
        self._restart = -1
        self._noticed = False

    def before_worker_group_start(self, worker_group_context: object) -> None:
        self._restart += 1
        self._noted: set[int] = set()

    def after_worker_group_start(self, worker_group: object) -> None:
        worker_group.execute(_set_restart, self._restart)  # type: ignore[attr-defined]

    def after_worker_group_poll_status(self, worker_group_status: WorkerGroupPollStatus) -> None:
        preemption = worker_group_status.get_preemption_info()
        if preemption is not None and not self._noticed:  # again at the next poll, if the store did not take it
            self._noticed = give_notice(self._bucket(), self._attempt, "a machine of this run is being drained")
        new = {rank: error for rank, error in worker_group_status.errors.items() if rank not in self._noted}
        if new:
            self._noted |= new.keys()
            deaths = {rank: (reason_of_death(e) or Reason.WORKER_LOST, f"rank {rank}: {e}") for rank, e in new.items()}
            note_dead_ranks(self._bucket(), self._attempt, self._restart, deaths)

    def _bucket(self) -> Bucket:
        return Bucket(WorkerSettings().storage, BRIEFLY)


def reason_of_death(error: BaseException) -> Reason | None:
    """Return what Ray says of a worker that was killed, where that is more than that it is gone."""
    words = str(error)
    if isinstance(error, OutOfMemoryError) or "running low on memory" in words or "OutOfMemoryError" in words:
        return Reason.OUT_OF_MEMORY
    return None


def _set_restart(restart: int) -> None:
    os.environ[_RESTART] = str(restart)


class Gauges:
    """Figures of a job as Prometheus series `lockstep_<name>` on Ray's own metrics port, which puts `ray_` before."""

    def __init__(self, job: JobDocument, attempt: int) -> None:
        tags = {"job_id": job.id, "job_name": job.spec.name, "attempt": str(attempt)}
        self._gauges = {name: Gauge(f"lockstep_{name}", text, tuple(tags)) for name, text in _GAUGES.items()}
        for gauge in self._gauges.values():
            gauge.set_default_tags(tags)

    def show(self, values: Mapping[str, float]) -> None:
        for name in self._gauges.keys() & values.keys():
            self._gauges[name].set(values[name])


def current_session(job: JobDocument, attempt: int) -> Session:
    """Return this rank's session, inside a Ray Train worker. A GPU is used only if Ray reserved one for the rank."""
    spec = job.spec
    assert isinstance(spec, TrainSpec)
    context = ray.train.get_context()
    device = ray.train.torch.get_device() if spec.resources.gpus else torch.device("cpu")
    assert context.get_world_size() == 1 or dist.is_initialized()
    return Session(
        attempt=attempt,
        restart=int(os.environ[_RESTART]),
        rank=context.get_world_rank(),
        world_size=context.get_world_size(),
        device=device,
        show=Gauges(job, attempt).show,
    )
